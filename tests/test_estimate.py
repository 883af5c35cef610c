"""The plan of a training run says what will be."""

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from test_training import TOKENIZER, TOKENIZER_TRAINING, TRANSFORMER, TRANSFORMER_TRAINING
from varcli.classes import ClassEntry, ClassTable
from varcli.config import transformer_recipe
from varcli.errors import RunError
from varcli.models.tokenizer import Tokenizer
from varcli.training import estimate as estimate_module
from varcli.training.estimate import check_memory, estimate, expected_losses
from varcli.training.finetune import adapt
from varcli.training.transformer import TransformerStage, build_transformer


@pytest.fixture
def stage():
    return make_stage(TRANSFORMER_TRAINING)


def make_stage(training):
    classes = ClassTable(tuple(ClassEntry(i, str(i), str(i), ()) for i in range(2)))
    tokenizer = Tokenizer(TOKENIZER)
    model = build_transformer(TRANSFORMER, training)
    adapt(model, training.adapter)
    return TransformerStage(model, training, tokenizer, classes, bf16=False)


def test_expected_losses_are_the_published_ones():
    mean, last = expected_losses(16)
    assert mean == pytest.approx(6.05, abs=0.005)  # where the released d16's log ends
    assert 5.31 <= last <= 5.35
    assert [round(expected_losses(depth)[0], 2) for depth in (20, 24, 30)] == [5.92, 5.82, 5.72]


def test_plan_counts_steps_parameters_and_operations(stage):
    plan = estimate(stage, TRANSFORMER_TRAINING, images=40)
    assert plan.steps == 10
    assert plan.images_seen == 40
    assert plan.parameters == sum(parameter.numel() for parameter in stage.model.parameters())
    with FlopCounterMode(display=False) as counter:
        stage.trial_loss(1)
    assert 2.9 * counter.get_total_flops() * 40 < plan.flops < 3 * counter.get_total_flops() * 40  # with backward
    linear = 2 * 21 * (64 * 64 * 12 * 2 + 64 * 32)  # blocks and head, two operations a weight and token
    assert counter.get_total_flops() > linear
    assert plan.state_bytes == 20 * plan.parameters
    values = 4 * 2 * 21 * 64  # of a batch, in two blocks
    assert 10 * values * 4 < plan.activation_bytes < 40 * values * 4
    assert plan.seconds == pytest.approx(40 / plan.images_per_second)
    assert all(parameter.grad is None for parameter in stage.model.parameters())


def test_plan_of_a_contrastive_run_and_of_an_adapter(stage):
    plain = estimate(stage, TRANSFORMER_TRAINING, images=40)
    training = replace(TRANSFORMER_TRAINING, cca=1.0)
    contrastive = estimate(make_stage(training), training, images=40, frozen_copies=1)
    # Two rows an image, each forward and backward through one model and forward through the other.
    assert contrastive.flops == pytest.approx(8 / 3 * plain.flops, rel=0.02)
    assert contrastive.state_bytes == 24 * plain.parameters
    assert contrastive.activation_bytes > 1.8 * plain.activation_bytes
    training = replace(TRANSFORMER_TRAINING, adapter="lora:1")
    adapter = estimate(make_stage(training), training, images=40)
    assert 8 * adapter.parameters < adapter.state_bytes < 12 * adapter.parameters


def test_recipes_are_the_published_ones():
    assert [transformer_recipe(depth).epochs for depth in (6, 16, 20, 24, 30, 36)] == [200, 200, 250, 350, 350, 350]
    assert transformer_recipe(30).final_weight_decay == 0.08
    assert transformer_recipe(16).lr == pytest.approx(3e-4)
    assert transformer_recipe(24).final_lr == 0.01
    assert TOKENIZER_TRAINING.lr == pytest.approx(0.06 * 4 / 256)


def test_a_batch_beyond_the_memory_is_refused_with_what_fits(stage, monkeypatch):
    training = replace(TRANSFORMER_TRAINING, batch=64, accumulate=1)
    plans = {n: estimate(stage, replace(training, accumulate=n), images=64) for n in (1, 4, 64)}
    needed = {n: plan.state_bytes + plan.activation_bytes for n, plan in plans.items()}

    def refusal(memory):
        monkeypatch.setattr(estimate_module, "machine_memory", lambda: memory)
        with pytest.raises(RunError) as caught:
            check_memory(stage, training)
        return str(caught.value)

    assert f"a batch of 64 needs {needed[1] / 2**30:.1f} GiB" in refusal(needed[1] - 1)
    assert "--grad-accum 4 computes it in parts" in refusal(2 * needed[4])
    assert "--grad-accum 8 " in refusal(2 * needed[4] - 1)
    assert "make the model smaller" in refusal(needed[64])
    for memory in (needed[1], None):
        monkeypatch.setattr(estimate_module, "machine_memory", lambda memory=memory: memory)
        check_memory(stage, training)
