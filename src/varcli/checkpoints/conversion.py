"""From `.pth` files to one safetensors file of ours, the configuration inferred from the tensors.

A state dict is recognized by a tensor that only this kind of model has, wherever in the file it is: alone, as released,
or under any key of a training checkpoint. No code in a file is run: settings beside the tensors, of the few kinds that
training scripts save, are read as inert objects, and anything else is refused.
"""

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from varcli.checkpoints.registry import PICKLED, registry
from varcli.checkpoints.safetensors_io import reading, reason, tensors_sha256
from varcli.checkpoints.store import DERIVED, build, save_model, save_tokenizer
from varcli.classes import ClassEntry, ClassTable, imagenet
from varcli.config import (
    GRID_256,
    GRID_1024,
    TokenizerConfig,
    TransformerConfig,
    check_sides,
    sequence_length,
    sides_of_length,
)
from varcli.errors import CheckpointError, InputError, UsageError
from varcli.files import check_not_read, check_writable, file_state, read_in_pieces
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer

TELLTALE = {"tokenizer": "quantize.embedding.weight", "transformer": "pos_1LC"}
"""A tensor by which a state dict is recognized."""
DEEPEST = 2
"""Levels of keys above a state dict; the original code's are under `trainer`, `vae_local`."""
SETTINGS = re.compile(r"(argparse|pathlib|datetime|types|numpy|omegaconf|easydict|yacs|ml_collections)\..*")
"""Types in a pickle that hold settings, dates, paths and the like, and are read as inert objects."""
LONGEST_PICKLE = 100_000_000
"""Bytes of the part of a `.pth` that says what is in it; released ones have some thousands."""
WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.)+")
"""What data parallelism and compilation put before names."""


@dataclass(frozen=True, slots=True)
class Part:
    """The state dict of one model, and the file it came from."""

    path: Path
    state: dict[str, Tensor]

    sides: tuple[int, ...] | None = None
    """Of the token maps, where the file's own configuration says them."""

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor, from which the configuration is read.

        Raises:
            CheckpointError: there is none of this name and number of dimensions, or it is empty.
        """
        tensor = self.state.get(name)
        if tensor is None or tensor.ndim != dimensions or not tensor.numel():
            raise CheckpointError(f"the checkpoint {self.path} has no tensor {name}, or one of an unknown shape")
        return tuple(tensor.shape)

    def count(self, prefix: str) -> int:
        """How many numbered modules there are below a name."""
        start = f"{prefix}."
        return len({name.removeprefix(start).split(".")[0] for name in self.state if name.startswith(start)})


class Inert:
    """Stands for an object of a pickle that is no tensor; nothing of the object's own code is run."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def convert(
    paths: Sequence[Path],
    out: Path,
    sides: Sequence[int] | None = None,
    run: dict[str, Any] | None = None,
    class_names: Path | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the tokenizer and transformer found in `.pth` files, or one file's tokenizer alone, as one file of ours.

    Args:
        paths: a tokenizer's and a transformer's state dict, a training checkpoint with both, or a tokenizer.
        out: the file to write.
        sides: of the token maps; None where the file or the number of tokens tells them.
        run: facts to keep about where the weights come from; the names of the files if None.
        class_names: a text file with one name per line, in the order of the rows, or a folder of class folders.
        note: takes remarks for the user.

    Raises:
        CheckpointError: a file cannot be read or trusted, or its tensors make no model.
        InputError: no published grid has this many tokens, and no sides are given; the class names cannot be read.
        RunError: the result cannot be written.
        UsageError: the sides, the class names or the output do not fit.
    """
    if out.suffix.lower() in PICKLED:
        raise UsageError(f"--out must be a .safetensors file, which is what {out.stem} becomes (got {out})")
    check_not_read("out", out, paths)
    check_writable(out)
    parts = find_parts(paths, note)
    facts = run or {"converted_from": [path.name for path in paths]}
    if "transformer" not in parts:
        if class_names:
            raise UsageError(f"--class-names is for a transformer; {paths[0]} holds a tokenizer alone")
        config_sides = tokenizer_sides(parts["tokenizer"], sides, note)
        save_tokenizer(out, build_tokenizer(parts["tokenizer"], config_sides), facts)
        return
    transformer = build_transformer(parts["transformer"], sides)
    tokenizer = build_tokenizer(parts["tokenizer"], transformer.config.sides)
    count = transformer.config.class_count
    classes = named_classes(class_names, count) if class_names else class_table(count)
    if run is None and not class_names and not is_released(parts["transformer"].path):
        meaning = "taken to be ImageNet's" if classes == imagenet() else "numbered"
        note(f"{count} classes, {meaning}; --class-names FILE|FOLDER says what they are")
    save_model(out, tokenizer, transformer, classes, facts)


def find_parts(paths: Sequence[Path], note: Callable[[str], None] = lambda line: None) -> dict[str, Part]:
    """Return the tokenizer and, unless one file holds the tokenizer alone, the transformer of files, by kind.

    Raises:
        CheckpointError: one of them is missing, or there are two that differ.
    """
    parts: dict[str, Part] = {}
    for path in paths:
        with reading(path):
            opened = file_state(path)
        content = read_pth(path)
        for kind, mapped in states(path, content, note).items():
            state = _copied(path, opened, mapped)
            if kind in parts and tensors_sha256(parts[kind].state) != tensors_sha256(state):
                raise CheckpointError(
                    f"{path} holds another {kind} than {parts[kind].path}: give files that belong together"
                )
            parts[kind] = Part(path, state, recorded_sides(content))
    for kind in TELLTALE:
        if kind not in parts and (kind == "tokenizer" or len(paths) > 1):
            raise CheckpointError(f"there is no {kind} in {', '.join(map(str, paths))}: give its file too")
    return parts


def _copied(path: Path, opened: tuple[int, int, int], mapped: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in memory of their own, so that whatever happens to their file later changes nothing.

    Raises:
        CheckpointError: the file was changed since it was opened.
    """
    own = {}
    with reading(path):
        for name, tensor in mapped.items():
            if file_state(path) == opened:  # to read where a file was cut off would end the process
                own[name] = tensor.clone()
        if file_state(path) != opened:
            raise SafetensorError("it was changed while it was read")
    return own


def read_pth(path: Path) -> Any:
    """What a `.pth` file holds: tensors, mapped from the file, in plain containers, and inert objects.

    Raises:
        CheckpointError: the file cannot be read, or asks to run code.
    """
    inert: list[Any] = []
    while True:
        try:
            with reading(path), warnings.catch_warnings(), torch.serialization.safe_globals(inert):
                warnings.simplefilter("ignore")  # the pickle protocol does not matter: the file loads or is refused
                _check_sizes(path)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except CheckpointError:
            raise
        except UnicodeEncodeError as error:
            raise CheckpointError(f"the checkpoint {path} must have a name in UTF-8: torch opens no other") from error
        except Exception as error:  # a damaged pickle can make its reader stumble over anything
            asked = re.search(r"GLOBAL (\S+)", str(error))
            name = asked.group(1) if asked else ""
            if SETTINGS.fullmatch(name) and name not in [known for _, known in inert]:
                inert.append((type("Inert", (Inert,), {}), name))  # torch tells them apart by their class
                continue
            if not asked:
                raise CheckpointError(f"the checkpoint {path} was refused: damaged, or not plain tensors") from error
            raise CheckpointError(
                f"the checkpoint {path} was refused: it would run {name} when read; "
                "where it was made, save the weights alone: torch.save(model.state_dict(), FILE)"
            ) from error


def _check_sizes(path: Path) -> None:
    """Raise CheckpointError unless a file's pickle can be read at once."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            longest = max((i.file_size for i in archive.infolist() if i.filename.endswith(".pkl")), default=0)
        if longest > LONGEST_PICKLE:
            raise CheckpointError(f"the checkpoint {path} was refused: its table of contents has {longest} bytes")


def states(path: Path, content: Any, note: Callable[[str], None] = lambda line: None) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts in a file's content, by kind; of several of a kind, a moving average (EMA).

    Raises:
        CheckpointError: it holds neither kind, or something other than plain tensors in them.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for kind, telltale in TELLTALE.items():
        candidates = list(_candidates(content, telltale))
        if not candidates:
            continue
        where, found[kind] = min(candidates, key=lambda candidate: "ema" not in candidate[0].lower())
        if len(candidates) > 1:
            others = ", ".join(key for key, _ in candidates if key != where)
            note(f"{path}: the {kind} is taken from {where}; {others} has one too")
    if not found:
        keys = ", ".join(sorted(map(str, content))[:20]) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"the checkpoint {path} has neither a VAR tokenizer nor a VAR transformer; it holds {keys or 'nothing'}"
        )
    for name, tensor in ((name, tensor) for state in found.values() for name, tensor in state.items()):
        _check_plain(path, name, tensor)
    return found


def _candidates(content: Any, telltale: str, where: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each state dict with this tensor, and the keys under which it lies."""
    if not isinstance(content, Mapping):
        return
    plain = plain_names(content)
    for name in plain:
        if name == telltale or name.endswith(f".{telltale}"):  # after the name of a model that holds both
            prefix = name.removesuffix(telltale)
            inside = {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
            yield f"{where}{prefix}".rstrip("."), plain_names(inside)
            return
    if where.count(".") < DEEPEST:
        for key, value in content.items():
            yield from _candidates(value, telltale, f"{where}{key}.")


def _check_plain(path: Path, name: str, tensor: Any) -> None:
    """Raise CheckpointError unless a value is a tensor, with all of its values in the file."""
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"the checkpoint {path} was refused: {name} is not a tensor")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(
            f"the checkpoint {path} was refused: tensor {name} is sparse, quantized or without values"
        )
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"the checkpoint {path} was refused: tensor {name} has fewer values than its shape")


def recorded_sides(content: Any) -> tuple[int, ...] | None:
    """Return the sides that a training checkpoint's settings name as `patch_nums`, None if they name none."""
    settings = [content]
    for _ in range(DEEPEST + 1):
        plain = [value.__dict__ if isinstance(value, Inert) else value for value in settings]
        inside = [value for value in plain if isinstance(value, Mapping)]
        for mapping in inside:
            sides = mapping.get("patch_nums")
            if isinstance(sides, Sequence) and sides and all(type(side) is int for side in sides):
                return tuple(sides)
        settings = [value for mapping in inside for value in mapping.values()]
    return None


def plain_names(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a state dict without the prefixes that wrapping a model puts before every name."""
    return {WRAPPERS.sub("", str(name), count=1): value for name, value in state.items()}


def build_transformer(part: Part, sides: Sequence[int] | None) -> Transformer:
    """Return the transformer of a state dict.

    Raises:
        CheckpointError: the tensors make no transformer.
        InputError: no published grid has this many tokens, and no sides are given.
        UsageError: the sides given do not fit.
    """
    config = transformer_config(part, infer_sides(part, sides))
    state = {name: tensor for name, tensor in part.state.items() if name.rpartition(".")[2] not in DERIVED}
    built = build(part.path, Transformer, config, state)
    levels = part.state.get("lvl_1L")
    if levels is not None and not torch.equal(levels.long(), built.lvl_1L):
        raise UsageError(
            f"the transformer was trained on other sides than {_words(config.sides)}: give them with --sides"
        )
    return built


def build_tokenizer(part: Part, sides: tuple[int, ...]) -> Tokenizer:
    """Return the tokenizer of a state dict, on the sides of its transformer's token maps.

    Raises:
        CheckpointError: the tensors make no tokenizer.
        UsageError: it has another number of scales.
    """
    if HITS in part.state and (scales := part.shape(HITS, 2)[0]) != len(sides):
        raise UsageError(f"the tokenizer of {part.path} has {scales} scales, and the sides are {_words(sides)}")
    return build(part.path, Tokenizer, tokenizer_config(part, sides), part.state)


def infer_sides(part: Part, sides: Sequence[int] | None) -> tuple[int, ...]:
    """Return the sides of a transformer's token maps, checked against its number of tokens.

    Raises:
        InputError: no published grid has this many tokens, and no sides are given.
        UsageError: the sides given make another number of tokens.
    """
    length = part.shape("pos_1LC", 3)[1]
    sides = part.sides if sides is None else sides
    if sides is None:
        return sides_of_length(length)
    check_sides(sides)
    if sequence_length(sides) != length:
        raise UsageError(
            f"the sides {_words(sides)} make {sequence_length(sides)} tokens, and the transformer has {length}"
        )
    return tuple(sides)


def tokenizer_sides(part: Part, sides: Sequence[int] | None, note: Callable[[str], None]) -> tuple[int, ...]:
    """Return the sides for a tokenizer alone, which knows only how many they are.

    Raises:
        InputError: no published grid has this many scales, and no sides are given.
        UsageError: the sides make no grid.
    """
    sides = part.sides if sides is None else sides
    if sides is not None:
        check_sides(sides)
        return tuple(sides)
    scales = part.shape(HITS, 2)[0]
    for grid in (GRID_256, GRID_1024):
        if len(grid) == scales:
            note(f"the tokenizer has {scales} scales, taken to be {_words(grid)}; --sides says otherwise")
            return grid
    raise InputError(f"no published grid has {scales} scales: give the sides with --sides 1,2,3,…")


HITS = "quantize.ema_vocab_hit_SV"
"""A tensor with one row per scale."""


def transformer_config(part: Part, sides: tuple[int, ...]) -> TransformerConfig:
    """Return the configuration that a transformer's tensors imply."""
    numbers: dict[str, int] = {
        "depth": part.count("blocks"),
        "width": part.shape("pos_1LC", 3)[2],
        "codebook_size": part.shape("head.weight", 2)[0],
        "codebook_width": part.shape("word_embed.weight", 2)[1],
        "class_count": part.shape("class_emb.weight", 2)[0] - 1,
    }
    try:
        return TransformerConfig(sides=sides, shared_adaln="shared_ada_lin.1.weight" in part.state, **numbers)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint {part.path} is not a VAR transformer: {error}") from error


def tokenizer_config(part: Part, sides: tuple[int, ...]) -> TokenizerConfig:
    """Return the configuration that a tokenizer's tensors imply."""
    codebook_size, codebook_width = part.shape("quantize.embedding.weight", 2)
    base = part.shape("encoder.conv_in.weight", 4)[0]
    levels = range(part.count("encoder.down"))
    try:
        return TokenizerConfig(
            sides=sides,
            codebook_size=codebook_size,
            codebook_width=codebook_width,
            base_width=base,
            multipliers=tuple(part.shape(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] // base for i in levels),
            encoder_blocks=part.count("encoder.down.0.block"),
            kernel_count=part.count("quantize.quant_resi.qresi_ls"),
        )
    except ValueError as error:
        raise CheckpointError(f"the checkpoint {part.path} is not a VAR tokenizer: {error}") from error


def class_table(count: int) -> ClassTable:
    """Return ImageNet's classes for a thousand rows, numbered ones for another count."""
    if count == len(imagenet()):
        return imagenet()
    return ClassTable(tuple(ClassEntry(i, f"class_{i}", f"class {i}") for i in range(count)))


MOST_BYTES_OF_NAMES = 1 << 26
"""No class names are longer together; a device has no end."""


def named_classes(source: Path, count: int) -> ClassTable:
    """Return classes by their names: from a text file, one per line, or the names of a folder's subfolders in order.

    If all names are WordNet ids of ImageNet, they are its classes.

    Raises:
        InputError: the names cannot be read.
        UsageError: there are not `count` of them.
    """
    try:
        if source.is_dir():
            names = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
        else:
            with source.open("rb") as file:
                text = read_in_pieces(file, MOST_BYTES_OF_NAMES).decode("utf-8-sig")
            names = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"class names: {source} cannot be read: {reason(error)}") from error
    if len(names) != count:
        raise UsageError(f"--class-names must name {count} classes, one for each row (got {len(names)} in {source})")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UsageError(f"--class-names must name each class once ({twice[0]} is there twice in {source})")
    known = {entry.wnid: entry for entry in imagenet().entries}
    if known.keys() >= set(names):
        return ClassTable(tuple(known[name] for name in names))
    return ClassTable(tuple(ClassEntry(i, name, name.replace("_", " ")) for i, name in enumerate(names)))


def is_released(path: Path) -> bool:
    """Whether a file has name and size of a released one that the registry knows."""
    for file in (file for entry in registry().values() for file in entry.files):
        if file.name == path.name:
            return file.bytes is None or file.bytes == path.stat().st_size
    return False


def _words(sides: Sequence[int]) -> str:
    return ",".join(map(str, sides))
