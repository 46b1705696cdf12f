"""Trains the runs of a study. Any number of processes may do so in one directory: a run's lock is the claim on it.

A run that is complete is skipped, one that was interrupted continues from its checkpoint or from the start, and ends
in the same bits. A complete run keeps no checkpoint, unless the study says so.
"""

import functools
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax

from frugalmoe import sharding
from frugalmoe.ablate import results, suite, worktime
from frugalmoe.ablate.cross import evaluate_under_others
from frugalmoe.ablate.plan import Pair, Plan, check_claim, claim, make_plan, read_study
from frugalmoe.ablate.progress import OfRun, StudyProgress
from frugalmoe.ablate.study import Study
from frugalmoe.ablate.together import groups
from frugalmoe.ablate.worktime import WorkTime
from frugalmoe.config import settle
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.files import read_json, write_json
from frugalmoe.islands import virtual
from frugalmoe.train import preflight, rundir, trackers
from frugalmoe.train.checkpoint import saved_steps
from frugalmoe.train.guard import NotFinite
from frugalmoe.train.ledger import Ledger
from frugalmoe.train.loop import opened, train_runs
from frugalmoe.train.run import Run


class Outcome(NamedTuple):
    stopped: bool  # by a signal, after saving
    missing: list[Pair]  # not complete: another process has them, or the study was stopped
    diverged: list[Pair]


def run_study(
    study: Study,
    workdir: str | Path,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    at_once: int | None = None,
) -> Outcome:
    """Trains what is missing of a study in this process and gathers the table. `at_once`: runs in one program."""
    plan, workdir = make_plan(study, overrides, arms, seeds), Path(workdir)
    prepare(plan, workdir, command=())
    with StudyProgress(plan, workdir) as shown:
        return train_plan(plan, workdir, shown, at_once)


def check(plan: Plan, workdir: Path, fresh: bool = False) -> list[str]:
    """Refuses, before a step is trained, a directory, a run or a table that is not this study's, a disk that is too
    small for a checkpoint of an arm, and a tracker that is missing. Returns notes; writes nothing.
    """
    notes = []
    for name in dict.fromkeys(pair.arm for pair in plan.pairs):
        config = plan.arms[name].config
        trackers.check(config)
        if config.islands.virtual:
            virtual.check(config)
        notes += preflight.check_size(settle(config, plan.vocabulary, None), workdir)
    check_claim(workdir, plan)
    for pair in plan.pairs:
        if (origin := plan.origin(pair)) is not None and not _is_done(plan, pair, workdir):
            preflight.check_origin(origin, pair.directory(workdir), fresh)
    if (workdir / "study.json").is_file() and not fresh:
        results.check(workdir, plan.study.name)
        for pair in plan.pairs:
            directory = pair.directory(workdir)
            rundir.check_config(directory, plan.config(pair), force=False)
            if plan.study.keep_checkpoints and status(directory) == "complete" and not saved_steps(directory):
                rule = "is complete and kept no checkpoint; --fresh trains it again"
                raise UserError(f"keep_checkpoints=True: {directory} {rule}")
    return notes


def prepare(plan: Plan, workdir: Path, command: Sequence[str], fresh: bool = False) -> None:
    """Checks the study, and writes what marks its directory; `fresh` deletes the chosen runs, all or none."""
    check(plan, workdir, fresh)
    directories = [pair.directory(workdir) for pair in plan.pairs]
    with ExitStack() as held:
        if fresh and (workdir / "study.json").is_file():
            for directory in directories:
                held.enter_context(rundir.locked(directory))  # all are locked before the first is deleted
                rundir.check_fresh(directory)
        claim(workdir, plan, command)
        if fresh:
            for name in ("results.parquet", worktime.FILE):
                (workdir / name).unlink(missing_ok=True)
            for directory in directories:
                rundir.start_over(directory)


def train_plan(
    plan: Plan, workdir: Path, shown: StudyProgress, at_once: int | None = None, work: WorkTime | None = None
) -> Outcome:
    """Trains every run that no other process has; rewrites the table after each. work: the time of this process, which
    by default begins now.
    """
    work = work or WorkTime(workdir, Ledger())
    to_do = deque(groups(plan, at_once))
    while to_do:
        waiting = [pair for pair in to_do.popleft() if not _is_done(plan, pair, workdir)]
        if not waiting:
            continue
        try:
            stopped = _train_group(plan, waiting, workdir, shown, work.times)
        except rundir.Busy:
            continue
        except NotFinite as e:
            if len(waiting) > 1:  # one of them ended the program of all, so each is trained alone
                to_do.extendleft([pair] for pair in reversed(waiting))
            else:
                _record_divergence(waiting[0], workdir, e, shown)
            continue
        results.gather(workdir, read_study(workdir))
        work.write()
        if stopped:
            return outcome(plan, workdir, stopped=True)
    results.gather(workdir, read_study(workdir))
    work.write()
    return outcome(plan, workdir)


def outcome(plan: Plan, workdir: Path, stopped: bool = False) -> Outcome:
    missing = [pair for pair in plan.pairs if not _is_done(plan, pair, workdir)]
    return Outcome(stopped, missing, [p for p in plan.pairs if status(p.directory(workdir)) == "diverged"])


def status(directory: Path) -> str:
    """Returns complete, stopped or diverged, as the summary says; an empty text without a summary."""
    path = directory / "summary.json"
    return read_json(path).get("status", "") if path.is_file() else ""


def _is_done(plan: Plan, pair: Pair, workdir: Path) -> bool:
    directory = pair.directory(workdir)
    evaluated = (directory / "cross.json").is_file() or not plan.study.evaluate_with
    evaluated = evaluated and suite.is_there(directory, plan.study.metrics)
    return status(directory) == "diverged" or (status(directory) == "complete" and evaluated)


def _record_divergence(pair: Pair, workdir: Path, error: NotFinite, shown: StudyProgress) -> None:
    """Writes that a run diverged, which is its result: trained again, it would diverge again."""
    shown.say(f"{pair.arm} seed {pair.seed}: {error}")
    directory = pair.directory(workdir)
    write_json(directory / "summary.json", {"status": "diverged", "why": str(error)})
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def _train_group(plan: Plan, pairs: Sequence[Pair], workdir: Path, shown: StudyProgress, times: Ledger) -> bool:
    """Trains runs that share a program; True if a signal stopped them."""
    layout = settle(plan.config(pairs[0]), None, jax.device_count()).mesh
    with jax.set_mesh(sharding.make_mesh(to_dict(layout))), ExitStack() as stack:
        runs = []
        for pair in pairs:
            done = functools.partial(_is_done, plan, pair, workdir)
            place = plan.config(pair), pair.directory(workdir)
            runs.append(stack.enter_context(opened(*place, origin=plan.origin(pair), done=done)))
        # Those that an interruption left at different steps cannot share a program.
        for _, equal in groupby(sorted(runs, key=lambda run: run.start), key=lambda run: run.start):
            drive = virtual.drive if plan.config(pairs[0]).islands.virtual else train_runs
            equal = list(equal)
            try:
                summaries = drive(equal, lambda config, start: OfRun(shown))
            finally:
                times.take(_spent(equal[0], alone=len(equal) == len(runs)))
            if any(summary["status"] == "stopped" for summary in summaries):
                return True
        with times.phase("evaluation"):
            if plan.study.evaluate_with:
                for pair, run in zip(pairs, runs):
                    evaluate_under_others(plan, pair, run)
            for run in runs if suite.wanted(plan.study.metrics) else ():
                suite.grade_run(run, plan.study.metrics)
    for pair in pairs if not plan.study.keep_checkpoints else ():
        shutil.rmtree(pair.directory(workdir) / "checkpoints", ignore_errors=True)
    return False


def _spent(run: Run, alone: bool) -> dict[str, float]:
    """Where the time of a run's start went, and of all that were trained in its program. Its setup is left out where
    others were trained meanwhile.
    """
    spent = run.ledger.account_of_start().seconds
    return {kind: seconds for kind, seconds in spent.items() if alone or kind != "setup"}
