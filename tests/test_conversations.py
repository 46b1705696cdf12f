"""Training on conversations: the loss is of the answers alone, and those are what transformers takes them for."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from published import randomized
from published import save as save_model
from runs import config_file, rows
from test_chat import CHATML
from test_chat import save as save_tokenizer
from test_chat import theirs as reference

from frugalmoe.cli import main
from frugalmoe.config import override, resolve
from frugalmoe.convert.origin import config_of, open_published
from frugalmoe.data import open_data
from frugalmoe.data.tokenizer import load_from
from frugalmoe.errors import UserError
from frugalmoe.evaluate import evaluate
from frugalmoe.schema import Data, Source
from frugalmoe.train.loop import train
from frugalmoe.train.origin import Origin

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
UNMARKED = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PLAIN += "{% if add_generation_prompt %}assistant: {% endif %}"


def talk(*turns: str, system: str = "") -> list[dict]:
    """Messages of a user and an assistant in turn."""
    begin = [{"role": "system", "content": system}] if system else []
    return begin + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


TALKS = [
    talk("1+1?", "2", "2+2?", "4 of course"),
    talk("Hi", "Hello."),
    talk("Who is it?", "The queen.", system="Brief."),
    talk("And now?", "Go", "Where?"),
]


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`marked`, `unmarked` and `plain` tokenizers, the last without tokens around messages; `talks.jsonl`; `model`."""
    root = tmp_path_factory.mktemp("chat")
    for name, template in (("marked", CHATML), ("unmarked", UNMARKED), ("plain", PLAIN)):
        save_tokenizer(root / name, template, eos_token="<|endoftext|>")
    write(root / "talks.jsonl", [{"messages": messages} for messages in TALKS])
    save_model(randomized("mixtral"), root / "model")
    save_tokenizer(root / "model", CHATML, eos_token="<|endoftext|>")
    return root


def opened(place: Path, path: Path, tokenizer: str = "marked", length: int = 128, **fields):
    data = Data(path=str(path), kind="chat", tokenizer=str(place / tokenizer), cache_dir=str(place / "cache"))
    data = dataclasses.replace(data, sequence_length=length, **fields)
    return open_data(data, batch_size=2, seed=0, progress=False)


def documents(dataset, batches):
    """(tokens, targets that are predicted with 0 for others) of each segment of some batches."""
    found = []
    for batch in batches:
        for row in zip(*batch):
            tokens, targets, segments, _, mask, _ = row
            found += [(tokens[at], np.where(mask, targets, -1)[at]) for at in _segments(segments)]
    return found


def _segments(segments):
    return [segments == number for number in range(1, segments.max() + 1)]


def nats(model, tokens: np.ndarray, targets: np.ndarray) -> float:
    """What transformers' model pays for the targets that are not -1."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens[None].astype(np.int64))).logits[0].double()
    chosen = targets >= 0
    return float(-logits.log_softmax(-1)[np.flatnonzero(chosen), targets[chosen]].sum())


def test_the_loss_is_the_sum_over_answer_tokens_by_hand(place, tmp_path):
    """Of each conversation alone, in transformers' tokens, masks and logits, with end-of-text in front."""
    assert main(["convert", "from-hf", str(place / "model"), str(tmp_path / "run")]) == 0
    overrides = {"data.kind": "chat", "data.sequence_length": 128}
    found = evaluate(tmp_path / "run", data=str(place / "talks.jsonl"), overrides=overrides)
    model, tokenizer, total, count = randomized("mixtral"), reference(place / "model"), 0.0, 0
    for messages in TALKS:
        theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        ids, mask = np.array(theirs["input_ids"]), np.array(theirs["assistant_masks"], bool)
        total += nats(model, np.append(tokenizer.eos_token_id, ids[:-1]), np.where(mask, ids, -1))
        count += int(mask.sum())
    assert found.targets == {"talks": count}
    assert found.loss["talks"] * count == pytest.approx(total, rel=1e-5)
    said = sum(len(m["content"].encode()) for messages in TALKS for m in messages if m["role"] == "assistant")
    assert found.bytes == {"talks": said}, "bits per byte are of what is answered, without the tokens around it"
    assert found.bits_per_byte["talks"] == pytest.approx(total / np.log(2) / said, rel=1e-5)


@pytest.mark.slow
def test_a_step_of_training_has_the_same_loss(place, tmp_path):
    """The mean over answer tokens of the batch; padding and questions are in no part of it."""
    fields = {"path": str(place / "talks.jsonl"), "kind": "chat", "sequence_length": 64}
    fields = {f"data.{name}": value for name, value in (fields | {"cache_dir": str(place / "cache")}).items()}
    fields |= {"train.steps": 1, "train.batch_size": 2, "train.eval_rows": 4, "optim.warmup_steps": 0}
    config = resolve(override(config_of(place / "model"), fields))
    train(config, tmp_path / "run", origin=Origin(place / "model", published=open_published(place / "model")))
    data = opened(place, place / "talks.jsonl", "model", 64)
    segments = documents(data, [data.batch(0)])
    total = sum(nats(randomized("mixtral"), tokens, targets) for tokens, targets in segments)
    count = sum(int((targets >= 0).sum()) for _, targets in segments)
    logged = rows(tmp_path / "run")[0]
    assert logged["step"] == 1 and logged["loss/ce"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("tokenizer", ["marked", "unmarked", "plain"])
@pytest.mark.parametrize("start", ["end_of_text", "none"])
def test_every_answer_is_trained_on_and_no_conversation_in_two_rows(place, tokenizer, start, tmp_path):
    """Twenty conversations in rows that hold some: what is predicted is what the assistant says and how it ends."""
    talks = [talk(f"{n}?" * (1 + n % 3), f"answer {n}") for n in range(20)]
    path = write(tmp_path / "talks.jsonl", [{"messages": messages} for messages in talks])
    data = opened(place, path, tokenizer, 128, document_start=start)
    assert data.remainder == 0
    epoch = documents(data, [data.batch(n) for n in range(40)])
    held_out = documents(data, data.eval_batches("talks", 2))
    ends = {"marked": "<|im_end|>", "unmarked": "<|im_end|>\n", "plain": "\n<|endoftext|>"}
    ours = load_from(place / tokenizer)
    names = {i: token for token, i in reference(place / tokenizer).get_vocab().items() if token.startswith("<|")}
    text = lambda ids: "".join(names.get(int(i)) or ours.decode([int(i)]) for i in ids if i >= 0)
    said = [text(targets) for _, targets in [*epoch, *held_out]]
    assert set(said) == {f"answer {n}{ends[tokenizer]}" for n in range(20)}
    begins = {"marked": "<|im_start|>system", "unmarked": "<|im_start|>system", "plain": "user: "}[tokenizer]
    front = "<|endoftext|>" if start == "end_of_text" else ""
    assert all(text(tokens).startswith(front + begins) for tokens, _ in [*epoch, *held_out])


def test_of_one_that_is_longer_than_a_row_the_beginning_is_taken_and_it_is_told(place, tmp_path):
    long = talk("a", "b" * 200)
    path = write(tmp_path / "talks.jsonl", [{"messages": long}, *({"messages": m} for m in TALKS)])
    data = opened(place, path, length=128)
    (note,) = data.notes
    assert "data.sequence_length=128: 1 of 5 conversations are longer than a row; their first 128 tokens" in note
    found = documents(data, [*(data.batch(n) for n in range(8)), *data.eval_batches("talks", 1)])
    tokenizer = load_from(place / "marked")
    (letter,) = tokenizer.encode("b")
    asked = len(tokenizer.encode_chat(tokenizer.chat.render(long[:1], answer=True)).tokens)
    assert {int((targets == letter).sum()) for _, targets in found} == {0, 128 - asked}


def test_text_and_conversations_in_one_mixture(place, tmp_path):
    """Texts are cut where a row ends and all of them is predicted; conversations are whole."""
    (tmp_path / "text").mkdir()
    for n in range(9):
        (tmp_path / f"text/{n}.txt").write_text(f"The moon calls the river {n}. " * 9)
    chat = write(tmp_path / "talks.jsonl", [{"messages": talk(f"{n}?", f"answer {n}")} for n in range(9)])
    sources = {"talk": Source(path=str(chat), kind="chat"), "text": Source(path=str(tmp_path / "text"))}
    data = open_data(
        Data(sources=sources, tokenizer=str(place / "marked"), cache_dir=str(place / "cache"), sequence_length=64),
        batch_size=1, seed=0, progress=False,
    )  # fmt: skip
    for domain, all_predicted in (("talk", False), ("text", True)):
        (batch, *_) = data.eval_batches(domain, 1)
        valid = batch.segment_ids_BT > 0
        assert bool(batch.loss_mask_BT[valid].all()) == all_predicted and batch.loss_mask_BT.any()
    trained = {}
    for n in range(40):
        batch = data.batch(n)
        for domain in (0, 1):
            here = (batch.domain_ids_BT == domain) & (batch.segment_ids_BT > 0)
            trained.setdefault(domain, []).append(batch.loss_mask_BT[here].mean() if here.any() else None)
    assert {share for share in trained[1] if share is not None} == {1.0}
    assert all(share is None or 0 < share < 1 for share in trained[0])


def test_a_validation_set_may_hold_conversations(place, tmp_path):
    """Beside text, with the chat template of the tokenizer of both."""
    (tmp_path / "text").mkdir()
    for n in range(9):
        (tmp_path / f"text/{n}.txt").write_text(f"The moon calls the river {n}. " * 9)
    own = Source(path=str(place / "talks.jsonl"), kind="chat")
    data = opened(place, tmp_path / "text", kind="text", validation=own)
    assert all(batch.loss_mask_BT.all() for batch in map(data.batch, range(4)))
    found = documents(data.validation, data.validation.eval_batches("talks", 2))
    said = [m["content"] for messages in TALKS for m in messages if m["role"] == "assistant"]
    assert sum(int((targets >= 0).sum()) for _, targets in found) == sum(len(text) + 1 for text in said)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "pairs", "lists", "named", "folder"])
def test_records_of_every_form_give_the_same_rows(place, tmp_path, kind):
    talks = [talk(f"{n}?", f"answer {n}") for n in range(9)]
    pairs = [{"prompt": m[0]["content"], "response": m[1]["content"]} for m in talks]
    source = Source(kind="chat", domain="d")
    path = tmp_path / f"talks.{kind if kind in ('json', 'parquet') else 'jsonl'}"
    records = [{"messages": m} for m in talks]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "pairs":
        write(path, pairs)
    elif kind == "lists":
        write(path, [{"prompt": m[:1], "response": m[1:]} for m in talks])
    elif kind == "named":
        write(path, [{"about": {"turns": m}} for m in talks])
        source = dataclasses.replace(source, chat_fields="about.turns,prompt,response")
    elif kind == "folder":
        (tmp_path / "folder").mkdir()
        write(tmp_path / "folder/talks.jsonl", records)
        (tmp_path / "folder/README.md").write_text("About these.")
        (tmp_path / "folder/table.csv").write_text("a,b\n1,2\n")
        path = tmp_path / "folder"
    else:
        write(path, records)
    expected = write(tmp_path / "expected.jsonl", [{"messages": m} for m in talks])
    found = [
        open_data(
            Data(sources={"d": dataclasses.replace(source_of, path=str(p))}, tokenizer=str(place / "marked"),
                 cache_dir=str(place / "cache")), batch_size=1, seed=0, progress=False)
        for source_of, p in ((source, path), (Source(kind="chat", domain="d"), expected))
    ]  # fmt: skip
    a, b = (list(data.eval_batches("d", 1)) for data in found)
    assert len(a) == len(b) and all(np.array_equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


def test_what_is_left_out_is_counted_and_told(place, tmp_path):
    records = [{"messages": messages} for messages in TALKS]
    records += [{"messages": talk("only a question")}, {"messages": talk("no", " \n")}, {"prompt": "x"}]
    records += [{"messages": [{"role": "human", "content": "hi"}, *talk("a", "b")]}]
    records += [{"messages": talk("a", "b")[1:]}, {"text": "neither"}, {"messages": None}]
    source = Source(path=str(write(tmp_path / "talks.jsonl", records)), kind="chat", null_text="skip")
    fields = {"tokenizer": str(place / "unmarked"), "cache_dir": str(place / "cache"), "sequence_length": 64}
    data = open_data(Data(sources={"d": source}, **fields), batch_size=1, seed=0, progress=False)
    told = "\n".join(data.manifest["notes"])
    assert "left out 3 conversations without an answer" in told
    assert "left out 1 conversations with unknown roles ('human'); known are system, user, assistant, tool" in told
    assert "left out 1 conversations that begin with an answer" in told
    assert "skipped 2 records without 'messages' or 'prompt' or 'response'" in told
    assert "4 conversations: loss and bits per byte are of their answers alone" in told
    fields["tokenizer"] = str(place / "marked")
    marked = open_data(Data(sources={"d": source}, **fields), batch_size=1, seed=0, progress=False)
    assert not any("begin with an answer" in note for note in marked.manifest["notes"])


SHORTENED = "{% for m in messages %}{% if loop.last or m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "template, records, said",
    [
        (SHORTENED, [{"messages": TALKS[0]}], "the text of the first messages does not begin that of all of them"),
        ("{{ messages | length }}", [{"messages": TALKS[1]}], "does not begin that of all of them"),
        ("{{ raise_exception('alternate!') }}", [{"messages": TALKS[1]}], "alternate!"),
        ("{% if %}", [{"messages": TALKS[1]}], "the chat template: line 1"),
        ("{% generation %}{% endgeneration %}x", [{"messages": TALKS[1]}], "marks no text of this conversation"),
        (None, [{"messages": TALKS[1]}], "has no chat template"),
        (CHATML, [{"text": "no"}], "talks.jsonl:1: no 'messages', and no 'prompt' with 'response' (chat_fields)"),
        (CHATML, ["text"], "talks.jsonl:1: no 'messages'"),
        (CHATML, [{"messages": []}], "must be a list of one message or more"),
        (CHATML, [{"messages": "hi"}], "must be a list of one message or more"),
        (CHATML, [{"messages": [{"role": "user"}]}], "talks.jsonl:1: messages[0].content: is missing"),
        (CHATML, [{"messages": [{"role": "user", "content": "\ud800"}]}], "is half of a character"),
        (CHATML, [{"prompt": 3, "response": "x"}], "no 'messages'"),
        (
            CHATML,
            [{"messages": talk("a")}],
            "holds no text; no document in talks.jsonl; left out 1 conversations without an answer",
        ),
    ],
)
def test_what_is_no_conversation_is_one_line(place, tmp_path, template, records, said):
    save_tokenizer(tmp_path / "tokenizer", template, eos_token="<|endoftext|>")
    write(tmp_path / "talks.jsonl", records)
    with pytest.raises(UserError) as refused:
        opened(place, tmp_path / "talks.jsonl", tokenizer=str(tmp_path / "tokenizer"))
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["data.kind=talk"], "data.kind='talk': unknown"),
        (["data.tokenizer=bytes"], "kind='chat': data.tokenizer='bytes' has no chat template"),
        (["data.tokenizer=bpe:300"], "kind='chat': data.tokenizer='bpe:300' has no chat template"),
        (["data.validation.chat_fields=a,b"], "data.validation.chat_fields='a,b': must be three names"),
        (["data.validation.path=TALKS", "data.validation.kind=chat"], "is training data too"),
        (["data.sources.a.path=TALKS"], "data.kind='chat': belongs to data.path"),
        (
            ["data.path=TEXTS"],
            "conversations are records, with messages, prompt, response, and no file",
        ),
    ],
)
def test_a_config_that_cannot_be_is_one_line_before_anything_is_done(place, tmp_path, capsys, flags, said):
    fields = {"data.kind": "chat", "data.tokenizer": str(place / "marked")}
    file = config_file(tmp_path, place / "talks.jsonl", place / "cache", fields)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("no conversation")
    paths = {"TALKS": place / "talks.jsonl", "TEXTS": tmp_path / "texts"}
    told = lambda flag: functools.reduce(lambda text, name: text.replace(name, str(paths[name])), paths, flag)
    given = [f"--config.{told(flag)}" for flag in flags]
    assert main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}", "--dry-run", *given]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and said in shown and not (tmp_path / "run").exists()
