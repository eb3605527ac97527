"""Seeds: which there are, and those of single samples."""

import hashlib
import json
from typing import Any


GREATEST_SEED = 2**32 - 1  # of NumPy


def check_seed(seed: int) -> None:
    """Raises ValueError for what is no --seed."""
    if not 0 <= seed <= GREATEST_SEED:
        raise ValueError(f"--seed {seed} must be from 0 to {GREATEST_SEED}, as NumPy's generators take it.")


def derived_seed(seed: int, key: Any) -> int:
    """A seed of 63 bits for `key`, the same in every process."""
    digest = hashlib.sha256(json.dumps([seed, key]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
