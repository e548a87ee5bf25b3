"""Hashes by which items, scores and runs are known: of contents, never of names."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def hash_of(data: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def digest(*parts: Any) -> str:
    """Hash of plain data, whatever the order of its mappings, 16 hexadecimal digits."""
    return hash_of(json.dumps(parts, sort_keys=True, default=_text).encode())


def _text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
