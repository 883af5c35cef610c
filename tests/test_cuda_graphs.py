"""The GPU path without a GPU: captured steps on the CPU, and on CUDA tensors that hold nothing."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from support import reference
from support.fake_cuda import CUDA, Watch, pretended, tensors
from varcli.acceleration import dispatch
from varcli.acceleration.cuda_blocks import FusedBlocks, GpuBlock, ScaleCache, for_gpu
from varcli.acceleration.cuda_graphs import GraphRunner, cuda_capture
from varcli.acceleration.dispatch import prepare
from varcli.acceleration.int8 import quantize
from varcli.config import GRID_256, GRID_512, SampleConfig, TokenizerConfig, TransformerConfig
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import KeyValueCache, Transformer
from varcli.sampling import batching, naive, token_sampling
from varcli.sampling.batching import BatchSampler, batch_bytes, model_bytes, padded_size
from varcli.sampling.sampler import decode_on_device, generate
from varcli.sampling.scale_model import ScaleModel

pytestmark = pytest.mark.slow

SIDES = (1, 2, 3, 4, 6)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Wanted:
    label: int
    seed: int


@pytest.fixture(scope="module", params=[False, True], ids=["adaln", "shared"])
def small(request):
    shape = {"sides": SIDES, "codebook_size": 96, "codebook_width": 8}
    tokenizer = Tokenizer(TokenizerConfig(base_width=32, multipliers=(1, 1, 2), **shape))
    transformer = Transformer(TransformerConfig(depth=3, width=128, class_count=5, shared_adaln=request.param, **shape))
    reference.set_rule_weights(tokenizer)
    reference.set_rule_weights(transformer)
    return tokenizer.eval(), transformer.eval()


# --- fused blocks ----------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_blocks_compute_what_the_plain_ones_do(small, dtype):
    """In 16 bits as near to float32 as the plain blocks come."""
    _, exact = small
    config = exact.config
    half = Transformer(config).eval()
    half.load_state_dict(exact.state_dict())
    for layer in half.blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.to(dtype)
    blocks, source = FusedBlocks(half, GpuBlock), torch.Generator().manual_seed(0)
    class_BD = torch.randn(3, config.width, generator=source)
    ours, theirs = ScaleCache(config, 3, CPU, dtype), KeyValueCache(config, 3, CPU, torch.float32)
    rounded, errors = KeyValueCache(config, 3, CPU, dtype), []
    for side in config.sides:
        x_BlD = torch.randn(3, side * side, config.width, generator=source)
        true = exact.step(x_BlD, exact.modulations(class_BD), theirs)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            plain_BlD = half.step(x_BlD, [ada.float() for ada in half.modulations(class_BD)], rounded)
        fused_BlD = blocks.step(x_BlD.clone(), blocks.modulations(class_BD), ours)
        assert fused_BlD.dtype == torch.float32
        errors.append([(got - true).square().mean() for got in (fused_BlD, plain_BlD)])
    of_fused, of_plain = torch.tensor(errors).mean(0).sqrt()
    assert of_fused <= 1.1 * of_plain + 1e-5


def test_the_cache_of_scales_forgets_only_what_no_scale_needs(small):
    config = small[1].config
    cache, last = ScaleCache(config, 2, CPU, torch.float32), config.sides[-1] ** 2
    assert cache.kv[0].shape[3] == config.length - last
    assert cache.until(0, 5).data_ptr() == cache.kv[0].data_ptr()
    cache.kv[1].normal_()
    cache.filled = config.length - last
    assert torch.equal(cache.until(1, config.length)[:, :, :, :-last], cache.kv[1])


# --- captured steps --------------------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: the operations, and the memory they read and write."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, made))
        return made

    def replay(self):
        for func, args, kwargs, made in self.operations:
            given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            places = [t for t in tensors(made) if t.untyped_storage().data_ptr() not in given]
            if places or func._schema.is_mutable:  # a view has nothing to compute
                again = func(*args, **kwargs)
                new = [t for t in tensors(again) if t.untyped_storage().data_ptr() not in given]
                for place, value in zip(places, new, strict=True):
                    place.copy_(value)


def taped(step):
    """Capture a step; what it returns holds nothing of value before it is replayed, as on a GPU."""
    with Tape() as tape, mock.patch.object(token_sampling, "best", Tensor.topk):  # on a processor numpy finds them
        result = step()
    for _, args, kwargs, made in tape.operations:
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        for tensor in tensors(made):
            if tensor.untyped_storage().data_ptr() not in given:
                tensor.zero_()
    return tape.replay, result


def never(error):
    raise error


CAPTURED = [
    SampleConfig(),
    SampleConfig(cfg=0, top_k=20, top_p=0),
    SampleConfig(vpg=0.7, ssg=0.3, refiner="itself", refine_from=4),
]


@pytest.mark.parametrize("config", CAPTURED, ids=["guided", "free", "refined"])
@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_captured_steps_sample_the_naive_samplers_tokens_batch_after_batch(small, config, kind, monkeypatch):
    """Nothing of a batch stays for the next: not its classes, not its numbers, not its cache."""
    monkeypatch.setattr(dispatch, "for_gpu", lambda transformer: kind == "fused")
    runner, refiner = GraphRunner(taped, never), small[1] if config.refiner else None
    for turn, rows in enumerate(([0, 4, 2], [1, 1, 5], [3, 0, 2], [5, 4, 1])):
        seeds = [7 * turn, 1, 2]
        results = [r.tokens.clone() for r in generate(*small, rows, seeds, config, refiner=refiner, runner=runner)]
        for i, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
            tokens, _ = naive.sample(*small, row, seed, config, refiner=refiner)
            for scale, expected in enumerate(tokens):
                assert torch.equal(results[scale][i], expected), f"batch {turn} image {i} scale {scale}"
    refining = {"refiner class", "refiner prefix"} if config.refiner else set()
    assert set(runner.graphs) == {"class"} | refining | {
        f"{phase} {k}" for k in range(5) for phase in ("transformer", "token sampling")
    }


def test_single_batches_are_not_captured(small):
    runner = GraphRunner(None, never)  # would fail if it were called
    assert len(list(generate(*small, [1], [2], SampleConfig(), runner=runner))) == 5


@pytest.mark.parametrize("broken", ["class", "token sampling 0", "transformer 3"])
def test_what_cannot_be_captured_runs_as_it_is(small, broken):
    told, steps = [], []

    def capture(step):
        steps.append(step)
        if len(runner.graphs) == order.index(broken):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return taped(step)

    runner = GraphRunner(capture, told.append)
    order = ["class", *(f"{phase} {k}" for k in range(5) for phase in ("transformer", "token sampling"))]
    for seed in range(4):
        results = [r.tokens.clone() for r in generate(*small, [1], [seed], SampleConfig(), runner=runner)]
        tokens, _ = naive.sample(*small, 1, seed, SampleConfig())
        assert all(torch.equal(ours[0], expected) for ours, expected in zip(results, tokens, strict=True))
    assert len(told) == 1 and len(steps) == order.index(broken) + 1
    assert runner.graphs == {}


def test_graphs_are_captured_and_replayed_on_their_own_device(monkeypatch):
    """With `--device cuda:1` the current device is another one."""
    events = []

    @contextmanager
    def entered(*name, **options):
        events.append(("enter", *name))
        yield
        events.append(("leave", *name))

    def graph(captured, *, pool, stream, capture_error_mode):
        return entered(pool, stream, capture_error_mode)

    class Graph:
        def replay(self):
            events.append("replay")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"current of {device}")
    second = torch.device("cuda:1")
    replay, result = cuda_capture(second)(lambda: events.append("step") or 7)
    replay()
    captured = ("pool", "stream of cuda:1", "thread_local")
    assert result == 7
    inside = [(second,), ("current of cuda:1",), captured]
    assert events[:4] == [*(("enter", *each) for each in inside), "step"]
    assert events[4:7] == [("leave", *each) for each in reversed(inside)]
    assert events[7:] == [("enter", second), "replay", ("leave", second)]


@pytest.mark.parametrize("ended", [True, False])
def test_after_a_failed_capture_the_stream_is_as_before_and_idle(monkeypatch, ended):
    """Some versions of torch do not restore it where the capture cannot be ended."""
    streams, waits = ["own"], []

    @contextmanager
    def switched(stream):
        before, streams[0] = streams[0], stream
        try:
            yield
        finally:
            streams[0] = before

    @contextmanager
    def graph(captured, *, pool, stream, capture_error_mode):
        streams[0] = stream
        try:
            yield
        finally:
            if not ended:
                raise RuntimeError("operation failed due to a previous error during capture")
            streams[0] = "own"

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "capturing")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", switched)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append((device, streams[0])))

    given_back = []

    def give_back(index, pool):
        given_back.append((index, pool))
        raise RuntimeError("nothing was allocated to this pool")  # where torch has done so itself

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", give_back, raising=False)

    def step():
        assert streams == ["capturing"]
        raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):  # what went wrong, not what followed from it
        cuda_capture(CUDA)(step)
    assert streams == ["own"] and waits == [(CUDA, "own")] and given_back == [(0, "pool")]


# --- batches ---------------------------------------------------------------------------------------


@pytest.fixture
def capturing(small, monkeypatch):
    """A sampler that captures, in batches of four; on the CPU it need not wait for images."""
    monkeypatch.setattr(batching, "independent", lambda transformer: False)
    made = BatchSampler(*small, SampleConfig(), 4)
    made.new_capture, made.ahead = lambda: taped, 1
    return made


def test_batches_are_padded_and_captured_for_each_size(small, capturing):
    capturing.ahead = 0  # on the CPU nothing is copied: what is yielded is where the next batch will be
    for count in (4, 9, 3, 6, 1):
        wanted = [Wanted(seed % 6, seed) for seed in range(count)]
        images = [(w, pixels.copy()) for w, pixels in capturing.images(wanted)]
        assert [w for w, _ in images] == wanted
        for w, pixels in images:
            _, expected = naive.sample(*small, w.label, w.seed, SampleConfig())
            assert (torch.from_numpy(pixels).int() - expected.int()).abs().max() <= 1
    assert set(capturing.runners) == {1, 4}
    assert set(capturing.runners[4].graphs) >= {"class", "decoder"} and not capturing.runners[1].graphs


def test_the_next_batch_begins_before_images_are_waited_for(capturing):
    read = []
    images = capturing.images(read.append(seed) or Wanted(0, seed) for seed in range(12))
    next(images)
    assert read == list(range(8))


def test_graphs_are_given_up_before_batches_are_halved(small, capturing, monkeypatch):
    freed, sizes, tight = [], [], [True]

    def full(*given, runner, **_):
        sizes.append(len(given[2]))
        if len(capturing.runners) > 1 or (sizes[-1] > 2 and tight[0]):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(*given, runner=runner)

    monkeypatch.setattr(batching, "generate", full)
    monkeypatch.setattr(batching, "free_memory", lambda device: freed.append(len(capturing.runners)))
    assert len(list(capturing.images(Wanted(0, seed) for seed in range(4)))) == 4
    assert sizes == [4, 2, 2] and freed == [0] and capturing.batch_size == 2
    sizes.clear(), freed.clear()
    assert len(list(capturing.images([Wanted(0, 1)]))) == 1
    assert sizes == [1, 1] and freed == [0] and capturing.batch_size == 2


@pytest.mark.parametrize(
    ("error", "sizes", "tried"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), [4, 4, 2, 2, 1, 1, 1, *[1] * 16], 3),
        (RuntimeError("CUDA error: operation not permitted"), [4] * 6, 1),
    ],
    ids=["memory", "other"],
)
def test_capturing_is_given_up_once_for_all(capturing, monkeypatch, error, sizes, tried):
    """Where memory ran out a smaller batch may be captured still; only the last one is made as it is."""
    made, captured, told = [], [], []

    def capture(step):
        captured.append(step)
        raise error

    def noted(*given, **options):
        made.append(len(given[2]))
        return generate(*given, **options)

    monkeypatch.setattr(batching, "generate", noted)
    capturing.new_capture, capturing.note = lambda: capture, told.append
    wanted = [Wanted(seed % 6, seed) for seed in range(24)]
    assert [w for w, _ in capturing.images(wanted)] == wanted
    assert made == sizes and len(captured) == tried
    (line,) = told
    assert line.startswith("CUDA graphs cannot be captured here")
    assert capturing.new_capture is None and capturing.runners == {}


def test_a_last_batch_is_as_large_as_those_before_it(capturing, monkeypatch):
    """In 16 bits an image depends on the size of its batch, and should not on its position."""
    sizes = []
    monkeypatch.setattr(batching, "generate", lambda *given, **_: sizes.append(len(given[2])) or generate(*given))
    capturing.new_capture = None
    assert len(list(capturing.images(Wanted(0, seed) for seed in range(5)))) == 5
    assert len(list(capturing.images(Wanted(0, seed) for seed in range(3)))) == 3
    assert sizes == [4, 4, 3]


def test_what_was_begun_is_handed_over_before_an_error(capturing):
    def wanted():
        yield from (Wanted(0, seed) for seed in range(9))
        raise OSError("the list ends here")

    found = []
    with pytest.raises(OSError, match="ends here"):
        found.extend(w.seed for w, _ in capturing.images(wanted()))
    assert found == list(range(8))


def test_sizes_are_powers_of_two_up_to_the_batch():
    assert [padded_size(n, 50) for n in (1, 2, 3, 5, 16, 17, 33, 50)] == [1, 2, 4, 8, 16, 32, 50, 50]
    assert padded_size(64, 32) == 64


# --- on a GPU that is not there --------------------------------------------------------------------


def released(depth, blocks=None, sides=GRID_256, **changes):
    """Models of a released shape, or some blocks of one, in bf16, to be put on the pretended GPU."""
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig(sides=sides))
        shape = {"sides": sides, "codebook_size": 4096, "codebook_width": 32}
        transformer = Transformer(TransformerConfig(depth=blocks or depth, width=64 * depth, **shape, **changes))
    prepare(tokenizer, transformer, torch.device("meta"), "bf16")
    return tokenizer, transformer


@dataclass
class Phases:
    """A runner that watches what is to be captured, as a captured batch would hold it."""

    watch: Watch
    held: list

    def copy_in(self, name, given, device):
        return torch.empty(given.shape, dtype=given.dtype, device=device)

    def run(self, name, step):
        with self.watch:
            self.held.append(step())
        return self.held[-1]


@torch.inference_mode()
def run(models, count, config, kind="fused"):
    phases = Phases(Watch(), [])
    *_, last = generate(*models, [0] * count, range(count), config, runner=phases)
    pixels_BPP3 = phases.run("decoder", lambda: decode_on_device(models[0], last.f_hat))
    assert pixels_BPP3.dtype == torch.uint8 and pixels_BPP3.device == CUDA
    assert isinstance(phases.held[0], ScaleModel) and isinstance(phases.held[0].cache, ScaleCache) == (kind == "fused")
    return phases.watch, pixels_BPP3


@pytest.mark.parametrize("config", [SampleConfig(), SampleConfig(cfg=0, top_k=0, top_p=0)], ids=["guided", "free"])
def test_no_step_waits_for_the_gpu(monkeypatch, config):
    models = released(16, 2)
    with pretended(monkeypatch, *models):
        _, pixels = run(models, 3, config)
        assert pixels.shape == (3, 256, 256, 3)


def test_the_largest_released_model_runs_too(monkeypatch):
    models = released(36, 2, GRID_512, shared_adaln=True)
    with pretended(monkeypatch, *models):
        _, pixels = run(models, 2, SampleConfig())
        assert pixels.shape == (2, 512, 512, 3)


@pytest.mark.parametrize(("depth", "count"), [(16, 256), (30, 64)])
@pytest.mark.parametrize("kind", ["fused", "plain", "int8"])
def test_memory_is_as_planned(monkeypatch, depth, count, kind):
    if kind == "plain":
        for module in (dispatch, batching):
            monkeypatch.setattr(module, "for_gpu", lambda transformer: False)
    models = released(depth, 3)
    if kind == "int8":
        quantize(models[1], torch.device("meta"), torch.bfloat16)
    with pretended(monkeypatch, *models):
        watch, _ = run(models, count, SampleConfig(), kind)
        planned = batch_bytes(*models, SampleConfig(), count)
        assert 0.98 * watch.peak <= planned <= 1.15 * watch.peak


def test_64_images_of_the_largest_256_pixel_model_take_at_most_26_gigabytes(monkeypatch):
    models = released(30)
    with pretended(monkeypatch, *models):
        assert batch_bytes(*models, SampleConfig(), 64) + model_bytes(*models) <= 26e9


def test_batches_follow_from_the_gpu_not_from_what_others_leave_of_it(monkeypatch):
    models, free = released(30), iter([80e9, 3e9, 10e9])
    whole = {"whole": 80e9}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), whole["whole"]))
    with pretended(monkeypatch, *models):
        assert [batching.fitting_batch(*models, SampleConfig()) for _ in range(2)] == [256, 256]
        whole["whole"] = 10e9
        assert batching.fitting_batch(*models, SampleConfig()) == 8


def test_operations_are_as_many_as_they_must_be(monkeypatch):
    """Linear maps, attention and decoder of one image of the released model of depth 16, whose blocks are equal."""
    products = {torch.ops.aten._addmm_activation: lambda bias, x, weight, **_: 2 * math.prod(x) * weight[1]}
    counted = []
    for blocks in (1, 2):
        models = released(16, blocks)
        with pretended(monkeypatch, *models), FlopCounterMode(display=False, custom_mapping=products) as counter:
            run(models, 1, SampleConfig())
        counted.append(counter.get_total_flops())
    one, two = counted
    assert one + 15 * (two - one) == pytest.approx(994e9, rel=0.05)


def test_fused_blocks_stand_in_only_where_they_are_faster(small, monkeypatch):
    assert not for_gpu(small[1])
    tokenizer, transformer = released(16, 2)
    with pretended(monkeypatch, tokenizer, transformer):
        assert for_gpu(transformer)
        transformer.blocks[1].attn.proj = torch.nn.Sequential(transformer.blocks[1].attn.proj)
        assert not for_gpu(transformer)
