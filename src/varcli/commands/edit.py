"""`var edit`: an image and a class in, the image with something of that class in it out."""

from varcli.commands import editing_options, options
from varcli.commands.editing import Ask, check_together, run
from varcli.commands.editing_tasks import inpainting


def edit(  # noqa: PLR0917 - options are given by name
    image: editing_options.Image,
    class_name: editing_options.ClassFor,
    mask: editing_options.MaskOption = None,
    alpha: editing_options.Alpha = False,
    box: editing_options.Box = None,
    fit_mask: editing_options.FitMask = False,
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
    """Put something of a class into a part of an image. Whatever is not near that part stays to the last bit."""
    ask = Ask.of(locals())
    check_together(ask)
    words = ("edit", image, *(["--mask", mask] if mask else []))
    run(inpainting(words, image, mask, alpha=alpha, box=box, fit=fit_mask), ask)
