"""Chat templates write what `transformers` writes with them, are confined, and what is wrong with them is one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from frugalmoe.data import chat, templates
from frugalmoe.data.chat import ChatTemplate
from frugalmoe.data.tokenizer import ByteTokenizer, load_from
from frugalmoe.errors import UserError

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
<|im_start|>system
You help.<|im_end|>
{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
TEMPLATES = {
    "chatml": CHATML,
    "tokens, namespace, loop controls, json": """
{{- bos_token }}{% set ns = namespace(found=false, n=0) %}
{% for m in messages %}
    {% if m['role'] == 'system' %}{% set ns.found = true %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}
    [{{ loop.index0 }}] {{ m.content | trim }} {{ m | tojson }}{{ eos_token if m.role == 'assistant' }}
    {% if ns.n > 3 %}{% break %}{% endif %}
{% endfor %}
{{ ns.found }} {{ dict(a=1) | tojson(indent=2) }} {{ dict.fromkeys(['x'], 0) }} {{ unk_token }}|{{ pad_token }}""",
    "what is not there": "{{ tools is none }}{{ nothing }}"
    "{% if messages[0].name is defined %}{{ messages[0].name }}{% endif %}",
}
TALKS = [
    [{"role": "user", "content": "Hello, wörld 😀"}],
    [
        {"role": "system", "content": '  Be <brief> & "exact".\n'},
        {"role": "user", "content": "1 + 1?", "name": "Ada"},
        {"role": "assistant", "content": "2 日本"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "é\n\nok"},
    ],
]


def save(directory: Path, template: object = None, **config: object) -> Path:
    """A byte-level tokenizer with three special tokens, as a published model has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {
        "eos_token": "<|im_end|>",
        "bos_token": {"__type": "AddedToken", "content": "<|endoftext|>"},
        "chat_template": template,
    } | config
    named = {name: value for name, value in named.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory


def theirs(directory: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_text_and_the_tokens_are_those_of_transformers(tmp_path, template, answer):
    save(tmp_path, template)
    ours, reference = load_from(tmp_path), theirs(tmp_path)
    for talk in TALKS:
        expected = reference.apply_chat_template(talk, tokenize=False, add_generation_prompt=answer)
        rendered = ours.chat.render(talk, answer=answer)
        assert rendered.text == expected
        ids = reference.apply_chat_template(talk, add_generation_prompt=answer)["input_ids"]
        assert ours.encode_chat(rendered).tokens.tolist() == list(ids)


def test_answers_are_what_transformers_masks(tmp_path):
    """In tokens of whole characters; of those that share a character, transformers finds the first alone."""
    ours, reference = load_from(save(tmp_path, CHATML)), theirs(tmp_path)
    assert ours.chat.marks_answers
    for talk in TALKS:
        rendered = ours.chat.render(talk)
        expected = reference.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)
        found = ours.encode_chat(rendered)
        np.testing.assert_array_equal(found.answers, expected["assistant_masks"])
        said = [m["content"] + "<|im_end|>" for m in talk if m["role"] == "assistant"]
        assert [rendered.text[begin:end] for begin, end in rendered.answers] == said
        assert found.answers.sum() == sum(len(text.encode()) - len("<|im_end|>") + 1 for text in said)
    assert not load_from(save(tmp_path, "{# {% generation %} #}{{ '{% generation %}' }}")).chat.marks_answers
    assert load_from(save(tmp_path, "{%+generation%}x{%-endgeneration-%}")).chat.marks_answers


def test_a_template_is_found_where_transformers_finds_it_and_goes_along(tmp_path):
    """A file of its own comes first; of several the one called default counts; a saved tokenizer keeps it."""
    one = save(tmp_path / "one", "config")
    (one / "generation_config.json").write_text('{"eos_token_id": [258, 257, 999]}')
    assert load_from(one).chat.render(TALKS[0]).text == "config"
    (one / chat.FILE).write_text(CHATML)
    found = load_from(one)
    assert found.chat.source == theirs(one).chat_template == CHATML and found.ends == (257, 258)
    (tmp_path / "two").mkdir()
    found.save_into(tmp_path / "two")
    again = load_from(tmp_path / "two")
    assert again.chat == ChatTemplate(CHATML, found.chat.tokens, str(tmp_path / "two" / chat.FILE))
    assert again.ends == found.ends and again.fingerprint == found.fingerprint
    assert again.chat.tokens == {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert load_from(save(tmp_path / "three", several)).chat.source == "plain"
    assert load_from(save(tmp_path / "four")).chat is None and ByteTokenizer().chat is None


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ dict.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set ns = namespace(__class__=1) %}",
    "{{ messages.append(1) }}",
    "{% for i in range(10000000) %}{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(template):
    try:
        text = ChatTemplate(template, {}, "here").render(TALKS[0]).text
    except UserError as error:
        assert str(error).startswith("here: the chat template: ")
    else:
        assert text == "", "what is not allowed is undefined, and undefined is nothing"


BAD_TEMPLATES = {
    "{% if %}": "here: the chat template: line 1: Expected an expression, got 'end of statement block'",
    "{{ messages | nothing }}": "here: the chat template: line 1: No filter named 'nothing'.",
    "{{ raise_exception('roles\nmust alternate') }}": "here: the chat template: TemplateError: roles must alternate",
    "{{ 1 // 0 }}": "here: the chat template: ZeroDivisionError: ",
    "{{ messages[0].nothing.more }}": "here: the chat template: UndefinedError: ",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "here: the chat template: RecursionError: ",
    "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}": "here: the chat template: RecursionError: ",
    "{{ '\\ud800' }}": "here: the chat template: character 0 of its text is half of a character",
}
# What would take hours, or more memory than there is.
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ ('a' * 40000000) + ('a' * 40000000) }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ 'a' | indent(10 ** 10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%9999999999d' | format(1) }}",
    "{% for i in range(90) %}{{ 'a' * 1000000 }}{% endfor %}",
    "{{ ('a' * 9000000) | replace('a', 'b' * 9000000) }}",
    "{{ ('a' * 9000000) | replace(new='b' * 9000000, old='') }}",
    "{{ ('a' * 9000000).replace('', 'b' * 9000000) }}",
    "{% set x = 'a' * 900000 %}{% for i in range(9000) %}{% set y = x | replace('a', 'b') %}{% endfor %}",
    "{% set x = 'a' * 900000 %}{% for i in range(9000) %}{% set y = x.replace('a', 'b') %}{% endfor %}",
    "{% set x = ['a' * 900000] * 99 %}{{ x | map('replace', 'a', 'b') | list | length }}",
    "{{ ([''] * 90000) | join('a' * 90000) }}",
    "{{ ('a' * 90000).join([''] * 90000) }}",
    "{{ ([[1] * 900] * 9000) | sum(start=[]) | length }}",
    "{{ ('<!---->' * 900000) | striptags }}",
    "{{ ('\\t' * 90000).expandtabs(90000) }}",
    "{{ '{:9999999999d}'.format(1) }}",
]


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_comes_to_an_end(template, monkeypatch):
    monkeypatch.setattr(templates, "STEPS", 10_000)
    with pytest.raises(UserError, match=r"^here: the chat template: OverflowError: makes "):
        ChatTemplate(template, {}, "here").render(TALKS[0])


def test_a_template_ends_where_steps_take_long(monkeypatch):
    """What a comparison takes is not counted: the clock ends it."""
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    template = "{% set x = 'a' * 9000000 %}{% for i in range(99999) %}{{ 'b' if 'ab' in x }}{% endfor %}"
    with pytest.raises(
        UserError, match=r"^here: the chat template: OverflowError: makes a text for more than 0\.5 sec"
    ):
        ChatTemplate(template, {}, "here").render(TALKS[0])


def test_bounded_operations_are_those_of_jinja():
    template = "{{ 3 * 'ab' ~ 2 ** -1 ~ 7 % 4 ~ '%d %s' % (1, 'x') ~ none ~ ([1] + [2]) ~ ('a' | center(3)) }}"
    template += (
        "{{ 'aba' | replace('a', 'cd') ~ 'aba'.replace('', '-', 2) ~ ['x', 'y'] | join(', ') ~ '-'.join('ab') }}"
    )
    template += "{{ [1, 2] | sum ~ [[1], [2]] | sum(start=[]) ~ '{:3d}'.format(7) ~ 'a\\nb' | indent(2) }}"
    assert (
        ChatTemplate(template, {}, "here").render(TALKS[0]).text
        == "ababab0.531 xNone[1, 2] a cdbcd-a-bax, ya-b3[1, 2]  7a\n  b"
    )


@pytest.mark.parametrize(("template", "line"), BAD_TEMPLATES.items())
def test_a_template_that_fails_is_one_line(template, line):
    with pytest.raises(UserError) as error:
        ChatTemplate(template, {}, "here").render(TALKS[0])
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


BAD_MESSAGES = [
    ([], "messages: must be a list of one message or more"),
    ("hello", "messages: must be a list of one message or more"),
    ({"role": "user"}, "messages: must be a list of one message or more"),
    (["hello"], "messages[0]: must be a record with role and content, not 'hello'"),
    ([*TALKS[0], {"content": "x"}], "messages[1].role: is missing"),
    ([{"role": "user", "content": None}], "messages[0].content: must be text, not None"),
    ([{"role": 1, "content": "x"}], "messages[0].role: must be text, not 1"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content: must be text, not ['x']"),
    ([{"role": "user", "content": "ab\ud83d"}], "messages[0].content: character 2 is half of a character"),
]


@pytest.mark.parametrize(("messages", "line"), BAD_MESSAGES)
def test_what_is_no_conversation_is_one_line(messages, line):
    with pytest.raises(UserError) as error:
        ChatTemplate(CHATML, {}, "here").render(messages)
    assert str(error.value).startswith(line)


def test_messages_that_are_nested_too_deep_are_one_line():
    deep = json.loads("[" * 900 + "]" * 900)
    with pytest.raises(UserError, match=r"^messages: hold lists and records in more levels"):
        ChatTemplate(CHATML, {}, "here").render([{"role": "user", "content": "x", "more": deep}])


BAD_FILES = {
    chat.CONFIG: [
        ({"chat_template": 3}, "chat_template: must be text, or a list"),
        ({"chat_template": [{"name": "tool_use", "template": "x"}]}, "none that is named default; it has 'tool_use'"),
        ({"chat_template": []}, "none that is named default; it has none"),
    ],
    chat.FILE: [(b"\xff", "cannot be read as text")],
    "generation_config.json": [({"eos_token_id": ["</s>"]}, "eos_token_id='</s>': must be an id, a list of ids")],
}


@pytest.mark.parametrize(("file", "content", "line"), [(f, *case) for f, cases in BAD_FILES.items() for case in cases])
def test_files_that_are_damaged_are_one_line(tmp_path, file, content, line):
    save(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        (tmp_path / file).write_text(json.dumps({"eos_token": "<|im_end|>"} | content))
    with pytest.raises(UserError) as error:
        load_from(tmp_path)
    assert line in str(error.value) and str(tmp_path / file) in str(error.value)


def test_without_jinja_the_package_is_named(monkeypatch):
    chat._compiled.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(UserError, match=r"^here: to read a chat template: needs a package .* 'jinja2>=3\.1\.6'$"):
        ChatTemplate("x", {}, "here").render(TALKS[0])


def test_bytes_have_no_template():
    with pytest.raises(UserError, match="has no chat template"):
        ByteTokenizer().encode_chat(chat.Rendered("x", ()))
