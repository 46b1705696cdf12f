"""What `frugalmoe plan` prints of what was found: a table for people, rows for JSON."""

from typing import Any

from rich import box
from rich.table import Table

from frugalmoe.cost.failures import HOUR
from frugalmoe.cost.planning import Ask, Fit, Found, Part, Plan

GIB = 2**30
_AXES = ("data", "fsdp", "expert", "tensor", "context")


def row(ask: Ask, found: Found) -> dict[str, Any]:
    """Returns the chosen plan, ready for JSON, with all others under `plans`."""
    kinds = {}
    for p in found.plans:
        kinds.setdefault(_kind(p), p)  # the first of each is the one that `why` is about
    unlike = {name: why for name, why in found.why.items() if name not in kinds}
    return {
        **_plan(ask, found.best, found.why[_kind(found.best)]),
        "tokens": ask.tokens,
        "precision": ask.precision,
        "assumptions": ask.assumed._asdict(),
        "plans": [
            _plan(ask, p, found.why[kind] if kinds[kind] is p else None) for p in found.plans for kind in [_kind(p)]
        ],
        "smallest": {name: {"devices": fit.layout.devices, **layout(fit)} for name, fit in found.smallest.items()},
        "left_out": unlike,
    }


def _kind(p: Plan) -> str:
    return " + ".join(part.offer.entry.name for part in p.parts)


def _plan(ask: Ask, p: Plan, why: str | None) -> dict[str, Any]:
    both = lambda value: None if value is None else [value * p.low, value * p.high]
    speed = ask.tokens / p.hours / HOUR
    main = max(p.parts, key=lambda part: part.speed)
    total = sum(part.count * part.device.nominal for part in p.parts)
    used = sum(part.fit.mfu * part.count * part.device.nominal for part in p.parts)
    return {
        "devices": {part.offer.entry.name: part.count for part in p.parts},
        "device_hours": p.device_hours,
        "price": p.price,
        "currency": ask.currency,
        "hours": p.hours,
        "mfu": used / total,
        "goodput": sum(part.uptime.goodput * part.speed for part in p.parts) / sum(part.speed for part in p.parts),
        "tokens_per_second": speed,
        "memory_gib": max(part.fit.memory.total for part in p.parts) / GIB,
        "energy_kwh": p.energy,
        "range": {
            "hours": both(p.hours),
            "device_hours": both(p.device_hours),
            "price": both(p.price),
            "reasons": [{"reason": reason, "factor": factor} for reason, factor in p.widths],
        },
        "layout": layout(main.fit)
        if len(p.parts) == 1
        else {part.offer.entry.name: layout(part.fit) for part in p.parts},
        "parts": [_part(part) for part in p.parts],
        "islands": None if p.loss is None else _islands(ask, p),
        "why": why,
    }


def _islands(ask: Ask, p: Plan) -> dict[str, Any]:
    (count, steps), nats, half = p.loss
    return {
        "round_steps": ask.config.islands.round_steps,
        "bits": ask.config.islands.bits,
        "share_of_time_in_transfer": p.transfer,
        "loss_nats": nats,
        "loss_half_width": half,
        "loss_measured_at": {"islands": count, "round_steps": steps},
    }


def layout(fit: Fit) -> dict[str, Any]:
    """Returns how a run is laid out, and the flags of `frugalmoe train` that lay it out so."""
    own = fit.layout
    axes = {name: getattr(own, name) for name in _AXES}
    flags = [f"mesh.{name}={size}" for name, size in axes.items() if size > 1 or name == "data"]
    flags += [
        f"train.batch_size={own.batch_size}",
        f"train.accumulate_steps={own.micro_batches}",
        f"model.remat={own.remat}",
    ]
    return {
        **axes,
        "sequences": own.sequences,
        "micro_batches": own.micro_batches,
        "remat": own.remat,
        "overrides": " ".join(f"--config.{flag}" for flag in flags),
    }


def _part(part: Part) -> dict[str, Any]:
    up, times = part.uptime, part.fit.times
    return {
        "device": part.offer.entry.name,
        "count": part.count,
        "price_per_hour": part.offer.price,
        "mfu": part.fit.mfu,
        "tokens_per_second": part.speed,
        "memory_gib": {name: value / GIB for name, value in part.fit.memory._asdict().items()},
        "memory_available_gib": part.device.memory / GIB,
        "step_seconds": {**times._asdict(), "total": times.total},
        "goodput": up.goodput,
        "hours_between_failures": up.between / HOUR,
        "checkpoint_gib": up.checkpoint / GIB,
        "checkpoint_every_seconds": up.interval,
        "layout": layout(part.fit),
        "sources": {name: f"{cell.source} ({cell.date})" for name, cell in part.offer.entry.cells.items()},
    }


def tables(ask: Ask, found: Found) -> list[Any]:
    """Returns what people read: the plans, why others lose, the chosen one's layout, memory, step and range."""
    overview = Table(
        *(
            "devices",
            "days",
            "device-hours",
            f"price {ask.currency}",
            "from",
            "to",
            "MFU",
            "goodput",
            "GiB",
            "step: compute / memory / exchange",
        ),
        box=box.SIMPLE_HEAD,
    )
    for column in overview.columns[1:]:
        column.justify = "right"
    seen = set()
    for p in found.plans:
        if _kind(p) not in seen:
            seen.add(_kind(p))
            overview.add_row(*_cells(ask, p, found))
    why = Table("devices", "why", box=box.SIMPLE_HEAD)
    for name, text in found.why.items():
        why.add_row(name, text)
    return [f"{ask.config.name}: {ask.tokens:.3g} tokens, {ask.precision}", overview, why, *_chosen(found.best)]


def _cells(ask: Ask, p: Plan, found: Found) -> list[str]:
    money = lambda value: "unknown" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"
    ends = (None, None) if p.price is None else (p.price * p.low, p.price * p.high)
    main = max(p.parts, key=lambda part: part.speed)
    of_step = [value / main.fit.times.total for value in main.fit.times]
    return [
        f"{p.name}{' *' if p is found.best else ''}",
        f"{p.hours / 24:,.3g}",
        f"{p.device_hours:,.0f}" if p.device_hours >= 100 else f"{p.device_hours:.3g}",
        *map(money, (p.price, *ends)),
        f"{main.fit.mfu:.1%}",
        f"{main.uptime.goodput:.1%}",
        f"{max(part.fit.memory.total for part in p.parts) / GIB:.1f}",
        " / ".join(f"{share:.0%}" for share in of_step[:3]),
    ]


def _chosen(best: Plan) -> list[Any]:
    shown: list[Any] = [f"* {best.name}"]
    for part in best.parts:
        memory = Table(f"memory of one {part.offer.entry.name}", "GiB", box=box.SIMPLE_HEAD)
        for name, value in part.fit.memory._asdict().items():
            memory.add_row(name, f"{value / GIB:.2f}")
        memory.add_row("all, of what is there", f"{part.fit.memory.total / GIB:.2f} of {part.device.memory / GIB:.2f}")
        times = Table("a step", "seconds", box=box.SIMPLE_HEAD)
        for name, value in part.fit.times._asdict().items():
            times.add_row(name, f"{value:.3g}")
        up = part.uptime
        shown += [
            memory,
            times,
            f"layout: {layout(part.fit)['overrides']}",
            f"failures: one in {up.between / HOUR:,.3g} h; a checkpoint of {up.checkpoint / GIB:,.0f} GiB every "
            f"{up.interval / 60:,.3g} min leaves {up.goodput:.1%} of the time",
        ]
        if part.offer.entry.borrowed:
            shown.append(f"not the device's own figures: {', '.join(part.offer.entry.borrowed)}")
    if best.energy is not None:
        shown.append(f"energy of the devices: {best.energy:,.0f} kWh")
    width = Table(
        f"why the price may be {best.low:.2f} to {best.high:.2f} times as much", "factor", box=box.SIMPLE_HEAD
    )
    for reason, factor in best.widths:
        width.add_row(reason, f"{factor:.2f}")
    return [*shown, width]
