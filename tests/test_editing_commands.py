"""`var inpaint`, `outpaint` and `edit`: any image, any mask, and what is kept is kept to the last bit."""

import io
import json
import shlex
import subprocess
from pathlib import Path

import numpy as np
import png
import pytest
from PIL import Image

import varcli
from support import small
from support.fork_server import python
from varcli import cli
from varcli.checkpoints.store import save_model
from varcli.classes import ClassEntry, ClassTable
from varcli.images.blending import feather_mask
from varcli.images.masks import box_mask
from varcli.images.provenance import EditProvenance, read_provenance
from varcli.images.tiling import LARGEST

NOISE = np.random.RandomState(0).randint(0, 256, (40, 60, 4)).astype(np.uint8)
BOX = (20, 10, 30, 22)
MASK = box_mask(BOX, (60, 40))
OUT_MUST_BE = "--out must be a folder, a name ending in .png, or - for standard output"
OTHER_ENDINGS = (
    "npz",
    "tar",
    "jpg",
    "avif",
    "heic",
    "jxl",
    "jp2",
    "tga",
    "ppm",
    "psd",
    "pdf",
    "svg",
    "exr",
    "bak",
    "JPG",
)
HALF_TOKEN = 3
"""Of the small model: 24 pixels a square on a last grid of 4."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture
def var(model, monkeypatch, tmp_path, capsys):
    """Run `var` with the small model in a folder with an image and a mask; return what it printed."""
    monkeypatch.setenv("VAR_CHECKPOINT", str(model))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(NOISE[:, :, :3]).save("in.png", dpi=(150, 150))
    Image.fromarray(MASK).save("mask.png")

    def run(*arguments):
        code = cli.run([*map(str, arguments), "--device", "cpu"])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert all(line.startswith("var: also written: ") for line in err.splitlines()), err
        return out

    return run


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def kept(share=HALF_TOKEN, mask=MASK):
    return feather_mask(mask, share) == 0


def test_inpaint_keeps_what_is_not_near_the_hole(var, tmp_path):
    assert var("inpaint", "in.png", "mask.png", "-o", "out.png") == "out.png\n"
    out = pixels("out.png")
    assert out.shape == (40, 60, 3)
    assert np.array_equal(out[kept()], NOISE[:, :, :3][kept()])
    assert (out[MASK] != NOISE[:, :, :3][MASK]).any(axis=1).mean() > 0.9
    with Image.open("out.png") as image:
        assert round(image.info["dpi"][0]) == 150
    var("inpaint", "in.png", "--box", ",".join(map(str, BOX)), "-o", "box.png")
    var("inpaint", "in.png", "--box", "33.4%,25%,50%,55%", "-o", "percent.png")
    assert np.array_equal(pixels("box.png"), out) and np.array_equal(pixels("percent.png"), out)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_every_kind_of_png_keeps_its_kind(var, mode):
    deep = NOISE[:, :, 0].astype(np.uint16) * 256 + NOISE[:, :, 1]
    array = {"L": NOISE[:, :, 0], "LA": NOISE[:, :, 2:], "RGB": NOISE[:, :, :3], "RGBA": NOISE, "I;16": deep}[mode]
    Image.fromarray(array).save("kind.png")
    var("inpaint", "kind.png", "mask.png", "-o", "out.png")
    with Image.open("out.png") as out:
        assert out.mode == mode
        assert np.array_equal(np.asarray(out)[kept()], array[kept()])
        if "A" in mode:
            alpha = np.asarray(out.getchannel("A"))
            assert np.array_equal(alpha[~MASK], array[:, :, -1][~MASK]) and alpha[MASK].min() > 0
        assert (np.asarray(out)[MASK] != array[MASK]).any()


def deep_pixels(path):
    """Return what a PNG of 16 bits has, read by other hands."""
    width, height, rows, info = png.Reader(bytes=Path(path).read_bytes()).read()
    assert info["bitdepth"] == 16
    return np.array([list(row) for row in rows]).reshape(height, width, info["planes"])


def write_deep(path, values):
    height, width, channels = values.shape
    writer = png.Writer(width, height, greyscale=channels < 3, alpha=channels % 2 == 0, bitdepth=16)
    with Path(path).open("wb") as file:
        writer.write(file, values.reshape(height, -1).tolist())


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_are_kept_whole(var, channels):
    deep = np.random.RandomState(1).randint(0, 65536, (40, 60, channels))
    if channels != 3:
        deep[:, :, -1] |= 0xFF00  # opaque enough for white not to hide what is new
    write_deep("deep.png", deep)
    var("inpaint", "deep.png", "mask.png", "-o", "out.png", "--grid", "grid.png", "--growth", "grows.png")
    out = deep_pixels("out.png")
    assert out.shape == deep.shape
    assert np.array_equal(out[kept()], deep[kept()])
    assert (out[MASK] != deep[MASK]).any(axis=1).mean() > 0.9
    fading = out[~MASK & ~kept()][:, : 3 if channels > 2 else 1]
    assert (fading % 257 != 0).any(axis=1).mean() > 0.9, "composited in 16 bits"
    if channels != 3:
        assert np.array_equal(out[:, :, -1][~MASK], deep[:, :, -1][~MASK])
    assert read_provenance("out.png").seed == 0
    var("outpaint", "deep.png", "--pad", "4,0,8,2", "-o", "wide.png")
    inside = feather_mask(~box_mask((4, 0, 64, 40), (72, 42)), 5)[:40, 4:64] == 0
    assert np.array_equal(deep_pixels("wide.png")[:40, 4:64][inside], deep[inside])


def test_16_bits_are_filled_as_8_are(var):
    write_deep("deep.png", NOISE[:, :, :3].astype(int) * 257)
    for name in ("in.png", "deep.png"):
        var("inpaint", name, "mask.png", "-o", f"out-{name}")
    assert np.abs(deep_pixels("out-deep.png") / 257 - pixels("out-in.png")).max() < 1.01


def random_image(noise, mode, width, height):
    """Noise of a mode of Pillow's, or of 16 bits a channel."""
    channels = {"L": 1, "P": 1, "I;16": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    values = noise.randint(0, 256, (height, width, channels)).astype(np.uint8)
    if mode == "P":
        image = Image.fromarray(values[:, :, 0], "L").convert("P")
        image.putpalette(noise.bytes(768))
        return image
    if mode == "I;16":
        return Image.fromarray(noise.randint(0, 65536, (height, width)).astype(np.uint16))
    return Image.fromarray(values[:, :, 0] if channels == 1 else values)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_is_kept_in_every_kind_and_size(model, mode, seed):
    """The feather reaches as far as the help says: what was asked for, or half a token of a square."""
    noise = np.random.RandomState(seed)
    width, height = noise.randint(1, [60, 300, 9, 300][seed]), noise.randint(1, [60, 9, 300, 300][seed])
    image, mask = random_image(noise, mode, width, height), np.zeros((height, width), bool)
    for _ in range(noise.randint(1, 6)):
        top, left = noise.randint(height), noise.randint(width)
        mask[top : top + noise.randint(1, 20), left : left + noise.randint(1, 20)] = True
    mask[0, 0] = False
    mask[-1, -1] = not mask.any() or mask[-1, -1]
    loaded = varcli.load(model, device="cpu")
    before = np.asarray(image.convert("RGB") if mode == "P" else image).reshape(height, width, -1)
    for feather in (None, 0, 3):
        after = loaded.inpaint(image, mask, feather=feather, seed=seed).array
        assert after.shape == before.shape and after.dtype == before.dtype
        most = LARGEST * 16 // small.SIDES[-1] // 2 if feather is None else feather
        far = feather_mask(mask, most) == 0
        assert np.array_equal(after[far], before[far])


def test_feather_and_compositing(var):
    var("inpaint", "in.png", "mask.png", "--feather", 0, "-o", "hard.png")
    assert np.array_equal(pixels("hard.png")[~MASK], NOISE[:, :, :3][~MASK])
    var("inpaint", "in.png", "mask.png", "--no-composite", "-o", "all.png")
    changed = (pixels("all.png") != NOISE[:, :, :3]).any(axis=2)
    assert changed.sum() > 0.98 * 24**2


def test_alpha_of_the_image_or_of_a_mask(var):
    layer = NOISE.copy()
    layer[:, :, 3] = np.where(MASK, 0, 255)
    Image.fromarray(layer).save("holes.png")
    var("inpaint", "holes.png", "--alpha", "-o", "own.png")
    assert (pixels("own.png")[:, :, 3] == 255).all()
    assert np.array_equal(pixels("own.png")[kept()], layer[kept()])
    var("inpaint", "in.png", "holes.png", "--alpha", "-o", "other.png")
    assert np.array_equal(pixels("other.png"), pixels("own.png")[:, :, :3])


def test_masks_may_be_fitted(var):
    Image.fromarray(MASK).resize((30, 20)).save("half.png")
    var("inpaint", "in.png", "half.png", "--fit-mask", "-o", "out.png")
    out = pixels("out.png")
    assert np.array_equal(out[kept(6)], NOISE[:, :, :3][kept(6)])


@pytest.mark.parametrize(
    ("size", "place", "shape"),
    [
        (("--pad", "4,0,8,2"), (0, 4), (42, 72)),
        (("--pad", "10%,0,0,40%"), (0, 6), (56, 66)),
        (("--to", "160x40"), (0, 50), (40, 160)),
        (("--to", "70x50"), (5, 5), (50, 70)),
    ],
)
def test_outpaint_goes_on_beyond_the_edges(var, size, place, shape):
    Image.fromarray(NOISE).save("in.png")
    var("outpaint", "in.png", *size, "-o", "out.png")
    out = pixels("out.png")
    assert out.shape == (*shape, 4)
    top, left = place
    new = ~box_mask((left, top, left + 60, top + 40), shape[::-1])
    inner = feather_mask(new, 6)[top : top + 40, left : left + 60] == 0
    assert inner.any()
    assert np.array_equal(out[top : top + 40, left : left + 60][inner], NOISE[inner])
    assert (out[new][:, 3] > 0).all() and out[new].std() > 5


def test_edit_puts_a_class_in(var):
    for name in ("pizza", "daisy"):
        var("edit", "in.png", "--mask", "mask.png", "--class", name, "-o", f"{name}.png")
        assert np.array_equal(pixels(f"{name}.png")[kept()], NOISE[:, :, :3][kept()])
    assert (pixels("pizza.png") != pixels("daisy.png")).any()
    made = read_provenance("daisy.png")
    assert (made.class_id, made.class_name) == (985, "daisy")


def test_results_say_how_they_were_made(var, capsys):
    var(
        "edit",
        "in.png",
        "--box",
        "20,10,30,22",
        "-c",
        "pizza",
        "--seed",
        4,
        "--feather",
        2,
        "--smooth",
        "-o",
        "out.png",
    )
    made = read_provenance("out.png")
    assert isinstance(made, EditProvenance) and len(made.inputs) == 1
    assert cli.run(["show", "out.png"]) == 0
    again = capsys.readouterr().out.splitlines()[-1].split("command")[1].strip()
    first = pixels("out.png")
    assert cli.run([*shlex.split(again)[1:], "-o", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), first)


def test_the_best_chosen_early_is_edited_to_the_end(var):
    asked = ("inpaint", "in.png", "mask.png", "--seed", 4)
    [line] = var(*asked, "--best-of", 3, "--decide-at", 2, "-o", "best.png", "--json").splitlines()
    facts = json.loads(line)
    assert [one["seed"] for one in facts["candidates"]] == [4, 5, 6]
    var("inpaint", "in.png", "mask.png", "--seed", facts["seed"], "-o", "alone.png")
    assert np.array_equal(pixels("best.png"), pixels("alone.png"))
    finished = json.loads(var(*asked, "--best-of", 3, "-o", "late.png", "--json"))["candidates"]
    assert facts["log_likelihood"] in [one["log_likelihood"] for one in finished]
    early = [one["log_likelihood"] for one in facts["candidates"]]
    assert len(set(early)) == 3 and not set(early) & {one["log_likelihood"] for one in finished}


def test_many_and_the_best(var):
    paths = var("inpaint", "in.png", "mask.png", "-n", 3, "-o", "many", "--grid", "grid.png").split()
    assert [path.replace("\\", "/") for path in paths] == [f"many/in-inpaint-{i}.png" for i in range(3)]
    assert len({pixels(path).tobytes() for path in paths}) == 3
    assert pixels("grid.png").shape[1] > 192
    [line] = var("inpaint", "in.png", "mask.png", "--best-of", 3, "-o", "best.png", "--json").splitlines()
    said = json.loads(line)
    assert said["path"] == "best.png" and said["seed"] in (0, 1, 2)
    assert [one["seed"] for one in said["candidates"]] == [0, 1, 2]
    chosen = said["candidates"][said["seed"]]
    assert (said["seam"], said["log_likelihood"]) == (chosen["seam"], chosen["log_likelihood"])
    assert all(one["seam"] > 0 > one["log_likelihood"] for one in said["candidates"])
    assert np.array_equal(pixels("best.png"), pixels(paths[said["seed"]]))
    assert read_provenance("best.png").seed == said["seed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("photo.jpg", "photo.png"),
        ("a/x.png", "b/x.png"),
        ("猫.png", "犬.png"),
        ("a b.png", "a_b.png"),
        ("é.png", "🦊.png"),
    ],
    ids=" ".join,
)
def test_results_of_different_images_have_different_names(var, names):
    paths = []
    for number, name in enumerate(names):
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(NOISE[:, :, number]).save(name)
        paths.append(var("inpaint", name, "--box", "20,10,30,22").strip())
        first = Path(paths[-1]).read_bytes()
        assert var("inpaint", name, "--box", "20,10,30,22").strip() == paths[-1], "the same image has the same name"
        assert Path(paths[-1]).read_bytes() == first
    assert len(set(paths)) == 2 and all(len(read_provenance(path).inputs) == 1 for path in paths)


def test_a_file_of_someone_else_is_not_replaced(var):
    Path("in-inpaint-0.png").write_bytes(b"mine")
    assert var("inpaint", "in.png", "mask.png").strip() != "in-inpaint-0.png"
    assert Path("in-inpaint-0.png").read_bytes() == b"mine"


def test_what_was_painted_can_be_seen(var):
    """Also where an erased part is given by a mask or a box, whatever the alpha around it."""
    for around in (255, 128):
        layer = NOISE.copy()
        layer[:, :, 3] = np.where(MASK, 0, around)
        Image.fromarray(layer).save("hole.png")
        for number, (command, *rest) in enumerate(
            (("inpaint", "mask.png"), ("edit", "--box", "20,10,30,22", "-c", "pizza"), ("inpaint", "--alpha"))
        ):
            var(command, "hole.png", *rest, "-o", f"{number}.png")
            assert (pixels(f"{number}.png")[:, :, 3] == around).all()
    var("outpaint", "hole.png", "--pad", "9,0,0,0", "-o", "wide.png")
    assert set(pixels("wide.png")[:, :9, 3].ravel()) == {128}


@pytest.mark.slow
def test_notes(var, model, capsys):
    """What is left out of a file and what may be a mistake is said, and not with --quiet."""
    Image.fromarray(NOISE[:, :, 0]).save("grey.png")
    Image.fromarray(NOISE[:, :, :3]).save("profile.tif", icc_profile=bytes(2 << 20))
    for arguments, said in (
        (["inpaint", "in.png", "grey.png"], "grey.png does not look like a mask: its brightness marks "),
        (["inpaint", "profile.tif", "mask.png"], "the colour profile of 2.0 MB of profile.tif is left out"),
        (["edit", "in.png", "--mask", "mask.png", "-c", "piz"], "--class piz is taken to be 963 (pizza, "),
    ):
        assert cli.run([*arguments, "-o", "out.png", "--device", "cpu"]) == 0
        assert f"var: {said}" in capsys.readouterr().err
        var(*arguments, "-o", "out.png", "-q")


def test_the_image_as_it_grows(var):
    var("inpaint", "in.png", "mask.png", "--growth", "grows.gif", "-o", "out.png", "-q")
    with Image.open("grows.gif") as growing:
        assert growing.n_frames == len(small.SIDES)
    var("outpaint", "in.png", "--to", "100x40", "--growth", "grows.png", "-o", "wide.png")
    assert pixels("grows.png").shape[1] > 200


def test_paper_mode_is_the_originals(tmp_path, monkeypatch, original):
    monkeypatch.chdir(tmp_path)
    table = ClassTable(tuple(ClassEntry(i, f"c{i}", f"c{i}") for i in range(original.transformer.config.class_count)))
    save_model("m.safetensors", original.tokenizer, original.transformer, table, {})
    Image.fromarray(original.outputs["image_u8"][0].permute(1, 2, 0).numpy()).save("in.png")
    for i, edit in enumerate(original.edits):
        keep = original.outputs[f"edit.{i}.keep_mask"].numpy()
        Image.fromarray(np.kron(keep, np.ones((16, 16))) == 0).save("mask.png")
        name = "none" if edit["label"] == len(table) else edit["label"]
        settings = ["--class", name, "--cfg", edit["cfg"], "--top-k", 1, "--top-p", 0, "--dtype", "fp32", "-q"]
        command = [
            "inpaint",
            "in.png",
            "mask.png",
            "--released-rule",
            "-m",
            "m.safetensors",
            *settings,
            "-o",
            "out.png",
        ]
        assert cli.run([*map(str, command), "--device", "cpu"]) == 0
        expected = original.outputs[f"edit.{i}.image"][0].permute(1, 2, 0).numpy()
        assert np.abs(pixels("out.png") / 255 - expected).max() < 0.51 / 255


@pytest.mark.slow
def test_a_pipeline(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VAR_CHECKPOINT", str(model))
    Image.fromarray(box_mask((4, 4, 12, 12), (24, 16))).save(tmp_path / "mask.png")
    content = b""
    for command in ("sample -c 207 -o -", "outpaint - --pad 4,0,4,0 -o -", "inpaint - mask.png -o -"):
        words = [python(), "-m", "varcli", *command.split(), "--device", "cpu", "--dtype", "fp32"]
        done = subprocess.run(words, input=content, capture_output=True, check=True, cwd=tmp_path)
        content = done.stdout
        assert done.stderr == b""
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (24, 16)


@pytest.mark.parametrize(
    "mistake",
    [
        (["inpaint", "in.png"], 2, "one of a mask file, --alpha and --box must say where to fill (got "),
        (
            ["inpaint", "in.png", "mask.png", "--box", "0,0,5,5"],
            2,
            "one of a mask file, --alpha and --box must say where to fill (got ",
        ),
        (["inpaint", "in.png", "--box", "0,0,60,40"], 2, "--box 0,0,60,40 is the whole image"),
        (["inpaint", "in.png", "--box", "0,0,5"], 2, "--box must be left,top,right,bottom"),
        (["inpaint", "-", "-"], 2, "standard input holds the image or the mask, not both"),
        (["inpaint", "in.png", "small.png"], 3, "the mask must be of the image's size, 60 × 40 (small.png is 30 × 20)"),
        (["inpaint", "in.png", "black.png"], 3, "the mask black.png marks nothing"),
        (["inpaint", "in.png", "white.png"], 3, "the mask white.png marks the whole image"),
        (
            ["inpaint", "in.png", "mask.png", "--alpha"],
            3,
            "an alpha channel; mask.png has none",
        ),
        (["inpaint", "in.png", "--box", "0,0,5,5", "--fit-mask"], 2, "--fit-mask needs a mask file"),
        (["inpaint", "none.png", "mask.png"], 3, "the image none.png cannot be read: No such file"),
        (["inpaint", "in.png", "none.png"], 3, "the image none.png cannot be read: No such file"),
        (["inpaint", "cut.png", "mask.png"], 3, "the image cut.png cannot be read: "),
        (["inpaint", "notes.txt", "mask.png"], 3, "notes.txt is not an image"),
        (["inpaint", "moving.gif", "mask.png"], 3, "the image moving.gif has 2 frames"),
        (
            ["inpaint", "in.png", "mask.png", "-c", "zebra"],
            3,
            "does not know 340 zebra; the nearest of",
        ),
        (
            ["inpaint", "in.png", "mask.png", "-c", "1,207"],
            2,
            "exactly one class here, or none (got 1,207)",
        ),
        (["inpaint", "in.png", "mask.png", "-c", "-"], 2, "(got -)"),
        *(
            (["inpaint", "in.png", "mask.png", "-o", f"x.{ending}"], 2, f"{OUT_MUST_BE} (got x.{ending})")
            for ending in OTHER_ENDINGS
        ),
        (["inpaint", "in.png", "mask.png", "--grid", "in.png"], 2, "--grid in.png is what is read, and would be"),
        (["inpaint", "in.png", "mask.png", "--out", "./in.png"], 2, "--out in.png is what is read, and would be"),
        (["edit", "in.png", "--mask", "mask.png", "-c", "1", "-o", "mask.png"], 2, "--out mask.png is what is read"),
        (["inpaint", "in.png", "mask.png", "-o", "x.png", "--grid", "x.png"], 2, "--out x.png and --grid x.png must"),
        (["outpaint", "in.png", "--to", "90x90", "--growth", "./in.png"], 2, "--growth in.png is what is read"),
        (["inpaint", "in.png", "colours.png"], 3, "the mask colours.png has colours: a mask must be black, and white"),
        (["inpaint", "", "mask.png"], 3, "the name of an image is empty"),
        (["inpaint", "in.png", ""], 3, "the name of an image is empty"),
        (
            ["inpaint", "in.png", "mask.png", "-o", "x.png", "-n", "2"],
            2,
            "but there are several images; use a folder or - for a tar stream",
        ),
        (["inpaint", "in.png", "mask.png", "-o", "-", "--json"], 2, "--json cannot be used with --out -"),
        (["inpaint", "in.png", "mask.png", "-o", "no/x.png"], 5, "no/x.png cannot be written"),
        (
            ["inpaint", "in.png", "mask.png", "--released-rule", "--feather", "3"],
            2,
            "--released-rule cannot be used with --feather",
        ),
        (
            ["inpaint", "in.png", "mask.png", "--no-composite", "--feather", "3"],
            2,
            "--feather cannot be used",
        ),
        (
            ["inpaint", "in.png", "mask.png", "-n", "2", "--growth", "x.gif"],
            2,
            "--growth shows exactly one image",
        ),
        (["inpaint", "in.png", "mask.png", "--grid", "x.jpg"], 2, "--grid must be a name ending in .png (got x.jpg)"),
        (["inpaint", "in.png", "mask.png", "--top-p", "3"], 2, "--top-p must be between 0 (off) and 1 (got 3)"),
        (["inpaint", "in.png", "mask.png", "-m", "nothing"], 4, "there is no checkpoint nothing"),
        (["outpaint", "in.png"], 2, "exactly one of --pad and --to"),
        (["outpaint", "in.png", "--pad", "1,1,1,1", "--to", "90x90"], 2, "exactly one of --pad and --to"),
        (["outpaint", "in.png", "--pad", "0,0,0,0"], 2, "--pad must be 0 or more on each side"),
        (["outpaint", "in.png", "--to", "50x90"], 2, "--to must be larger than the image's 60x40 (got 50x90)"),
        (["edit", "in.png", "--mask", "mask.png"], 2, "--class is required, as in --class 207"),
        (
            ["edit", "in.png", "-c", "1"],
            2,
            "one of --mask, --alpha and --box must say where to fill (got none); --strength edits",
        ),
        (
            ["edit", "in.png", "-c", "1", "--strength", "1.5"],
            2,
            "--strength must be between 0 (the reconstruction) and 1",
        ),
        (
            ["edit", "in.png", "-c", "1", "--strength", "1", "--mask", "mask.png", "--best-of", "2"],
            2,
            "--strength edits the whole image and cannot be used with --mask, --best-of",
        ),
        (["edit", "in.png", "-c", "1", "--strength", "1", "--decide-at", "2"], 2, "cannot be used with --decide-at"),
        (["edit", "in.png", "-c", "1", "--strength", "1", "--from-class", "random"], 2, "(got random)"),
        (["edit", "in.png", "-c", "1", "--strength", "1", "--smooth"], 2, "--smooth mixes codebook vectors"),
        (["edit", "in.png", "-c", "1", "--box", "0,0,5,5", "--from-class", "1"], 2, "--from-class needs --strength"),
        (["edit", "in.png", "-c", "1", "--strength", "1", "--from-class", "2"], 3, "does not know 2"),
    ],
    ids=lambda mistake: " ".join(mistake[0]),
)
def test_mistakes(model, tmp_path, monkeypatch, capsys, mistake):
    """The one table: arguments, exit code, message; nothing is written."""
    monkeypatch.setenv("VAR_CHECKPOINT", str(model))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(NOISE[:, :, :3]).save("in.png")
    Image.fromarray(MASK).save("mask.png")
    Image.new("L", (30, 20), 255).save("small.png")
    Image.fromarray(NOISE[:, :, :3]).save("colours.png")
    Image.new("L", (60, 40)).save("black.png")
    Image.new("L", (60, 40), 255).save("white.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "in.png").read_bytes()[:300])
    (tmp_path / "notes.txt").write_text("a shopping list")
    Image.new("L", (60, 40)).save("moving.gif", save_all=True, append_images=[Image.new("L", (60, 40), 255)])
    before = sorted(tmp_path.iterdir())
    arguments, code, message = mistake
    assert cli.run(arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("var: error: ") and err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_whole_image_goes_from_its_reconstruction_to_a_sample(var, model):
    door, exact = varcli.load(model, device="cpu", dtype="fp32"), ("--dtype", "fp32")
    var("edit", "in.png", "-c", 207, "--strength", 0, *exact, "-o", "same.png")
    assert np.array_equal(pixels("same.png"), door.reconstruct("in.png").array)
    var("edit", "in.png", "-c", 207, "--strength", 1, "--seed", 4, *exact, "-o", "new.png")
    assert np.array_equal(pixels("new.png"), door.sample(207, seed=4)[0].array)
    asked = ("edit", "in.png", "-c", 207, "--strength", 2 / 3, "--from-class", 963, "-n", 2, *exact)
    printed = var(*asked, "-o", "whole", "--grid", "grid.png", "--json").splitlines()
    first, second = (pixels(json.loads(line)["path"]) for line in printed)
    assert first.shape == (16, 16, 3) and not np.array_equal(first, second)
    assert np.array_equal(first, door.edit("in.png", 207, strength=2 / 3, from_label=963).array)
    provenance = read_provenance(Path(json.loads(printed[1])["path"]))
    assert str(2 / 3) in provenance.command
    words = [*provenance.command, "-o", "again.png", "--growth", "growing.png", "-q"]
    assert cli.run(words) == 0
    assert np.array_equal(pixels("again.png"), second)
    assert Path("grid.png").exists() and Path("growing.png").exists()
