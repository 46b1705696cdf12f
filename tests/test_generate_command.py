"""`frugalmoe generate` on a published model: prompts from files, conversations, what is written and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import test_chat
import torch
from published import randomized, save

from frugalmoe.cli import main
from frugalmoe.data import chat
from frugalmoe.generate import prompts

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
SHORT = ("--max-tokens=9", "--temperature=0")
TALK = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "?"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A published model of random weights, its context of 64 tokens, with a chat template."""
    place = tmp_path_factory.mktemp("published")
    test_chat.save(save(randomized("llama"), place / "model"), test_chat.CHATML)
    assert main(["convert", "from-hf", str(place / "model"), str(place / "run")]) == 0
    return place / "run"


def out(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: object) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert main(["generate", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    return said.err


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_prompts_of_a_file_go_on_as_each_does_alone(run, tmp_path, capsys):
    texts = ["ab", "the moon and the river", "日本 é"]
    (tmp_path / "p.txt").write_text("\ufeff" + "\r\n\n".join(texts), encoding="utf-8")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": text, "id": 3}) for text in texts))
    printed = out(capsys, run, f"--prompts={tmp_path / 'p.txt'}", "--batch-size=2", *SHORT)
    single = [out(capsys, run, f"--prompt={text}", *SHORT) for text in texts]
    assert printed == "\n".join(single)
    answer = tmp_path / "out.jsonl"
    arguments = (f"--prompts={tmp_path / 'p.jsonl'}", f"--output={answer}", "--step=0", *SHORT)
    assert "out.jsonl: 3 texts" in out(capsys, run, *arguments)
    found = records(answer)
    assert [record["prompt"] + record["text"] + "\n" for record in found] == single
    assert all(r.keys() == {"prompt", "text", "tokens", "ended"} and r["tokens"] <= 9 for r in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "p.jsonl", "p.txt"]


def test_a_conversation_goes_on_as_in_transformers(run, tmp_path, capsys):
    """Its template, its special tokens, and where its turn ends."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": TALK}) + '\n{"prompt": "ab"}\n')
    answer = tmp_path / "out.jsonl"
    out(capsys, run, f"--prompts={tmp_path / 'p.jsonl'}", f"--output={answer}", "--context=99", "--chat", *SHORT)
    one = out(capsys, run, "--chat", "--prompt=ab", "--context=99", *SHORT)
    model, tokenizer = randomized("llama"), test_chat.theirs(run.parent / "model")
    for talk, record in zip((TALK, [{"role": "user", "content": "ab"}]), records(answer), strict=True):
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        silent = [i for i in range(320) if i >= 259 or i in (256, 258)]  # which we never sample
        settings = {"do_sample": False, "max_new_tokens": 9, "suppress_tokens": silent, "eos_token_id": 257}
        with torch.no_grad():
            theirs = model.generate(ids, pad_token_id=0, attention_mask=torch.ones_like(ids), **settings)
        new = theirs[0, ids.shape[1] :]
        assert record["text"] == tokenizer.decode(new, skip_special_tokens=True) and record["tokens"] == len(new)
        assert record["messages"] == talk
    assert one == record["text"] + "\n", "what is printed is the answer alone"


def test_a_prompt_longer_than_the_context_is_one_line(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("ab\n" + "x" * 65)
    line = refused(capsys, run, f"--prompts={tmp_path / 'p.txt'}", *SHORT)
    assert f"{tmp_path / 'p.txt'}:2: the prompt has 66 tokens, and the context 64 (max_position_embeddings=64)" in line
    assert "--prompt: the prompt has 3 tokens, and the context 2 (--context)\n" in refused(
        capsys, run, "--prompt=ab", "--context=2"
    )
    out(capsys, run, f"--prompt={'x' * 65}", "--context=66", "--max-tokens=1")


def test_a_model_without_a_template_knows_no_conversations(run, tmp_path, capsys):
    plain = Path(shutil.copytree(run, tmp_path / "run"))
    (plain / "tokenizer" / chat.FILE).unlink()
    assert "--chat: the run's tokenizer has no chat template" in refused(capsys, plain, "--chat", "--prompt=ab")
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": TALK}))
    arguments = (f"--prompts={tmp_path / 'p.jsonl'}", f"--output={tmp_path / 'out.jsonl'}")
    assert "p.jsonl:1: messages: the run's tokenizer has no chat template" in refused(capsys, plain, *arguments)
    (plain / "tokenizer" / chat.FILE).write_text("{{ raise_exception('roles must alternate') }}")
    assert "TemplateError: roles must alternate" in refused(capsys, plain, *arguments)
    assert not (tmp_path / "out.jsonl").exists()


def test_checkpoints_that_are_not_there_are_one_line(run, capsys):
    assert "no checkpoint of step 3; valid: [0]" in refused(capsys, run, "--step=3")
    assert "no checkpoint of step 3; valid: [0]" in refused(capsys, f"{run}@3")
    assert "--step=0: RUN names step 0 already" in refused(capsys, f"{run}@0", "--step=0")


def test_flags_that_contradict_each_other_are_one_line(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("ab")
    given = f"--prompts={tmp_path / 'p.txt'}"
    assert "cannot be given with --prompt\n" in refused(capsys, run, given, "--prompt=ab")
    assert "--drafts: model.multi_token_prediction.depth=0: the" in refused(capsys, run, given, "--drafts")
    (tmp_path / "dir.jsonl").mkdir()
    assert "must be a file in a directory" in refused(capsys, run, given, f"--output={tmp_path / 'dir.jsonl'}")
    longest = f"--output={tmp_path / ('a' * 249)}.jsonl"  # itself a name, but no room for what a crash may leave
    assert "cannot be written there: File name too long" in refused(capsys, run, given, longest)


BAD_FILES = {
    "p.txt": [(b"\xff\n", "not UTF-8"), (b" \n\n", "holds no prompt"), (b"", "holds no prompt")],
    "p.jsonl": [
        (b'{"prompt": "a"}\n{"prompt": ', "p.jsonl:2: not valid JSON"),
        (b"[" * 10**5, "p.jsonl:1: not valid JSON"),
        (b'"a"', "p.jsonl:1: must be a record with prompt or messages, one of both"),
        (b'{"text": "a"}', "p.jsonl:1: must be a record with prompt or messages, one of both"),
        (b'{"prompt": "a", "messages": []}', "p.jsonl:1: must be a record with prompt or messages, one of both"),
        (b'{"prompt": 3}', "p.jsonl:1: prompt=3: must be text"),
        (b'{"messages": []}', "p.jsonl:1: messages: must be a list of one message or more"),
        (b'{"messages": [{"role": "user"}]}', "p.jsonl:1: messages[0].content: is missing"),
        (b'{"prompt": "a\\ud800"}', "p.jsonl:1: must be UTF-8; character 1 is"),
    ],
}


@pytest.mark.parametrize(("file", "content", "line"), [(f, *case) for f, cases in BAD_FILES.items() for case in cases])
def test_files_that_hold_no_prompts_are_one_line(run, tmp_path, capsys, file, content, line):
    (tmp_path / file).write_bytes(content)
    assert line in refused(capsys, run, f"--prompts={tmp_path / file}")


def test_each_line_of_a_file_is_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes("one\r\n\n two\u2028still\x0btwo \nthree".encode())
    assert [entry.text for entry in prompts.read(tmp_path / "p.txt")] == ["one", " two\u2028still\x0btwo ", "three"]
