"""Where images go: what `--out` may name, file names, streams, and what `--resume` knows again."""

import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.provenances import MADE, image, listing, made
from varcli.errors import InputError, RunError, UsageError
from varcli.images.provenance import image_filename, png_bytes, read_provenance
from varcli.outputs.open import check_file, open_sink

posix = pytest.mark.skipif(os.name == "nt", reason="no such devices")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sent(capsysbinary):
    """What has gone to standard output since last asked."""
    return lambda: capsysbinary.readouterr().out


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "207-golden_retriever-0.png"),
        ({"seed": 12}, "207-golden_retriever-12.png"),
        ({"class_id": None, "class_name": "none"}, "none-0.png"),
        ({"class_name": 'a/b\\c:d*e?f"g<h>i|j\0k\nl'}, "207-a_b_c_d_e_f_g_h_i_j_k_l-0.png"),
        ({"class_name": "../../etc/passwd"}, "207-etc_passwd-0.png"),
        ({"class_name": "yellow lady's slipper"}, "207-yellow_lady_s_slipper-0.png"),
        ({"class_name": "Käfer 猫"}, "207-Käfer_猫-0.png"),
        ({"class_name": "cafe\u0301"}, "207-caf\u00e9-0.png"),
        ({"class_name": "..."}, "207-0.png"),
        ({"class_name": "bad \udcff byte"}, "207-bad_byte-0.png"),
        ({"class_id": 3, "class_name": "CON"}, "3-CON-0.png"),
    ],
)
def test_file_name_is_fit_for_every_system(changes, name):
    assert image_filename(made(**changes)) == name


@pytest.mark.parametrize("letter", ["x", "猫", "é"])
def test_file_name_is_never_too_long(letter):
    name = image_filename(made(2**63, class_name=letter * 500))
    assert len(name.encode()) < 200
    Path(name).write_bytes(b"")


# --- what --out may name ---------------------------------------------------------------------------


def put(out, seeds=(0, 1), several=True, resume=False):
    """Put images somewhere as the sampler does; return the paths of those that were not there."""
    with open_sink(out, several=several, resume=resume) as output:
        paths = [output.add(image(seed), made(seed)) for seed in seeds if not output.has(made(seed))]
    return paths, output.archive


def test_nothing_means_the_current_folder(here):
    assert put(None) == ([Path("207-golden_retriever-0.png"), Path("207-golden_retriever-1.png")], None)
    assert listing(here) == ["207-golden_retriever-0.png", "207-golden_retriever-1.png"]


@pytest.mark.parametrize("out", ["new", "new/deep", "new.v2", "new/", "x.png/", "there.png"])
def test_folder_is_made_if_need_be(here, out):
    (here / "there.png").mkdir()
    paths, _ = put(out)
    assert paths == [Path(out) / f"207-golden_retriever-{seed}.png" for seed in (0, 1)]
    assert listing(here / out) == [path.name for path in paths]
    assert read_provenance(paths[1]) == made(1)
    with Image.open(paths[1]) as opened:
        assert np.array_equal(np.asarray(opened), image(1))


@pytest.mark.parametrize("out", ["x.png", "X.PNG"])
def test_one_image_has_the_name_it_was_given(here, out):
    assert put(out, seeds=[3], several=False) == ([Path(out)], None)
    assert listing(here) == [out]
    assert read_provenance(Path(out)) == made(3)


@pytest.mark.parametrize(
    ("out", "several", "kind", "words"),
    [
        ("x.png", True, UsageError, "use a folder, .npz, .tar"),
        ("x.jpg", False, UsageError, "--out must be a folder, a name ending in"),
        ("x.tar.gz", True, UsageError, "x.tar.gz"),
        ("file", True, UsageError, "(got file)"),
        ("absent/x.png", False, RunError, "there is no folder absent"),
        ("absent/x.npz", True, RunError, "there is no folder absent"),
        ("absent/x.tar", True, RunError, "there is no folder absent"),
        ("file/sub", True, RunError, "file/sub"),
        ("y" * 300, True, RunError, "too long"),
        ("y" * 300 + ".npz", True, RunError, "too long"),
    ],
)
@posix
def test_impossible_output_is_refused_before_any_image(here, out, several, kind, words):
    (here / "file").write_bytes(b"precious")
    with pytest.raises(kind) as caught:
        open_sink(out, several=several)
    assert words in str(caught.value)
    assert listing(here) == ["file"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("out", ["shut", "shut/new", "shut/x.png", "shut/x.npz", "shut/x.tar"])
def test_folder_without_permission_is_refused_before_any_image(here, out):
    (here / "shut").mkdir(mode=0o500)
    with pytest.raises(RunError, match="Permission denied"):
        open_sink(out, several=False)


def test_file_of_an_option_is_checked_early(here):
    check_file("grid", here / "x.PNG", (".png",))
    with pytest.raises(UsageError, match=r"^--grid must be a name ending in \.png \(got x\.jpg\)$"):
        check_file("grid", Path("x.jpg"), (".png",))
    with pytest.raises(UsageError, match=r"a name ending in \.png or \.gif"):
        check_file("scales", Path("x"), (".png", ".gif"))
    with pytest.raises(RunError, match="absent"):
        check_file("grid", Path("absent/x.png"), (".png",))
    assert listing(here) == []


# --- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "several"), [("folder", True), ("x.png", False)])
def test_resume_skips_what_is_there(here, out, several):
    assert len(put(out, [0], several)[0]) == 1
    assert put(out, [0], several, resume=True)[0] == []
    assert len(put(out, [0], several)[0]) == 1  # without resume it is made again


def test_resume_makes_what_is_missing(here):
    put("folder", [0, 2])
    assert put("folder", [0, 1, 2, 3], resume=True)[0] == [
        Path("folder/207-golden_retriever-1.png"),
        Path("folder/207-golden_retriever-3.png"),
    ]


@pytest.mark.parametrize(
    "content",
    [b"", b"text", png_bytes(image()), png_bytes(image(), made(0, cfg=4.0)), png_bytes(image(), MADE)[:-30]],
    ids=["empty", "text", "foreign", "other settings", "cut off"],
)
@pytest.mark.parametrize("resume", [True, False])
def test_another_file_of_the_same_name_is_neither_the_image_nor_lost(here, content, resume):
    (here / "207-golden_retriever-0.png").write_bytes(content)
    [path], _ = put(None, [0], resume=resume)
    assert path.name.startswith("207-golden_retriever-0-") and read_provenance(path) == MADE
    assert (here / "207-golden_retriever-0.png").read_bytes() == content
    assert put(None, [0], resume=True)[0] == []
    assert put(None, [0])[0] == [path]  # the same image has the same name, also once the other one is free
    (here / "207-golden_retriever-0.png").unlink()
    assert put(None, [0])[0] == [path]
    assert listing(here) == [path.name]


def test_a_name_that_was_typed_is_written_to(here):
    (here / "x.png").write_bytes(b"mine")
    assert put("x.png", [0], several=False)[0] == [Path("x.png")]
    assert read_provenance(Path("x.png")) == MADE


def test_resume_knows_an_image_whose_checkpoint_moved(here):
    put("folder", [0])
    with open_sink("folder", several=True, resume=True) as output:
        assert output.has(made(checkpoint="/elsewhere/tiny64.safetensors", device="cuda", version="9"))
        assert not output.has(made(checkpoint_sha256="00"))


# --- streams ---------------------------------------------------------------------------------------


def test_one_image_is_the_bytes_of_its_png(sent):
    assert put("-", [0], several=False) == ([None], None)
    assert sent() == png_bytes(image(), MADE)


def test_several_images_are_a_tar_stream(sent):
    put("-", [0, 1])
    with tarfile.open(fileobj=io.BytesIO(sent()), mode="r|") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    assert found == {f"207-golden_retriever-{seed}.png": png_bytes(image(seed), made(seed)) for seed in (0, 1)}


def test_tar_stream_of_names_in_any_script(sent):
    with open_sink("-", several=True) as output:
        output.add(image(), made(class_name="猫" * 60))
    with tarfile.open(fileobj=io.BytesIO(sent())) as tar:
        assert tar.getnames() == [image_filename(made(class_name="猫" * 60))]


def test_each_image_leaves_as_soon_as_it_is_made(sent):
    with open_sink("-", several=True) as output:
        output.add(image(), MADE)
        with tarfile.open(fileobj=io.BytesIO(sent())) as tar:
            assert tar.extractfile("207-golden_retriever-0.png").read() == png_bytes(image(), MADE)


def test_failed_run_leaves_a_tar_stream_unfinished(sent):
    with pytest.raises(KeyboardInterrupt), open_sink("-", several=True) as output:
        output.add(image(), MADE)
        raise KeyboardInterrupt
    assert not sent().endswith(bytes(1024))


def test_terminal_gets_no_bytes(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(UsageError, match="is a terminal"):
        open_sink("-", several=False)


def test_closed_pipe_passes_as_such(monkeypatch):
    class Closed(io.BytesIO):
        def write(self, _):
            raise BrokenPipeError

    class Output:
        buffer = Closed()
        isatty = staticmethod(lambda: False)

    monkeypatch.setattr(sys, "stdout", Output)
    with pytest.raises(BrokenPipeError), open_sink("-", several=True) as output:
        output.add(image(), MADE)


@posix
def test_device_takes_images_and_stays_a_device():
    put(os.devnull)
    put(os.devnull, [0], several=False)
    assert Path(os.devnull).is_char_device()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("several", [True, False])
def test_full_device_is_one_line(several):
    with pytest.raises(RunError, match=r"^/dev/full cannot be written: No space left on device$"):
        put("/dev/full", [0], several)


@pytest.mark.parametrize("resume", [True, False])
def test_foreign_archive(here, resume):
    for name in ("x.npz", "x.tar"):
        (here / name).write_bytes(b"foreign")
        if resume:
            with pytest.raises(InputError, match="not written by var sample"):
                open_sink(name, several=True, resume=True)
        else:
            put(name)
            assert (here / name).stat().st_size > 300
