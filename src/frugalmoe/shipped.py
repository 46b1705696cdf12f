"""Configs, studies and templates that come with frugalmoe, found by name.

In a checkout they are the folders at its top; a wheel holds copies of them in the package (`setup.py`). A path of the
user's comes first, so that `configs/quickstart.py` is the checkout's file there, and the shipped one elsewhere.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from frugalmoe.errors import UserError, did_you_mean

_PACKAGE = Path(__file__).parent


class Folder(NamedTuple):
    """A folder of files that are shipped."""

    kind: str  # what one of them is
    name: str
    suffix: str  # that a file's name may be given without; empty: none may be left out
    defines: str = ""  # at the top level of each; a Python file beside them that does not is something else

    @property
    def path(self) -> Path:
        """Returns where the folder is."""
        installed = _PACKAGE / "shipped_files" / self.name
        return installed if installed.is_dir() else _PACKAGE.parents[1] / self.name

    def names(self) -> list[str]:
        """Returns what `find` finds without a path: names of the files, without the suffix."""
        files = (p for p in self.path.glob(f"*{self.suffix}") if p.is_file() and self._is_one(p))
        return sorted(p.name.removesuffix(self.suffix) for p in files)

    def _is_one(self, path: Path) -> bool:
        """Whether a file defines what the folder's files are for; the file is read and not run."""
        return not self.defines or f"\n{self.defines} = " in path.read_text(encoding="utf-8", errors="replace")

    def choices(self) -> list[str]:
        """Returns what may be asked for by name: `names`, and NAME:SIZE of a config file that has several sizes."""
        return [f"{name}:{size}" if size else name for name in self.names() for size in self._sizes(name) or [""]]

    def _sizes(self, name: str) -> list[str]:
        """The keys of the literal SIZES at the top level of a Python file, which is read and not run."""
        if self.suffix != ".py":
            return []
        try:
            tree = ast.parse((self.path / f"{name}{self.suffix}").read_text(encoding="utf-8"))
            found = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "SIZES"]
            return [str(size) for literal in found for size in ast.literal_eval(literal)]
        except (OSError, SyntaxError, TypeError, ValueError):  # a file that somebody is writing has no sizes yet
            return []

    def find(self, text: str, what: str) -> Path:
        """Returns the file at a path, or the shipped one of this name; raises `UserError` beginning with `what` without
        one.
        """
        for path in (Path(text), self._shipped(text)):
            try:
                if path is not None and path.is_file():
                    return path
            except OSError as e:  # a name that is too long
                raise UserError(f"{what}: {e.strerror}") from e
        known = self.choices()
        if "/" in text and (files := sorted(filter(self._is_one, Path(self.name).glob(f"*{self.suffix}")))):
            sized = [choice for choice in known if ":" in choice]
            single = [str(file) for file in files if not any(c.startswith(f"{file.stem}:") for c in sized)]
            known = single + [f"{self.name}/{choice}" for choice in sized]
        raise UserError(f"{what}: no such {self.kind}; {did_you_mean(text, known)}")

    def _shipped(self, text: str) -> Path | None:
        """Returns the shipped file that `quickstart`, `quickstart.py` or `configs/quickstart.py` names, or None."""
        folder, _, name = text.rpartition("/")
        if folder not in ("", self.name) or name.removesuffix(self.suffix) not in self.names():
            return None
        return self.path / (name.removesuffix(self.suffix) + self.suffix)


CONFIGS = Folder("config", "configs", ".py")
STUDIES = Folder("study", "experiments", ".py", "STUDY")
TEMPLATES = Folder("template", "launch", "")
