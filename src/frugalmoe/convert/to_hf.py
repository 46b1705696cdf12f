"""The directory of a published model from a run directory.

What came from such a directory goes back as it was: the same config.json, the same dtype of each tensor, the same files
beside it. Other runs are written in float32, as a family that has all of what they compute.
"""

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from frugalmoe.config import Config
from frugalmoe.console import bar
from frugalmoe.convert import checkpoint as published
from frugalmoe.convert import families, output, plan, safetensors, settings
from frugalmoe.convert.contract import Family
from frugalmoe.convert.from_hf import FOLDER, RECORD
from frugalmoe.data import chat, end_of_text
from frugalmoe.data.tokenizer import load_from
from frugalmoe.errors import UserError
from frugalmoe.files import read_json, write_json
from frugalmoe.schema import Model
from frugalmoe.train import checkpoint
from frugalmoe.train.weights import Weights

LARGEST_FILE = 5_000_000_000  # bytes of tensors in one file, where there are several


class Made(NamedTuple):
    """A published model, as it will be written."""

    family: Family
    model: Model
    values: Mapping[str, Any]  # of config.json
    plan: plan.Plan
    entries: tuple[safetensors.Entry, ...]
    repeats: Mapping[str, str]  # name -> the tensor that is written once more under it


def look(run: Path, config: Config, family: str = "") -> Made:
    """Returns how a run would be published. Raises `UserError` where no family has what it computes."""
    record = read_json(run / RECORD) if (run / RECORD).is_file() else {}
    if not isinstance(record, Mapping) or not isinstance(record.get("dtypes", {}), Mapping):
        raise UserError(f"{run / RECORD}: damaged; needs family and dtypes")
    kind, values = _as_it_was(run, config, record, family) or _fresh(config, family)
    made, dtypes = plan.make(kind, config.model), record.get("dtypes", {})
    if made.missing:
        raise UserError(f"{run}: {kind.name} has no tensor for {plan.listed(made.missing)}")
    shapes = {tensor.name: tensor.shape for tensor in made.tensors}
    repeats = {name: other for name in dtypes if name not in shapes and (other := plan.repeated(kind, name)) in shapes}
    names = [*shapes, *repeats]
    entries = tuple(safetensors.Entry(n, dtypes.get(n, "F32"), shapes[repeats.get(n, n)]) for n in names)
    if unknown := [entry for entry in entries if entry.dtype not in safetensors.DTYPES]:
        raise UserError(f"{run / RECORD}: dtype {unknown[0].dtype!r} of {unknown[0].name}: unknown")
    return Made(kind, config.model, values, made, entries, repeats)


def _as_it_was(
    run: Path, config: Config, record: Mapping[str, Any], family: str
) -> tuple[Family, Mapping[str, Any]] | None:
    """Family and config.json that a converted run came with, where they still say what it is."""
    path, name = run / FOLDER / published.CONFIG, record.get("family")
    if not path.is_file() or family not in ("", name) or name not in (*families.names(), family):
        return None  # a record does not name a program: a file that is a family is named anew
    kind, values = families.get(name), read_json(path)
    return None if settings.differing(kind, values, config.model, str(path)) else (kind, values)


def _fresh(config: Config, family: str) -> tuple[Family, Mapping[str, Any]]:
    """The one family that has all of what the model computes, or the one that is named."""
    kinds = [families.get(name) for name in ([family] if family else families.sound())]
    fitting, why, wrong = [], {}, {}
    for kind in kinds:
        values = settings.to_theirs(kind, config.model) | {
            "max_position_embeddings": config.data.sequence_length,
            "dtype": "float32",
        }
        try:
            lines = settings.differing(kind, values, config.model, "config.json")
        except UserError as e:
            wrong[kind.name] = str(e)
            continue
        if lines:
            why[kind.name] = lines
        else:
            fitting.append((kind, values))
    if len(fitting) > 1:
        names = ", ".join(kind.name for kind, _ in fitting)
        raise UserError(f"--family={family!r}: several families have what this model computes; name one of: {names}")
    if not fitting:
        nearest = min(why, key=lambda name: len(why[name]), default=None)
        rule = f"{nearest} has no {'; '.join(why[nearest][:5])}" if nearest else "; ".join(wrong.values())
        raise UserError(f"--family={family!r}: no family of models computes what this one does; {rule}")
    return fitting[0]


def convert(
    run: Path, made: Made, weights: Weights, directory: Path, *, largest: int = LARGEST_FILE, progress: bool = False
) -> None:
    """Writes the directory, whole or not at all. `largest`: bytes of tensors in a file, where there are several."""
    output.check_new(directory, "DIR")
    checkpoint.check_space_for(output.existing_parent(directory), sum(entry.size for entry in made.entries))
    arrays = _flat(weights)
    with output.appearing(directory) as place, bar(progress) as shown:
        _carry(run, place)
        write_json(place / published.CONFIG, {**_end_of_text(run), **made.values})
        shards = _shards(made.entries, largest)
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        names = names if len(shards) > 1 else [published.WEIGHTS]
        task = shown.add_task("writing", total=len(made.entries))
        tensors = _tensors(made, arrays)
        for name, entries in zip(names, shards):
            tracked = shown.track(itertools.islice(tensors, len(entries)), task_id=task)
            safetensors.write(place / name, entries, tracked)
        if len(shards) > 1:
            weight_map = {entry.name: name for name, entries in zip(names, shards) for entry in entries}
            total = {"total_size": sum(entry.size for entry in made.entries)}
            write_json(place / published.INDEX, {"metadata": total, "weight_map": weight_map})


def _shards(entries: Sequence[safetensors.Entry], largest: int) -> list[list[safetensors.Entry]]:
    """Entries in order, cut where a file would grow beyond `largest` bytes."""
    shards: list[list[safetensors.Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.size > largest:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    return shards


def _tensors(made: Made, arrays: Mapping[plan.Path, np.ndarray]) -> Iterator[np.ndarray]:
    """The numbers of all entries, one tensor after the other.

    Raises `UserError` for a number that the tensor's dtype cannot hold.
    """
    tensors = {tensor.name: tensor for tensor in made.plan.tensors}
    for entry in made.entries:
        tensor = tensors[made.repeats.get(entry.name, entry.name)]
        pieces = tuple(part.theirs(arrays[part.path]) for part in tensor.parts)
        with np.errstate(over="ignore"):
            numbers = tensor.form.join(pieces, made.model).astype(safetensors.DTYPES[entry.dtype])
        safetensors.check_finite(numbers, f"tensor {entry.name!r} as {entry.dtype}")
        yield numbers


def _flat(weights: Weights) -> dict[plan.Path, np.ndarray]:
    leaves = [*jax.tree_util.tree_leaves_with_path(weights.params)]
    leaves += jax.tree_util.tree_leaves_with_path(weights.router_state)
    return {tuple(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def _end_of_text(run: Path) -> dict[str, int]:
    """What config.json of a run of our own says of the token that ends a text."""
    if (run / FOLDER).is_dir() or not (run / "tokenizer/tokenizer.json").is_file():
        return {}
    return {"eos_token_id": load_from(run / "tokenizer").eos}


def _carry(run: Path, place: Path) -> None:
    """Writes what goes along with the weights: the files that came with them, else the run's own tokenizer."""
    if (run / FOLDER).is_dir():
        for name in published.CARRIED:
            if name != published.CONFIG and (run / FOLDER / name).is_file():
                shutil.copyfile(run / FOLDER / name, place / name)
        return
    tokenizer = run / "tokenizer"
    if (tokenizer / "tokenizer.json").is_file():  # bytes have none, and nothing else reads them
        shutil.copyfile(tokenizer / "tokenizer.json", place / "tokenizer.json")
        saved = read_json(tokenizer / chat.CONFIG)
        fast = {"tokenizer_class": "PreTrainedTokenizerFast"} | {k: v for k, v in saved.items() if k in chat.TOKENS}
        write_json(place / chat.CONFIG, fast)
        for name in (chat.FILE, end_of_text.GENERATION):
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, place / name)
