"""`var eval`: FID, inception score, KID, precision and recall that can be compared with the paper's."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Exit

from varcli.commands import eval_options, options
from varcli.commands.eval_ask import Ask, check
from varcli.console import note, result, table
from varcli.distributed import launch, launched, process_group

if TYPE_CHECKING:
    from varcli.evaluation.results import Result


@options.expand
def evaluate(
    *,
    paths: eval_options.Images = None,
    fid: eval_options.Fid = False,
    inception_score: eval_options.InceptionScore = False,
    kid: eval_options.Kid = False,
    prc: eval_options.Prc = False,
    num: eval_options.Num = None,
    reference: eval_options.Reference = None,
    tokenizer: eval_options.Tokenizer = False,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    seed: options.Seed = 0,
    settings: options.Settings,
    preset: options.Preset = "metrics",
    best_of: options.BestOf = 1,
    classifier: options.Classifier = options.DEFAULT_CLASSIFIER,
    resize: eval_options.Resize = None,
    skip_bad: eval_options.SkipBad = False,
    inception: eval_options.InceptionFile = None,
    lpips_weights: eval_options.LpipsWeights = None,
    save_stats: eval_options.SaveStats = None,
    save_images: eval_options.SaveImages = None,
    out: eval_options.ResultFile = None,
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    nproc: options.Processes = 1,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure images: those that a checkpoint makes, 50 of each class as in the paper, or those at PATH.

    Without --fid, --is, --kid or --prc: FID and inception score. Killed, the same command goes on where it was (but for
    --tokenizer).
    """
    given = dict(locals())
    ask = Ask.of(given)
    check(ask)
    if nproc > 1 and not launched():
        raise Exit(launch(nproc))
    from varcli.commands.evaluating import evaluated

    with process_group() as group:
        found, forget = evaluated(ask, group)
        if found:
            _tell(found, out, as_json=as_json, quiet=quiet)
        forget()


def _tell(found: "Result", out: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Write the result where it is wanted, what makes it incomparable beside it."""
    if out:
        from varcli.files import write_atomically

        write_atomically(out, (json.dumps(found.facts(), indent=1, sort_keys=True) + "\n").encode())
    if as_json:
        facts = found.facts()
        del facts["images"]  # they are for the file: nobody wants them on a terminal
        result(json.dumps(facts, sort_keys=True))
    else:
        table(("", ""), list(found.lines()))
    if not quiet:
        for warning in found.warnings:
            note(f"warning: {warning}")
