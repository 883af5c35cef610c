"""Options of the commands that start from an image, each once. No torch here."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Image = Annotated[str, Argument(metavar="IMG", help="An image of any size and kind, or - for standard input.")]
Images = Annotated[list[str], Argument(metavar="IMG...", help="Images of any size and kind; - is standard input.")]
MaskFile = Annotated[
    str | None, Argument(metavar="[MASK]", help="A grey image, white where to fill, of the image's size.")
]
MaskOption = Annotated[
    str | None,
    Option("--mask", metavar="FILE", help="A grey image, white where to change, of the image's size."),
]
Alpha = Annotated[
    bool, Option("--alpha", help="Fill where the mask, or without one the image, is transparent, not where white.")
]
Box = Annotated[
    str | None,
    Option("--box", metavar="L,T,R,B", help="Instead of a mask: a box in pixels (16,0,48,32) or percent (25%,0%,…)."),
]
FitMask = Annotated[bool, Option("--fit-mask", help="Resize a mask of another size to the image's.")]
Pad = Annotated[
    str | None,
    Option("--pad", metavar="L,T,R,B", help="What to add on each side, in pixels or percent of the image."),
]
To = Annotated[
    str | None, Option("--to", metavar="WxH", help="Size to reach, such as 1024x256, the image in the middle.")
]
ClassFor = Annotated[
    str,
    Option("--class", "-c", metavar="CLASS", help="What to paint: index (207), name ('golden retriever') or none."),
]
Count = Annotated[int, Option("--count", "-n", min=1, help="How many, each from a seed of its own.")]
Seed = Annotated[int, Option("--seed", min=0, help="Seed of the first one; the next ones count up from it.")]
BestOf = Annotated[
    int,
    Option(
        "--best-of",
        metavar="N",
        min=1,
        help="Make N for each one wanted; keep that whose seam is smoothest and likelihood highest.",
    ),
]
Feather = Annotated[
    int | None,
    Option(
        "--feather",
        metavar="PIXELS",
        min=0,
        help="Width over which the new fades into the kept, outside the hole; beyond it nothing changes.",
        show_default="half a token",
    ),
]
Composite = Annotated[
    bool,
    Option("--composite/--no-composite", help="Take kept pixels from the image, or all from the model's decoder."),
]
Paper = Annotated[
    bool, Option("--released-rule", help="Follow the released demonstration exactly: its keep rule, nothing put back.")
]
Out = Annotated[
    str | None,
    Option(
        "--out",
        "-o",
        metavar="PLACE",
        help="A .png file, a folder, or - for stdout (several: a tar stream).",
        show_default="files in the current folder",
    ),
]
RebuiltOut = Annotated[
    str | None,
    Option(
        "--out",
        "-o",
        metavar="PLACE",
        help="Also the reconstructions: a .png file, a folder, or - for stdout (several: a tar stream).",
    ),
]
PairsGrid = Annotated[
    Path | None, Option("--grid", metavar="FILE", help="Also a sheet of images beside their reconstructions, .png.")
]
Grid = Annotated[
    Path | None, Option("--grid", metavar="FILE", help="Also a contact sheet: what to fill, and the results, .png.")
]
