"""A run directory from the directory of a published model.

Parameters are float32 here, which holds every number of float32, bfloat16 and float16 as it is. source.json keeps what
was read, and each tensor's dtype, in which it is written back; source/ keeps the files that go along.
"""

import itertools
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from frugalmoe.config import RECORD as CONFIG
from frugalmoe.config import Config, default, override, resolve, runnable, settle
from frugalmoe.console import bar
from frugalmoe.convert import checkpoint as published
from frugalmoe.convert import families, output, plan, safetensors, settings
from frugalmoe.convert.contract import Family
from frugalmoe.data.tokenizer import ByteTokenizer, Tokenizer, load_from, load_json, parse
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.files import read_json, write_json
from frugalmoe.model import pattern
from frugalmoe.schema import Data
from frugalmoe.train import checkpoint
from frugalmoe.train.weights import Weights

RECORD, FOLDER = "source.json", "source"  # in the run's directory
_STAMPS = "stamps"  # in source.json of a linked run: of the files that it was linked to
_ASSEMBLY = "assembly"  # arrays on disk, until the checkpoint is written
_LENGTH, _MODULES = "max_position_embeddings", "num_nextn_predict_layers"
_QUANTIZATION = "quantization_config"
_TIMES = 4  # of the numbers in the files: what a config says beyond that is no slip


class Found(NamedTuple):
    """What a directory holds and how it would be a run of ours; no number has been read."""

    source: published.Published
    family: Family
    config: Config  # of the run, settled
    plan: plan.Plan
    tokenizer: Tokenizer
    repeats: set[str]  # tensors that repeat another
    notes: tuple[str, ...]  # what a user should know
    faults: str  # why it cannot be converted; empty: it can


def look(directory: Path, run: Path, *, family: str = "", tokenizer: str = "", overrides: Sequence[str] = ()) -> Found:
    """Returns how a published model fits. Raises `UserError` for what its config.json says and ours cannot; where
    tensors do not fit, that stands in `faults`.

    family: a name, or the path of a file, in place of what config.json says. tokenizer: as `data.tokenizer`, in place
    of the directory's own. overrides: fields of the run's config that change no answer, as "data.path=texts/".
    """
    source = published.look(directory)
    where = str(directory / published.CONFIG)
    kind = _family(source.config, family, where)
    own = _tokenizer(tokenizer, directory)
    fields = settings.to_ours(kind, source.config, where)
    depth = _modules(kind, fields["model.num_layers"], source.tensors)
    fields |= {
        "model.multi_token_prediction.depth": depth,
        "name": pattern.short(kind.name),
        "data.tokenizer": "bytes" if isinstance(own, ByteTokenizer) else str(run.absolute() / output.TOKENIZER),
    }
    longest = source.config.get(_LENGTH)
    if type(longest) is int and 1 < longest < Data().sequence_length:
        fields["data.sequence_length"] = longest
    config = _checked(kind, fields, overrides, where)
    config = settle(config, own.size, None)
    _check_size(config, source, where)
    made = plan.make(kind, config.model)
    repeats, dropped, faults = plan.compare(made, kind, source.shapes)
    faults = f"{directory}: does not fit its config.json as {kind.name}: {faults}" if faults else ""
    notes = [*dropped, *(f"{name!r}: not read, and not carried along" for name in source.left)]
    if source.config.get(_MODULES) and not depth:
        notes.append(f"{_MODULES}={source.config[_MODULES]}: no such module is in the files, and none in the run")
    return Found(source, kind, config, made, own, repeats, tuple(notes), faults)


def _check_size(config: Config, source: published.Published, where: str) -> None:
    """Refuses a config of a model that cannot be the one in the files, before its shapes are looked at one by one."""
    size = sum(leaf.size for leaf in plan.arrays(config.model).values())
    held = sum(math.prod(shape) for shape in source.shapes.values())
    if size > _TIMES * (held + 2**20):
        raise UserError(f"{where}: says a model of {size:,} numbers; the files hold {held:,}")


def _checked(family: Family, fields: Mapping[str, Any], overrides: Sequence[str], where: str) -> Config:
    """The config of a published model, in which what the user asks for may change no answer of it."""
    asked = override(default(), fields)
    try:
        config = resolve(asked)
    except UserError as e:
        told = str(e)
        for key in family.keys:
            told = told.replace(f"model.{key.ours}=", f"{key.theirs}=")
        raise UserError(f"{where}: as {family.name}: {told}") from e
    changed = resolve(override(asked, overrides))
    if lines := settings.unlike(changed.model, config.model):
        raise UserError(f"--config.{lines[0]}: a converted model must compute what it did before")
    if changed.data.tokenizer != config.data.tokenizer:
        rule = "the tokenizer goes along with the run; give --tokenizer for another"
        raise UserError(f"--config.data.tokenizer={changed.data.tokenizer!r}: {rule}")
    return changed


def _family(config: Mapping[str, Any], family: str, where: str) -> Family:
    if family:
        return families.get(family)
    name = config.get("model_type")
    if isinstance(name, str) and name in families.MISSING:
        raise UserError(f"{where}: model_type={name!r}: our model lacks {families.MISSING[name]}")
    if name not in families.names():  # which is no path either: a stranger's file does not name a program
        hint = did_you_mean(str(name), families.names())
        raise UserError(f"{where}: model_type={name!r}: no such family of models; {hint}; or give --family")
    return families.get(name)


def _tokenizer(spec: str, directory: Path) -> Tokenizer:
    if not spec:
        try:
            return load_from(directory)
        except UserError as e:
            raise UserError(f"{e}; or convert from-hf with --tokenizer=bytes, or the path of another") from e
    found = parse(spec)
    if isinstance(found, int):
        raise UserError(f"--tokenizer={spec}: there is no text to train it on; valid: bytes, or a path")
    return load_json(found, f"--tokenizer={spec}") if found else ByteTokenizer()


def _modules(family: Family, layers: Any, names: Collection[str]) -> int:
    """How many modules of multi-token prediction the files hold: those come behind the layers."""
    rows = [row.theirs for row in family.rows if "{mtp}" in row.theirs]
    if not rows or type(layers) is not int:
        return 0
    return next(m for m in itertools.count() if rows[0].format(mtp=layers + m) not in names)


def link(found: Found, run: Path, progress: bool = False) -> None:
    """Writes a run directory without weights, which stay where they are: it can be traced, a layer at a time."""
    if found.faults:
        raise UserError(found.faults)
    output.check_new(run, "RUN")
    with output.appearing(run) as place, bar(progress) as shown:
        read = published.hashes(shown.track(found.source.files, description="reading"))
        check_repeats(found)
        accompany(place, found, read, **{_STAMPS: published.stamps(found.source.files)})
        output.describe_run(place, found.config, found.tokenizer)


def linked(run: Path) -> Found:
    """Returns the published model that `link` made a run of. Raises `UserError` where it is gone or another now."""
    record = read_json(run / RECORD)
    sound = isinstance(record, Mapping) and isinstance(record.get("directory"), str) and "family" in record
    if not (sound and isinstance(record.get("files"), Mapping)):
        raise UserError(f"{run / RECORD}: damaged; needs directory, family and files")
    mine = resolve(runnable(run / CONFIG))
    tokenizer = "bytes" if mine.data.tokenizer == "bytes" else str(run / output.TOKENIZER)
    kept = [f"model.compute_dtype={mine.model.compute_dtype}"]
    found = look(Path(record["directory"]), run, family=str(record["family"]), tokenizer=tokenizer, overrides=kept)
    if found.faults or (lines := settings.unlike(found.config.model, mine.model)):
        raise UserError(f"{run}: the model in {record['directory']} has changed: {found.faults or lines[0]}")
    _check_unchanged(run, found, record)
    return found._replace(config=settle(mine, found.tokenizer.size, 1))


def _check_unchanged(run: Path, found: Found, record: Mapping[str, Any]) -> None:
    """The weights are those that the run was linked to: files that were written since are read through, others not."""
    before, files = record.get(_STAMPS), sorted({info.path for info in found.source.tensors.values()})
    for path, now in zip(files, published.stamps(files).values()):
        same = isinstance(before, Mapping) and before.get(path.name) == now
        if not same and published.hashes([path])[path.name] != record["files"].get(path.name):
            rule = "its weights are others than those that the run was linked to; link a new run"
            raise UserError(f"{run}: the model in {record['directory']} has changed: {path.name}: {rule}")


def convert(found: Found, run: Path, progress: bool = False) -> None:
    """Writes the run directory, whole or not at all."""
    if found.faults:
        raise UserError(found.faults)
    output.check_new(run, "RUN")
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in found.plan.arrays.values())
    checkpoint.check_space_for(output.existing_parent(run), 2 * size)  # assembled, and in the checkpoint
    with output.appearing(run) as place, bar(progress) as shown:
        files = found.source.files
        read = published.hashes(shown.track(files, description="reading"))
        check_repeats(found)
        (place / _ASSEMBLY).mkdir()
        arrays = {}
        for path in shown.track(list(found.plan.arrays), description="converting"):
            arrays[path] = _assemble(found, path, place / _ASSEMBLY / "-".join(path))
        accompany(place, found, read)
        output.write_run(place, found.config, found.tokenizer, Weights(*plan.trees(arrays)))
        shutil.rmtree(place / _ASSEMBLY)


def read_arrays(found: Found) -> tuple[dict, dict]:
    """Returns (parameters, router state) of a published model in memory, float32."""
    return plan.trees({path: read_array(found, path) for path in found.plan.arrays})


def read_array(found: Found, path: plan.Path) -> np.ndarray:
    """Returns one of our arrays in memory, float32: beside it, one tensor is in memory at one time."""
    return _assemble(found, path, None)


def read_layer(found: Found, path: plan.Path, index: int, dtype: np.dtype) -> np.ndarray:
    """Returns one layer of one of our stacks of layers in memory; of the files, only its tensors are read."""
    array = np.empty(found.plan.arrays[path].shape[1:], dtype)
    for tensor, number in found.plan.by_path[path]:
        if (place := tensor.parts[number].index)[0] == index:
            array[place[1:]] = _part(found, tensor, number)
    return array


def _part(found: Found, tensor: plan.Tensor, number: int) -> np.ndarray:
    """What a tensor in the files has of one of our arrays."""
    numbers = safetensors.read(tensor.name, found.source.tensors[tensor.name])
    return tensor.parts[number].ours(tensor.form.split(numbers, found.config.model)[number])


def _assemble(found: Found, path: plan.Path, file: Path | None) -> np.ndarray:
    """One of our arrays, in a file or in memory, filled one tensor after the other."""
    leaf = found.plan.arrays[path]
    shape, dtype = leaf.shape, np.float32
    array = np.empty(shape, dtype) if file is None else np.memmap(file, dtype, "w+", shape=shape)
    for tensor, number in found.plan.by_path[path]:
        array[tensor.parts[number].index] = _part(found, tensor, number)
    if file is None:
        return array
    array.flush()
    del array  # what was written is on disk, and no longer in this process
    return checkpoint.on_disk(file, shape)


def check_repeats(found: Found) -> None:
    """Tensors that stand in the files twice are the same."""
    for name in sorted(found.repeats):
        other = plan.repeated(found.family, name)
        both = [safetensors.read(one, found.source.tensors[one]) for one in (name, other)]
        if both[0].shape != both[1].shape or not all(map(np.array_equal, *both)):
            rule = f"differs from {other}, whose part the model would use for both"
            raise UserError(f"{found.source.tensors[name].path}: tensor {name!r}: {rule}")


def accompany(run: Path, found: Found, read: Mapping[str, Any], **more: Any) -> None:
    """Writes what goes along with the weights into a run's directory, so that `to_hf` gives it back.

    `read`: hashes of the files. `more`: of the record.
    """
    (run / FOLDER).mkdir(exist_ok=True)
    for path in found.source.carried:
        shutil.copyfile(path, run / FOLDER / path.name)
    manifest = {
        "directory": str(found.source.path.absolute()),
        "family": found.family.name,
        "files": read,
        "dtypes": {name: info.dtype for name, info in found.source.tensors.items()},
        **more,
    }
    write_json(run / RECORD, manifest)


def config_alone(path: Path, family: str = "") -> Config:
    """Returns the config of a published model from its config.json alone, with no weights and no tokenizer beside it.

    It is for counting, not for converting: weights may be quantized, and modules of multi-token prediction are taken to
    be there as config.json says. `path`: the file, or the directory that it is in.
    """
    path = path / published.CONFIG if path.is_dir() else path
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be an object, as config.json of a published model")
    values = {name: value for name, value in values.items() if name != _QUANTIZATION}
    kind = _family(values, family, str(path))
    fields = settings.to_ours(kind, values, str(path))
    modules = values.get(_MODULES)
    has_modules = any("{mtp}" in row.theirs for row in kind.rows)
    fields["model.multi_token_prediction.depth"] = modules if has_modules and type(modules) is int else 0
    fields["model.compute_dtype"] = "bfloat16"
    fields["name"] = pattern.short(kind.name)
    return _checked(kind, fields, (), str(path))
