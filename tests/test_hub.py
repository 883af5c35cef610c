"""Downloads against a hub on this machine: resumed, checked, converted, and explained when they fail."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from support import loopback_hub as fake_hub
from varcli import downloads
from varcli.checkpoints import hub as downloading
from varcli.checkpoints import registry
from varcli.checkpoints.hub import download
from varcli.checkpoints.random_init import randomized
from varcli.checkpoints.registry import Entry, SourceFile, resolve_checkpoint
from varcli.checkpoints.store import load_model
from varcli.config import GRID_256, PRESETS, TokenizerConfig, TransformerConfig
from varcli.errors import CheckpointError, RunError

REPOSITORY = "FoundationVision/var"


def pth(module):
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files():
    """A tokenizer and a transformer of the released grid, otherwise as small as can be."""
    sizes = {"sides": GRID_256, "codebook_size": 8, "codebook_width": 4}
    tokenizer = TokenizerConfig(base_width=32, multipliers=(1,), encoder_blocks=1, kernel_count=1, **sizes)
    transformer = TransformerConfig(depth=1, width=64, class_count=3, **sizes)
    return dict(zip(("vae.pth", "var.pth"), map(pth, randomized(tokenizer, transformer)), strict=True))


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    """A hub with the two files, on which this process's hub library is set; caches are empty."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with fake_hub.running() as server:
        server.files = dict(files)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(registry, "cache_folder", lambda: tmp_path / "varcli")
        monkeypatch.setattr(downloading, "cache_folder", lambda: tmp_path / "varcli")
        yield server


def entry(**hashes):
    sources = [
        SourceFile(name=name, repository=REPOSITORY, sha256=hashes.get(name[:3])) for name in ("vae.pth", "var.pth")
    ]
    return Entry(name="small", pixels=16, classes=3, licence="MIT", presets=PRESETS, files=tuple(sources))


def test_download_converts_and_records_hashes(server, files, tmp_path):
    path = download(entry())
    model = load_model(path)
    assert path == tmp_path / "varcli" / "small.safetensors"
    assert model.transformer.config.sides == GRID_256
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert model.run == {"source": f"https://huggingface.co/{REPOSITORY}", "sha256": hashes}
    known = hashes | {"small.safetensors": model.sha256}
    assert json.loads((tmp_path / "varcli" / "sha256.json").read_text()) == known
    assert server.log == [("vae.pth", None), ("var.pth", None)]


def test_files_in_folders_and_licences_that_forbid_trade(server, files, tmp_path, capsys):
    server.files = {"vae.pth": files["vae.pth"], "tuned/var.pth": files["var.pth"]}
    sources = tuple(SourceFile(name=name, repository=REPOSITORY) for name in server.files)
    tuned = replace(entry(), files=sources, licence="CC BY-NC-SA 4.0")
    assert load_model(download(tuned)).classes.entries
    assert "small is for non-commercial use only: its licence is CC BY-NC-SA 4.0" in capsys.readouterr().err


def test_a_bug_in_conversion_is_no_failed_download(server, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(downloading, "convert", broken)
    with pytest.raises(ZeroDivisionError):
        download(entry())


def test_nothing_is_downloaded_twice(server):
    path = download(entry())
    server.log.clear()
    download(entry())
    path.unlink()
    download(entry())
    assert path.exists()
    assert server.log == []


def test_first_use_of_a_name_downloads(server, monkeypatch):
    monkeypatch.setattr(registry, "registry", lambda: {"small": entry()})
    path = resolve_checkpoint("small")
    server.files.clear()
    assert resolve_checkpoint("small") == path


def test_another_tools_cache_is_used(server, tmp_path):
    import huggingface_hub

    for name in ("vae.pth", "var.pth"):
        huggingface_hub.hf_hub_download(REPOSITORY, name)
    server.log.clear()
    download(entry())
    assert server.log == []


def test_broken_connection_is_resumed(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.break_after = 1000
    download(entry())
    assert server.log == [("vae.pth", None), ("vae.pth", "bytes=1000-"), ("var.pth", None)]


def test_killed_download_is_resumed_by_the_next_process(server, files, tmp_path):
    blobs = tmp_path / "hub" / "models--FoundationVision--var" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{server.etag('var.pth')}.incomplete").write_bytes(files["var.pth"][:5000])
    download(entry())
    assert server.log == [("vae.pth", None), ("var.pth", "bytes=5000-")]
    assert not list(blobs.glob("*.incomplete"))


@pytest.mark.parametrize("left", [b"rubbish", b"rubbish" * 1_000_000])
def test_a_damaged_half_file_is_not_believed(server, files, tmp_path, left):
    blobs = tmp_path / "hub" / "models--FoundationVision--var" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{server.etag('vae.pth')}.incomplete").write_bytes(left)
    if len(left) < len(files["vae.pth"]):
        with pytest.raises(CheckpointError, match=r"vae\.pth has sha256"):
            download(entry())
    assert load_model(download(entry())).path.exists()


def test_hub_has_another_file_than_the_registry_knows(server):
    with pytest.raises(CheckpointError, match=r"the hub has another file var\.pth"):
        download(entry(var="0" * 64))
    assert server.log == [("vae.pth", None)]
    assert not entry().path.exists()


def test_bytes_are_not_what_the_hub_reports(server, files):
    server.etags["vae.pth"] = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(CheckpointError, match=r"vae\.pth has sha256"):
        download(entry())
    server.etags["vae.pth"] = "5" * 40  # no sha256: a file outside of large file storage
    known = hashlib.sha256(files["vae.pth"]).hexdigest()
    assert download(entry(vae=known)).exists()


@pytest.mark.parametrize("etag", ["../../../x", "/tmp/x", "x", "a" * 31, "a" * 65, "A" * 40, "a" * 40 + "/../x"])
def test_a_server_does_not_choose_where_files_go(server, tmp_path, etag):
    server.etags["vae.pth"] = etag
    with pytest.raises(CheckpointError, match="is not on a hub: its ETag is no hash"):
        download(entry())
    assert server.log == []
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["download.lock"]


def test_a_hash_is_recorded_only_with_its_file(server, files, tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(RunError, match="cannot store small"):
            download(entry())
    assert not (tmp_path / "varcli" / "sha256.json").exists()


def test_a_busy_hub_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.refusals = [429, 503]
    assert download(entry()).exists()


def test_file_changed_since_its_first_download(server, tmp_path, monkeypatch):
    download(entry()).unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    server.files["var.pth"] += b" "
    with pytest.raises(CheckpointError, match=r"the hub has another file var\.pth"):
        download(entry())


def test_changed_file_in_the_cache(server, tmp_path):
    download(entry()).unlink()
    blob = tmp_path / "hub" / "models--FoundationVision--var" / "blobs" / server.etag("vae.pth")
    blob.write_bytes(b"changed")
    with pytest.raises(CheckpointError, match=r"vae\.pth has sha256 .* to download it again"):
        download(entry())


def test_file_is_gone_from_the_hub(server):
    del server.files["var.pth"]
    with pytest.raises(CheckpointError, match="cannot download small from http://127") as caught:
        download(entry())
    assert "404" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_full_disk(server, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "_receive", full)
    with pytest.raises(RunError, match="cannot store small: No space left on device"):
        download(entry())


def run_var(arguments, folder, **environment):
    """Run `var` in a process of its own, as a user would, with empty caches."""
    environment = (
        os.environ
        | {"XDG_CACHE_HOME": str(folder), "HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1"}
        | environment
    )
    command = [sys.executable, "-m", "varcli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_offline_says_what_to_do(tmp_path):
    done = run_var(["checkpoints", "download", "var-d16"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 4
    line = done.stderr.strip()
    assert line.startswith("var: error: cannot download var-d16 from http://127.0.0.1:9")
    assert "var checkpoints convert vae_ch160v4096z32.pth var_d16.pth --out FILE" in line
    assert "\n" not in line
    assert done.stdout == ""


@pytest.mark.slow
def test_endpoint_of_the_environment_and_a_wrong_hash(server, files, tmp_path):
    server.files["vae_ch160v4096z32.pth"] = files["vae.pth"]
    done = run_var(["checkpoints", "download", "var-d16"], tmp_path, HF_ENDPOINT=server.url)
    assert done.returncode == 4
    assert "the hub has another file vae_ch160v4096z32.pth" in done.stderr
    assert done.stderr.count("\n") == 1
