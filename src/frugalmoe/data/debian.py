"""Debian packages as archives of text, found and fetched with apt from the machine's own sources.

Nothing is installed, and no root is needed: the package lists and the files lie in a directory of ours. apt checks
signatures and hashes.
"""

import email.parser
import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from frugalmoe.errors import UserError


class Deb(NamedTuple):
    name: str
    version: str
    size: int  # of the file, bytes
    sha256: str


class Apt:
    """The package lists of today, and the packages in `directory`, where they stay until somebody deletes them."""

    def __init__(self, directory: Path, where: str):
        self.directory, self.where = directory.absolute(), where
        state = self.directory / "apt"
        for folder in ("lists/partial", "cache/archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        places = {"Dir::State::lists": state / "lists", "Dir::Cache": state / "cache", "APT::Sandbox::User": "root"}
        self.options = [option for name, value in places.items() for option in ("-o", f"{name}={value}")]
        self.update = self._run("apt-get", "-q", "update")  # one bad source of the machine need not be ours
        self.names = self._run("apt-cache", "pkgnames").stdout.split()

    def find(self, pattern: str) -> Deb | None:
        """Returns the package whose name a glob matches; of several the one with the highest number in its name."""
        number = lambda name: [int(part) for part in re.findall(r"\d+", name)]
        for name in sorted(fnmatch.filter(self.names, pattern), key=number, reverse=True):
            shown = self._run("apt-cache", "show", "--no-all-versions", name).stdout
            fields = email.parser.HeaderParser().parsestr(shown)
            if "SHA256" in fields:  # without it the package is known by name alone
                return Deb(name, fields["Version"], int(fields["Size"]), fields["SHA256"])
        return None

    def fetch(self, deb: Deb) -> Path:
        """Returns the package's file, which is fetched once. Raises `UserError` where that fails."""
        if (file := self._have(deb)) is None:
            done = self._run("apt-get", "-q", "download", f"{deb.name}={deb.version}")
            if (file := self._have(deb)) is None:
                again = "what is there is kept, so start again"
                raise UserError(f"{self.where}: could not fetch {deb.name}={deb.version} ({complaint(done)}); {again}")
        return file

    def _have(self, deb: Deb) -> Path | None:
        for file in self.directory.glob(f"{deb.name}_*.deb"):
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() == deb.sha256:
                    return file
        return None

    def _run(self, tool: str, *arguments: str) -> subprocess.CompletedProcess:
        if shutil.which(tool) is None:
            rule = "its texts are in Debian's packages; build it on Debian or Ubuntu, or use data.path=FILE"
            raise UserError(f"{self.where}: {tool} is not installed; {rule}")
        command = [tool, *self.options, *arguments]
        kwargs = {"stdin": subprocess.DEVNULL, "cwd": self.directory, "env": os.environ | {"LC_ALL": "C.UTF-8"}}
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=1800, **kwargs)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{self.where}: {tool} {arguments[-1]} did not finish within half an hour") from error


def complaint(done: subprocess.CompletedProcess) -> str:
    """Returns apt's first error or warning."""
    lines = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:", "Err:"))]
    return lines[0].partition(":")[2].strip() if lines else f"exit code {done.returncode}, no message"


def members(file: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yields (path, content) of the regular files of a package whose path a regular expression finds, in their order
    there.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as unpacking:
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as tar:
                for member in tar:
                    path = member.name.removeprefix("./")
                    if member.isfile() and re.search(pattern, path):
                        yield path, tar.extractfile(member).read()
        except tarfile.TarError as error:
            said = unpacking.stderr.read().decode(errors="replace").strip().splitlines()
            raise UserError(f"{file}: not a Debian package ({said[0] if said else error}); delete it") from error
