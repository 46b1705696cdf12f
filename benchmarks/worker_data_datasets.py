"""Tokenises a JSON-lines file with `datasets.map`: arguments TEXTS TOKENIZER PROCESSES DIRECTORY; prints JSON.

What is timed is reading the file into the library's own format and the map, whose result lies on the disk.
"""

import json
import os
import sys
import time
from importlib.metadata import version

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism

import datasets
import tokenizers
from serve import cpu_seconds

BATCH = 1000  # the library's default


def main() -> None:
    texts, tokenizer, processes, directory = sys.argv[1:]
    datasets.disable_progress_bars()
    tokenizer = tokenizers.Tokenizer.from_file(tokenizer)
    tokenizer.encode_special_tokens = True
    eos = tokenizer.token_to_id("<|endoftext|>")

    def tokens(batch: dict) -> dict:
        encoded = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [[*each.ids, eos] for each in encoded]}

    began, cpu = time.perf_counter(), cpu_seconds()
    read = datasets.load_dataset("json", data_files=texts, split="train", cache_dir=directory)
    how = {"batched": True, "batch_size": BATCH, "remove_columns": read.column_names}
    done = read.map(tokens, num_proc=int(processes) if int(processes) > 1 else None, **how)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    counted = sum(len(row) - 1 for row in done["input_ids"])
    about = {"tokens": counted, "versions": {"datasets": version("datasets"), "tokenizers": version("tokenizers")}}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, **about}))


if __name__ == "__main__":
    main()
