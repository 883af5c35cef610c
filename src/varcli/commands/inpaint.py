"""`var inpaint`: an image with a hole in, the image without it out."""

from varcli.commands import editing_options, options
from varcli.commands.editing import Ask, check_together, run
from varcli.commands.editing_tasks import inpainting


def inpaint(  # noqa: PLR0917 - options are given by name
    image: editing_options.Image,
    mask: editing_options.MaskFile = None,
    alpha: editing_options.Alpha = False,
    box: editing_options.Box = None,
    fit_mask: editing_options.FitMask = False,
    class_name: editing_options.ClassFor = "none",
    count: editing_options.Count = 1,
    seed: editing_options.Seed = 0,
    best_of: editing_options.BestOf = 1,
    feather: editing_options.Feather = None,
    composite: editing_options.Composite = True,
    paper: editing_options.Paper = False,
    checkpoint: options.Checkpoint = options.DEFAULT_CHECKPOINT,
    cfg: options.Cfg = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    smooth: options.Smooth = False,
    out: editing_options.Out = None,
    grid: editing_options.Grid = None,
    scales: options.Scales = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Fill a hole in an image so that it goes with the rest. Whatever is not near the hole stays to the last bit."""
    ask = Ask.of(locals())
    check_together(ask)
    words = ("inpaint", image, *([mask] if mask else []))
    run(inpainting(words, image, mask, alpha=alpha, box=box, fit=fit_mask), ask)
