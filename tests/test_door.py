"""The Python API: its names and parameters are frozen, and it does what the commands do."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import varcli
from support import small
from varcli import cli
from varcli.errors import CheckpointError, ConfigError, InputError, UsageError
from varcli.images.provenance import read_provenance

API = {
    "load": "checkpoint device dtype quantize progress",
    "evaluate": "source metrics reference tokenizer num_images seed config best_of decide_at classifier batch_size "
    "paths resize skip_bad lines features weights lpips_weights device save_stats save_images thumbnails group report "
    "note quiet",
    "train_tokenizer": "data out config training init lpips_weights holdout validate_every save_every eval_every "
    "eval_images eval_features eval_weights device dtype workers compiled tensorboard wandb group report note quiet",
    "train_transformer": "data tokenizer out depth width shared_adaln training init token_cache holdout validate_every "
    "save_every eval_every eval_images eval_features eval_weights device dtype save_dtype workers compiled "
    "flex_attention checkpoint_activations shard tensorboard wandb group report note quiet",
    "Model.sample": "self classes count seed preset batch_size settings",
    "Model.stream": "self requests preset batch_size settings",
    "Model.grow": "self label seed preset settings",
    "Model.inpaint": "self image mask label box alpha fit_mask seed best_of decide_at feather composite released_rule "
    "preset settings",
    "Model.outpaint": "self image pad to label seed best_of decide_at feather composite released_rule preset settings",
    "Model.edit": "self image label mask box alpha fit_mask seed best_of decide_at feather composite released_rule "
    "strength from_label preset settings",
    "Model.score": "self image label",
    "Model.classify": "self image candidates encodings",
    "Model.reconstruct": "self image",
    "Model.encode": "self image",
    "Model.decode": "self tokens",
    "Image.save": "self path",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return varcli.load(small.save(tmp_path_factory.mktemp("model") / "small.safetensors"), device="cpu", dtype="fp32")


@pytest.mark.parametrize("name", API)
def test_the_parameters_are_these(name):
    """Whoever adds, drops or renames one changes this on purpose."""
    found = varcli
    for part in name.split("."):
        found = getattr(found, part)
    assert list(inspect.signature(found).parameters) == API[name].split()
    assert found.__doc__


def test_the_names_are_these():
    assert sorted(varcli.__all__) == dir(varcli)
    assert {name.split(".")[0] for name in API} | {"__version__"} == set(varcli.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'paint'"):
        varcli.paint  # noqa: B018


def test_importing_it_imports_nothing_heavy():
    script = "import sys, varcli; print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_samples_are_those_of_the_command(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--seed", "3", "-n", "2", "--cfg", "2", "--device", "cpu", "--dtype", "fp32", "-q"]
    assert cli.run(["sample", "-c", "207,goldfish", "-m", str(model.path), "-o", "images", *options]) == 0
    images = model.sample([207, "goldfish"], count=2, seed=3, cfg=2.0)
    assert [(image.label, image.seed) for image in images] == [(207, 3), (207, 4), (1, 3), (1, 4)]
    for image in images:
        (path,) = (tmp_path / "images").glob(f"{image.label}-*-{image.seed}.png")
        with Image.open(path) as opened:
            assert np.array_equal(np.asarray(opened), image.array)
        assert read_provenance(path).identity() == image.provenance.identity()
        assert np.array_equal(np.asarray(image.pil), image.array)


def test_a_stream_is_lazy_and_the_same(model):
    def requests():
        yield 207, 0
        yield None, 1
        raise AssertionError("read too far ahead")

    stream = model.stream(requests())
    assert np.array_equal(next(stream).array, model.sample(207)[0].array)
    assert next(stream).label is None


def test_an_image_grows_into_the_sampled_one(model):
    *coarse, last = model.grow("goldfish", seed=5, cfg=2.0)
    (whole,) = model.sample("goldfish", seed=5, cfg=2.0)
    assert len(coarse) == len(small.SIDES) - 1
    assert np.array_equal(last.array, whole.array) and last.provenance == whole.provenance
    assert not np.array_equal(coarse[-1].array, last.array)


def test_what_is_saved_holds_its_provenance(model, tmp_path):
    image = model.sample("goldfish", seed=5)[0]
    assert read_provenance(image.save(tmp_path / "fish.png")) == image.provenance
    with pytest.raises(UsageError, match=r"saved as \.png"):
        image.save(tmp_path / "fish.jpg")


def test_edits_keep_what_they_should(model, tmp_path):
    photo = np.random.RandomState(0).randint(0, 256, (40, 60, 3)).astype(np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[10:20, 10:20] = True
    for edited in (model.inpaint(photo, mask, feather=0), model.edit(photo, 207, mask, feather=0)):
        assert np.array_equal(edited.array[~mask], photo[~mask])
        assert not np.array_equal(edited.array[mask], photo[mask])
    boxed = model.inpaint(Image.fromarray(photo), box=(10, 10, 20, 20), feather=0)
    assert np.array_equal(boxed.array, model.inpaint(photo, mask, feather=0).array)
    assert model.outpaint(boxed, pad=(4, 0, 2, 0)).array.shape == (40, 66, 3)
    assert model.inpaint(photo[:, :, 0], mask).array.shape == (40, 60, 1)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    assert np.array_equal(model.inpaint(str(tmp_path / "photo.png"), mask, feather=0).array, boxed.array)
    with pytest.raises(
        InputError, match=r"must be uint8, \(H, W\) or \(H, W, channels\) \(got float64 \(40, 60, 3\)\)"
    ):
        model.inpaint(photo / 255, mask)


def test_tokens_there_and_back(model):
    image = model.sample(207)[0]
    tokens = model.encode(image)
    assert [tuple(idx_Bl.shape) for idx_Bl in tokens] == [(1, side**2) for side in small.SIDES]
    assert np.array_equal(model.decode(tokens)[0].array, model.reconstruct(image).array)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda model: model.sample("zebra"), InputError),
        (lambda model: model.sample(207, top_p=2.0), ConfigError),
        (lambda model: model.sample(207, top_q=0.9), TypeError),
        (lambda model: model.sample(207, preset="nice"), ConfigError),
        (lambda model: model.sample(207, count=0), ConfigError),
        (lambda model: model.sample(207, seed=-1), ConfigError),
        (lambda model: list(model.stream([(207, -1)])), ConfigError),
        (lambda model: list(model.grow(207, seed=-1)), ConfigError),
        (lambda model: model.inpaint(np.zeros((8, 8, 3), np.uint8), box=(0, 0, 4, 4), seed=-1), ConfigError),
        (lambda model: model.inpaint(np.zeros((8, 8, 3), np.uint8), box=(0, 0, 4, 4), best_of=0), UsageError),
        (lambda model: model.decode(model.encode(np.zeros((8, 8, 3), np.uint8))[0]), InputError),
        (lambda model: model.decode([]), InputError),
        (lambda model: model.inpaint(np.zeros((8, 8, 3), np.uint8)), UsageError),
        (lambda model: varcli.load("nothing"), CheckpointError),
    ],
)
def test_mistakes_are_exceptions(model, call, error):
    with pytest.raises(error) as caught:
        call(model)
    assert error is not TypeError or "no sampling setting top_q; there is top_p" in str(caught.value)


def test_an_image_shows_itself_without_its_pixels(model):
    assert repr(model.sample("goldfish", seed=3)) == "[<varcli.Image: goldfish, seed 3, 16 × 16>]"
