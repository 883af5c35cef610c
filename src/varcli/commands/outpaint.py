"""`var outpaint`: an image in, a larger one out."""

from varcli.commands import editing_options, options
from varcli.commands.editing import Ask, check_together, run
from varcli.commands.editing_tasks import outpainting


def outpaint(  # noqa: PLR0917 - options are given by name
    image: editing_options.Image,
    pad: editing_options.Pad = None,
    to: editing_options.To = None,
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
    """Go on beyond an image's edges, however far. Only what is near those edges changes in the image itself."""
    ask = Ask.of(locals())
    check_together(ask)
    run(outpainting(image, pad=pad, to=to), ask)
