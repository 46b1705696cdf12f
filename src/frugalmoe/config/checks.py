"""Every rule that a resolved config must obey. One line per rule: the field, its value, the rule, the valid choices."""

import codecs
import math
import os
import re
from collections.abc import Callable, Iterable

from frugalmoe import metrics
from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.fields import check_seed
from frugalmoe.files import check_name
from frugalmoe.model import pattern
from frugalmoe.schema import Config, Model, MoE


def check(config: Config) -> None:
    """Raises `UserError` for the first rule that the config breaks."""
    for part in config.name.split("/"):  # a study's runs are STUDY/ARM/SEED
        check_name("name" if part == config.name else f"name={config.name!r}: a part of it", part)
    of_model = (_model, _rope_scaling, _attention, _depths, _multi_token)
    of_experts = (_moe, _router, _losses, _load_balance, _executor)
    for rules in (
        _data,
        *of_model,
        *of_experts,
        _optim,
        _train,
        _guard,
        _islands,
    ):  # what a module may look at depends on the row
        rules(config)


def _require(ok: bool, path: str, value: object, rule: str) -> None:
    if not ok:
        raise UserError(f"{path}={value!r}: {rule}")


def _one_of(path: str, value: str, valid: Iterable[str]) -> None:
    if value not in (valid := tuple(valid)):
        raise UserError(f"{path}={value!r}: unknown; {did_you_mean(value, valid)}")


def _each(prefix: str, section: object, names: str, ok: Callable[[float], bool], rule: str) -> None:
    for name in names.split():
        value = getattr(section, name)
        _require(math.isfinite(value) and ok(value), f"{prefix}.{name}", value, rule)


ROUNDED_TO = 64  # a vocabulary that follows the tokenizer is rounded up to a multiple of this

MOST_LAYERS = 10_000
MOST_WAITING = 60  # batches between two tries of one; `train.guard.ROOM` must hold those that wait meanwhile
ISLAND_BITS = (32, 16, 8, 4, 2)  # of a number that an island sends
KINDS = ("text", "chat")  # of the records of a source
_MARKS = re.compile(r"[./~]")  # of what is meant as a path


def _model(config: Config) -> None:
    m: Model = config.model
    positive = "dim num_layers num_heads num_kv_heads head_dim norm_eps init_std rope_theta"
    _each("model", m, positive, lambda v: v > 0, "must be positive")
    _each("model", m, "vocab_size num_dense_layers dense_dim", lambda v: v >= 0, "must not be negative")
    _require(0 < m.rope_fraction <= 1, "model.rope_fraction", m.rope_fraction, "must be in (0, 1]")
    # Every layer is looked at by itself, at each of many places.
    _each("model", m, "num_layers", lambda v: v <= MOST_LAYERS, f"must be at most {MOST_LAYERS}")
    _require(
        m.num_dense_layers <= m.num_layers,
        "model.num_dense_layers",
        m.num_dense_layers,
        f"must be at most model.num_layers={m.num_layers}",
    )
    rest = m.num_layers - m.num_dense_layers
    rule = f"must be from 1 to {max(rest, 1)}, the layers behind the first dense ones"
    _require(1 <= m.moe_every <= max(rest, 1), "model.moe_every", m.moe_every, rule)
    _require(m.dense_dim > 0 or not pattern.has_dense(m), "model.dense_dim", m.dense_dim, "dense layers need a width")
    _one_of("model.qk_norm", m.qk_norm, ("none", "head", "full", "rotated", "unit"))
    _one_of("model.norm", m.norm, ("rms", "layer", "layer_bare"))
    _each("model", m, "clip_qkv", lambda v: v >= 0, "must not be negative")
    _one_of("model.norm_position", m.norm_position, ("before", "after"))
    _each("model.multipliers", m.multipliers, "embedding residual logits", lambda v: v > 0, "must be positive")
    _each("model.multipliers", m.multipliers, "scores", lambda v: v >= 0, "must not be negative")
    _one_of("model.compute_dtype", m.compute_dtype, ("float32", "bfloat16"))
    _one_of("model.remat", m.remat, ("none", "dots", "full"))


def _rope_scaling(config: Config) -> None:
    m, path = config.model, "model.rope_scaling"
    scaling = m.rope_scaling
    _one_of(f"{path}.kind", scaling.kind, ("none", "linear", "ntk", "yarn", "llama3"))
    _each(path, scaling, "factor", lambda v: v >= 1, "must be at least 1")
    _each(path, scaling, "beta_fast beta_slow low_freq_factor", lambda v: v > 0, "must be positive")
    not_negative = "original_length attention_factor mscale mscale_all_dim"
    _each(path, scaling, not_negative, lambda v: v >= 0, "must not be negative")
    needs_length = scaling.kind in ("yarn", "llama3") and not scaling.original_length
    rule = f"must be the length of sequences before, with {path}.kind={scaling.kind}"
    _require(not needs_length, f"{path}.original_length", scaling.original_length, rule)
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        least, value = getattr(scaling, low), getattr(scaling, high)
        _require(value > least, f"{path}.{high}", value, f"must be greater than {path}.{low}={least}")
    _require(
        scaling.kind != "yarn" or m.rope_theta > 1,
        "model.rope_theta",
        m.rope_theta,
        f"must be greater than 1 with {path}.kind=yarn",
    )


def _attention(config: Config) -> None:
    # Imported here, as in the rules below: they import JAX, for which a mistyped field must not wait.
    from frugalmoe.model.attention import kinds

    names = dict.fromkeys(pattern.attention_names(config.model.attention))
    short = [pattern.short(name) for name in names]
    twice = next((name for name in short if short.count(name) > 1), None)
    rule = f"two kinds are called {twice!r}; their options and parameters could not be told apart"
    _require(twice is None, "model.attention", config.model.attention, rule)
    for name in names:
        if rule := kinds.get(name).check(config.model, kinds.options_of(config.model, name)):
            raise UserError(rule)


def _depths(config: Config) -> None:
    m = config.model
    depths, path = m.mixture_of_depths, "model.mixture_of_depths"
    _each(path, depths, "capacity", lambda v: 0 <= v <= 1, "must be in (0, 1], or 0 for none")
    _each(path, depths, "every", lambda v: v > 0, "must be positive")
    _each(path, depths, "predictor_loss", lambda v: v >= 0, "must not be negative")
    num_moe = len(pattern.moe_layers(m))
    most = max(m.num_layers - num_moe, num_moe)
    _require(
        not depths.capacity or depths.every <= most,
        f"{path}.every",
        depths.every,
        f"routes no block of {m.num_layers - num_moe} dense and {num_moe} MoE ones",
    )


def _multi_token(config: Config) -> None:
    section, path = config.model.multi_token_prediction, "model.multi_token_prediction"
    length = config.data.sequence_length
    rule = f"must be from 0 to {length - 1}, below data.sequence_length"
    _each(path, section, "depth", lambda v: 0 <= v < length, rule)
    _each(path, section, "coefficient", lambda v: v >= 0, "must not be negative")


def _moe(config: Config) -> None:
    moe: MoE = config.model.moe
    positive = "num_experts num_experts_per_token expert_dim capacity_factor"
    _each("model.moe", moe, positive, lambda v: v > 0, "must be positive")
    _each("model.moe", moe, "num_shared_experts", lambda v: v >= 0, "must not be negative")
    rule = "needs model.moe.num_shared_experts, which is 0"
    _require(moe.num_shared_experts > 0 or not moe.shared_gate, "model.moe.shared_gate", moe.shared_gate, rule)
    _require(
        moe.num_experts_per_token <= moe.num_experts,
        "model.moe.num_experts_per_token",
        moe.num_experts_per_token,
        f"must be at most model.moe.num_experts={moe.num_experts}",
    )


def _router(config: Config) -> None:
    from frugalmoe.routing import strategies

    moe = config.model.moe
    router = strategies.get(moe.router)
    _require(bool(router.name), "model.moe.router.name", router.name, "a router that is passed as an object needs one")
    if rule := router.check(moe):
        raise UserError(f"model.moe.router={moe.router!r}: {rule}")


def _losses(config: Config) -> None:
    from frugalmoe.routing import losses, strategies

    moe = config.model.moe
    own = {*losses.GATE_LOSSES, *strategies.get(moe.router).about.losses}
    for name, coefficient in moe.losses.items():
        path = f"model.moe.losses.{name}"
        # Those of other strategies are valid too, for configs that change the router; only then are all imported.
        if name not in own and name not in (known := own.union(strategies.loss_names())):
            raise UserError(f"{path}: unknown loss; {did_you_mean(name, known)}")
        _require(type(coefficient) in (int, float), path, coefficient, "must be a number")
        _require(0 <= coefficient < math.inf, path, coefficient, "must not be negative or infinite")


def _load_balance(config: Config) -> None:
    moe, devices = config.model.moe, "model.moe.load_balance_devices"
    _each("model.moe", moe, "load_balance_group", lambda v: v > 0, "must be positive")
    divides = moe.load_balance_devices > 0 and moe.num_experts % moe.load_balance_devices == 0
    _require(divides, devices, moe.load_balance_devices, f"must divide model.moe.num_experts={moe.num_experts}")
    _require(
        moe.load_balance_devices > 1 or "device_balance" not in moe.losses,
        devices,
        moe.load_balance_devices,
        "must be at least 2 for model.moe.losses.device_balance, which is constant on one device",
    )
    _one_of("model.moe.load_balance_scope", moe.load_balance_scope, ("sequence", "micro_batch", "global"))
    if config.train.accumulate_steps > 0:
        _check_scope(config, devices=1)


def _executor(config: Config) -> None:
    from frugalmoe import experts
    from frugalmoe.experts import exchange

    moe = config.model.moe
    executor = experts.pick(moe, "cpu")  # which of its own a platform takes does not matter here
    _one_of("model.moe.activation", moe.activation, experts.ACTIVATIONS)
    if rule := experts.refusal(executor, moe):
        raise UserError(f"model.moe.executor={moe.executor!r}: {rule}")
    _one_of("model.moe.drop_order", moe.drop_order, experts.ORDERS)
    _one_of("model.moe.exchange", moe.exchange, exchange.EXCHANGES)
    _each("model.moe", moe, "exchange_room", lambda v: v == 0 or v >= 1, "must be at least 1, or 0 for room for all")
    _require(
        not moe.exchange_room or executor.keeps_room or executor.drops is not None,
        "model.moe.exchange_room",
        moe.exchange_room,
        f"must be 0 with model.moe.executor={moe.executor}, which keeps to no number of rows",
    )


def _check_scope(config: Config, devices: int) -> None:
    """The groups of sequences over which the load is balanced lie inside one device's part of a micro-batch."""
    from frugalmoe.routing import losses

    moe, t = config.model.moe, config.train
    if rule := losses.scope_error(moe, t.accumulate_steps, t.batch_size // t.accumulate_steps // devices):
        raise UserError(f"model.moe.load_balance_scope={moe.load_balance_scope!r}: {rule}")


def _data(config: Config) -> None:
    d = config.data
    _require(d.sequence_length > 1, "data.sequence_length", d.sequence_length, "must be at least 2")
    _require(d.quarantine >= 0, "data.quarantine", d.quarantine, "must not be negative")
    _one_of("data.document_start", d.document_start, ("end_of_text", "none"))
    _require(0 < d.validation_fraction < 1, "data.validation_fraction", d.validation_fraction, "must be in (0, 1)")
    size = re.fullmatch(r"bpe:([0-9]{3,9})", d.tokenizer)
    _require(
        d.tokenizer == "bytes"
        or (size is not None and int(size[1]) > 256)
        or (not d.tokenizer.startswith("bpe:") and (_MARKS.search(d.tokenizer) or os.path.isdir(d.tokenizer))),
        "data.tokenizer",
        d.tokenizer,
        "must be bytes, bpe:SIZE with SIZE > 256, or the path of a tokenizer.json or of its directory",
    )
    named = {f"data.sources.{name}": source for name, source in d.sources.items()}
    for path, source in {**named, "data.validation": d.validation}.items():
        _one_of(f"{path}.null_text", source.null_text, ("stop", "skip"))
        _one_of(f"{path}.kind", source.kind, KINDS)
        names = source.chat_fields.split(",")
        rule = "must be three names: of the list of messages, of the prompt and of the response"
        _require(len(names) == 3 and all(names), f"{path}.chat_fields", source.chat_fields, rule)
        rule = "must be a text encoding that Python knows, as utf-8, utf-16, latin-1, cp1252"
        _require(_is_encoding(source.encoding), f"{path}.encoding", source.encoding, rule)
    _require(d.validation.weight == 0, "data.validation.weight", d.validation.weight, "must be 0: nothing is mixed")
    _one_of("data.kind", d.kind, KINDS)
    for name in ("text_field", "kind"):
        rule = f"belongs to data.path, which data.sources take the place of; set data.sources.NAME.{name}"
        _require(getattr(d, name) == "text" or not d.sources, f"data.{name}", getattr(d, name), rule)
    weights = [s.weight for s in d.sources.values()]
    _require(
        all(0 <= w < math.inf for w in weights), "data.sources", weights, "weights must not be negative or infinite"
    )
    _require(
        all(w == 0 for w in weights) or all(w > 0 for w in weights),
        "data.sources",
        weights,
        "either every source has a weight or none has",
    )


def _is_encoding(name: str) -> bool:
    try:
        return codecs.lookup(name).incrementaldecoder is not None and "a".encode(name) is not None
    except (LookupError, ValueError):  # unknown; not of text
        return False


def _optim(config: Config) -> None:
    from frugalmoe.model.transformer import declarations
    from frugalmoe.optimizers import EVERYTHING, OPTIMIZERS, trained
    from frugalmoe.sharding import ROLES

    o = config.optim
    _one_of("optim.name", o.name, OPTIMIZERS)
    if o.train != EVERYTHING:  # a model is described for it, which takes a second
        trained(o, declarations(config.model))
    for role, factor in o.rates.items():
        path = f"optim.rates.{role}"
        if role not in ROLES:
            raise UserError(f"{path}: unknown role of parameters; {did_you_mean(role, ROLES)}")
        _require(0 <= factor < math.inf, path, factor, "must not be negative or infinite")
    _each("optim", o, "learning_rate eps", lambda v: v > 0, "must be positive")
    _each("optim", o, "weight_decay clip_norm warmup_steps logit_z_loss", lambda v: v >= 0, "must not be negative")
    _each("optim", o, "b1 b2 momentum", lambda v: 0 <= v < 1, "must be in [0, 1)")
    _each("optim", o, "decay_fraction final_fraction", lambda v: 0 <= v <= 1, "must be in [0, 1]")
    _one_of("optim.schedule", o.schedule, ("wsd", "cosine", "constant"))
    _drop(config)
    _require(
        o.warmup_steps < config.train.steps,
        "optim.warmup_steps",
        o.warmup_steps,
        f"must be less than train.steps={config.train.steps}",
    )


def _drop(config: Config) -> None:
    """The rate that is lowered on the way, between warmup and decay."""
    o, steps = config.optim, config.train.steps
    _require(0 <= o.drop_after < 1, "optim.drop_after", o.drop_after, "must be in [0, 1)")
    _require(0 < o.drop_factor <= 1, "optim.drop_factor", o.drop_factor, "must be in (0, 1]")
    if not o.drop_after:
        return
    at, decay = dropped_at(config), steps - decaying_updates(config)
    rule = "needs optim.schedule=wsd or constant: cosine has no rate that stays"
    _require(o.schedule != "cosine", "optim.drop_after", o.drop_after, rule)
    rule = f"is update {at}, which must be after the {o.warmup_steps} of the warmup and before the decay at {decay}"
    _require(o.warmup_steps < at < decay, "optim.drop_after", o.drop_after, rule)
    if decay < steps:
        rule = f"must not be above optim.drop_factor={o.drop_factor}: a rate never rises again"
        _require(o.final_fraction <= o.drop_factor, "optim.final_fraction", o.final_fraction, rule)


def dropped_at(config: Config) -> int:
    """Returns the first update with the rate that `optim.drop_after` gives; `train.steps` where it gives none."""
    steps = config.train.steps
    return round(config.optim.drop_after * steps) if config.optim.drop_after else steps


def decaying_updates(config: Config) -> int:
    """Returns how many updates at the end are below the rate that stays."""
    o, steps = config.optim, config.train.steps
    after = steps - o.warmup_steps
    if o.schedule == "constant" or (o.schedule == "wsd" and not o.decay_fraction):
        return 0
    wanted = after if o.schedule == "cosine" else max(round(o.decay_fraction * after), 1)
    return min(wanted, max(steps - 1, 1))


def _ramp(config: Config) -> None:
    """Batches that grow by whole micro-batches, each of which the layout of the devices suits already."""
    t = config.train
    _each("train", t, "ramp_from ramp_batches", lambda v: v >= 0, "must not be negative")
    rule = "needs train.ramp_batches, the batches over which they grow; without one of them both are 0"
    _require(bool(t.ramp_from) == bool(t.ramp_batches), "train.ramp_from", t.ramp_from, rule)
    if not t.ramp_from:
        return
    unit = t.batch_size // t.accumulate_steps
    rule = f"must be a multiple of a micro-batch of {unit}, train.batch_size / train.accumulate_steps, and below"
    rule = f"{rule} train.batch_size={t.batch_size}; with train.ramp_batches it may be 0: no ramp"
    _require(t.ramp_from % unit == 0 and t.ramp_from < t.batch_size, "train.ramp_from", t.ramp_from, rule)
    rule = "must not be above train.steps, and give each size a batch"
    stages = (t.batch_size - t.ramp_from) // unit
    _require(stages <= t.ramp_batches <= t.steps, "train.ramp_batches", t.ramp_batches, rule)


def _train(config: Config) -> None:
    t, c = config.train, config.checkpoint
    positive = "steps batch_size accumulate_steps log_every eval_rows loss_chunk"
    _each("train", t, positive, lambda v: v > 0, "must be positive")
    check_seed("train.seed", t.seed)
    _each("train", t, "eval_every stuck_seconds", lambda v: v >= 0, "must not be negative")
    _each("checkpoint", c, "every_steps keep_every_steps", lambda v: v >= 0, "must not be negative")
    _each("checkpoint", c, "keep_last", lambda v: v > 0, "must be positive")
    _keep_best(config)
    _one_of("checkpoint.on_error", c.on_error, ("continue", "stop"))
    _require(
        t.batch_size % t.accumulate_steps == 0,
        "train.batch_size",
        t.batch_size,
        f"must be a multiple of train.accumulate_steps={t.accumulate_steps}",
    )
    _ramp(config)
    for name in tracker_names(config):
        _one_of("train.trackers", name, ("tensorboard", "wandb", "trackio"))
    tokens = t.batch_size * config.data.sequence_length
    rule = f"times data.sequence_length={config.data.sequence_length} must be below {2**31} tokens"
    _require(tokens < 2**31, "train.batch_size", t.batch_size, rule)


def _guard(config: Config) -> None:
    g, path = config.guard, "guard"
    _one_of(f"{path}.policy", g.policy, ("skip", "stop"))
    _one_of(f"{path}.rollback_batches", g.rollback_batches, ("skip", "again"))
    counts = "rollbacks replicas_every replay_every"
    _each(path, g, f"loss_deviations gradient_deviations {counts}", lambda v: v >= 0, "must not be negative")
    _each(
        path,
        g,
        "window after patience last_patience lowered_steps",
        lambda v: 0 < v < 2**20,
        "must be from 1 to 1048575",
    )
    _each(path, g, "retry_after", lambda v: 0 < v <= MOST_WAITING, f"must be from 1 to {MOST_WAITING}")
    _each(path, g, "lower watchful", lambda v: 0 < v <= 1, "must be above 0 and at most 1")


def _islands(config: Config) -> None:
    i, path = config.islands, "islands"
    positive = "round_steps lapse_seconds learning_rate fragments streams wait_for snapshot_rounds"
    _each(path, i, positive, lambda v: v > 0, "must be positive")
    not_negative = "round_seconds quorum grace_seconds overlap_steps keep_rounds virtual"
    _each(path, i, not_negative, lambda v: v >= 0, "must not be negative")
    _each(path, i, "momentum overlap_mixing", lambda v: 0 <= v < 1, "must be from 0 to below 1")
    _one_of(f"{path}.late", i.late, ("drop", "weigh"))
    _require(i.bits in ISLAND_BITS, f"{path}.bits", i.bits, f"valid: {', '.join(map(str, ISLAND_BITS))}")
    rule = f"must be below {path}.round_steps={i.round_steps}, in which the next round ends"
    _require(i.overlap_steps < i.round_steps, f"{path}.overlap_steps", i.overlap_steps, rule)
    rule = f"must be 0 without {path}.overlap_steps: an island that waits goes on with what all have"
    _require(i.overlap_steps > 0 or not i.overlap_mixing, f"{path}.overlap_mixing", i.overlap_mixing, rule)

    shared = i.virtual * config.train.accumulate_steps
    rule = f"times train.accumulate_steps={config.train.accumulate_steps} must divide train.batch_size"
    _require(not i.virtual or config.train.batch_size % shared == 0, f"{path}.virtual", i.virtual, rule)
    numbers = i.virtual_seconds.split(",")
    try:
        positive = all(0 < float(number) < math.inf for number in numbers)
    except ValueError:
        positive = False
    _require(positive, f"{path}.virtual_seconds", i.virtual_seconds, "must be positive numbers, as 1 or 1,2,4,8")


def _keep_best(config: Config) -> None:
    metric, path = config.checkpoint.keep_best, "checkpoint.keep_best"
    if not metric:
        return
    row = metrics.find(metric)
    is_measured = row is not None and row.better and metric.startswith(("eval/", "validation/"))
    rule = "must be a metric of evaluations: eval/ or validation/, loss/ or bits_per_byte/, a domain or mean"
    _require(is_measured, path, metric, rule)
    has_set = bool(config.data.validation.path) or not metric.startswith("validation/")
    _require(has_set, path, metric, "needs a validation set, data.validation.path")
    _require(config.train.eval_every > 0, path, metric, "needs train.eval_every, which is 0")


def tracker_names(config: Config) -> tuple[str, ...]:
    """Returns the names in train.trackers, each once."""
    return tuple(dict.fromkeys(name for name in config.train.trackers.split(",") if name))


def check_devices(config: Config, num_devices: int) -> dict[str, int]:
    """Returns the mesh axis sizes for this many devices, as `settle` needs them.

    Raises `UserError` where they do not multiply up to the devices or do not divide what they share.
    """
    axes = {name: getattr(config.mesh, name) for name in ("data", "fsdp", "expert", "tensor", "context")}
    for name, size in axes.items():
        _require(size == -1 or size > 0, f"mesh.{name}", size, "must be a positive size, or -1 for all that remain")
    open_axes = [name for name, size in axes.items() if size == -1]
    _require(
        len(open_axes) <= 1,
        f"mesh.{open_axes[-1] if open_axes else ''}",
        -1,
        f"only one axis may be -1, and mesh.{open_axes[0] if open_axes else ''} is too: give it a size",
    )
    given = math.prod(size for size in axes.values() if size != -1)
    if open_axes:
        named = "*".join(name for name, size in axes.items() if size > 1)
        _divides(
            f"mesh.{named}",
            given,
            f"the {num_devices} devices, of which mesh.{open_axes[0]}=-1 takes the rest",
            num_devices,
        )
        axes[open_axes[0]] = num_devices // given
    else:
        product = "*".join(f"{name}={size}" for name, size in axes.items())
        rule = f"must equal the number of devices, {num_devices}"
        _require(given == num_devices, "mesh", product, f"multiplies to {given}, which {rule}; one axis may be -1")
    _check_layout(config, axes)
    return axes


def _check_layout(config: Config, axes: dict[str, int]) -> None:
    """Every mesh axis divides what is spread over it."""
    m, moe, t, d = config.model, config.model.moe, config.train, config.data
    tensor, context = axes["tensor"], axes["context"]
    batch = axes["data"] * axes["fsdp"] * axes["expert"]
    micro = t.batch_size // t.accumulate_steps
    what = f"the {micro} sequences of a micro-batch (train.batch_size={t.batch_size})"
    _divides("mesh.data*fsdp*expert", batch, what, micro)
    _check_heads(m, axes)
    vocabulary = m.vocab_size or ROUNDED_TO  # it will be a multiple of that
    _divides("mesh.tensor", tensor, f"model.vocab_size={vocabulary}", vocabulary)
    if pattern.has_dense(m):
        _divides("mesh.tensor", tensor, f"model.dense_dim={m.dense_dim}", m.dense_dim)
    if pattern.has_experts(m):
        _divides("mesh.expert", axes["expert"], f"model.moe.num_experts={moe.num_experts}", moe.num_experts)
        _divides("mesh.tensor", tensor, f"model.moe.expert_dim={moe.expert_dim}", moe.expert_dim)
    stored = axes["fsdp"] * axes["expert"] * context
    _divides("mesh.fsdp*expert*context", stored, f"model.dim={m.dim}, which parameters are stored by", m.dim)
    length = f"data.sequence_length={d.sequence_length}"
    _divides("mesh.context", context, length, d.sequence_length)
    depths = m.mixture_of_depths.capacity
    _require(
        not depths or context == 1,
        "mesh.context",
        context,
        f"must be 1 with model.mixture_of_depths.capacity={depths}, which chooses among the tokens of whole sequences",
    )
    _check_scope(config, devices=batch)


def _check_heads(m: Model, axes: dict[str, int]) -> None:
    """The mesh divides what each kind of attention shares among devices."""
    from frugalmoe.model.attention import kinds

    tensor, context = axes["tensor"], axes["context"]
    for name in dict.fromkeys(pattern.attention_names(m.attention)):
        shared = kinds.get(name).mesh(m, kinds.options_of(m, name))
        for what, number in (shared.heads, shared.kv_heads):
            _divides("mesh.tensor", tensor, what, number)
        for what, number in shared.stored.items():
            stored = axes["fsdp"] * axes["expert"] * context
            _divides("mesh.fsdp*expert*context", stored, f"{what}, which parameters are stored by", number)
        (what, heads), (kv_what, kv_heads) = shared.heads, shared.kv_heads
        heads, kv_heads = heads // tensor, kv_heads // tensor
        _divides("mesh.context", context, f"the {heads} of {what} on a tensor device", heads)
        if context % kv_heads:
            more = f"the {kv_heads} of {kv_what} on a tensor device, or be a multiple of them"
            _divides("mesh.context", context, more, kv_heads)


def _divides(path: str, size: int, what: str, total: int) -> None:
    if total % size:
        raise UserError(f"{path}={size!r}: must divide {what}; {_nearest(size, total)}")


def _nearest(size: int, total: int) -> str:
    """The divisors of a total on both sides of a size that is none."""
    small = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
    valid = sorted({*small, *(total // n for n in small)})
    near = [*[n for n in valid if n < size][-1:], *[n for n in valid if n > size][:1]]
    return f"nearest valid: {', '.join(map(str, near))}"
