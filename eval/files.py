"""Files of a run, each written all or nothing.

Rows are one JSON object a measurement, with everything needed to trust it; tables are made from rows alone.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from rope_scaling.notation import from_calls


Row = dict[str, Any]

SCHEMA = 1
"""Version of the fields of a row."""


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes JSON lines."""
    write_atomically(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[Row]:
    """Reads JSON lines; methods as earlier versions wrote them come in the notation of today."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row | ({"in_effect": from_calls(row["in_effect"])} if "in_effect" in row else {}) for row in rows]


def write_array(path: Path, values: np.ndarray) -> None:
    """Writes one array as `.npy`."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_atomically(path, buffer.getvalue())


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays as a compressed `.npz`, and makes the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that an interruption leaves the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
