"""Where text comes from: the standard library, files, folders, tables, datasets on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rope_scaling.demo.corpus import held_out_documents, python_reference, training_documents
from rope_scaling.errors import RopeScalingError, cause_of


_TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".tex"}


def read_texts(
    source: str, *, column: str = "text", split: str = "test", subset: str | None = None
) -> Iterator[tuple[str, str]]:
    """Names and texts of a source of documents.

    Args:
        source (`str`): `stdlib` (modules of the running Python's standard library: held-out ones for the split
            `test`, the others for `train`), `python-reference` (its
            manual, one long English text), a text file, a folder of text files, a JSON-lines, CSV or Parquet file, or
            the name of a dataset on the hub.
        column (`str`): Column that holds the text, in a table or dataset.
        split (`str`): Split of a hub dataset, or of `stdlib`.
        subset (`str`, *optional*): Configuration of a hub dataset.

    Raises:
        RopeScalingError: there is nothing there, or it cannot be read as text.
    """
    path = Path(source)
    if source == "stdlib":
        yield from (training_documents() if split == "train" else held_out_documents()).items()
    elif source == "python-reference":
        yield source, python_reference()
    elif path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in _TEXT_SUFFIXES and file.is_file()]
        if not files:
            raise RopeScalingError(f"The folder {source!r} holds no text files ({', '.join(sorted(_TEXT_SUFFIXES))}).")
        yield from ((file.relative_to(path).as_posix(), _read(file)) for file in files)
    elif path.suffix in _TABLES and path.exists():
        yield from _read_table(_TABLES[path.suffix], column, "train", data_files=str(path))
    elif path.exists():
        yield path.name, _read(path)
    elif path.is_absolute() or source.startswith((".", "~")) or path.suffix in _TABLES.keys() | _TEXT_SUFFIXES:
        raise RopeScalingError(f"There is no file or folder {source!r} to read documents from.")
    else:
        yield from _read_table(source, column, split, name=subset, streaming=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RopeScalingError(f"Cannot read {str(path)!r} as UTF-8 text: {error}") from error


def _read_table(path: str, column: str, split: str, **arguments: Any) -> Iterator[tuple[str, str]]:
    import datasets

    source = arguments.get("data_files", path)
    try:
        rows = datasets.load_dataset(path, split=split, **arguments)
    except Exception as error:
        raise RopeScalingError(
            f"Cannot load {source!r} as a dataset: {cause_of(error)} "
            "Give `stdlib`, a file, a folder, or a dataset's name on the hub."
        ) from error
    try:
        for index, row in enumerate(rows):
            if column not in row:
                raise RopeScalingError(
                    f"The dataset has no column {column!r}; it has {', '.join(row)}. Name one with `--column`."
                )
            yield f"{index:05d}", str(row[column])
    except RopeScalingError:
        raise
    except Exception as error:  # streams read as they go
        raise RopeScalingError(f"Reading the dataset {source!r} failed: {cause_of(error)}") from error
