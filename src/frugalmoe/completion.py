"""What the TAB key offers, through argcomplete: commands, flags, configs, studies, fields of a config, routers.

    eval "$(register-python-argcomplete frugalmoe)"       (bash and zsh)

A shell then starts `frugalmoe` at every TAB, with the line so far in the environment.
"""

import argparse
import os
import pkgutil
from pathlib import Path

from frugalmoe.errors import needs_package
from frugalmoe.shipped import CONFIGS, STUDIES

REQUESTED = "_ARGCOMPLETE"  # the variable by which a shell asks
_STRATEGIES = Path(__file__).parent / "routing/strategies"
_EXECUTORS = Path(__file__).parent / "experts/executors"
_KINDS_OF_ATTENTION = Path(__file__).parent / "model/attention/kinds"
_MERGE_RULES = Path(__file__).parent / "islands/merges"
_FOLDERS = {
    "model.moe.router": (_STRATEGIES,),
    "model.moe.executor": (_EXECUTORS, "auto", "grouped"),
    "model.attention": (_KINDS_OF_ATTENTION,),
    "islands.merge": (_MERGE_RULES,),
}


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell and ends the process."""
    try:
        import argcomplete
    except ImportError:
        raise needs_package("completion", "argcomplete>=3") from None
    _add_completers(parser)
    argcomplete.autocomplete(parser, always_complete_options="long")


def _add_completers(parser: argparse.ArgumentParser) -> None:
    if "config" in parser._defaults:  # takes fields without a file
        _add_fields(parser)
    for action in list(parser._actions):
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _add_completers(inner)
        elif action.dest == "config":
            action.completer = _shipped_or_file(CONFIGS)
            _add_fields(parser)
        elif action.dest == "study":
            action.completer = _shipped_or_file(STUDIES)
        elif action.dest == "router":
            action.completer = _found(_STRATEGIES)
        elif action.dest == "executor":
            action.completer = _found(_EXECUTORS)
        elif action.dest == "attention":
            action.completer = _found(_KINDS_OF_ATTENTION)
        elif action.dest == "scheduler":
            action.completer = lambda **_: ("slurm", "jobset", "skypilot", "ssh")


def _found(folder: Path, *others: str):
    """The files of a folder, which are not imported, other values, and Python files of the user's."""

    def names(prefix: str, **_) -> list[str]:
        from argcomplete.completers import FilesCompleter

        return [*others, *(m.name for m in pkgutil.iter_modules([str(folder)])), *FilesCompleter([".py"])(prefix)]

    return names


def _shipped_or_file(folder):
    def names(prefix: str, **_) -> list[str]:
        from argcomplete.completers import FilesCompleter

        known = dict.fromkeys([*folder.names(), *folder.choices()])
        modes = [f"{name}:laptop" for name in known if folder is CONFIGS and prefix.startswith(name)]
        return [*known, *modes, *FilesCompleter([folder.suffix])(prefix)]

    return names


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of a config as flags, once the word at hand begins to be one; else they would hide the others."""
    line = os.environ.get("COMP_LINE", "")
    word = line[: int(os.environ.get("COMP_POINT") or len(line))].rpartition(" ")[2]
    if not word.startswith("--config."):
        return
    from frugalmoe.config.describe import field_meanings

    for name, meaning in field_meanings().items():
        action = parser.add_argument(f"--config.{name}", help=meaning)
        if name in _FOLDERS:
            action.completer = _found(*_FOLDERS[name])
