"""`frugalmoe trace RUN`: routes the same held-out tokens through each checkpoint, one file per checkpoint.

RUN/trace/step_00000100.npz holds the columns of `train.evaluate.probe_columns` but the bits of the selection, and

| array | |
|---|---|
| expert, weight | [L, N, K] uint16 and float32: the plan, token-major; expert E fills up tokens of fewer than K |
| router/NAME | [L] `routing.stats.metrics` of the traced tokens |
| step, domains, tokens | the checkpoint, names of the domains, what --tokens asked for |
| config, data, tokenizer | fingerprints of what the trace depends on |

Letters: L MoE layers, N tokens, E experts, K experts per token.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from rich.progress import track

from frugalmoe import sharding
from frugalmoe.analysis.lab import streamed
from frugalmoe.analysis.lab.lab import TOKENS, moe_layers
from frugalmoe.analysis.stored.probe import read_columns
from frugalmoe.analysis.stored.trace import FOLDER, check_file, fingerprints, trace_files
from frugalmoe.config import RECORD, resolve, runnable
from frugalmoe.convert import from_hf
from frugalmoe.errors import UserError
from frugalmoe.fields import check_integer, to_dict
from frugalmoe.files import write_atomically
from frugalmoe.routing import stats
from frugalmoe.train import saved
from frugalmoe.train.evaluate import Scores, Traced, evaluate, limited, probe_columns
from frugalmoe.train.saved import Damaged
from frugalmoe.train.step import make_eval_step
from frugalmoe.train.weights import Weights, described, load_model, open_run_data


def write_trace(
    run: str | Path, *, checkpoints: str = "all", tokens: int = TOKENS, progress: bool = True
) -> list[Path]:
    """Writes the missing files of a trace and returns their paths. Each is written whole or not at all."""
    run = Path(run)
    if tokens < 1:
        raise UserError(f"--tokens={tokens}: must be positive")
    check_integer("--tokens", tokens)
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: not a run directory (it holds no config.json)")
    steps = saved.entries(run)
    if not steps and (run / from_hf.RECORD).is_file():
        steps = [0]  # of the files, a layer at a time
    elif not steps:
        raise UserError(f"{run}: holds no checkpoint yet")
    if not (run / "data.json").is_file():
        open_run_data(run, resolve(runnable(run / RECORD)))
    made_from = fingerprints(run)
    for path in trace_files(run):
        _check_existing(path, made_from, tokens)
    files = {step: run / FOLDER / f"step_{step:08d}.npz" for step in reversed(steps)}
    recorder, written = None, []
    for step in track(files, "tracing checkpoints", disable=not progress):
        path = files[step]
        if not path.is_file():
            recorder = recorder or _recorder(run, tokens, progress)
            try:
                columns = recorder.columns(step) | {n: np.array(v) for n, v in made_from.items()}
            except Damaged as damaged:
                saved.tell([f"{damaged}; is not traced"])
                continue
            path.parent.mkdir(exist_ok=True)
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **columns, step=np.array(step), tokens=np.array(tokens))
            write_atomically(path, buffer.getvalue())
            written.append(path)
        if checkpoints == "last":
            break
    return written[::-1]


def _recorder(run: Path, tokens: int, progress: bool) -> "Recorder":
    return Recorder(run, tokens) if saved.entries(run) else StreamedRecorder(run, tokens, progress)


def _check_existing(path: Path, made_from: dict[str, str], tokens: int) -> None:
    columns = read_columns(path, "trace")
    check_file(path, columns, made_from)
    if int(columns["tokens"]) != tokens:
        raise UserError(
            f"--tokens={tokens}: {path.parent} was traced with --tokens={int(columns['tokens'])}; "
            "give that, or delete the directory"
        )


def open_published(
    directory: str | Path, run: str | Path, *, path: str, overrides: Sequence[str] = (), progress: bool = False
) -> Path:
    """Returns the run directory of a published model, made where it is not there yet: `write_trace` reads its weights
    from their files. `path`: the text to look at, as `data.path`. Raises `UserError` as `convert.from_hf.look` does.
    """
    run = Path(run)
    if not (run / RECORD).is_file():
        found = from_hf.look(Path(directory), run, overrides=[f"data.path={path}", *overrides])
        from_hf.link(found, run, progress)
    return run


class Recorder:
    """The data and the one compiled evaluation that all checkpoints share."""

    def __init__(self, run: Path, tokens: int):
        self.run = run
        config, _, self.mesh = described(run)
        self.layers = moe_layers(run, config)
        self.data = open_run_data(run, config)
        self.config = limited(config, len(self.data.domains), tokens)
        self.eval_step = jax.jit(make_eval_step(self.config, trace=True, vocabulary=self.data.tokenizer.size))

    def evaluated(self, step: int, seen: list[Traced]) -> Scores:
        """Appends what a checkpoint makes of every batch to `seen`."""
        _, weights, _, _ = load_model(self.run, step)
        return evaluate(self.eval_step, weights, self.data, self.config, self.mesh, seen)

    def columns(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of one checkpoint's file that follow from its weights."""
        seen: list[Traced] = []
        with jax.set_mesh(self.mesh):
            scores = self.evaluated(step, seen)
            router = jax.device_get(jax.vmap(stats.metrics)(scores.stats))
        layers, num_experts = self.layers, self.config.model.moe.num_experts
        columns = probe_columns(seen, layers, num_experts)
        del columns["selected"]  # the plan says it too
        plan = [np.concatenate([x.reshape(len(layers), -1, x.shape[-1]) for x in a], 1) for a in _plans(seen)]
        columns["expert"], columns["weight"] = _compact(*plan, num_experts)
        columns["domains"] = np.array(self.data.domains)
        return columns | {f"router/{name}": value for name, value in router.items()}


class StreamedRecorder(Recorder):
    """The same of a run whose weights lie in a published model's files: a layer is in memory at one time."""

    def __init__(self, run: Path, tokens: int, progress: bool):
        self.run, self.found, self.progress = run, from_hf.linked(run), progress
        self.mesh = sharding.make_mesh(to_dict(self.found.config.mesh), jax.devices()[:1])
        self.layers = moe_layers(run, self.found.config)
        self.data = open_run_data(run, self.found.config)
        self.config = limited(self.found.config, len(self.data.domains), tokens)

    def evaluated(self, step: int, seen: list[Traced]) -> Scores:
        rest = (self.data, self.config, self.mesh)
        inputs: list[streamed.Input] = []
        evaluate(streamed.note(inputs), Weights({}, {}), *rest)
        outputs = iter(streamed.evaluate(self.found, self.config, inputs, self.progress))
        return evaluate(lambda *_, **__: next(outputs), Weights({}, {}), *rest, seen)


def _plans(seen: list[Traced]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [t.out.plan.expert_NK for t in seen], [t.out.plan.weight_NK for t in seen]


def _compact(expert_LNK: np.ndarray, weight_LNK: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Null slots behind the others, and no more columns than the token with the most experts needs."""
    empty_LNK = expert_LNK >= num_experts
    order_LNK = np.argsort(empty_LNK, axis=-1, kind="stable")[..., : (~empty_LNK).sum(-1).max()]
    take = lambda a: np.take_along_axis(a, order_LNK, axis=-1)
    return take(expert_LNK).astype(np.uint16), take(weight_LNK).astype(np.float32)
