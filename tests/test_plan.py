"""`frugalmoe plan`: what it prints for every config, that it keeps constraints, and what it says of bad input."""

import json
import re
import time
from pathlib import Path

import pytest

from frugalmoe.cli import main
from frugalmoe.config import load
from frugalmoe.convert.from_hf import config_alone
from frugalmoe.cost import device_catalogue, formulas, planning
from frugalmoe.data import ramp
from frugalmoe.errors import EXIT_USER_ERROR
from frugalmoe.fields import to_dict

CONFIGS = sorted(path.name for path in (Path(__file__).parents[1] / "configs").glob("*.py"))
MINI = ("plan", "--config=configs/ling_2.py:mini", "--tokens=1e12")
FIELDS = {"device_hours", "price", "currency", "mfu", "tokens_per_second", "memory_gib", "range", "layout", "why"}
CATALOGUE = device_catalogue.read()
# A published config.json (allenai/OLMoE-1B-7B-0924), in the keys that decide shapes.
OLMOE = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
}


def found(capsys, *flags):
    assert main([*flags, "--format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *flags):
    assert main(list(flags)) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def ask():
    return planning.Ask(load("configs/ling_2.py:mini"), 1e12)


def offer(name, count=None, price=1.0):
    return planning.Offer(CATALOGUE.get(name), count, price, count is not None)


def test_the_fields_that_scripts_rely_on(capsys):
    best = found(capsys, *MINI, "--devices=h800:2048,h20:512")
    assert set(best) >= FIELDS
    assert best["currency"] == "USD" and 0 < best["mfu"] < 1
    h20 = next(p for p in best["plans"] if p["devices"] == {"h20": 512})
    assert h20["price"] == pytest.approx(h20["device_hours"] * 5.64 / 7.25)  # its price is in CNY
    assert best["hours"] == pytest.approx(1e12 / best["tokens_per_second"] / 3600)
    low, high = best["range"]["price"]
    assert low < best["price"] < high and best["range"]["reasons"]
    assert len(best["plans"]) > 3 and any(len(p["devices"]) == 2 for p in best["plans"])
    mix = next(p for p in best["plans"] if p["devices"] == {"h800": 2048, "h20": 512})
    assert mix["islands"]["loss_nats"] == 0.192 and "meeting" in (mix["why"] or "meeting")
    assert all(p["memory_gib"] <= max(part["memory_available_gib"] for part in p["parts"]) for p in best["plans"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_planned_in_seconds(name, capsys):
    began = time.process_time()
    best = found(
        capsys, "plan", f"--config=configs/{name}", "--devices=h100,v5p,ling-a", "--config.model.vocab_size=157184"
    )
    assert time.process_time() - began < 20
    assert set(best) >= FIELDS and best["price"] > 0


def test_the_layout_is_one_that_a_run_may_have(capsys):
    """Its flags, given to `frugalmoe train`, settle for so many devices, and its batch is near that of the config."""
    from frugalmoe.config import settle

    best = found(capsys, *MINI, "--devices=h100:256")
    overrides = [flag.removeprefix("--config.") for flag in best["layout"]["overrides"].split()]
    config = load("configs/ling_2.py:mini", overrides)
    settled = settle(config, None, 256)
    assert to_dict(settled.mesh) == {a: best["layout"][a] for a in ("data", "fsdp", "expert", "tensor", "context")}
    assert config.train.batch_size == pytest.approx(4400, rel=0.15)


def test_no_plan_beats_the_chosen_one_in_time_and_price(capsys):
    """Nor where nothing is asked but devices: then all of one kind are used, or fewer that are no slower."""
    best = found(capsys, *MINI, "--devices=h800:2048,h20:512")
    assert not [p for p in best["plans"] if p["hours"] <= best["hours"] and p["price"] < best["price"]]
    assert found(capsys, *MINI, "--devices=h800:2048")["devices"] == {"h800": 2048}


def test_the_cheapest_that_is_in_time_wins(capsys):
    devices = "--devices=h800:1024,h100,v5p,ling-e"
    timely = found(capsys, *MINI, devices, "--deadline=10")
    assert timely["hours"] <= 240
    meeting = [p["price"] for p in timely["plans"] if p["hours"] <= 240]
    assert timely["price"] == min(meeting)
    assert all("miss the deadline" in p["why"] for p in timely["plans"] if p["why"] and p["hours"] > 240)


@pytest.mark.parametrize("flags", [("--deadline=0.01",), ("--budget=10",), ("--deadline=40", "--budget=31000")])
def test_the_nearest_feasible_value_is_feasible(flags, capsys):
    """Taken at its word, the message leads to a plan, and a tenth less does not."""
    devices = "--devices=h800:1024,v5p:256"
    if len(flags) == 2:  # a deadline that only dear plans meet
        fast = found(capsys, *MINI, devices)
        cheap = min(p["price"] for p in fast["plans"])
        flags = (f"--deadline={fast['hours'] / 24 * 1.01}", f"--budget={cheap * 1.001}")
        if fast["price"] <= cheap * 1.001:
            flags = (f"--deadline={fast['hours'] / 24 * 0.9}", f"--budget={cheap * 1.001}")
    said = refused(capsys, *MINI, devices, *flags)
    assert "binds" in said or "bind together" in said
    flag, value = re.findall(r"(--\w+)=([\d.e+]+)", said.partition("nearest feasible: ")[2])[0]
    rest = [f for f in flags if not f.startswith(flag)]
    assert found(capsys, *MINI, devices, f"{flag}={value}", *rest)["price"] > 0
    assert refused(capsys, *MINI, devices, f"{flag}={float(value) * 0.9}", *rest)


def test_a_deadline_that_costs_more_than_the_budget_says_both(capsys):
    devices = "--devices=h800:64"
    said = refused(capsys, *MINI, devices, "--deadline=1", "--budget=10")
    flags = re.findall(r"--\w+=[\d.e+]+", said.partition("nearest feasible: ")[2])
    assert [flag.partition("=")[0] for flag in flags] == ["--deadline", "--budget"]
    assert found(capsys, *MINI, devices, *flags)["price"] > 10


def test_speeds_of_islands_add_up_but_for_meeting(ask):
    parts = [planning.part(ask, offer(name, 256, price), 256) for name, price in (("h800", 2.0), ("h20", 0.8))]
    alone = [planning.plan(ask, [part]) for part in parts]
    both = planning.plan(ask, parts)
    speed = sum(1 / p.hours for p in alone) * (1 - both.transfer)
    assert 1 / both.hours == pytest.approx(speed) and 0 < both.transfer < 1
    assert both.price == pytest.approx(both.hours * 256 * 2.8)
    assert both.loss == ((2, 50), 0.1920, 0.0361) and alone[0].loss is None


def test_failures_and_preemptions_cost(ask):
    part = planning.part(ask, offer("h100", 1024), 1024)
    spot = planning.part(ask._replace(preemptions=0.01), offer("h100", 1024), 1024)
    assert spot.uptime.goodput < part.uptime.goodput < 1
    assert planning.plan(ask, [spot]).price > planning.plan(ask, [part]).price


def test_a_range_is_as_wide_as_its_reasons(ask):
    known = planning.plan(ask, [planning.part(ask, offer("h100", 64), 64)])
    unknown = planning.plan(ask, [planning.part(ask, offer("ling-a", 64), 64)])
    assert any("bandwidth_gb_s" in reason for reason, _ in unknown.widths)
    assert not any("bandwidth_gb_s" in reason for reason, _ in known.widths)
    assert unknown.high / unknown.low > known.high / known.low > 1


def test_a_published_model_is_planned_from_its_config_alone(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(OLMOE | {"quantization_config": {"quant_method": "fp8"}}), encoding="utf-8")
    total = formulas.parameters(config_alone(tmp_path).model).total
    assert total == pytest.approx(6.92e9, rel=0.001)  # arXiv 2409.02060: 6.9B
    best = found(capsys, "plan", f"--hf={file}", "--tokens=5.13e12", "--devices=h100:256")
    assert best["devices"] == {"h100": 256} and best["tokens"] == 5.13e12


def test_a_users_device_is_planned(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text(
        '[sources]\nme = { text = "measured", date = "2026-11-30" }\n[devices.mine]\nbf16_tflops = [300, "me"]\n'
        'memory_gb = [80, "me"]\nprice_per_hour = [1, "me"]\nmatmul = [0.7, "me"]\n',
        encoding="utf-8",
    )
    best = found(capsys, *MINI, f"--catalogue={file}", "--devices=mine:128")
    assert best["price"] == pytest.approx(best["device_hours"])
    assert any("calibrated here" in row["reason"] for row in best["range"]["reasons"])


def test_what_people_read_and_the_picture(tmp_path, capsys):
    picture = tmp_path / "cost.png"
    assert main([*MINI, "--devices=h800:64,ling-b:64", "--currency=rmb", f"--picture={picture}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "price CNY" in shown and "h800:64" in shown and "the price (" in shown
    assert "optimizer" in shown and "one in" in shown and "why the price may be" in shown
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--devices=h80:8",), "did you mean 'h800'"),
        (("--devices=h800:0",), "must be from 1 to"),
        (("--devices=h800:-8",), "must be from 1 to"),
        (("--devices=h800:8,h800:8",), "is there twice"),
        (("--devices=h800:8,",), "must be NAME:COUNT"),
        (("--devices=h200:8",), "no price is known; give it as --prices=h200:PRICE"),
        (("--devices=h800:8", "--spot=0.01"), "no spot price is known"),
        (("--devices=l4:8",), "bf16_tflops is not known"),
        (("--devices=a100:64", "--precision=fp8"), "a100 has none"),
        (("--devices=l40s:1",), "does not fit"),
        (("--tokens=-1",), "must be a positive number"),
        (("--tokens=nan",), "must be a positive number"),
        (("--tokens=1e40",), "must be a positive number, up to 1e+16"),
        (("--deadline=0",), "must be a positive number"),
        (("--budget=much",), "must be a positive number"),
        (("--batch=1.5",), "must be a whole number"),
        (("--currency=DM",), "unknown currency"),
        (("--prices=h800:free",), "--prices=h800:free: must be a positive number"),
        (("--prices=x:1",), "--prices=x: unknown device"),
        (("--prices=h800",), "--prices=h800: must be NAME:PRICE"),
        (("--catalogue=none.toml",), "No such file"),
        (("--hf=config.json",), "--config or --hf: give one of them"),
        (("--picture=cost.gif", "--devices=h800:8"), "must end in .png"),
        (("--picture=none/cost.png", "--devices=h800:8"), "cannot be written there"),
        (("--spot=2", "--devices=v5p:8"), "up to 1"),
    ],
)
def test_bad_input_is_one_line(flags, says, capsys):
    assert says in refused(capsys, *MINI, *flags)


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "not valid JSON"),
        ("[]", "must be an object"),
        ('{"model_type": "gpt9"}', "no such family of models"),
        (json.dumps(OLMOE | {"vocab_size": 0}), "must be positive"),
        (json.dumps({k: v for k, v in OLMOE.items() if k != "hidden_size"}), "hidden_size"),
    ],
)
def test_bad_config_files_are_one_line(content, says, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(content, encoding="utf-8")
    assert says in refused(capsys, "plan", f"--hf={file}", "--tokens=1e12", "--devices=h100:8")


def test_a_published_model_needs_its_tokens(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(OLMOE), encoding="utf-8")
    assert "--tokens: how many" in refused(capsys, "plan", f"--hf={file}", "--devices=h100:8")
    assert "no such file" in refused(capsys, "plan", f"--hf={tmp_path / 'x.json'}", "--tokens=1e9")


def test_what_meeting_takes_is_told(capsys):
    best = found(capsys, *MINI, "--devices=h800:256,h20:256", "--config.islands.bits=8")
    mix = next(p for p in best["plans"] if len(p["devices"]) == 2)["islands"]
    total = formulas.parameters(load("configs/ling_2.py:mini").model).total
    assert mix["sent_gib"] == pytest.approx(total * 8.25 / 8 / 2**30) == mix["received_gib"]
    assert mix["stored_gib"] == pytest.approx(20 * 2 * mix["sent_gib"] + 4 * total / 2**30)
    assert mix["slowest_line"] == "the store"
    good = list(mix["goodput_by_islands"].values())
    assert good == sorted(good) and good[0] < good[-1] < 1  # fewer devices fail less often


def test_tokens_that_are_not_said_are_those_of_the_config_its_batch_ramp_too(capsys):
    best = found(capsys, "plan", "--config=configs/ling_1.py:lite", "--devices=h800:512")
    train = load("configs/ling_1.py:lite").train
    assert train.ramp_from and best["tokens"] == ramp.of(to_dict(train)).before(train.steps) * 4096
    assert best["tokens"] == pytest.approx(9e12, rel=1e-3)  # as the report has it (arXiv 2503.05139)
    fixed = found(capsys, "plan", "--config=configs/ling_1.py:lite", "--devices=h800:512", "--batch=1280")
    assert fixed["tokens"] == train.steps * 1280 * 4096
