"""Records that hold a conversation, as documents of which the answers alone are trained on.

A record has `messages`, a list of {role, content}, or a prompt and a response. The tokenizer's chat template writes it;
what of its text is an answer says the template by `{% generation %}`, as in `transformers`, or else its own growth: an
answer is what the text has with the message, beyond the text before it that asks for one.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from frugalmoe.data.chat import ChatTemplate, Message, Rendered, check_messages
from frugalmoe.errors import UserError

USER, ASSISTANT = "user", "assistant"
ROLES = ("system", USER, ASSISTANT, "tool")
FIELDS = 3  # of `Source.chat_fields`: messages, prompt, response


class Count:
    """What a user should know of the conversations of an input, counted while they are read."""

    def __init__(self) -> None:
        self.written = self.unanswered = self.unasked = 0
        self.unknown = collections.Counter()  # records, by the first role that no template of ours knows
        self.characters = self.of_answers = 0

    def lines(self) -> list[str]:
        told = []
        if self.unanswered:
            told.append(f"left out {self.unanswered:,} conversations without an answer")
        if self.unasked:
            told.append(f"left out {self.unasked:,} conversations that begin with an answer, which nothing asks for")
        if self.unknown:
            shown = ", ".join(f"{role!r}" for role, _ in self.unknown.most_common(5))
            rule = f"with unknown roles ({shown}); known are {', '.join(ROLES)}"
            told.append(f"left out {self.unknown.total():,} conversations {rule}")
        if self.written:
            share = f"{self.of_answers / max(self.characters, 1):.1%} of the characters"
            told.append(f"{self.written:,} conversations: loss and bits per byte are of their answers alone, {share}")
        return told


def messages_of(fields: Mapping[str, Any], names: Sequence[str], value: Callable[[Any, str], Any]) -> Any:
    """Returns the messages of a record, None for one without; `value` gives a field of it."""
    messages, prompt, response = (value(fields, name) for name in names)
    if messages is not None:
        return messages
    if isinstance(prompt, list) and isinstance(response, list):
        return [*prompt, *response]
    if isinstance(prompt, str) and (response is None or isinstance(response, str)):
        return [{"role": USER, "content": prompt}, {"role": ASSISTANT, "content": response or ""}]
    return None


def written(template: ChatTemplate, messages: Any, where: str, count: Count) -> Rendered | None:
    """Returns the text of a conversation and where its answers lie in it; None for one that is counted and left out.

    Raises `UserError` for messages that are none, and where the template cannot say which text is an answer.
    """
    check_messages(messages, f"{where}: messages")
    if unknown := [message["role"] for message in messages if message["role"] not in ROLES]:
        count.unknown[unknown[0]] += 1
        return None
    if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
        count.unanswered += 1
        return None
    if messages[0]["role"] == ASSISTANT and not template.marks_answers:
        count.unasked += 1
        return None
    try:
        rendered = template.render(messages)
        if not template.marks_answers:
            rendered = rendered._replace(answers=_grown(template, messages, rendered.text))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not any(end > begin for begin, end in rendered.answers):
        raise UserError(f"{where}: {template.where}: the chat template marks no text of this conversation as an answer")
    count.written += 1
    count.characters += len(rendered.text)
    count.of_answers += sum(end - begin for begin, end in rendered.answers)
    return rendered


def _grown(template: ChatTemplate, messages: Sequence[Message], text: str) -> tuple[tuple[int, int], ...]:
    """Where answers lie, from what the template writes of the first messages, each of which must begin the whole."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            asked = template.render(messages[:number], answer=True).text
            answered = template.render(messages[: number + 1]).text
            if not (answered.startswith(asked) and text.startswith(answered)):
                what = "the text of the first messages does not begin that of all of them"
                rule = "so which of it is an answer cannot be told; mark answers in the template by {% generation %}"
                raise UserError(f"{template.where}: the chat template: {what}, {rule}")
            spans.append((len(asked), len(answered)))
    return tuple(spans)
