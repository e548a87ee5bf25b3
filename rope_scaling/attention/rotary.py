"""The former name of `rope_scaling.attention.rotation`, until the next release."""

import warnings

from rope_scaling.attention.rotation import RotaryLayout, Rotation


__all__ = ["RotaryLayout", "Rotation"]

warnings.warn(
    "`rope_scaling.attention.rotary` is `rope_scaling.attention.rotation` now; the former name goes with the next "
    "release.",
    FutureWarning,
    stacklevel=2,
)
