"""`frugalmoe calibrate`."""

import argparse
import re
import sys
from pathlib import Path

from frugalmoe.commands import add_config_flag, load_config
from frugalmoe.errors import UserError

SUMMARY = "Measure the device that is here at a config's shapes, and write it into a catalogue for `frugalmoe plan`."
EXAMPLES = """\
  frugalmoe calibrate --config=configs/quickstart.py
  frugalmoe plan --config=configs/quickstart.py --devices=here:1 --prices=here:0
  frugalmoe calibrate --config=ling_2:mini --config.train.batch_size=1 --name=h100 --catalogue=measured.toml

Measured are, forward and backward, the products of a layer, those of its experts, attention, what only reads and
writes, a large product for the peak, and a sum over the devices that are here (on a CPU over two virtual ones). The row
goes into ~/.config/frugalmoe/devices.toml, which `frugalmoe plan` reads by itself, or into --catalogue=FILE; with the
name of a device of the catalogue what was measured stands in place of its data sheet. Use the batch that the device is
to train with."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe calibrate`."""
    add_config_flag(parser)
    parser.add_argument("--name", default="here", help="of the device in the catalogue (default: %(default)s)")
    parser.add_argument("--catalogue", metavar="FILE", help="default: ~/.config/frugalmoe/devices.toml")


def run(args: argparse.Namespace) -> int:
    """Measures for about half a minute, writes the row, and prints it."""
    from frugalmoe.aot.program import as_expected
    from frugalmoe.cost import calibration, device_catalogue
    from frugalmoe.files import check_writable

    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,39}", args.name):
        raise UserError(f"--name={args.name}: must be small letters, digits, dots and dashes, 40 at most")
    config = as_expected(load_config(args), None)
    file = Path(args.catalogue or device_catalogue.USERS).expanduser()
    if file.exists():
        device_catalogue.read(file)  # a file that is damaged is refused before anything is measured
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--catalogue={file}: cannot be written there: {e.strerror}") from e
    check_writable(file, f"--catalogue={file}")
    measured = calibration.calibrate(config, lambda line: print(line, file=sys.stderr, flush=True))
    source, row = calibration.row(measured, args.config)
    device_catalogue.add(file, source, args.name, row)
    for cell, value in measured.cells.items():
        print(f"{cell} = {value:.4g}")
    print(f"{args.name} is in {file}")
    return 0
