"""Finds what would end a run before its first step, before it waits for devices.

Nothing is built or fetched, and nothing written outside the cache. A run makes the same checks again when it begins;
here they come first, and on the machine from which it is launched.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from frugalmoe.config import RECORD, Config, settle
from frugalmoe.data.look import Look, look
from frugalmoe.data.tokenizer import parse
from frugalmoe.errors import UserError
from frugalmoe.train import best, checkpoint, distributed, rundir, trackers
from frugalmoe.train.optim import bytes_of
from frugalmoe.train.origin import Origin, check_there, differences, to_read
from frugalmoe.train.origin import check as check_fit


class Ready(NamedTuple):
    """A run that can begin, as far as is known."""

    config: Config  # settled, as far as tokenizer and devices are known
    notes: tuple[str, ...]
    origin: Origin | None = None  # the run whose weights it will read, which fit


def check(
    config: Config,
    workdir: Path | None,
    *,
    num_devices: int | None = None,
    resume: str = "auto",
    fresh: bool = False,
    origin: Origin | None = None,
    unseen: Sequence[str] = (),
) -> Ready:
    """Returns the config as it will be trained, and what has still to be done and what may go wrong.

    Raises `UserError` where the run cannot begin: its data or tokenizer cannot be read, do not fit the model or the
    run in `workdir`; the directory cannot be written, holds something else, or has no space for a checkpoint; a
    package is missing; the layout does not fit `num_devices`, where they are known. `workdir` None and `unseen`, the
    fields that name data, are for machines whose disks are not this one's. origin: the run that it begins with.
    """
    config = settle(config, None, num_devices)
    if distributed.is_main():  # the one that tells them
        trackers.check(config)
    if workdir is not None:
        _existing_parent(workdir)
        config = config if fresh else rundir.as_begun(config, workdir)
        check_directory(config, workdir, resume=resume, fresh=fresh, origin=origin)
        if rundir.is_complete(workdir) and not fresh and resume != "force":
            config = settle(config, rundir.vocabulary(workdir), None)  # its data may be gone
            return Ready(config, (f"--workdir={workdir}: this run is complete",))
    if unseen:
        return Ready(config, tuple(f"{field} cannot be seen from here, and was not checked" for field in unseen))
    found = look(config.data, batch_size=config.train.batch_size, seed=config.train.seed)
    domains = {"eval": found.domains} | ({"validation": found.validation} if config.data.validation.path else {})
    best.check_metric(config, domains)
    settled, notes = _with_vocabulary(config, found)
    if workdir is None:
        return Ready(settled, notes)
    if not fresh:
        if resume != "force":  # what goes on with other data tells of it as it starts
            _check_same_data(workdir, found)
        if found.fingerprint is not None:  # without one the tokenizer may still become smaller
            rundir.check_config(workdir, settled, force=resume == "force")
    freed = rundir.size_of_run(workdir) if fresh else 0
    notes = (*notes, *check_size(settled, workdir, freed))
    if (read := to_read(origin, workdir, fresh).origin) is None:
        return Ready(settled, notes)
    if found.tokenizer is None:
        return Ready(settled, (*notes, f"{read}: is compared with the model when the tokenizer is there"))
    return Ready(settled, (*notes, f"{read}: {check_fit(read, settled, found.tokenizer)}"), read)


def check_directory(
    config: Config, workdir: Path, *, resume: str = "auto", fresh: bool = False, origin: Origin | None = None
) -> None:
    """Raises `UserError` for a run directory that is another's, in use, or cannot be made; and for an origin that is
    no run, or not the one that the run there began with.
    """
    _existing_parent(workdir)
    rundir.check_idle(workdir)
    if origin is not None:
        check_origin(origin, workdir, fresh, resume == "force")
    if fresh:
        rundir.check_fresh(workdir)
        return
    if resume == "never" and (workdir / RECORD).is_file():
        raise UserError(f"--workdir={workdir}: holds a run and --resume=never was given")
    rundir.check_config(workdir, config, force=resume == "force")


def check_origin(origin: Origin, workdir: Path, fresh: bool = False, force: bool = False) -> None:
    """Raises `UserError` for an origin that is not that of the run in `workdir`, or that will be read and is no run."""
    goes_on = (workdir / RECORD).is_file() and not fresh
    if goes_on and not force and (differing := differences(origin, rundir.origin_of(workdir))):
        rule = f"holds a run that did not begin with {origin} ({', '.join(differing)})"
        raise UserError(f"--workdir={workdir}: {rule}; give another --workdir, or leave --from out to continue it")
    if (read := to_read(origin, workdir, fresh).origin) is not None:
        check_there(read, workdir)


def _with_vocabulary(config: Config, found: Look) -> tuple[Config, tuple[str, ...]]:
    """The config settled for the tokenizer that the data will have, and notes; raises `UserError` where it has more
    tokens.
    """
    size, trained = config.model.vocab_size, found.domains is None and isinstance(parse(config.data.tokenizer), int)
    if trained and 0 < size < found.vocabulary:
        note = f"model.vocab_size={size}: too small where data.tokenizer finds {found.vocabulary} tokens in the data"
        return config, (*found.notes, note)
    return settle(config, found.vocabulary, None), found.notes


def check_size(config: Config, workdir: Path, freed: int = 0) -> list[str]:
    """Raises `UserError` for a disk that is too small for a checkpoint; returns what may become too small.

    `config`: with the size of its vocabulary. `freed`: bytes that will be deleted before.
    """
    of_run = bytes_of(config)
    arrays = of_run.parameters + of_run.optimizer
    directory = _existing_parent(workdir)
    checkpoint.check_space_for(directory, arrays, freed)
    at_once, free = _checkpoints_at_once(config), shutil.disk_usage(directory).free + freed
    if at_once * arrays <= free:
        return []
    rule = f"{at_once} checkpoints of {arrays / 1e9:,.1f} GB lie there at one time; {free / 1e9:,.1f} GB are free"
    return [f"--workdir={workdir}: {rule}"]


def _checkpoints_at_once(config: Config) -> int:
    """Returns the most checkpoints of a run that lie on disk at one time: one is deleted after the next is there."""
    c, steps = config.checkpoint, config.train.steps
    saved = -(-steps // c.every_steps) if c.every_steps else 1
    kept = steps // c.keep_every_steps if c.keep_every_steps and c.every_steps else 0
    if c.keep_best:  # each evaluation may be followed by a save
        saved = steps
    return min(saved, c.keep_last + 1 + kept + bool(c.keep_best))


def _existing_parent(workdir: Path) -> Path:
    """Returns the nearest directory that exists; raises `UserError` where it cannot be written."""
    for path in (workdir, *workdir.absolute().parents):
        try:
            if not path.exists():
                continue
        except (OSError, ValueError) as e:  # a name that is too long, or holds a forbidden character
            raise UserError(f"--workdir={workdir}: {getattr(e, 'strerror', None) or e}") from e
        if not path.is_dir():
            raise UserError(f"--workdir={workdir}: {path} is a file")
        if not os.access(path, os.W_OK | os.X_OK):
            why = errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES
            raise UserError(f"--workdir={workdir}: {path} cannot be written ({os.strerror(why)})")
        return path
    raise UserError(f"--workdir={workdir}: no directory above it exists")


def _check_same_data(workdir: Path, found: Look) -> None:
    if found.fingerprint is None or not (workdir / "data.json").is_file():
        return
    before = rundir.read_data(workdir)["fingerprint"]
    if before != found.fingerprint:
        rule = f"the run's data changed (fingerprint {before} there, {found.fingerprint} now)"
        raise UserError(f"--workdir={workdir}: {rule}; put it back, or --resume=force to go on with it as it is now")
