"""Prepares a JSON-lines file with frugalmoe: arguments TEXTS TOKENIZER WORKERS DIRECTORY; prints JSON."""

import dataclasses
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from serve import cpu_seconds

from frugalmoe.data.prepare import prepare
from frugalmoe.data.shards import read_manifest
from frugalmoe.schema import Data


def main() -> None:
    texts, tokenizer, workers, directory = sys.argv[1:]
    data = dataclasses.replace(Data(), path=texts, tokenizer=tokenizer)
    began, cpu = time.perf_counter(), cpu_seconds()
    found = prepare(data, Path(directory) / "prepared", int(workers), progress=False)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    sides = [side for domain in read_manifest(found)["counts"].values() for side in domain.values()]
    tokens = sum(side["tokens"] - side["documents"] for side in sides)  # without those that end documents
    about = {"tokens": tokens, "versions": {"tokenizers": version("tokenizers")}}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, **about}))


if __name__ == "__main__":
    main()
