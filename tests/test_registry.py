"""What `checkpoints.toml` says is whole, and names lead to files."""

import re
import subprocess
import sys

import pytest

from varcli.checkpoints import registry as registering
from varcli.checkpoints.registry import (
    count_in_words,
    local_checkpoint,
    markdown_table,
    presets,
    registry,
    resolve_checkpoint,
)
from varcli.config import PRESETS, SampleConfig
from varcli.errors import CheckpointError


def test_names_and_published_figures():
    names = list(registry())
    assert names[:6] == ["tiny64", "var-d16", "var-d20", "var-d24", "var-d30", "var-d36"]
    figures = {name: (entry.fid, entry.inception_score) for name, entry in registry().items() if entry.inception_score}
    assert figures == {
        "var-d16": (3.30, 274.4),
        "var-d20": (2.57, 302.6),
        "var-d24": (2.09, 312.9),
        "var-d30": (1.92, 323.1),
        "var-d36": (2.63, 303.2),
    }
    assert [registry()[name].pixels for name in names[:6]] == [64, 256, 256, 256, 256, 512]
    tuned = {name: (entry.fid, entry.presets["metrics"].describe()) for name, entry in registry().items()}
    assert {name: tuned[name] for name in names[6:]} == {
        "neon-d16": (2.01, "cfg 2.9, top-k 900, top-p 0.95"),
        "neon-d36": (1.70, "cfg 4, top-k 900, top-p 0.95"),
        "cca-d16": (4.03, "cfg 0, top-k 900, top-p 0.96"),
        "cca-d20": (3.02, "cfg 0, top-k 900, top-p 0.96"),
        "cca-d24": (2.63, "cfg 0, top-k 900, top-p 0.96"),
        "cca-d30": (2.54, "cfg 0, top-k 900, top-p 0.96"),
        "ddo-d16": (2.54, "cfg 1, top-k 0, top-p 0"),
        "ddo-d30": (1.73, "cfg 1.4, top-k 0, top-p 0"),
        "code-6": (2.27, "cfg 1.5, top-k 900, top-p 0.96, refiner code-6-refiner, refine-from 7"),
        "code-6-refiner": (None, "cfg 1.5, top-k 900, top-p 0.96"),
        "code-7": (2.11, "cfg 1.5, top-k 900, top-p 0.96, refiner code-7-refiner, refine-from 8"),
        "code-7-refiner": (None, "cfg 1.5, top-k 900, top-p 0.96"),
        "code-8": (1.98, "cfg 1.5, top-k 900, top-p 0.96, refiner code-8-refiner, refine-from 9"),
        "code-8-refiner": (None, "cfg 1.5, top-k 900, top-p 0.96"),
        "code-9": (1.94, "cfg 1.5, top-k 900, top-p 0.96, refiner code-9-refiner, refine-from 10"),
        "code-9-refiner": (None, "cfg 1.5, top-k 900, top-p 0.96"),
    }
    bands = {name: entry.fid_band for name, entry in registry().items() if entry.fid_band}
    assert bands == {"var-d16": (3.3, 3.6), "var-d20": (2.6, 2.95), "var-d24": (2.1, 2.35), "var-d30": (1.92, 2.0)}
    shares = {name: (entry.precision, entry.recall) for name, entry in registry().items() if entry.precision}
    assert shares == {
        "var-d16": (0.84, 0.51),
        "var-d20": (0.83, 0.56),
        "var-d24": (0.82, 0.59),
        "var-d30": (0.82, 0.59),
    }


def test_every_entry_is_whole():
    for entry in registry().values():
        assert set(entry.presets) == set(PRESETS)
        assert entry.licence == ("CC BY-NC-SA 4.0" if entry.name.startswith("ddo") else "MIT")
        assert entry.commercial == (entry.licence == "MIT")
        assert bool(entry.bundled) != bool(entry.files)
        assert all(file.repository == "FoundationVision/var" for file in entry.files[:1])  # all share its tokenizer
        for file in entry.files:
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert [file.bytes for file in registry()["var-d16"].files] == [436_075_834, None]
    assert registry()["var-d16"].source == "https://huggingface.co/FoundationVision/var"
    assert registry()["neon-d36"].source == "https://huggingface.co/sinaalemohammad/Neon"


def test_bundled_file_is_as_registered():
    from varcli.checkpoints.safetensors_io import checkpoint_sha256
    from varcli.checkpoints.store import describe, load_model

    entry = registry()["tiny64"]
    if not entry.path.exists():
        pytest.skip("a checkout in which it was not trained yet")
    facts = describe(entry.path)
    assert facts["transformer"]["values"] == entry.parameters
    assert facts["classes"] == entry.classes
    assert facts["bytes"] <= 32_000_000
    assert checkpoint_sha256(entry.path) == entry.file_sha256
    assert load_model(entry.path).tokenizer.config.pixels == entry.pixels


def test_presets_of_names_and_files():
    assert presets("var-d16")["metrics"] == SampleConfig(cfg=1.5, top_k=900, top_p=0.96)
    assert presets("some/file.safetensors") == PRESETS


def test_names_and_files_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(registering, "cache_folder", lambda: tmp_path)
    file = tmp_path / "var-d16.safetensors"
    with pytest.raises(CheckpointError, match="is not on this machine yet: var checkpoints download var-d16"):
        local_checkpoint("var-d16")
    assert registry()["var-d16"].bytes is None
    file.write_bytes(b"converted")
    assert resolve_checkpoint("var-d16") == local_checkpoint("var-d16") == resolve_checkpoint(str(file)) == file
    assert registry()["var-d16"].bytes == 9


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("var-d17", "neither a file nor one of the names var-d1"),
        ("none.safetensors", "the checkpoint none.safetensors does not exist: give a file"),
        ("runs/none", "the checkpoint runs/none does not exist: give a file"),
        ("xyz", "neither a file nor one of the names tiny64, var-d16, var-d20, var-d24, var-d30, var-d36"),
        (".", "the checkpoint \\. is a folder; give the file of a model"),
    ],
)
def test_neither_name_nor_file(given, line):
    with pytest.raises(CheckpointError, match=line):
        resolve_checkpoint(given)


def test_pth_file_is_to_be_converted(tmp_path):
    (tmp_path / "var_d16.pth").touch()
    with pytest.raises(CheckpointError, match="must be converted first: var checkpoints convert"):
        resolve_checkpoint(str(tmp_path / "var_d16.pth"))


def test_bundled_file_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(registering, "__file__", str(tmp_path / "registry.py"))
    with pytest.raises(CheckpointError, match="tiny64 is missing from this installation"):
        resolve_checkpoint("tiny64")


def test_markdown_table():
    lines = markdown_table().splitlines()
    assert len(lines) == 2 + len(registry())
    assert lines[3] == (
        "| `var-d16` | 256 × 256 | 1000 | 310 M | 3.30 | 274.4 | MIT "
        "| [FoundationVision/var](https://huggingface.co/FoundationVision/var) |"
    )


def test_count_in_words():
    counts = [None, 6_123_456, 60_000_000, 310_283_520, 2_010_020_356]
    assert [count_in_words(count) for count in counts] == ["–", "6.12 M", "60.0 M", "310 M", "2.01 B"]


def test_registry_needs_no_torch():
    script = "import sys, varcli.checkpoints.registry as r; r.markdown_table(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
