"""What lies in the directory of a published model: its config, its tensors, and what goes along with them."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from frugalmoe.convert import safetensors
from frugalmoe.errors import UserError
from frugalmoe.files import read_json
from frugalmoe.shapes import is_integer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_WEIGHT_MAP = "weight_map"
# Carried along and given back as they are.
CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "tekken.json", "chat_template.jinja",
    "chat_template.json", "LICENSE", "README.md",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model's directory, of which no number has been read yet."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, safetensors.Info]
    carried: tuple[Path, ...]
    left: tuple[str, ...]  # files that nobody reads

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def files(self) -> list[Path]:
        """All that is read."""
        return sorted({info.path for info in self.tensors.values()} | {*self.carried, self.path / CONFIG})


def is_published(directory: Path) -> bool:
    """Whether a directory is meant to be that of a published model: it holds its weights or its config, and no run."""
    if not directory.is_dir() or (directory / "checkpoints").is_dir():
        return False
    if (directory / INDEX).is_file() or any(directory.glob("*.safetensors")):
        return True
    try:
        config = read_json(directory / CONFIG)
    except UserError:
        return False
    return isinstance(config, Mapping) and "model_type" in config


def look(directory: Path) -> Published:
    """Returns what a directory holds. Raises `UserError` for what is missing, damaged, or would run code."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    config = read_json(directory / CONFIG)
    if not isinstance(config, Mapping):
        raise UserError(f"{directory / CONFIG}: must hold a JSON object, holds {type(config).__name__}")
    if (large := _too_large(config)) is not None:
        raise UserError(f"{directory / CONFIG}: holds an integer of {large.bit_length()} bits, which no field can have")
    tensors = _tensors(directory)
    used = {info.path.name for info in tensors.values()}
    there = sorted(path for path in directory.iterdir() if path.is_file())
    carried = tuple(path for path in there if path.name in CARRIED)
    known = used | set(CARRIED) | {INDEX}
    return Published(directory, config, tensors, carried, tuple(path.name for path in there if path.name not in known))


def _too_large(value: Any) -> int | None:
    """An integer in a value from JSON that is no number of a machine, None where there is none."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if type(value) is int and not is_integer(value):
            return value
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return None


def _tensors(directory: Path) -> dict[str, safetensors.Info]:
    single, index = directory / WEIGHTS, directory / INDEX
    if single.is_file() and index.is_file():
        raise UserError(f"{directory}: holds {WEIGHTS} and {INDEX}; remove the one that is not the model's")
    if single.is_file():
        return safetensors.read_header(single)
    if not index.is_file():
        raise UserError(f"{directory}: {_without_weights(directory)}")
    named = _weight_map(index)
    found: dict[str, safetensors.Info] = {}
    missing = [file for file in sorted(set(named.values())) if not (directory / file).is_file()]
    if missing:
        raise UserError(f"{index}: names {len(missing)} files that are not there: {', '.join(missing[:10])}")
    for file in sorted(set(named.values())):
        tensors = safetensors.read_header(directory / file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(f"{directory / file}: tensor {twice[0]!r} stands in {found[twice[0]].path.name} too")
        found |= tensors
    for name, file in named.items():
        if name not in found or found[name].path.name != file:
            raise UserError(f"{index}: tensor {name!r} is not in {file}, which it names")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file, which lies in the directory of the index."""
    content = read_json(index)
    named = content.get(_WEIGHT_MAP) if isinstance(content, Mapping) else None
    if not isinstance(named, Mapping) or not named or not all(isinstance(file, str) for file in named.values()):
        raise UserError(f"{index}: damaged; needs {_WEIGHT_MAP}, an object of tensor names and file names")
    for file in sorted(set(named.values())):
        fits = len(file.encode(errors="replace")) <= 255  # bytes of a name; of longer ones no system can say anything
        if file != Path(file).name or "\\" in file or not file.endswith(".safetensors") or not fits:
            rule = "must be the name of a .safetensors file in the same directory"
            raise UserError(f"{index}: {_WEIGHT_MAP} names {file!r}: {rule}")
    return dict(named)


def _without_weights(directory: Path) -> str:
    """Why a directory without safetensors is refused."""
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    if pickles:
        reason = "such a file is a Python pickle, which can run any program as it is read; save it as safetensors"
        return f"holds {pickles[0]} but no {WEIGHTS}: {reason}"
    return f"holds no {WEIGHTS} and no {INDEX}"


def hashes(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Name -> sha256 and size of each file."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = {
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                "bytes": path.stat().st_size,
            }
    return found


def stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Name -> size and times (of its content and of its entry, ns) of each file: equal ones mean that nobody wrote."""
    found = {path.name: path.stat() for path in files}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in found.items()}
