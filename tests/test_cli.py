"""The command line as a whole: its options, its errors and exit codes, how it starts and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import small
from varcli import __version__, cli
from varcli.config import TransformerConfig
from varcli.errors import CheckpointError, InputError, RunError, UsageError

EDITING = (
    "--class -c --count -n --seed --best-of --decide-at --feather --composite --released-rule --checkpoint -m --cfg "
    "--top-k --top-p --temperature --ssg --vpg --cfg-scales --refiner --refine-from --smooth --approximate --out -o "
    "--grid --growth --device --dtype --json --quiet -q "
)
OPTIONS = {
    "sample": "--class -c --count -n --seed --checkpoint -m --cfg --top-k --top-p --temperature --ssg --vpg "
    "--cfg-scales --refiner --refine-from --smooth --preset --approximate --out -o --grid --growth --batch-size "
    "--device --dtype --quantize --best-of --decide-at --classifier --nproc --resume --json --quiet -q",
    "eval": "--fid --sfid --is --kid --prc --agreement --features --dinov2 --num-images -n --reference -r --tokenizer "
    "--checkpoint -m --seed --cfg --top-k --top-p --temperature --ssg --vpg --cfg-scales --refiner --refine-from "
    "--smooth --preset --approximate --best-of --decide-at --classifier --resize --skip-bad --inception "
    "--lpips-weights --save-stats --save-images --out -o --batch-size --device --dtype --quantize --nproc --json "
    "--quiet -q",
    "eval stats": "--out -o --features --keep-features --resize --skip-bad --inception --dinov2 --device --nproc "
    "--quiet -q",
    "inpaint": EDITING + "--alpha --box --fit-mask",
    "outpaint": EDITING + "--pad --to",
    "edit": EDITING + "--mask --alpha --box --fit-mask --strength --from-class",
    "score": "--class -c --heatmap --checkpoint -m --device --dtype --json --quiet -q",
    "classify": "--reference -r --num-images -n --top --candidates --encodings --skip-bad --checkpoint -m --device "
    "--dtype --json --quiet -q",
    "reconstruct": "--out -o --checkpoint -m --grid --growth --device --json --quiet -q",
    "report": "--out -o",
    "bench": "--checkpoint -m --random --vs --batch-size --rounds --device --dtype --quantize --approximate --out -o "
    "--json --quiet -q --cfg --top-k --top-p --temperature --ssg --vpg --cfg-scales --refiner --refine-from --smooth",
    "demo": "--checkpoint -m --host --port --browser",
    "show": "--json",
    "classes": "--checkpoint -m --json",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small.save(tmp_path_factory.mktemp("model") / "small.safetensors"))


def command(name):
    return cli.Commands().get_command(None, name)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_are_these(name):
    """Whoever adds, drops or renames an option changes this on purpose."""
    found = [flag for p in command(name).params for flag in p.opts if flag.startswith("-")]
    assert sorted(found) == sorted(OPTIONS[name].split())


def test_help_lists_the_commands(capsys):
    assert cli.run(["--help"]) == 0
    out = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert re.search(rf"\b{name}\b", out)


def test_nothing_typed_shows_the_help_and_no_error(capsys):
    assert cli.run([]) == 2
    out, err = capsys.readouterr()
    assert "Usage: var" in out
    assert err == ""


def test_help_of_every_command_has_help_for_every_option():
    for name in OPTIONS:
        assert command(name).help
        for parameter in command(name).params:
            assert parameter.help, f"{name} {parameter.name}"


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"var {__version__}\n"


@pytest.mark.parametrize(
    "mistake",
    [
        (["flatten"], 2, "No such command 'flatten'."),
        (["sampel"], 2, "No such command 'sampel'. Did you mean 'sample'?"),
        (["sample", "-c", "golden", "retriever"], 2, "quotes keep several words together, as in --class 'golden"),
        (["sample", "-c", "1", "-m", "var-d99"], 4, "one of the names var-d36, var-d30; `var checkpoints list` shows"),
        (["--loud"], 2, "No such option: --loud"),
        (["sample"], 2, "--class is required, as in --class 207"),
        (["sample", "-c", "1", "--cgf", "3"], 2, "No such option: --cgf"),
        (["sample", "-c", "1", "--cfg", "much"], 2, "--cfg must be a number (got much)"),
        (["sample", "-c", "1", "-n", "0"], 2, "--count must be at least 1 (got 0)"),
        (["sample", "-c", "1", "--preset", "best"], 2, "--preset must be one of metrics, looks (got best)"),
        (["sample", "-c", "1", "--dtype=int8"], 2, "--dtype must be one of auto, fp32, bf16, fp16 (got int8)"),
        (["sample", "-c", "1", "--count=0", "-n", "3", "--count=0"], 2, "--count must be at least 1 (got 0)"),
        (["sample", "-c", "1", "--seed", "1.5"], 2, "--seed must be a whole number (got 1.5)"),
        (["demo", "--port", "99999"], 2, "--port must be at most 65535 (got 99999)"),
        (["train", "--resume"], 2, "the same command resumes a run that was stopped"),
        (["sample", "-c", "1", "--top-k", "-3"], 2, "--top-k must be 0 (off) or more (got -3)"),
        (["sample", "-c", "1", "--cfg-scales", "5-2"], 2, "--cfg-scales must be two numbers, such as 3-8"),
        (["sample", "-c", "1", "--cfg-scales", "4-6"], 2, "must begin at a scale of the model, 1 to 3 (got 4-6)"),
        (["sample", "-c", "1", "--refiner", "tiny64"], 2, "--refiner and --refine-from need each other"),
        (["sample", "-c", "1", "--refine-from", "3"], 2, "on (got --refine-from 3 alone)"),
        (["sample", "-c", "1", "--refiner", "{model}", "--refine-from", "1"], 2, "--refine-from must be 2 or more"),
        (
            ["sample", "-c", "1", "--refiner", "{model}", "--refine-from", "4"],
            2,
            "--refine-from must be a scale of the model, between 2 and 3 (got 4)",
        ),
        (["sample", "-c", "1", "--refiner", "tiny46", "--refine-from", "2"], 4, "there is no checkpoint tiny46"),
        (
            ["sample", "-c", "1", "--refiner", "tiny64", "--refine-from", "2"],
            4,
            "--refiner must have the tokenizer and the classes of {model} (tiny64 has another tokenizer)",
        ),
        (["sample", "-c", "1", "--decide-at", "2"], 2, "--decide-at needs --best-of"),
        (
            ["sample", "-c", "1", "--best-of", "2", "--decide-at", "3"],
            2,
            "--decide-at must be a scale between the first and the last of 3 (got 3)",
        ),
        (["bench", "--refiner", "tiny64", "--refine-from", "2"], 2, "--refiner cannot be used with var bench"),
        (["sample", "-c", "1", "--device", "tpu"], 2, "--device must be auto, cpu, cuda, cuda:1 or mps (got tpu)"),
        (["sample", "-c", "20-10"], 2, "a range of classes begins with the smaller index: 10-20 (got 20-10)"),
        (
            ["sample", "-c", "golden retreiver"],
            3,
            "called golden retreiver; close to it: 207 golden retriever",
        ),
        (
            ["sample", "-c", "5000"],
            3,
            "there is no class 5000: this checkpoint knows 1 goldfish, 207 golden",
        ),
        (
            ["sample", "-c", "1", "-m", "tiny46"],
            4,
            "no checkpoint tiny46: neither a file nor one of the names tiny64",
        ),
        (["sample", "-c", "1", "-m", "{foreign}"], 4, "the checkpoint {foreign} cannot be read: "),
        (["sample", "-c", "1", "-m", "{truncated}"], 4, "the checkpoint {truncated} cannot be read: "),
        (
            ["sample", "-c", "1", "-o", "{foreign}"],
            2,
            "--out must be a folder, a name ending in .png, .npz or .tar, or - for standard output (got {foreign})",
        ),
        (
            ["sample", "-c", "1", "-q", "-o", "/dev/full"],
            5,
            "/dev/full cannot be written: No space left on device",
        ),
        (["sample", "-c", "1", "-o", "{foreign}/x.png"], 5, "{foreign}/x.png cannot be written: "),
        (["report", "{foreign}"], 3, "evaluation result {foreign} is not JSON at line 1"),
        (["report", "{foreign}", "-o", "report.pdf"], 2, "--out must end in .html or .md (got report.pdf)"),
        (["show", "{foreign}"], 3, "{foreign} is not an image: give a PNG that var sample wrote"),
        (["classes", "zeppelin"], 3, "no class name has the words zeppelin"),
    ],
    ids=lambda mistake: " ".join(mistake[0]),
)
def test_mistakes(model, tmp_path, monkeypatch, capsys, mistake):
    """The one table: arguments, exit code, message."""
    monkeypatch.setenv("VAR_CHECKPOINT", model)
    monkeypatch.chdir(tmp_path)
    files = {"foreign": tmp_path / "notes.txt", "truncated": tmp_path / "cut.safetensors"}
    files["foreign"].write_text("a shopping list " * 99)
    files["truncated"].write_bytes(Path(model).read_bytes()[:100_000])
    arguments, code, message = mistake
    names = files | {"model": model}
    assert cli.run([argument.format(**names) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("var: error: ") and err.count("\n") == 1
    assert message.format(**names) in err
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


@pytest.mark.parametrize(("error", "code"), [(UsageError, 2), (InputError, 3), (CheckpointError, 4), (RunError, 5)])
def test_an_error_is_one_line_and_its_exit_code(monkeypatch, capsys, error, code):
    def fail(*_, **__):
        raise error("what: given;\n  what would be right")

    monkeypatch.setattr(cli, "app", fail)
    assert cli.run([]) == code
    assert capsys.readouterr().err == "var: error: what: given; what would be right\n"


def test_a_library_that_the_system_refuses_is_one_line(monkeypatch, capsys):
    def refuse(*_, **__):
        raise ImportError("libtorch_cpu.so: failed to map segment", path="/lib/torch/_C.so")

    monkeypatch.setattr(cli, "app", refuse)
    assert cli.run([]) == 5
    assert capsys.readouterr().err == (
        "var: error: a library cannot be loaded: libtorch_cpu.so: failed to map segment; is `ulimit -v` too low?\n"
    )


def test_a_value_a_configuration_refuses_is_a_mistake_and_other_value_errors_are_bugs(monkeypatch, capsys):
    def refuse(*_, **__):
        TransformerConfig(depth=0, width=64, sides=(1,), codebook_size=4, codebook_width=4)

    monkeypatch.setattr(cli, "app", refuse)
    assert cli.run([]) == 2
    assert capsys.readouterr().err == "var: error: depth must be at least 1 (got 0)\n"
    monkeypatch.setattr(cli, "app", lambda *_, **__: int("three"))
    with pytest.raises(ValueError, match="three"):
        cli.run([])


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_needs_no_torch():
    heavy = run_python(
        "import sys; from varcli import cli; cli.run(['--help']); cli.run(['sample', '--help']);"
        "print([name for name in ('torch', 'numpy', 'PIL', 'huggingface_hub') if name in sys.modules])"
    ).splitlines()[-1]
    assert heavy == "[]"


@pytest.mark.slow
def test_sampling_imports_nothing_it_has_no_use_for(model, tmp_path):
    heavy = run_python(
        "import sys; from varcli import cli;"
        f"assert cli.run(['sample', '-c', '1', '-m', {model!r}, '-o', {str(tmp_path)!r}]) == 0;"
        "print([name for name in ('torchvision', 'torch_fidelity', 'huggingface_hub', 'scipy', 'torch._dynamo',"
        " 'matplotlib', 'gradio') if name in sys.modules])"
    ).splitlines()[-1]
    assert heavy == "[]"


def test_the_collector_pauses_while_torch_is_imported():
    run_python(
        "import gc; from varcli import cli\n"
        "def run():\n"
        "    assert not gc.isenabled()\n"
        "    import varcli.pipelines\n"
        "    assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "    return 0\n"
        "cli.run = run\n"
        "cli.main()"
    )
    run_python(
        "import gc; import varcli.pipelines\n"  # not for programs that import us
        "assert gc.isenabled() and gc.get_freeze_count() == 0"
    )


def var(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "varcli", *arguments], text=True, stderr=subprocess.PIPE, **options)


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(model, tmp_path):
    with var("sample", "-c", "-", "-m", model, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write("1\n")
        process.stdin.flush()
        assert process.stdout.readline() == "1-goldfish-0.png\n"
        process.stdout.close()
        process.stdin.write("1\n")
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == cli.CLOSED_PIPE


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error there")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["sample", "--help"]], ids=" ".join)
def test_a_closed_pipe_ends_help_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with var(*arguments, stdout=writing) as process:
        os.close(writing)
        assert process.stderr.read() == ""
        assert process.wait() == cli.CLOSED_PIPE


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is full")
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["sample", "--help"], ["train", "tokenizer", "--help"], ["checkpoints", "list"]],
)
def test_a_full_standard_output_is_one_line_and_exit_code_5(arguments):
    with Path("/dev/full").open("w") as full, var(*arguments, stdout=full) as process:
        told = process.stderr.read()
        assert told == "var: error: standard output cannot be written: No space left on device\n"
        assert process.wait() == RunError.exit_code


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is full")
@pytest.mark.parametrize("arguments", [["-o", "-"], ["-o", "x.png"], ["-o", "x.png", "--json"]])
def test_images_on_full_streams(model, tmp_path, arguments):
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "varcli", "sample", "-c", "1", "-m", str(model), *arguments]
        done = subprocess.run(words, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == RunError.exit_code and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("var: error: standard output cannot be written: ")
        done = subprocess.run(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=full, check=False)
        assert done.returncode == 0 and done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_any_encoding_will_do(encoding, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    with var("show", "日本.png", stdout=subprocess.PIPE, env=environment, cwd=tmp_path) as process:
        out, err = process.communicate()
        assert (process.returncode, out) == (3, "")
        assert err.startswith("var: error: the image \\u65e5\\u672c.png cannot be read") and err.count("\n") == 1
    with var("sample", "--help", stdout=subprocess.PIPE, env=environment, encoding=encoding) as process:
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "") and "--class" in out
    with var("classes", "--json", "-m", "var-d16", stdout=subprocess.PIPE, env=environment) as process:
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "") and all(map(json.loads, out.splitlines()))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="its processes always have streams")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["classes", "zeppelin", "-m", "var-d16"], 3),
        (["sample", "-c", "-", "-m", "{model}"], 0),
    ],
    ids=lambda value: "".join(map(str, value[:1])) if isinstance(value, list) else None,
)
def test_closed_streams_are_no_bug(arguments, code, model, tmp_path):
    command = [sys.executable, "-m", "varcli", *(argument.format(model=model) for argument in arguments)]
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    assert subprocess.run([*shell, *command], check=False, cwd=tmp_path).returncode == code


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_ends_with_130_and_no_traceback(model, tmp_path):
    with var("sample", "-c", "-", "-m", model, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write("1\n")
        process.stdin.flush()
        assert process.stdout.readline() == "1-goldfish-0.png\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait() == cli.INTERRUPTED
        assert process.stderr.read() == "var: interrupted\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--draft", "all"], ["--approximate", "all"]),
        (["--draft=all"], ["--approximate=all"]),
        (["--best", "0.25"], ["--best-of", "4"]),
        (["--reject", "0.5"], ["--best-of", "2"]),
        (["--reject=0.5"], ["--best-of=2"]),
        (["--num", "10"], ["--num-images", "10"]),
        (["eval", "stats", "x", "--features"], ["eval", "stats", "x", "--keep-features"]),
    ],
)
def test_old_option_names_work_for_one_version(old, new, capsys):
    assert cli.with_new_names(old) == new
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("var: --") and note.endswith("the old name will be removed in the next version")


@pytest.mark.parametrize("words", [["sample", "-c", "1"], ["--best", "most"], ["--", "--draft"]])
def test_other_words_stay_as_they_are(words, capsys):
    assert cli.with_new_names(words)[-1] == words[-1]
    assert capsys.readouterr().err == ""


def test_every_old_name_leads_to_an_option():
    flags = {flag for name in OPTIONS for p in command(name).params for flag in p.opts}
    for name in ("convert",):
        flags |= {flag for p in command("checkpoints").commands[name].params for flag in p.opts}
    for stage in ("tokenizer", "transformer"):
        flags |= {flag for p in command("train").commands[stage].params for flag in p.opts}
    assert {new for new, _ in cli.RENAMED.values()} <= flags
