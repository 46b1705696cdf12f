"""`frugalmoe plan`."""

import argparse
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

from frugalmoe.commands import add_config_flag, load_config
from frugalmoe.errors import UserError, did_you_mean

SUMMARY = "Know the price first: what a training run needs of each kind of device, how long it takes, what it costs."
EXAMPLES = """\
  frugalmoe plan --config=ling_1:plus --tokens=1e12 --devices=ling-a,ling-b,ling-c,ling-d,ling-e --currency=CNY
  frugalmoe plan --config=ling_2:mini --tokens=1e12 --devices=h800:2048,h20:512 --format=json
  frugalmoe plan --hf=config.json --tokens=14.8e12 --devices=h800:2048 --precision=fp8
  frugalmoe plan --config=quickstart --tokens=1e9 --deadline=2 --budget=100 --picture=cost.png
  frugalmoe plan --config=study --fit=experiments/isoflop/fit.json --target-loss=3.9 --devices=rtx4090
  frugalmoe plan --config=ling_2:flash --tokens=1e12 --devices=v5p:512,v6e:1024 --spot=0.01

NAME:COUNT are the devices that are there; without a number as many as end the run by the deadline, or in 90 days.
Several kinds with numbers are also planned together, as islands that train one model (docs/islands.md).
--catalogue=FILE adds devices, prices and measured cells to those that are shipped: its form is that of
frugalmoe/cost/devices.toml.

--format=json prints one object: the chosen plan's device_hours, price, currency, mfu, tokens_per_second, memory_gib
(of the fullest device), range, layout and why, with hours, goodput, energy_kwh, parts (an object for each kind of
device in it) and plans, a list with an object like it for every plan. With --fit also loss: loss, low, high (90%),
tokens, and distance, which says how far the fit extrapolates. What is not known is null."""
LARGEST_TOKENS, LARGEST_COUNT, LARGEST_DAYS, LARGEST_MONEY = 1e16, 2**20, 36_500.0, 1e15


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `frugalmoe plan`."""
    add_config_flag(parser, required=False)
    parser.add_argument("--hf", metavar="FILE", help="config.json of a published model, in place of --config")
    parser.add_argument("--tokens", help="tokens to train on, as 1e12 (default with --config: those of its steps)")
    parser.add_argument(
        "--fit",
        metavar="FILE",
        help="fit.json of a study, by `frugalmoe report STUDY --fit`: says which loss to expect",
    )
    parser.add_argument("--target-loss", metavar="NATS", help="in place of --tokens: as many as it takes, by --fit")
    parser.add_argument(
        "--devices", metavar="NAME[:COUNT],...", help="kinds of devices, with how many are there (default: all known)"
    )
    parser.add_argument(
        "--precision", choices=("bf16", "fp8"), default="bf16", help="of products (default: %(default)s)"
    )
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: %(default)s")
    parser.add_argument("--deadline", metavar="DAYS", help="the run must have ended after so many days")
    parser.add_argument("--budget", metavar="MONEY", help="and must not cost more, in --currency")
    parser.add_argument("--currency", help="of prices and budget (default: USD)", default="USD")
    parser.add_argument(
        "--prices", metavar="NAME:PRICE,...", help="of a device for an hour, in --currency; 0: it is yours"
    )
    parser.add_argument(
        "--spot", metavar="RATE", help="take spot prices; a device is taken away so many times in an hour, as 0.01"
    )
    parser.add_argument("--batch", metavar="SEQUENCES", help="of a step (default: the config's; with --hf 2,048)")
    parser.add_argument("--sequence-length", metavar="TOKENS", help="default: the config's; with --hf 4,096")
    parser.add_argument("--catalogue", metavar="FILE", action="append", default=[], help="devices of your own; repeats")
    parser.add_argument(
        "--picture", metavar="PNG", help="draw cost against time, with those that no plan beats in both"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the plans; nothing is trained and no device is used."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from frugalmoe.cost import planning
    from frugalmoe.cost.plan_table import row, tables

    if args.picture:
        _check_picture(Path(args.picture))
    ask, offers, notes = asked(args)
    expected = _expected(args, ask)
    found = planning.search(ask, offers)
    found = found._replace(why={**found.why, **notes})
    if args.picture:
        _draw(Path(args.picture), ask, found)
    if args.format == "json":
        print(json.dumps(row(ask, found) | ({"loss": expected} if expected else {}), indent=1))
    else:
        from frugalmoe.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(*tables(ask, found), sep="\n")
        if expected:
            print(
                f"loss: {expected['loss']:.3f} nats per token ({expected['low']:.3f} to {expected['high']:.3f}, 90%), "
                f"by {expected['fit']}: {expected['distance']}"
            )
    return 0


def asked(args: argparse.Namespace):
    """Returns what is to be planned, the devices on offer, and why others are left out; every flag is checked here."""
    from frugalmoe.cost import device_catalogue, planning

    config, tokens = _config(args)
    files = [Path(file) for file in args.catalogue]
    own = device_catalogue.USERS.expanduser()
    catalogue = device_catalogue.read(*([own] if own.is_file() else []), *files)
    currency = {"RMB": "CNY"}.get(args.currency.upper(), args.currency.upper())
    if currency not in catalogue.currencies:
        raise UserError(f"--currency={args.currency}: unknown currency; {did_you_mean(currency, catalogue.currencies)}")
    deadline = _number("--deadline", args.deadline, LARGEST_DAYS)
    ask = planning.Ask(
        config=config,
        tokens=tokens,
        precision=args.precision,
        currency=currency,
        deadline=None if deadline is None else deadline * 24,
        budget=_number("--budget", args.budget, LARGEST_MONEY),
        preemptions=_number("--spot", args.spot, 1) or 0.0,
    )
    return ask, *_offers(args, ask, catalogue)


def _config(args: argparse.Namespace):
    """The config with its vocabulary and batch, and the tokens of the run."""
    from frugalmoe.aot.program import as_expected
    from frugalmoe.data import ramp
    from frugalmoe.fields import to_dict

    if (args.config is None) == (args.hf is None):
        raise UserError("--config or --hf: give one of them: a config of ours, or config.json of a published model")
    if args.hf is not None:
        from frugalmoe.convert.from_hf import config_alone

        if args.overrides:
            raise UserError(f"--config.{args.overrides[0]}: --hf is the model as it was published")
        config = config_alone(Path(args.hf))
    else:
        config = load_config(args)
    of_hf = args.hf is not None
    batch = _integer("--batch", args.batch, 2**24) or (2048 if of_hf else config.train.batch_size)
    length = _integer("--sequence-length", args.sequence_length, 2**24)
    length = length or (4096 if of_hf else config.data.sequence_length)
    ramped = config.train.ramp_from and args.batch is None
    own = config.train.steps * batch if not ramped else ramp.of(to_dict(config.train)).before(config.train.steps)
    train = dataclasses.replace(config.train, batch_size=batch, accumulate_steps=1, ramp_from=0, ramp_batches=0)
    config = dataclasses.replace(config, train=train, data=dataclasses.replace(config.data, sequence_length=length))
    tokens = _number("--tokens", args.tokens, LARGEST_TOKENS)
    if tokens is None and of_hf and args.target_loss is None:
        raise UserError("--tokens: how many a published model is to be trained on must be said, as --tokens=1e12")
    config = as_expected(config, None)
    if args.target_loss is not None:
        return config, _tokens_for(args, config)
    return config, tokens or float(own * length)


def _size(config) -> float:
    from frugalmoe.cost import formulas
    from frugalmoe.cost.laws import size_of

    return size_of(formulas.flops_of_token(config.model, config.data.sequence_length))


def _tokens_for(args: argparse.Namespace, config) -> float:
    """Tokens until the loss of --target-loss, by the fit that --fit names."""
    from frugalmoe.cost.laws import read_fit, tokens_for

    flag = f"--target-loss={args.target_loss}"
    if args.tokens is not None:
        raise UserError(f"{flag}: --tokens={args.tokens} says how many already; give one of them")
    if args.fit is None:
        raise UserError(f"{flag}: needs --fit=FILE, of a study that tells how loss falls; valid: a fit.json")
    target = _number("--target-loss", args.target_loss, 100)
    tokens = tokens_for(read_fit(args.fit), _size(config), target)
    if tokens > LARGEST_TOKENS:
        raise UserError(f"{flag}: takes {tokens:.3g} tokens by {args.fit}; a plan goes up to {LARGEST_TOKENS:g}")
    return tokens


def _expected(args: argparse.Namespace, ask) -> dict | None:
    """The loss that the fit foretells for the tokens of the plan, and how far it is from what the fit has seen."""
    if args.fit is None:
        return None
    from frugalmoe.cost.laws import how_far, loss_at, read_fit

    fit, size = read_fit(args.fit), _size(ask.config)
    beside = {"tokens": ask.tokens, "distance": how_far(fit, size, ask.tokens), "fit": str(args.fit)}
    return loss_at(fit, size, ask.tokens)._asdict() | beside


def _number(flag: str, text: str | None, most: float) -> float | None:
    """A positive number that is no slip."""
    if text is None:
        return None
    try:
        value = float(text.replace(",", "").replace("_", ""))
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        end = "" if flag.endswith(":") else "="
        raise UserError(f"{flag}{end}{text}: must be a positive number, up to {most:g}")
    return value


def _integer(flag: str, text: str | None, most: int) -> int | None:
    value = _number(flag, text, most)
    if value is not None and value != int(value):
        raise UserError(f"{flag}={text}: must be a whole number")
    return None if value is None else int(value)


def _offers(args: argparse.Namespace, ask, catalogue):
    """Devices with numbers and prices; of those that nobody named, only what a plan can be made of."""
    from frugalmoe.cost.planning import Offer

    prices, left = _prices(args, catalogue), {}
    named = _named(args.devices)
    offers = []
    for name in named or catalogue.entries:
        entry = catalogue.get(name)
        price = prices.get(name)
        if price is None:
            cell = "spot_per_hour" if ask.preemptions else "price_per_hour"
            price = entry.value(cell)
            price = None if price is None else catalogue.convert(price, entry.currency, ask.currency)
        try:
            device = entry.device()
            if ask.precision not in device.peak and ask.precision != "bf16":
                having = ", ".join(n for n, e in catalogue.entries.items() if f"{ask.precision}_tflops" in e.cells)
                raise UserError(f"--precision={ask.precision}: {name} has none; of those that are known: {having}")
            if price is None:
                what = "spot price" if ask.preemptions else "price"
                rule = f"no {what} is known; give it as --prices={name}:PRICE, in {ask.currency} for an hour"
                raise UserError(f"--devices={name}: {rule}")
        except UserError as e:
            if named:
                raise
            left[name] = str(e).partition(": ")[2]
            continue
        offers.append(Offer(entry, named.get(name), price, bool(named.get(name))))
    return offers, left


def _named(text: str | None) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for part in (text or "").split(","):
        name, colon, count = part.strip().partition(":")
        if not name:
            if text is None:
                return {}
            raise UserError(f"--devices={text}: must be NAME:COUNT,NAME:COUNT, or names alone")
        if name in found:
            raise UserError(f"--devices={text}: {name} is there twice")
        if colon and not (re.fullmatch(r"[0-9]{1,9}", count) and 0 < int(count) <= LARGEST_COUNT):
            raise UserError(f"--devices={part.strip()}: the number of devices must be from 1 to {LARGEST_COUNT:,}")
        found[name] = int(count) if colon else None
    return found


def _prices(args: argparse.Namespace, catalogue) -> dict[str, float]:
    found = {}
    for part in args.prices.split(",") if args.prices is not None else []:
        name, colon, price = part.strip().partition(":")
        if not (name and colon):
            raise UserError(f"--prices={args.prices}: must be NAME:PRICE,NAME:PRICE")
        catalogue.get(name, "--prices")
        found[name] = 0.0 if price == "0" else _number(f"--prices={name}:", price, 1000)
    return found


def _check_picture(path: Path) -> None:
    """Before anything is searched."""
    from frugalmoe.files import check_writable

    if path.suffix != ".png":
        raise UserError(f"--picture={path}: must end in .png")
    check_writable(path, f"--picture={path}")


def _draw(path: Path, ask, found) -> None:
    from frugalmoe.analysis.pages.plots.plans import cost_against_time

    cost_against_time(found, ask.currency).savefig(path)
