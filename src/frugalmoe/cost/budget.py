"""What a sum of money trains: on each kind of device, for each config, how many tokens, and to which loss by a fit."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from frugalmoe.aot.program import as_expected
from frugalmoe.config import load
from frugalmoe.cost import formulas, planning
from frugalmoe.cost.device_catalogue import Catalogue
from frugalmoe.cost.failures import HOUR
from frugalmoe.cost.laws import Estimate, Fit, how_far, loss_at, size_of
from frugalmoe.errors import UserError
from frugalmoe.schema import Config

DAYS = 30.0  # that the money should be spent in


def load_planned(spec: str) -> Config:
    """Returns the config that `FILE[:ARG]` or a shipped name says, with a vocabulary as large as it may become."""
    return as_expected(load(spec), None)


class Bought(NamedTuple):
    """A config on a kind of device for the money."""

    config: str
    parameters: int
    device: str
    count: int  # the fewest, a power of two, that hold the model and spend the money in time
    hours: float
    tokens: float
    mfu: float
    loss: Estimate | None  # by the fit, where one was given
    distance: str  # of it from what the fit has seen


def bought(
    configs: Iterable[Config],
    devices: Sequence[str],
    money: float,
    catalogue: Catalogue,
    fit: Fit | None = None,
    *,
    currency: str = "USD",
    days: float = DAYS,
) -> list[Bought]:
    """Returns what `money` buys, for each config and each device that it fits; by config, the most tokens first.

    Tokens are those of steps that count, failures and all. Raises `UserError` for money or days that are not positive,
    for an unknown device, and for one without a price.
    """
    for name, value in (("money", money), ("days", days)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name}={value}: must be positive")
    terms, found = _Terms(money, catalogue, fit, currency, days), []
    for config in configs:
        rows = [_on(config, name, terms) for name in devices]
        found += sorted((row for row in rows if row), key=lambda row: -row.tokens)
    return found


class _Terms(NamedTuple):
    money: float
    catalogue: Catalogue
    fit: Fit | None
    currency: str
    days: float


def _on(config: Config, name: str, terms: _Terms) -> Bought | None:
    """None where the model does not fit the devices that the money pays for."""
    money, catalogue, fit, currency, days = terms
    entry = catalogue.get(name)
    if (price := entry.value("price_per_hour")) is None:
        raise UserError(f"--devices={name}: no price is known; give it in a catalogue of your own")
    price = catalogue.convert(price, entry.currency, currency)
    ask = planning.Ask(config, 1.0, currency=currency)
    if (least := planning.smallest(ask, entry.device())) is None:
        return None
    in_time = money / price / (days * 24)  # devices that spend it all in that time
    count = max(least.layout.devices, 1 << max(0, math.ceil(math.log2(in_time))))
    part = planning.part(ask, planning.Offer(entry, count, price), count)
    while part is None and count > least.layout.devices:  # more than its batch gives work to
        count //= 2
        part = planning.part(ask, planning.Offer(entry, count, price), count)
    if part is None:
        return None
    hours = money / (price * count)
    tokens = part.speed * hours * HOUR
    total = formulas.parameters(config.model).total
    size = size_of(formulas.flops_of_token(config.model, config.data.sequence_length))
    loss, distance = (loss_at(fit, size, tokens), how_far(fit, size, tokens)) if fit else (None, "")
    return Bought(config.name, total, name, count, hours, tokens, part.fit.mfu, loss, distance)
