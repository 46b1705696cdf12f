"""Text from a trained run: which token comes next, for one prompt or for many at one time.

`sampling` chooses a token from logits, `decoding` computes the logits with caches, `texts` goes from prompts to texts,
`prompts` reads files of prompts.
"""

from frugalmoe.generate.decoding import Decoding, Drafts
from frugalmoe.generate.sampling import Sampling
from frugalmoe.generate.texts import (
    Completion,
    Prompt,
    Sampled,
    chat_prompt,
    completions,
    generate,
    sample_text,
    stream,
    text_prompt,
)

__all__ = [
    "Completion",
    "Decoding",
    "Drafts",
    "Prompt",
    "Sampled",
    "Sampling",
    "chat_prompt",
    "completions",
    "generate",
    "sample_text",
    "stream",
    "text_prompt",
]
