"""Seeds of single samples."""

import hashlib
import json
from typing import Any


def derived_seed(seed: int, key: Any) -> int:
    """A seed of 63 bits for `key`, the same in every process."""
    digest = hashlib.sha256(json.dumps([seed, key]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
