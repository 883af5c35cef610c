"""Benchmarks count right, take turns, and say what the clock said."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from support import reference
from varcli.acceleration.devices import peak_bytes
from varcli.acceleration.dispatch import prepare
from varcli.benchmarking import samplers, timing
from varcli.benchmarking.flops import decoder_operations, transformer_operations
from varcli.benchmarking.results import BenchPlan, panels, percentile, run_benchmark, sampler_timings
from varcli.benchmarking.samplers import BenchSampler, naive_sampler, raster_scan, varcli
from varcli.benchmarking.timing import (
    InterleavedTimings,
    Lap,
    Round,
    Stopwatch,
    matmul_rate,
    run_once,
    time_interleaved,
)
from varcli.charts import png
from varcli.config import SampleConfig, TokenizerConfig, TransformerConfig
from varcli.errors import RunError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import KeyValueCache, Transformer
from varcli.sampling.batching import BatchSampler

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SIDES = (1, 2, 4)


def made(**shape):
    shape = {"sides": SIDES, "codebook_size": 48, "codebook_width": 8} | shape
    tokenizer = Tokenizer(TokenizerConfig(base_width=32, multipliers=(1, 2, 1), **shape))
    transformer = Transformer(TransformerConfig(depth=2, width=128, class_count=5, **shape))
    reference.set_rule_weights(tokenizer)
    reference.set_rule_weights(transformer)
    return tokenizer.eval(), transformer.eval()


class Clock:
    """Moves on only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (timing, timing):
        monkeypatch.setattr(module.time, "perf_counter", made)
    return made


def runner(name, clock, journal, seconds, batch=1):
    """Return a sampler of two steps that takes as long as it says: the given seconds, more each time."""

    def make(seeds, mark):
        journal.append((name, list(seeds)))
        for phase in ("transformer", "token sampling", "transformer", "token sampling", "decoder"):
            clock.now += seconds.pop(0) if isinstance(seconds, list) else seconds
            mark(phase)
        return [torch.zeros(8, 8, 3, dtype=torch.uint8).numpy() for _ in seeds]

    operations = {("transformer", "a"): 10, ("transformer", "b"): 30, ("decoder", ""): 60}
    return BenchSampler(name=name, precision="fp32", batch=batch, steps=["a", "b"], operations=operations, make=make)


# --- operations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [0, 1.5])
@pytest.mark.parametrize("counts", [[1, 4, 16], [1] * 16], ids=["scales", "raster"])
@torch.no_grad()
def test_transformer_operations_are_those_torch_counts(counts, cfg):
    _, model = made()
    rows_B, found = torch.tensor([1, 5] if cfg else [1]), []
    modulations, cache = (
        model.modulations(model.class_emb(rows_B)),
        KeyValueCache(model.config, len(rows_B), CPU, torch.float32),
    )
    for step, count in enumerate(counts):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            given = torch.zeros(len(rows_B), count, model.config.codebook_width)
            x_RlD = model.word_embed(given) if step else torch.zeros(len(rows_B), count, model.config.width)
            x_RlD = model.step(x_RlD, modulations, cache)
            model.head(x_RlD[:1])
        found.append(counter.get_total_flops())
    assert transformer_operations(model.config, counts, rows=1 + (cfg > 0)) == found


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2, 2, 4), (2, 1, 1)])
def test_decoder_operations_are_those_torch_counts(multipliers):
    """With gradients, which it is defined with; without them a CPU saves some in upsampling."""
    tokenizer = Tokenizer(TokenizerConfig(sides=SIDES, codebook_size=8, base_width=32, multipliers=multipliers))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tokenizer.decode_features(torch.zeros(1, 32, 4, 4))
    assert decoder_operations(tokenizer.config) == counter.get_total_flops()


def test_the_released_d16_takes_about_a_teraflop():
    sides = TokenizerConfig().sides
    shape = TransformerConfig(depth=16, width=1024, sides=sides, codebook_size=4096, codebook_width=32)
    guided = sum(transformer_operations(shape, [side * side for side in sides], rows=2))
    assert guided + decoder_operations(TokenizerConfig()) == pytest.approx(994e9, rel=0.01)


# --- the clock -------------------------------------------------------------------------------------


def test_laps_add_up_to_what_passed(clock):
    watch = Stopwatch(CPU)
    for phase, seconds in (("transformer", 2.0), ("token sampling", 0.5), ("decoder", 3.0)):
        clock.now += seconds
        watch.mark(phase)
    assert watch.phases == ["transformer", "token sampling", "decoder"]
    assert watch.seconds() == [2.0, 0.5, 3.0]


def test_a_gpu_is_not_waited_for_between_phases(monkeypatch):
    """Moments are events in its stream; only who asks for seconds waits."""
    moments, waits = iter([10.0, 12.0, 17.0]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = next(moments)

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    watch = Stopwatch(torch.device("cuda"))
    watch.mark("transformer")
    watch.mark("token sampling")
    assert len(waits) == 1
    assert watch.seconds() == [0.002, 0.005]
    assert len(waits) == 2


# --- rounds ----------------------------------------------------------------------------------------


def test_samplers_are_timed_in_turns_and_the_machine_is_measured_in_between(clock, monkeypatch):
    journal, rates = [], iter([5.0, 50.0, 7.0])
    monkeypatch.setattr(timing, "matmul_rate", lambda device, precision: journal.append("matmul") or next(rates))
    steps = []
    timed = time_interleaved(
        [runner("one", clock, journal, 1.0, batch=2), runner("two", clock, journal, 3.0)],
        CPU,
        rounds=3,
        advance=lambda: steps.append(1),
    )
    assert journal == [
        ("one", [0, 1]),
        ("two", [0]),
        "matmul",
        ("one", [2, 3]),
        ("two", [1]),
        "matmul",
        ("one", [4, 5]),
        ("two", [2]),
        "matmul",
    ]
    assert [[turn.seconds for turn in each] for each in timed.rounds] == [[5.0] * 3, [15.0] * 3]
    assert timed.matmul_rates == [7.0, 7.0]
    assert len(steps) == 6


def test_a_round_knows_which_lap_was_which(clock):
    turn = run_once(runner("one", clock, [], [1.0, 2.0, 3.0, 4.0, 5.0]), CPU, seed=3)
    assert turn.laps == [
        Lap("transformer", 0, 1.0),
        Lap("token sampling", 0, 2.0),
        Lap("transformer", 1, 3.0),
        Lap("token sampling", 1, 4.0),
        Lap("decoder", 0, 5.0),
    ]
    assert turn.seconds == 15 and turn.encoding == 0


def test_what_does_not_fit_into_memory_is_said(clock):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def broken(*_):
        raise RuntimeError("shapes cannot be multiplied")

    sampler = runner("raster", clock, [], 1.0, batch=64)
    with pytest.raises(RunError, match=r"^raster with 64 images at a time does not fit into memory; use a smaller"):
        run_once(replace(sampler, make=full), CPU, 0)
    with pytest.raises(RuntimeError, match="multiplied"):
        run_once(replace(sampler, make=broken), CPU, 0)


# --- figures ---


def turns(*lengths):
    """Return rounds whose five laps share each length, with a tenth as much for the PNG."""
    names = [("transformer", 0), ("token sampling", 0), ("transformer", 1), ("token sampling", 1), ("decoder", 0)]
    return [Round([Lap(*name, length / 5) for name in names], length / 10) for length in lengths]


def test_figures_are_of_one_image_and_medians(clock):
    both = [runner("varcli", clock, [], 0, batch=4), runner("naive", clock, [], 0)]
    first, second = sampler_timings(both, InterleavedTimings([turns(2, 4, 12), turns(3, 30, 3)], [200, 50]))
    assert (first.seconds_per_image, first.images_per_second, first.times_varcli) == (1.0, 1.0, 1.0)
    assert (second.seconds_per_image, second.times_varcli) == (3.0, 3.0)
    assert first.latency == {"p50": 4, "p90": pytest.approx(10.4), "p99": pytest.approx(11.84)}
    assert first.operations == 100 and first.matmul_fraction == pytest.approx(0.5)
    assert second.matmul_fraction == pytest.approx(100 / 3 / 50)
    named = {stage.name: stage for stage in first.stages}
    assert list(named) == ["transformer a", "transformer b", "token sampling", "decoder", "PNG"]
    assert [stage.seconds for stage in first.stages] == pytest.approx([0.2, 0.2, 0.4, 0.2, 0.1])
    assert sum(stage.seconds for stage in first.stages[:-1]) == pytest.approx(first.seconds_per_image)
    assert named["transformer b"].matmul_fraction == pytest.approx(30 / 0.2 / 200)
    assert named["token sampling"].operations is None and named["token sampling"].matmul_fraction is None


def test_percentiles():
    assert percentile([7], 99) == 7
    assert [percentile([3, 1, 2], percent) for percent in (0, 50, 75, 100)] == [1, 2, 2.5, 3]


# --- real ones -------------------------------------------------------------------------------------


def test_samplers_make_images_and_mark_every_phase():
    config, models = SampleConfig(), made()
    plain = naive_sampler(made(), config)
    prepare(*models, CPU, "fp32")
    ours, raster = varcli(models, config, "fp32", 3), raster_scan(models, config, "fp32", 3)
    for sampler, steps in ((ours, 3), (plain, 3), (raster, 16)):
        marks = []
        images = sampler.make([5, 9], marks.append)
        assert [image.shape for image in images] == [(16, 16, 3)] * 2
        assert len(sampler.steps) == steps
        assert set(marks) == {"transformer", "token sampling", "decoder"} and marks[-1] == "decoder"
        assert marks.count("transformer") == marks.count("token sampling") == 2 * steps or sampler is raster
        assert set(sampler.operations) == {("decoder", ""), *(("transformer", step) for step in sampler.steps)}
    assert ours.batch == raster.batch == plain.batch == 1  # on a CPU images are made one by one


def test_a_capture_that_fails_is_reported(monkeypatch):
    def refused(step):
        raise RuntimeError("operation not permitted\n when stream is capturing")

    class Capturing(BatchSampler):
        def __init__(self, *given):
            super().__init__(*given)
            self.new_capture = lambda: refused

    monkeypatch.setattr(samplers, "BatchSampler", Capturing)
    for made_by in (varcli, raster_scan):
        told, models = [], made()
        sampler = made_by(models, SampleConfig(), "bf16", 1, told.append)
        assert sampler.cuda_graphs()
        for seed in range(3):
            sampler.make([seed], lambda phase: None)
        assert not sampler.cuda_graphs()
        (line,) = told
        assert line.startswith("CUDA graphs cannot be captured here") and "permitted when stream" in line


def test_varcli_and_plain_draw_the_same_images():
    config, models = SampleConfig(), made()
    plain = naive_sampler(made(), config).make([1, 2], lambda phase: None)
    prepare(*models, CPU, "fp32")
    ours = varcli(models, config, "fp32", 1).make([1, 2], lambda phase: None)
    for one, other in zip(ours, plain, strict=True):
        assert abs(one.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_benchmark_from_beginning_to_end(precision, monkeypatch):
    monkeypatch.setattr(timing, "CPU_SIZE", 64)
    steps = []
    plan = BenchPlan(
        load=made, config=SampleConfig(), device=CPU, precision=precision, batch=2, others=["naive", "raster"], rounds=2
    )
    found = run_benchmark(plan, lambda: steps.append(1))
    assert len(steps) == plan.batches == 9
    assert [(each.sampler, each.precision) for each in found.samplers] == [
        ("varcli", precision),
        ("naive", "fp32"),
        ("raster", precision),
    ]
    assert all(each.matmul_rate > 0 for each in found.samplers) and (
        found.peak_bytes is None or found.peak_bytes > 1 << 20
    )
    assert all(stage.seconds > 0 for each in found.samplers for stage in each.stages)
    image = Image.open(io.BytesIO(png(*panels("a small model", found.samplers))))
    assert image.size[0] == 960


def test_the_machine_is_measured_in_every_precision(monkeypatch):
    monkeypatch.setattr(timing, "CPU_SIZE", 32)
    assert all(matmul_rate(CPU, precision) > 0 for precision in ("fp32", "bf16", "fp16", "int8"))
    monkeypatch.setattr(timing, "packing_works", lambda dtype: False)
    assert matmul_rate(CPU, "fp32") > 0
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    assert peak_bytes(torch.device("cuda")) == 123
