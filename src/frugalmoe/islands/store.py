"""Where islands meet: whole values under keys, in a folder or in a bucket.

A folder is written by the few lines below, a bucket through TensorStore's key-value stores, which Orbax brings. Both
give what the protocol needs and no more: a value is there whole or not at all, outlives a crash once it was said to be
written, and of many that create one key at one time exactly one does.

Why a folder is not TensorStore's too: its driver holds a lock of a key while it writes, so an island that is frozen (by
SIGSTOP, or by its machine) in that moment would stop all others. A hard link is as atomic, on NFS also, and needs no
lock.
"""

import contextlib
import errno
import fcntl
import http.client
import os
import re
import secrets
import stat
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tensorstore

from frugalmoe.errors import UserError, printable

PATIENCE = 20.0  # seconds for which an operation is tried again where what fails may pass
_PATIENCE_AT_FIRST = 5.0  # the same while a store is opened
LONGEST_KEY = 512  # bytes; S3 has 1,024 for key and prefix together
LONGEST_PART = 200  # bytes, of what lies between two slashes; a file name has 255
SCHEMES = ("file", "s3", "gs", "memory")
_RULE = "letters, digits and _ . + = -, beginning with a letter, a digit or _, between slashes"
_PAUSES = (0.1, 2.0)  # seconds: the first between two tries, which doubles, and the longest
T = TypeVar("T")


class StoreError(OSError):
    """What may pass without the user: a full disk, a bucket that is away. The message is one line with key and reason.

    A value that was being written may be there or not: whole, if it is.
    """

    def __init__(self, place: str, key: str, reason: str):
        super().__init__(printable(f"{place}/{key}: {reason}"))
        self.reason = printable(reason)


class Store:
    """Values of bytes by key: names of letters, digits and _ . + = - between slashes, as `rounds/000007/commit.json`.

    Operations try again for up to `patience` seconds where the failure may pass, then raise `StoreError`; a key that is
    none is a `UserError`. Any number of threads, processes and machines may use one store at one time.
    """

    def __init__(self, place: str, patience: float = PATIENCE):
        self.place, self.patience = place, patience

    def read(self, key: str) -> bytes | None:
        """Returns the value; None where there is none."""
        return self._patiently("read", key, lambda: self._read(check_key(key)))

    def write(self, key: str, data: bytes) -> None:
        """Puts the value there, in the place of one that may be there: readers see the old or the new one, whole."""
        self._patiently("written", key, lambda: self._write(check_key(key), data))

    def create(self, key: str, data: bytes) -> bool:
        """Puts the value there if there is none; False: there was one, and it stays.

        Of all that create one key, one at most is told True. None is if the answer that it did was lost on its way and
        the operation tried again: what counts is what stands there, not who wrote it.
        """
        return self._patiently("created", key, lambda: self._create(check_key(key), data))

    def list(self, prefix: str) -> list[str]:
        """Returns the keys that begin with `prefix` ('' for all), sorted, without those that are being written."""
        found = self._patiently("listed", prefix, lambda: self._list(_check_prefix(prefix)))
        return sorted(key for key in found if key.startswith(prefix) and _is_key(key))

    def delete(self, key: str) -> None:
        """Takes the value away if there is one."""
        self._patiently("deleted", key, lambda: self._delete(check_key(key)))

    def _patiently(self, done: str, key: str, operation: Callable[[], T]) -> T:
        end, pause = time.monotonic() + self.patience, _PAUSES[0]
        while True:
            try:
                return operation()
            except UserError:
                raise
            except (OSError, ValueError, NotImplementedError) as e:
                why, passes = self._why(e)
                if not passes or time.monotonic() + pause > end:
                    raise StoreError(self.place, key, f"cannot be {done}: {why}") from e
            time.sleep(pause)
            pause = min(2 * pause, _PAUSES[1])

    # What a kind of store defines. Keys are checked; errors are the system's own.
    def _read(self, key: str) -> bytes | None:
        raise NotImplementedError

    def _write(self, key: str, data: bytes) -> None:
        raise NotImplementedError

    def _create(self, key: str, data: bytes) -> bool:
        raise NotImplementedError

    def _list(self, prefix: str) -> Iterable[str]:
        raise NotImplementedError

    def _delete(self, key: str) -> None:
        raise NotImplementedError

    def _why(self, error: Exception) -> tuple[str, bool]:
        """Returns the reason in words, and whether it may pass within seconds."""
        raise NotImplementedError


def check_key(key: str) -> str:
    """Returns `key`. Raises `UserError` for one that is none, as one that would leave the store."""
    if not _is_key(key):
        raise UserError(f"key {key[:80]!r}: a key has {_RULE}; at most {LONGEST_KEY} bytes, {LONGEST_PART} between two")
    return key


def _is_key(key: str) -> bool:
    def sound(part: str) -> bool:
        return re.fullmatch(r"\w[\w.+=-]*", part) is not None and len(part.encode(errors="replace")) <= LONGEST_PART

    return len(key.encode(errors="replace")) <= LONGEST_KEY and all(map(sound, key.split("/")))


def _check_prefix(prefix: str) -> str:
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


class Folder(Store):
    """Files of a local or a network file system that has hard links.

    A file is written under a name of its own in `.writing`, brought to the disk, then renamed or linked to its key;
    links and other things that are no files are refused, so that nothing outside of the folder is read or written.
    """

    def __init__(self, root: Path, patience: float = PATIENCE):
        super().__init__(str(root), patience)
        self._root, self._writing = root, root / ".writing"

    def sweep(self) -> None:
        """Takes away what writers that died left half-written: files in `.writing` that nobody holds."""
        with contextlib.suppress(OSError):
            for path in self._writing.iterdir():
                with contextlib.suppress(OSError), path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()

    def _read(self, key: str) -> bytes | None:
        try:
            # Neither waits for the other end of a pipe, nor follows a link.
            number = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise OSError(errno.EINVAL, "is no file")
        except OSError:
            os.close(number)
            raise
        with open(number, "rb") as file:
            return file.read()

    def _write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with self._written(data) as (temporary, _):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
            _to_disk(path.parent, self._root)

    def _create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if path.exists():
            return False
        with self._written(data) as (temporary, number):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(temporary, path)
            except FileExistsError:
                # A server of files that was asked twice, since its answer was lost, finds the link it has made itself.
                if os.fstat(number).st_nlink < 2:
                    return False
            _to_disk(path.parent, self._root)
        return True

    def _list(self, prefix: str) -> Iterable[str]:
        above, _, begin = prefix.rpartition("/")
        top, found = self._path(above), []
        for folder, folders, files in os.walk(top, onerror=_unless_missing):
            wanted = begin if Path(folder) == top else ""
            folders[:] = [name for name in folders if name.startswith(wanted) and not name.startswith(".")]
            found += [(Path(folder) / name).relative_to(self._root).as_posix() for name in files]
        return found

    def _delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            _to_disk(path.parent, self._root)

    def _why(self, error: Exception) -> tuple[str, bool]:
        number = getattr(error, "errno", None)
        if number in (errno.EPERM, errno.ENOTSUP, errno.EMLINK) and getattr(error, "filename2", None):
            return "the file system has no hard links, by which a file is created at once", False
        # ENOENT: someone swept or removed a folder under way.
        passes = number in (errno.EINTR, errno.EAGAIN, errno.ESTALE, errno.EBUSY, errno.EIO, errno.ENOENT)
        return getattr(error, "strerror", None) or str(error), passes

    def _path(self, key: str) -> Path:
        """Raises OSError where a part of the way is a link."""
        path = self._root
        for part in key.split("/") if key else ():
            path = path / part
            if path.is_symlink():
                raise OSError(errno.ELOOP, f"{path} is a link, and links are not followed")
        return path

    @contextlib.contextmanager
    def _written(self, data: bytes) -> Iterator[tuple[Path, int]]:
        """A file of its own, on the disk and locked, while it has no key yet; taken away at the end."""
        self._writing.mkdir(parents=True, exist_ok=True)
        temporary = self._writing / secrets.token_hex(8)
        try:
            with temporary.open("xb", buffering=0) as file:
                with contextlib.suppress(OSError):  # of a file system without locks nothing is swept either
                    fcntl.flock(file, fcntl.LOCK_EX)
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
                yield temporary, file.fileno()
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _to_disk(folder: Path, root: Path) -> None:
    """The names in `folder`, and its own name in the folders above, to the root."""
    while True:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
        if folder == root:
            return
        folder = folder.parent


class Bucket(Store):
    """A store of TensorStore: objects of S3 or of a server that speaks it, of Google Cloud Storage, or memory.

    Creation is one conditional request (`if-none-match` of S3, `ifGenerationMatch=0` of Google), so it is as atomic as
    the server is. A value is one request: 5 GiB at most for S3.
    """

    def __init__(self, place: str, opened: tensorstore.KvStore, patience: float = PATIENCE):
        super().__init__(place, patience)
        self._opened, self._none = opened, b""

    def _read(self, key: str) -> bytes | None:
        found = self._opened.read(key).result()
        return bytes(found.value) if found.state == "value" else None

    def _write(self, key: str, data: bytes) -> None:
        self._opened.write(key, data).result()

    def _create(self, key: str, data: bytes) -> bool:
        # A generation of b"" would mean no condition, so that of a missing key is asked for, once.
        if not self._none:
            absent = self._opened.read(f"none-{secrets.token_hex(8)}").result()
            if absent.state != "missing" or not absent.stamp.generation:
                raise ValueError("the store does not say that a key is missing")
            self._none = absent.stamp.generation
        return self._opened.write(key, data, if_equal=self._none).result().generation != b""

    def _list(self, prefix: str) -> Iterable[str]:
        begin = prefix.encode()
        end = begin[:-1] + bytes([begin[-1] + 1]) if begin else b""  # UTF-8 has no byte 255
        return [
            key.decode(errors="replace") for key in self._opened.list(tensorstore.KvStore.KeyRange(begin, end)).result()
        ]

    def _delete(self, key: str) -> None:
        self._opened.write(key, None).result()

    def _why(self, error: Exception) -> tuple[str, bool]:
        text = str(error)
        passes = re.search(r"^(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)\b|code='(429|5\d\d)'|curl_code=", text)
        text = re.sub(r"^[A-Z_]+: (All \d+ retry attempts failed: )?", "", text.partition(" [")[0])
        if status := re.search(r"http_response_code='(\d{3})'", str(error)):
            said = http.client.responses.get(int(status[1]), text) if text == "Unknown" else text
            text = f"{said} (HTTP {status[1]})"
        return text or type(error).__name__, passes is not None


_IN_MEMORY = tensorstore.Context()  # of all stores of `memory://`, which are those of this process


def open_store(url: str, *, write: bool = True) -> Store:
    """Opens a path, `file:///path`, `s3://bucket/prefix`, `gs://bucket/prefix` or `memory://name` (of this process).

    A small key is written, created, read and deleted first; a folder is made where there is none. With write=False
    nothing is written, and the folder must be there. Endpoint and region of S3 come from AWS_ENDPOINT_URL_S3 or
    AWS_ENDPOINT_URL and from AWS_REGION or AWS_DEFAULT_REGION, credentials from where the AWS and Google tools look for
    them.

    Raises `UserError` for what is no such URL and for a store that cannot be read or, with `write`, written.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        store = _folder(url, url, write)
    elif scheme == "file":
        if not rest.startswith("/"):
            raise UserError(f"{url}: a URL of a file has three slashes before its path: file:///path")
        store = _folder(url, urllib.parse.unquote(rest), write)
    elif scheme in SCHEMES:
        store = _bucket(url, scheme, *rest.rstrip("/").partition("/")[::2])
    else:
        raise UserError(
            f"{url}: unknown kind of store {scheme!r}; valid: a path, {', '.join(f'{s}://' for s in SCHEMES)}"
        )
    _try(store, url, write)
    return store


def _folder(url: str, path: str, write: bool) -> Folder:
    if not path:
        raise UserError(f"{url!r}: needs a path")
    try:
        root = Path(path).resolve()
        there = root.exists()
        usable = root.is_dir() if there else write
    except (OSError, RuntimeError, ValueError) as e:  # RuntimeError: a loop of links
        raise UserError(f"{url}: {getattr(e, 'strerror', None) or e}") from e
    if not usable:
        raise UserError(f"{url}: {'is no folder' if there else 'no such folder'}")
    store = Folder(root)
    if write:
        store.sweep()
    return store


def _bucket(url: str, scheme: str, bucket: str, prefix: str) -> Bucket:
    if not bucket or (prefix and not _is_key(prefix)):
        rule = f"needs {scheme}://{'NAME' if scheme == 'memory' else 'BUCKET/PREFIX'}; a prefix has {_RULE}"
        raise UserError(f"{url}: {rule}")
    for name, value in _OF_CURL.items():
        os.environ.setdefault(name, value)
    context = _IN_MEMORY if scheme == "memory" else None
    try:
        opened = tensorstore.KvStore.open(specification(scheme, bucket, prefix), context=context).result()
    except (ValueError, OSError, NotImplementedError) as e:
        raise UserError(f"{url}: cannot be opened: {str(e).partition(' [')[0]}") from e
    return Bucket(url.rstrip("/"), opened)


# TensorStore asks when it first sends something. Else a server that accepts and says nothing is waited for without end.
_OF_CURL = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "15",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
_ONCE = {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"}  # Store tries again, for a bounded time


def specification(scheme: str, bucket: str, prefix: str) -> dict[str, Any]:
    """Returns what TensorStore is told of a bucket, with what the environment says of S3."""
    path = f"{prefix}/" if prefix else ""
    if scheme == "memory":
        return {"driver": "memory", "path": f"{bucket}/{path}"}
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": path, "context": {"gcs_request_retries": _ONCE}}
    # Without use_conditional_write TensorStore asks HEAD, then PUT, where the endpoint is not Amazon's: that is a race.
    spec = {"driver": "s3", "bucket": bucket, "path": path, "use_conditional_write": True}
    value, context = os.environ.get, {"s3_request_retries": _ONCE}
    if endpoint := value("AWS_ENDPOINT_URL_S3") or value("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": "us-east-1"}  # the region that own servers expect
    if region := value("AWS_REGION") or value("AWS_DEFAULT_REGION"):
        spec["aws_region"] = region
    # The chain of credentials knows a profile only by its name. It has those of the environment too, but complains on
    # stderr of each file that it looks for in vain.
    context["aws_credentials"] = {"type": "default", "profile": value("AWS_PROFILE") or "default"}
    if value("AWS_ACCESS_KEY_ID") and value("AWS_SECRET_ACCESS_KEY"):
        context["aws_credentials"] = {"type": "environment"}
    return spec | {"context": context}


def _try(store: Store, url: str, write: bool) -> None:
    key, patience = f"probe-{secrets.token_hex(8)}", store.patience
    store.patience = min(patience, _PATIENCE_AT_FIRST)
    try:
        store.list(key)
        store.read(key)
        if write:
            if not store.create(key, b"new") or store.create(key, b"newer") or store.read(key) != b"new":
                raise UserError(f"{url}: what is there can be created again: islands would overwrite each other")
            store.write(key, b"old")
            store.delete(key)
    except StoreError as e:
        raise UserError(f"{url}: {e.reason}") from e
    store.patience = patience
