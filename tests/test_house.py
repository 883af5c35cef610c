"""The house rules that can be checked by reading: sizes, names, what is tracked, what exists once."""

import ast
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest
import torch

import reference
from varcli.config import SampleConfig, TokenizerConfig, TransformerConfig
from varcli.models.quantizer import quantization_loss
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling.sampler import decode, generate

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "varcli"
MODULES = sorted(SOURCE.rglob("*.py"))

FILE_LINES, FUNCTION_LINES, MEDIAN_LINES = 300, 60, 10
LONGER: dict[str, str] = {}
"""Files ("data/images.py") and functions ("data/images.py:png_bytes") over the limit, each with its reason."""

LARGE = {
    "src/varcli/checkpoints/tiny64.safetensors": 32 << 20,  # the first picture is one command away, offline too
    "src/varcli/evaluation/tiny64_reference.zip": 5 << 20,  # and so is the first FID
}
"""Tracked files over 1 MiB, and how large each may be."""


def name(path):
    return path.relative_to(SOURCE).as_posix()


def functions(path):
    """Yield each function's name and the lines of its body, without decorators and signature."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name(path)}:{node.name}", node.end_lineno - node.body[0].lineno + 1


# --- sizes and names -------------------------------------------------------------------------------


def test_files_are_short():
    lines = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {file: count for file, count in lines.items() if count > FILE_LINES and file not in LONGER} == {}


def test_functions_are_short():
    lines = [found for path in MODULES for found in functions(path)]
    assert {place: count for place, count in lines if count > FUNCTION_LINES and place not in LONGER} == {}
    assert median(count for _, count in lines) <= MEDIAN_LINES


def test_exceptions_exist_and_have_reasons():
    places = {name(path) for path in MODULES} | {place for path in MODULES for place, _ in functions(path)}
    assert set(LONGER) <= places
    assert all(LONGER.values())


def test_names_say_what_is_inside():
    assert not {path.stem for path in MODULES} & {"utils", "util", "misc", "helpers", "helper", "common"}


def test_every_module_says_what_it_is():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name(path)} has no docstring"


# --- once, and never -------------------------------------------------------------------------------


def where(pattern):
    return [name(path) for path in MODULES if re.search(pattern, path.read_text(encoding="utf-8"))]


def test_what_exists_once():
    assert where(r"bicubic|self\.quant_resi\(") == ["models/quantizer.py"]  # the residual step
    assert where(r"\.logits, scale") == ["sampling/sampler.py"]  # the scale loop


def test_nothing_is_unpickled():
    assert where(r"import pickle|from pickle|\bpickle\.load") == []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "numpy.load", "np.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                safe = given.get("weights_only") == "True" or given.get("allow_pickle", "False") == "False"
                assert safe and ("weights_only" in given or "torch" not in ast.unparse(node.func)), name(path)


# --- the repository --------------------------------------------------------------------------------


def test_every_dependency_has_a_reason():
    lists = re.findall(r"^\w+ = \[\n((?:    \".*\n)+)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    wanted = [line for each in lists for line in each.splitlines() if re.match(r' +"[a-z-]+[>=~]', line)]
    assert len(wanted) > 10
    assert [line for line in wanted if not re.search(r"# \W*\w+", line)] == []


def test_nothing_large_is_tracked():
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git, or no checkout")
    tracked = [file for file in listed.stdout.decode().split("\0") if (ROOT / file).is_file()]
    sizes = {file: (ROOT / file).stat().st_size for file in tracked}
    assert {file: size for file, size in sizes.items() if size > LARGE.get(file, 1 << 20)} == {}


# --- shapes ----------------------------------------------------------------------------------------

SUFFIX = re.compile(r"_((?:[A-Z]|[0-9]|[lshc])*[A-Z](?:[A-Z]|[0-9]|[lshc])*)$")
"""One character a dimension, at the end of a name: a size's letter or, where it is fixed, the size itself."""


def contradictions(frame):
    """Yield those tensors of a function whose names say another number of dimensions, or another fixed size."""
    for local, value in frame.f_locals.items():
        suffix = SUFFIX.search(local)
        if not suffix or not isinstance(value, torch.Tensor):
            continue
        fixed = [int(letter) if letter.isdigit() else None for letter in suffix[1]]
        if len(fixed) != value.ndim or any(n not in (None, size) for n, size in zip(fixed, value.shape, strict=True)):
            yield f"{name(Path(frame.f_code.co_filename))}:{frame.f_code.co_name}: {local} is {tuple(value.shape)}"


@contextmanager
def traced(wrong):
    """Collect the contradictions of every function of the package that returns in the meantime."""
    ours = str(SOURCE)

    def look(frame, event, _):
        if event == "return" and frame.f_code.co_filename.startswith(ours):
            wrong.update(contradictions(frame))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_shape_suffixes_tell_the_truth(shared_adaln):
    sides, wrong = (1, 2, 4), set()
    tokenizer = Tokenizer(
        TokenizerConfig(sides=sides, codebook_size=50, codebook_width=9, base_width=32, multipliers=(1, 2))
    )
    transformer = Transformer(
        TransformerConfig(
            depth=2, width=64, sides=sides, codebook_size=50, codebook_width=9, class_count=5, shared_adaln=shared_adaln
        )
    )
    reference.set_rule_weights(tokenizer)
    reference.set_rule_weights(transformer.eval())
    image_B3PP = torch.rand(3, 3, 8, 8) * 2 - 1
    with traced(wrong), torch.no_grad():
        f_BCHW = tokenizer.features(image_B3PP)
        quantization_loss(tokenizer.quantize.quantize(f_BCHW), f_BCHW)
        tokens = tokenizer.encode(image_B3PP)
        transformer(transformer.drop_labels(torch.tensor([0, 1, 2])), tokenizer.quantize.teacher_input(tokens))
        for config in (SampleConfig(), SampleConfig(smooth=True), SampleConfig(cfg=0, top_k=0, top_p=0)):
            *_, last = generate(tokenizer, transformer, [0, 1, 2], [4, 5, 6], config)
        decode(tokenizer, last.f_hat)
    assert not wrong, "\n".join(sorted(wrong))
