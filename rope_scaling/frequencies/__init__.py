"""Frequency methods: how fast each pair turns. Adding one is a file, an import and a line in `METHODS`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.frequencies.abf import Abf
from rope_scaling.frequencies.base import FrequencyMethod
from rope_scaling.frequencies.clipped_frequency import ClippedFrequency
from rope_scaling.frequencies.drope import DroPe
from rope_scaling.frequencies.linear import Linear
from rope_scaling.frequencies.llama3 import Llama3
from rope_scaling.frequencies.longrope import LongRope
from rope_scaling.frequencies.mrrope_pro import MrRopePro
from rope_scaling.frequencies.mrrope_uni import MrRopeUni
from rope_scaling.frequencies.ntk import Ntk
from rope_scaling.frequencies.ntk_by_parts import NtkByParts
from rope_scaling.frequencies.ntk_mixed import NtkMixed
from rope_scaling.frequencies.p_rope import PRope
from rope_scaling.frequencies.power import Power
from rope_scaling.frequencies.resonance import Resonance
from rope_scaling.frequencies.truncated import Truncated
from rope_scaling.frequencies.yarn import Yarn


METHODS: dict[str, type[FrequencyMethod]] = {
    "linear": Linear,
    "ntk": Ntk,
    "ntk_mixed": NtkMixed,
    "ntk_by_parts": NtkByParts,
    "yarn": Yarn,
    "mrrope_uni": MrRopeUni,
    "mrrope_pro": MrRopePro,
    "llama3": Llama3,
    "longrope": LongRope,
    "abf": Abf,
    "power": Power,
    "truncated": Truncated,
    "resonance": Resonance,
    "clipped_frequency": ClippedFrequency,
    "p_rope": PRope,
    "drope": DroPe,
}
ALIASES = {"proportional": "p_rope"}
"""Other names of the same method; `proportional` is Transformers' name."""


def method_class(name: str) -> type[FrequencyMethod]:
    """The method of that name.

    Raises:
        RopeScalingError: there is none; the message names the nearest.
    """
    canonical = ALIASES.get(name, name)
    if canonical not in METHODS:
        raise unknown_name("method", name, [*METHODS, *ALIASES])
    return METHODS[canonical]


def make_method(name: str, **arguments: Any) -> FrequencyMethod:
    """A method from its name and fields, as in `make_method("yarn", factor=4)`.

    A wrapping method takes the wrapped one's name as `wrapped`, and its fields beside it:
    `make_method("resonance", wrapped="yarn", factor=4)`.

    Raises:
        RopeScalingError: no such method or field, a missing field, or a value that is not allowed.
    """
    cls = method_class(name)
    if cls is Resonance and isinstance(arguments.get("wrapped"), str):
        return Resonance(wrapped=make_method(arguments.pop("wrapped"), **arguments))
    known = [field.name for field in fields(cls)]
    for argument in arguments:
        if argument not in known:
            raise unknown_name(f"argument of {name!r}:", argument, known or ["(none)"])
    missing = [field.name for field in fields(cls) if field.name not in arguments and field.default is MISSING]
    if missing:
        raise RopeScalingError(
            f"{name!r} needs {', '.join(f'`{field}`' for field in missing)}; got {arguments or 'nothing'}."
        )
    return cls(**arguments)
