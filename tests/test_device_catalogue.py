"""The device catalogue: every cell with source and date, users' files over it, and bad rows refused in one line."""

import tomllib

import pytest

from frugalmoe.cost import device_catalogue
from frugalmoe.cost.device_catalogue import ASSUMED, CELLS, SHIPPED
from frugalmoe.errors import UserError

OURS = device_catalogue.read()
ROW = """
[sources]
mine = {{ text = "our data sheet", date = "2026-11-30" }}
[devices.{name}]
{cells}
"""


def with_file(tmp_path, cells, name="mine", text=ROW):
    path = tmp_path / "devices.toml"
    path.write_text(text.format(name=name, cells=cells), encoding="utf-8")
    return device_catalogue.read(path)


def test_every_cell_has_a_source_with_a_date():
    raw = tomllib.loads(SHIPPED.read_text(encoding="utf-8"))
    used = set()
    for row in raw["devices"].values():
        used |= {cell[1] for key, cell in row.items() if key in CELLS}
    used |= {cell[1] for cell in raw["currencies"].values()}
    assert used == set(raw["sources"]), "a source that no cell has, or a cell without one"
    for entry in OURS.entries.values():
        assert all(cell.source and cell.date[:2] == "20" for cell in entry.cells.values()), entry.name


def test_lings_devices_are_those_of_its_table():
    """2503.05139, table 1: TFLOPS, GB, RMB an hour, FP8."""
    table = {
        "a": (370, 64, 7, False),
        "b": (120, 96, 4.5, False),
        "c": (312, 80, 10, False),
        "d": (989, 80, 27.5, True),
        "e": (147, 96, 5.64, True),
    }
    for letter, (tflops, memory, price, fp8) in table.items():
        entry = OURS.get(f"ling-{letter}")
        found = [entry.cells[name].value for name in ("bf16_tflops", "memory_gb", "price_per_hour")]
        assert found == [tflops, memory, price] and entry.currency == "CNY"
        assert ("fp8" in entry.device().peak) == fp8
    assert OURS.convert(7.25, "CNY", "USD") == pytest.approx(1)


def test_what_is_borrowed_or_assumed_is_told():
    a = OURS.get("ling-a")
    assert a.cells["bandwidth_gb_s"].source.startswith("as ascend-910b") and "bandwidth_gb_s" in a.borrowed
    assert "bf16_tflops" not in a.borrowed
    assert OURS.get("a100").cells["network_gb_s"].source.startswith("assumed")
    assert OURS.get("h200").value("price_per_hour") is None, "the price of an H100 is none of an H200"
    assert set(ASSUMED) <= set(CELLS)


def test_a_users_file_stands_before_ours_cell_by_cell(tmp_path):
    found = with_file(tmp_path, 'price_per_hour = [1.5, "mine"]\ncurrency = "CNY"', name="h100")
    h100 = found.get("h100")
    assert (h100.value("price_per_hour"), h100.currency) == (1.5, "CNY")
    assert h100.cells["bf16_tflops"] == OURS.get("h100").cells["bf16_tflops"]
    new = with_file(tmp_path, 'bf16_tflops = [10, "mine"]\nmemory_gb = [16, "mine"]\nlike = "l40s"').get("mine")
    assert new.device().peak == {"bf16": 1e13}
    assert new.device().bandwidth == 864e9
    assert new.cells["memory_gb"] == (16.0, "our data sheet", "2026-11-30", True)


@pytest.mark.parametrize(
    "cells, says",
    [
        ("memory_gb = 80", "a cell without its source is not taken"),
        ("memory_gb = [80]", "a cell without its source is not taken"),
        ('memory_gb = [80, "nobody"]', "source 'nobody' is not among [sources]"),
        ('memory_gb = [-80, "mine"]', "must be from 0.01"),
        ('memory_gb = [nan, "mine"]', "must be a number"),
        ('memory_gb = [true, "mine"]', "must be a number"),
        ('bf16_tflops = [1e30, "mine"]', "must be from"),
        ('price_per_hour = [-1, "mine"]', "must be from"),
        ('memori_gb = [80, "mine"]', "did you mean 'memory_gb'?"),
        ('platform = "gpus"', "valid: gpu, tpu, cpu, npu"),
        ('currency = "DM"', "unknown currency"),
        ('like = "nothing"', "no device to borrow of"),
        ("title = 3", "must be a text"),
    ],
)
def test_bad_rows_are_refused_by_name(tmp_path, cells, says):
    with pytest.raises(UserError) as error:
        with_file(tmp_path, cells)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("[devices", "no TOML"),
        ("[sources]\nx = 3", "sources.x: must be a table"),
        ("devices = 3", "must be a table"),
        ("[prices]\nx = 3", "unknown section"),
        ('[sources]\nx = {{ text = "a" }}\n[devices.y]\nmemory_gb = [1, "x"]', "sources.x: has no date"),
        ('[sources]\nx = {{ text = "", date = "2026" }}\n[devices.y]\nmemory_gb = [1, "x"]', "sources.x: has no text"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, says):
    with pytest.raises(UserError) as error:
        with_file(tmp_path, "", text=text)
    assert says in str(error.value) and "devices.toml" in str(error.value)


def test_a_file_that_is_not_there_and_a_device_without_a_peak(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        device_catalogue.read(tmp_path / "none.toml")
    with pytest.raises(UserError, match="did you mean 'h800'"):
        OURS.get("h80")
    with pytest.raises(UserError, match="memory_gb is not known"):
        with_file(tmp_path, 'bf16_tflops = [1, "mine"]').get("mine").device()
