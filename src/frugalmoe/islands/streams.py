"""Which rows of the data an island reads: streams, each leased to one island at a time, with one counter each.

Of 64 streams, say, row number n of the shuffled data is row n // 64 of stream n % 64. A counter is the first row of a
stream that is in no merged contribution. An island reads from its streams the rows with the smallest counters first, so
that all parts of the data are read about equally often; which rows they are follows from the lease and the counters
alone.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence

Rows = Mapping[str, tuple[int, int]]  # stream -> the first row that was read, and the first that was not


def read(leased: Sequence[int], counters: Sequence[int], count: int) -> list[int]:
    """Returns the numbers of the next `count` rows that an island with these streams reads."""
    heap, found, total = [(counters[stream], stream) for stream in leased], [], len(counters)
    heapq.heapify(heap)
    for _ in range(count):
        row, stream = heap[0]
        found.append(row * total + stream)
        heapq.heapreplace(heap, (row + 1, stream))
    return found


def used(numbers: Iterable[int], total: int) -> dict[str, tuple[int, int]]:
    """Returns the rows of each of `total` streams that these numbers are, which `read` gave."""
    found: dict[int, tuple[int, int]] = {}
    for number in numbers:
        row, stream = divmod(number, total)
        first, end = found.get(stream, (row, row))
        found[stream] = min(first, row), max(end, row + 1)
    return {str(stream): rows for stream, rows in sorted(found.items())}


def after(counters: Sequence[int], rows: Rows) -> tuple[int, ...]:
    """Returns the counters when these rows were read."""
    moved = list(counters)
    for stream, (_, end) in rows.items():
        moved[int(stream)] = end
    return tuple(moved)


def why_not(rows: Rows, counters: Sequence[int], leased: Iterable[int]) -> str:
    """Says why rows cannot be the next ones of an island with these streams; empty where they are."""
    own = set(leased)
    for stream, (begin, end) in rows.items():
        number = int(stream) if stream.isdecimal() else -1
        if number not in own:
            return f"read stream {stream[:20]}, which is not its own"
        if not begin == counters[number] < end:
            return f"read rows {begin} to {end} of stream {stream}, of which row {counters[number]} is the next"
    return "" if rows else "read no rows"


def lease(members: Iterable[str], before: Mapping[str, Sequence[int]], total: int) -> dict[str, tuple[int, ...]]:
    """Returns the streams of each member, about equally many; as few as possible change hands.

    Members beyond the number of streams get none, and wait.
    """
    names = sorted(members)
    kept = {name: list(before.get(name, ())) for name in names}
    free = sorted(set(range(total)) - {stream for own in kept.values() for stream in own})
    # Those that have most already get the larger shares.
    order = sorted(names, key=lambda name: (-len(kept[name]), name))
    share = {name: total // len(names) + (i < total % len(names)) for i, name in enumerate(order)}
    for name in names:
        while len(kept[name]) > share[name]:
            free.append(kept[name].pop())
    free.sort()
    for name in names:
        while len(kept[name]) < share[name]:
            kept[name].append(free.pop(0))
    return {name: tuple(sorted(own)) for name, own in kept.items()}
