"""Options of the commands that measure, each once. No torch here."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Images = Annotated[
    list[str] | None,
    Argument(
        metavar="PATH",
        help="Images that exist: folders, zips, .npz (arr_0), WebDataset .tar, image files, or - for paths on "
        "stdin. Without any, images are made with the checkpoint.",
    ),
]
Data = Annotated[list[str], Argument(metavar="PATH", help="Folders, zips, .npz, .tar, image files, or - .")]
Fid = Annotated[bool, Option("--fid", help="Fréchet inception distance.")]
InceptionScore = Annotated[bool, Option("--is", help="Inception score.")]
Kid = Annotated[bool, Option("--kid", help="Kernel inception distance.")]
Prc = Annotated[bool, Option("--prc", help="Precision and recall, k = 3 on Inception features, as ADM does.")]
Num = Annotated[
    int | None,
    Option(
        "--num-images",
        "-n",
        min=2,
        help="Images to sample, equally many per class.",
        show_default="50000, for a checkpoint without published figures as many as the reference has",
    ),
]
Reference = Annotated[
    str | None,
    Option(
        "--reference",
        "-r",
        metavar="NAME|PATH",
        help="What to measure against: imagenet-256, imagenet-512 or tiny64, an .npz of statistics, or images.",
        show_default="the checkpoint's; for images that exist the one of their size",
    ),
]
SaveStats = Annotated[
    Path | None, Option("--save-stats", metavar="FILE", help="Also keep the images' statistics, an .npz.")
]
SaveImages = Annotated[
    str | None, Option("--save-images", metavar="PLACE", help="Also keep the images made: a folder, .npz or .tar.")
]
ResultFile = Annotated[
    Path | None,
    Option("--out", "-o", metavar="FILE", help="Also write the result, .json, with some images, for `var report`."),
]
StatsFile = Annotated[Path, Option("--out", "-o", metavar="FILE", help="Where to write them, an .npz.")]
Features = Annotated[
    bool, Option("--features", help="Keep each image's features too, which KID, precision and recall ask for.")
]
LpipsWeights = Annotated[
    Path | None,
    Option(
        "--lpips-weights", metavar="DIR", help="Folder of LPIPS's two weight files.", show_default="torch.hub's cache"
    ),
]
Tokenizer = Annotated[
    bool,
    Option("--tokenizer", help="Measure the checkpoint's tokenizer instead, on images taken through it and back."),
]
Resize = Annotated[
    int | None,
    Option("--resize", metavar="SIDE", min=1, help="Crop and resize images to this many pixels a side, as ADM does."),
]
SkipBad = Annotated[bool, Option("--skip-bad", help="Leave out images that cannot be read, instead of ending there.")]
InceptionFile = Annotated[
    Path | None,
    Option("--inception", envvar="VAR_INCEPTION", metavar="FILE", help="InceptionV3's weights, instead of a download."),
]
