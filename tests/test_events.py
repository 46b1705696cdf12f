"""`events.jsonl`: rows stay, a torn last line goes, and what cannot be written ends nothing."""

import json

from frugalmoe.train import events


def kinds(path) -> list[str]:
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()]


def test_rows_of_several_starts_stay_and_a_torn_line_goes(tmp_path) -> None:
    path = tmp_path / events.FILE
    events.Events(tmp_path).write(8, "first", "é" * 10)
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:-cut])
        events.Events(tmp_path).write(4, "second", "gone back")
        assert kinds(path) == ["first", "second"], cut
    assert json.loads(path.read_text().splitlines()[1]).keys() == {"step", "kind", "what", "seconds"}


def test_a_file_of_one_torn_line_begins_anew(tmp_path) -> None:
    (tmp_path / events.FILE).write_bytes(b'{"step": 1, "ki')
    events.Events(tmp_path).write(2, "only", "")
    assert kinds(tmp_path / events.FILE) == ["only"]


def test_what_cannot_be_written_ends_nothing_and_the_quiet_write_nothing(tmp_path) -> None:
    events.Events(tmp_path / "not there").write(1, "lost", "")
    events.Events(tmp_path, quiet=True).write(1, "quiet", "")
    assert not list(tmp_path.iterdir())
