"""What a training step moves on devices that are not there, beside the least that it must: DEVICES.md.

    python benchmarks/devices_bench.py --texts DIR [--before DIR] [--no-compile] [--cases small] [--devices h100 v5p]

Each case is compiled for each device by `frugalmoe compile --text`, into DIR/CASE.DEVICE.hlo, which takes minutes and
the packages that this command names; a text that is there is taken as it is. With --before the tables also say what
other texts need, as those of an earlier state of the code. Writes the tables between the markers of DEVICES.md.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from frugalmoe.aot import traffic
from frugalmoe.aot.program import as_expected
from frugalmoe.config import Config, load
from frugalmoe.cost import items
from frugalmoe.files import write_generated

PAGE = Path(__file__).parent / "DEVICES.md"
DEVICES = {"a100": "a100:1", "h100": "h100:1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}


class Case(NamedTuple):
    """A config and what of it is changed, so that a step fits one chip and compiles in minutes."""

    config: str
    overrides: tuple[str, ...]


CASES = {
    "small": Case("configs/small.py", ()),
    "ling": Case(
        "configs/ling_2.py:mini",
        ("model.num_layers=3", "train.batch_size=8", "train.accumulate_steps=2", "train.loss_chunk=2048"),
    ),
    "e64": Case(
        "configs/small.py",
        (
            *("model.dim=1024", "model.num_layers=4", "model.num_dense_layers=0", "model.num_heads=16"),
            *("model.moe.expert_dim=512", "train.batch_size=16", "train.accumulate_steps=1"),
        ),
    ),
}


def compiled(case: str, device: str, args: argparse.Namespace) -> Path | None:
    """The text of a program; None, with a line on stderr, where it cannot be compiled."""
    path = args.texts / f"{case}.{device}.hlo"
    if not path.exists() and not args.no_compile:
        config, overrides = CASES[case]
        flags = [f"--config={config}", f"--topology={DEVICES[device]}", *(f"--config.{o}" for o in overrides)]
        done = subprocess.run([sys.executable, "-m", "frugalmoe", "compile", *flags, f"--text={path}"], check=False)
        if done.returncode:
            print(f"{case} on {device}: not compiled", file=sys.stderr)
    return path if path.exists() else None


def of_text(path: Path | None) -> dict[str, items.Item] | None:
    """The items of a program with their sum, or None."""
    if path is None or not path.exists():
        return None
    return with_sum(items.of_program(traffic.kernels(path.read_text())))


def with_sum(found: dict[str, items.Item]) -> dict[str, items.Item]:
    """The same with one more item, `all`."""
    total = items.Item()
    for item in found.values():
        total = total.plus(item)
    return found | {"all": total}


def settled(case: Case) -> Config:
    """The config of a case, for one device."""
    return as_expected(load(case.config, list(case.overrides)), 1)


def table(case: str, args: argparse.Namespace) -> list[str]:
    """The lines of a case's table: GB and kernels of each item."""
    before = args.before
    programs = {device: of_text(compiled(case, device, args)) for device in args.devices}
    programs = {device: found for device, found in programs.items() if found}
    earlier = {device: of_text(before / f"{case}.{device}.hlo") if before else None for device in programs}
    least, columns = with_sum(items.ideal(settled(CASES[case]))), ["item", "least"]
    columns += [name for device in programs for name in ([f"{device} before"] * bool(earlier[device]) + [device])]
    cell = lambda item: f"{item.bytes / 1e9:,.1f} / {item.kernels:,.0f}"
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for name in (*items.ITEMS, "all"):
        sides = [side for device in programs for side in (earlier[device], programs[device]) if side]
        if any(any(side[name]) for side in (least, *sides)):
            lines.append([name, *(cell(side[name]) for side in (least, *sides))])
    flops = ", ".join(f"{device} {found['all'].flops / 1e12:.1f}" for device, found in programs.items())
    command = " ".join([f"--config={CASES[case].config}", *(f"--config.{o}" for o in CASES[case].overrides)])
    head = [
        f"### {case}",
        "",
        f"`{command}`",
        "",
        f"TFLOP of products: least {least['all'].flops / 1e12:.1f}, {flops}.",
        "",
    ]
    return [*head, *("| " + " | ".join(line) + " |" for line in lines), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, metavar="DIR", help="where texts of programs are kept")
    parser.add_argument("--before", type=Path, metavar="DIR", help="texts of an earlier state of the code")
    parser.add_argument("--no-compile", action="store_true", help="take the texts that are there, and no others")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=list(DEVICES))
    args = parser.parse_args()
    args.texts.mkdir(parents=True, exist_ok=True)
    lines = [line for case in args.cases for line in table(case, args)]
    write_generated(PAGE, "\n".join(["GB of main memory / kernels, of one step.", "", *lines]))


if __name__ == "__main__":
    main()
