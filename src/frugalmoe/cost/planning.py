"""Plans: for each kind of device, and for mixes of them, how a run is laid out, how long it takes and what it costs.

The step is modelled in `cost.formulas`, failures in `cost.failures`, training apart in `cost.islands`; here layouts and
numbers of devices are searched, constraints kept, and the plans that lose are told why.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from frugalmoe.config import settle
from frugalmoe.cost import formulas, islands
from frugalmoe.cost.device_catalogue import Entry
from frugalmoe.cost.failures import DOWN, HOUR, Uptime, uptime
from frugalmoe.cost.formulas import ASSUMED, Assumptions, Device, Layout
from frugalmoe.errors import UserError
from frugalmoe.schema import Config, Mesh

DAYS = 90.0  # of a run without deadline on devices without a number: as many are taken as end it in that time
WAITS = 0.3  # share of a step from which on it is worth a try to share heads among devices
LARGEST = 2**17  # devices that a search goes up to
STORE = 1.25e9  # bytes per second between an island and the store where islands meet: a line of 10 Gb/s
# The factors by which time may be less or more, and what of the model they stand for: docs/planner.md.
CALIBRATED, UNCALIBRATED = 1.14, 1.25
SOFTWARE = 1.3  # the same GPUs gained 24 to 36% in four months by software alone
IMBALANCE = (1.05, 1.6)  # rows of the busiest device over the mean: forced balance, and a router that is badly balanced
# Cells that may be another device's: what the model calls them, and how far off they may be.
BORROWED = (("bandwidth_gb_s", "bandwidth", 1.3), ("link_gb_s", "link", 2), ("network_gb_s", "network", 2))
MTBF = (8900.0, 50_700.0)  # hours of a device: Ant's fleet, Meta's H100


class Offer(NamedTuple):
    """A kind of device that a run may use."""

    entry: Entry
    count: int | None  # that are there; None: as many as are wanted
    price: float | None  # of one for an hour, in the plan's currency; None: not known
    available: bool = True  # `count` was given


class Ask(NamedTuple):
    """What is to be planned."""

    config: Config  # with its vocabulary, and the batch and sequence length of the run
    tokens: float
    precision: str = "bf16"
    currency: str = "USD"
    deadline: float | None = None  # hours
    budget: float | None = None
    preemptions: float = 0.0  # of a device in an hour
    assumed: Assumptions = ASSUMED


class Fit(NamedTuple):
    """A layout that fits, and its step."""

    layout: Layout
    memory: formulas.Memory
    times: formulas.Times
    speed: float  # tokens per second of all its devices while steps are made
    mfu: float


class Part(NamedTuple):
    """A plan's devices of one kind: an island, where there are several."""

    offer: Offer
    device: Device
    count: int
    fit: Fit
    uptime: Uptime
    speed: float  # tokens per second over the whole run


class Plan(NamedTuple):
    parts: tuple[Part, ...]
    hours: float
    price: float | None
    low: float  # factors on hours, device-hours and price
    high: float
    widths: tuple[tuple[str, float], ...]  # what the width is made of: reason, factor, largest first
    loss: tuple[tuple[int, int], float, float] | None  # of training apart: `islands.loss`
    transfer: float  # share of an island's time that goes into meeting

    @property
    def name(self) -> str:
        return " + ".join(f"{part.offer.entry.name}:{part.count}" for part in self.parts)

    @property
    def device_hours(self) -> float:
        return self.hours * sum(part.count for part in self.parts)

    @property
    def energy(self) -> float | None:
        """kWh of the devices alone, at the power that their makers give; None where one of them is not known."""
        watts = [part.offer.entry.value("power_w") for part in self.parts]
        if None in watts:
            return None
        return self.hours * sum(watt * part.count for watt, part in zip(watts, self.parts)) / 1000


class Found(NamedTuple):
    """What a search found."""

    best: Plan
    plans: tuple[Plan, ...]  # all that could be made, the best of each kind first
    why: Mapping[str, str]  # of each kind of device and mix: why it loses, or why it wins
    smallest: Mapping[str, Fit]  # the fewest devices of each kind that the model fits


# Layouts.

Layouts = Callable[[Config, int, int], Iterator[Layout]]  # (config, devices, devices of a node)


def layouts(config: Config, devices: int, node: int) -> Iterator[Layout]:
    """Yields layouts of so many devices that the config may be trained with: those of `schema.Mesh`, all policies.

    Experts are spread over up to as many devices as there are experts, heads over those of a node, and parameters over
    all, in groups beside each other (`data`) where the model's width does not divide. One to eight sequences at a time.
    """
    model, batch = config.model, config.train.batch_size
    powers = lambda most: [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    for tensor in powers(min(node, 8)):
        for expert in powers(math.gcd(devices, model.moe.num_experts) if model.moe.num_experts else 1):
            if devices % (expert * tensor):
                continue
            rest = devices // (expert * tensor)
            # What divides the model's width is stored in parts; what is beyond stands beside it as `data`.
            fsdp = math.gcd(rest, model.dim // math.gcd(expert, model.dim))
            mesh = Mesh(data=rest // fsdp, fsdp=fsdp, expert=expert, tensor=tensor)
            shards = devices // tensor
            if shards > batch or not _valid(model, mesh, shards, config.data.sequence_length):
                continue
            for sequences, remat in itertools.product((1, 2, 4, 8), ("none", "dots", "full")):
                if sequences * shards > batch:
                    break
                micro = round(batch / (sequences * shards))
                yield Layout(mesh.data, fsdp, expert, tensor, sequences=sequences, micro_batches=micro, remat=remat)


@functools.lru_cache(4096)
def _valid(model, mesh: Mesh, shards: int, length: int) -> bool:
    """Whether `frugalmoe train` would take the mesh."""
    config = Config(model=model)
    train = dataclasses.replace(config.train, batch_size=shards)
    data = dataclasses.replace(config.data, sequence_length=length)
    try:
        settle(dataclasses.replace(config, mesh=mesh, train=train, data=data), None, shards * mesh.tensor)
    except UserError:
        return False
    return True


def with_pipelines(config: Config, devices: int, node: int) -> Iterator[Layout]:
    """Yields layouts of codebases that have pipelines, as Megatron-Core's, to compare their runs with: not ours.

    The optimizer's state alone is spread over the devices that split a batch; a pipeline has up to 16 stages, of any
    number that divides the devices, each in up to 8 pieces; a token's rows go once to each node.
    """
    model, batch = config.model, config.train.batch_size
    few = lambda most: [1 << i for i in range(4) if 1 << i <= most]
    stages = [p for p in range(1, min(16, model.num_layers) + 1) if devices % p == 0]
    for pipeline, tensor in itertools.product(stages, few(min(8, node, model.num_kv_heads))):
        rest, left = divmod(devices, pipeline * tensor)
        if left or rest > batch:
            continue
        most = math.gcd(rest, model.moe.num_experts) if formulas.pattern.has_experts(model) else 1
        for expert in (1 << i for i in range(most.bit_length()) if most % (1 << i) == 0):
            for virtual, sequences, remat in itertools.product(
                few(model.num_layers // pipeline), (1, 2, 4), ("none", "full")
            ):
                micro = round(batch / (sequences * rest))
                if micro >= pipeline and (virtual == 1 or pipeline > 1):
                    sizes = {"fsdp": rest // expert, "expert": expert, "tensor": tensor, "pipeline": pipeline}
                    yield Layout(
                        **sizes, sequences=sequences, micro_batches=micro, remat=remat, virtual=virtual,
                        node_limit=devices, gathered_once=True, sequence_parallel=True, ring=True,
                    )  # fmt: skip


def fit(ask: Ask, device: Device, devices: int, layouts: Layouts = layouts, waits: float = WAITS) -> Fit | None:
    """Returns the fastest layout of so many devices that fits; None where none does.

    More devices share heads only where nothing fits without, or where a share `waits` of a step goes into exchange.
    """
    best: Fit | None = None
    for layout in layouts(ask.config, devices, device.node):
        if best and layout.tensor > best.layout.tensor and best.times.exchange < waits * best.times.total:
            continue
        needed = formulas.memory(ask.config, layout, device.platform)
        if needed.total > device.memory:
            continue
        times = formulas.step_seconds(ask.config, layout, device, ask.precision, ask.assumed)
        speed = formulas.tokens_per_second(ask.config, layout, times.total)
        if best is None or speed > best.speed:
            mfu = formulas.utilization(ask.config, layout, device, times.total)
            best = Fit(layout, needed, times, speed, mfu)
    return best


def least_memory(ask: Ask, device: Device, devices: int) -> float | None:
    """Returns the bytes of a device that the smallest layout of so many needs; None where there is no layout."""
    needs = [
        formulas.memory(ask.config, layout, device.platform).total
        for layout in layouts(ask.config, devices, device.node)
    ]
    return min(needs, default=None)


def smallest(ask: Ask, device: Device, most: int | None = None) -> Fit | None:
    """Returns the best layout of the fewest devices, a power of two, that the model fits."""
    state = sum(formulas.memory(ask.config, Layout(), device.platform)[:3])
    first = 1 << max(0, math.ceil(math.log2(state / device.memory)))
    for devices in _powers(first, most or LARGEST):
        if found := fit(ask, device, devices):
            return found
    return None


def _powers(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


# Plans.


def part(ask: Ask, offer: Offer, count: int) -> Part | None:
    """Returns what `count` devices of a kind do for a run; None where the model does not fit them."""
    device = offer.entry.device()
    if (found := fit(ask, device, count)) is None:
        return None
    up = _uptime(ask, offer.entry, device, count, offer.entry.value("mtbf_hours"))
    return Part(offer, device, count, found, up, found.speed * up.goodput)


def _uptime(ask: Ask, entry: Entry, device: Device, count: int, mtbf: float) -> Uptime:
    total = formulas.parameters(ask.config.model).total
    return uptime(total, count, device.node, mtbf, ask.preemptions, DOWN)


def plan(ask: Ask, parts: Sequence[Part]) -> Plan:
    """Returns the plan of devices of one kind, or of several, each an island that meets the others.

    Islands train in rounds and meet through a store: of an island's time a share goes into sending its contribution and
    reading the others', beside steps where `islands.overlap_steps` says so (`islands.traffic`). They wait for nobody,
    so that speeds add up. All are paid until the last token is seen.
    """
    transfer, lost = 0.0, None
    if len(parts) > 1:
        own = ask.config.islands
        moved = round_traffic(ask, len(parts))
        busy = islands.transfer_seconds(moved, STORE)
        longest = max(own.round_steps * part.fit.times.total for part in parts)
        transfer = max(0.0, busy - longest) if own.overlap_steps else busy
        transfer /= longest + transfer
        lost = islands.loss(len(parts), own.round_steps)
    speed = sum(part.speed for part in parts) * (1 - transfer)
    hours = ask.tokens / speed / HOUR
    prices = [part.offer.price for part in parts]
    price = None if None in prices else hours * sum(price * part.count for price, part in zip(prices, parts))
    low, high, widths = _range(ask, parts)
    return Plan(tuple(parts), hours, price, low, high, widths, lost, transfer)


def round_traffic(ask: Ask, count: int) -> islands.Traffic:
    """Returns the bytes of a round of so many islands, as the config's `islands` has them written."""
    own = ask.config.islands
    bits = {32: "float32", 16: "bfloat16", 8: "int8", 4: "int4", 2: "int2"}[own.bits]
    return islands.traffic(formulas.parameters(ask.config.model).total, bits, count, own.fragments)


def _range(ask: Ask, parts: Sequence[Part]) -> tuple[float, float, tuple[tuple[str, float], ...]]:
    """Returns factors on the time, and what they come from: each source is tried alone, and they are taken as apart.

    Of a mix those of the part that does most.
    """
    main = max(parts, key=lambda part: part.speed)
    config, layout, device, total = ask.config, main.fit.layout, main.device, main.fit.times.total
    entry, seconds = main.offer.entry, functools.partial(formulas.step_seconds, ask.config, layout)
    down, up = [], []

    def add(reason: str, low: float, high: float) -> None:
        down.append((reason, low))
        up.append((reason, high))

    error = CALIBRATED if device.matmul else UNCALIBRATED
    measured = "calibrated here" if device.matmul else "not calibrated"
    add(f"the model's error on published runs ({measured})", 1 / error, error)
    add("software of another date: 24 to 36% in four months", 1 / SOFTWARE, 1.0)
    if config.model.moe.num_experts and any(formulas.pattern.moe_layers(config.model)):
        low, high = (
            seconds(device, ask.precision, ask.assumed._replace(imbalance=value)).total / total for value in IMBALANCE
        )
        add(f"balance of experts: busiest device {IMBALANCE[0]} to {IMBALANCE[1]} times the mean", low, high)
    for cell, field, factor in (
        ("bandwidth_gb_s", "bandwidth", 1.3),
        ("link_gb_s", "link", 2),
        ("network_gb_s", "network", 2),
    ):
        if not entry.cells[cell].own:
            of = getattr(device, field)
            low, high = (
                seconds(device._replace(**{field: of * change}), ask.precision, ask.assumed).total / total
                for change in (factor, 1 / factor)
            )
            add(f"{cell} is not known: {entry.cells[cell].source}", low, high)
    if not entry.cells["mtbf_hours"].own:
        bad, good = (_uptime(ask, entry, device, main.count, hours).goodput for hours in MTBF)
        add("how often a device fails is not known", main.uptime.goodput / good, main.uptime.goodput / bad)
    root = lambda factors: math.exp(math.sqrt(sum(math.log(factor) ** 2 for _, factor in factors)))
    worst = {reason: max(1 / low, high) for (reason, low), (_, high) in zip(down, up)}
    widths = sorted(((r, f) for r, f in worst.items() if f > 1.01), key=lambda row: -row[1])
    return 1 / root(down), root(up), tuple(widths)


def counts(ask: Ask, offer: Offer, least: Fit) -> list[int]:
    """Returns numbers of devices that are worth a plan: powers of two from the fewest on, and all that are there.

    Without a number, up to what ends the run by the deadline, or in `DAYS`.
    """
    first = least.layout.devices
    if offer.count is not None:
        return sorted({*_powers(first, offer.count), offer.count})
    wanted = ask.tokens / least.speed / HOUR / (ask.deadline or DAYS * 24) * first
    return list(_powers(first, min(LARGEST, max(first, 4 * wanted))))


def search(ask: Ask, offers: Sequence[Offer]) -> Found:
    """Returns the cheapest plan that meets the constraints, all others, and why they lose.

    Where no price is known plans are compared by device-hours. Raises `UserError` where no plan meets the constraints.
    """
    plans: dict[str, list[Plan]] = {}
    why, fewest = {}, {}
    of_name = {offer.entry.name: offer for offer in offers}
    made = functools.cache(lambda name, count: part(ask, of_name[name], count))
    for offer in offers:
        name, device = offer.entry.name, offer.entry.device()
        if (least := smallest(ask, device, offer.count)) is None and offer.count:
            one = made(name, offer.count)  # what is there may be no power of two
            least = one.fit if one else None
        if least is None:
            why[name] = _does_not_fit(ask, device, offer.count)
            continue
        fewest[name] = least
        found = [made(name, count) for count in counts(ask, offer, least)]
        plans[name] = [plan(ask, [one]) for one in found if one]
    there = [offer for offer in offers if offer.available and offer.count and offer.entry.name in plans]
    for size in range(2, len(there) + 1) if len(there) <= 4 else (2, len(there)):
        for chosen in itertools.combinations(there, size):
            whole = [plans[offer.entry.name][-1].parts[0] for offer in chosen]
            plans[" + ".join(offer.entry.name for offer in chosen)] = list(_mixes(ask, whole, made))
    if not plans:
        raise UserError(f"--devices: the model fits none of them; {'; '.join(f'{k}: {v}' for k, v in why.items())}")
    best = _choose(ask, plans)
    order = [best if best in of_kind else _of_kind(ask, of_kind) for of_kind in plans.values()]
    for name, of_kind in zip(plans, order):
        why[name] = _why(ask, of_kind, best)
    rest = [p for of_kind in plans.values() for p in of_kind if p not in order]
    ordered = sorted(order, key=lambda p: (p is not best, not _meets(ask, p), _cost(p)))
    return Found(best, (*ordered, *rest), why, fewest)


def _mixes(ask: Ask, whole: Sequence[Part], made: Callable[[str, int], Part | None]) -> Iterator[Plan]:
    """Plans of all devices of several kinds, and with half and a quarter of those of one of them."""
    yield plan(ask, whole)
    for i, less in itertools.product(range(len(whole)), (2, 4)):
        count = whole[i].count // less
        if count and (smaller := made(whole[i].offer.entry.name, count)):
            yield plan(ask, [*whole[:i], smaller, *whole[i + 1 :]])


def _cost(p: Plan) -> tuple[float, float]:
    return p.price if p.price is not None else math.inf, p.device_hours


def _meets(ask: Ask, p: Plan) -> bool:
    if ask.deadline is not None and p.hours > ask.deadline:
        return False
    return ask.budget is None or (p.price is not None and p.price <= ask.budget)


def _choose(ask: Ask, plans: Mapping[str, Sequence[Plan]]) -> Plan:
    """The cheapest plan that meets the constraints. Without a deadline none may be slower than the cheapest of those
    that use all devices that are there, or that end in `DAYS`: fewer devices for longer are not what was asked.
    """
    every = [p for of_kind in plans.values() for p in of_kind]
    meeting = [p for p in every if _meets(ask, p)]
    if not meeting:
        raise UserError(_infeasible(ask, every))
    if ask.deadline is None:
        usual = [_usual(of_kind) for of_kind in plans.values() if len(of_kind[0].parts) == 1]
        if usual := [p for p in usual if p in meeting]:
            slowest = min(usual, key=_cost).hours
            meeting = [p for p in meeting if p.hours <= slowest]
    return min(meeting, key=_cost)


def _of_kind(ask: Ask, of_kind: Sequence[Plan]) -> Plan:
    """The plan of a kind that stands beside the best one."""
    if ask.deadline is None and len(of_kind[0].parts) == 1 and ask.budget is None:
        return _usual(of_kind)
    return min(of_kind, key=lambda p: (not _meets(ask, p), _cost(p)))


def _usual(of_kind: Sequence[Plan]) -> Plan:
    offer = of_kind[-1].parts[0].offer
    if offer.count is not None:
        return of_kind[-1]
    return min((p for p in of_kind if p.hours <= DAYS * 24), key=_cost, default=of_kind[-1])


def _infeasible(ask: Ask, every: Sequence[Plan]) -> str:
    """Which constraint binds, and the nearest value that does not."""
    fastest = min(every, key=lambda p: p.hours)
    cheapest = min(every, key=_cost)
    in_time = [p for p in every if ask.deadline is None or p.hours <= ask.deadline]
    if not in_time:
        days = fastest.hours / 24
        rule = f"the fastest plan, {fastest.name}, takes {days:.3g} days; nearest feasible: --deadline={_up(days):g}"
        if ask.budget is not None and fastest.price is not None and fastest.price > ask.budget:
            rule += f" with --budget={_up(fastest.price):.0f}"
        return f"--deadline={ask.deadline / 24:g}: binds: no plan is so fast: {rule}"
    if cheapest.price is None:
        return f"--budget={ask.budget:g}: no price is known of {cheapest.name}; give it by --prices"
    if cheapest.price > ask.budget:
        rule = f"the cheapest plan, {cheapest.name}, costs {cheapest.price:,.0f} {ask.currency}"
        return f"--budget={ask.budget:g}: binds: {rule}; nearest feasible: --budget={_up(cheapest.price):.0f}"
    timely, cheap = min(in_time, key=_cost), [p for p in every if p.price is not None and p.price <= ask.budget]
    soonest = min(cheap, key=lambda p: p.hours)
    return (
        f"--deadline={ask.deadline / 24:g} --budget={ask.budget:g}: bind together: in time, {timely.name} costs "
        f"{timely.price:,.0f} {ask.currency}; within the budget, {soonest.name} takes {soonest.hours / 24:.3g} days; "
        f"nearest feasible: --budget={_up(timely.price):.0f}, or --deadline={_up(soonest.hours / 24):g}"
    )


def _up(value: float) -> float:
    """A number of three digits that is no smaller."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / step) * step


def _does_not_fit(ask: Ask, device: Device, count: int | None) -> str:
    devices = count or LARGEST
    if (needed := least_memory(ask, device, devices)) is None:
        devices = next((n for n in sorted(_powers(1, devices), reverse=True) if least_memory(ask, device, n)), 0)
        needed = least_memory(ask, device, devices) if devices else None
    if needed is None:
        return (
            f"no layout of {count or 'any number'} devices suits the model and a batch of {ask.config.train.batch_size}"
        )
    return (
        f"does not fit: {needed / 2**30:,.1f} GiB on each of {devices:,} devices, which have "
        f"{device.memory / 2**30:,.1f}; a batch of {ask.config.train.batch_size} sequences gives work to no more"
        if not count
        else f"does not fit: {needed / 2**30:,.1f} GiB on each of {devices:,}, which have {device.memory / 2**30:,.1f}"
    )


def slow_part(ask: Ask, one: Part) -> str:
    """Returns what a step of these devices mostly waits for, in words."""
    times = one.fit.times
    shares = {name: value / times.total for name, value in times._asdict().items()}
    most = max(shares, key=shares.get)
    parts = formulas.forward_seconds(ask.config, one.fit.layout, one.device, ask.precision, ask.assumed)
    which = max(parts, key=lambda name: parts[name][most == "memory"])
    foreign = ", where this code does not run" if one.device.platform == "npu" else ""
    names = {"compute": f"compute-bound {which}", "memory": f"memory-bound {which}", "exchange": "waits for others"}
    return f"{names.get(most, most)}, {most} is {shares[most]:.0%} of a step{foreign}"


def _why(ask: Ask, p: Plan, best: Plan) -> str:
    """One clause: what decides against a plan, or for it."""
    slow = "; ".join(dict.fromkeys(slow_part(ask, one) for one in p.parts))
    apart = ""
    if p.loss:
        apart = f"; {p.transfer:.0%} of the time goes into meeting, and small models lost {p.loss[1]:.2f} nats so"
    if p is best:
        what = "cheapest" if p.price is not None else "fewest device-hours"
        usual = f"all devices of a kind at once, or than {DAYS} days where their number is open"
        rule = f"; without --deadline none is slower than {usual}" if ask.deadline is None else ""
        return f"{what} of those that meet the constraints ({slow}){apart}{rule}"
    if ask.deadline is not None and p.hours > ask.deadline:
        return f"{p.hours / 24:.3g} days miss the deadline of {ask.deadline / 24:g} ({slow}){apart}"
    if p.price is None:
        return f"no price is known ({slow}){apart}"
    if ask.budget is not None and p.price > ask.budget:
        return f"{p.price:,.0f} {ask.currency} are over the budget of {ask.budget:,.0f} ({slow}){apart}"
    ratio = f"{p.price / best.price:.2f}x the price" if best.price else f"{p.device_hours / best.device_hours:.2f}x"
    return f"{ratio} ({slow}){apart}"
