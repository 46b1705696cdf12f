"""lm-eval on a run: its numbers are those of its own `hf` model on the published checkpoint that the run is made of."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import transformers as hf
from runs import run as command_line
from tokenizers import Tokenizer, processors

from frugalmoe.cli import main
from frugalmoe.config import Config
from frugalmoe.data.tokenizer import ByteTokenizer, load_from, train_bpe
from frugalmoe.evaluate import tasks
from frugalmoe.train.weights import load_checkpoint

tasks.prepare()  # before lm-eval is imported

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from frugalmoe.evaluate.harness import Harnessed  # noqa: E402

pytestmark = pytest.mark.whole

END = "<|endoftext|>"
LENGTH = 48  # the most tokens of a text
TEXT = "The moon calls the river, and x0 = f(7, y=12) holds the crown. Ein Schloß? "
NONE_IN_FRONT = "data.document_start=none"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A published checkpoint with a tokenizer, the run that is made of it, and tasks with their data."""
    root = tmp_path_factory.mktemp("lm_eval")
    published.save(published.randomized("qwen3_moe"), root / "hf")
    tokenizer = train_bpe([f"{TEXT}{i} {i * i} {chr(97 + i % 26) * 3}" for i in range(200)], published.V)
    assert tokenizer.size == published.V, "so that both models choose among the same tokens"
    tokenizer.save_into(root / "hf")
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (root / "hf/tokenizer_config.json").write_text(json.dumps(described))
    length = f"--config.data.sequence_length={LENGTH}"
    assert main(["convert", "from-hf", str(root / "hf"), str(root / "run"), length]) == 0
    write_tasks(root / "tasks")
    return root


YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: {kind}
{rest}
"""
CHOICE = """doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]"""
WRITING = """doc_to_text: "{{q}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]"""


def write_tasks(directory, **others: tuple[str, str]) -> None:
    """Tasks of the three kinds on twelve documents: name -> (kind, the rest of its YAML)."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    words = TEXT.split()
    lines = []
    for i in range(12):
        q = " ".join(rng.choice(words, 3 + 4 * (i % 5)))
        choices = [f" {' '.join(rng.choice(words, 1 + j))}" for j in range(3)]
        lines.append({"q": q, "choices": choices, "label": i % 3, "answer": "moon"})
    (directory / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kinds = {"own_choice": ("multiple_choice", CHOICE), "own_rolling": ("loglikelihood_rolling", ROLLING)}
    for name, (kind, rest) in (kinds | {"own_writing": ("generate_until", WRITING)} | others).items():
        text = YAML.format(name=name, data=directory / "d.jsonl", kind=kind, rest=rest)
        (directory / f"{name}.yaml").write_text(text)


def theirs(place, **settings) -> HFLM:
    """lm-eval's own model; the tokenizer from the files, as `transformers` reads it.

    Without its cache of logits, which in 0.4.13 mixes up equal texts whose contexts end at different places.
    """
    settings = {"tokenizer": hf.AutoTokenizer.from_pretrained(place / "hf")} | settings
    settings |= {"batch_size": 4, "device": "cpu", "logits_cache": False, "max_length": LENGTH}
    return HFLM(pretrained=published.randomized("qwen3_moe"), **settings)


@pytest.fixture(scope="module")
def ours(place):
    """The same as a model of ours, in front of which nothing stands or the end of text; with its mesh in context."""
    config, weights, tokenizer, mesh, _ = load_checkpoint(place / "run")
    with jax.set_mesh(mesh):
        yield {s: Harnessed(beginning(config, s), weights, tokenizer, mesh) for s in ("none", "end_of_text")}


def beginning(config: Config, start: str) -> Config:
    """The config whose documents begin with this."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, document_start=start))


def asked(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


PAIRS = [
    ("The moon", " calls the river"),
    ("The moon calls ", "the river"),  # a space behind a context belongs to what follows
    ("", "The moon calls the river"),
    (TEXT * 4, " and so on"),  # longer than the model takes
    ("x0 = f(", "7"),
    ("Ein Schlo", "ß? 寿司 and \U0001f600"),
    ("a", "\n\n"),
    *((TEXT[:i], TEXT[i : i + 9]) for i in range(3, 40, 4)),
]


@pytest.mark.slow
def test_likelihoods_are_those_of_lm_eval_s_own_model(place, ours):
    found = ours["none"].loglikelihood(asked("loglikelihood", PAIRS))
    expected = theirs(place).loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5, abs=1e-5)
    assert [same for _, same in found] == [same for _, same in expected]
    alone = [ours["none"].loglikelihood([one])[0] for one in asked("loglikelihood", PAIRS[:3])]
    assert [nats for nats, _ in alone] == pytest.approx([nats for nats, _ in found[:3]], rel=1e-6)


def test_what_stands_in_front_of_a_document_is_what_their_tokenizer_adds(place, ours):
    """The end of text as the token that begins texts: their tokenizer puts it in front of every context."""
    tokenizer = Tokenizer.from_file(str(place / "hf/tokenizer.json"))
    end = (END, tokenizer.token_to_id(END))
    tokenizer.post_processor = processors.Sequence(
        [processors.TemplateProcessing(single=f"{end[0]} $A", special_tokens=[end])]
    )
    adding = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end[0], eos_token=end[0], pad_token=end[0], add_bos_token=True
    )
    assert adding.encode("The moon")[0] == end[1]
    model = theirs(place, tokenizer=adding, add_bos_token=True)
    expected = model.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    found = ours["end_of_text"].loglikelihood(asked("loglikelihood", PAIRS))
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5, abs=1e-5)
    without = ours["none"].loglikelihood(asked("loglikelihood", PAIRS[:1]))
    assert without[0][0] != pytest.approx(found[0][0], rel=1e-3)


def test_rolling_likelihoods_are_theirs(place, ours):
    """Texts of one token, of one window, and of several."""
    texts = [("a",), (TEXT,), (TEXT * 7,), ("寿司" * 30,)]
    expected = theirs(place).loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)
    for start in ("none", "end_of_text"):
        found = ours[start].loglikelihood_rolling(asked("loglikelihood_rolling", texts))
        assert found == pytest.approx(expected, rel=1e-5), "each begins behind the end of text in both"
    assert ours["none"].loglikelihood_rolling(asked("loglikelihood_rolling", [("",)])) == [0.0]


def test_what_is_generated_is_theirs(place, ours):
    """Greedy, to a stop text or to the most tokens, also behind a context that is cut."""
    options = {"until": ["q", "\n"], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", [(context, dict(options)) for context in ("The moon", "x0 = f(", TEXT * 4)])
    assert ours["none"].generate_until(requests) == theirs(place).generate_until(requests, disable_tqdm=True)


def lm_evaluate(model, place, names: list[str]) -> dict[str, dict[str, float]]:
    """What lm-eval itself makes of tasks."""
    loaded = TaskManager(include_path=str(place / "tasks"), include_defaults=False).load(names)
    return evaluate(lm=model, task_dict=loaded, bootstrap_iters=0)["results"]


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and 'never' in m.content %}{{ raise_exception('no system') }}"
    "{% endif %}{{ eos_token + m.role }}: {{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token }}assistant: {% endif %}"
)
STRIPS = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}"
SAID = [{"role": "user", "content": "The moon"}, {"role": "assistant", "content": "calls the river "}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *SAID, {"role": "user", "content": " x0? "}]
REFUSED = [{"role": "system", "content": "never"}, *SAID, {"role": "user", "content": END}]


@pytest.fixture(scope="module")
def talking(place, ours):
    """Both models with a tokenizer that has a chat template, by the template."""
    config, weights, _, mesh, _ = load_checkpoint(place / "run")

    def both(template: str) -> tuple[HFLM, Harnessed]:
        with_template = shutil.copytree(place / "run/tokenizer", place / "talking", dirs_exist_ok=True)
        (with_template / "chat_template.jinja").write_text(template)
        own = hf.AutoTokenizer.from_pretrained(place / "hf")
        own.chat_template = template
        return theirs(place, tokenizer=own), Harnessed(config, weights, load_from(with_template), mesh, chat=True)

    return both


@pytest.mark.parametrize("template", [TEMPLATE, STRIPS], ids=["as it is", "strips"])
def test_conversations_are_written_as_their_model_writes_them(talking, template):
    """With the beginning of an answer, or with an answer that goes on; without a system that the template refuses."""
    own, model = talking(template)
    for said in (SAID, SYSTEM, REFUSED):
        for answer in (True, False):
            text = model.apply_chat_template(said, answer)
            assert text == own.apply_chat_template(said, answer) and "The moon" in text
            assert model.tok_encode(text) == own.tok_encode(text, add_special_tokens=False)


@pytest.mark.slow
def test_tasks_in_conversations_give_their_results(place, talking):
    """Likelihoods and generated texts behind two examples, which are turns."""
    own, model = talking(TEMPLATE)
    names = ["own_choice", "own_writing"]
    how = {"bootstrap_iters": 0, "limit": 4, "apply_chat_template": True}

    def found(model) -> dict[str, dict]:
        loaded = TaskManager(include_path=str(place / "tasks"), include_defaults=False).load(names)
        loaded["tasks"]["own_choice"].set_config(key="num_fewshot", value=2)
        loaded["tasks"]["own_choice"].set_fewshot_seed(seed=1)
        return evaluate(lm=model, task_dict=loaded, **how)

    expected, ours = found(own), found(model)
    for name in names:
        asked = [[sample["resps"] for sample in side["samples"][name]] for side in (expected, ours)]
        flat = [np.ravel([x for one in of_side for x in np.ravel(np.array(one, object))]) for of_side in asked]
        assert len(flat[0]) == len(flat[1]) > 3
        for theirs_, ours_ in zip(*flat):
            assert ours_ == (pytest.approx(theirs_, rel=1e-5) if isinstance(theirs_, float) else theirs_)


def test_a_run_without_a_template_holds_no_conversations(place, capsys):
    flags = ["--tasks=own_choice", f"--task-path={place / 'tasks'}", "--apply-chat-template"]
    assert main(["evaluate", str(place / "run"), *flags]) == 2
    assert "--apply-chat-template: the run's tokenizer has no chat template" in capsys.readouterr().err
    assert main(["evaluate", str(place / "run"), "--apply-chat-template"]) == 2
    assert "--apply-chat-template: is of an evaluation on --tasks" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_gives_their_results(place, ours, capsys):
    """Three tasks of one's own on a local file, scored by lm-eval for both models."""
    names = ["own_choice", "own_rolling", "own_writing"]
    expected = lm_evaluate(theirs(place), place, names)
    flags = [f"--tasks={','.join(names)}", f"--task-path={place / 'tasks'}", f"--config.{NONE_IN_FRONT}"]
    capsys.readouterr()
    assert main(["evaluate", str(place / "run"), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    values = {(row["task"], row["metric"]): row["value"] for row in found}
    assert len(values) == 6 and {row["items"] for row in found} == {12}
    for (task, metric), value in values.items():
        assert value == pytest.approx(expected[task][f"{metric},none"], rel=1e-5), (task, metric)
    errors = {row["metric"]: row["error"] for row in found}
    share = values["own_choice", "acc"]
    assert errors["acc"] == pytest.approx((share * (1 - share) / 11) ** 0.5) and errors["bits_per_byte"] is None
    assert main(["evaluate", str(place / "run"), *flags, "--items=2", "--shots=1"]) == 0
    shown = capsys.readouterr().out
    assert "step 0, lm-eval" in shown and "bits_per_byte" in shown and "own_writing" in shown


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(place, capsys):
    arguments = [
        "evaluate",
        place / "run",
        "--tasks=own_choice,own_writing",
        f"--task-path={place / 'tasks'}",
        "--json",
    ]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = command_line(*arguments, XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 0
    one, eight = (json.loads(text)["results"] for text in (capsys.readouterr().out, done.stdout))
    assert len(one) == 3 and [row["value"] for row in eight] == pytest.approx([row["value"] for row in one], rel=1e-5)


def test_a_uniform_model_needs_the_bits_of_its_vocabulary(place, ours, tmp_path):
    """Of V equally likely tokens, one per byte, each costs log2 V bits: 8 exactly where V is 256."""
    model = ours["none"]
    silent = model._weights._replace(params=jax.tree.map(jnp.zeros_like, model._weights.params))
    uniform = Harnessed(model._config, silent, ByteTokenizer(), model._mesh)
    results = lm_evaluate(uniform, place, ["own_rolling"])["own_rolling"]
    assert results["bits_per_byte,none"] == pytest.approx(np.log2(published.V), rel=1e-6)
    assert results["byte_perplexity,none"] == pytest.approx(published.V, rel=1e-5)


BROKEN = {
    "no_data": ("multiple_choice", CHOICE),
    "no_field": ("multiple_choice", CHOICE.replace("{{q}}", "{{nothing.at.all}}")),
    "no_kind": ("multiple_guess", CHOICE),
    "beams": ("generate_until", WRITING.replace("max_gen_toks: 8", "num_beams: 4")),
    "longest": ("generate_until", WRITING.replace("max_gen_toks: 8", f"max_gen_toks: {LENGTH}")),
    "endless": ("multiple_choice", CHOICE.replace("{{choices}}", "{{[q * 99, q]}}")),
}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--tasks=own_choise"], "--tasks=own_choise: no such task; did you mean 'own_choice'"),
        (["--tasks="], "--tasks: must name a task"),
        (["--tasks=own_choice", "--task-path=nowhere"], "--task-path=nowhere: no such directory"),
        (["--tasks=no_data"], "--tasks=no_data"),
        (["--tasks=no_field"], "--tasks=no_field"),
        (["--tasks=no_kind"], "multiple_guess"),
        (["--tasks=beams"], "generation_kwargs.num_beams: not known here; valid: until, max_gen_toks"),
        (["--tasks=longest"], "generation_kwargs.max_gen_toks=48: must leave room for a context"),
        (["--tasks=endless"], "it must be 1 to data.sequence_length=48 tokens"),
        (["--tasks=own_choice", "--shots=-1"], "--shots=-1"),
        (["--tasks=own_choice", "--items=0"], "--items=0"),
        (["--tasks=own_choice", "--tokens=9"], "--tokens: is of an evaluation on text; this one is on --tasks"),
        (["--tasks=own_choice", "--suite"], "--suite: cannot be given with --tasks"),
        (["--tasks=own_choice", "--config.data.path=x"], "--config.data.path: cannot be given with --tasks"),
        (["--tasks=own_choice", "--config.model.dim=8"], "--config.model.dim: cannot be given with --tasks"),
        (["--tasks=own_choice", "--config.data.sequence_length=1"], "data.sequence_length=1"),
    ],
)
def test_what_cannot_be_asked_is_one_line(place, tmp_path, capsys, flags, said):
    write_tasks(tmp_path / "tasks", **BROKEN)
    path = tmp_path / "tasks/no_data.yaml"
    path.write_text(path.read_text().replace("d.jsonl", "none.jsonl"))
    flags = [f"--task-path={tmp_path / 'tasks'}", *flags]
    capsys.readouterr()
    assert main(["evaluate", str(place / "run"), *flags]) == 2
    shown = capsys.readouterr()
    last = shown.err.splitlines()[-1]
    assert last.startswith("frugalmoe: ") and said in last and not shown.out
