"""A published model's directory as what a run begins with: its weights, and its config with a recipe to go on from."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from frugalmoe.config import override
from frugalmoe.config.load import opened
from frugalmoe.convert import checkpoint as published
from frugalmoe.convert import from_hf, plan
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.train import checkpoint

# For 200 steps on a few million tokens; the rate is what full fine-tuning of such models usually takes.
RECIPE = {
    "optim.learning_rate": 2e-5,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 20,
    "optim.weight_decay": 0.0,
    "train.steps": 200,
    "train.eval_every": 50,
}


class Opened:
    """A published model, as `train.origin.Published`; its numbers are read when they are asked for."""

    def __init__(self, found: from_hf.Found):
        self._found = found
        self._hashes: Mapping[str, Any] = {}
        self.family = found.family.name
        self.router = to_dict(found.config.model.moe)["router"]
        self.tokenizer = found.tokenizer.fingerprint

    def __repr__(self) -> str:  # one for all processes of a run
        return f"{self.family} in {self._found.source.path}"

    def fault(self, step: int, quick: bool) -> str:
        return ""  # a file that is cut off was refused when it was opened

    def shapes(self, step: int, item: str, ours: Iterable[str]) -> dict[str, tuple[int, ...]]:
        of_state = item == "router_state"
        arrays = self._found.plan.arrays.items()
        return {"/".join(path): leaf.shape for path, leaf in arrays if plan.is_state(path) == of_state}

    def arrays(self, step: int, wanted: checkpoint.Arrays) -> checkpoint.Arrays:
        """Beside what is returned, one of our arrays and one tensor of theirs are in memory at one time."""
        from_hf.check_repeats(self._found)
        read = lambda path, like: self._placed(tuple(path.split("/")), like)
        found = {item: {path: read(path, like) for path, like in arrays.items()} for item, arrays in wanted.items()}
        return checkpoint.typed(found, wanted)

    def _placed(self, path: plan.Path, like: jax.ShapeDtypeStruct) -> jax.Array:
        """One of our arrays, of which each device has its part."""
        array = from_hf.read_array(self._found, path)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])

    def digest(self, step: int, items: Iterable[str]) -> str:
        """Of all files that are read, the config and the index among them."""
        source = self._found.source
        index = [path for path in (source.path / published.INDEX,) if path.is_file()]
        self._hashes = published.hashes([*source.files, *index])
        total = hashlib.sha256()
        for name, of_file in sorted(self._hashes.items()):
            total.update(f"{name} {of_file['sha256']}\n".encode())
        return total.hexdigest()

    def accompany(self, workdir: Path) -> None:
        from_hf.accompany(workdir, self._found, self._hashes)


def open_published(directory: Path) -> Opened:
    """Returns a published model; no number is read. Raises `UserError` for what cannot be opened as one of ours."""
    return Opened(_found(directory))


def config_of(directory: Path) -> ConfigDict:
    """Returns the config of a published model: its model and tokenizer, with `RECIPE` and defaults for the rest."""
    found = _found(directory)
    own = found.config.data.tokenizer == "bytes"
    fields = RECIPE if own else {**RECIPE, "data.tokenizer": str(directory.absolute())}
    return override(opened(to_dict(found.config)), fields)


def _found(directory: Path) -> from_hf.Found:
    found = from_hf.look(directory, directory)
    if found.faults:
        raise UserError(found.faults)
    return found
