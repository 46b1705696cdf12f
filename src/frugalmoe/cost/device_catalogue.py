"""The device catalogue: what accelerators can do and what they cost, each cell with its source and date.

`cost/devices.toml` is ours and tells the form; `read` puts a user's file over it, cell by cell.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from frugalmoe.cost.formulas import Device
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.files import write_atomically

SHIPPED = Path(__file__).with_name("devices.toml")
USERS = Path("~/.config/frugalmoe/devices.toml")  # `frugalmoe calibrate` writes there unless it is told another place
PLATFORMS = ("gpu", "tpu", "cpu", "npu")
PEAKS = {"bf16_tflops": "bf16", "fp8_tflops": "fp8", "fp32_tflops": "fp32"}
# Cells with their unit and the range of what is no slip; a number beyond it is refused.
CELLS = {
    **{name: (1e12, 1e-5, 1e5) for name in PEAKS},
    "memory_gb": (1e9, 0.01, 1e5),
    "bandwidth_gb_s": (1e9, 0.01, 1e6),
    "link_gb_s": (1e9, 1e-4, 1e5),
    "network_gb_s": (1e9, 1e-4, 1e5),
    "node": (1, 1, 1e5),
    "price_per_hour": (1, 1e-4, 1e3),
    "spot_per_hour": (1, 1e-4, 1e3),
    "power_w": (1, 1, 1e5),
    "mtbf_hours": (1, 1, 1e8),
    "matmul": (1, 0.001, 100),
    "grouped": (1, 0.001, 100),
    "attention": (1, 0.001, 100),
}
_TEXTS = ("title", "platform", "currency", "like")
# What stands in for a cell that neither the device nor the one that it is like has. Each widens the range of a plan.
ASSUMED = {
    "bandwidth_gb_s": (1600.0, "as other HBM2e devices, A100 and Ascend 910B"),
    "link_gb_s": (32.0, "PCIe 4 x16"),
    "network_gb_s": (25.0, "a NIC of 200 Gb/s for each device"),
    "node": (8.0, "a usual node"),
    "mtbf_hours": (21_200.0, "between Meta's H100, 50,700, and Ant's fleet, 8,900"),
}
USABLE = 0.95  # of the memory of a GPU, as frugalmoe/devices.py; of TPUs the cell is what a program may take


class Cell(NamedTuple):
    value: float  # in the unit of its name
    source: str
    date: str
    own: bool = True  # of the device itself, not of one that it is like, nor assumed


class Entry(NamedTuple):
    """A device of the catalogue."""

    name: str
    title: str
    platform: str
    currency: str
    cells: Mapping[str, Cell]

    def value(self, name: str) -> float | None:
        """In base units: FLOP/s, bytes, bytes per second, devices, hours, money per hour, watts."""
        cell = self.cells.get(name)
        return cell.value * CELLS[name][0] if cell else None

    @property
    def borrowed(self) -> tuple[str, ...]:
        """Cells that are another device's, or assumed."""
        return tuple(name for name, cell in self.cells.items() if not cell.own)

    def device(self) -> Device:
        """What the model of a step asks; raises `UserError` for a device without a peak or memory."""
        peak = {precision: self.value(name) for name, precision in PEAKS.items() if name in self.cells}
        for what, known in (("bf16_tflops", peak), ("memory_gb", "memory_gb" in self.cells)):
            if not known:
                rule = (
                    "is not known, and no plan can be made without it; give it in a file of your own, --catalogue=FILE"
                )
                raise UserError(f"--devices={self.name}: {what} {rule}")
        return Device(
            name=self.name,
            platform=self.platform,
            peak=peak,
            memory=self.value("memory_gb") * (1 if self.platform in ("tpu", "cpu") else USABLE),
            bandwidth=self.value("bandwidth_gb_s"),
            link=self.value("link_gb_s"),
            network=self.value("network_gb_s"),
            node=int(self.value("node")),
            **{share: self.value(share) or 0.0 for share in ("matmul", "grouped", "attention")},
        )


class Catalogue(NamedTuple):
    entries: Mapping[str, Entry]
    currencies: Mapping[str, float]  # units for one US dollar

    def get(self, name: str, flag: str = "--devices") -> Entry:
        """`flag`: what the user wrote the name in."""
        if name not in self.entries:
            raise UserError(f"{flag}={name}: unknown device; {did_you_mean(name, self.entries)}")
        return self.entries[name]

    def convert(self, amount: float, currency: str, wanted: str) -> float:
        return amount / self.currencies[currency] * self.currencies[wanted]


def read(*files: Path) -> Catalogue:
    """Returns the shipped catalogue with users' files over it, in their order."""
    merged: dict[str, Any] = {"devices": {}, "sources": {}, "currencies": {}}
    for file in (SHIPPED, *files):
        found = _checked(_load(file), file)
        merged["sources"] |= found.get("sources", {})
        merged["currencies"] |= _cells(found.get("currencies", {}), merged["sources"], file, "currencies", None)
        for name, row in found.get("devices", {}).items():
            cells = _cells(row, merged["sources"], file, f"devices.{name}", CELLS)
            texts = {key: row[key] for key in _TEXTS if key in row}
            old_texts, old_cells = merged["devices"].get(name, ({}, {}))
            merged["devices"][name] = old_texts | texts, old_cells | cells
    currencies = {name: cell.value for name, cell in merged["currencies"].items()}
    entries = {name: _entry(name, merged["devices"], currencies) for name in merged["devices"]}
    return Catalogue(entries, currencies)


def add(file: Path, source: Mapping[str, str], name: str, row: Mapping[str, Any]) -> None:
    """Writes a device into a user's file, beside those that are there; one of the same name is replaced.

    source: of its cells, text and date. row: texts, and the number of each cell. Comments in the file are lost.
    """
    found = _checked(_load(file), file) if file.is_file() else {}
    found.setdefault("sources", {})[name] = dict(source)
    found.setdefault("devices", {})[name] = {
        key: value if isinstance(value, str) else [float(f"{value:.6g}"), name] for key, value in row.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, _dumped(found).encode())
    read(file)


def _dumped(found: Mapping[str, Any]) -> str:
    """A catalogue as TOML; texts, numbers, dates and lists of them are written alike in JSON."""
    quoted = lambda value: json.dumps(value, ensure_ascii=False)
    inline = lambda table: "{ " + ", ".join(f"{quoted(k)} = {quoted(v)}" for k, v in table.items()) + " }"
    lines = []
    for section in ("currencies", "sources"):
        if table := found.get(section):
            show = inline if section == "sources" else quoted
            lines += [f"[{section}]", *(f"{quoted(name)} = {show(value)}" for name, value in table.items()), ""]
    for name, row in found["devices"].items():
        lines += [f"[devices.{quoted(name)}]", *(f"{key} = {quoted(value)}" for key, value in row.items()), ""]
    return "\n".join(lines)


def _load(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"--catalogue={file}: {e.strerror or e}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"--catalogue={file}: no TOML: {e}") from e


def _checked(found: dict[str, Any], file: Path) -> dict[str, Any]:
    """The sections of a file, each a table of tables, with no other key."""
    for section, value in found.items():
        if section not in ("devices", "sources", "currencies"):
            rule = did_you_mean(section, ("devices", "sources", "currencies"))
            raise UserError(f"--catalogue={file}: {section}: unknown section; {rule}")
        if not isinstance(value, dict):
            raise UserError(f"--catalogue={file}: {section}: must be a table")
    for section in ("devices", "sources"):
        for name, row in found.get(section, {}).items():
            if not isinstance(row, dict):
                raise UserError(f"--catalogue={file}: {section}.{name}: must be a table")
    for name, row in found.get("devices", {}).items():
        for key in row:
            if key not in CELLS and key not in _TEXTS:
                rule = did_you_mean(key, [*CELLS, *_TEXTS])
                raise UserError(f"--catalogue={file}: devices.{name}.{key}: unknown cell; {rule}")
            if key in _TEXTS and not isinstance(row[key], str):
                raise UserError(f"--catalogue={file}: devices.{name}.{key}={row[key]!r}: must be a text")
    return found


def _cells(row: dict, sources: dict, file: Path, where: str, known: Mapping | None) -> dict[str, Cell]:
    """The cells of a row, each with a number in its range, and with a source that has a text and a date."""
    found = {}
    for name, cell in row.items():
        if known is not None and name not in known:
            continue
        what = f"--catalogue={file}: {where}.{name}"
        if not isinstance(cell, list) or len(cell) != 2 or not isinstance(cell[1], str):
            raise UserError(f'{what}={cell!r}: must be [number, "source"]: a cell without its source is not taken')
        number, key = cell
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise UserError(f"{what}={number!r}: must be a number")
        source = sources.get(key)
        if not isinstance(source, dict):
            raise UserError(f"{what}: source {key!r} is not among [sources]; {did_you_mean(key, sources)}")
        for part in ("text", "date"):
            if not isinstance(source.get(part), str) or not source[part].strip():
                raise UserError(f"--catalogue={file}: sources.{key}: has no {part}")
        least, most = known[name][1:] if known else (1e-9, 1e9)
        if not least <= number <= most:
            raise UserError(f"{what}={number:g}: must be from {least:g} to {most:g}")
        found[name] = Cell(float(number), source["text"], source["date"])
    return found


def _entry(name: str, rows: Mapping[str, tuple[dict, dict]], currencies: Mapping[str, float]) -> Entry:
    texts, cells = rows[name]
    platform, currency = texts.get("platform", "gpu"), texts.get("currency", "USD")
    if platform not in PLATFORMS:
        raise UserError(f"catalogue: devices.{name}.platform={platform!r}: valid: {', '.join(PLATFORMS)}")
    if currency not in currencies:
        rule = did_you_mean(currency, currencies)
        raise UserError(f"catalogue: devices.{name}.currency={currency!r}: unknown currency; {rule}")
    whole = dict(cells)
    if like := texts.get("like"):
        if like not in rows or "like" in rows[like][0]:
            others = [other for other, (of_other, _) in rows.items() if "like" not in of_other]
            raise UserError(
                f"catalogue: devices.{name}.like={like!r}: no device to borrow of; {did_you_mean(like, others)}"
            )
        for cell, borrowed in rows[like][1].items():
            if cell not in ("price_per_hour", "spot_per_hour"):  # what another costs is no price of this one
                whole.setdefault(cell, borrowed._replace(source=f"as {like}: {borrowed.source}", own=False))
    for cell, (value, why) in ASSUMED.items():
        whole.setdefault(cell, Cell(value, f"assumed: {why}", "2026-11", own=False))
    return Entry(name, texts.get("title", name), platform, currency, whole)
