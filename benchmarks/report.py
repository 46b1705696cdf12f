"""Tables from what was measured, and the machine they hold for."""

import datetime
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from measure import WARM_UP, Measured
from passes import IDEAL
from sizes import Size

Results = Mapping[Size, Mapping[str, Measured | str]]
Moves = Mapping[str, float] | str  # of a step, by what for; or why it is not known


def versions(compared: Results) -> dict[str, str]:
    found = {}
    for models in compared.values():
        for result in models.values():
            if isinstance(result, Measured):
                found |= result.versions
    return found


def machine(load_before: float, rounds: int, versions: Mapping[str, str]) -> dict[str, str]:
    """What the figures hold for; `versions` of libraries by name."""
    cpu = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpu)
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    versions = {"Python": platform.python_version(), **versions}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "CPU": f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{int(memory[1]) / 2**20:.0f} GiB",
        "system": platform.platform(terse=True),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "not set"),
        "load average": f"{load_before:.2f} before, {os.getloadavg()[0]:.2f} after",
        "rounds": f"{rounds} counted after {WARM_UP} of warm-up",
    }


def markdown(
    machine: Mapping[str, str], compared: Results, grown: Results, moved: Mapping[Size, Moves], ours: str
) -> str:
    parts = ["\n".join(f"- {name}: {value}" for name, value in machine.items())]
    for size, models in compared.items():
        parts += [f"### {size.name}", _shape(size), _comparison(models, ours)]
    if grown:
        parts += ["### Growth with the number of experts", _growth(grown)]
    parts += ["### Bytes that a step moves", _moves(moved), "### Dispatch", _dispatch(compared, ours)]
    return "\n\n".join(parts)


def _moves(moved: Mapping[Size, Moves]) -> str:
    """Passes over the parameters of all experts, each reading or writing all of them once."""
    known = {size: m for size, m in moved.items() if not isinstance(m, str)}
    names = dict.fromkeys([*IDEAL, *(name for m in known.values() for name in m)])
    rows = [[n, str(IDEAL.get(n, 0)), *(f"{m.get(n, 0):.2f}" for m in known.values())] for n in names]
    rows.append(["in all", str(sum(IDEAL.values())), *(f"{sum(m.values()):.2f}" for m in known.values())])
    gigabytes = {size: 12 * size.layers * size.experts * size.dim * size.expert_dim / 1e9 for size in known}
    ideal = [f"{sum(IDEAL.values()) * one:.2f}" for one in gigabytes.values()]
    real = [f"{sum(known[size].values()) * one:.2f}" for size, one in gigabytes.items()]
    rows += [["GB, at least", "", *ideal], ["GB", "", *real]]
    failed = [f"{size.name}: {m}" for size, m in moved.items() if isinstance(m, str)]
    header = ["passes over the experts' parameters", "at least", *(size.name for size in known)]
    return "\n\n".join([table(header, rows), *failed])


def _shape(size: Size) -> str:
    return (
        f"{size.layers} layers, D={size.dim}, {size.heads} heads and {size.kv_heads} key-value heads of "
        f"{size.head_dim}, {size.sequences} x {size.time} tokens, vocabulary {size.vocabulary}, float32."
    )


def _comparison(models: Mapping[str, Measured | str], ours: str) -> str:
    reference = models[ours]
    rows = []
    for label, m in models.items():
        if isinstance(m, str):
            rows.append([label, "-", f"failed: {m}", *["-"] * 5])
            continue
        ratio = f"{m.speed_of(reference):.2f}" if isinstance(reference, Measured) else "-"
        seconds = [r["seconds"] for r in m.rounds]
        rows.append(
            [
                label,
                f"{m.parameters / 1e6:.1f}",
                f"{m.tokens_per_second:.0f}",
                f"{m.median('seconds') * 1e3:.0f} ({min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f})",
                f"{m.median('cpu_seconds'):.2f}",
                f"{m.peak_mib:.0f}",
                f"{m.start_peak_mib:.0f}",
                ratio,
            ]
        )
    header = "model|parameters, M|tokens/s|step, ms (range)|CPU s|peak MiB|peak MiB at start|frugalmoe is faster by"
    return table(header.split("|"), rows)


def _growth(grown: Results) -> str:
    rows = []
    for size, models in grown.items():
        base, m = models["base"], models["grown"]
        peers = [models[name] for name in ("peer base", "peer grown")]
        broken = any(isinstance(peer, str) for peer in peers)
        of_peer = ["-", "-"] if broken else [f"{peers[1].speed_of(peers[0]):.2f}", f"{peers[1].peak_mib:.0f}"]
        if isinstance(base, str) or isinstance(m, str):
            rows.append([str(size.experts), *["-"] * 8, f"failed: {base if isinstance(base, str) else m}"])
            continue
        forward_backward = [(x.median("seconds") - x.update_seconds) * 1e3 for x in (base, m)]
        rows.append(
            [
                f"{size.experts}",
                f"{m.parameters / 1e6:.0f}",
                f"{base.median('seconds') * 1e3:.0f}",
                f"{m.median('seconds') * 1e3:.0f}",
                f"{m.speed_of(base):.2f}",
                f"{m.update_seconds * 1e3:.0f} ({base.update_seconds * 1e3:.0f})",
                f"{forward_backward[1] / forward_backward[0]:.2f}",
                f"{m.peak_mib:.0f}",
                *of_peer,
            ]
        )
    header = "experts|parameters, M|step with 8, ms|step, ms|growth|optimizer, ms (with 8)|growth without it|peak MiB"
    header += "|growth of mixtral, grouped_mm|its peak MiB"
    return table(header.split("|"), rows)


def _dispatch(compared: Results, ours: str) -> str:
    """How long Python is busy: after the call returns, the next batch can be prepared while the step runs."""
    rows = []
    for size, models in compared.items():
        if isinstance(m := models[ours], Measured):
            call, step = m.median("dispatch_seconds"), m.median("seconds")
            rows.append([size.name, f"{call * 1e3:.2f}", f"{step * 1e3:.0f}", f"{call / step:.2%}"])
    return table(["size", "call of the step, ms", "step, ms", "share"], rows)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; all columns but the first are aligned to the right."""
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_json(
    machine: Mapping[str, str], compared: Results, grown: Results, moved: Mapping[Size, Moves]
) -> dict[str, Any]:
    def plain(results: Results) -> dict:
        return {
            size.name: {label: m if isinstance(m, str) else m._asdict() for label, m in models.items()}
            for size, models in results.items()
        }

    return {
        "machine": machine,
        "compared": plain(compared),
        "growth": plain(grown),
        "passes": {s.name: m for s, m in moved.items()},
    }
