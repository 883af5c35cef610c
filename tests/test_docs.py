"""README and docs tell the truth: what they show is what the program prints, what they tell to type works."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
import typer

from support import generated, small
from support.fork_server import python
from varcli import cli
from varcli.checkpoints.registry import count_in_words, registry

README = (generated.ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page.relative_to(generated.ROOT).as_posix(): page.read_text(encoding="utf-8") for page in generated.PAGES}
BASH_BLOCKS = {name: re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for name, text in PAGES.items()}
TRIED = ("README.md", "docs/sampling.md", "docs/editing.md", "docs/likelihood.md")
"""Pages whose commands are run; those of the others need networks, GPUs or hours."""
LINES = {
    name: [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    for name, blocks in BASH_BLOCKS.items()
}
COMMANDS = re.compile(r"\bvar (?=[a-z])[^|>&#]*")
"""Each use of `var` in a line, up to whatever the shell does with it."""
UNTRIED = re.compile(r"pip|var-d|code-\d|\.pth|\bphotos\b|\bruns/|\bvar eval\b|\bvar report\b|decide-at")
"""Lines that need a network, released or other weights or a data set; the others are run."""
BASH = None if os.name == "nt" else shutil.which("bash")


def test_the_readme_begins_with_the_two_commands():
    assert BASH_BLOCKS["README.md"][0] == "pip install . && var sample --class 207\n"
    assert BASH_BLOCKS["README.md"][1] == "pip install '.[test]' && pytest\n"
    assert README.index("```bash") == README.index("```"), "nothing stands before them"


def test_the_readmes_models_are_those_that_are_registered():
    known = registry()
    rows = [line.split("|") for line in README.splitlines() if line.startswith("| `var-d")]
    shown = []
    for _, names, pixels, parameters, fid, _ in rows:
        depths = re.findall(r"d\d\d", names)
        entries = [known[f"var-{depth}"] for depth in depths]
        assert {pixels.strip()} == {f"{entry.pixels} × {entry.pixels}" for entry in entries}
        assert parameters.strip() == ", ".join(count_in_words(entry.parameters) for entry in entries)
        assert fid.strip() == ", ".join(f"{entry.fid:.2f}" for entry in entries)
        shown += depths
    assert shown == ["d16", "d20", "d24", "d30", "d36"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "command"), [(name, part[1]) for name, text in PAGES.items() for part in generated.PART.finditer(text)]
)
def test_shows_what_the_program_prints(page, command):
    """Where this fails, `python tests/support/generated.py` fixes it."""
    (shown,) = [part[0] for part in generated.PART.finditer(PAGES[page]) if part[1] == command]
    assert shown.splitlines() == generated.filled(f"<!-- begin: {command} -->\n<!-- end -->")[12:-12].splitlines()


def test_the_page_of_commands_has_all_of_them():
    for name in cli.COMMANDS:
        group = cli.Commands().get_command(None, name)
        for words in [f"{name} {part}" for part in getattr(group, "commands", {})] or [name]:
            assert f"<!-- begin: var {words} --help -->" in PAGES["docs/cli.md"]
        assert "--install-completion" not in {flag for option in group.params for flag in option.opts}


@pytest.mark.parametrize("line", sorted({line for lines in LINES.values() for line in lines if "var " in line}))
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


@pytest.mark.slow
@pytest.mark.parametrize("page", TRIED)
def test_every_command_that_can_be_tried_works(page, tmp_path, monkeypatch, capfd):
    """One after the other, as a reader would, with a small model in place of the bundled one."""
    small.save(tmp_path / "small.safetensors")
    monkeypatch.setenv("VAR_CHECKPOINT", "small.safetensors")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["sample", "-c", "207", "-q"]) == 0  # the image of the first command, which installs too
    lines = [line for line in LINES[page] if not UNTRIED.search(line)]
    assert len(lines) > 5
    for line in lines:
        words = shlex.split(line, comments=True)
        if not set("|>&") & set("".join(words)):
            assert cli.run(words[1:]) == 0, f"{line}: {capfd.readouterr().err}"
        elif BASH:
            here = f'var() {{ {shlex.quote(python())} -m varcli "$@"; }}'
            subprocess.run([BASH, "-c", f"set -euo pipefail; {here}\n{line}"], check=True)
    made = {path.name for path in tmp_path.rglob("*")}
    named = {word for line in lines for word in re.findall(r"[\w-]+\.(?:png|gif|npz|tar)", line)}
    assert named <= made or not BASH


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_examples_run(page, tmp_path, monkeypatch):
    """In the order of the page; those fenced `py` are left out, because they need weights from a network or hours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VAR_CHECKPOINT", raising=False)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert (tmp_path / "dog.png").exists()


def slug(heading):
    """The anchor that Markdown renderers give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_every_link_leads_somewhere():
    for file in [*generated.ROOT.glob("*.md"), *generated.ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)]+)", file.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            page = file.parent / path if path else file
            assert page.exists(), f"{file.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in map(slug, headings), f"{file.name}: {target}"


def test_every_folder_is_on_the_map():
    listed = set(re.findall(r"^  (\w+)/ ", README, re.MULTILINE))
    folders = {path.parent.name for path in (generated.ROOT / "src" / "varcli").glob("*/__init__.py")}
    assert listed == folders
