"""Released `.pth` files become files of ours, and compute what the original computes."""

import os
import pickle

import pytest
import torch

from support import reference
from varcli.checkpoints.conversion import Part, convert, tokenizer_config, transformer_config
from varcli.checkpoints.random_init import randomized
from varcli.checkpoints.store import load_model
from varcli.classes import imagenet
from varcli.config import GRID_256, GRID_512, TokenizerConfig, TransformerConfig
from varcli.errors import CheckpointError, InputError, UsageError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer


@pytest.fixture(scope="module")
def mini():
    return reference.load("mini")


@pytest.fixture(scope="module")
def released(mini, tmp_path_factory):
    """The mini model as a pair of files in the released layout."""
    return written(mini, tmp_path_factory.mktemp("released"))


def written(model, folder):
    paths = [folder / "vae.pth", folder / "var.pth"]
    torch.save(model.tokenizer.state_dict(), paths[0])
    torch.save(model.transformer.state_dict(), paths[1])
    return paths


def nested(model, names=("vae_local", "var_wo_ddp")):
    states = {"vae_local": model.tokenizer.state_dict(), "var_wo_ddp": model.transformer.state_dict()}
    return {"args": {"depth": 2}, "epoch": 3, "trainer": {name: states[name] for name in names}}


@torch.no_grad()
def test_converted_model_computes_what_the_original_does(original, tmp_path):
    out = tmp_path / "out.safetensors"
    convert(written(original, tmp_path), out, original.transformer.config.sides)
    loaded, outputs = load_model(out), original.outputs
    assert loaded.tokenizer.config == original.tokenizer.config
    assert loaded.transformer.config == original.transformer.config
    tokens = loaded.tokenizer.encode(outputs["image_u8"] / 127.5 - 1)
    assert all(torch.equal(ours, outputs[f"tokens.{k}"].long()) for k, ours in enumerate(tokens))
    label = outputs["labels"][: len(tokens[0])].long()
    logits = loaded.transformer(label, loaded.tokenizer.quantize.teacher_input(tokens))
    image = loaded.tokenizer.decode(tokens)
    for ours, theirs in ((logits, outputs["logits"]), (image, outputs["reconstruction"])):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_training_checkpoint_in_one_file(mini, tmp_path):
    torch.save(nested(mini), tmp_path / "ckpt.pth")
    convert([tmp_path / "ckpt.pth"], tmp_path / "out.safetensors", mini.transformer.config.sides)
    loaded = load_model(tmp_path / "out.safetensors")
    assert torch.equal(loaded.transformer.head.weight, mini.transformer.head.weight)
    assert loaded.run == {"converted_from": ["ckpt.pth"]}


def test_training_checkpoint_beside_its_tokenizer_or_another(mini, released, tmp_path):
    torch.save(nested(mini), tmp_path / "ckpt.pth")
    convert([released[0], tmp_path / "ckpt.pth"], tmp_path / "out.safetensors", mini.transformer.config.sides)
    state = dict(mini.tokenizer.state_dict())
    state["quant_conv.bias"] = state["quant_conv.bias"] + 1
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="tokenizer: another one"):
        convert([tmp_path / "other.pth", tmp_path / "ckpt.pth"], tmp_path / "o", mini.transformer.config.sides)


def test_any_order_and_wrapped_names(mini, released, tmp_path):
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in mini.transformer.state_dict().items()}
    torch.save(wrapped, tmp_path / "var.pth")
    convert([tmp_path / "var.pth", released[0]], tmp_path / "out.safetensors", mini.transformer.config.sides)
    assert torch.equal(load_model(tmp_path / "out.safetensors").transformer.pos_1LC, mini.transformer.pos_1LC)


def test_file_of_an_older_torch(mini, released, tmp_path):
    torch.save(mini.tokenizer.state_dict(), tmp_path / "vae.pth", _use_new_zipfile_serialization=False)
    convert([tmp_path / "vae.pth", released[1]], tmp_path / "out.safetensors", mini.transformer.config.sides)
    assert (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("depth", "sides"), [(16, GRID_256), (20, GRID_256), (36, GRID_512)])
def test_released_configurations_are_inferred(depth, sides):
    expected = TransformerConfig(
        depth=depth, width=64 * depth, sides=sides, codebook_size=4096, codebook_width=32, shared_adaln=depth == 36
    )
    with torch.device("meta"):
        transformer, tokenizer = Transformer(expected).state_dict(), Tokenizer(TokenizerConfig()).state_dict()
    assert transformer_config(Part("var.pth", transformer), sides) == expected
    assert tokenizer_config(Part("vae.pth", tokenizer), sides) == TokenizerConfig(sides=sides)


def test_unusual_configuration_and_sides_of_a_known_grid(tmp_path):
    tokenizer = TokenizerConfig(
        sides=GRID_256,
        codebook_size=8,
        codebook_width=4,
        base_width=32,
        multipliers=(1, 2),
        encoder_blocks=1,
        kernel_count=3,
    )
    transformer = TransformerConfig(
        depth=1, width=64, sides=GRID_256, codebook_size=8, codebook_width=4, shared_adaln=True
    )
    modules = randomized(tokenizer, transformer)
    for module, name in zip(modules, ("vae.pth", "var.pth"), strict=True):
        torch.save(module.state_dict(), tmp_path / name)
    convert([tmp_path / "vae.pth", tmp_path / "var.pth"], tmp_path / "out.safetensors")
    loaded = load_model(tmp_path / "out.safetensors")
    assert loaded.tokenizer.config == tokenizer
    assert loaded.transformer.config == transformer
    assert loaded.classes == imagenet()


@pytest.mark.parametrize(
    ("sides", "error", "line"),
    [
        (None, InputError, "give the sides with --sides"),
        ((1, 2, 3), UsageError, "make 14 tokens; the transformer has"),
        ((3, 2, 1), ValueError, "sides must begin with 1 and grow"),
    ],
)
def test_sides_that_do_not_fit(released, tmp_path, sides, error, line):
    with pytest.raises(error, match=line):
        convert(released, tmp_path / "out.safetensors", sides)
    assert not (tmp_path / "out.safetensors").exists()


def test_other_sides_of_the_same_length(mini, released, tmp_path):
    state = dict(mini.transformer.state_dict())
    state["lvl_1L"] = state["lvl_1L"].flip(1)
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(UsageError, match="was trained on others"):
        convert([released[0], tmp_path / "var.pth"], tmp_path / "out.safetensors", mini.transformer.config.sides)


def test_tokenizer_with_another_number_of_scales(mini, released, tmp_path):
    state = dict(mini.tokenizer.state_dict())
    state["quantize.ema_vocab_hit_SV"] = state["quantize.ema_vocab_hit_SV"][:2]
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(UsageError, match="has 2 scales"):
        convert([tmp_path / "vae.pth", released[1]], tmp_path / "out.safetensors", mini.transformer.config.sides)


class Malicious:
    """Unpickling this would make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_run_from_a_pickle(released, tmp_path, zipped):
    path = tmp_path / "evil.pth"
    state = {"quantize.embedding.weight": torch.zeros(2, 2), "x": Malicious(tmp_path / "made")}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"evil\.pth was refused: it would run .*mkdir") as caught:
        convert([path, released[1]], tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)
    path.write_bytes(pickle.dumps(Malicious(tmp_path / "made")))
    with pytest.raises(CheckpointError, match="damaged"):
        convert([path, released[1]], tmp_path / "out.safetensors")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 no archive"])
def test_foreign_file(released, tmp_path, content):
    path = tmp_path / "foreign.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"foreign\.pth was refused: damaged, or not plain tensors") as caught:
        convert([path, released[1]], tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)


def test_truncated_and_missing_file(released, tmp_path):
    path = tmp_path / "half.pth"
    path.write_bytes(released[0].read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"half\.pth"):
        convert([path, released[1]], tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match="No such file"):
        convert([tmp_path / "none.pth", released[1]], tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"weight": torch.zeros(1)}, "neither a VAR tokenizer nor a VAR transformer"),
        ([1, 2], "neither a VAR tokenizer nor a VAR transformer"),
        ({"trainer": 3}, "neither a VAR tokenizer nor a VAR transformer"),
        ({"quantize.embedding.weight": 3}, "quantize.embedding.weight is no tensor"),
        ({"quantize.embedding.weight": torch.zeros(3)}, "quantize.embedding.weight is missing or of no"),
        ({"quantize.embedding.weight": torch.zeros(3, 2)}, "encoder.conv_in.weight is missing"),
    ],
)
def test_other_contents(mini, released, tmp_path, content, line):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=line):
        convert([tmp_path / "other.pth", released[1]], tmp_path / "out.safetensors", mini.transformer.config.sides)


def test_one_of_the_two_is_missing(mini, released, tmp_path):
    sides = mini.transformer.config.sides
    with pytest.raises(CheckpointError, match=r"transformer: none in .*vae\.pth; give its file too"):
        convert([released[0]], tmp_path / "out.safetensors", sides)
    torch.save(nested(mini, ["var_wo_ddp"]), tmp_path / "ckpt.pth")
    with pytest.raises(CheckpointError, match="tokenizer: none in"):
        convert([tmp_path / "ckpt.pth"], tmp_path / "out.safetensors", sides)


def test_foreign_tensor_in_a_released_file(mini, released, tmp_path):
    state = dict(mini.transformer.state_dict()) | {"loss_head.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(CheckpointError, match=r"loss_head\.weight belongs to no part"):
        convert([released[0], tmp_path / "var.pth"], tmp_path / "out.safetensors", mini.transformer.config.sides)
