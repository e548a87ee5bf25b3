"""Frequency methods: how fast each pair rotates. Adding one is a file, an import and a line in `METHODS`."""

from __future__ import annotations

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
