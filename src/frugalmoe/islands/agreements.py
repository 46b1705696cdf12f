"""What all islands of a directory have in common: made by the first, and compared by every other one."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.islands import records
from frugalmoe.islands.records import FORMAT, Agreement, Damaged
from frugalmoe.islands.store import Store
from frugalmoe.schema import Config

# Of the model, what each island may choose for itself: how it computes, not what.
_OWN = ("compute_dtype", "remat")
_OWN_OF_MOE = ("executor", "exchange", "exchange_room", "capacity_factor", "drop_order")


def of(config: Config, data: str, tokenizer: str) -> Agreement:
    """Returns what a settled config has in common with all islands of its directory."""
    model = {name: value for name, value in to_dict(config.model).items() if name not in _OWN}
    model["moe"] = {name: value for name, value in model["moe"].items() if name not in _OWN_OF_MOE}
    plain = json.loads(json.dumps({"model": model, "islands": to_dict(config.islands)}))
    return Agreement(
        format=FORMAT, data=data, tokenizer=tokenizer, seed=config.train.seed, steps=config.train.steps, **plain
    )


def check(store: Store, agreement: Agreement, unknown: Collection[str] = ()) -> None:
    """Raises `UserError` that names in what this island differs from a directory; nothing where that is new.

    unknown: fields that are not compared yet.
    """
    data = store.read(records.AGREEMENT)
    if data is None:
        return
    where = f"--islands={store.place}"
    try:
        there = records.from_bytes(Agreement, data, records.AGREEMENT)
    except Damaged as e:
        raise UserError(f"{where}: no directory of islands, or of another version ({e})") from e
    for field in (field for field in dataclasses.fields(Agreement) if field.name not in unknown):
        ours, theirs = (_flat(field.name, getattr(a, field.name)) for a in (agreement, there))
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                rule = "all islands of a directory must have the same"
                raise UserError(f"{where}: {name} is {theirs.get(name)!r} there and {ours.get(name)!r} here; {rule}")


def _flat(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: list(value) if isinstance(value, tuple) else value}
    return {name: inner for key in value for name, inner in _flat(f"{path}.{key}", value[key]).items()}
