"""Text to batches: `open_data` reads, tokenises and packs; a batch is a pure function of (config, seed, position)."""

from frugalmoe.data.batches import Batch, Dataset, open_data
from frugalmoe.data.prepare import prepare
from frugalmoe.data.tokenizer import Tokenizer, load_from

__all__ = ["Batch", "Dataset", "Tokenizer", "load_from", "open_data", "prepare"]
