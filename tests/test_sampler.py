"""The sampler equals the original when sampling greedily, and the naive sampler token by token in all settings."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import interpolate

from support import reference
from varcli.acceleration.devices import free_memory, pick_device, pick_dtype
from varcli.acceleration.dispatch import prepare
from varcli.config import SampleConfig, TokenizerConfig, TransformerConfig
from varcli.errors import RunError, UsageError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer
from varcli.sampling import batching, naive
from varcli.sampling.batching import BatchSampler
from varcli.sampling.sampler import Keep, ScaleModel, decode, generate

GREEDY = SampleConfig(cfg=0, top_k=1, top_p=0)


@dataclass(frozen=True)
class Wanted:
    label: int
    seed: int


@pytest.fixture(scope="module")
def small():
    """A model of our own shape: three levels, seven scales, few classes."""
    sides = (1, 2, 3, 4, 6)
    tokenizer = Tokenizer(
        TokenizerConfig(sides=sides, codebook_size=96, codebook_width=8, base_width=32, multipliers=(1, 1, 2))
    )
    transformer = Transformer(
        TransformerConfig(depth=3, width=128, sides=sides, codebook_size=96, codebook_width=8, class_count=5)
    )
    reference.set_rule_weights(tokenizer)
    reference.set_rule_weights(transformer)
    prepare(tokenizer, transformer, torch.device("cpu"), "fp32")
    return tokenizer, transformer


def tokens_of(models, rows, seeds, config, keep=None):
    return [result.tokens for result in generate(*models, rows, seeds, config, keep=keep)]


def test_greedy_tokens_match_original(original):
    outputs = original.outputs
    images = [name for name in outputs if name.startswith("greedy.") and name.endswith(".image")]
    assert len(images) >= 2
    for name in images:
        start = name.removesuffix(".image")
        config = replace(GREEDY, cfg=float(start.removeprefix("greedy.cfg")))
        labels = outputs["labels"].tolist()
        results = list(generate(original.tokenizer, original.transformer, labels, [0, 0, 0], config))
        for result in results:
            assert torch.equal(result.tokens, outputs[f"{start}.tokens.{result.scale}"].long())
        image = torch.from_numpy(decode(original.tokenizer, results[-1].f_hat)).permute(0, 3, 1, 2) / 255
        assert (image - outputs[name]).abs().max() < 0.51 / 255


def test_kept_tokens_edit_as_the_original_does(original):
    sides = original.transformer.config.sides
    image = original.outputs["image_u8"][:1] / 127.5 - 1
    with torch.no_grad():
        tokens = original.tokenizer.encode(image)
    for i, edit in enumerate(original.edits):
        mask = original.outputs[f"edit.{i}.keep_mask"][None, None]
        masks = [
            interpolate(mask, size=(side, side), mode="bilinear").flatten(1) > (0.5 if side > 1 else -1)
            for side in sides
        ]
        config = replace(GREEDY, cfg=edit["cfg"])
        *_, last = generate(
            original.tokenizer, original.transformer, [edit["label"]], [0], config, keep=Keep(tokens, masks)
        )
        edited = torch.from_numpy(decode(original.tokenizer, last.f_hat)).permute(0, 3, 1, 2) / 255
        assert (edited - original.outputs[f"edit.{i}.image"]).abs().max() < 0.51 / 255


SETTINGS = [
    SampleConfig(cfg=0, top_k=0, top_p=0),
    SampleConfig(cfg=0, top_k=1, top_p=0),
    SampleConfig(cfg=1.5, top_k=40, top_p=0),
    SampleConfig(cfg=4, top_k=0, top_p=0.7),
    SampleConfig(),
    SampleConfig(smooth=True, top_k=0),
    SampleConfig(smooth=True, top_k=20, cfg=3),
    SampleConfig(cfg=3.0, top_k=40, top_p=0.9, temperature=0.7, ssg=0.4, cfg_scales="2-4"),
    SampleConfig(cfg=0, vpg=1.5, top_k=40),
    SampleConfig(cfg=2.0, vpg=0.8, ssg=0.3, cfg_scales="1-3"),
]


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_equals_the_naive_sampler(small, config):
    rows, seeds = [0, 4, 5, 4], [0, 1, 2, 2**40]
    results = list(generate(*small, rows, seeds, config))
    images = decode(small[0], results[-1].f_hat)
    for i, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        tokens, image = naive.sample(*small, row, seed, config)
        for scale, expected in enumerate(tokens):
            assert torch.equal(results[scale].tokens[i], expected), f"image {i} scale {scale}"
        assert (torch.from_numpy(images[i]).int() - image.int()).abs().max() <= 1


def test_equals_the_naive_sampler_on_the_reference_models(original):
    for config in (SampleConfig(), SampleConfig(cfg=4, smooth=True)):
        results = list(generate(original.tokenizer, original.transformer, [3], [11], config))
        tokens, _ = naive.sample(original.tokenizer, original.transformer, 3, 11, config)
        assert all(torch.equal(result.tokens[0], t) for result, t in zip(results, tokens, strict=True))


def test_every_setting_changes_the_image(small):
    start = SampleConfig(cfg=2, top_k=50, top_p=0.8)
    first = tokens_of(small, [1], [0], start)[-1]
    for change in ({"cfg": 0}, {"cfg": 5}, {"top_k": 3}, {"top_p": 0.2}, {"smooth": True}, {"vpg": 3}):
        assert not torch.equal(tokens_of(small, [1], [0], replace(start, **change))[-1], first), change
    assert not torch.equal(tokens_of(small, [1], [1], start)[-1], first)
    assert not torch.equal(tokens_of(small, [2], [0], start)[-1], first)


def test_without_guidance_there_is_no_unconditional_pass(small):
    with torch.no_grad():
        assert ScaleModel(small[1], [0, 1], replace(GREEDY, cfg=0)).cache.kv[0].shape[1] == 2
        assert ScaleModel(small[1], [0, 1], replace(GREEDY, cfg=1)).cache.kv[0].shape[1] == 4
        assert ScaleModel(small[1], [0, 1], replace(GREEDY, cfg=1, vpg=1)).cache.kv[0].shape[1] == 6


def test_kept_tokens_survive(small):
    kept = tokens_of(small, [1], [0], SampleConfig())
    masks = [torch.rand(1, t.shape[1]) < 0.5 for t in kept]
    drawn = tokens_of(small, [2, 3], [5, 6], SampleConfig(), Keep(kept, masks))
    for ours, given, mask in zip(drawn, kept, masks, strict=True):
        assert torch.equal(ours[:, mask[0]], given[:, mask[0]].expand(2, -1))


def images(models, wanted, config, batch_size):
    sampler = BatchSampler(*models, config, batch_size)
    return {(w.label, w.seed): pixels.tobytes() for w, pixels in sampler.images(wanted)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_an_image_does_not_depend_on_its_batch(dtype):
    models = reference.load("mini")
    prepare(models.tokenizer, models.transformer, torch.device("cpu"), dtype)
    wanted = [Wanted(row, seed) for row in (0, 3, 10) for seed in (0, 1)]
    both = (models.tokenizer, models.transformer)
    alone = images(both, wanted, SampleConfig(), 1)
    assert len(set(alone.values())) == len(wanted)
    assert images(both, wanted[::-1], SampleConfig(), 3) == alone
    assert images(both, wanted[2:] + wanted[:2], SampleConfig(), 64) == alone
    assert images(both, wanted[4:5], SampleConfig(), None) == {(10, 0): alone[10, 0]}


@torch.no_grad()
def test_16_bits_stay_close_on_forced_tokens(small):
    """Free-running tokens diverge after one draw goes the other way, so the logits are compared."""
    half = reference.load("mini")
    exact = reference.load("mini")
    prepare(half.tokenizer, half.transformer, torch.device("cpu"), "bf16")
    ours = ScaleModel(half.transformer, [1], SampleConfig(cfg=1.5))
    theirs = ScaleModel(exact.transformer, [1], SampleConfig(cfg=1.5))
    tokens = [t[:1].long() for t in (exact.outputs[f"tokens.{k}"] for k in range(4))]
    inputs = [None, *exact.tokenizer.quantize.teacher_input(tokens).split([4, 9, 16], dim=1)]
    for scale, given in enumerate(inputs):
        low, high = ours.logits(scale, given), theirs.logits(scale, given)
        assert low.dtype == torch.float32
        assert (low - high).abs().mean() < 0.02 * high.std()


def test_growth_ends_in_the_image(small):
    sampler = BatchSampler(*small, SampleConfig())
    frames = list(sampler.growth(Wanted(1, 2)))
    [(_, pixels)] = sampler.images([Wanted(1, 2)])
    assert len(frames) == 5
    assert (frames[-1] == pixels).all() and (frames[0] != pixels).any()


def test_batches_are_halved_when_memory_runs_out(small, monkeypatch):
    sizes = []

    def tight(tokenizer, transformer, rows, seeds, config, **_):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(tokenizer, transformer, rows, seeds, config)

    freed = []
    monkeypatch.setattr(batching, "independent", lambda transformer: False)
    monkeypatch.setattr(batching, "generate", tight)
    monkeypatch.setattr(batching, "free_memory", freed.append)
    wanted = [Wanted(1, seed) for seed in range(11)]
    made = list(BatchSampler(*small, SampleConfig(), 8).images(wanted))
    assert [w for w, _ in made] == wanted
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 2, 2]
    assert freed == [torch.device("cpu")] * 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:115] data. DefaultCPUAllocator: not enough memory: you tried to"),
        MemoryError(),
    ],
    ids=["CUDA", "MPS", "cuBLAS", "Linux", "Windows", "Python"],
)
def test_not_even_one_image_fits(small, monkeypatch, error):
    def none(*_, **__):
        raise error

    monkeypatch.setattr(batching, "generate", none)
    with pytest.raises(RunError, match=r"^one image does not fit into memory; "):
        list(BatchSampler(*small, SampleConfig()).images([Wanted(0, 0)]))


def test_other_runtime_errors_are_bugs(small, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(batching, "generate", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        list(BatchSampler(*small, SampleConfig()).images([Wanted(0, 0)]))


def test_requests_are_read_a_batch_at_a_time(small):
    read = []
    requests = (read.append(seed) or Wanted(0, seed) for seed in range(5))
    answers = BatchSampler(*small, GREEDY).images(requests)
    next(answers)
    assert read == [0]


def test_metal_gives_its_memory_back_too(monkeypatch):
    freed = []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: freed.append("mps"))
    free_memory(torch.device("mps"))
    free_memory(torch.device("cpu"))
    assert freed == ["mps"]


def test_models_move_in_the_precision_they_compute_in(monkeypatch):
    models = reference.load("mini")
    moved = []
    for kind, weight in ((Transformer, "blocks.0.attn.proj.weight"), (Tokenizer, "decoder.conv_in.weight")):

        def to(self, device, weight=weight, true=kind.to):
            moved.append(self.get_parameter(weight).dtype)
            return true(self, device)

        monkeypatch.setattr(kind, "to", to)
    prepare(models.tokenizer, models.transformer, torch.device("cpu"), "bf16")
    assert moved == [torch.bfloat16, torch.bfloat16]


def test_a_model_too_large_for_the_device_is_one_line(small, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Transformer, "to", full)
    with pytest.raises(RunError, match=r"^the model does not fit into the memory of cpu; use a smaller one, "):
        prepare(*small, torch.device("cpu"), "fp32")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp16(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert pick_dtype("auto", torch.device("cuda")) == expected


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_dtype("bf16", torch.device("cpu")) == "bf16"
    assert pick_dtype("auto", torch.device("mps")) == "fp32"
    for absent in ("cuda:99", "cpu:1", "meta"):
        with pytest.raises(UsageError, match=f"^this machine has no device {absent}, only cpu"):
            pick_device(absent)
    with pytest.raises(UsageError, match=r"^--device must be auto, cpu, cuda, cuda:1 or mps \(got gpu\)"):
        pick_device("gpu")


def test_a_stopwatch_hears_of_both_phases_of_every_scale(small):
    marks = []
    results = generate(*small, [0], [0], GREEDY, mark=marks.append)
    for number, _ in enumerate(results, start=1):
        assert marks == ["transformer", "token sampling"] * number


# --- two models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refiner(small):
    """Another transformer of the same tokenizer: less deep, and wider."""
    transformer = Transformer(replace(small[1].config, depth=2, width=192))
    reference.set_rule_weights(transformer)
    prepare(small[0], transformer, torch.device("cpu"), "fp32")
    return transformer


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2, 4, 5])
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_a_model_that_refines_itself_changes_nothing(small, config, scale):
    config = replace(config, refiner="itself", refine_from=scale)
    alone = generate(*small, [0, 4], [1, 2], config)
    for one, two in zip(alone, generate(*small, [0, 4], [1, 2], config, refiner=small[1]), strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.f_hat, two.f_hat)


@pytest.mark.parametrize("approximate", ["", "guidance", "all"])
def test_an_approximated_model_that_refines_itself_changes_nothing(small, approximate):
    config = SampleConfig(refiner="itself", refine_from=4, approximate=approximate, ssg=0.3)
    one, two = list(generate(*small, [1], [3], config))[-1], list(generate(*small, [1], [3], config, refiner=small[1]))
    assert torch.equal(one.f_hat, two[-1].f_hat)


@pytest.mark.parametrize("scale", [2, 4, 5])
def test_a_refiner_equals_the_naive_sampler(small, refiner, scale):
    config = SampleConfig(cfg=3.0, top_k=40, ssg=0.4, refiner="another", refine_from=scale)
    results = list(generate(*small, [0, 4], [1, 2], config, refiner=refiner))
    for i, (row, seed) in enumerate([(0, 1), (4, 2)]):
        tokens, _ = naive.sample(*small, row, seed, config, refiner=refiner)
        for result, expected in zip(results, tokens, strict=True):
            assert torch.equal(result.tokens[i], expected), f"image {i} scale {result.scale}"
    alone = list(generate(*small, [0, 4], [1, 2], config))
    same = [torch.equal(one.tokens, two.tokens) for one, two in zip(results, alone, strict=True)]
    assert all(same[: scale - 1]) and not same[-1]
