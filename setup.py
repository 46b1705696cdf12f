"""Copies of configs/, experiments/*.py and launch/ go into the wheel, where `frugalmoe.shipped` finds them.

An editable install finds them in the checkout. Everything else about the build is in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs/*.py", "experiments/*.py", "launch/*")


class BuildWithShipped(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, copy in self._shipped():
                self.mkpath(str(Path(copy).parent))
                self.copy_file(source, copy)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(copy for _, copy in self._shipped())]

    def get_source_files(self) -> list[str]:
        """What a source distribution must hold to build the wheel."""
        return [*super().get_source_files(), *(source for source, _ in self._shipped())]

    def _shipped(self) -> list[tuple[str, str]]:
        files = [path for pattern in SHIPPED for path in sorted(Path().glob(pattern)) if path.is_file()]
        return [(str(path), str(Path(self.build_lib, "frugalmoe/shipped_files", path))) for path in files]


setup(cmdclass={"build_py": BuildWithShipped})
