"""A run as a model of lm-eval, the evaluation harness of EleutherAI: it has the tasks and their metrics, and what it
asks of a model is answered here. To be imported behind `tasks.prepare`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from frugalmoe.config import Config
from frugalmoe.data.chat import Rendered
from frugalmoe.data.tokenizer import Tokenizer
from frugalmoe.errors import UserError
from frugalmoe.evaluate.scoring import Asked, score
from frugalmoe.generate import Prompt, Sampling, completions
from frugalmoe.train.placing import micro_batch
from frugalmoe.train.weights import Weights

_HERE = "THE LAST MESSAGE ENDS HERE "  # written behind it, and looked for in what the template makes
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


class Harnessed(TemplateLM):
    """What lm-eval's `TemplateLM` asks for. The mesh must be in context.

    A text begins as the run's documents do: behind the end of text where `data.document_start` says so. Contexts lose
    their beginning where a text is longer than `data.sequence_length`, as in lm-eval's own models.
    """

    def __init__(
        self,
        config: Config,
        weights: Weights,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        begin: Callable[[str, int], Callable[[int], None]] = lambda what, total: lambda done: None,
        *,
        chat: bool = False,
    ):
        """`begin(what, total)` is called before work of so many parts, and what it returns with each part done.

        chat: texts are what `apply_chat_template` wrote: special tokens stand for themselves, and nothing in front.
        Raises `UserError` where the tokenizer has no chat template.
        """
        super().__init__()
        if chat and tokenizer.chat is None:
            rule = "a model without one knows no conversations"
            raise UserError(f"--apply-chat-template: the run's tokenizer has no chat template: {rule}")
        self._chat = chat
        self._config, self._weights, self._tokenizer, self._mesh, self._begin = config, weights, tokenizer, mesh, begin
        self._front = [tokenizer.eos] * (config.data.document_start == "end_of_text" and not chat)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos

    @property
    def max_length(self) -> int:
        return self._config.data.sequence_length

    @property
    def max_gen_toks(self) -> int:
        return min(256, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if self._chat:
            return self._tokenizer.encode_chat(Rendered(string, ())).tokens.tolist()
        return self._tokenizer.encode(string).tolist()

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's template writes it, up to where the next message begins, or up to the end
        of what the last message says. Without what the system says where the template knows no such role.
        """
        users = [message for message in chat_history if message["role"] != "system"]
        try:
            return self._written(chat_history, add_generation_prompt)
        except UserError:
            if len(users) in (0, len(chat_history)):
                raise
        return self._written(users, add_generation_prompt)

    def _written(self, messages: Sequence[Mapping[str, str]], answer: bool) -> str:
        if answer:
            return self._tokenizer.chat.render(messages, answer=True).text
        *before, last = messages
        text = self._tokenizer.chat.render([*before, {**last, "content": last["content"] + _HERE}]).text
        if _HERE.strip() not in text:
            raise UserError("--apply-chat-template: the chat template leaves out what the last message says")
        end = text.rindex(_HERE.strip())
        whole = text[end : end + len(_HERE)] == _HERE  # else the template strips what a message says
        return text[:end] if whole else text[:end].rstrip()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        alone = [self._tokenizer.eos]  # what `TemplateLM` puts in place of an empty context
        return self._scored(
            [(context if context == alone else self._front + context, new) for _, context, new in requests]
        )

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        most = self.max_length + 1
        for _, new in pairs:
            if not 0 < len(new) < most:
                rule = f"must be 1 to data.sequence_length={self.max_length} tokens behind its context"
                raise UserError(f"--tasks: a text to score has {len(new)} tokens; it {rule}")
        cut = [np.array((context + new)[-most:], np.int32) for context, new in pairs]
        asked = [Asked(ids, len(ids) - len(new)) for ids, (_, new) in zip(cut, pairs)]
        return score(self._config, self._weights, self._mesh, asked, self._begin("scoring", len(asked)))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of which no token is predicted twice."""
        windows = functools.partial(
            get_rolling_token_windows, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        of_texts = [list(map(make_disjoint_window, windows(self.tok_encode(r.args[0])))) for r in requests]
        scores = iter(self._scored([pair for pairs in of_texts for pair in pairs]))
        return [sum(next(scores)[0] for _ in pairs) for pairs in of_texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model goes on with, up to a stop text, the end of the document or the most tokens.

        Requests of equal settings are decoded together, their rows on all devices of the mesh.
        """
        done, found = self._begin("generating", len(requests)), [""] * len(requests)
        groups: dict[Sampling, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(i)
        for sampling, members in groups.items():
            prompts = [self._prompt(requests[i].args[0], sampling) for i in members]
            of_run = (self._config, self._weights, self._tokenizer, prompts, sampling)
            texts = completions(*of_run, batch_size=micro_batch(self._config), ended=lambda: done(1))
            for i, completion in zip(members, texts):
                found[i] = completion.text
        return found

    def _sampling(self, options: Mapping[str, Any]) -> Sampling:
        settings = normalize_gen_kwargs(dict(options), self.max_gen_toks)
        if unknown := sorted(settings.keys() - set(_GENERATION)):
            raise UserError(f"--tasks: generation_kwargs.{unknown[0]}: not known here; valid: {', '.join(_GENERATION)}")
        return Sampling(
            temperature=settings["temperature"] if settings["do_sample"] else 0.0,
            top_p=settings.get("top_p", 1.0),
            max_tokens=settings["max_gen_toks"],
            stop=tuple(filter(None, handle_stop_sequences(settings["until"], None))),
        )

    def _prompt(self, context: str, sampling: Sampling) -> Prompt:
        """The end of a context that leaves room for what is generated. No stop text begins in it."""
        room = self.max_length - sampling.max_tokens
        if room < 1:
            rule = f"must leave room for a context in data.sequence_length={self.max_length}"
            raise UserError(f"--tasks: generation_kwargs.max_gen_toks={sampling.max_tokens}: {rule}")
        ids = (self._front + self.tok_encode(context)) or [self.prefix_token_id]
        return Prompt(np.array(ids[-room:], np.int32), "")
