"""The long form of what test_islands_processes.py proves of islands, with real processes.

python tests/islands_soak.py --faults=50 --seed=7       # kills, joins, leaves and freezes; accounts and replay
python tests/islands_soak.py --faults=50 --runs         # the same of `frugalmoe train --islands`
python tests/islands_soak.py --kills=1                  # of `frugalmoe train --islands`, between any two operations
python tests/islands_soak.py --stragglers               # speeds 1 : 2 : 4 : 8, rounds of time beside equal steps
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

from islands_processes import (
    COMPLETE,
    KILLED,
    SMALL,
    Disturber,
    Place,
    at_speed,
    check,
    check_kills,
    product,
    product_rules,
    vectors,
)
from runs import write_text
from test_islands_rounds import make_rules

from frugalmoe.cost.islands import kept_when_all_wait

SPEEDS = (1.0, 0.5, 0.25, 0.125)
WORK = 0.01  # seconds of a processor that a step takes


def faults(folder: Path, count: int, seed: int, of_runs: bool) -> None:
    rounds, began = 2 * count + 20, time.monotonic()
    if of_runs:  # rounds that take seconds, as a run needs some to start
        text = write_text(folder / "text")
        section = {"round_steps": 40, "lapse_seconds": 10.0, "keep_rounds": 0, "bits": 8}
        fields = SMALL | {"train.steps": 40 * rounds, "model.moe.router": "sigmoid_bias"}
        fields |= {f"islands.{name}": value for name, value in section.items()}
        disturber, rules = Disturber(folder, seed, fields, product, text), product_rules(text, fields)
    else:
        fields = {"steps": 4 * rounds, "lapse_seconds": 2.0}
        disturber, rules = Disturber(folder, seed, fields, vectors, 0.02), make_rules(**fields)
    done = disturber.run(islands=2 if of_runs else 3, faults=count, freeze=20.0 if of_runs else 4.0)
    found = check(disturber, rules)
    spent = time.monotonic() - began
    kinds = {kind: sum(fault[1] == kind for fault in done.faults) for kind in ("kill", "join", "leave", "freeze")}
    print(f"seed {seed}: {len(done.faults)} faults {kinds}, {found[-1].round} rounds, {spent:.0f} s")
    print(f"{len(done.places)} islands, {len(done.complete)} of them to the end, {len(done.stopped)} left before")
    left_out = sum(len(commit.left_out) for commit in found)
    print(
        f"{found[-1].tokens} tokens, each accounted for; {left_out} contributions left out; every outer step computed"
    )
    print(f"again from the files has the bits of its record; outer parameters {found[-1].outer[:16]} on all at the end")


def kills(folder: Path, every: int) -> None:
    text, began, counts = write_text(folder / "text"), time.monotonic(), []
    start = lambda place, k: place.start(product, text, None, k)
    chosen = lambda count: counts.append(count) or range(every, count + 1, every)
    tried = check_kills(folder, start, KILLED, product_rules(text, KILLED), chosen, at_once=2)
    spent = time.monotonic() - began
    print(f"a run killed before {len(tried)} of its {counts[0]} operations on files, {spent:.0f} s: the same")
    print("command went on, and all rounds, records and parameters are those of a run that was not, bit for bit")


def stragglers(folder: Path, seconds: float, rounds: int) -> None:
    # While the slow ones write and read, the others train on.
    timed = {"round_steps": 10**5, "round_seconds": seconds, "steps": rounds * 10**5, "overlap_steps": 1}
    equal = {"round_steps": 1, "steps": 40}
    for what, fields in (("rounds of time", timed), ("equal steps", equal)):
        fields |= {"wait_for": len(SPEEDS), "lapse_seconds": 600.0}
        places = [
            Place(str(folder / what[:5]), folder / f"{what[:5]}-runs", f"i{n}", fields) for n in range(len(SPEEDS))
        ]
        with contextlib.ExitStack() as held:
            processes = [place.start(vectors, 0.0, WORK) for place in places]
            for process, share in zip(processes, SPEEDS):
                held.enter_context(at_speed(process, share))
            assert [process.wait(600) for process in processes] == [COMPLETE] * len(SPEEDS), processes[0].said()
        print(f"{what}:")
        all_steps, longest, shares = 0, 0.0, []
        for place, share in zip(places, SPEEDS):
            rows = place.rows()
            trained, waited = (sum(row[f"seconds/{kind}"] for row in rows) for kind in ("trained", "waited"))
            steps = sum(row["steps"] for row in rows)
            all_steps, longest = all_steps + steps, max(longest, trained + waited)
            shares.append(trained / (trained + waited))
            told = f"training {shares[-1]:.1%} of {trained + waited:.1f} s"
            last = ", ".join(f"{row['seconds/waited']:.2f}" for row in rows[:8])
            print(f"  speed {share:5.3f}: {steps:5d} steps, {told}; waited, wrote and read in each round {last}")
        print(f"  together {all_steps / longest:.1f} steps a second")
        if what == "rounds of time":
            assert min(shares) >= 0.95, "an island did not train for 95% of the time"
    print(f"closed form: who waits for the slowest keeps {kept_when_all_wait(SPEEDS):.1%} of all speed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", action="store_true", help="faults of whole runs, not of small vectors")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="before each N-th operation; 1: before all")
    parser.add_argument("--stragglers", action="store_true")
    parser.add_argument("--round-seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, prefix="islands-") as folder:
        if args.faults:
            faults(Path(folder) / "faults", args.faults, args.seed, args.runs)
        if args.kills:
            kills(Path(folder) / "kills", args.kills)
        if args.stragglers:
            stragglers(Path(folder) / "stragglers", args.round_seconds, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
