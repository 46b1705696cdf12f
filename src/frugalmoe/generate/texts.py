"""From prompts to texts: one as it comes, or many in batches.

Letters: B sequences, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from frugalmoe.config import Config
from frugalmoe.data.chat import Message
from frugalmoe.data.continuation import Continuation, Until
from frugalmoe.data.tokenizer import Tokenizer
from frugalmoe.errors import UserError
from frugalmoe.generate.decoding import Decoding, Drafting, Drafts, Ready, check, check_drafts, ready
from frugalmoe.generate.sampling import Chooser, Sampling
from frugalmoe.train.weights import Weights


class Prompt(NamedTuple):
    """What a text goes on from."""

    ids: np.ndarray  # int32, at least one
    text: str  # in which a stop text may begin


class Completion(NamedTuple):
    """What a prompt went on with."""

    text: str
    tokens: int  # that were sampled, with the one that ended it
    ended: str  # by: end (a token that ends texts), stop (a stop text) or length (the most tokens)


def text_prompt(config: Config, tokenizer: Tokenizer, text: str, where: str = "--prompt") -> Prompt:
    """What training put in front of a document, and the text.

    A run that put nothing there never learnt how documents begin: an empty prompt of it is their end, the token that
    it saw next to a beginning.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: must be UTF-8; character {e.start} is a byte that is none") from None
    ids = tokenizer.encode(text)
    if config.data.document_start == "end_of_text" or not len(ids):
        ids = np.append(tokenizer.eos, ids)
    return Prompt(ids.astype(np.int32), text)


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message], where: str = "--chat") -> Prompt:
    """A conversation up to where the next answer begins. No stop text begins in it."""
    if tokenizer.chat is None:
        rule = "a model without one knows no conversations; use plain prompts"
        raise UserError(f"{where}: the run's tokenizer has no chat template (chat_template.jinja): {rule}")
    return Prompt(tokenizer.encode_chat(tokenizer.chat.render(messages, answer=True)).tokens, "")


class Sampled:
    """Tokens of several texts, int32 [B], step by step, until the most tokens are sampled or no text is `live`.

    Whoever takes them says which texts are: of another one, what is sampled means nothing. A step is computed while the
    tokens of the one before are looked at.
    """

    def __init__(self, config: Config, weights: Weights, sampling: Sampling, allowed_V: np.ndarray, rows: int):
        """A mesh must be in context. `rows`: the most texts at one time."""
        self._config, self._weights, self._sampling, self._rows = config.model, weights, sampling, rows
        self._choose = Chooser(sampling, allowed_V)
        self.live = np.ones(0, bool)

    @functools.cached_property
    def _ready(self) -> Ready:
        """Made once for all batches."""
        return ready(self._config, self._weights)

    def of(self, prompts: Sequence[np.ndarray], first: int = 0) -> Iterator[np.ndarray]:
        """The tokens behind some prompts; `first` is the number of the first, on which its noise depends."""
        most = self._sampling.max_tokens
        decoding = Decoding(self._config, self._ready, max(map(len, prompts)) + most, self._rows)
        logits_BV = decoding.feed(prompts)
        rows = len(logits_BV)
        number_B = first + np.arange(rows)
        position_B = np.array([*map(len, prompts), *[0] * (rows - len(prompts))])
        self.live = np.ones(len(prompts), bool)
        token_B = self._choose(logits_BV, number_B, position_B)
        for n in range(1, most + 1):
            following_B = None
            if n < most:
                live_B = np.pad(self.live, (0, rows - len(prompts)))
                following_B = self._choose(decoding.advance(token_B, live_B), number_B, position_B + n)
            yield np.asarray(token_B)[: len(prompts)]
            if not self.live.any():
                return
            token_B = following_B


class Drafted(Sampled):
    """The same tokens in fewer steps: the first module of multi-token prediction proposes one for each text, and the
    network checks it with the one before, so that a step has one or two tokens of each text, none of one that ended.

    A position's noise is fixed by the seed, so that the network's token is the same whether a draft was there or not
    (Leviathan et al. 2023, arXiv 2211.17192, with equal noise for a draft and its check).
    """

    def __init__(
        self, config: Config, weights: Weights, sampling: Sampling, allowed_V: np.ndarray, rows: int, drafts: Drafts
    ):
        """`drafts` counts them. The rest is that of `Sampled`."""
        super().__init__(config, weights, sampling, allowed_V, rows)
        self._drafts = drafts

    def of(self, prompts: Sequence[np.ndarray], first: int = 0) -> Iterator[list[list[int]]]:
        """The tokens behind some prompts, step by step, those of each."""
        texts, most, choose = len(prompts), self._sampling.max_tokens, self._choose
        drafting = Drafting(self._config, self._ready, max(map(len, prompts)) + most, self._rows)
        logits_BV = drafting.prompt(prompts)
        number_B = first + np.arange(len(logits_BV))
        whole = lambda of_texts: np.pad(of_texts, (0, len(number_B) - texts))
        position_B = whole(np.array([*map(len, prompts)]))
        end_B, self.live = whole(position_B[:texts] + most), np.ones(texts, bool)
        token_B, stand_B = np.asarray(choose(logits_BV, number_B, position_B)), drafting.count_B
        yield [[int(token)] for token in token_B[:texts]]
        position_B = position_B + 1
        while np.any(going_B := whole(self.live) & (position_B < end_B)):
            proposed_BV = drafting.propose(np.where(going_B, stand_B, 0), token_B)
            draft_B = np.asarray(choose(proposed_BV, number_B, position_B))
            logits_2BV = drafting.check(np.stack([token_B, draft_B], axis=1), 2 * going_B)
            token_B, after_B = (np.asarray(choose(logits_2BV[n], number_B, position_B + n)) for n in (0, 1))
            right_B = going_B & (token_B == draft_B)
            two_B = right_B & (position_B + 1 < end_B)
            self._drafts.made += int(going_B.sum())
            self._drafts.accepted += int(right_B.sum())
            both = zip(token_B.tolist(), after_B.tolist(), (going_B * 1 + two_B).tolist())
            yield [[token, after][:count] for token, after, count in both][:texts]
            token_B, stand_B = np.where(two_B, after_B, token_B), 1 + two_B
            position_B = position_B + going_B + two_B


def _sampled(
    config: Config, weights: Weights, sampling: Sampling, allowed_V: np.ndarray, rows: int, drafts: Drafts | None
) -> Sampled:
    if drafts is None:
        return Sampled(config, weights, sampling, allowed_V, rows)
    return Drafted(config, weights, sampling, allowed_V, rows, drafts)


def generate(
    config: Config,
    weights: Weights,
    prompt_ids: np.ndarray,
    sampling: Sampling,
    allowed_V: np.ndarray | None = None,
    drafts: Drafts | None = None,
) -> Iterator[int]:
    """Token ids one by one; the caller decides when to stop. A mesh must be in context.

    prompt_ids: at least one. allowed_V: bool, the ids that may be sampled; all by default. drafts: counts them; with it
    the tokens come by `Drafted`, and are the same, but for rounding. Raises `UserError` for a model whose evaluation
    does something else, or which has no modules to draft with, and for more tokens than there is memory for.
    """
    sampling.check()
    if drafts is not None:
        check_drafts(config.model)
    check(config, 1, len(prompt_ids), sampling.max_tokens)
    if allowed_V is None:
        allowed_V = np.ones(config.model.vocab_size, bool)
    steps = _sampled(config, weights, sampling, allowed_V, 1, drafts).of([np.asarray(prompt_ids, np.int32)])
    return (int(token) for step in steps for token in np.atleast_1d(step[0]))


class _Writer:
    """A text that is being sampled."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, sampling: Sampling):
        self._ends, self._most = set(tokenizer.ends), sampling.max_tokens
        self._continuation, self._until = Continuation(tokenizer, prompt.ids), Until(sampling.stop, prompt.text)
        self.tokens, self.ended = 0, ""

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that stands now and did not before."""
        self.tokens += 1
        over = token in self._ends
        piece = self._until.add("" if over else self._continuation.add(token))
        if over or self.tokens == self._most:
            piece += self._until.add(self._continuation.rest())
            piece += self._until.rest()
            self.ended = "end" if over else "length"
        if self._until.ended:
            self.ended = "stop"
        return piece


def _shown(config: Config, tokenizer: Tokenizer) -> np.ndarray:
    """bool [V]: the ids that show text, or end it. Not what pads the vocabulary, nor other special tokens."""
    allowed_V = np.arange(config.model.vocab_size) < tokenizer.size
    allowed_V[list(tokenizer.silent)] = False
    allowed_V[list(tokenizer.ends)] = True
    return allowed_V


def stream(
    config: Config,
    weights: Weights,
    tokenizer: Tokenizer,
    prompt: str | Prompt,
    sampling: Sampling,
    drafts: Drafts | None = None,
) -> Iterator[str]:
    """Pieces of text as they come to stand; ends at a token that ends texts, a stop text or the limit.

    The text is that of a document which begins with the prompt. No id is sampled that shows nothing: what pads the
    vocabulary, and special tokens that end nothing. Raises `UserError` as `generate`, before the first piece.
    """
    if isinstance(prompt, str):
        prompt = text_prompt(config, tokenizer, prompt)
    tokens = generate(config, weights, prompt.ids, sampling, _shown(config, tokenizer), drafts)
    return _pieces(tokens, _Writer(tokenizer, prompt, sampling))


def _pieces(tokens: Iterator[int], writer: _Writer) -> Iterator[str]:
    for token in tokens:
        yield writer.add(token)
        if writer.ended:
            return


def completions(
    config: Config,
    weights: Weights,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    batch_size: int,
    ended: Callable[[], None] = lambda: None,
    drafts: Drafts | None = None,
) -> Iterator[Completion]:
    """What each prompt goes on with, in their order, so many at one time. `ended` is called as each comes to its end.
    drafts: as in `generate`.

    A text is what it is alone, whatever the batch, but for rounding: its noise depends on the seed and on its number.
    Raises `UserError` as `generate`, before the first one.
    """
    sampling.check()
    if batch_size < 1:
        raise UserError(f"--batch-size={batch_size}: must be positive")
    if drafts is not None:
        check_drafts(config.model)
    rows = min(batch_size, len(prompts))
    check(config, rows, max(len(prompt.ids) for prompt in prompts), sampling.max_tokens)
    sampled = _sampled(config, weights, sampling, _shown(config, tokenizer), rows, drafts)
    return _completions(sampled, prompts, [_Writer(tokenizer, prompt, sampling) for prompt in prompts], rows, ended)


def _completions(
    sampled: Sampled, prompts: Sequence[Prompt], writers: Sequence[_Writer], rows: int, ended: Callable[[], None]
) -> Iterator[Completion]:
    for first in range(0, len(prompts), rows):
        batch = writers[first : first + rows]
        found = [""] * len(batch)
        for step in sampled.of([prompt.ids for prompt in prompts[first : first + rows]], first):
            for row, writer in enumerate(batch):
                for token in np.atleast_1d(step[row]):
                    if not writer.ended:
                        found[row] += writer.add(int(token))
                        if writer.ended:
                            ended()
            sampled.live = np.array([not writer.ended for writer in batch])
        yield from (Completion(text, writer.tokens, writer.ended) for text, writer in zip(found, batch))


def sample_text(config: Config, weights: Weights, tokenizer: Tokenizer, prompt: str = "The ") -> dict[str, str]:
    """A passage for the summary; empty, with the reason, where the router does not allow sampling."""
    try:
        return {"prompt": prompt, "text": "".join(stream(config, weights, tokenizer, prompt, Sampling()))}
    except UserError as e:
        return {"prompt": prompt, "text": "", "why": str(e)}
