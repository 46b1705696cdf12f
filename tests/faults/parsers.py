"""What is read from outside, and from what is good its inputs are made: `PARSERS` is the table, a parser a row."""

import base64
import gzip
import io
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mutations
import numpy as np
import pyarrow
import pyarrow.parquet
import tokenizers
import zstandard
from mutations import Choices
from runs import tiny, write_text
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from frugalmoe.ablate import results
from frugalmoe.ablate.comparison import load_comparison
from frugalmoe.ablate.plan import read_study
from frugalmoe.ablate.progress import last_logged
from frugalmoe.ablate.report import markdown
from frugalmoe.ablate.study import flatten
from frugalmoe.analysis.pages.report import _events, _opening, _results, _starts
from frugalmoe.analysis.stored.listing import list_runs
from frugalmoe.analysis.stored.runs import load_run
from frugalmoe.analysis.stored.trace import fingerprints, load_trace
from frugalmoe.config import default, override, resolve
from frugalmoe.config.load import asked, load, opened, record
from frugalmoe.convert import from_hf, to_hf
from frugalmoe.data import open_data, quarantine
from frugalmoe.data.cache import digest
from frugalmoe.data.chat import find
from frugalmoe.data.prepare import prepare
from frugalmoe.data.sources import documents, open_inputs
from frugalmoe.data.tokenizer import load_from, train_bpe
from frugalmoe.data.vocabularies import byte_alphabet
from frugalmoe.errors import UserError
from frugalmoe.fields import to_dict
from frugalmoe.generate import prompts
from frugalmoe.islands import blobs, records, status
from frugalmoe.islands.store import open_store
from frugalmoe.schema import Data, Source
from frugalmoe.train import best, checksums, events, goodput, rollbacks, rundir, saved
from frugalmoe.train.loop import train
from frugalmoe.train.weights import load_model

LONGEST = 3000  # characters of a message
REPOSITORY = Path(__file__).parents[2]
DEFAULT = default()  # which takes longer to make than to read


class Parser(NamedTuple):
    """A row of the table."""

    name: str
    seeds: Callable[[Path], Mapping[str, str]]  # fills a folder with what is good; file -> how it is changed
    read: Callable[[Path, Sequence[str]], Any]  # reads the folder as the product does; the second: what is changed
    errors: tuple[type[Exception], ...] = (UserError,)  # the only ones that it may raise
    writes: tuple[str, ...] = ()  # files in the folder that it may write
    share: int = 1  # of the cases: more of what is fast and reads much


# ---------------------------------------------------------------- changes, by kind


def _compressed(pick: Choices, content: bytes, unpack: Callable, pack: Callable, inner: Callable) -> bytes:
    return mutations.of_bytes(pick, content) if pick.number(1) == 0 else pack(inner(pick, unpack(content)))


def _gz(pick: Choices, content: bytes) -> bytes:
    return _compressed(pick, content, gzip.decompress, gzip.compress, mutations.of_rows)


def _unzst(content: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(content)


def _zst(pick: Choices, content: bytes) -> bytes:
    return _compressed(pick, content, _unzst, zstandard.ZstdCompressor().compress, mutations.of_rows)


def _manifest(pick: Choices, content: bytes) -> bytes:
    """A manifest whose digest fits again, as somebody would make it."""
    changed = mutations.of_json(pick, content)
    try:
        value = json.loads(changed)
        inner = {name: each for name, each in value.items() if name != "digest"}
        return json.dumps({**inner, "digest": digest(inner)}).encode()
    except (ValueError, AttributeError, RecursionError, TypeError):
        return changed


def _sums(pick: Choices, content: bytes) -> bytes:
    """checksums.json whose own digest fits again."""
    changed = mutations.of_json(pick, content)
    try:
        return checksums._content(json.loads(changed)["files"])
    except (ValueError, LookupError, RecursionError, TypeError, AttributeError):
        return changed


def _template(pick: Choices, content: bytes) -> bytes:
    """Pieces of Jinja's language in any order."""
    pieces = [
        "{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content * 99999999 }}",
        "{{ ''.__class__.__mro__ }}", "{{ range(10**9)|list }}", "{% for i in range(10**9) %}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}", "{{ messages|tojson }}", "{% include '/etc/passwd' %}", "{% generation %}",
        "{% endgeneration %}", "{{ raise_exception('no') }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 9**99999999 }}", "{{ 'a'|center(10**9) }}", "{{ lipsum }}", "{{ self }}", "{{ '%1000000000d' % 3 }}",
        "{{ 'x' * 10**8 }}", "{% set a = 'a' * 10000 %}", "{{ a|replace('a', a) }}", "\ud7ff",
        "{{ strftime_now('%Y') }}",
        "{{ 1/0 }}", "{% break %}", "{{ messages.__len__ }}", "{{ '{:>99999999}'.format(3) }}", "{{ a|urlize }}",
        "{{ messages|batch(10**9) }}", "{{ a|wordwrap(1) }}", "{% set ns = namespace(x=1) %}", "{{ {} }}", "{#", "#}",
    ]  # fmt: skip
    if pick.number(3) == 0:
        return mutations.of_bytes(pick, content)
    return "".join(pick.one(pieces) for _ in range(1 + pick.number(5))).encode()


CHANGES: dict[str, Callable[[Choices, bytes], bytes]] = {
    "bytes": mutations.of_bytes,
    "json": mutations.of_json,
    "rows": mutations.of_rows,
    "columns": mutations.of_columns,
    "tensors": mutations.of_tensors,
    "rows.gz": _gz,
    "rows.zst": _zst,
    "manifest": _manifest,
    "sums": _sums,
    "template": _template,
}


# ---------------------------------------------------------------- what is good, and how it is read

# Two real runs' worth of files are made once, by the product: `made` fills a folder.


def made(root: Path) -> Path:
    """Text, prepared data, a complete run of two steps with two checkpoints, the same as a published model."""
    write_text(root / "text", 12)
    train_bpe([path.read_text() for path in (root / "text").glob("*.txt")], 300).save_into(root / "text")
    fields = {"train.steps": 2, "checkpoint.every_steps": 1, "optim.warmup_steps": 1, "train.eval_rows": 4}
    fields |= {"model.num_layers": 1, "model.num_dense_layers": 0, "model.moe.router": "topk_softmax"}
    fields |= {"model.moe.num_shared_experts": 0, "train.batch_size": 4, "checkpoint.keep_best": "eval/loss/mean"}
    fields |= {"train.eval_every": 1, "data.tokenizer": str(root / "text/tokenizer.json")}
    config = tiny(root / "text", root / "cache", fields)
    train(config, root / "run")
    prepare(config.data, root / "prepared", progress=False)
    config, weights, *_ = load_model(root / "run")
    to_hf.convert(root / "run", to_hf.look(root / "run", config, "mixtral"), weights, root / "published")
    return root


MADE: dict[str, Path] = {}  # root: the folder that `made` filled


def _copied(name: str, changed: Mapping[str, str]) -> Callable[[Path], Mapping[str, str]]:
    def seeds(folder: Path) -> Mapping[str, str]:
        shutil.copytree(MADE["root"] / name, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        return {file: how for file, how in changed.items() if (folder / file).is_file()}

    return seeds


def _seeds_overrides(folder: Path) -> Mapping[str, str]:
    (folder / "overrides").write_bytes(b"")
    return {"overrides": "override"}


FIELDS = sorted(name for name in flatten(to_dict(resolve(DEFAULT))))
_TEXTS = ["inf", "-inf", "nan", "-1", "0", "1e22", "True", "None", "[]", "{}", "{1:2}", "()", "'x'", "x", "../x",
          "4294967296", "5000000000", "9" * 400, "1e-320", "[" * 3000, "-" * 3000, "(" * 300, "\\", "\x00", "\ud800",
          "lambda: 3", "__import__('os')", "{'a': {'b': 1}}", "b'x'", "1j", "3.0", "bpe:99999", "hf:x", "a.py",
          "/abs", "é", "1_0", "0x10", "..", ".", "~", "*" * 50, "{seed}", "sum", "2", "3", "7", "16"]  # fmt: skip


_NAMES = ["", ".", "model", "model.moe", "x", "data.sources.a.path", "optim.rates.x", "model.moe.losses.z",
          "data.sources.a.weight", "data.sources.__class__", "optim.rates.keys", "model.moe.options.get"]  # fmt: skip


def _override(pick: Choices, content: bytes) -> bytes:
    name = pick.one(FIELDS)
    if pick.number(9) == 0:
        name = pick.one([*_NAMES, name + ".x", name + ".", name.upper()])
    value = pick.one(_TEXTS) if pick.number(2) else pick.text(12)
    if pick.number(4) == 0:
        value = str(pick.number(2**71) - 2**70)
    return json.dumps([f"{name}={value}"] if pick.number(20) else [name]).encode()


def _several(pick: Choices, content: bytes) -> bytes:
    rows = [_override(pick, b"") for _ in range(1 + pick.number(2))]
    return json.dumps([row for each in rows for row in json.loads(each)]).encode()


CHANGES["override"] = _several


def _read_overrides(folder: Path, changed: Sequence[str]) -> None:
    given = json.loads((folder / "overrides").read_bytes() or b"[]")
    resolve(override(DEFAULT, given))


_CONFIG = b"""from frugalmoe.config import default

def get_config(arg=None):
    config = default()
    config.name = "x"
    config.model.dim = 32
    config.optim.rates = {"router": 0.5}
    config.data.sources.a = {"path": "text", "weight": 1.0}
    return config
"""


def _seeds_config(folder: Path) -> Mapping[str, str]:
    (folder / "config.py").write_bytes(_CONFIG)
    return {"config.py": "bytes"}


RUN = {
    "config.json": "json", "summary.json": "json", "metrics.jsonl": "rows", "expert_load.jsonl": "rows",
    "environment.json": "json", "data.json": "json", "history.jsonl": "rows", "probe.npz": "columns",
    "tokenizer/tokenizer_config.json": "json", "trackers.json": "json",
}  # fmt: skip


def _read_report(run: Path, changed: Sequence[str]) -> None:
    """What a report, a listing and a notebook read of a run."""
    loaded = load_run(run)
    for metric in loaded.metrics:
        loaded.series(metric).tail()
    loaded.domains, loaded.name, loaded.layers("max_violation")
    list_runs(run.parent)
    for part in (_opening, _results, _starts):
        part(loaded)


def _read_resumed(run: Path, changed: Sequence[str]) -> None:
    """What a start looks at in the directory of its run, before it trains."""
    rundir.check_fresh(run)
    resolve(opened(asked(run / "config.json")))
    config = resolve(opened(record(run / "config.json")))
    rundir.as_begun(config, run)
    rundir.check_config(run, config, force=True)
    rundir.is_complete(run)
    rundir.origin_of(run)
    rundir.vocabulary(run)
    best.find(run, "eval/loss/mean", saved.saved_steps(run))
    rundir.Log(run / "metrics.jsonl", 1).close()
    rundir.Log(run / "expert_load.jsonl", 1).close()

    class Opened:
        fingerprint, validation, domains, notes, manifest = "x", None, ("a",), (), {"notes": ()}
        train_tokens = validation_tokens = remainder = 1

    rundir.check_data(run, Opened, force=True)


# What befell a run: the rows that it writes beside its metrics, each as the product does.
_LOGS = {
    events.FILE: [{"step": 1, "kind": "skipped", "what": "the batch at position 1: loss/total=nan", "seconds": 0.5}],
    goodput.FILE: [
        {
            "step": n,
            "start": n,
            "time": 9.0 + 9 * n,
            "elapsed": 3.0,
            "seconds": {"step": 1.5, "setup": 1.5},
            "first_step": 2.0,
        }
        for n in range(3)
    ],
    rollbacks.FILE: [rollbacks.Rollback(1, 2, 1, 2, None, 9, "trouble since step 1")._asdict()],
    quarantine.FILE: [{"record": "a/shard-00000.array_record 3", "why": "damaged"}],
    "rounds.jsonl": [
        {"step": n, "round": n, "merged": True, "islands": 2, "tokens": 9, "tokens_of_all": 18, "bytes/written": 9}
        | {"bytes/read": 9, "seconds/trained": 1.0, "seconds/waited": 0.5}
        for n in range(2)
    ],
    "island_load.jsonl": [{"round": 1, "step": 1, "layers": [0], "loads": [["a", [[1, 2]]]]}],
}


def _seeds_logs(folder: Path) -> Mapping[str, str]:
    _copied("run", RUN)(folder)
    for name, made_rows in _LOGS.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in made_rows))
    return dict.fromkeys(_LOGS, "rows")


def _read_logs(run: Path, changed: Sequence[str]) -> None:
    """What a report, a start that goes on and a supervisor make of these rows."""
    loaded = load_run(run)
    _events(loaded)
    if loaded.goodput:
        goodput.table(loaded.goodput)
        loaded.goodput.summary()
    rollbacks.read(run)
    left_out = quarantine.Quarantine(9)
    left_out.begin(run / quarantine.FILE)
    len(left_out)
    events.append(run / events.FILE, 1, "restart", "again", 1.0)
    assert load_run(run).events[-1]["kind"] == "restart"


def _seeds_sources(folder: Path) -> Mapping[str, str]:
    rows = [{"text": f"The moon {i} calls. é", "meta": {"a": [i]}, "domain": "ab"[i % 2]} for i in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pyarrow.table({"text": [row["text"] for row in rows], "domain": [row["domain"] for row in rows]})
    packed = io.BytesIO()
    pyarrow.parquet.write_table(table, packed, compression="zstd")
    files = {
        "a.jsonl": (lines, "rows"), "b.jsonl.gz": (gzip.compress(lines), "rows.gz"),
        "c.jsonl.zst": (zstandard.compress(lines), "rows.zst"), "d.txt": (lines * 3, "bytes"),
        "e.json": (json.dumps(rows).encode(), "json"), "f.csv": (b"text,domain\n" + b'"a, b",x\n' * 5, "bytes"),
        "g.parquet": (packed.getvalue(), "bytes"), "h.tsv": (b"text\tdomain\na\tb\n", "bytes"),
    }  # fmt: skip
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    return {name: how for name, (_, how) in files.items()}


def _read_sources(folder: Path, changed: Sequence[str]) -> None:
    """Each file by itself, but for those that are as they were; one error does not hide another."""
    for file in sorted(folder.iterdir()):
        if file.name in changed:
            data = Data(sources={"named": Source(path=str(file))})
            for opened_input in open_inputs(data, progress=False):
                for document in itertools.islice(documents(opened_input), 100_000):
                    document.text.encode(), document.domain.encode()


def _seeds_chats(folder: Path) -> Mapping[str, str]:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t").mkdir()
    train_bpe(["The moon calls"] * 9, 300).save_into(folder / "t")
    (folder / "t/chat_template.jinja").write_bytes(_JINJA)
    return {"a.jsonl": "rows"}


def _read_chats(folder: Path, changed: Sequence[str]) -> None:
    data = Data(sources={"named": Source(path=str(folder / "a.jsonl"), kind="chat")}, tokenizer=str(folder / "t"))
    for opened_input in open_inputs(data, progress=False):
        list(documents(opened_input))


_JINJA = (
    b"{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    b"{% if add_generation_prompt %}<a>{% endif %}"
)


def _seeds_template(folder: Path) -> Mapping[str, str]:
    (folder / "chat_template.jinja").write_bytes(_JINJA)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<e>", "chat_template": null}')
    return {"chat_template.jinja": "template"}


def _read_template(folder: Path, changed: Sequence[str]) -> None:
    template = find(folder)
    template.marks_answers  # noqa: B018
    template.render([{"role": "user", "content": "a"}], answer=True)


def _seeds_tokenizer(folder: Path) -> Mapping[str, str]:
    train_bpe(["The moon calls the river"] * 9, 270).save_into(folder)
    content = json.loads((folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "kind": "json"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 3]}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}, "pad_token": "x"}')
    return dict.fromkeys(sorted(path.name for path in folder.iterdir()), "json")


def _read_tokenizer(folder: Path, changed: Sequence[str]) -> None:
    tokenizer = load_from(folder)
    encoded = tokenizer.document("The moon é\n")
    tokenizer.decode(encoded.tokens)


def _seeds_wordpiece(folder: Path) -> Mapping[str, str]:
    """Another model of tokens, with other parts around it."""
    made = tokenizers.Tokenizer(
        models.WordPiece({"[UNK]": 0, "the": 1, "##n": 2, "moo": 3, "</s>": 4}, unk_token="[UNK]")
    )
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder, made.post_processor = (
        decoders.WordPiece(),
        processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 4)]),
    )
    made.add_special_tokens(["</s>"])
    (folder / "tokenizer.json").write_text(made.to_str())
    return {"tokenizer.json": "json"}


_SPECIAL = ("<unk>", "<s>", "</s>")


def _seeds_vocabularies(folder: Path) -> Mapping[str, str]:
    def piece(text: bytes, kind: int) -> bytes:
        inner = b"\x0a" + bytes([len(text)]) + text + b"\x15" + np.float32(-1).tobytes() + b"\x18" + bytes([kind])
        return b"\x0a" + bytes([len(inner)]) + inner

    pieces = [(b"<unk>", 2), (b"<s>", 3), (b"</s>", 3), ("▁a".encode(), 1), (b"b", 1), ("▁".encode(), 1), (b"ab", 1)]
    trainer = b"\x12" + bytes([4]) + b"\x18\x02\x20\x07" + b"\x1a\x04\x18\x01\x20\x00"
    ranks = [bytes([i]) for i in range(256)] + [b"ab", b"abc"]
    encode = lambda raw: base64.b64encode(raw).decode()
    tekken = {"config": {"default_num_special_tokens": 3, "default_vocab_size": 261, "pattern": "\\w+|."},
              "vocab": [{"token_bytes": encode(raw), "rank": n} for n, raw in enumerate(ranks)],
              "special_tokens": [{"token_str": t, "rank": n} for n, t in enumerate(_SPECIAL)]}  # fmt: skip
    vocabulary = {character: n for n, character in enumerate([*byte_alphabet(), "ab", "<|endoftext|>"])}
    files = {
        "s/tokenizer.model": (b"".join(piece(*p) for p in pieces) + trainer, "bytes"),
        "t/tekken.json": (json.dumps(tekken).encode(), "json"),
        "r/x.cl100k.tiktoken": ("".join(f"{encode(raw)} {n}\n" for n, raw in enumerate(ranks)).encode(), "bytes"),
        "v/vocab.json": (json.dumps(vocabulary).encode(), "json"), "v/merges.txt": (b"#version: 0.2\na b\n", "bytes"),
    }  # fmt: skip
    for name, (content, _) in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return {name: how for name, (_, how) in files.items()}


def _read_vocabularies(folder: Path, changed: Sequence[str]) -> None:
    for name in sorted({Path(file).parts[0] for file in changed}):
        _read_tokenizer(folder / name, changed)


def _read_prepared(folder: Path, changed: Sequence[str]) -> None:
    manifest = json.loads(_made_bytes("prepared/manifest.json"))
    data = Data(
        path=str(folder), tokenizer=str(folder), sequence_length=32, validation_fraction=manifest["validation_fraction"]
    )
    opened_data = open_data(data, batch_size=2, seed=0, progress=False)
    opened_data.batch(0)
    for domain in opened_data.domains:
        next(opened_data.eval_batches(domain, 2), None)


def _made_bytes(name: str) -> bytes:
    return (MADE["root"] / name).read_bytes()


def _seeds_prepared(folder: Path) -> Mapping[str, str]:
    changed = {"manifest.json": "manifest", "shard-00000.npz": "columns", "shard-00000.array_record": "bytes",
               "tokenizer.json": "json", "tokenizer_config.json": "json"}  # fmt: skip
    return _copied("prepared", changed)(folder)


def _seeds_study(folder: Path) -> Mapping[str, str]:
    for name in ("study.json", "results.parquet"):
        shutil.copy(REPOSITORY / "experiments/shared_experts" / name, folder)
    return {"study.json": "json", "results.parquet": "table"}


def _table(pick: Choices, content: bytes) -> bytes:
    """Bytes, or a column of another type or with other values."""
    if pick.number(1) == 0:
        return mutations.of_bytes(pick, content)
    table = pyarrow.parquet.read_table(io.BytesIO(content))
    name = pick.one(table.schema.names)
    number = table.schema.get_field_index(name)
    values = {
        "null": lambda: pyarrow.nulls(table.num_rows, table.schema.field(name).type),
        "gone": lambda: None,
        "list": lambda: pyarrow.array([[1]] * table.num_rows),
        "nan": lambda: pyarrow.array([float("nan")] * table.num_rows),
        "text": lambda: pyarrow.array([pick.one(["../x", "eval/loss/mean", "[red]", "é", ""])] * table.num_rows),
        "large": lambda: pyarrow.array([2**31 - 1] * table.num_rows, pyarrow.int32()),
        "low": lambda: pyarrow.array([-(2**31)] * table.num_rows, pyarrow.int32()),
        "huge": lambda: pyarrow.array([1e308] * table.num_rows),
        "zero": lambda: pyarrow.array([0.0] * table.num_rows),
    }  # fmt: skip
    new = values[pick.one(sorted(values))]()
    changed = table.remove_column(number) if new is None else table.set_column(number, name, new)
    if pick.number(3) == 0:
        changed = changed.slice(0, pick.number(3))
    made = io.BytesIO()
    pyarrow.parquet.write_table(changed.replace_schema_metadata(table.schema.metadata), made)
    return made.getvalue()


CHANGES["table"] = _table


def _read_study(folder: Path, changed: Sequence[str]) -> None:
    read_study(folder)
    markdown(load_comparison(folder), ["curves"])


def _seeds_runs_of_study(folder: Path) -> Mapping[str, str]:
    """A study of one arm, whose run is ours."""
    shutil.copytree(MADE["root"] / "run", folder / "base/seed_0", ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    (folder / "base/seed_0/suite.json").write_text('{"suite/accuracy/copy": 0.5}')
    (folder / "base/seed_0/cross.json").write_text('{"base": 3.0}')
    study = json.loads((REPOSITORY / "experiments/shared_experts/study.json").read_bytes())
    first = next(iter(study["forward_flops"]))
    study |= {"name": "fuzzed", "arms": {"base": {}}, "baseline": "base", "seeds": [0], "metrics": ["eval/loss/mean"]}
    study |= {name: {"base": study[name][first]} for name in ("forward_flops", "experts_per_token", "parameters")}
    (folder / "study.json").write_text(json.dumps(study))
    files = {"summary.json": "json", "metrics.jsonl": "rows", "suite.json": "json", "cross.json": "json"}
    return {f"base/seed_0/{name}": how for name, how in files.items()} | {"study.json": "json"}


def _read_runs_of_study(folder: Path, changed: Sequence[str]) -> None:
    for run in folder.glob("*/seed_*"):
        last_logged(run / "metrics.jsonl")
    table = results.gather(folder, read_study(folder))
    table.validate(full=True)


def _seeds_prompts(folder: Path) -> Mapping[str, str]:
    (folder / "a.txt").write_bytes("The moon\n\nTwo é\r\n".encode())
    rows = [{"prompt": "The"}, {"messages": [{"role": "user", "content": "a"}]}]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"a.txt": "bytes", "b.jsonl": "rows"}


def _read_prompts(folder: Path, changed: Sequence[str]) -> None:
    for name in changed:
        for entry in prompts.read(folder / name):
            json.dumps(prompts.to_record(entry)).encode()


def _read_published(folder: Path, changed: Sequence[str]) -> None:
    look = from_hf.look(folder, folder / "run")
    if not look.faults:
        from_hf.check_repeats(look)
        from_hf.read_arrays(look)


PUBLISHED = {"config.json": "json", "model.safetensors": "tensors", "tokenizer.json": "json",
             "tokenizer_config.json": "json", "generation_config.json": "json"}  # fmt: skip


def _seeds_sharded(folder: Path) -> Mapping[str, str]:
    _copied("published", PUBLISHED)(folder)
    content = (folder / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    names = [name for name in header if name != "__metadata__"]
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"model.safetensors.index.json": "json", "model-1.safetensors": "tensors"}


_SHA = "0" * 64


def _seeds_islands(folder: Path) -> Mapping[str, str]:
    arrays = {"moe/experts/03": np.arange(12, dtype=np.float32).reshape(3, 4), "odd": np.array([1, 2, 3], np.int8)}
    contribution = records.Contribution(
        island="a", run="r", round=1, base=_SHA, blob=_SHA, bytes=3, tokens=5, steps=2, rows={"0": (0, 3)}, seconds=1.0
    )
    commit = lambda n: records.Commit(
        format=records.FORMAT, round=n, by="a", merged=(contribution,), coefficients=((1.0,),), left_out={"b": "late"},
        notes={}, history={"x": [1]}, outer=_SHA, routers=_SHA, snapshot="", rows=(0, 0), members={"a": (0, 1)},
        tokens=9, tokens_of={"a": 9},
    )  # fmt: skip
    agreed = records.Agreement(
        format=records.FORMAT, model={"dim": 3}, data="d", tokenizer="t", seed=0, steps=9,
        islands={"merge": "mean", "bits": 32, "round_steps": 3, "lapse_seconds": 9.0},
    )  # fmt: skip
    presence = records.Presence(
        island="a", run="r", beat=1, round=1, status="training", step=3, tokens_per_second=3.0, about={"devices": 1}
    )
    files = {
        records.AGREEMENT: (records.to_bytes(agreed), "json"),
        records.path_of_presence("a"): (records.to_bytes(presence), "json"),
        records.path_of_contribution(1, "a"): (records.to_bytes(contribution), "json"),
        records.path_of_commit(0): (records.to_bytes(commit(0)), "json"),
        records.path_of_commit(1): (records.to_bytes(commit(1)), "json"),
        "blob": (blobs.to_bytes(arrays), "tensors"),
    }
    for name, (content, _) in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return {name: how for name, (_, how) in files.items()}


def _read_islands(folder: Path, changed: Sequence[str]) -> None:
    looked = status.look(open_store(str(folder), write=False))
    assert all(line.isprintable() and len(line) < LONGEST for line in looked.damaged), looked.damaged
    key = records.path_of_contribution(1, "a")
    records.from_bytes(records.Contribution, (folder / key).read_bytes(), key)
    content = (folder / "blob").read_bytes()
    blobs.from_bytes(content, blobs.sha256(content))


def _seeds_checkpoint(folder: Path) -> Mapping[str, str]:
    shutil.copytree(MADE["root"] / "run/checkpoints", folder / "checkpoints")
    return {"checkpoints/2/checksums.json": "sums"}


def _read_checkpoint(folder: Path, changed: Sequence[str]) -> None:
    for step in saved.entries(folder):
        text = saved.fault(folder, step)
        assert text.isprintable() and len(text) < LONGEST, text


def _seeds_trace(folder: Path) -> Mapping[str, str]:
    """The columns of a trace, by the same names and shapes as the product writes; of a probe they are real."""
    _copied("run", RUN)(folder)
    with np.load(folder / "probe.npz") as probe:
        columns = dict(probe)
    layers, tokens = len(columns["layers"]), len(columns["token_ids"])
    more = {"step": np.array(1), "domains": np.array(["text"]), "expert": np.zeros((layers, tokens, 2), np.uint16),
            "weight": np.ones((layers, tokens, 2), np.float32), "router/entropy": np.zeros(layers)}  # fmt: skip
    marks = {name: np.array(value) for name, value in fingerprints(folder).items()}
    (folder / "trace").mkdir()
    for step in (1, 2):
        np.savez(folder / f"trace/step_{step}.npz", **columns | more | marks | {"step": np.array(step)})
    return {"trace/step_1.npz": "columns", "trace/step_2.npz": "columns"}


def _read_trace(folder: Path, changed: Sequence[str]) -> None:
    load_trace(folder)


PARSERS = (
    #      what is read                          from what is good             by what                  it may raise
    Parser("overrides of a config", _seeds_overrides, _read_overrides, share=8),
    Parser("a config file", _seeds_config, lambda folder, changed: load(str(folder / "config.py")), share=2),
    Parser("a run, by report and listing", _copied("run", RUN), _read_report, share=2),
    Parser("a run, by a start that goes on", _copied("run", RUN), _read_resumed,
           writes=("metrics.jsonl", "expert_load.jsonl"), share=1),
    Parser("what befell a run: events, goodput, rollbacks, rounds", _seeds_logs, _read_logs,
           writes=tuple(_LOGS), share=2),
    Parser("a run's trace", _seeds_trace, _read_trace),
    Parser("sources: jsonl, gz, zst, parquet, txt, json, csv", _seeds_sources, _read_sources, share=9),
    Parser("sources of conversations", _seeds_chats, _read_chats),
    Parser("a chat template", _seeds_template, _read_template, share=4),
    Parser("tokenizer.json and what lies beside it", _seeds_tokenizer, _read_tokenizer, share=4),
    Parser("tokenizer.json of WordPiece", _seeds_wordpiece, _read_tokenizer, share=3),
    Parser("vocabularies: tekken, tiktoken, GPT-2, SentencePiece", _seeds_vocabularies, _read_vocabularies, share=2),
    Parser("prepared data", _seeds_prepared, _read_prepared, share=2),
    Parser("a study's tables", _seeds_study, _read_study),
    Parser("the runs of a study", _seeds_runs_of_study, _read_runs_of_study,
           writes=("results.parquet", "results.parquet.lock")),
    Parser("files of prompts", _seeds_prompts, _read_prompts, share=8),
    Parser("a published model", _copied("published", PUBLISHED), _read_published),
    Parser("a published model in parts", _seeds_sharded, _read_published),
    Parser("records and blobs of islands", _seeds_islands, _read_islands,
           (UserError, records.Damaged, blobs.BadBlob), share=4),
    Parser("checksums of a checkpoint", _seeds_checkpoint, _read_checkpoint),
)  # fmt: skip
