"""Results go to stdout, all else to stderr, and bars and tables only to terminals."""

import io
import sys

import pytest

from varcli import console


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    """Make stdout and stderr terminals; in the test itself, because pytest sets both anew before it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())


def steps(total, quiet=False):
    with console.progress("images", total, quiet) as advance:
        for number in range(3):
            advance()
            console.result(f"{number}.png")


def test_no_bar_in_a_pipe(capsys):
    steps(3)
    assert capsys.readouterr() == ("0.png\n1.png\n2.png\n", "")


def test_a_bar_on_a_terminal(monkeypatch):
    open_terminal(monkeypatch)
    steps(3)
    assert "images" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()


@pytest.mark.parametrize("arguments", [(3, True), (None, False)])
def test_no_bar_when_quiet_or_endless(monkeypatch, arguments):
    open_terminal(monkeypatch)
    steps(*arguments)
    assert sys.stderr.getvalue() == ""


def test_results_in_a_pipe_do_not_go_where_the_bar_is(monkeypatch):
    open_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    steps(3)
    assert sys.stdout.getvalue() == "0.png\n1.png\n2.png\n"
    assert ".png" not in sys.stderr.getvalue()


def test_tables_have_tabs_in_a_pipe_and_headings_on_a_terminal(capsys, monkeypatch):
    rows = [("207", "golden [retriever]"), ("1", "goldfish")]
    console.table(("class", "name"), rows)
    assert capsys.readouterr().out == "207\tgolden [retriever]\n1\tgoldfish\n"
    monkeypatch.setattr(sys, "stdout", Terminal())
    console.table(("class", "name"), rows)
    shown = sys.stdout.getvalue()
    assert "class" in shown and "goldfish" in shown and "[retriever]" in shown


def test_an_error_is_one_line(capsys):
    console.failure("what: given;\n  what would be right")
    assert capsys.readouterr() == ("", "var: error: what: given; what would be right\n")
