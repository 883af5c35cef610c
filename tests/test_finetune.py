"""Fine-tuning: what a warm start keeps, what an adapter trains, and that its checkpoint is an ordinary one."""

import json

import pytest
import torch

from support import small
from support.images import write_folder
from varcli.checkpoints.store import load_model, save_tokenizer
from varcli.classes import ClassEntry, ClassTable
from varcli.cli import run
from varcli.config import TransformerConfig
from varcli.errors import InputError
from varcli.models.transformer import Transformer
from varcli.training.finetune import (
    adapt,
    interpolated_levels,
    interpolated_positions,
    matching_rows,
    merged,
    warm_start,
)
from varcli.training.optim import initialize_transformer

SHAPE = {"depth": 2, "width": 64, "codebook_size": 32, "codebook_width": 8}


def table(*names):
    return ClassTable(tuple(ClassEntry(i, name, name) for i, name in enumerate(names)))


def transformer(classes, sides=(1, 2, 4), seed=0):
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(class_count=classes, sides=sides, **SHAPE))
    initialize_transformer(model, 1e-3)
    return model.eval()


def logits(model, label):
    torch.manual_seed(5)
    return model(torch.tensor([label]), torch.randn(1, model.config.length - 1, SHAPE["codebook_width"]))


# --- a warm start ----------------------------------------------------------------------------------


def test_classes_known_to_both_answer_as_before():
    trained, model = transformer(3), transformer(2, seed=1)
    kept = warm_start(model, table("cat", "ant"), trained, table("ant", "bee", "cat"))
    assert kept == 2
    assert torch.equal(logits(model, 0), logits(trained, 2))
    assert torch.equal(logits(model, 1), logits(trained, 0))
    assert torch.equal(logits(model, 2), logits(trained, 3))  # no class


def test_a_new_class_begins_at_the_mean():
    weight = torch.randn(4, 6)
    rows, kept = matching_rows(weight, table("ant", "bee", "cat"), table("ant", "new"))
    assert kept == 1
    torch.testing.assert_close(rows, torch.stack([weight[0], weight[:3].mean(0), weight[3]]))


def test_positions_of_a_larger_grid_are_those_around():
    """A plane stays a plane, scale by scale, and the same sides keep every bit."""
    sides, wanted = (1, 2, 4), (1, 2, 8)
    plane = [torch.linspace(-1 + 1 / side, 1 - 1 / side, side).repeat(side) for side in sides]
    position = torch.cat(plane)[None, :, None]
    assert torch.equal(interpolated_positions(position, sides, sides), position)
    found = interpolated_positions(position, sides, wanted)[0, 5:, 0].view(8, 8)
    wide = torch.linspace(-1 + 1 / 8, 1 - 1 / 8, 8)
    torch.testing.assert_close(found[:, 2:6], wide[2:6].repeat(8, 1), rtol=0, atol=0.05)
    assert (found[:, 1:] > found[:, :-1]).all()


def test_levels_keep_the_first_and_the_last():
    level = torch.randn(3, 5)
    found = interpolated_levels(level, 5)
    torch.testing.assert_close(found[[0, 2, 4]], level)
    torch.testing.assert_close(found[1], (level[0] + level[1]) / 2)


def test_other_sides_give_a_model_that_answers():
    trained, model = transformer(3), transformer(3, sides=(1, 2, 3, 6), seed=1)
    warm_start(model, table("ant", "bee", "cat"), trained, table("ant", "bee", "cat"))
    assert logits(model, 0).shape == (1, 50, 32)
    torch.testing.assert_close(logits(model, 0)[:, 0], logits(trained, 0)[:, 0])  # the first scale is the same


def test_another_depth_is_refused():
    torch.manual_seed(0)
    deeper = Transformer(TransformerConfig(class_count=3, sides=(1, 2, 4), **SHAPE | {"depth": 3}))
    with pytest.raises(InputError, match=r"depth, width and the tokenizer's codebook must be the same"):
        warm_start(deeper, table("a", "b", "c"), transformer(3), table("a", "b", "c"))


# --- adapters --------------------------------------------------------------------------------------


def test_lora_begins_as_the_model_itself_and_merges_into_it():
    model, plain = transformer(3), transformer(3)
    adapt(model, "lora:4")
    assert torch.equal(logits(model, 1), logits(plain, 1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("up_Or"):
                parameter.normal_(std=0.1)
    whole = merged(model)
    assert whole.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(logits(whole, 1), logits(model, 1))
    assert not torch.allclose(logits(whole, 1), logits(plain, 1))


@pytest.mark.parametrize(
    ("adapter", "trained"),
    [
        ("lora:4", {"class_emb.weight", "down_rI", "up_Or"}),
        ("modulation", {"class_emb.weight", "ada_lin.1.weight", "ada_lin.1.bias"}),
    ],
)
def test_an_adapter_alone_is_trained(adapter, trained):
    model = transformer(3)
    adapt(model, adapter)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {end for end in trained if any(name.endswith(end) for name in names)} == trained
    assert all(any(name.endswith(end) for end in trained) for name in names)
    # Two blocks with five maps each, and the modulation before the head.
    assert sum(name.endswith("up_Or") for name in names) == (11 if adapter.startswith("lora") else 0)


# --- the command -----------------------------------------------------------------------------------

PACE = ["--batch-size", "4", "--epochs", "2", "--device", "cpu", "--workers", "0", "--base-lr", "0.05", "-q"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), {"n02099601": 8, "mine": 8})


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["", "lora:2", "modulation"])
def test_a_fine_tuned_model_is_an_ordinary_checkpoint(adapter, model, data, tmp_path, capsys):
    command = ["train", "transformer", str(data), "--init", str(model), "--out", str(tmp_path), *PACE]
    assert run([*command, *(["--adapter", adapter] if adapter else [])]) == 0
    before, after = load_model(model).transformer.state_dict(), load_model(tmp_path / "model.safetensors")
    assert [entry.wnid for entry in after.classes.entries] == ["mine", "n02099601"]
    changed = {name for name, tensor in after.transformer.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "class_emb.weight" in changed
    assert ("blocks.0.attn.proj.weight" in changed) == (adapter != "modulation")
    assert ("word_embed.weight" in changed) == (adapter == "")
    assert run(["sample", "-m", str(tmp_path / "model.safetensors"), "-c", "mine", "-o", str(tmp_path / "a.png")]) == 0


def test_a_killed_fine_tuning_goes_on_and_another_is_refused(model, data, tmp_path, capsys):
    command = ["train", "transformer", str(data), "--init", str(model), "--adapter", "lora:2", *PACE]
    assert run([*command, "--out", str(tmp_path)]) == 0
    assert run([*command, "--out", str(tmp_path)]) == 0
    assert run([*command, "--adapter", "modulation", "--out", str(tmp_path)]) == 2
    assert "adapter 'lora:2' (now 'modulation')" in capsys.readouterr().err


def test_tokens_of_another_tokenizer_are_refused_and_those_of_a_tuned_one_are_not(model, data, tmp_path, capsys):
    own = load_model(model).tokenizer
    command = ["train", "transformer", str(data), "--init", str(model), "--dry-run", "-q"]
    rows_VC = own.quantize.embedding.weight.data
    for name, changed_VC in (("tuned", rows_VC + 0.01 * rows_VC.std()), ("other", rows_VC.roll(1, 0))):
        own.quantize.embedding.weight.data = changed_VC
        save_tokenizer(tmp_path / name, own, {})
        code = run([*command, "--tokenizer", str(tmp_path / name), "--out", str(tmp_path / "run")])
        assert code == (0 if name == "tuned" else 3)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "was trained on another tokenizer's tokens (0% of them mean the same to --tokenizer" in error


def test_the_plan_of_a_fine_tuning_has_the_models_shape(model, data, tmp_path, capsys):
    command = ["train", "transformer", str(data), "--init", str(model), "--out", str(tmp_path / "none"), "--dry-run"]
    assert run([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    parameters = sum(parameter.numel() for parameter in load_model(model).transformer.parameters())
    assert plan["parameters"] == parameters + (2 - len(small.CLASSES)) * load_model(model).transformer.config.width


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--init", "MODEL", "--depth", "3"], 2, "has its own depth, width and modulation: leave those options out"),
        (["--init", "nobody"], 4, "there is no checkpoint nobody"),
        (["--init", "MODEL", "--adapter", "lora"], 2, "--adapter must be lora:RANK, such as lora:16, or modulation"),
        (["--scale-weight", "sides"], 2, "--scale-weight must be mean or side (got sides)"),
        ([], 2, "--tokenizer is needed: the tokenizer whose tokens the transformer learns"),
    ],
)
def test_mistakes_are_one_line(more, code, message, model, data, tmp_path, capsys):
    more = [str(model) if word == "MODEL" else word for word in more]
    assert run(["train", "transformer", str(data), "--out", str(tmp_path / "run"), *more]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()
