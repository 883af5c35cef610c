"""From released `.pth` files to one safetensors file, the configuration inferred from the tensors.

Two layouts are known: a plain state dict for each of tokenizer and transformer, as released, and a
training checkpoint that nests both under `trainer`. Only tensors and plain values are read from them;
whatever a pickle would run is refused.
"""

import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varcli.checkpoints.safetensors_io import reading, tensors_sha256
from varcli.checkpoints.store import DERIVED, build, save_model
from varcli.classes import ClassEntry, ClassTable, imagenet
from varcli.config import TokenizerConfig, TransformerConfig, check_sides, sequence_length, sides_of_length
from varcli.errors import CheckpointError, UsageError
from varcli.models.tokenizer import Tokenizer
from varcli.models.transformer import Transformer

NESTED = {"tokenizer": "vae_local", "transformer": "var_wo_ddp"}
"""Names of the two state dicts inside a training checkpoint's `trainer`."""
TELLTALE = {"tokenizer": "quantize.embedding.weight", "transformer": "pos_1LC"}
"""A tensor by which a plain state dict is recognized."""
WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.)+")
"""What data parallelism and compilation put before names."""


@dataclass(frozen=True, slots=True)
class Part:
    """The state dict of one model, and the file it came from."""

    path: Path
    state: dict[str, Tensor]

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor, from which the configuration is read.

        Raises:
            CheckpointError: there is none of this name and number of dimensions.
        """
        tensor = self.state.get(name)
        if tensor is None or tensor.ndim != dimensions:
            raise CheckpointError(f"checkpoint: {self.path}; tensor {name} is missing or of no known shape")
        return tuple(tensor.shape)

    def count(self, prefix: str) -> int:
        """How many numbered modules there are below a name."""
        start = f"{prefix}."
        return len({name.removeprefix(start).split(".")[0] for name in self.state if name.startswith(start)})


def convert(
    paths: Sequence[Path], out: Path, sides: Sequence[int] | None = None, run: dict[str, Any] | None = None
) -> None:
    """Write the tokenizer and transformer found in `.pth` files as one file of ours.

    Args:
        paths: a tokenizer's and a transformer's state dict, or a training checkpoint with both.
        out: the file to write.
        sides: of the token maps; None where the number of tokens tells them.
        run: facts to keep about where the weights come from; the names of the files if None.

    Raises:
        CheckpointError: a file cannot be read or trusted, or its tensors make no model.
        InputError: no published grid has this many tokens, and no sides are given.
        RunError: the result cannot be written.
        UsageError: the sides do not fit.
    """
    parts = find_parts(paths)
    transformer = build_transformer(parts["transformer"], sides)
    tokenizer = build_tokenizer(parts["tokenizer"], transformer.config.sides)
    facts = run or {"converted_from": [path.name for path in paths]}
    save_model(out, tokenizer, transformer, class_table(transformer.config.class_count), facts)


def find_parts(paths: Sequence[Path]) -> dict[str, Part]:
    """Return the tokenizer and the transformer that the files hold, by kind.

    Raises:
        CheckpointError: one of them is missing, or there are two that differ.
    """
    parts: dict[str, Part] = {}
    for path in paths:
        for kind, state in states(path, read_pth(path)).items():
            if kind in parts and tensors_sha256(parts[kind].state) != tensors_sha256(state):
                raise CheckpointError(f"{kind}: another one in {path}; it has to be that of {parts[kind].path}")
            parts[kind] = Part(path, state)
    for kind in TELLTALE:
        if kind not in parts:
            raise CheckpointError(f"{kind}: none in {', '.join(map(str, paths))}; give its file too")
    return parts


def read_pth(path: Path) -> Any:
    """What a `.pth` file holds: tensors, mapped from the file, in plain containers.

    Raises:
        CheckpointError: the file cannot be read, or asks to run code.
    """
    try:
        with reading(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # which pickle protocol it is concerns nobody: it loads or is refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can make its reader stumble over anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        why = (
            f"was refused: it would run {asked.group(1)} when read"
            if asked
            else "was refused: damaged, or not plain tensors"
        )
        raise CheckpointError(f"the checkpoint {path} {why}") from error


def states(path: Path, content: Any) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts in a file's content, by kind.

    Raises:
        CheckpointError: it holds neither kind, or something other than tensors in them.
    """
    outer = content if isinstance(content, Mapping) else {}
    trainer = outer.get("trainer")
    inner = trainer if isinstance(trainer, Mapping) else {}
    found = {kind: plain_names(inner[name]) for kind, name in NESTED.items() if isinstance(inner.get(name), Mapping)}
    if not found:
        plain = plain_names(outer)
        found = {kind: plain for kind, name in TELLTALE.items() if name in plain}
    if not found:
        raise CheckpointError(f"checkpoint: {path}; neither a VAR tokenizer nor a VAR transformer")
    for name, tensor in ((name, tensor) for state in found.values() for name, tensor in state.items()):
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"checkpoint: {path}; {name} is no tensor")
    return found


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
        raise UsageError(f"sides: {_words(config.sides)}; the transformer was trained on others")
    return built


def build_tokenizer(part: Part, sides: tuple[int, ...]) -> Tokenizer:
    """Return the tokenizer of a state dict, on the sides of its transformer's token maps.

    Raises:
        CheckpointError: the tensors make no tokenizer.
        UsageError: it has another number of scales.
    """
    hits = part.state.get("quantize.ema_vocab_hit_SV")
    if hits is not None and len(hits) != len(sides):
        raise UsageError(f"sides: {_words(sides)}; the tokenizer of {part.path} has {len(hits)} scales")
    return build(part.path, Tokenizer, tokenizer_config(part, sides), part.state)


def infer_sides(part: Part, sides: Sequence[int] | None) -> tuple[int, ...]:
    """Return the sides of a transformer's token maps, checked against its number of tokens.

    Raises:
        InputError: no published grid has this many tokens, and no sides are given.
        UsageError: the sides given make another number of tokens.
    """
    length = part.shape("pos_1LC", 3)[1]
    if sides is None:
        return sides_of_length(length)
    check_sides(sides)
    if sequence_length(sides) != length:
        tokens = f"{sequence_length(sides)} tokens"
        raise UsageError(f"sides: {_words(sides)} make {tokens}; the transformer has {length}")
    return tuple(sides)


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
        raise CheckpointError(f"checkpoint: {part.path}; no VAR transformer: {error}") from error


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
        raise CheckpointError(f"checkpoint: {part.path}; no VAR tokenizer: {error}") from error


def class_table(count: int) -> ClassTable:
    """Return ImageNet's classes for a thousand rows, numbered ones for another count."""
    if count == len(imagenet()):
        return imagenet()
    return ClassTable(tuple(ClassEntry(i, f"class_{i}", f"class {i}") for i in range(count)))


def _words(sides: Sequence[int]) -> str:
    return ",".join(map(str, sides))
