"""The one exception that users meet, and the helpers that word it: what was given, what is allowed, what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeGuard


class RopeScalingError(ValueError):
    """Something the user gave, or the model at hand, does not allow what was asked; the message says what would."""

    def __init__(self, message: str = ""):
        # Messages quote what was given, which may be a list of a million numbers.
        half = _LONGEST // 2
        super().__init__(message if len(message) <= _LONGEST else f"{message[:half]} ... {message[-half:]}")


_LONGEST = 1500
"""Characters of a message."""


def unknown_name(kind: str, given: str, available: Iterable[str]) -> RopeScalingError:
    """The error for a name that is not in a list, with the nearest that is."""
    names = sorted(available)
    near = get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if len(names) > _MOST_NAMES:
        listed = f"Nearest of {len(names)}: {', '.join(get_close_matches(given, names, n=10, cutoff=0.4))}"
    else:
        listed = f"Available: {', '.join(names)}"
    return RopeScalingError(f"Unknown {kind} {given!r}.{hint} {listed}.")


_MOST_NAMES = 100
"""A longer list would hide the message."""


def check_number(
    name: str, value: Any, *, at_least: float | None = None, above: float | None = None, at_most: float = 1e15
) -> float:
    """`value` as a finite float within bounds; values above `at_most` are rejected, because they overflow downstream.

    Raises:
        RopeScalingError: `value` is not a number, not finite, or out of bounds.
    """
    if is_number(value) and value > at_most:
        raise RopeScalingError(f"`{name}` must be at most {at_most:g}; got {value!r}.")
    bound = f", at least {at_least:g}" if at_least is not None else f", above {above:g}" if above is not None else ""
    if not is_number(value) or (at_least is not None and value < at_least) or (above is not None and value <= above):
        raise RopeScalingError(f"`{name}` must be a finite number{bound}; got {value!r}.")
    return float(value)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that a float holds: no truth value, not infinite, not a hundred digits long."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300


def check_length(name: str, value: Any) -> int:
    """`value` as a positive whole number of tokens.

    Raises:
        RopeScalingError: `value` is not one.
    """
    if not is_number(value) or value < 1 or value != int(value):
        raise RopeScalingError(f"`{name}` must be a whole number of tokens, at least 1; got {value!r}.")
    if value > _MOST_TOKENS:
        raise RopeScalingError(f"`{name}` must be at most {_MOST_TOKENS} tokens; got {value!r}.")
    return int(value)


_MOST_TOKENS = 2**40


def check_sequence(name: str, value: Any) -> tuple[Any, ...]:
    """`value` as a tuple of at least one item.

    Raises:
        RopeScalingError: `value` is not a list, or is empty.
    """
    items = () if isinstance(value, (str, dict)) or not hasattr(value, "__iter__") else tuple(value)
    if not items:
        raise RopeScalingError(f"`{name}` must be a list of one or more; got {value!r}.")
    return items


def check_count(name: str, value: Any) -> int:
    """`value` as a whole number, 0 or more.

    Raises:
        RopeScalingError: `value` is not one.
    """
    if not is_number(value) or value < 0 or value != int(value):
        raise RopeScalingError(f"`{name}` must be a whole number, at least 0; got {value!r}.")
    return int(value)


def keep_whole(owner: Any, *names: str, check: Callable[[str, Any], int] = check_length) -> None:
    """Checks fields of a frozen dataclass, and makes them `int`: divisions and JSON give floats.

    Raises:
        RopeScalingError: a value is not a whole number as `check` requires it, nor `None` where the type has that.
    """
    for field in fields(owner):
        value = getattr(owner, field.name)
        if field.name in names and (value is not None or "None" not in str(field.type)):
            object.__setattr__(owner, field.name, check(field.name, value))


@dataclass(frozen=True)
class Cause:
    """Why something from outside (the network, the disk, another package) failed."""

    kind: str
    """`memory`, `access`, `repository`, `revision`, `file`, `network`, `package`, `damaged`, `disk`, or `other`."""
    reason: str
    """One line, as the package that failed worded it, with a full stop."""
    remedy: str
    """One sentence: what to do. Empty for `other`."""

    def __str__(self) -> str:
        return f"{self.reason} {self.remedy}".rstrip()


def cause_of(error: BaseException) -> Cause:
    """The kind of failure that an exception reports, so that a message can say what to do about it.

    The packages that raise them are optional, wrap one another and move their exceptions between versions, so they are
    recognised by the names of their classes, along the chain of causes.
    """
    for one in _chain(error):
        if kind := next((kind for kind, applies in _KINDS if applies(one)), None):
            # The outer message says it better, except where it tells of something else.
            told = one if kind in ("memory", "disk") else error
            return Cause(kind, first_line(told), _disk_remedy(one) if kind == "disk" else _REMEDIES[kind])
    return Cause("other", first_line(error), "")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, with a full stop; of one from a data loader's worker, the last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1] if _WORKER.match(lines[0]) else lines[0]
    return line if line.endswith((".", "?", "!")) else f"{line}."


def system_error(error: BaseException) -> int | None:
    """The number of the operating system's error (`errno.ENOSPC`, ...) that an exception reports, or `None`."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
    return int(found[1]) if found else None


_WORKER = re.compile(r"Caught (\w+) in DataLoader worker")

_REMEDIES = {
    "memory": "Free memory, or give another `dtype` or `device`.",
    "access": "Accept the terms on its page at huggingface.co if it has any, and log in with `hf auth login`.",
    "repository": "Give a folder or a hub id such as 'org/name'; a private repository needs `hf auth login`.",
    "revision": "Give a branch, tag or commit that the repository has.",
    "file": "Give a folder or a hub id that has the file.",
    "network": "Check the connection (and `HF_HUB_OFFLINE`) and run the command again; finished downloads are kept.",
    "package": "Install what is missing and run the command again.",
    "damaged": "The file is damaged or incomplete: download or write it again.",
}
_DISK = {
    errno.ENOSPC: "Make room on the disk.",
    errno.EDQUOT: "Make room: the quota of the disk is used up.",
    errno.EROFS: "Give a folder on a disk that can be written to.",
    errno.EACCES: "Get permission for that file or folder, or give another.",
    errno.EPERM: "Get permission for that file or folder, or give another.",
    errno.EFBIG: "The file system or a limit of this process (`ulimit -f`) does not allow a file of that size.",
    errno.EIO: "The disk reports a fault: check it.",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`).",
}


def _disk_remedy(error: BaseException) -> str:
    return _DISK[system_error(error) or 0]


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        yield one
        seen.add(id(one))
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _called(*names: str) -> Callable[[BaseException], bool]:
    """Whether an exception, or what a data loader's worker raised, is of a class of one of these names."""

    def applies(error: BaseException) -> bool:
        worker = _WORKER.match(str(error))
        own = {cls.__name__ for cls in type(error).__mro__} | ({worker[1]} if worker else set())
        return not own.isdisjoint(names)

    return applies


def _refused(error: BaseException) -> bool:
    return getattr(getattr(error, "response", None), "status_code", None) in (401, 403)


def _out_of_memory(error: BaseException) -> bool:
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    told = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    return told or system_error(error) == errno.ENOMEM or _called("OutOfMemoryError", "MemoryError")(error)


def _missing_file(error: BaseException) -> bool:
    told = isinstance(error, OSError) and ("does not appear to have" in str(error) or "no file named" in str(error))
    not_cached = _called("LocalEntryNotFoundError")(error)  # the hub could not be asked whether it has the file
    return told or (not not_cached and _called("EntryNotFoundError", "FileNotFoundError")(error))


_KINDS: tuple[tuple[str, Callable[[BaseException], bool]], ...] = (
    ("memory", _out_of_memory),
    ("access", _called("GatedRepoError")),
    ("repository", _called("RepositoryNotFoundError", "HFValidationError", "DatasetNotFoundError")),
    ("revision", _called("RevisionNotFoundError")),
    ("access", _refused),
    ("file", _missing_file),
    ("disk", lambda error: system_error(error) in _DISK),
    (
        "network",
        _called(
            *("ConnectionError", "TimeoutError", "gaierror", "HTTPError", "HTTPException", "RequestException"),
            *("ClientError", "LocalEntryNotFoundError", "FSTimeoutError", "SSLError"),
        ),
    ),
    ("package", lambda error: isinstance(error, ImportError)),
    ("damaged", _called("SafetensorError", "JSONDecodeError", "UnpicklingError", "EOFError", "ArrowInvalid")),
)
"""Kinds of failure, the first that applies; the hub answers 401 for a repository that does not exist as well."""
