"""Shape suffixes tell the truth, and nothing is unpickled."""

import ast
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from support import reference
from varcli.config import SampleConfig, TokenizerConfig, TransformerConfig
from varcli.models.tokenizer import Tokenizer, quantization_loss
from varcli.models.transformer import Transformer
from varcli.sampling.sampler import decode, generate

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "varcli"
MODULES = sorted(SOURCE.rglob("*.py"))


def name(path):
    return path.relative_to(SOURCE).as_posix()


def where(pattern):
    return [name(path) for path in MODULES if re.search(pattern, path.read_text(encoding="utf-8"))]


def test_nothing_is_unpickled():
    """But what the ranks of one run send each other, which is signed."""
    assert where(r"import pickle|from pickle|\bpickle\.load") == ["distributed.py"]
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "numpy.load", "np.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                safe = given.get("weights_only") == "True" or given.get("allow_pickle", "False") == "False"
                assert safe and ("weights_only" in given or "torch" not in ast.unparse(node.func)), name(path)


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
        quantization_loss(tokenizer.quantize.quantize(f_BCHW), f_BCHW, 0.25)
        tokens = tokenizer.encode(image_B3PP)
        transformer(transformer.drop_labels(torch.tensor([0, 1, 2])), tokenizer.quantize.teacher_input(tokens))
        for config in (SampleConfig(), SampleConfig(smooth=True), SampleConfig(cfg=0, top_k=0, top_p=0)):
            *_, last = generate(tokenizer, transformer, [0, 1, 2], [4, 5, 6], config)
        decode(tokenizer, last.f_hat)
    assert not wrong, "\n".join(sorted(wrong))
