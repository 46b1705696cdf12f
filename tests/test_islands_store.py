"""Stores keep what they get, whole, through races, kills, full disks, servers that go away; else one line says why."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
from s3_server import s3_server

from frugalmoe.errors import UserError
from frugalmoe.islands import store as stores
from frugalmoe.islands.store import StoreError, open_store

BAD_KEYS = (
    "", "/", "a/", "/a", "a//b", "..", "../a", "a/../b", ".a", "a/.b", "a\0b", "a\\b", "a b", "a\n", "-a", "a?b", "a*",
    "~", "é" * 120, "a/" * 300 + "a",
)  # fmt: skip
GOOD_KEYS = ("a", "b/c", "rounds/000007/commit.json", "île/übung", "A_1.b+c=d-e", "x" * 200, "/".join(["y" * 99] * 5))


@pytest.fixture(scope="module")
def server():
    with s3_server() as found, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture(params=["path", "file", "s3", "memory"])
def url(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('server').url}/{tmp_path.name}"
    place = tmp_path / "a folder"
    return {"path": str(place), "file": f"file://{urllib.parse.quote(str(place))}"}.get(
        request.param, f"memory://{tmp_path.name}"
    )


def test_a_store_is_a_mapping_that_creates_once(url):
    store = open_store(url)
    assert store.list("") == [] and all(store.read(key) is None for key in GOOD_KEYS)
    for i, key in enumerate(GOOD_KEYS):
        store.write(key, b"old")
        store.write(key, b"%d" % i)
        assert not store.create(key, b"other")
    assert open_store(url, write=False).list("") == sorted(GOOD_KEYS)
    assert [store.read(key) for key in GOOD_KEYS] == [b"%d" % i for i in range(len(GOOD_KEYS))]
    assert store.list("rounds/") == store.list("rounds/0000") == store.list("ro") == ["rounds/000007/commit.json"]
    assert store.list("b/c/") == store.list("nothing/here") == []
    for key in (*GOOD_KEYS, "nothing"):
        store.delete(key)
    assert store.list("") == [] and store.create("b/c", b"") and store.read("b/c") == b""
    assert not store.create("b/c", b"")


def test_nothing_and_a_few_mebibytes_are_values(url):
    store, large = open_store(url), os.urandom(5 << 20)
    store.write("none", b"")
    assert store.create("large", large)
    assert store.read("none") == b"" and store.read("large") == large


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_that_is_none_is_refused(tmp_path, key):
    (tmp_path / "secret").write_text("outside")
    store = open_store(str(tmp_path / "in"))
    for operation in (store.read, store.delete, lambda k: store.write(k, b""), lambda k: store.create(k, b"")):
        with pytest.raises(UserError, match=r"a key has letters, digits"):
            operation(key)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "secret"] and store.list("") == []
    if key not in ("", "a/"):
        with pytest.raises(UserError):
            store.list(key)


# Races. Processes wait for each other at a file, then create the same keys.

RACE = """
import sys, time
from pathlib import Path
from frugalmoe.islands.store import open_store

url, name, gate = sys.argv[1:]
store = open_store(url)
Path(gate, name).touch()
while len(list(Path(gate).iterdir())) < 2:
    time.sleep(0.001)
won = [i for i in range(200) if store.create(f"round/{i:03}", f"{name} {i}".encode() * 99)]
print(*won)
"""


@pytest.mark.parametrize("kind", ["path", "s3"])
def test_of_two_processes_that_create_a_key_one_wins(kind, tmp_path, request):
    url = str(tmp_path / "store") if kind == "path" else f"{request.getfixturevalue('server').url}/race"
    (tmp_path / "gate").mkdir()
    runs = [python(RACE, url, name, str(tmp_path / "gate")) for name in "AB"]
    won = [set(map(int, run.communicate()[0].split())) for run in runs]
    assert all(run.returncode == 0 for run in runs)
    assert won[0] | won[1] == set(range(200)) and not won[0] & won[1]
    store = open_store(url)
    for name, keys in zip("AB", won):
        assert all(store.read(f"round/{i:03}") == f"{name} {i}".encode() * 99 for i in keys)
    assert len(store.list("round/")) == 200


def python(code: str, *arguments: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(stores.__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, **pipes, **options)


# Writers that die, or freeze, at any moment.

WRITER = """
import itertools, sys
from frugalmoe.islands.store import open_store

store = open_store(sys.argv[1])
print("ready", flush=True)
for i in itertools.count():
    store.write("value", bytes([i % 256]) * (1 << 20))
    store.create(f"made/{i}", bytes([i % 256]) * (1 << 16))
"""


def test_a_writer_that_is_killed_or_frozen_leaves_whole_values_and_stops_nobody(tmp_path):
    writer = python(WRITER, str(tmp_path))
    assert writer.stdout.readline() == "ready\n"
    store = open_store(str(tmp_path))
    time.sleep(0.3)
    for _ in range(10):  # frozen at moments that are its own
        writer.send_signal(signal.SIGSTOP)
        store.write("value", b"mine")
        assert store.read("value") == b"mine" and store.create(f"free/{time.monotonic_ns()}", b"")
        writer.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    writer.kill()
    writer.communicate()
    left = store.read("value")
    assert left == b"mine" or (len(left) == 1 << 20 and len(set(left)) == 1)
    made = [store.read(key) for key in store.list("made/")]
    assert made and all(len(value) == 1 << 16 and len(set(value)) == 1 for value in made)
    assert all(key == "value" or key.startswith(("made/", "free/")) for key in store.list(""))


def test_what_a_dead_writer_left_is_swept_and_what_a_live_one_holds_is_not(tmp_path):
    hold = """
import sys
from frugalmoe.islands.store import open_store
store = open_store(sys.argv[1])
with store._written(b"half"):
    print("held", flush=True)
    sys.stdin.read()
"""
    writers = [python(hold, str(tmp_path), stdin=subprocess.PIPE) for _ in range(2)]
    assert [writer.stdout.readline() for writer in writers] == ["held\n"] * 2
    writers[0].kill()
    writers[0].communicate()
    assert len(list((tmp_path / ".writing").iterdir())) == 2
    store = open_store(str(tmp_path))
    assert len(list((tmp_path / ".writing").iterdir())) == 1 and store.list("") == []
    assert writers[1].communicate()[0] == "" and not list((tmp_path / ".writing").iterdir())


def test_a_folder_swept_away_under_a_writer_is_made_again(tmp_path):
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "store/.writing").rmdir()
    store.write("a/b", b"1")
    assert store.read("a/b") == b"1"


# Links and other things that are no files.


def test_links_are_not_followed(tmp_path):
    store, outside = open_store(str(tmp_path / "store")), tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"secret")
    (tmp_path / "store/folder").symlink_to(outside)
    (tmp_path / "store/file").symlink_to(outside / "file")
    (tmp_path / "store/nowhere").symlink_to("nothing")
    for key in ("folder/file", "file", "nowhere", "folder/new"):
        for operation in (store.read, store.delete, lambda k: store.write(k, b"1"), lambda k: store.create(k, b"1")):
            with pytest.raises(StoreError, match="is a link, and links are not followed"):
                operation(key)
    with pytest.raises(StoreError, match="is a link"):
        store.list("folder/")
    assert "folder/file" not in store.list("") and (outside / "file").read_bytes() == b"secret"
    assert [p.name for p in outside.iterdir()] == ["file"]
    (tmp_path / "short").symlink_to(tmp_path / "store")  # what the user gives may be one
    assert open_store(str(tmp_path / "short")).create("key", b"")


def test_a_pipe_or_a_folder_in_the_place_of_a_value_is_said(tmp_path):
    store = open_store(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for key in ("pipe", "folder"):
        with pytest.raises(StoreError, match=f"{key}: cannot be read: is no file"):
            store.read(key)
    with pytest.raises(StoreError, match="folder: cannot be written: Is a directory"):
        store.write("folder", b"")
    with pytest.raises(StoreError, match="file/below: cannot be created: "):
        store.create("file/below", b"")
    assert store.read("file/below") is None
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff\xfe", os.O_CREAT))
    (tmp_path / "a\nb").touch()
    assert store.list("") == ["file", "pipe"]


def test_a_file_system_without_hard_links_is_refused(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be created: the file system has no hard links"):
        open_store(str(tmp_path))


# What a user can mend is one line when the store is opened.


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "needs a path"),
        ("a\0b", "null byte"),
        ("x" * 300, "File name too long"),
        ("/dev/null", "is no folder"),
        ("/dev/null/x", "Not a directory"),
        ("/proc/self", "cannot be created"),
        ("file://there/path", "three slashes"),
        ("ftp://there", "unknown kind of store 'ftp'; valid: a path, file://, s3://, gs://, memory://"),
        ("://", "unknown kind of store ''"),
        ("s3://", "needs s3://BUCKET/PREFIX"),
        ("gs:///prefix", "needs gs://BUCKET/PREFIX"),
        ("s3://bucket/../other", "a prefix has letters"),
        ("s3://bucket/a?b=c", "a prefix has letters"),
        ("s3://Not_A_Bucket!", "Invalid S3 bucket name"),
        ("gs://B!", "cannot be opened"),
        ("memory://", "needs memory://NAME"),
    ],
)
def test_a_url_of_no_store_is_refused(url, words, monkeypatch):
    monkeypatch.setattr(stores, "_PATIENCE_AT_FIRST", 0.0)
    with pytest.raises(UserError) as error:
        open_store(url)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_to_look_at_a_store_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_store(str(tmp_path / "none"), write=False)
    assert open_store(str(tmp_path), write=False).list("") == [] and not list(tmp_path.iterdir())


def test_a_folder_without_permission_is_refused():
    """By one who is not root: root may write everywhere."""
    code = """
import os, sys
from frugalmoe.errors import UserError
from frugalmoe.islands.store import open_store
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
for place in sys.argv[1:]:
    try:
        open_store(place)
    except UserError as e:
        print(e)
"""
    with tempfile.TemporaryDirectory() as place:  # pytest's own are closed to others
        Path(place, "secret").mkdir(mode=0o000)
        Path(place).chmod(0o555)
        said = python(code, place, f"{place}/secret", f"{place}/secret/deep").communicate()[0].splitlines()
        Path(place).chmod(0o755)
        Path(place, "secret").chmod(0o700)
    assert said == [
        f"{place}: cannot be created: Permission denied",
        f"{place}/secret: cannot be listed: Permission denied",
        f"{place}/secret/deep: Permission denied",
    ]


@pytest.mark.parametrize(("endpoint", "words"), [("", "NoSuchBucket"), ("http://127.0.0.1:1", "connect")])
def test_a_bucket_that_is_not_there_is_refused(server, monkeypatch, endpoint, words):
    monkeypatch.setattr(stores, "_PATIENCE_AT_FIRST", 0.3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint or server.environment["AWS_ENDPOINT_URL"])
    for write in (True, False):
        with pytest.raises(UserError, match=words) as error:
            open_store("s3://nobodys/x", write=write)
        assert str(error.value).startswith("s3://nobodys/x: cannot be listed: ") and "\n" not in str(error.value)


# What may pass: `StoreError`, after a bounded time, and nothing half-written.


def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path):
    """A file system of 256 KiB where this process may mount one, else the largest file that it may write."""
    code = """
import resource, subprocess, sys, time
from frugalmoe.islands.store import StoreError, open_store
mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", sys.argv[1]]
mounted = subprocess.run(mount, capture_output=True).returncode == 0
if not mounted:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    store = open_store(sys.argv[1])
    store.write("small", b"old" * 9)
    began = time.monotonic()
    for operation in (store.write, store.create):
        for key in ("small", "new"):
            try:
                operation(key, bytes(1 << 20))
                print("kept", key)
            except StoreError as e:
                print(e, isinstance(e, OSError))
    print(store.read("small"), store.list(""), list((store._root / ".writing").iterdir()))
    store.write("small", b"1")
    assert time.monotonic() - began < 10  # nothing was tried for as long as what may pass within seconds
finally:
    if mounted:
        subprocess.run(["umount", "-l", sys.argv[1]], check=True)
"""
    run = python(code, str(tmp_path))
    lines = run.communicate()[0].splitlines()
    assert run.returncode == 0
    why = "(No space left on device|File too large)"
    for line, (key, done) in zip(lines, [("small", "written"), ("new", "written")]):
        assert re.fullmatch(f"{tmp_path}/{key}: cannot be {done}: {why} True", line)
    assert lines[2] == "kept small" and "new: cannot be created: " in lines[3]
    assert lines[4] == f"{b'old' * 9!r} ['small'] []"


def test_a_server_that_goes_and_comes_back_is_waited_for(server):
    store = open_store(f"{server.url}/away")
    store.write("key", b"before")
    server.tell("stop")
    store.patience = 0.4
    for operation in (lambda: store.read("key"), lambda: store.write("key", b"never"), lambda: store.list("")):
        with pytest.raises(StoreError, match=r"s3://islands/away/\w*: cannot be \w+: .*[Cc]onnect"):
            operation()
    store.patience = 20
    back = threading.Timer(1, server.tell, ["start"])
    back.start()
    store.write("key", b"after")
    back.join()
    assert store.read("key") == b"after"
    server.tell("fail 3")
    assert store.create("other", b"1") and store.read("other") == b"1"
    server.tell("fail 1000")
    store.patience = 0.5
    with pytest.raises(StoreError, match=r"cannot be read: Service Unavailable \(HTTP 503\)"):
        store.read("key")
    server.tell("fail 0")


def test_a_server_that_says_nothing_is_not_waited_for_without_end(server):
    """In a process of its own: TensorStore asks for its limits once."""
    code = """
import sys
from frugalmoe.islands.store import StoreError, open_store
store = open_store(sys.argv[1])
store.patience = 1
print("open", flush=True)
sys.stdin.readline()
try:
    store.read("key")
except StoreError as e:
    print(e)
"""
    with limits_of_curl("1"):
        run = python(code, f"{server.url}/frozen", stdin=subprocess.PIPE)
    assert run.stdout.readline() == "open\n"
    server.process.send_signal(signal.SIGSTOP)
    try:
        said = run.communicate("go\n", timeout=30)[0]
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert said.startswith("s3://islands/frozen/key: cannot be read: ") and "too slow" in said


@contextlib.contextmanager
def limits_of_curl(seconds: str):
    with pytest.MonkeyPatch.context() as patch:
        for name in stores._OF_CURL:
            patch.setenv(name, seconds)
        yield


def test_a_bucket_of_s3_says_nothing_on_stderr(server):
    run = python("import sys\nfrom frugalmoe.islands.store import open_store\nopen_store(sys.argv[1])", server.url,
                 stderr=subprocess.PIPE)  # fmt: skip
    assert run.communicate() == ("", "") and run.returncode == 0


@pytest.mark.parametrize("profile", ["", "other"])
def test_credentials_may_stand_in_the_usual_file(server, profile, monkeypatch, tmp_path):
    """The server takes nothing that is not signed. AWS_PROFILE names a section of the file."""
    (tmp_path / ".aws").mkdir()
    key = "aws_access_key_id = somebody\naws_secret_access_key = something\n"
    (tmp_path / ".aws/credentials").write_text(f"[{profile or 'default'}]\n{key}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    code = """
import os, sys
from frugalmoe.errors import UserError
from frugalmoe.islands.store import open_store
for os.environ["AWS_PROFILE"] in sys.argv[2:]:
    try:
        print(open_store(sys.argv[1]).list("none"))
    except UserError as e:
        print(e)
"""
    run = python(code, f"{server.url}/file", profile, "nobody", stderr=subprocess.DEVNULL)
    assert run.communicate()[0] == f"[]\n{server.url}/file: cannot be created: Forbidden (HTTP 403)\n"


def test_google_is_told_the_same(monkeypatch):
    """The specification only: no server of Google's is at hand."""
    said = stores.tensorstore.KvStore.Spec(stores.specification("gs", "bucket", "a/b")).to_json()
    assert (said["driver"], said["bucket"], said["path"]) == ("gcs", "bucket", "a/b/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one/")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two/")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-9")
    said = stores.specification("s3", "bucket", "")
    assert (said["endpoint"], said["aws_region"], said["path"]) == ("http://two", "eu-west-9", "")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    said = stores.specification("s3", "bucket", "")
    assert "endpoint" not in said and said["context"]["aws_credentials"] == {"type": "default", "profile": "default"}


def test_a_server_that_knows_no_conditions_or_not_us_is_refused(monkeypatch):
    with s3_server() as locked:
        for name, value in locked.environment.items():
            monkeypatch.setenv(name, value)
        store = open_store(locked.url)
        locked.tell("overlook")
        with pytest.raises(UserError, match="can be created again: islands would overwrite each other"):
            open_store(locked.url)
        locked.tell("lock")
        with pytest.raises(StoreError, match=r"key: cannot be written: .*(Access|Denied|Forbidden)"):
            store.write("key", b"")
        with pytest.raises(UserError, match=r"cannot be listed: .*(Access|Denied|Forbidden)"):
            open_store(locked.url)
