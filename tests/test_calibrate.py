"""`frugalmoe calibrate`: the row that it writes gives the measured times back, and a plan reads it."""

import json
import tomllib

import jax
import pytest

from frugalmoe import sharding
from frugalmoe.cli import main
from frugalmoe.config import load
from frugalmoe.cost import calibration, device_catalogue, formulas
from frugalmoe.cost.formulas import ASSUMED, TRAIN_FACTOR, Device, Layout
from frugalmoe.errors import EXIT_USER_ERROR

CONFIG = "configs/quickstart.py:laptop"
SMALL = ["model.vocab_size=512", "train.batch_size=2", "data.sequence_length=64"]
SECONDS = {
    "large product": 2e-3,
    "norms and residual": 3e-4,
    "products": 5e-3,
    "attention": 4e-3,
    "experts": 9e-3,
}


@pytest.fixture(scope="module")
def small():
    return load(CONFIG, SMALL)


def test_the_formulas_give_measured_times_back(small):
    """Whatever was measured: here times that nobody measured, of operators that are slower than their bytes."""
    cells = calibration.cells(small, SECONDS, 1e9)
    assert cells["fp32_tflops"] == pytest.approx(2 * 1024**3 / 2e-3 / 1e12)
    shares = {name: cells[name] for name in ("matmul", "grouped", "attention")}
    peak, bandwidth = cells["fp32_tflops"] * 1e12, cells["bandwidth_gb_s"] * 1e9
    device = Device("here", "cpu", {"fp32": peak}, 1e10, bandwidth, 1e9, 1e9, 1, **shares)
    layout = Layout(sequences=2, remat="none")
    parts = formulas.forward_seconds(small, layout, device, "bf16", ASSUMED)
    layers, moe = small.model.num_layers, len(formulas.pattern.moe_layers(small.model))
    of_layer = lambda name, count: TRAIN_FACTOR * sum(parts[name]) / count
    assert of_layer("norms and residual", layers) == pytest.approx(3e-4)
    assert of_layer("attention products", layers) == pytest.approx(4e-3)
    assert of_layer("routed experts", moe) == pytest.approx(9e-3)
    products = parts["attention projections"][0] / layers + parts["shared experts"][0] / moe
    assert TRAIN_FACTOR * products == pytest.approx(5e-3)


def test_a_link_that_is_not_there_is_none_of_the_cells(small, tmp_path):
    """One accelerator has nobody to talk to; a plan then takes what the catalogue assumes, and says so."""
    cells = calibration.cells(small, SECONDS, None)
    assert not {"link_gb_s", "network_gb_s"} & cells.keys()
    assert cells == {name: value for name, value in calibration.cells(small, SECONDS, 1e9).items() if name in cells}
    file, source = tmp_path / "own.toml", {"text": "a test", "date": "2026-11-30"}
    shares = dict.fromkeys(("matmul", "grouped", "attention"), 0.5)
    device_catalogue.add(file, source, "here", {"title": "one", "platform": "gpu", **cells, **shares})
    entry = device_catalogue.read(file).get("here")
    assert entry.value("link_gb_s") == device_catalogue.ASSUMED["link_gb_s"][0] * 1e9
    assert not entry.cells["link_gb_s"].own and entry.cells["bandwidth_gb_s"].own


def test_what_is_measured_is_what_a_step_does(small):
    """Values and gradients of the right shapes, forward and backward, and every operator is called equally often."""
    with jax.set_mesh(sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])):
        operators = calibration.operators(small)
        shapes = {name: jax.eval_shape(op.run, *op.arguments) for name, op in operators.items()}
    assert set(shapes) == set(SECONDS)
    tokens, moe = 2 * 64, small.model.moe
    _, (weight, x, up, down) = shapes["experts"]
    assert weight.shape == (tokens, moe.num_experts_per_token) and x.shape == (tokens, small.model.dim)
    assert up.shape == (moe.num_experts, small.model.dim, 2, moe.expert_dim) and down.shape[0] == moe.num_experts
    _, (q, k, _) = shapes["attention"]
    assert q.shape == (2, 64, small.model.num_heads, small.model.head_dim) and k.shape[2] == small.model.num_kv_heads


@pytest.mark.slow
def test_a_row_is_written_and_a_plan_reads_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "SECONDS", 0.1)
    file = tmp_path / "new" / "devices.toml"
    flags = [f"--config={CONFIG}", *(f"--config.{field}" for field in SMALL)]
    assert main(["calibrate", *flags, f"--catalogue={file}"]) == 0
    assert "here is in" in capsys.readouterr().out
    entry = device_catalogue.read(file).get("here")
    assert entry.platform == "cpu" and "frugalmoe calibrate" in entry.cells["matmul"].source
    assert all(cell.own for name, cell in entry.cells.items() if name != "mtbf_hours")
    plan = ["plan", *flags, f"--catalogue={file}", "--devices=here:1", "--prices=here:0", "--tokens=1e6"]
    assert main([*plan, "--format=json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert best["price"] == 0 and best["parts"][0]["step_seconds"]["total"] > 0
    assert any("calibrated here" in row["reason"] for row in best["range"]["reasons"])


def test_a_row_is_added_beside_others(tmp_path):
    file = tmp_path / "devices.toml"
    file.write_text(
        '[currencies]\nEUR = [0.9, "me"]\n[sources]\nme = { text = "a \\"quoted\\" ü", date = "2026-11-30" }\n'
        '[devices.other]\ntitle = "Other"\nbf16_tflops = [1, "me"]\nmemory_gb = [16, "me"]\n',
        encoding="utf-8",
    )
    source = {"text": "measured", "date": "2026-11-30"}
    for value in (0.5, 0.25):
        device_catalogue.add(file, source, "here", {"title": "CPU", "platform": "cpu", "matmul": value})
    found = device_catalogue.read(file)
    assert found.get("here").value("matmul") == 0.25 and found.get("other").title == "Other"
    assert found.currencies["EUR"] == 0.9
    assert found.get("other").cells["memory_gb"].source == 'a "quoted" ü'
    assert set(tomllib.loads(file.read_text(encoding="utf-8"))["devices"]) == {"other", "here"}


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--name=My GPU",), "must be small letters"),
        (("--name=",), "must be small letters"),
        (("--catalogue=/proc/none/devices.toml",), "cannot be written there"),
    ],
)
def test_bad_input_is_one_line(flags, says, capsys):
    assert main(["calibrate", f"--config={CONFIG}", "--config.model.vocab_size=512", *flags]) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


def test_a_damaged_catalogue_is_refused_before_anything_is_measured(tmp_path, capsys):
    file = tmp_path / "devices.toml"
    file.write_text("[devices", encoding="utf-8")
    flags = [f"--config={CONFIG}", "--config.model.vocab_size=512", f"--catalogue={file}"]
    assert main(["calibrate", *flags]) == EXIT_USER_ERROR
    assert "no TOML" in capsys.readouterr().err and file.read_text(encoding="utf-8") == "[devices"
