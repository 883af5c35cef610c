"""`var score` and `var classify`: how likely images are, and which class explains them best."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from varcli.commands import options
from varcli.commands.tokens import Images
from varcli.console import counted, note, progress, result, table
from varcli.errors import UsageError

if TYPE_CHECKING:
    from varcli.classes import ClassEntry
    from varcli.pipelines import likelihood


def score(
    *,
    images: Images,
    class_name: Annotated[
        str,
        Option(
            "--class",
            "-c",
            metavar="CLASS",
            help="Class that the images are scored under: index (207), name ('golden retriever') or none.",
        ),
    ],
    heatmap: Annotated[
        Path | None,
        Option("--heatmap", metavar="FILE", help="Also write each image beside a map of nats per token, .png."),
    ] = None,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Print the negative log-likelihood of images given a class: nats, bits per token and bits per pixel.

    The centre square of an image is encoded at the model's size. Lower is likelier.
    """
    if heatmap:
        from varcli.files import check_not_read
        from varcli.outputs.open import check_file

        check_file("heatmap", heatmap, (".png",))
        check_not_read("heatmap", heatmap, images)
    from varcli.pipelines.edit import stem
    from varcli.pipelines.likelihood import save_heatmaps
    from varcli.pipelines.likelihood import score as score_image
    from varcli.pipelines.model import load
    from varcli.pipelines.tokens import ReadableImages

    sources = ReadableImages(images, note)
    model = load(checkpoint, device=device, dtype=dtype, progress=not quiet)
    scores, names = [], []
    with progress("images", len(images), quiet) as advance:
        for number, source in sources:
            scores.append(score_image(model, source, class_name))
            names.append(images[number])
            advance()
    if heatmap and scores:
        save_heatmaps(heatmap, scores, [stem(name) for name in names])
    if as_json:
        for name, found in zip(names, scores, strict=True):
            scales = [{"side": side, "nats": nats} for side, nats in zip(found.sides, found.scale_nats, strict=True)]
            facts = {
                "image": name,
                "class": _facts(found.entry),
                "nats": found.nats,
                "bits_per_token": found.bits_per_token,
                "bits_per_pixel": found.bits_per_pixel,
                "scales": scales,
            }
            result(json.dumps(facts, sort_keys=True))
    elif scores:
        rows = [
            (
                name,
                str(found.entry or "none"),
                f"{found.nats:.1f}",
                f"{found.bits_per_token:.3f}",
                f"{found.bits_per_pixel:.4f}",
                " ".join(f"{nats / side**2:.2f}" for side, nats in zip(found.sides, found.scale_nats, strict=True)),
            )
            for name, found in zip(names, scores, strict=True)
        ]
        table(("image", "class", "nats", "bits/token", "bits/pixel", "nats/token of each scale"), rows)
    options.tell_also(heatmap if scores else None, quiet=quiet)
    sources.check()


def classify(
    *,
    paths: Annotated[
        list[str] | None,
        Argument(metavar="IMG", help="Images, folders, zips, .npz or .tar; - alone is an image on standard input."),
    ] = None,
    reference: Annotated[
        str | None,
        Option("--reference", "-r", metavar="NAME", help="Classify the images of this reference set, such as tiny64."),
    ] = None,
    num_images: Annotated[
        int | None,
        Option(
            "--num-images",
            "-n",
            metavar="N",
            min=1,
            help="Classify only N images, spread evenly over all.",
            show_default="all",
        ),
    ] = None,
    top: Annotated[
        int,
        Option(
            "--top", metavar="N", min=0, help="Print the N most likely classes per image; 0 prints the accuracy only."
        ),
    ] = 5,
    candidates: Annotated[
        str,
        Option(
            "--candidates",
            metavar="N,…",
            help="Classes that are kept after the first scales with a tenth of the tokens, with three tenths, and so "
            "on; 0 keeps all.",
        ),
    ] = "10,3",
    encodings: Annotated[
        int,
        Option(
            "--encodings",
            metavar="N",
            min=1,
            help="Average over N encodings of the image, all but the first with noise on the features.",
        ),
    ] = 1,
    skip_bad: options.SkipBad = False,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Print the classes under which an image has the highest likelihood.

    If the labels of the images are known, from folders, file names or provenance, the accuracy is printed too.
    """
    if bool(paths) == (reference is not None):
        raise UsageError("exactly one of image paths and --reference must say what to classify")
    if "-" in (paths or []) and (paths != ["-"] or num_images is not None):
        raise UsageError("- is one image on standard input: neither others nor --num-images can be given beside it")
    kept = () if candidates.strip() == "0" else options.parse_numbers("--candidates", candidates)
    from varcli.pipelines.likelihood import Classified, accuracy, classify_set, open_set
    from varcli.pipelines.likelihood import classify as classify_image
    from varcli.pipelines.model import load

    model = load(checkpoint, device=device, dtype=dtype, progress=not quiet)
    if paths == ["-"]:
        count, classified = 1, iter([Classified("-", None, classify_image(model, "-", kept, encodings))])
    else:
        images = open_set(model, paths or [], reference, num_images, skip_bad=skip_bad, progress=not quiet)
        for name in images.skipped:
            note(f"skipped: {name}")
        count, classified = len(images), classify_set(model, images, kept, encodings, skip_bad=skip_bad, note=note)
    found, rows = [], []
    with progress("images", count, quiet) as advance:
        for image in classified:
            found.append(image)
            if as_json:
                result(json.dumps(_ranking(image, top), sort_keys=True))
            else:
                rows += [
                    (
                        image.name,
                        str(image.label or "-"),
                        str(i + 1),
                        str(each.entry),
                        f"{each.nats:.1f}" if each.scales == image.classes[0].scales else "-",
                        str(each.scales),
                    )
                    for i, each in enumerate(image.classes[:top])
                ]
            advance()
    if rows:
        table(("image", "label", "rank", "class", "nats", "scales"), rows)
    labelled, shares = accuracy(found)
    if labelled:
        if as_json:
            result(json.dumps({"images": labelled, "top_1": shares[1], "top_5": shares[5]}, sort_keys=True))
        else:
            shown = ", ".join(f"top-{count} {share:.1%}" for count, share in shares.items() if count <= (top or 5))
            result(f"{counted(labelled, 'image')} with a label: {shown}")


def _ranking(image: "likelihood.Classified", top: int) -> dict[str, Any]:
    classes = [
        {"id": each.entry.id, "name": each.entry.name, "nats": each.nats, "scales": each.scales}
        for each in image.classes[:top]
    ]
    return {"image": image.name, "label": _facts(image.label), "classes": classes}


def _facts(entry: "ClassEntry | None") -> dict[str, Any] | None:
    return {"id": entry.id, "name": entry.name} if entry else None
