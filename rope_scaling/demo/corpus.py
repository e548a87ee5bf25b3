"""The embedded model's text: the sources of the running interpreter's standard library, split by a committed list.

The exact text follows the Python version, so every result that uses it records the version and a hash of the text.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path


HELD_OUT_LIST = Path(__file__).with_name("held_out.txt")

# Machine-written tables, and files that name the machine they were built on, teach a language model nothing.
_NOT_TEXT = re.compile(
    r"(^|/)(site-packages|__pycache__|encodings|idle_test|lib2to3/tests|test/(encoded_modules|cjkencodings))/"
    r"|(^|/)(_sysconfigdata.*|_sysconfig_vars.*|build-details.*|entities|badsyntax.*|bad_.*|.*_data|.*_template)\.py$"
)


def held_out_names() -> list[str]:
    """Names, relative to the standard library's folder, of the modules kept for evaluation."""
    lines = HELD_OUT_LIST.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def held_out_documents() -> dict[str, str]:
    """The evaluation documents, name to text; a module that this Python lacks or moved is left out."""
    root = standard_library()
    texts = {name: _read(root / name) for name in held_out_names()}
    return {name: text for name, text in texts.items() if text}


def python_reference() -> str:
    """Python's own reference as `pydoc` shows it: about half a megabyte of English, the same text for any model."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def training_documents() -> dict[str, str]:
    """Every other module, with those tests that do not exercise a held-out module, name to text."""
    held_out = set(held_out_names())
    tested = {re.sub(r"(/__init__)?\.py$", "", name).replace("/", "_") for name in held_out}
    tested |= {name.rsplit("_", 1)[-1] for name in tested}
    documents = {}
    for name, path in _modules():
        stem = path.stem.removeprefix("test_")
        is_test = "/test" in f"/{name}"
        if name in held_out or (is_test and (stem in tested or path.parent.name.removeprefix("test_") in tested)):
            continue
        if text := _read(path):
            documents[name] = text
    return documents


def _modules() -> Iterator[tuple[str, Path]]:
    root = standard_library()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not _NOT_TEXT.search(name):
            yield name, path


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
