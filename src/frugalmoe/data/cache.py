"""Where built data lives, and its names."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from frugalmoe.errors import UserError
from frugalmoe.schema import Data


def cache_root(data: Data) -> Path:
    """Returns `data.cache_dir`, else $FRUGALMOE_CACHE, else ~/.cache/frugalmoe; creates it if absent."""
    root = Path(os.path.expanduser(data.cache_dir or os.environ.get("FRUGALMOE_CACHE") or "~/.cache/frugalmoe"))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir={str(root)!r}: cannot be created ({error.strerror})") from error
    if not os.access(root, os.W_OK):
        raise UserError(f"data.cache_dir={str(root)!r}: must be writable; name another or set FRUGALMOE_CACHE")
    return root


def digest(value: Any) -> str:
    """Returns a short name for a JSON-able value, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
