"""Configs, studies and templates that come with frugalmoe, found by name.

In a checkout they are the folders at its top; a wheel holds copies of them in the package (`setup.py`). A path of the
user's comes first, so that `configs/quickstart.py` is the checkout's file there, and the shipped one elsewhere.
"""

from pathlib import Path
from typing import NamedTuple

from frugalmoe.errors import UserError, did_you_mean

_PACKAGE = Path(__file__).parent


class Folder(NamedTuple):
    """A folder of files that are shipped."""

    kind: str  # what one of them is
    name: str
    suffix: str  # that a file's name may be given without; empty: none may be left out

    @property
    def path(self) -> Path:
        """Where it is."""
        installed = _PACKAGE / "shipped_files" / self.name
        return installed if installed.is_dir() else _PACKAGE.parents[1] / self.name

    def names(self) -> list[str]:
        """What `find` finds without a path: names of the files, without the suffix."""
        return sorted(p.name.removesuffix(self.suffix) for p in self.path.glob(f"*{self.suffix}") if p.is_file())

    def find(self, text: str, what: str) -> Path:
        """The file at a path, or the shipped one of this name; raises `UserError` beginning with `what` without one."""
        for path in (Path(text), self._shipped(text)):
            try:
                if path is not None and path.is_file():
                    return path
            except OSError as e:  # a name that is too long
                raise UserError(f"{what}: {e.strerror}") from e
        paths = sorted(str(p) for p in Path(self.name).glob(f"*{self.suffix}")) if "/" in text else []
        raise UserError(f"{what}: no such {self.kind}; {did_you_mean(text, paths or self.names())}")

    def _shipped(self, text: str) -> Path | None:
        """`quickstart`, `quickstart.py` or `configs/quickstart.py` -> the shipped file of that name."""
        folder, _, name = text.rpartition("/")
        if folder not in ("", self.name) or name.removesuffix(self.suffix) not in self.names():
            return None
        return self.path / (name.removesuffix(self.suffix) + self.suffix)


CONFIGS = Folder("config", "configs", ".py")
STUDIES = Folder("study", "experiments", ".py")
TEMPLATES = Folder("template", "launch", "")
