"""Finds what a name in a config stands for: a file of a shipped folder, a file at a path, or a dotted module.

A kind of thing (routing strategies, executors, kinds of attention ...) is a folder of files that each end with one
value, as `ROUTER = Router(...)`. The same value may be defined outside the package, by

    path/to/file.py    a path, relative to the directory of the command; it ends with .py or holds a /
    package.module     a module that Python finds, also one below the directory of the command

A file outside is read once in a process, so that a run does not change while somebody edits it. Names are listed
without an import. A file that somebody is still writing stops nobody else: what looks at all files leaves it out.
"""

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from frugalmoe.errors import UserError, did_you_mean


class Outside(NamedTuple):
    """A Python file outside the package, as it was read in this process."""

    module: ModuleType
    path: Path
    text: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text).hexdigest()


_READ: dict[Path, Outside] = {}  # by resolved path


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of thing that a field of the config names."""

    package: str  # the folder of the shipped ones, as a module name; it is imported already
    value: str  # what a file of this kind defines: ROUTER
    type: type  # of that value; a field `name` of it is set to what the config says
    field: str  # of the config, for messages: model.moe.router
    noun: str  # for messages: routing strategy
    others: tuple[str, ...] = ()  # values of the field that name no file, for messages

    def names(self) -> tuple[str, ...]:
        """Returns the names of the shipped ones: the files of the folder, sorted."""
        return tuple(sorted(module.name for module in pkgutil.iter_modules(sys.modules[self.package].__path__)))

    def get(self, spec: Any) -> Any:
        """Returns the value that a name, a path or a dotted module stands for; a value itself is returned as it is.

        Raises `UserError`, on one line, where there is no such file or module, where it cannot be run, and where it
        ends without the value.
        """
        if isinstance(spec, self.type):
            return spec
        what = f"{self.field}={spec!r}"
        if spec in self.names():
            module, file = _shipped(f"{self.package}.{spec}", what)
        elif is_outside(spec):
            module, file, _ = outside(spec, what)
        else:
            valid = did_you_mean(str(spec), (*self.others, *self.names()))
            raise UserError(f"{what}: no such {self.noun}; {valid}; or the path of a file, as ./mine.py, or a module")
        value = getattr(module, self.value, None)
        if not isinstance(value, self.type):
            sys.modules.pop(module.__name__, None)  # so that it is read again when it is finished
            _READ.pop(Path(file).resolve(), None)
            raise UserError(f"{what}: {file}: ends without {self.value} = {self.type.__name__}(...)")
        named = any(field.name == "name" for field in dataclasses.fields(value))
        return dataclasses.replace(value, name=spec) if named else value

    def broken(self) -> dict[str, str]:
        """Returns name -> what is wrong with its file, in one line, of the shipped ones that `get` refuses.

        Imports all.
        """
        found = {}
        for name in self.names():
            try:
                self.get(name)
            except UserError as e:
                found[name] = str(e)
        return found

    def sound(self) -> tuple[str, ...]:
        """Returns the names of the shipped ones but the broken. Imports all."""
        bad = self.broken()
        return tuple(name for name in self.names() if name not in bad)


def is_outside(spec: Any) -> bool:
    """Whether a name of a config is a path or a dotted module, and not the name of something shipped."""
    return isinstance(spec, str) and (_is_path(spec) or "." in spec.strip("."))


def _is_path(spec: str) -> bool:
    return spec.endswith(".py") or "/" in spec


def outside(spec: str, what: str) -> Outside:
    """Returns the file outside the package that a path or a dotted module names, run and read once in a process.

    Raises `UserError` that begins with `what` for one that is not there or cannot be run.
    """
    path = find(spec, what).resolve()
    if path not in _READ:
        with one_line_errors(what, str(path)):
            text = path.read_bytes()
            module = _run_text(path, text) if _is_path(spec) else _import(spec)
        _READ[path] = Outside(module, path, text)
    return _READ[path]


def find(spec: str, what: str) -> Path:
    """Returns the path of the file that a path or a dotted module names, without running it (packages above it are).

    Raises `UserError` that begins with `what` for one that is not there.
    """
    if _is_path(spec):
        path = Path(os.path.expanduser(spec))
        if path.suffix != ".py":
            raise UserError(f"{what}: must be a Python file, NAME.py")
        if not os.path.isfile(path):
            raise UserError(f"{what}: no such file" + ("" if path.is_absolute() else f" in {Path.cwd()}"))
        return path
    with one_line_errors(what, spec), _from_here():
        try:
            found = importlib.util.find_spec(spec)
        except ModuleNotFoundError as e:
            if not spec.startswith(f"{e.name}.") and spec != e.name:
                raise  # the package is there, and imports something that is not
            found = None
        except ValueError:  # such as "a..b"
            found = None
    if found is None or not found.origin or not found.origin.endswith(".py"):
        raise UserError(f"{what}: no module of this name; a module lies on Python's path or below {Path.cwd()}")
    return Path(found.origin)


def run_file(path: Path, what: str) -> ModuleType:
    """Returns the module that a Python file makes, run anew. Raises `UserError` that begins with `what`.

    What the file does wrong is the user's error too, be it syntax, an exception or an end of the program.
    """
    with one_line_errors(what, str(path)):
        return _run_text(path, path.read_bytes())


def _run_text(path: Path, text: bytes) -> ModuleType:
    """Runs the text of a file as a module of its own, which dataclasses and tracebacks find among `sys.modules`."""
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode() + text).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _shipped(name: str, what: str) -> tuple[ModuleType, str]:
    file = importlib.util.find_spec(name).origin
    with one_line_errors(what, file):
        return importlib.import_module(name), file


def _import(name: str) -> ModuleType:
    with _from_here():
        return importlib.import_module(name)


@contextmanager
def _from_here() -> Iterator[None]:
    """Python's path with the directory of the command at its end."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(here)  # the last one
        sys.path.reverse()


@contextmanager
def one_line_errors(what: str, file: str, message: Callable[[BaseException], str] = str) -> Iterator[None]:
    """Turns whatever a user's file raises into a `UserError` that says where, on one line beginning with `what`.

    `message` gives the error's own text.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as e:  # an uncaught SystemExit would look as if the program had done its work
        raise UserError(f"{what}: {_where(e, file, message(e))}") from e


def _where(error: BaseException, file: str, message: str) -> str:
    """Returns the file, the line and what is wrong there."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [None, *(frame.lineno for frame in frames if frame.filename == file)]
    if isinstance(error, SyntaxError):
        file, lines, message = error.filename or file, [error.lineno], error.msg
    line = f", line {lines[-1]}" if lines[-1] else ""
    return f"{file}{line}: {type(error).__name__}: {' '.join(message.split())}"


def defines(spec: str, name: str) -> bool:
    """Returns whether a path or a dotted module names a Python file that assigns `name` at its top level.

    The file is read, not run. False for what names no Python file.
    """
    if not is_outside(spec) or (_is_path(spec) and not spec.endswith(".py")):
        return False
    try:
        body = ast.parse(find(spec, spec).read_bytes()).body
    except (UserError, OSError, SyntaxError, ValueError):
        return False
    assigned = [node.targets for node in body if isinstance(node, ast.Assign)]
    assigned += [[node.target] for node in body if isinstance(node, ast.AnnAssign) and node.value is not None]
    return any(isinstance(target, ast.Name) and target.id == name for targets in assigned for target in targets)
