"""Loading a run directory. `write_planted_run` makes one whose routing is known; the report's tests use it too."""

import json

import numpy as np
import pytest
import tokenizers

from frugalmoe.analysis import load_run, summary_table
from frugalmoe.config import Config
from frugalmoe.data.tokenizer import JsonTokenizer
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict

# Letters: L MoE layers, N tokens, E experts, K experts per token, T row length.
E, K, T, ROWS = 8, 2, 64, 36
DOMAINS = ["plays", "code", "<i>recipes</i>"]
LAYERS = [1, 2]  # layer 0 is dense
SCRIPT = "<script>alert(1)</script>"
WORDS = ["<|endoftext|>", SCRIPT, *(f"w{i}" for i in range(28))]
STEPS = range(10, 510, 10)


def planted_selection(rng, domain_N, token_N):
    """Two experts per token. Layer 1: expert 3 takes 90% of code; layer 2: expert 5 takes SCRIPT; else at random."""
    scores_LNE = rng.random((len(LAYERS), token_N.size, E))
    scores_LNE[0, :, 3] += (domain_N == 1) & (rng.random(token_N.size) < 0.9)
    scores_LNE[1, :, 5] += token_N == 1
    return scores_LNE >= np.sort(scores_LNE, axis=-1)[..., -K, None]


def write_planted_run(path, seed=0):
    rng = np.random.default_rng(seed)
    (path / "tokenizer").mkdir(parents=True)
    config = to_dict(Config())
    config["name"] = "planted & <b>bold</b>"
    config["model"]["num_layers"], config["model"]["num_dense_layers"] = 3, 1
    config["train"]["steps"], config["data"]["sequence_length"] = 500, T
    _write_json(path / "config.json", config)
    _write_json(path / "environment.json", {"git_commit": "abc", "command": ["/x/frugalmoe", "train", "--config=a b"]})
    _write_lines(path / "metrics.jsonl", [row for step in STEPS for row in _metric_rows(rng, step)])
    loads = [{"step": s, "layers": LAYERS, "counts": _counts(rng)} for s in STEPS]
    _write_lines(path / "expert_load.jsonl", loads)
    row_N = np.arange(ROWS * T) // T
    domain_N, token_N = row_N % len(DOMAINS), rng.integers(1, len(WORDS), ROWS * T)
    np.savez_compressed(
        path / "probe.npz",
        token_ids=token_N.astype(np.int32),
        domain_ids=domain_N.astype(np.int32),
        segment_ids=np.ones(ROWS * T, np.int32),
        positions=(np.arange(ROWS * T) % T).astype(np.int32),
        loss=rng.random(ROWS * T).astype(np.float32),
        selected=np.packbits(planted_selection(rng, domain_N, token_N), axis=-1),
        layers=np.array(LAYERS),
        num_experts=E,
        row_length=T,
    )
    _write_json(path / "summary.json", _summary())
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    JsonTokenizer(model.to_str(), WORDS[0], "test").save_into(path / "tokenizer")
    return path


def _metric_rows(rng, step):
    routers = {f"router/max_violation/layer_{l:02d}": 0.2 * l + 0.02 * rng.random() for l in LAYERS}
    routers |= {f"router/entropy/layer_{l:02d}": 1.9 for l in LAYERS}
    loss = 2 + 3 * np.exp(-step / 60) + 0.05 * rng.random()
    yield {"step": step, "loss/ce": loss, "speed/tokens_per_second": 1e4 + step, **routers}
    if step % 100 == 0:
        named = {f"eval/loss/{d}": 2.1 + 0.1 * i + 100 / step for i, d in enumerate(DOMAINS)}
        yield {"step": step, **named, "eval/loss/mean": 2.2 + 100 / step}


def _counts(rng):
    """Layer 1 gives expert 0 three times its share (weights 3, 1, ... 1: 3 / 10 of the slots), layer 2 is uniform."""
    skewed = [0.3, *[0.1] * 7]
    return [rng.multinomial(4096, skewed).tolist(), rng.multinomial(4096, [1 / E] * E).tolist()]


def _summary():
    losses = {"plays": 2.3, "code": 2.4, "<i>recipes</i>": 2.5, "mean": 2.4}
    return {
        "status": "complete",
        "step": 500,
        "steps": 500,
        "domains": DOMAINS,
        "eval": {"loss": losses, "bits_per_byte": {d: v / 3 for d, v in losses.items()}},
        "parameters": {"total": 3_400_000, "active": 1_200_000, "embedding": 70_000},
        "speed": {"tokens_per_second": 10_250.0, "train_seconds": 12.0, "step_seconds": 0.1},
        "router": {
            "name": "topk_softmax",
            "causal": "safe",
            "layers": {f"layer_{l:02d}": {"max_violation": 0.2 * l, "load_entropy": 2.0} for l in LAYERS},
        },
        "sample": {"prompt": "To be <br>", "text": "or </pre><script>\x00"},
    }


def _write_json(path, value):
    path.write_text(json.dumps(value))


def _write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path):
    return write_planted_run(tmp_path / "runs" / "planted")


def test_everything_is_read(run_dir):
    run = load_run(run_dir)
    steps, values = run.series("loss/ce")
    assert steps.tolist() == list(STEPS) and values.shape == steps.shape
    assert run.series("eval/loss/code").steps.tolist() == [100, 200, 300, 400, 500]
    assert sorted(run.layers("max_violation")) == LAYERS
    assert run.loads.counts_SLE.shape == (len(STEPS), len(LAYERS), E)
    assert (run.loads.counts_SLE.sum(-1) == 4096).all()
    assert run.probe.selected_LNE.shape == (len(LAYERS), ROWS * T, E)
    assert (run.probe.selected_LNE.sum(-1) == K).all()
    assert np.bincount(run.probe.unit_ids_N).tolist() == [T] * ROWS
    assert run.domains == DOMAINS
    assert run.tokenizer.decode([1]) == SCRIPT


def test_padding_is_left_out_and_rows_that_mix_domains_fall_into_documents(run_dir):
    with np.load(run_dir / "probe.npz") as file:
        arrays = dict(file)
    arrays["has_target"] = np.arange(ROWS * T) != 12
    arrays["segment_ids"][:10] = 0  # row 0 begins with ten padded tokens
    arrays["segment_ids"][T + 4 : 2 * T], arrays["domain_ids"][T + 4 : 2 * T] = 2, 0  # row 1: 4 tokens code, then plays
    np.savez_compressed(run_dir / "probe.npz", **arrays)
    probe = load_run(run_dir).probe
    assert probe.token_ids_N.size == ROWS * T - 10
    assert np.flatnonzero(np.isnan(probe.loss_N)).tolist() == [2]  # token 12 less the 10 of padding
    assert np.bincount(probe.unit_ids_N)[:3].tolist() == [T - 10, 4, T - 4]


@pytest.mark.parametrize("name", ["expert_load.jsonl", "probe.npz", "summary.json", "environment.json"])
def test_a_run_in_progress_may_lack_files(run_dir, name):
    (run_dir / name).unlink()
    run = load_run(run_dir)
    assert run.domains == DOMAINS


def test_a_line_that_is_still_being_written_is_left_out(run_dir):
    before = load_run(run_dir).series("loss/ce").steps
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 510, "loss/c')
    assert load_run(run_dir).series("loss/ce").steps.tolist() == before.tolist()


DAMAGE = [
    ("metrics.jsonl", '{"step": 1}\n{"step": \n', r"metrics.jsonl line 2: not valid JSON"),
    ("metrics.jsonl", '{"loss/ce": 1}\n', r"metrics.jsonl line 1: expected a JSON object with an integer 'step'"),
    ("metrics.jsonl", '{"step": 1, "loss/ce": "high"}\n', r"line 1: loss/ce='high': expected a number"),
    (
        "expert_load.jsonl",
        '{"step": 1, "layers": [1], "counts": [[1, 2], [3]]}\n',
        r"expert_load.jsonl line 1: 'counts'",
    ),
    ("expert_load.jsonl", '{"step": 1, "layers": [1], "counts": 7}\n', r"expert_load.jsonl line 1: 'counts'"),
    ("summary.json", "[1]", r"summary.json: expected a JSON object, got list"),
    ("config.json", "{", r"config.json: not valid JSON"),
    ("probe.npz", "not a zip", r"probe.npz: not a readable probe"),
    ("tokenizer/tokenizer_config.json", "{", r"tokenizer_config.json: not readable as JSON"),
]


@pytest.mark.parametrize("name, content, message", DAMAGE)
def test_a_damaged_file_is_named_with_its_line(run_dir, name, content, message):
    (run_dir / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_run(run_dir)
    assert "\n" not in str(error.value)


def test_a_probe_that_lacks_an_array_is_named(run_dir):
    np.savez(run_dir / "probe.npz", token_ids=np.zeros(4, np.int32), row_length=2)
    with pytest.raises(UserError, match=r"probe.npz: not a readable probe \(KeyError"):
        load_run(run_dir)


def test_a_path_that_is_no_run_names_the_nearest_run(run_dir):
    with pytest.raises(UserError, match=r"no config.json\); did you mean 'planted'\?"):
        load_run(run_dir.with_name("plantd"))
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl: missing"):
        load_run(run_dir)


def test_an_unknown_metric_names_the_nearest(run_dir):
    with pytest.raises(UserError, match=r"no metric 'loss/cee'; did you mean 'loss/ce'\?"):
        load_run(run_dir).series("loss/cee")


def test_the_terminal_table_has_every_headline(run_dir):
    from rich.console import Console

    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(summary_table(load_run(run_dir)))
    shown = capture.get()
    for part in ("plays", "2.300 nats", "10,250 tokens/s", "3.40 M total, 1.20 M active", "layer 2", "causality: safe"):
        assert part in shown
