"""Random weights in a checkpoint's shape: the shape is the checkpoint's, the weights are always the same."""

import pytest
import torch

from support import small
from varcli.checkpoints.random_init import random_models, shapes
from varcli.checkpoints.registry import registry
from varcli.checkpoints.store import load_model
from varcli.errors import CheckpointError
from varcli.models.transformer import Transformer

RELEASED = [name for name, entry in registry().items() if entry.depth]


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_shape_needs_no_download(name):
    tokenizer, transformer = shapes(name)
    assert tokenizer.pixels == registry()[name].pixels
    assert transformer.class_count == registry()[name].classes
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Transformer(transformer).parameters()) == registry()[name].parameters


def test_released_checkpoints_all_have_a_depth():
    assert set(RELEASED) == {name for name, entry in registry().items() if entry.files}


def test_weights_are_random_small_and_always_the_same(tmp_path):
    path = small.save(tmp_path / "small.safetensors")
    trained = load_model(path)
    for model, again, own in zip(
        random_models(str(path)), random_models(str(path)), (trained.tokenizer, trained.transformer), strict=True
    ):
        assert model.config == own.config and not model.training
        for one, other, theirs in zip(model.parameters(), again.parameters(), own.parameters(), strict=True):
            assert torch.equal(one, other) and one.isfinite().all() and not torch.equal(one, theirs)


def test_what_is_no_checkpoint():
    with pytest.raises(CheckpointError, match=r"^there is no checkpoint var-d17: neither a file nor one of the names "):
        random_models("var-d17")
