"""Results of `var eval` with made-up numbers, and the folder of a training run that never was."""

import base64
import json

import numpy as np

from varcli.evaluation.results import ClassSpread, Origin, Published, ReferenceOrigin, Result
from varcli.images.provenance import png_bytes

SETTINGS = {
    "cfg": 1.5,
    "top_k": 900,
    "top_p": 0.96,
    "smooth": False,
    "approximate": "",
    "device": "cpu",
    "dtype": "fp32",
    "seed": 7,
}
IMAGE = png_bytes(np.zeros((4, 4, 3), np.uint8))


def evaluation(name="var-d16", **changes):
    """Return the facts of a result as JSON would bring them back."""
    fid = changes.pop("fid", 3.45)
    settings = SETTINGS | changes.pop("settings", {})
    given = {
        "version": "0.1.0",
        "date": "2026-11-23T12:00:00Z",
        "what": "samples",
        "checkpoint": {"name": name, "sha256": "5e" * 32} | settings,
        "source": None,
        "n": 50_000,
        "classes": 3,
        "reference": ReferenceOrigin(name="imagenet-256", sha256="ab" * 32, n=10_000, pixels=256),
        "extractor": Origin(name="inception-v3-compat", sha256="cd" * 32),
        "protocol": {"is_splits": 10, "is_shuffle_seed": 2020, "resize": None},
        "metrics": {
            "fid": fid,
            "fid_infinity": fid - 0.25,
            "inception_score": 271.5,
            "inception_score_std": 3.5,
            "kid": 0.00125,
            "kid_std": 0.00025,
            "precision": 0.815,
            "recall": 0.495,
        },
        "published": Published(fid=3.3, inception_score=274.4, band=(3.3, 3.6), inside=3.3 <= fid <= 3.6),
        "per_class": [ClassSpread(id=i, name=f"class {i}", n=5, spread=10 - i / 8) for i in range(3)],
        "warnings": [],
        "seconds": {"total": 100.0, "sampling": 90.0, "features": 8.0},
        "images": [base64.b64encode(IMAGE).decode()] * 2,
    }
    return json.loads(json.dumps(Result(**(given | changes)).facts()))


def tokenizer(**changes):
    """Return the facts of a reconstruction."""
    metrics = {"rfid": 21.5, "psnr": 19.25, "ssim": 0.625, "lpips": 0.25, "codebook_usage": [0.125, 0.5, 1.0]}
    return evaluation("tiny64", what="tokenizer", metrics=metrics, published=None, per_class=None, images=(), **changes)


def write_run(folder, lines=60, stage="transformer", **settings):
    """Write what a training run leaves; return its folder."""
    from safetensors.numpy import save_file

    (folder / "samples").mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(1, lines + 1):
            figures = {"step": 50 * i, "images_seen": 800 * i, "loss": 5 + 4 / i, "images_per_second": 30.0}
            if stage == "transformer":
                figures |= {"accuracy": 0.05, "loss_last": 6 + 4 / i, "gradient_norm": 1.0}
                figures |= {} if i % 20 else {"validation_loss": 5.1, "validation_accuracy": 0.055}
            else:
                figures |= {} if i % 20 else {"validation_psnr": 19.0, **dict.fromkeys(USAGE, 0.5)}
            file.write(json.dumps(figures) + "\n")
    identity = {"depth": 2, "seed": 0, "sides": [1, 2, 4]} | settings
    save_file({"x": np.zeros(1, np.float32)}, folder / "state.safetensors", {"identity": json.dumps(identity)})
    (folder / "samples" / "0003000.png").write_bytes(IMAGE)
    return folder


USAGE = [f"validation_codebook_usage_{k}" for k in (1, 2, 3)]
