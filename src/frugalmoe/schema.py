"""What a run is made of: frozen dataclasses with their defaults, one per section.

A config file edits a ConfigDict made from these (`frugalmoe.config.default`), `frugalmoe.config.resolve` turns it back
into them and checks it; past that border there is no ConfigDict, and no field is looked up with a default.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

Frozen = dataclasses.dataclass(frozen=True, kw_only=True)


BY_NAME = "by_name"  # metadata of a field that from Python may hold the object itself, a `Named`


OUTSIDE = "outside"  # metadata of a field that may name a Python file outside the package: see `frugalmoe.found`


class Named:
    """An object that may stand in a config, from Python; what is written down of it is its `name`."""

    name: str


class FrozenDict(dict):
    """A mapping that refuses to be written to: configs share their defaults, and are the keys of caches."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a FrozenDict cannot be changed; make a new one: FrozenDict({**old, name: value})")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    @classmethod
    def fromkeys(cls, keys, value=None):
        return cls(dict.fromkeys(keys, value))

    def __hash__(self):
        return hash(tuple(sorted(self.items())))

    def __reduce__(self):  # copies and pickles are filled by construction, not item by item
        return FrozenDict, (dict(self),)


@Frozen
class MoE:
    """A mixture-of-experts feed-forward layer."""

    # A strategy that `frugalmoe routers` lists, path/to/file.py or package.module; from Python also a `Router` itself.
    router: str = dataclasses.field(default="topk_softmax", metadata={BY_NAME: True, OUTSIDE: True})
    options: Any = FrozenDict()  # the strategy's own options; after `resolve`, an instance of its `Options`
    num_experts: int = 8  # routed experts of a layer
    num_experts_per_token: int = 2  # experts that a token is sent to
    expert_dim: int = 128  # hidden width of one routed expert
    activation: str = "swiglu"  # of routed experts: swiglu | clamped_swiglu (gpt-oss)
    expert_bias: bool = False  # routed experts add biases to gate, up and down
    num_shared_experts: int = 0  # always active; computed as one feed-forward of width num_shared_experts * expert_dim
    shared_gate: bool = False  # what the shared experts add is scaled by the sigmoid of a learned score (Qwen2-MoE)
    losses: Mapping[str, float] = FrozenDict(load_balance=0.01, z=0.001)  # coefficient of each loss the router returns
    load_balance_scope: str = "sequence"  # over what the load is balanced: sequence | micro_batch | global
    load_balance_group: int = 1  # sequences in one group of scope micro_batch
    load_balance_devices: int = 1  # loss device_balance: devices that hold equal shares of consecutive experts
    # auto or grouped: this platform's grouped products; a name in frugalmoe/experts/executors, as dense or capacity;
    # path/to/file.py; package.module.
    executor: str = dataclasses.field(default="auto", metadata={OUTSIDE: True})
    capacity_factor: float = 1.25  # executor=capacity: slots per expert = factor * tokens * k / experts, per sequence
    exchange: str = "auto"  # of tokens between devices that hold experts: auto | all_gather | all_to_all
    # Rows a device has room for, times its fair share; 0: for all, none is dropped. Rows lost depend on later tokens.
    exchange_room: float = 0.0
    drop_order: str = "token"  # executor=capacity: who keeps a slot: token (causal) | choice | weight (both leak)


@Frozen
class MixtureOfDepths:
    """Blocks that some tokens of a sequence pass and the others skip: see model/depths.py."""

    capacity: float = 0.0  # share of a sequence's tokens that pass a routed block, in (0, 1]; 0: no block is routed
    every: int = 2  # the last of each n dense blocks is routed, and the last of each n MoE blocks
    predictor_loss: float = 0.01  # coefficient; AdamW is blind to its size, but clipping by the global norm is not


@Frozen
class RopeScaling:
    """How rotary angles are stretched for sequences longer than those of training: see model/rotary.py."""

    kind: str = "none"  # none | linear | ntk | yarn | llama3
    factor: float = 1.0  # how much longer sequences may be; ntk: what the slowest channel is divided by
    original_length: int = 0  # yarn, llama3: tokens of the sequences before
    beta_fast: float = 32.0  # yarn: channels that turn more often than this in original_length tokens stay as they are
    beta_slow: float = 1.0  # yarn: those that turn less often than this are divided by the factor
    truncate: bool = True  # yarn: the two bounds are rounded outwards to whole channels
    attention_factor: float = 0.0  # yarn: of sine and cosine; 0: from the factor, by the paper
    mscale: float = 0.0  # yarn: weight of log(factor) in it, as DeepSeek has it; 0: 1, with nothing to divide by
    mscale_all_dim: float = 0.0  # yarn: what it is divided by likewise; attention=latent multiplies all scores by it
    low_freq_factor: float = 1.0  # llama3: channels that turn less often than this are divided by the factor
    high_freq_factor: float = 4.0  # llama3: those that turn more often than this stay as they are


@Frozen
class MultiTokenPrediction:
    """Modules that learn to predict tokens further ahead, beside the network: see model/multi_token.py."""

    depth: int = 0  # modules, each with a block of its own: number m predicts the token m + 1 places ahead; 0: none
    coefficient: float = 0.1  # of the mean of their cross-entropies in the training loss


@Frozen
class Multipliers:
    """Fixed factors in the network, as Granite has them."""

    embedding: float = 1.0  # of what token ids look up
    residual: float = 1.0  # of what attention and feed-forward add to the residual stream
    scores: float = 0.0  # of queries times keys; 0: 1 / sqrt(channels of a head)
    logits: float = 1.0  # logits are divided by it


@Frozen
class Model:
    """A decoder-only transformer."""

    vocab_size: int = 0  # 0: the tokenizer's, rounded up to a multiple of 64
    dim: int = 256  # width of the residual stream
    num_layers: int = 4  # transformer blocks, dense and MoE
    num_dense_layers: int = 0  # the first n layers have a dense feed-forward
    moe_every: int = 1  # of each n layers behind those the last has experts, the others a dense feed-forward
    dense_dim: int = 0  # hidden width of a dense layer's feed-forward
    # Kinds of attention: grouped | window | chunked | nope | latent (files of frugalmoe/model/attention/kinds),
    # path/to/file.py or package.module. Several, as window,window,window,grouped, are repeated over the layers in this
    # order.
    attention: str = "grouped"
    attention_options: Mapping[str, Any] = FrozenDict()  # KIND.OPTION: each kind's own options, as window.window
    num_heads: int = 8  # query heads
    num_kv_heads: int = (
        8  # heads of keys and values, each shared by num_heads / num_kv_heads query heads; not of latent
    )
    head_dim: int = 32  # channels of a head
    # none | head (per head, as Qwen3 and Ling 2.0) | full (over all heads, as OLMoE) | rotated (per head, and after
    # rotation, as Hunyuan) | unit (as rotated, without weights, and not where attention rotates nothing, as Llama 4)
    qk_norm: str = "none"
    qkv_bias: bool = False  # biases on the projections to queries, keys and values
    clip_qkv: float = 0.0  # before rotation queries, keys and values are clipped to +-clip_qkv (OLMo 1, OLMoE); 0: not
    out_bias: bool = False  # a bias on attention's projection back to the residual stream
    rope_theta: float = 10_000.0  # base of the rotary angles' wavelengths
    rope_fraction: float = 1.0  # share of each head that is rotated
    rope_scaling: RopeScaling = RopeScaling()
    # rms (RMSNorm) | layer (LayerNorm with scale and bias, as Phi-3.5-MoE) | layer_bare (without either, as OLMo 1); of
    # queries, keys and latents it is rms always
    norm: str = "rms"
    norm_eps: float = 1e-6  # added to the mean square, or to the variance, in norms
    # Of a block's attention and feed-forward what is normalized: before (what they see) | after (what they add, OLMo 2)
    norm_position: str = "before"
    multipliers: Multipliers = Multipliers()
    tie_embeddings: bool = False  # the head's weights are the embedding's
    head_bias: bool = False  # a learned bias on logits
    norm_head: bool = False  # Ling 1: head weights divided by their norm over the vocabulary
    init_std: float = 0.02  # weights that write into the residual stream are further divided by sqrt(2 * num_layers)
    compute_dtype: str = "float32"  # float32 | bfloat16; parameters are float32 always
    remat: str = "none"  # none | dots (keep matrix products) | full (keep layer inputs and routing plans)
    moe: MoE = MoE()
    mixture_of_depths: MixtureOfDepths = MixtureOfDepths()
    multi_token_prediction: MultiTokenPrediction = MultiTokenPrediction()


@Frozen
class Source:
    """One named source of text."""

    # A file or directory of .txt .md .jsonl .ndjson .json .csv .tsv (.gz .zst .bz2 .xz) or .parquet; a glob takes any
    # text; hf:NAME[:SPLIT]; quickstart[:DOMAIN] or mixed[:DOMAIN], the built-in corpora; path/to/file.py or
    # package.module that defines CORPUS, a source of your own.
    path: str = ""
    weight: float = 0.0  # share of the mixture; 0 for all sources: in proportion to their tokens
    text_field: str = "text"  # field or column that holds a record's text; meta.text: `text` inside `meta`
    # text | chat: records are conversations, which the tokenizer's chat template writes; the loss is of answers alone
    kind: str = "text"
    chat_fields: str = "messages,prompt,response"  # kind=chat: of the list of messages, or of question and answer
    null_text: str = "stop"  # at a record whose text is null or absent: stop | skip (they are counted and told)
    encoding: str = "utf-8"  # of text files, tables and JSON, by Python's names: utf-16, latin-1, cp1252, gb18030 ...
    domain: str = (
        ""  # label of its documents; empty: the source's name, or the record's `domain` field where it has one
    )


@Frozen
class Data:
    # A file, directory or glob of text, hf:NAME[:SPLIT], quickstart[:DOMAIN], mixed[:DOMAIN] or a Python file that
    # defines CORPUS, as Source.path, or a prepared directory; ignored where `sources` is given.
    path: str = "quickstart"
    text_field: str = "text"  # of the records of `path`, as Source.text_field
    kind: str = "text"  # of the records of `path`, as Source.kind: text | chat
    sources: Mapping[str, Source] = FrozenDict()  # several named sources, data.sources.NAME.path=... and so on
    # bytes | bpe:SIZE (trained on the data) | the path of a published vocabulary or of the directory that it is in:
    # tokenizer.json, tekken.json, *.tiktoken, tokenizer.model, vocab.json with merges.txt
    tokenizer: str = "bytes"
    sequence_length: int = 256  # tokens in a row
    document_start: str = "end_of_text"  # in front of a document, its first token a target: end_of_text | none
    validation_fraction: float = 0.05  # of documents, by a hash of their text; at least one per domain
    # A validation set of your own beside the held-out documents; path empty: none. None of it is trained on, and
    # train.eval_rows of each of its domains are scored. A prepared directory gives its held-out documents.
    validation: Source = Source()
    # Records of prepared data, pieces of documents, that may be left out where they cannot be read; one more ends the
    # run. What was left out stays so when the run goes on.
    quarantine: int = 0
    cache_dir: str = ""  # empty: $FRUGALMOE_CACHE, else ~/.cache/frugalmoe


@Frozen
class Optim:
    # adamw | muon (for matrices; AdamW for vectors, embedding, head and routers) | sgd (without momentum)
    name: str = "adamw"
    # What is trained; the rest is frozen, with no state of the optimizer. Roles, or glob patterns of paths, whose names
    # are joined by /, as router,*/attention/*; `frugalmoe train --dry-run` shows how many parameters they are.
    train: str = "*"
    learning_rate: float = 1e-3  # peak
    # Factor on the learning rate of a role, 1 where none is given: matrix, vector, embedding, head or router.
    rates: Mapping[str, float] = FrozenDict()
    schedule: str = "wsd"  # wsd (warmup, stable, decay) | cosine | constant
    warmup_steps: int = 100  # steps of linear warmup from zero
    decay_fraction: float = 0.2  # wsd: last share of the updates after the warmup, linear to the final rate; 0: none
    final_fraction: float = 0.1  # rate of the very last update / peak rate
    # Share of all updates after which the peak rate is lower, `drop_factor` of it (Ling, arXiv 2503.05139: half after
    # 0.6); 0: never. Not of cosine.
    drop_after: float = 0.0
    drop_factor: float = 0.5  # on the rate after drop_after
    weight_decay: float = 0.1  # decoupled; on matrices only, not on norms, biases, routers' vectors
    b1: float = 0.9  # AdamW: decay of the mean of gradients
    b2: float = 0.95  # AdamW: decay of the mean of their squares
    eps: float = 1e-8  # AdamW: added to the root of the mean square
    momentum: float = 0.95  # Muon: decay of the mean of gradients
    clip_norm: float = 1.0  # 0: no clipping
    logit_z_loss: float = 0.0  # coefficient of mean(logsumexp(logits)^2)


@Frozen
class Train:
    steps: int = 1000  # optimizer steps
    batch_size: int = 16  # sequences in an optimizer step, over all devices and micro-batches
    accumulate_steps: int = 1  # micro-batches in an optimizer step
    # Sequences of the first batch, which grow to batch_size over ramp_batches batches by whole micro-batches of
    # batch_size / accumulate_steps (Ling, arXiv 2503.05139: 2,560 to 8,960); 0: batch_size from the start.
    ramp_from: int = 0
    ramp_batches: int = 0  # over which batches grow
    seed: int = 0  # of parameters, order of the data and routers' noise
    log_every: int = 10  # steps from one row of metrics.jsonl to the next
    eval_every: int = 0  # 0: at the end only
    eval_rows: int = 128  # held-out sequences of each domain, whatever batches they are computed in
    loss_chunk: int = 1024  # tokens whose logits exist at one time
    # Seconds to wait for a batch, or ten times what a step takes if that is longer; then the process counts as stuck
    # and ends. Twice as long for a step, 30 times for a save or an evaluation, 60 times for compiling. 0: for ever.
    stuck_seconds: float = 60.0
    trackers: str = "tensorboard"  # who gets the metrics too, a,b: tensorboard | wandb | trackio; empty: nobody


@Frozen
class Checkpoint:
    every_steps: int = 0  # 0: at the end (and on SIGTERM) only
    keep_last: int = 2  # newest checkpoints that are kept
    keep_every_steps: int = 0  # steps that are multiples of this are kept for ever; 0: none
    # A metric of evaluations, as eval/loss/mean or validation/bits_per_byte/DOMAIN, whose best checkpoint is saved and
    # kept beside the last ones; RUN@best names it. Needs train.eval_every. Empty: none.
    keep_best: str = ""
    # Where the disk is full, or cannot be written: continue (says so, trains on, and tries again at the next save) |
    # stop. At its end a run waits for space, and then stops in either case.
    on_error: str = "continue"


@Frozen
class Guard:
    """What is done about a batch whose loss or gradient is not finite, or far above what it was: see train/guard.py."""

    # skip (leaves the update out, tries the batch again later, lowers the rate, goes back to a checkpoint) | stop (ends
    # the run where a value is not finite; spikes are not looked at)
    policy: str = "skip"
    loss_deviations: float = 10.0  # a loss so many standard deviations above its mean is a spike; 0: not looked at
    gradient_deviations: float = 10.0  # likewise of the logarithm of the gradient norm
    watchful: float = 0.5  # for lowered_steps updates after a skip, so many times these deviations suffice
    window: int = 100  # updates that deviations are of, the newest weighing most; means are of a tenth of them
    after: int = 50  # updates before anything counts as a spike
    retry_after: int = 20  # batches without a skip before what was skipped comes again, for the last time
    patience: int = 50  # skips, less the updates between them, before the rate is lowered
    lower: float = 0.1  # factor on the learning rate in a lowered phase, in which only what is not finite is skipped
    lowered_steps: int = 20  # length of a lowered phase; trouble in as many steps after it makes the run go back
    last_patience: int = 5  # skips after a lowered phase, or batches in a row that are not finite, that make it go back
    rollbacks: int = 2  # times that a run goes back to the newest checkpoint before the trouble
    # Batches between that checkpoint and the end of the trouble: skip (they are left out) | again (at the lowered rate)
    rollback_batches: str = "skip"
    replicas_every: int = 100  # steps between two comparisons of what devices hold alike; 0: before a save only
    replay_every: int = 0  # steps between two that are made twice, and must give the same bits; 0: none


@Frozen
class Islands:
    """Runs that train one model apart and meet in a directory, `frugalmoe train --islands=DIR`: see docs/islands.md.

    All islands of a directory have the same section.
    """

    # Updates of an island in a round. With round_seconds they are the most, and what a round counts for in schedules.
    round_steps: int = 50
    round_seconds: float = 0.0  # a round ends after so much time of the island's own; 0: after round_steps
    quorum: int = 0  # contributions that are enough for a round; 0: those of all islands that make progress
    grace_seconds: float = 0.0  # how long the others are waited for when there are enough
    lapse_seconds: float = 60.0  # an island whose progress is not seen for so long counts as gone
    late: str = "drop"  # what comes after its round was merged: drop | weigh (down by the rounds that it is late)
    # How contributions become one: a file of frugalmoe/islands/merges, as mean, tokens, edit or radial;
    # path/to/file.py or package.module.
    merge: str = dataclasses.field(default="mean", metadata={OUTSIDE: True})
    merge_options: Mapping[str, Any] = FrozenDict()  # the rule's own options
    learning_rate: float = 0.7  # of the outer step, SGD with Nesterov momentum
    momentum: float = 0.9  # of the outer step
    bits: int = 32  # of a number in a contribution: 32 (float32) | 16 (bfloat16) | 8 | 4 | 2 (integers)
    fragments: int = 1  # parts of the parameters; each round merges one of them, in turn
    # Updates that an island makes before it takes what a round gave; 0: it waits for it. With round_seconds they are
    # the least: it goes on until the round is decided.
    overlap_steps: int = 0
    overlap_mixing: float = 0.0  # share of an island's own parameters in what it then goes on with
    streams: int = 64  # parts of the data; each is read by one island at a time
    wait_for: int = 1  # islands that must be there before the first round
    snapshot_rounds: int = 10  # from one whole outer state in the directory to the next
    # Islands of a run that are all in its one process, under a virtual clock, and share its batch, for studies; 0: none
    # but those of --islands.
    virtual: int = 0
    virtual_seconds: str = "1"  # that a step of each of them takes: 1 | 1,2,4,8, again from the first
    keep_rounds: int = 20  # rounds whose contributions stay in the directory, at least; 0: all


@Frozen
class Mesh:
    """Devices per axis; one axis may be -1 (all that remain)."""

    data: int = -1  # batches are split; parameters are whole on each
    fsdp: int = 1  # batches are split; parameters are stored in parts and gathered when used
    expert: int = 1  # batches and experts are split; tokens travel to their experts
    tensor: int = 1  # heads and hidden widths are split
    context: int = 1  # sequences are split


@Frozen
class Config:
    name: str = "run"  # the default workdir is runs/<name>
    model: Model = Model()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    mesh: Mesh = Mesh()
    islands: Islands = Islands()
