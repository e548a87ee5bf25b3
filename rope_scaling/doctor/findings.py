"""A finding: its code, how grave it is, the cause, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


ERROR, WARNING, NOTE = "error", "warning", "note"

CODES = {
    # What the config states
    "RS101": (WARNING, "no base"),
    "RS102": (WARNING, "trained length lost"),
    "RS103": (WARNING, "lengths contradict each other"),
    "RS104": (ERROR, "settings stated twice, differently"),
    "RS105": (ERROR, "unknown type of scaling"),
    "RS106": (WARNING, "scaling that contradicts the cache"),
    "RS107": (WARNING, "keys that are ignored"),
    "RS108": (ERROR, "scaling that no layer type takes"),
    "RS109": (WARNING, "frequencies that switch within a text"),
    "RS110": (ERROR, "impossible value"),
    "RS111": (WARNING, "window shorter than the length"),
    "RS112": (NOTE, "short texts are scaled too"),
    "RS113": (WARNING, "no length"),
    "RS114": (ERROR, "Transformers cannot read it"),
    "RS115": (WARNING, "another length is stated elsewhere"),
    "RS116": (WARNING, "length that depends on an ignored key"),
    # What lies in the folder
    "RS201": (NOTE, "needs this library to load"),
    "RS202": (ERROR, "record of the patch damaged"),
    "RS203": (ERROR, "edited after it was patched"),
    "RS204": (WARNING, "adapter without a record of its scaling"),
    "RS205": (WARNING, "tokenizer truncates"),
    "RS206": (WARNING, "generation stops early"),
    # How others read it
    "RS301": (WARNING, "older readers see no scaling, and another base"),
    "RS302": (WARNING, "a server computes something else"),
    "RS303": (WARNING, "a server cannot compute it"),
    # What a running model computes
    "RS401": (ERROR, "config and model disagree"),
    "RS402": (ERROR, "frequencies were never filled in"),
    "RS403": (WARNING, "rounded frequencies"),
    "RS404": (ERROR, "attention without its mask"),
    "RS405": (ERROR, "the patch is no longer in effect"),
    "RS406": (NOTE, "attention that keeps every score"),
}
"""What a finding may be: how grave, and its title. `warning` and `error` make the command exit with status 1."""


@dataclass(frozen=True)
class Finding:
    """One thing found."""

    code: str
    """One of `CODES`."""
    level: str
    """`error`: what is computed is not what is stated. `warning`: it will surprise someone. `note`: good to know."""
    cause: str
    """What was seen, and what follows from it."""
    fix: str
    """What to do."""

    @property
    def title(self) -> str:
        """The finding in a few words."""
        return CODES[self.code][1]

    def __str__(self) -> str:
        return f"{self.code} {self.level}: {self.title}\n  {self.cause}\n  {self.fix}"


def found(code: str, cause: str, fix: str, level: str | None = None) -> Finding:
    """A finding as grave as its code says, unless told otherwise."""
    return Finding(code, level or CODES[code][0], cause, fix)
