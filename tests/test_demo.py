"""`var demo`: files in and out of its page, the server, and the page in a real browser."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import varcli
from support import small
from varcli import cli
from varcli.commands import demo as demo_command
from varcli.demo import files
from varcli.errors import InputError, RunError
from varcli.images.provenance import read_provenance

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return varcli.load(small.save(tmp_path_factory.mktemp("model") / "small.safetensors"), device="cpu", dtype="fp32")


def save_photo(path, size=(40, 24)):
    """Write a photograph that its camera held upside down."""
    width, height = size
    levels = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(levels).save(path, exif=exif)
    return path


def layer(size, left, top, right, bottom):
    """What the brush leaves on a canvas."""
    width, height = size
    painted_hw4 = np.zeros((height, width, 4), np.uint8)
    painted_hw4[top:bottom, left:right] = (255, 90, 0, 128)
    return painted_hw4


def assert_reproduces(path, folder, capsys, monkeypatch):
    """Hold the pixels of a downloaded image to those of the command that `var show` prints for it."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert cli.run(["show", str(path)]) == 0
    *facts, command = capsys.readouterr().out.splitlines()
    assert not any("there is no such file" in fact or "has changed" in fact for fact in facts)
    words = shlex.split(command.removeprefix("command"))
    assert cli.run([*words[1:], "--out", "again.png", "--quiet"]) == 0
    with Image.open(path) as first, Image.open("again.png") as second:
        assert np.array_equal(np.asarray(first), np.asarray(second))
    Path("again.png").unlink()


# --- files -----------------------------------------------------------------------------------------


def test_downloads_are_reproduced_by_the_command_they_name(model, tmp_path, capsys, monkeypatch):
    """In a folder with the photograph and the mask, wherever the server kept them."""
    kept, mine = tmp_path / "kept", tmp_path / "mine"
    kept.mkdir()
    mine.mkdir()
    photo = files.read_photo(str(save_photo(kept / "photo.jpg")))
    mask = files.painted_mask([layer(files.canvas(photo).size, 200, 100, 500, 300)], photo)
    shutil.copy(kept / "photo.jpg", mine)
    shutil.copy(files.save_mask(mask, kept), mine)
    for image in (
        model.sample(207, seed=3, cfg=2.0)[0],
        model.inpaint(photo, mask, label="none", seed=1),
        model.edit(photo, "207", mask, top_k=3),
        model.outpaint(photo, pad="25%,0%,25%,0%", label="1"),
    ):
        path = files.save_image(image, kept)
        assert read_provenance(path) == image.provenance
        assert str(kept) not in image.provenance.to_json()
        assert_reproduces(path, mine, capsys, monkeypatch)


def test_a_mask_is_what_was_painted_in_the_size_of_the_photograph(tmp_path):
    photo = files.read_photo(str(save_photo(tmp_path / "my photo.jpg")))
    width, height = files.canvas(photo).size
    assert max(width, height) == files.CANVAS and abs(width / height - 40 / 24) < 0.01
    mask = files.painted_mask(
        [layer((width, height), 0, 0, width // 2, height), layer((width, height), 0, 0, 9, 9)], photo
    )
    assert mask.name == "my photo-mask.png" and mask.levels.shape == (24, 40, 1)
    assert (mask.levels[:, :20] == 255).all() and (mask.levels[:, 20:] == 0).all()
    assert files.read_photo(str(save_photo(tmp_path / "--out.jpg"))).name == "out.jpg"
    for nothing in ([], [layer((width, height), 0, 0, 0, 0)]):
        with pytest.raises(InputError, match="nothing is painted"):
            files.painted_mask(nothing, photo)


def test_a_photograph_is_painted_on_upright(tmp_path):
    upright = np.asarray(Image.open(save_photo(tmp_path / "photo.png")))[::-1, ::-1]
    shown = files.canvas(files.read_photo(str(tmp_path / "photo.png"))).resize((40, 24), Image.Resampling.BOX)
    assert np.abs(np.asarray(shown, int) - upright).mean() < 20 < np.abs(np.asarray(shown, int) - upright[::-1]).mean()


def test_uploads_that_cannot_be_used(tmp_path):
    Image.new("1", (5000, 4000)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("not an image")
    for upload, told in (
        (None, "there is no photograph: upload one first"),
        (tmp_path / "gone.png", "gone.png is no longer stored: upload it again"),
        (tmp_path / "large.png", "large.png has 5000 × 4000 pixels: give an image of at most 16,000,000 pixels"),
        (tmp_path / "text.png", "cannot read image text.png: not an image"),
    ):
        with pytest.raises(InputError, match=told):
            files.read_photo(upload and str(upload))


def test_frames_of_one_image_differ_and_have_no_provenance(model, tmp_path):
    paths = [files.save_frame(image, tmp_path) for image in model.grow(207)]
    assert len(set(paths)) == len(small.SIDES)
    with pytest.raises(InputError, match="has no provenance"):
        read_provenance(paths[-1])


# --- the command -----------------------------------------------------------------------------------


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo_command, "find_spec", lambda name: None)
    assert cli.run(["demo"]) == 2
    assert capsys.readouterr().err == "var: error: var demo needs another package: pip install 'varcli[demo]'\n"


# --- the server ------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def demo(model, port, folder):
    """Start the command in another process, whose temporary files are in `folder`."""
    pytest.importorskip("gradio")
    words = [sys.executable, "-m", "varcli", "demo", "--no-browser", "-m", str(model.path), "--port", port]
    environment = os.environ | {"TMPDIR": str(folder)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """Of a page that is served until the tests of this file end."""
    folder, port = tmp_path_factory.mktemp("temporary"), free_port()
    with demo(model, port, folder) as process:
        address = process.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}/", process.communicate()
        assert list(folder.glob(".varcli-*"))
        yield address
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (cli.INTERRUPTED, "", "var: interrupted\n")
        assert not list(folder.glob(".varcli-*")), "uploads are gone"


def get(url, body=None, **headers):
    """Return status, headers and content of an answer."""
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_no_box_names_a_file():
    """Anyone who can reach the page fills them in."""
    pytest.importorskip("gradio")
    from varcli.demo.page import FIELDS

    assert {"cfg", "vpg"} < {field.name for field in FIELDS}
    assert not {"refiner", "refine_from"} & {field.name for field in FIELDS}


@pytest.mark.slow
def test_no_file_of_the_machine_is_served(address, model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("secret")
    for path in ("/etc/passwd", model.path, tmp_path / "here.txt", "here.txt", Path(files.__file__)):
        status, _, content = get(f"{address}gradio_api/file={path}")
        assert status in (403, 404) and b"secret" not in content


@pytest.mark.slow
def test_a_large_upload_is_refused(address):
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    for size, expected in ((1000, 200), (files.LARGEST_FILE + 1, 413)):
        body = head + bytes(size) + b"\r\n--x--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        assert get(f"{address}gradio_api/upload", body, **kind)[0] == expected


@pytest.mark.slow
def test_the_browser_is_told_to_ask_no_other_machine(address):
    _, headers, content = get(address)
    assert headers["Content-Security-Policy"].startswith("default-src 'self' ")
    assert b"fonts.googleapis.com/css" not in content
    assert get(address, Host="a-name-that-leads-here.example")[0] == 400


@pytest.mark.slow
def test_a_port_in_use_is_one_error(address, model, tmp_path):
    port = address.rstrip("/").rpartition(":")[2]
    with demo(model, port, tmp_path) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (RunError.exit_code, "")
    assert (
        err.startswith(f"var: error: cannot listen at --host 127.0.0.1 --port {port}: give ") and err.count("\n") == 1
    )


# --- the page --------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("has no Chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def download(page, button, folder):
    with page.expect_download() as started:
        page.get_by_role("button", name=button, exact=True).locator("visible=true").click()
    path = folder / started.value.suggested_filename
    started.value.save_as(path)
    return path


def wait_for_command(page, start):
    page.wait_for_function(
        "start => [...document.querySelectorAll('textarea')].some(box => box.value.startsWith(start))", arg=start
    )


def paint(page):
    """Paint a short line in the middle of the canvas, as soon as it takes one."""
    canvas, undo = page.locator("canvas").first, page.get_by_role("button", name="Undo")
    canvas.scroll_into_view_if_needed()
    for _ in range(30):
        box = canvas.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 20, y)
        page.mouse.down()
        page.mouse.move(x + 20, y, steps=5)
        page.mouse.up()
        page.wait_for_timeout(1000)
        if undo.is_enabled():
            return
    raise AssertionError("nothing could be painted")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_in_a_browser(address, browser, width, tmp_path, capsys, monkeypatch):
    """A class is sampled and a hole painted and filled; what is downloaded is what `var show` says it is."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(120_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)

    search = page.get_by_label("Class").locator("visible=true")
    search.click()
    search.fill("retriever")
    page.get_by_role("option", name="207 golden retriever").click()
    page.get_by_role("button", name="Sample", exact=True).click()
    wait_for_command(page, "var sample --class 207 --seed 0 ")
    assert page.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth"), "nothing is cut off"
    path = download(page, "Download", tmp_path)
    assert path.name == "207-golden_retriever-0.png"
    assert_reproduces(path, tmp_path, capsys, monkeypatch)

    page.get_by_role("tab", name="Edit").click()
    with page.expect_response(lambda answer: answer.url.endswith("/image.png")):
        page.set_input_files("input[type=file]", save_photo(tmp_path / "photo.jpg", size=(200, 160)))
    page.wait_for_timeout(5000)  # until it is drawn, which removes what was painted before
    paint(page)
    page.get_by_role("button", name="Edit", exact=True).click()
    wait_for_command(page, "var inpaint photo.jpg photo-mask.png --class none ")
    path, mask = download(page, "Download", tmp_path), download(page, "Download the mask", tmp_path)
    assert (path.name, mask.name) == ("photo-inpaint-0.png", "photo-mask.png")
    with Image.open(mask) as painted:
        assert painted.size == (200, 160) and 0 < np.asarray(painted).mean() < 64
    assert_reproduces(path, tmp_path, capsys, monkeypatch)
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
