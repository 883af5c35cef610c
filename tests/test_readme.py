"""The README tells the truth: what it shows is what the program prints, what it tells to type works."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer

from support import readme, small
from varcli import cli

TEXT = readme.README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = re.compile(r"\bvar (?=[a-z])[^|>&#]*")
"""Each use of `var` in a line, up to whatever the shell does with it."""
UNTRIED = re.compile(r"pip|var-d|\.pth|\bphotos\b|\bruns/|\bvar eval\b|scorer\.pt")
"""Lines that need a network, released or other weights or a data set; the others are run."""
BASH = None if os.name == "nt" else shutil.which("bash")
HERE = f'var() {{ {shlex.quote(sys.executable)} -m varcli "$@"; }}'
"""For the shell: the `var` under test, wherever it is installed."""


def test_begins_with_the_two_commands():
    assert BLOCKS[0] == "pip install . && var sample --class 207\n"
    assert BLOCKS[1] == "pip install '.[test]' && pytest\n"
    assert TEXT.index("```bash") == TEXT.index("```"), "nothing stands before them"


@pytest.mark.parametrize("command", [part[1] for part in readme.PART.finditer(TEXT)])
def test_shows_what_the_program_prints(command):
    """Where this fails, `python tests/support/readme.py` mends it."""
    (shown,) = [part[0] for part in readme.PART.finditer(TEXT) if part[1] == command]
    assert shown.splitlines() == readme.filled(f"<!-- begin: {command} -->\n<!-- end -->")[12:-12].splitlines()


@pytest.mark.parametrize("line", [line for line in LINES if "var " in line])
def test_every_command_is_understood(line):
    """Down to the last option and the range of its value."""
    found = COMMANDS.findall(line)
    assert found
    for command in found:
        group, name, words = typer.main.get_command(cli.app), "var", shlex.split(command)[1:]
        context = group.make_context(name, words)
        while hasattr(group, "commands") or isinstance(group, cli.Commands):
            name, group, words = group.resolve_command(context, [*context._protected_args, *context.args])
            context = group.make_context(name, words, parent=context)


def test_every_command_that_can_be_tried_works(tmp_path, monkeypatch, capfd):
    """One after the other, as a reader would, with a small model in place of the bundled one."""
    small.save(tmp_path / "small.safetensors")
    monkeypatch.setenv("VAR_CHECKPOINT", "small.safetensors")
    monkeypatch.chdir(tmp_path)
    lines = [line for line in LINES if not UNTRIED.search(line)]
    assert len(lines) > 15
    for line in lines:
        words = shlex.split(line, comments=True)
        if not set("|>&") & set("".join(words)):
            assert cli.run(words[1:]) == 0, f"{line}: {capfd.readouterr().err}"
        elif BASH:
            subprocess.run([BASH, "-c", f"set -euo pipefail; {HERE}\n{line}"], check=True)
    made = {path.name for path in tmp_path.rglob("*")}
    named = {word for line in lines for word in re.findall(r"[\w-]+\.(?:png|gif|npz|tar)", line)}
    assert named <= made or not BASH


def test_every_link_leads_somewhere():
    for file in [readme.README, *readme.README.parent.glob("*.md"), *readme.README.parent.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_every_file_is_on_the_map():
    (listed,) = re.findall(r"^src/varcli/\n(.*?)^tests/", TEXT, re.DOTALL | re.MULTILINE)
    shown, folders = set(), []
    for line in listed.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth - 1 :] = [name]
        shown.add("".join(folders))
        assert name.endswith("/") or len(line.split()) > 1, f"{name}: what is it for?"
    source = readme.README.parent / "src" / "varcli"
    there = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if path.name != "__init__.py"}
    assert {path for path in shown if path.endswith(".py")} == there
    assert all((source / path).exists() for path in shown)
