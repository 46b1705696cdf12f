"""How the record of a round is made: what was handed in is checked, the merge rule asked, the outer step formed.

Letters: M contributions, Q tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from frugalmoe.errors import UserError
from frugalmoe.islands import outer, records, streams
from frugalmoe.islands.contract import Offered
from frugalmoe.islands.directory import Arrays, Directory, Held, Rules, without_prefix
from frugalmoe.islands.records import Commit, Contribution, Damaged
from frugalmoe.schema import FrozenDict

MOST_ROWS = 1 << 20  # of a step
MOST_LATE = 4  # rounds after which a late contribution is not looked for any more


class _Offer(NamedTuple):
    label: str  # its island, with the round where it is late
    contribution: Contribution
    delta: Arrays
    routers: Arrays


def propose(there: Directory, held: Held, by: str, members: Callable[[], Mapping[str, tuple[int, ...]]]) -> Held:
    """Returns the outer state after the round that follows the one held, with the record that `by` would make of it.

    members: gives who reads which streams in the round after it. Blobs that the record names are written.
    """
    there.check(held.outer, held.commit)  # memory is not believed either
    round, rules, before = held.round + 1, there.rules, held.commit
    names = rules.names(round)
    offers, left_out = _offers(there, held)
    deltas = [offer.delta for offer in offers]
    offered = Offered(
        tuple(offer.label for offer in offers),
        outer.gram(deltas, names),
        tuple(tensor for name in names for tensor in rules.tensors if tensor.name == name),
        *(np.array([getattr(o.contribution, field) for o in offers], np.int64) for field in ("tokens", "steps")),
        np.array([round - offer.contribution.round for offer in offers], np.int64),
    )
    merged = rules.merge.merge(offered, before.history, rules.section.merge_options)
    left_out |= merged.left_out
    chosen = [i for i, offer in enumerate(offers) if offer.label not in left_out]
    # A late contribution whose rows follow those of one that was left out would leave a hole.
    rows, kept = before.rows, []
    for i in chosen:
        if why := streams.why_not(offers[i].contribution.rows, rows, before.members[offers[i].contribution.island]):
            left_out[offers[i].label] = why
            continue
        rows = streams.after(rows, offers[i].contribution.rows)
        kept.append(i)
    coefficients = merged.coefficients_MQ[kept]
    found = [offers[i].contribution for i in kept]
    tokens = [c.tokens for c in found]
    routers = rules.merge_routers([offers[i].routers for i in kept], tokens) if kept else held.routers
    state = there.step(held.outer, [deltas[i] for i in kept], coefficients, names)
    commit = Commit(
        format=records.FORMAT, round=round, by=by, merged=tuple(found),
        coefficients=tuple(tuple(map(float, row)) for row in coefficients), left_out=FrozenDict(left_out),
        notes=FrozenDict(merged.notes), history=FrozenDict(merged.history), outer=outer.sha256(state.params),
        routers=there.write_blob(routers),
        snapshot=there.write_snapshot(state, routers) if there.is_whole(round) else "",
        rows=rows, members=FrozenDict(members()), tokens=before.tokens + sum(tokens),
        tokens_of=FrozenDict(_tokens(before, found)),
    )  # fmt: skip
    return Held(commit, state, routers)


def _offers(there: Directory, held: Held) -> tuple[list[_Offer], dict[str, str]]:
    """What can be merged, sorted by island and round, and why the rest cannot."""
    rows, offers, left_out = held.commit.rows, [], {}
    for label, key in _candidates(there, held.round + 1):
        try:
            found = there.record(Contribution, key)
            offer = _offer(there, held, label, found, key)
            why = streams.why_not(found.rows, rows, held.commit.members.get(found.island, ()))
        except (Damaged, UserError) as e:
            why = str(e)
        if why:
            left_out[label] = why[:300]
        else:
            rows = streams.after(rows, found.rows)
            offers.append(offer)
    return offers, left_out


def _candidates(there: Directory, round: int) -> list[tuple[str, str]]:
    """(label, key) of the contributions to a round, and of late ones where they are wanted, in order."""
    found = [((name, round), name, key) for name, key in there.handed_in(round).items()]
    first = round - MOST_LATE if there.rules.section.late == "weigh" else round
    decided: set[str] = set()
    for late in range(max(first, 1), round):
        commit = there.known_commit(late)
        decided |= {f"{c.island}@{c.round}" for c in commit.merged}
        decided |= {label if "@" in label else f"{label}@{late}" for label in commit.left_out}
    for late in range(max(first, 1), round):
        rows = [((name, late), f"{name}@{late}", key) for name, key in there.handed_in(late).items()]
        found += [row for row in rows if row[1] not in decided]
    return [(label, key) for _, label, key in sorted(found)]


def _offer(there: Directory, held: Held, label: str, found: Contribution, key: str) -> _Offer:
    """A contribution with its arrays; raises `Damaged` or `UserError` for what cannot be merged."""
    late = records.round_of(key)
    if key != records.path_of_contribution(found.round, found.island) or found.round != late:
        raise Damaged(f"{key}: says that it is of round {found.round} and island {found.island}")
    base = held.commit if late == held.round + 1 else there.known_commit(late - 1)
    if why := _unlikely(there.rules, found):
        raise Damaged(why)
    if found.base != base.outer:
        raise Damaged(f"started from other outer parameters ({found.base[:12]}) than those of round {late - 1}")
    blob = there.read_blob(found.blob)
    shapes = {t.name: t.shape for t in there.rules.tensors}
    delta = there.delta(blob, there.rules.names(found.round), shapes)
    routers, known = without_prefix(blob, "routers/"), held.routers
    if {k: v.shape for k, v in routers.items()} != {k: v.shape for k, v in known.items()}:
        raise Damaged("its state of routers has other arrays or shapes")
    if not all(v.dtype == np.float32 and np.isfinite(v).all() for v in routers.values()):
        raise Damaged("its state of routers is not finite, or no float32")
    return _Offer(label, found, delta, routers)


def _unlikely(rules: Rules, found: Contribution) -> str:
    """Says what of an island's work cannot be true; empty where it can."""
    count = sum(end - begin for begin, end in found.rows.values())
    if found.tokens != count * rules.tokens_per_row:
        return f"says {found.tokens} tokens of {count} rows, which have {rules.tokens_per_row} each"
    if not 0 < found.steps <= rules.section.round_steps or count > found.steps * MOST_ROWS:
        return f"says {count} rows in {found.steps} steps; a round has {rules.section.round_steps} at most"
    return ""


def _tokens(before: Commit, found: Sequence[Contribution]) -> dict[str, int]:
    """Of each island, when these contributions are merged too."""
    tokens = dict(before.tokens_of)
    for contribution in found:
        tokens[contribution.island] = tokens.get(contribution.island, 0) + contribution.tokens
    return tokens
