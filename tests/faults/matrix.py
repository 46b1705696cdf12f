"""Runs the fault matrix in its long form and prints its table: fault, injections, survived, lost work, time to recover.

    make faults                       all of it, in an hour on two cores; the table goes into docs/reliability.md too
    make faults ARGS="--only=F5,F9"   some rows; those of the others stay as they were measured
    make faults ARGS=--short          as few injections as in CI; the table is printed and not kept
    make faults ARGS=--read=FILE      no tests: the figures that some gave, run with FRUGALMOE_FAULTS_TABLE=FILE

A row is of a test that gives figures (`runs.figures`); one that fails gives none.
"""

import argparse
import collections
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from frugalmoe.files import read_json, write_generated, write_json

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"
KEPT = Path(__file__).with_name("figures.json")
KILL, DISK, STUCK, DATA, GUARD, COMMANDS = (
    f"faults/test_fault_{name}.py" for name in ("kill", "disk", "stuck", "data", "guard", "commands")
)
# Fault: what is done to a run, and the tests of it: a glob of files, and words that their names hold.
FAULTS = {
    "F1": ("SIGKILL at a random moment", {KILL: "killed"}),
    "F2": ("SIGKILL inside a save", {KILL: "killed_at"}),
    "F3": ("SIGTERM", {KILL: "asked", "test_run_faults.py": "signal", "test_processes.py": "a_signal"}),
    "F4": ("second SIGTERM, grace over", {KILL: "grace"}),
    "F5": ("disk full", {DISK: "", COMMANDS: "space"}),
    "F6": ("checkpoint file cut off, empty, deleted", {"test_damaged.py": "harm or gives_way", COMMANDS: "harmed"}),
    "F7": ("flipped bit in a checkpoint", {"test_damaged.py": "flipped"}),
    "F8": ("junk among checkpoints", {"test_damaged.py": "junk", "test_checkpoints_command.py": ""}),
    "F9": ("damaged or missing data", {DATA: "damaged or missing", COMMANDS: "cut_off"}),
    "F10": ("other data at resume", {DATA: "changed", COMMANDS: "changed"}),
    "F11": ("gradient that is not finite", {GUARD: "finite or five"}),
    "F12": ("loss spike, narrow and wide", {GUARD: "noise"}),
    "F13": ("rollback, then a crash", {GUARD: "killed_amid"}),
    "F14": ("silent error of one replica", {"test_replicas.py": "flips or scales or repeat or two_processes"}),
    "F15": (
        "death of one of several processes",
        {STUCK: "back or first_process", "faults/test_fault_remaining.py": "", "test_processes.py": "killed or dead"},
    ),
    "F16": ("error in one of several processes", {"test_processes.py": "shared"}),
    "F17": ("hang", {STUCK: "sleep or slow or frozen or signal", "test_supervise.py": "frozen or no_step"}),
    "F18": ("clock set by an hour", {STUCK: "clock"}),
    "F19": ("other number of devices or processes", {"test_processes.py": "any_number"}),
    "F20": ("other versions, flags or dtypes at resume", {"faults/test_fuzz_resume.py": "command or dtype"}),
    "F21": ("two runs in one directory, stale locks", {KILL: "lock or two_runs"}),
    "F22": ("malicious files", {"faults/test_fuzz.py": "what_is_read", "faults/test_fuzz_malicious.py": "commands"}),
    "F23": ("broken config values", {"faults/test_fuzz.py": "what_is_read", "test_configs.py": ""}),
    "F24": ("retention under faults", {KILL: "instant"}),
    "F25": ("islands that leave, stall or send garbage", {"test_islands_processes.py": ""}),
    "F26": ("what happened and what it cost", {"test_goodput*.py": "", "test_soak*.py": "", "test_events.py": ""}),
}


def main() -> int:
    """Returns 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="F1,F5", help="faults whose tests are run (default: all)")
    parser.add_argument("--short", action="store_true", help="few injections; nothing is kept")
    parser.add_argument("--read", type=Path, metavar="FILE", help="run nothing: take the figures that tests gave")
    parser.add_argument("--table", action="store_true", help="run nothing: write the page from the figures kept")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else [*FAULTS]
    if unknown := [name for name in chosen if name not in FAULTS]:
        parser.error(f"--only={args.only}: no fault {unknown[0]}; valid: {', '.join(FAULTS)}")
    kept = read_json(KEPT) if KEPT.is_file() else {}
    code = 0
    if args.read:
        kept |= _given(args.read, chosen, args.short)
    if not (args.read or args.table):  # a fault whose tests fail has no row
        kept = {name: figures for name, figures in kept.items() if name.split()[0] not in chosen}
    for words, files in _passes(chosen) if not (args.table or args.read) else ():
        found, failed = _run(words, files, chosen, args.short)
        code, kept = code or int(failed), kept | found
    if not args.short:
        write_json(KEPT, {name: kept[name] for name in sorted(kept, key=_order)})
        write_generated(PAGE, _table(kept))
    print(_table(kept))
    return code


def _passes(chosen: list[str]) -> list[tuple[str, list[Path]]]:
    """(Words, files) of each run of pytest: the files of all faults that want the same words, each test once."""
    wanted: dict[Path, set[str]] = collections.defaultdict(set)
    for fault in chosen:
        for pattern, words in FAULTS[fault][1].items():
            for path in TESTS.glob(pattern):
                wanted[path].add(words)
    of_words: dict[str, list[Path]] = collections.defaultdict(list)
    for path, words in wanted.items():
        of_words["" if "" in words else " or ".join(sorted(words))].append(path)
    return sorted(of_words.items())


def _run(words: str, files: list[Path], chosen: list[str], short: bool) -> tuple[dict, bool]:
    """Runs tests; returns ({title: figures}, whether one failed)."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.jsonl"
        environment = os.environ | {"FRUGALMOE_FAULTS_TABLE": str(table)}
        environment |= {} if short else {"FRUGALMOE_FAULTS_LONG": "1"}
        line = [sys.executable, "-m", "pytest", "-q", *map(str, sorted(files))]
        code = subprocess.run([*line, "-k", words] if words else line, env=environment, cwd=TESTS.parent).returncode
        return _given(table, chosen, short), code not in (0, 5)  # 5: no test has these words


def _given(table: Path, chosen: list[str], short: bool) -> dict:
    """{title: figures} of the rows that tests gave, those of a title added up."""
    found: dict = {}
    for row in map(json.loads, table.read_text().splitlines() if table.is_file() else []):
        if row["fault"].partition(" ")[0] in chosen:
            old = found.get(row["fault"], {"injections": 0, "survived": 0, "lost": None, "seconds": []})
            lost = [value for value in (old["lost"], row["lost"]) if value is not None]
            found[row["fault"]] = {
                "injections": old["injections"] + row["injections"],
                "survived": old["survived"] + row["survived"],
                "lost": max(lost, default=None),
                "seconds": [round(second, 2) for second in old["seconds"] + row["seconds"]],
                **_about(short),
            }
    return found


def _about(short: bool) -> dict[str, str]:
    return {"date": datetime.date.today().isoformat(), "form": "short" if short else "long"}


def _order(title: str) -> tuple[int, str]:
    return int(title.split()[0][1:]), title


def _table(kept: dict) -> str:
    """The table of the page, F1 to F26, each with a line at least."""
    lines = ["| fault | injections | survived | lost work, steps at most | seconds, median (most) | measured |"]
    lines.append("|---|---|---|---|---|---|")
    for fault, (title, tests) in FAULTS.items():
        own = [name for name in kept if name.split()[0] == fault]
        for name in sorted(own):
            row = kept[name]
            seconds = row["seconds"]
            times = f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else ""
            lost = "" if row["lost"] is None else row["lost"]
            lines.append(f"| {name} | {row['injections']} | {row['survived']} | {lost} | {times} | {row['date']} |")
        if not own:
            there = sorted({path.name for pattern in tests for path in TESTS.glob(pattern)})
            lines.append(f"| {fault} {title} | | | | | {'in ' + ', '.join(there) if there else 'not covered'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
