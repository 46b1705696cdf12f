"""The table that a terminal shows at the end of training."""

from rich.table import Table
from rich.text import Text

from frugalmoe import metrics
from frugalmoe.analysis.stored.runs import Run
from frugalmoe.analysis.wording import count, number, percent
from frugalmoe.config import RECORD, resolve, runnable, settle
from frugalmoe.cost import TRAIN_FACTOR, forward_flops
from frugalmoe.errors import UserError


def headline_rows(run: Run) -> list[tuple[str, str]]:
    """Returns (what, value) of the run as a whole; what is not known is left out."""
    parameters, speed = run.summary.get("parameters", {}), run.summary.get("speed", {})
    router, moe = run.summary.get("router", {}), run.config.get("model", {}).get("moe", {})
    rows = []
    if {"step", "steps", "status"} <= run.summary.keys():
        steps = f"{run.summary['step']:,} of {run.summary['steps']:,} ({run.summary['status']})"
        rows.append(("optimizer steps", steps))
    if "name" in router:
        where = f", {moe['num_experts_per_token']} of {moe['num_experts']} experts" if moe else ""
        rows.append(("router", f"{router['name']}{where}; causality: {_causality(router)}"))
    if depths := run.summary.get("mixture_of_depths"):
        shares = [
            f"{percent(v['share'])} in layer {int(k.removeprefix('layer_'))}" for k, v in depths["layers"].items()
        ]
        claims = f"causality: {depths['causal']}; {depths['causal_in_evaluation']} in evaluation"
        rows.append(("mixture of depths", f"tokens that pass a block: {', '.join(shares)}; {claims}"))
    model = run.config.get("model", {})
    if depth := model.get("multi_token_prediction", {}).get("depth"):
        last = model["num_layers"] + depth - 1
        which = f"layer {last}" if depth == 1 else f"layers {model['num_layers']} to {last}"
        rows.append(("multi-token prediction", f"{depth} {'module' if depth == 1 else 'modules'}, logged as {which}"))
    if "total" in parameters:
        names = [("total", "total"), ("active", "active per token"), ("embedding", "embedding")]
        rows.append(("parameters", ", ".join(f"{count(parameters[k])} {w}" for k, w in names if k in parameters)))
    if tokens := tokens_seen(run):
        rows.append(("training tokens", count(tokens)))
        if flops := training_flops(run):
            rows.append(("training compute", f"{count(flops)} FLOPs ({count(flops / tokens)} per token)"))
    if speed.get("tokens_per_second") is not None:
        seconds = f" ({number(speed['step_seconds'])} s per step)" if "step_seconds" in speed else ""
        rows.append(("training speed", f"{number(speed['tokens_per_second'], 4)} tokens/s{seconds}"))
    return rows


def _causality(router: dict) -> str:
    """Returns the causality in training, and that in evaluation where it differs."""
    training, evaluation = router.get("causal", "unknown"), router.get("causal_in_evaluation")
    return training if evaluation in (None, training) else f"{training}; {evaluation} in evaluation"


def loss_rows(run: Run, part: str = "eval") -> list[tuple[str, str, str]]:
    """Returns (domain, loss, bits per byte); the mean last; empty where the run has not been evaluated.

    part: eval, of held-out documents, or validation, of the validation set of the run's own.
    """
    losses = run.summary.get(part, {}).get("loss", {})
    bits = run.summary.get(part, {}).get("bits_per_byte", {})
    names = [n for n in losses if n != "mean"] + ["mean"] * ("mean" in losses and len(losses) > 2)
    return [(n, number(losses[n], 4), number(bits.get(n), 4)) for n in names]


def balance_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Header and one row per MoE layer of what the summary says of its routing."""
    layers = run.summary.get("router", {}).get("layers", {})
    rows = {m.name.removeprefix("router/"): m for m in metrics.prefixed("router/")}
    names = [n for n in rows if any(n in values for values in layers.values())]
    titles = [rows[n].title for n in names]
    cells = [
        [str(int(key.removeprefix("layer_"))), *(number(v.get(n)) for n in names)] for key, v in sorted(layers.items())
    ]
    return ["layer", *titles], cells


def tokens_seen(run: Run) -> int:
    """Returns how many tokens the logged steps have seen; 0 where the config does not say."""
    train, data = run.config.get("train", {}), run.config.get("data", {})
    per_step = train.get("batch_size", 0) * data.get("sequence_length", 0)
    return per_step * max((int(s.steps[-1]) for s in run.metrics.values()), default=0)


def training_flops(run: Run) -> float:
    """Returns the FLOPs of forward and backward passes, with the experts that tokens used; 0 where the config is of
    other code than this.
    """
    try:
        config = settle(resolve(runnable(run.path / RECORD)), run.tokenizer.size if run.tokenizer else None, None)
    except UserError:
        return 0.0
    if not config.model.vocab_size:  # of a run older than `settle` that has no tokenizer
        return 0.0
    used = [
        layer["active_per_token"]
        for layer in run.summary.get("router", {}).get("layers", {}).values()
        if layer.get("active_per_token")
    ]
    active = sum(used) / len(used) if used else None
    parts = forward_flops(config.model, config.data.sequence_length, active)
    return TRAIN_FACTOR * tokens_seen(run) * sum(parts.values())


def summary_table(run: Run) -> Table:
    """Validation loss per domain, speed, parameters and routing balance per layer."""
    table = Table(title=Text(run.name), show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="bold")
    table.add_column()
    for what, value in headline_rows(run):
        table.add_row(Text(what), Text(value))
    for domain, loss, bits in loss_rows(run):
        table.add_row(Text(f"validation loss: {domain}"), Text(f"{loss} nats per token, {bits} bits per byte"))
    for domain, loss, bits in loss_rows(run, "validation"):
        table.add_row(Text(f"validation set: {domain}"), Text(f"{loss} nats per token, {bits} bits per byte"))
    header, rows = balance_rows(run)
    for layer, *values in rows:
        parts = [f"{name} {value}" for name, value in zip(header[1:], values)]
        table.add_row(Text(f"routing: layer {layer}"), Text(", ".join(parts)))
    return table
