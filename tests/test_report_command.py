"""`var report`: from files, a pipe and folders of runs to a page, whole or not at all."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.evaluations import evaluation, tokenizer, write_run
from varcli import cli


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two results and a run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("one.json").write_text(json.dumps(evaluation(), indent=1))
    Path("lines.jsonl").write_text(f"{json.dumps(evaluation(n=5000))}\n{json.dumps(tokenizer())}\n")
    write_run(tmp_path / "run")
    return tmp_path


def give(monkeypatch, text):
    """Put a text where standard input is."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_everything_on_one_page(here, capsys):
    assert cli.run(["report", "one.json", "lines.jsonl", "run"]) == 0
    assert capsys.readouterr() == ("report.html\n", "")
    text = Path("report.html").read_text(encoding="utf-8")
    for said in ("var-d16, n 5000", "Reconstruction", "Training of the transformer", "0.84", "Highest spread"):
        assert said in text
    assert sorted(path.name for path in here.iterdir()) == ["lines.jsonl", "one.json", "report.html", "run"]


def test_the_ending_says_what_is_written(here):
    for name in ("x.html", "x.HTM", "x.md", "x.markdown"):
        assert cli.run(["report", "one.json", "-o", name]) == 0
    assert Path("x.html").read_bytes() == Path("x.HTM").read_bytes()
    assert Path("x.md").read_bytes() == Path("x.markdown").read_bytes()
    text = Path("x.md").read_text(encoding="utf-8")
    assert text.startswith("# var-d16\n")
    assert "| var-d16, paper | 50 000 | – | 3.30 | – | 274.4 | – | 0.84 | 0.51 | – |" in text


def test_a_pipe_is_a_file_like_others(here, monkeypatch):
    give(monkeypatch, Path("lines.jsonl").read_text())
    assert cli.run(["report", "one.json", "-", "-o", "piped.html"]) == 0
    assert cli.run(["report", "one.json", "lines.jsonl", "-o", "read.html"]) == 0
    assert Path("piped.html").read_bytes() == Path("read.html").read_bytes()


@pytest.mark.parametrize(
    "mistake",
    [
        ([], 2, "Missing argument 'RESULT...'"),
        (["one.json", "-o", "x"], 2, "--out must end in .html or .md (got x)"),
        (["one.json", "-o", "-"], 2, "--out must end in .html or .md (got -)"),
        (["missing.json"], 3, "evaluation result missing.json cannot be read: No such file or directory"),
        (["recipe.json"], 3, "evaluation result recipe.json, line 1 must be what `var eval --out` or `--json` writes"),
        (["one.json", "run/metrics.jsonl"], 3, "evaluation result run/metrics.jsonl, line 1 must be what"),
        (["run/state.safetensors"], 3, "evaluation result run/state.safetensors is not JSON"),
        (["newer.json"], 3, "evaluation result newer.json, line 1 must have format 1 (got 2)"),
        (["run/samples"], 3, "training run run/samples has no metrics.jsonl"),
        (["-"], 3, "evaluation result standard input is empty"),
        (["one.json", "-o", "none/x.html"], 5, "none/x.html cannot be written: there is no folder none"),
        (["one.json", "-o", "one.json/x.md"], 5, "one.json/x.md cannot be written: "),
        (["one.json", "-o", "folder.html"], 5, "folder.html cannot be written: it is a folder"),
    ],
    ids=lambda mistake: " ".join(mistake[0]),
)
def test_mistakes(here, monkeypatch, capsys, mistake):
    """The one table: arguments, exit code, message."""
    arguments, code, message = mistake
    give(monkeypatch, "")
    Path("recipe.json").write_text('{"flour": 3}')
    Path("newer.json").write_text(json.dumps(evaluation() | {"format": 2}))
    Path("folder.html").mkdir()
    before = sorted(here.rglob("*"))
    assert cli.run(["report", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("var: error: ") and err.count("\n") == 1
    assert message in err
    assert sorted(here.rglob("*")) == before


def test_a_failure_leaves_the_last_page(here, capsys):
    assert cli.run(["report", "one.json"]) == 0
    before = Path("report.html").read_bytes()
    Path("one.json").write_text("{")
    assert cli.run(["report", "one.json"]) == 3
    assert Path("report.html").read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="no such device")
def test_a_full_disk(here, capsys):
    Path("full.html").symlink_to("/dev/full")
    assert cli.run(["report", "one.json", "-o", "full.html"]) == 5
    assert "full.html cannot be written: No space left on device" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("out", "unneeded"), [("x.html", ["torch", "scipy"]), ("x.md", ["torch", "matplotlib"])])
def test_a_report_imports_no_more_than_it_needs(here, out, unneeded):
    code = (
        f"import sys; from varcli import cli; assert cli.run(['report', 'one.json', 'run', '-o', {out!r}]) == 0;"
        f"print([name for name in {unneeded} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == f"{out}\n[]\n"
