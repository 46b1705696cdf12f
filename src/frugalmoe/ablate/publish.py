"""Published studies: what a repository keeps of a study, enough to make its report again, and the index of them.

| under experiments/ | |
|---|---|
| RESULTS.md | the index: one row for each published study |
| NAME/RESULTS.md, *.png | question, expectation, tables and pictures; what is written by hand stays |
| NAME/study.json, results.parquet, fit.json, goodput.json | what they are made from; the last two where there are any |
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from frugalmoe.ablate import scaling, worktime
from frugalmoe.ablate.comparison import Comparison, load_comparison
from frugalmoe.ablate.grid import Grid
from frugalmoe.ablate.plan import read_study
from frugalmoe.ablate.report import markdown, pictures, pipes, state_line, summary_line, verdict_lines
from frugalmoe.errors import UserError
from frugalmoe.files import write_atomically, write_generated, write_json

FEW_ARMS = 8  # of a study with more arms the index lists only those that differ


def publish_study(workdir: str | Path, root: str | Path) -> Path:
    """Writes `root`/NAME and the index `root`/RESULTS.md; returns the page's path. `workdir` may be `root`/NAME itself.

    Raises `UserError`, before it writes, for a directory that is not a study or has no complete run, for a study that
    was run in another size than the one of its name that is published, and for a published study that is damaged.
    """
    c = load_comparison(workdir)
    folder = _folder(Path(root), c.study["name"])
    for neighbour in _published(root):
        load_comparison(neighbour)
    if folder.resolve() != c.workdir.resolve():
        _check_same_study(folder, c.study)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--publish={root}: cannot be written ({e.strerror})") from e
        write_atomically(folder / "results.parquet", (c.workdir / "results.parquet").read_bytes())
        write_json(folder / "study.json", {**c.study, "workdir": str(workdir)})
        for name in (scaling.FILE, scaling.LEVERAGE, worktime.FILE):
            if (c.workdir / name).is_file():
                write_atomically(folder / name, (c.workdir / name).read_bytes())
        c = load_comparison(folder)
    drawn = pictures(c)
    for name, data in drawn.items():
        write_atomically(folder / f"{name}.png", data)
    write_generated(folder / "RESULTS.md", page(c, drawn))
    write_generated(Path(root) / "RESULTS.md", index(root))
    return folder / "RESULTS.md"


def _folder(root: Path, name: str) -> Path:
    """Returns the folder in `root` where a study is published. Raises `UserError` where a link puts it elsewhere."""
    folder = root / name
    if name == "RESULTS.md" or folder.resolve().parent != root.resolve():
        raise UserError(
            f"--publish={root}: {folder} is no folder of its own there; rename the study, or remove the link"
        )
    return folder


def _published(root: str | Path) -> list[Path]:
    return [path.parent for path in sorted(Path(root).glob("*/results.parquet"))]


def _check_same_study(folder: Path, study: Mapping[str, Any]) -> None:
    """Raises `UserError` where the folder holds the study in another size: comments and citations mean that one."""
    if not (folder / "study.json").is_file():
        return
    there = read_study(folder)
    fields = ("base", "overrides", "command_overrides", "steps", "tokens_per_step")
    if differing := [f for f in fields if f in there and there[f] != study.get(f)]:
        shown = ", ".join(f"{f}: {there[f]!r} there, {study.get(f)!r} here" for f in differing)
        raise UserError(f"{folder}: holds the study as it was run with {shown}; delete its study.json to replace it")


def page(c: Comparison, drawn: Iterable[str]) -> str:
    """Returns the generated part of a study's RESULTS.md; `drawn` names its pictures."""
    # A study that is published where it was trained names no other place.
    trained_in = c.study.get("workdir", c.workdir)
    return markdown(c, drawn, f"frugalmoe report {trained_in} --publish={c.workdir.parent}")


def index(root: str | Path) -> str:
    """Returns a table of the studies that are published under `root`."""
    rows = []
    for folder in _published(root):
        c, name = load_comparison(folder), folder.name
        found = [line for line in verdict_lines(c) if len(c.arms) <= FEW_ARMS or ": not disting" not in line]
        found = "<br>".join([summary_line(c), *found])
        rows.append([f"[{name}]({name}/RESULTS.md)", c.study["question"], state_line(c), found])
    return pipes(Grid("", ["study", "question", "run", "found"], rows, text_columns=4))
