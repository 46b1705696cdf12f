"""From a config file and overrides to a checked `Config`: past `resolve` there are no ConfigDicts."""

import ast
import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from frugalmoe import schema
from frugalmoe.config import outside
from frugalmoe.config.checks import check
from frugalmoe.config.settle import VOCABULARY, left_open, open_again
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.fields import build, check_integer, to_dict
from frugalmoe.files import read_json
from frugalmoe.found import one_line_errors, run_file
from frugalmoe.model import pattern
from frugalmoe.shapes import NAMES, misshapen
from frugalmoe.shipped import CONFIGS, Folder

RECORD = "config.json"  # of a run's directory: the config that it was trained with

OPEN = "left_open"  # key of a record, beside the sections
_MAY_BE_OPEN = {VOCABULARY, *(f"mesh.{axis.name}" for axis in dataclasses.fields(schema.Mesh))}

# What runs did that are older than a field, where its default makes new ones do something else.
_BEFORE = {"data": {"document_start": "none"}}
# Router -> what its options were called before.
_RENAMED = {router: {"normalize": "renormalize"} for router in ("sigmoid_bias", "quantile_balance")}


def default() -> ConfigDict:
    """A locked ConfigDict with every field at its default; a config file edits it and returns it."""
    return opened(to_dict(schema.Config()))


def opened(fields: Mapping[str, Any]) -> ConfigDict:
    """A locked ConfigDict of a whole config's fields, to be edited."""
    try:
        return _open(ConfigDict(fields))
    except (AttributeError, TypeError, ValueError) as e:  # a name that ConfigDict has for itself
        raise UserError(f"a config with a name that no field can have ({e})") from e


def _open(config: ConfigDict) -> ConfigDict:
    """Locks a config but for the sections whose keys the user names."""
    config.lock()
    config.model.moe.options.unlock()
    config.model.attention_options.unlock()
    config.model.moe.losses.unlock()
    config.data.sources.unlock()
    config.optim.rates.unlock()
    config.islands.merge_options.unlock()
    return config


def recorded(config: schema.Config, settled: schema.Config) -> dict[str, Any]:
    """Returns what a run's config.json holds: the settled config, and which fields `config` left open.

    With these the run can be repeated on another number of devices, or with another tokenizer.
    """
    return to_dict(settled) | {OPEN: left_open(to_dict(config))}


def record(path: Path) -> dict[str, Any]:
    """Returns the config that ran, from a run's config.json, in the fields of today.

    Fields that are younger than the run have what the run did: the defaults, or what `_BEFORE` says. Runs that are
    older than `settle` have the fields open that their config left open. Raises `UserError` for a file that is no
    record of a run.
    """
    return _read_record(path)[0]


def asked(path: Path) -> dict[str, Any]:
    """Returns the config of a run's config.json as it was asked for: what was left open is open again.

    It is to be run: see `runnable`.
    """
    return outside.with_copies(path.parent, open_again(*_read_record(path)))


def _read_record(path: Path) -> tuple[dict[str, Any], list[str]]:
    saved = read_json(path)
    if not _is_record(saved):
        raise UserError(f"{path}: not the config of a run; it needs a name and the sections {', '.join(_SECTIONS)}")
    try:
        train = dict(saved["train"])
        if "eval_batches" in train:  # older runs count held-out rows in micro-batches
            micro_batch = train["batch_size"] // train["accumulate_steps"]
            train["eval_rows"] = train.pop("eval_batches") * micro_batch
        older = {section: {**fields, **saved[section]} for section, fields in _BEFORE.items()}
        opened = saved.pop(OPEN, [])
        if not (isinstance(opened, list) and set(opened) <= _MAY_BE_OPEN):
            raise LookupError(f"{OPEN}={opened!r}")
        found = completed({**saved, **older, "model": _renamed(saved["model"]), "train": train})
        if wrong := next(misshapen(found, _SHAPE), None):
            raise TypeError(f"{wrong} is none of its kind")
        return found, opened
    except (ArithmeticError, AttributeError, LookupError, TypeError) as e:
        raise UserError(f"{path}: a damaged config ({type(e).__name__}: {e})") from e


def _renamed(model: Mapping[str, Any]) -> dict[str, Any]:
    """The section with the options of its router, and of a router that it wraps, as they are called today."""
    moe = dict(model["moe"])
    names = lambda router, options: {_RENAMED.get(router, {}).get(name, name): v for name, v in options.items()}
    options = names(moe.get("router"), moe.get("options", {}))
    if isinstance(options.get("base_options"), Mapping):
        options["base_options"] = names(options.get("base"), options["base_options"])
    return {**model, "moe": {**moe, "options": options}}


def runnable(path: Path) -> dict[str, Any]:
    """As `record`, to run with: the run's copies stand for files outside the package that are gone or have changed."""
    return outside.with_copies(path.parent, record(path))


_SECTIONS = ("model", "data", "optim", "train", "checkpoint", "mesh")
_SHAPE = {  # what is a section in every config, whatever its fields hold
    "model": {"moe": {"options": {}, "losses": {}}, "attention_options": {NAMES: {}}},
    "data": {"sources": {NAMES: {}}},
    "optim": {"rates": {}},
    "checkpoint": {"keep_best": str},
}


def _is_record(saved: Any) -> bool:
    """Whether the content of a config.json is a config of ours, of whatever age."""
    if not isinstance(saved, Mapping) or not isinstance(saved.get("name"), str):
        return False
    sections = [saved.get(name) for name in _SECTIONS]
    return all(isinstance(s, Mapping) for s in sections) and isinstance(sections[0].get("moe"), Mapping)


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `saved` with the fields that it lacks at their defaults; those that are no fields stay."""
    from frugalmoe.model.attention import kinds
    from frugalmoe.routing import strategies

    filled = _filled(saved, schema.Config())
    data, moe = filled["data"], filled["model"]["moe"]
    data["sources"] = {name: _filled(source, schema.Source()) for name, source in data["sources"].items()}
    if moe["router"] in strategies.names():
        moe["options"] = {**to_dict(strategies.get(moe["router"]).options()), **moe["options"]}
    attention, options = filled["model"]["attention"], filled["model"]["attention_options"]
    for name in pattern.attention_names(attention):
        if name in kinds.names():
            options = {**options, name: {**to_dict(kinds.get(name).options()), **options.get(name, {})}}
    filled["model"]["attention_options"] = options
    return filled


def _filled(saved: Any, section: Any) -> Any:
    if not isinstance(saved, Mapping):
        return saved
    new = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    fill = lambda name, value: (
        _filled(saved.get(name, {}), value) if dataclasses.is_dataclass(value) else saved.get(name, to_dict(value))
    )
    return {**saved, **{name: fill(name, value) for name, value in new.items()}}


def load(spec: str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> schema.Config:
    """Returns the config that `FILE[:ARG]` or the directory of a run names: overridden, resolved and checked."""
    return resolve(override(read(spec), overrides))


def read(spec: str) -> ConfigDict:
    """Returns the `get_config(ARG)` of `FILE[:ARG]`, where FILE is a path, or the name of a config that we ship.

    Of the directory of a run, or its config.json, it returns what was asked for then.
    """
    run = Path(spec) / RECORD
    if os.path.isfile(run) or spec.endswith(".json"):
        return opened(asked(run if os.path.isfile(run) else Path(spec)))
    file, _, arg = spec.partition(":")
    get_config = python_file(CONFIGS, file, f"--config={spec}", "get_config")
    with one_line_errors(f"--config={spec}", str(CONFIGS.find(file, f"--config={spec}")), _message):
        config = get_config(arg or None)
    rule = "get_config() must edit what frugalmoe.config.default() gives, and return it"
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={spec}: returned {type(config).__name__}: {rule}")
    if missing := _missing_sections(config, default()):
        raise UserError(f"--config={spec}: without the section {missing[0]}: {rule}")
    return config


def python_file(shipped: Folder, file: str, what: str, name: str) -> Any:
    """Returns what a Python file, at a path or shipped under that name, defines as `name`.

    Raises `UserError` that begins with `what`. What the file does wrong is the user's error too, be it syntax, an
    exception or an end of the program.
    """
    path = shipped.find(file, what)
    if path.suffix != ".py":
        raise UserError(f"{what}: must be a Python file, NAME.py, that defines {name}")
    module = run_file(path, what)
    if not hasattr(module, name):
        raise UserError(f"{what}: defines no {name}")
    return getattr(module, name)


def _message(error: BaseException) -> str:
    """ConfigDict prints the whole section between what is wrong and its 'Did you mean'."""
    text = str(error)
    if " Other fields" not in text:
        return text
    lines = [line for line in text.strip("'\"").replace("\\n", "\n").splitlines() if line.strip()]
    return lines[0].split(" Other fields")[0] + (f" {lines[-1]}" if "Did you mean" in lines[-1] else "")


def _missing_sections(config: ConfigDict, whole: ConfigDict, path: str = "") -> list[str]:
    """The sections of a whole config that another lacks, or has a value for."""
    missing = []
    for name, section in whole.items():
        if isinstance(section, ConfigDict):
            found = config.get(name)
            inner = isinstance(found, ConfigDict)
            missing += _missing_sections(found, section, f"{path}{name}.") if inner else [path + name]
    return missing


def override(config: ConfigDict, overrides: Mapping[str, Any] | Sequence[str]) -> ConfigDict:
    """Returns a copy with dotted fields set; `a.b=value` strings are read as Python literals, or as text where they are
    none.

    Naming another `model.moe.router` drops the file's `model.moe.options`, which belong to its router. Naming another
    `model.attention` drops the options of the file's kinds that are not among its own, and another `islands.merge` the
    file's `islands.merge_options`.
    """
    if not isinstance(overrides, Mapping):
        overrides = dict(_parse_assignment(o) for o in overrides)
    config = config.copy_and_resolve_references()
    router = config.model.moe.router
    if overrides.get("model.moe.router", router) != router:
        config.model.moe.options = ConfigDict()  # another strategy has other options
    if overrides.get("islands.merge", config.islands.merge) != config.islands.merge:
        config.islands.merge_options = ConfigDict()
    attention = overrides.get("model.attention", config.model.attention)
    if attention != config.model.attention and isinstance(attention, str):
        kept = {pattern.short(name) for name in pattern.attention_names(attention)}
        options = config.model.attention_options
        config.model.attention_options = ConfigDict({k: v for k, v in options.items() if k in kept}).unlock()
    for name, value in overrides.items():
        _set(config, name, value)
    return config


def _parse_assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--config.{text}: an override is written --config.{text}=VALUE")
    try:
        with warnings.catch_warnings(action="ignore"):  # of text that looks like Python, as '\\d' does
            return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return name, {"true": True, "false": False}.get(value, value)


def _set(config: ConfigDict, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    node, open_keys = config, False
    for i, parent in enumerate(parents):
        if parent not in node:
            if not open_keys:
                _unknown(".".join(parents[: i + 1]), node)
            node[parent] = ConfigDict()
        node = node[parent]
        if not isinstance(node, ConfigDict):
            raise UserError(f"{dotted}: {'.'.join(parents[: i + 1])} is a value, not a section")
        open_keys = open_keys or _is_open(parents[: i + 1])
        node = node.unlock() if open_keys else node
    if leaf not in node and not open_keys:
        _unknown(dotted, node)
    if type(value) is int and value.bit_length() > 128:  # ConfigDict makes a float of it, which may not hold it
        check_integer(dotted, value)
    _check_replacement(dotted, node.get(leaf), value, open_keys or _is_open([*parents, leaf]))
    try:
        with node.ignore_type():
            node[leaf] = value
    except AttributeError as e:  # a name that ConfigDict has for itself
        raise UserError(f"{dotted}: no name for a field ({e})") from e


def _check_replacement(dotted: str, old: Any, value: Any, is_open: bool) -> None:
    """Refuses what ConfigDict would take and make something else of; types are checked in `resolve`."""
    is_mapping = isinstance(value, Mapping | ConfigDict)
    if isinstance(old, ConfigDict) and not (is_mapping and is_open):
        raise UserError(f"{dotted}={value!r}: is a section; set its fields: {', '.join(old.keys()) or 'it has none'}")
    if is_mapping and not all(isinstance(key, str) for key in value):
        raise UserError(f"{dotted}={value!r}: expected names as keys")
    if type(value) is bool and type(old) in (int, float):  # would become 1.0
        raise UserError(f"{dotted}={value!r}: expected {type(old).__name__}, got bool")


_NAMED_BY_USER = (["model", "moe", "losses"], ["data", "sources"], ["optim", "rates"])


def _is_open(path: list[str]) -> bool:
    """Whether the user names the keys of a mapping, which may also be set whole; `resolve` checks what it holds."""
    of_files = (["model", "moe", "options"], ["model", "attention_options"], ["islands", "merge_options"])
    return any(path[: len(section)] == section for section in of_files) or path in _NAMED_BY_USER


def _unknown(dotted: str, node: ConfigDict) -> None:
    raise UserError(f"{dotted}: unknown config field; {did_you_mean(dotted.split('.')[-1], node.keys())}")


def resolve(config: ConfigDict | Mapping[str, Any] | schema.Config) -> schema.Config:
    """Returns a ConfigDict as checked dataclasses. Raises `UserError` naming the field, the value and the rule."""
    resolved = typed(config)
    check(resolved)
    return resolved


def typed(config: ConfigDict | Mapping[str, Any] | schema.Config) -> schema.Config:
    """Returns a ConfigDict as dataclasses, in which each field has its type, whatever rule its value breaks."""
    from frugalmoe.routing import strategies

    resolved = build(schema.Config, _plain(config), "")
    moe = resolved.model.moe
    options = build(strategies.get(moe.router).options, moe.options, "model.moe.options")
    sources = {k: build(schema.Source, v, f"data.sources.{k}") for k, v in resolved.data.sources.items()}
    model = dataclasses.replace(
        resolved.model, moe=dataclasses.replace(moe, options=options), attention_options=_attention(resolved.model)
    )
    return dataclasses.replace(
        resolved,
        model=model,
        data=dataclasses.replace(resolved.data, sources=schema.FrozenDict(sources)),
    )


def _attention(model: schema.Model) -> schema.FrozenDict:
    """The options of every kind of attention that a model names, by the kind's short name."""
    from frugalmoe.model.attention import kinds

    given, path = model.attention_options, "model.attention_options"
    found = {pattern.short(name): kinds.get(name) for name in pattern.attention_names(model.attention)}
    for name in given:
        if name not in found:
            rule = f"no kind of attention in model.attention={model.attention!r}"
            raise UserError(f"{path}.{name}: {rule}; {did_you_mean(name, found)}")
    return schema.FrozenDict(
        {name: build(kind.options, given.get(name, {}), f"{path}.{name}") for name, kind in found.items()}
    )


def _plain(config: Any) -> Any:
    return {k: _plain(v) for k, v in config.items()} if isinstance(config, ConfigDict) else config
