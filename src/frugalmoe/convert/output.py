"""A directory that appears whole or not at all, and a run in it that has made no step."""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from frugalmoe.config import Config, settle
from frugalmoe.data.tokenizer import Tokenizer
from frugalmoe.errors import UserError
from frugalmoe.train import checkpoint, rundir
from frugalmoe.train.step import State
from frugalmoe.train.weights import Weights

TOKENIZER = "tokenizer"  # in a run's directory


def check_new(directory: Path, what: str) -> None:
    """Raises `UserError` where something lies at the place of a new directory, or it cannot be made."""
    try:
        if directory.is_symlink() or (directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))):
            raise UserError(f"{what}={directory}: exists; give a new directory")
        parent = existing_parent(directory)
    except (OSError, ValueError) as e:  # a name that is too long, or holds what none may
        if isinstance(e, UserError):
            raise
        raise UserError(f"{what}={directory}: {getattr(e, 'strerror', None) or e}") from e
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{what}={directory}: {parent} is no directory that can be written")


def existing_parent(directory: Path) -> Path:
    """The nearest path above a directory that is there."""
    return next(path for path in directory.absolute().parents if path.exists())


@contextlib.contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """Gives a directory beside `directory`, which takes its place at the end. An error or a signal removes it.

    Directories above are made, and those removed that would be left empty. Raises `UserError` where none can be
    made, or another process made the same one meanwhile.
    """
    made = [path for path in directory.absolute().parents if not path.exists()]
    temporary = directory.absolute().with_name(f".{directory.name}.{os.getpid()}.tmp")
    with _signals_raise():  # also while it cleans up: the watch of `at_once` would end the process in between
        try:
            try:
                temporary.mkdir(parents=True)
            except OSError as e:
                raise UserError(f"{directory}: cannot be made there: {e.strerror}") from e
            yield temporary
            try:
                temporary.rename(directory)
            except OSError as e:
                raise UserError(f"{directory}: was made by another process meanwhile, and is kept: {e.strerror}") from e
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt while the block runs, so that it can clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def write_run(run: Path, config: Config, tokenizer: Tokenizer, weights: Weights) -> None:
    """Fills a directory as a run that has made no step: a checkpoint without an optimizer's state, and the rest."""
    state = State(jnp.int32(0), jnp.int32(0), *weights, opt_state=())
    with checkpoint.open_manager(run, config.checkpoint) as manager:
        checkpoint.save(manager, 0, state)
    describe_run(run, config, tokenizer)


def describe_run(run: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Writes what a run is beside its weights; config.json is last."""
    (run / TOKENIZER).mkdir()
    tokenizer.save_into(run / TOKENIZER)
    (run / "metrics.jsonl").touch()  # no step was made here
    rundir.describe(run, config, settle(config, None, jax.device_count()), 0)
