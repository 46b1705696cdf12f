"""Bad batches: a step that is not finite, spikes narrow and wide. Nothing is lost, and the answers are those of a run
that reads the same batches in the same order.
"""

import itertools
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import rows, tiny, without_times, write_text
from test_processes import free_port

from frugalmoe import sharding
from frugalmoe.config.checks import MOST_WAITING, check_devices
from frugalmoe.data import Batch, Dataset, open_data
from frugalmoe.errors import UserError
from frugalmoe.islands import virtual
from frugalmoe.schema import Guard as Section
from frugalmoe.train import checkpoint, guard, rollbacks, troubles
from frugalmoe.train.guard import NotFinite
from frugalmoe.train.loop import opened, train, train_runs
from frugalmoe.train.objective import knobs
from frugalmoe.train.placing import put_batch
from frugalmoe.train.program import Program, compiled_train_step
from frugalmoe.train.step import State, abstract, init

pytestmark = pytest.mark.whole

FIELDS = {
    "train.steps": 24,
    "train.trackers": "",
    "train.eval_rows": 8,
    "checkpoint.every_steps": 4,
    "checkpoint.keep_last": 9,
    "optim.schedule": "constant",
    "optim.learning_rate": 1e-2,
    "model.dim": 16,
    "model.num_layers": 2,
    "model.moe.router": "sigmoid_bias",
    "model.moe.losses.load_balance": 0.01,
    "model.vocab_size": 320,
    "guard.after": 8,
    "guard.loss_deviations": 4.0,
    "guard.gradient_deviations": 4.0,
    "guard.retry_after": 3,
    "guard.patience": 3,
    "guard.last_patience": 3,
    "guard.watchful": 1.0,
    "guard.window": 100,
    "guard.lowered_steps": 3,
}


class Quiet:
    """A run that says nothing."""

    def __init__(self, *ignored): ...

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def say(self, text): ...

    def update(self, *numbers): ...


def config_in(root: Path, **changes):
    return tiny(root / "text", root / "cache", FIELDS | {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("guard")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def make(root):
    return lambda **changes: config_in(root, **changes)


@contextmanager
def broken(where):
    """The gradient of a launch is not finite where `where(position, again)` says so."""
    step = Program.step

    def stepped(self, batch, again=False):
        run, known = self.runs[0], self.knobs
        if where(run.queue.tried.position, again):
            nan = lambda a: sharding.put(run.mesh, np.full(a.shape, np.nan, np.float32), "." * a.ndim)
            with jax.transfer_guard("allow"):
                self.knobs = known._replace(losses=jax.tree.map(nan, known.losses))
            self.knobs_again = self.knobs._replace(taken=self.knobs_again.taken)
        report = step(self, batch, again)
        self.knobs, self.knobs_again = known, known._replace(taken=self.knobs_again.taken)
        return report

    Program.step = stepped
    try:
        yield
    finally:
        Program.step = step


@contextmanager
def noisy(positions, until=lambda: False):
    """The batches of these positions are of tokens that no text has."""
    original = Dataset.batch

    def batch(self, position, rows=None, ramp=None):
        found = original(self, position, rows, ramp)
        if position not in positions or until():
            return found
        drawn = np.random.default_rng(position).integers(200, 256, (2, *found.tokens_BT.shape)).astype(np.int32)
        return found._replace(tokens_BT=drawn[0], targets_BT=drawn[1] * found.loss_mask_BT)

    Dataset.batch = batch
    try:
        yield
    finally:
        Dataset.batch = original


def mesh_of(config):
    return sharding.make_mesh(check_devices(config, 1))


def newest(config, workdir):
    with jax.set_mesh(mesh_of(config)), checkpoint.open_manager(workdir, config.checkpoint) as manager:
        return jax.device_get(checkpoint.restore_newest(manager, abstract(config))[0])


def stepped(config, positions):
    """The state after updates from the batches of these positions, none of which is skipped."""
    mesh = mesh_of(config)
    with jax.set_mesh(mesh):
        data = open_data(config.data, batch_size=config.train.batch_size, seed=config.train.seed, progress=False)
        own = knobs(config)
        own = own._replace(limits=own.limits._replace(skips=np.bool_(False)))
        own = jax.tree.map(lambda number: sharding.put(mesh, number, ""), own)
        state, step = init(config), compiled_train_step(config)
        for position in positions:
            batch = Batch(*(a[None] for a in data.batch(position)))
            state, _ = step(state, put_batch(mesh, batch, "ABT"), own)
        return jax.device_get(state)


def trained_part(state):
    """What the guard and the clock of the data do not belong to."""
    return state._replace(position=0, guard=0)


def assert_same_bits(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def events(workdir) -> list[tuple[int, str]]:
    path = workdir / "events.jsonl"
    return [(row["step"], row["kind"]) for row in rows(workdir, "events.jsonl")] if path.exists() else []


# ---------------------------------------------------------------- the decision


@jax.jit
def _judged(limits, given):
    def one(carry, given):
        remembered, step = carry
        verdict, remembered = guard.judge(remembered, limits, step, *given)
        return (remembered, step + 1 - verdict.skipped), (verdict, remembered)

    return jax.lax.scan(one, (guard.fresh(), jnp.int32(0)), given)[1]


def judged(values, norms=None, first=None, **section):
    """The verdicts on a sequence of losses, each as a run would see it, and the guard after each."""
    norms = np.ones(len(values)) if norms is None else norms
    first = np.ones(len(values), bool) if first is None else first
    given = (np.asarray(values, np.float32), np.asarray(norms, np.float32), first)
    return jax.device_get(_judged(guard.limits(Section(**section)), given))


def losses(count: int, seed: int = 0) -> np.ndarray:
    """A curve that falls from 8 to 2 with noise of the size 0.1."""
    return 2 + 6 * np.exp(-np.arange(count) / 50) + np.random.default_rng(seed).normal(0, 0.1, count)


def test_no_batch_of_a_usual_curve_is_skipped():
    for seed in range(20):
        drawn = np.random.default_rng(100 + seed)
        verdict, _ = judged(losses(2000, seed), np.exp(drawn.normal(0, 0.5, 2000)))
        assert not verdict.skipped.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(value):
    for place in (0, 5):
        values, norms = losses(10), np.ones(10)
        for broken in (values, norms):
            kept, broken[place] = broken[place], value
            verdict, after = judged(values, norms)
            broken[place] = kept
            assert verdict.skipped.tolist() == [i == place for i in range(10)]
            assert all(np.isfinite(leaf).all() for leaf in after)
            assert after.updates[-1] == 9


def test_a_narrow_spike_is_skipped_once_there_are_statistics():
    values = losses(400)
    values[[30, 300]] += 4
    verdict, after = judged(values)
    assert np.flatnonzero(verdict.skipped).tolist() == [300]
    assert (after.since[300:321] == 300).all() and after.since[321] == -1, "and then all is well"
    norms = np.ones(400)
    norms[300] = 40
    assert np.flatnonzero(judged(losses(400), norms)[0].skipped).tolist() == [300]
    off = {"loss_deviations": 0.0, "gradient_deviations": 0.0}
    assert not judged(values, norms, **off)[0].skipped.any()


def test_a_wide_spike_lowers_the_rate_and_then_asks_to_go_back():
    values = losses(600)
    values[300:] += 4
    verdict, after = judged(values, patience=5, lowered_steps=20, lower=0.1)
    assert np.flatnonzero(verdict.skipped).tolist() == [*range(300, 305), *range(325, 330)]
    assert np.flatnonzero(verdict.lowered).tolist() == [304]
    np.testing.assert_allclose(verdict.rate[305:325], 0.1)
    assert (np.delete(verdict.rate, range(305, 325)) == 1).all()
    assert np.flatnonzero(verdict.roll_back).tolist() == [329] and verdict.since[329] == 300
    assert (after.since[300:329] == 300).all() and (after.since[329:] == -1).all()
    assert after.loss_mean[329] == after.loss_mean[299], "what is far off moves no mean"
    assert abs(after.loss_mean[-1] - 6) < 0.3, "and a run that cannot go back takes the losses as they are"


def test_less_is_a_spike_for_a_while_after_one():
    values = losses(600)
    values[[340, 420]] = 3.2
    assert not judged(values)[0].skipped.any()
    values[335] += 4
    assert np.flatnonzero(judged(values)[0].skipped).tolist() == [335, 340]


def test_skips_with_updates_between_them_are_a_trouble_too():
    values = losses(600)
    values[[i for i in range(300, 400) if i % 4]] += 4
    verdict, _ = judged(values, patience=10)
    assert np.flatnonzero(verdict.lowered)[0] == 318, "4 (3 - 1) + 2: after 301 to 316, and two more"
    values = losses(600)
    values[300:400:2] += 4
    assert not judged(values, patience=10)[0].lowered.any(), "as many updates as skips"


def test_one_that_comes_again_tells_nothing_new():
    values = losses(400)
    values[300:310] += 4
    first = np.ones(400, bool)
    first[301:310] = False
    verdict, after = judged(values, first=first, patience=3)
    assert verdict.skipped.sum() == 10 and not verdict.lowered.any() and after.skips[309] == 1
    values[300:310] = np.nan
    assert not judged(values, first=first)[0].roll_back.any()
    assert judged(values)[0].roll_back.sum() == 2, "ten in a row, and five are enough"


def test_a_spike_that_ends_in_the_lowered_phase_asks_for_nothing_more():
    values = losses(600)
    values[300:315] += 4
    verdict, after = judged(values, patience=5, lowered_steps=20)
    assert verdict.skipped.sum() == 5 and verdict.lowered.sum() == 1 and not verdict.roll_back.any()
    assert after.since[-1] == -1


def adam_update(before, gradient):
    params, moments = before
    updates, moments = optax.adam(1e-2).update({"w": gradient, "b": gradient[0]}, moments, params)
    return optax.apply_updates(params, updates), moments


def test_what_is_skipped_stays_and_what_is_not_has_the_bits_of_the_update():
    """Also an array that the update gives back as it was, one that it gives twice, and one that depends on neither."""
    params = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.ones(4)}

    def update(before, gradient):
        (params, moments), same, *_ = before
        both = same + 1
        return adam_update((params, moments), gradient), same, both, both, jnp.float32(7)

    before = (params, optax.adam(1e-2).init(params)), jnp.ones(2), jnp.zeros(2), jnp.full(2, 3.0), jnp.float32(1)
    step = jax.jit(lambda skipped, before, gradient: guard.unless(skipped, update, before, gradient))
    for gradient in (jnp.full((3, 4), 0.1), jnp.full((3, 4), jnp.nan)):
        expected = {False: jax.jit(update)(before, gradient), True: before}
        for skipped, wanted in expected.items():
            jax.tree.map(np.testing.assert_array_equal, step(skipped, before, gradient), wanted)
        several = jax.vmap(step, in_axes=(0, None, None))(jnp.array([False, True]), before, gradient)
        wanted = jax.tree.map(lambda *rows: np.stack(rows), expected[False], expected[True])
        jax.tree.map(np.testing.assert_array_equal, several, wanted)


def test_a_choice_copies_nothing():
    """The program on one CPU: moments and parameters are written where they are, as without a guard."""
    params = {"w": jnp.zeros((512, 512)), "b": jnp.zeros(512)}
    state = (params, optax.adam(1e-2).init(params))
    given = (jnp.bool_(False), state, jnp.ones((512, 512)))
    copied = lambda text: text.count(" = f32[512,512]{1,0} copy(")
    program = jax.jit(lambda *given: guard.unless(given[0], adam_update, *given[1:]), donate_argnums=1)
    late = jax.jit(lambda *given: guard.chosen(given[0], adam_update(*given[1:]), given[1]), donate_argnums=1)
    assert copied(program.lower(*given).compile().as_text()) == 0
    assert jax.default_backend() != "cpu" or copied(late.lower(*given).compile().as_text())  # what is avoided


def test_stop_skips_nothing():
    values = losses(300)
    values[200:] = np.nan
    verdict, _ = judged(values, policy="stop")
    assert not (verdict.skipped.any() or verdict.roll_back.any()) and (verdict.rate == 1).all()


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def clean(make, tmp_path_factory):
    """A run without faults."""
    workdir = tmp_path_factory.mktemp("clean") / "run"
    train(make(), workdir, progress=Quiet)
    return workdir


def test_without_a_fault_it_is_the_run_without_a_guard(make, clean, tmp_path):
    """To the bit: the state with its optimizer and routers, every metric, and no event."""
    train(make(guard__policy="stop"), tmp_path / "run", progress=Quiet)
    assert_same_bits(newest(make(), clean), newest(make(), tmp_path / "run"))
    assert without_times(rows(clean)) == without_times(rows(tmp_path / "run"))
    assert not (clean / "events.jsonl").exists()
    assert_same_bits(trained_part(newest(make(), clean)), trained_part(stepped(make(), range(24))))


def test_a_batch_that_breaks_once_comes_again(make, tmp_path):
    """As if it had come then in the first place: parameters, the optimizer's counts, the routers' state."""
    config = make()
    with broken(lambda position, again: position == 6 and not again):
        summary = train(config, tmp_path / "run", progress=Quiet)
    state = newest(config, tmp_path / "run")
    order = [*range(6), 7, 8, 9, 6, *range(10, 24)]
    assert (summary["step"], state.step, state.position) == (24, 24, 24)
    assert_same_bits(trained_part(state), trained_part(stepped(config, order)))
    assert events(tmp_path / "run") == [(6, "skipped"), (10, "retried")]
    assert "position 6: loss/total=nan" in rows(tmp_path / "run", "events.jsonl")[0]["what"]
    logged = [row for row in rows(tmp_path / "run") if "loss/ce" in row]
    assert [row["step"] for row in logged] == list(range(1, 25))
    assert (state.guard.waiting == guard.EMPTY).all()


def test_a_batch_that_breaks_twice_is_dropped(make, tmp_path):
    """In the very last update, too, which then is one of a batch more; every other batch is used once."""
    config = make()
    with broken(lambda position, again: position in (0, 20)):
        train(config, tmp_path / "run", progress=Quiet)
    state = newest(config, tmp_path / "run")
    order = [*range(1, 20), *range(21, 26)]
    assert (state.step, state.position) == (24, 26)
    assert_same_bits(trained_part(state), trained_part(stepped(config, order)))
    assert events(tmp_path / "run") == [(0, "skipped"), (3, "dropped"), (19, "skipped"), (22, "dropped")]


def test_what_waits_at_the_end_is_told(make, tmp_path):
    with broken(lambda position, again: position == 23):
        train(make(), tmp_path / "run", progress=Quiet)
    assert events(tmp_path / "run") == [(23, "skipped"), (24, "left")]
    assert newest(make(), tmp_path / "run").guard.waiting[:2].tolist() == [23, guard.EMPTY]


def test_a_batch_of_noise_is_a_spike_that_does_no_harm(make, tmp_path):
    config, order = make(), [*range(16), *range(17, 25)]
    with noisy({16}):
        train(config, tmp_path / "run", progress=Quiet)
    assert events(tmp_path / "run") == [(16, "skipped"), (19, "dropped")]
    assert "above" in rows(tmp_path / "run", "events.jsonl")[0]["what"]
    assert_same_bits(trained_part(newest(config, tmp_path / "run")), trained_part(stepped(config, order)))


WIDE = set(range(14, 23))  # 3 skips; 3 updates at the lowered rate; 3 that come again are dropped; 3 skips
TROUBLE = [*["skipped"] * 3, "rate_lowered", *["dropped"] * 3, *["skipped"] * 3, "rolled_back"]


@pytest.mark.parametrize("between", ["skip", "again"])
def test_noise_that_stays_makes_the_run_go_back(make, tmp_path, between):
    """To the checkpoint before it. It goes on behind the noise, as if the batches between did not exist; or with the
    same batches, which are well now, at the lowered rate.
    """
    config, workdir = make(guard__rollback_batches=between), tmp_path / "run"
    with noisy(WIDE, until=lambda: between == "again" and (workdir / rollbacks.FILE).exists()):
        train(config, workdir, progress=Quiet)
    (back,) = rollbacks.read(workdir)
    state, position = newest(config, workdir), 23 if between == "skip" else None
    assert (back.number, back.from_step, back.to_step, back.position) == (1, 17, 12, position)
    assert [kind for _, kind in events(workdir)] == TROUBLE
    assert (state.step, state.guard.rollbacks) == (24, 1)
    logged = [row for row in rows(workdir) if "loss/ce" in row]
    assert [row["step"] for row in logged] == list(range(1, 25)), "what was undone is in no log of results"
    lowered = [row["step"] for row in logged if row["optim/learning_rate"] < 2e-3 and row["step"] > 4]
    assert lowered == ([] if between == "skip" else [13, 14, 15, 16, 17])
    if between == "skip":
        order = [*range(12), *range(23, 35)]
        assert_same_bits(trained_part(state), trained_part(stepped(config, order)))
    train(config, workdir, progress=Quiet, resume="force")  # a complete run that is started again stays as it is
    assert_same_bits(newest(config, workdir), state)


def test_a_gradient_that_is_never_finite_again_ends_the_run(make, tmp_path):
    """After as many rollbacks as are allowed; the checkpoint before is whole, and nothing of later is left."""
    config, workdir = make(), tmp_path / "run"
    rule = r"trouble since step 8 .*loss/total=nan.* guard.rollbacks=2"
    with broken(lambda position, again: position >= 10), pytest.raises(NotFinite, match=rule) as refused:
        train(config, workdir, progress=Quiet)
    assert "\n" not in str(refused.value)
    assert [(row.number, row.to_step) for row in rollbacks.read(workdir)] == [(1, 8), (2, 8)]
    assert checkpoint.saved_steps(workdir)[-1] == 8
    assert_same_bits(trained_part(newest(config, workdir)), trained_part(stepped(config, range(8))))


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(make, tmp_path):
    rule = "does not end, and there is no checkpoint before it; nothing is saved yet"
    with broken(lambda position, again: position >= 2), pytest.raises(NotFinite, match=rule):
        train(make(), tmp_path / "run", progress=Quiet)


def test_spikes_end_nothing_where_there_is_no_way_back(make, tmp_path):
    """The losses are taken as they are, and what was skipped comes again."""
    with noisy(set(range(10, 40))):
        summary = train(make(guard__rollbacks=0), tmp_path / "run", progress=Quiet)
    kinds = [kind for _, kind in events(tmp_path / "run")]
    assert summary["status"] == "complete" and summary["step"] == 24
    assert kinds.count("accepted") == 1 and "rolled_back" not in kinds


def test_the_checkpoint_before_a_trouble_stays_until_it_is_over(make, tmp_path):
    """Although the run saves each step and keeps one; then it goes, as the others do."""
    config, workdir = make(checkpoint__every_steps=1, checkpoint__keep_last=1), tmp_path / "run"
    with noisy(WIDE):
        train(config, workdir, progress=Quiet)
    (back,) = rollbacks.read(workdir)
    assert (back.from_step, back.to_step) == (17, 14)
    assert checkpoint.saved_steps(workdir) == [24]
    assert_same_bits(trained_part(newest(config, workdir)), trained_part(stepped(config, [*range(14), *range(23, 33)])))


def test_wrong_values_are_refused(make):
    for field, value, rule in [
        ("policy", "retry", "unknown"),
        ("rollback_batches", "no", "unknown"),
        ("lower", 0.0, "above 0"),
        ("lower", 1.5, "above 0"),
        ("retry_after", 0, f"from 1 to {MOST_WAITING}"),
        ("retry_after", MOST_WAITING + 1, f"from 1 to {MOST_WAITING}"),
        ("window", 0, "from 1"),
        ("patience", 0, "from 1"),
        ("patience", 2**20, "from 1"),
        ("last_patience", 0, "from 1"),
        ("watchful", 0.0, "above 0"),
        ("watchful", 1.5, "above 0"),
        ("loss_deviations", -1e-3, "negative"),
        ("gradient_deviations", -1.0, "negative"),
        ("rollbacks", -1, "negative"),
        ("replicas_every", -1, "negative"),
        ("replay_every", -1, "negative"),
    ]:
        with pytest.raises(UserError, match=f"guard.{field}=.*{rule}"):
            make(**{f"guard__{field}": value})


# ---------------------------------------------------------------- killed, several processes, several runs


def faulty(root: Path, workdir: Path, kill: str) -> None:
    """A run with a broken batch, which comes again, and noise that makes it go back; it is killed as `kill` says."""
    config, add = config_in(root), rollbacks.add

    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def where(position: int, again: bool) -> bool:
        if {"waiting": (9, False), "again": (6, True), "after": (25, False)}.get(kill) == (position, again):
            killed()
        return position == 6 and not again

    def added(*given) -> None:
        add(*given)
        if kill == "going back":
            killed()

    rollbacks.add = added
    try:
        with broken(where), noisy(WIDE):
            train(config, workdir, progress=Quiet)
    finally:
        rollbacks.add = add


def child(*args: object, code: str = "") -> subprocess.Popen:
    """`faulty` in a process of its own."""
    program = "import sys, pathlib, test_guard; test_guard.faulty(*map(pathlib.Path, sys.argv[1:3]), sys.argv[3])"
    environment = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", f"{code}\n{program}", *map(str, args)]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_that_is_killed_amid_its_troubles_is_the_run_that_was_not(make, root, tmp_path):
    """While a batch waits, as it comes again, between the record of a rollback and the rollback, and after it."""
    faulty(root, tmp_path / "whole", "")
    for kill in ("waiting", "again", "going back", "after"):
        process = child(root, tmp_path / "killed", kill)
        _, said = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, f"{kill}: {said}"
    faulty(root, tmp_path / "killed", "")
    assert_same_bits(newest(make(), tmp_path / "killed"), newest(make(), tmp_path / "whole"))
    assert rollbacks.read(tmp_path / "killed") == rollbacks.read(tmp_path / "whole") != []
    assert without_times(rows(tmp_path / "killed")) == without_times(rows(tmp_path / "whole"))


@pytest.mark.slow
def test_two_processes_agree_on_what_is_skipped(make, root, tmp_path):
    faulty(root, tmp_path / "one", "")
    start = "from frugalmoe.train import distributed; distributed.start('localhost:{}', 2, {}, 120)"
    port = free_port()
    processes = [child(root, tmp_path / "two", "", code=start.format(port, i)) for i in range(2)]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert events(tmp_path / "two") == events(tmp_path / "one")
    of_one, of_two = rows(tmp_path / "one"), rows(tmp_path / "two")
    np.testing.assert_allclose(
        [r["loss/ce"] for r in of_one if "loss/ce" in r], [r["loss/ce"] for r in of_two if "loss/ce" in r], rtol=1e-4
    )


@pytest.mark.slow
def test_runs_of_one_program_refuse_to_wait_for_one_another(make, tmp_path):
    """A study trains each of them alone then: see `ablate.runner`."""
    configs = [make(train__seed=seed) for seed in (0, 1)]
    with jax.set_mesh(mesh_of(configs[0])), ExitStack() as held:
        runs = [held.enter_context(opened(config, tmp_path / str(i))) for i, config in enumerate(configs)]
        with (
            broken(lambda position, again: position == 6),
            pytest.raises(NotFinite, match="each is to be trained alone"),
        ):
            train_runs(runs, Quiet)


@pytest.mark.slow
def test_islands_skip_nothing_and_take_the_outer_state(make, tmp_path):
    """Virtual ones; `test_islands_processes` has those of real processes."""
    config = make(islands__virtual=2, islands__round_steps=8, train__steps=16)
    rows_of, calls, here = Dataset.rows, itertools.count(1), threading.get_ident()

    def broken_once(self, numbers):  # threads that read ahead, as those of a run before this one, do not count
        found, nan = rows_of(self, numbers), np.float32(np.nan)
        is_broken = threading.get_ident() == here and next(calls) == 8
        return found._replace(loss_mask_BT=found.loss_mask_BT * nan) if is_broken else found

    Dataset.rows = broken_once
    try:
        summary = train(config, tmp_path / "run", progress=Quiet, drive=virtual.drive)
    finally:
        Dataset.rows = rows_of
    assert summary["status"] == "complete" and np.isfinite(summary["eval"]["loss"]["mean"])
    assert next(calls) > 8, "a batch was broken"
    state = newest(config, tmp_path / "run")
    assert state.guard.updates > 0 and state.guard.since == -1 and events(tmp_path / "run") == []


def test_a_batch_of_which_no_step_was_made_comes_again():
    queue = troubles.Queue(State(*[None] * len(State._fields))._replace(position=3, guard=guard.fresh()), 2)
    first = queue.next()
    queue.put_back(first)
    assert queue.tried == troubles.Tried(3, again=False), "nothing came after it"
    assert queue.keep(first) and [queue.next().position for _ in range(2)] == [4, 5]
    for _ in range(2):
        before, second = queue.tried, queue.next()
        assert second in (troubles.Tried(3, again=True), troubles.Tried(6, again=False))
        queue.put_back(before)
        assert queue.next() == second, "the same batch"
