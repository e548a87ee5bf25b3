"""One set of rotary frequencies as a checkpoint defines it, from the config alone: geometry, scaling, length."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.geometry import RopeGeometry
from rope_scaling.hf.compat import layer_type_config, rope_functions
from rope_scaling.hf.configs import RECORD_KEY, config_values, rope_parameters_of
from rope_scaling.hf.record import check_record
from rope_scaling.hf.rope_types import check_types, with_static_base
from rope_scaling.hf.slot import Slot
from rope_scaling.methods import factor_of, method_class


_NATIVE_METHODS = {
    "linear": "linear",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "proportional": "p_rope",
}
_SCALING_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor"),
    *("low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True)
class PretrainedRope:
    """One set of rotary frequencies as the checkpoint defines it, before this library changes anything."""

    geometry: RopeGeometry
    """With the length that the frequencies were first trained at."""
    reach: int
    """Context length of the checkpoint as loaded, in tokens; above the trained length if it is scaled already."""
    method: FrequencyMethod | None
    """The scaling that it is loaded with."""
    rope_parameters: dict[str, Any]
    """The slot's own part of `config.rope_parameters`."""
    inv_freq: torch.Tensor
    """Frequencies as Transformers computes them from the config, `[R / 2]`, float32; those of the longest texts, if
    they vary."""
    attention_factor: float
    length_dependent: bool
    """Whether Transformers changes the frequencies with the length of the call."""

    @property
    def other_parameters(self) -> dict[str, Any]:
        """What else is in `rope_parameters` and must be kept, such as `partial_rotary_factor` or `mrope_section`."""
        return {key: value for key, value in self.rope_parameters.items() if key not in _SCALING_KEYS}


class LoadedConfig:
    """A config of a model as its checkpoint states it.

    Args:
        config (`PreTrainedConfig`): What describes a rotary module now; it may record a patch.
    """

    def __init__(self, config: Any):
        self.config = config

    @cached_property
    def settings(self) -> dict[str, Any]:
        """`max_position_embeddings` and `rope_parameters` before any patch.

        Raises:
            RopeScalingError: the record of a patch is damaged.
        """
        return pretrained_settings(self.config)

    @cached_property
    def as_loaded(self) -> Any:
        """The config with these settings, as Transformers makes it from a saved file."""
        return self.with_settings(self.settings["rope_parameters"], self.settings["max_position_embeddings"])

    def with_settings(self, rope_parameters: dict[str, Any], max_position_embeddings: int | None) -> Any:
        """A copy of the config, made the way Transformers makes one from a saved file, with other RoPE settings.

        Raises:
            Exception: whatever the config class raises for settings it does not take.
        """
        values = copy.deepcopy(self._values)
        values["rope_parameters"] = copy.deepcopy(rope_parameters)
        values.pop("max_position_embeddings", None)
        if max_position_embeddings is not None:
            values["max_position_embeddings"] = max_position_embeddings
        return type(self.config).from_dict(values)

    @cached_property
    def _values(self) -> dict[str, Any]:
        return config_values(self.config)


def pretrained_settings(config: Any) -> dict[str, Any]:
    """`max_position_embeddings` and `rope_parameters` of the checkpoint before any patch of this library.

    Raises:
        RopeScalingError: the record of a patch is damaged.
    """
    record = getattr(config, RECORD_KEY, None)
    if record is not None:
        return copy.deepcopy(check_record(record)["pretrained"])
    return {
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "rope_parameters": copy.deepcopy(rope_parameters_of(config)),
    }


def read_pretrained(slot: Slot, settings: dict[str, Any], original_length: int | None = None) -> PretrainedRope:
    """Reads one set of frequencies from the settings of its config.

    Args:
        slot (`Slot`): Rotary module and layer type.
        settings (`dict[str, Any]`): What `pretrained_settings` gave.
        original_length (`int`, *optional*): Trained length in tokens, for a config that has none or a wrong one.

    Raises:
        RopeScalingError: the config has no length or no RoPE parameters, or the scaling it is loaded with is unknown
            or depends on the length of the call.
    """
    loaded = LoadedConfig(slot.config)
    loaded.settings = settings
    return read_rope(slot, loaded, original_length)


def read_rope(slot: Slot, loaded: LoadedConfig, original_length: int | None) -> PretrainedRope:
    """As `read_pretrained`, from a config that was read before."""
    settings = loaded.settings
    parameters = dict(slot.part_of(settings["rope_parameters"] or {}))
    if not parameters.get("rope_theta"):
        raise RopeScalingError(
            f"The config of {type(slot.module).__name__} has no `rope_parameters` with a `rope_theta`."
        )
    check_types(parameters)
    config = loaded.as_loaded
    parameters = with_static_base(parameters, config)
    maximum = settings["max_position_embeddings"]
    stated = original_length or parameters.get("original_max_position_embeddings")
    original = stated or maximum
    if not original:
        raise RopeScalingError(
            "The model's config has no trained length: neither `max_position_embeddings` nor "
            "`original_max_position_embeddings` is set. Pass it: `patch(..., original_max_position_embeddings=4096)`."
        )
    rope_type = parameters.get("rope_type", "default")
    if rope_type.startswith("dynamic"):
        raise _length_dependent(slot, settings, parameters)
    inv_freq, attention_factor = frequencies_from_config(slot, config, length=int(original) + 1)
    geometry = _geometry(config, slot, parameters, int(original), len(inv_freq))
    method = _loaded_method(rope_type, parameters, maximum, geometry)
    reach = geometry.original_max_position_embeddings
    if stated:
        reach = reach if method is None else max(int(maximum or 0), round(reach * factor_of(method)))
    else:
        # `linear` does not state the first trained length, only `max_position_embeddings`: the context length of the
        # model as loaded.
        geometry = replace(geometry, original_max_position_embeddings=max(round(reach / factor_of(method)), 1))
    varies = rope_type == "longrope" and parameters["short_factor"] != parameters["long_factor"]
    return PretrainedRope(geometry, reach, method, parameters, inv_freq, attention_factor, varies)


def _length_dependent(slot: Slot, settings: dict[str, Any], parameters: dict[str, Any]) -> RopeScalingError:
    other = {key: value for key, value in parameters.items() if key not in _SCALING_KEYS}
    plain = {**other, "rope_type": "default", "rope_theta": parameters["rope_theta"]}
    plain = slot.with_part(settings["rope_parameters"], plain)
    return RopeScalingError(
        f"This model is loaded with `rope_type` {parameters['rope_type']!r}, whose frequencies depend on the length "
        "of the call, so there is no table to scale. Load it with plain frequencies: `from_pretrained(..., "
        f"rope_parameters={json.dumps(plain)})`."
    )


def frequencies_from_config(slot: Slot, config: Any, length: int | None = None) -> tuple[torch.Tensor, float]:
    """Frequencies and attention factor that plain Transformers computes from a config, as when it loads a checkpoint.

    Args:
        slot (`Slot`): Rotary module and layer type.
        config: The config to compute from; it is not changed.
        length (`int`, *optional*): Length of the call in tokens, for types that vary with it.

    Returns:
        `tuple`: `[R / 2]`, float32, and the multiplier of cos and sin.
    """
    parameters = slot.part_of(rope_parameters_of(config))
    static = with_static_base(parameters, config)
    if static is not parameters:
        config = copy.deepcopy(config)
        config.rope_parameters = slot.with_part(config.rope_parameters, static)
    config = layer_type_config(config, slot.layer_type)  # as the modules of such models do
    rope_type = static["rope_type"]
    compute = rope_functions().get(rope_type) or slot.default_frequencies
    layer_type = {"layer_type": slot.layer_type} if slot.layer_type else {}
    varying = {"seq_len": length} if length and rope_type == "longrope" else {}
    with torch.device("cpu"):
        inv_freq, attention_factor = compute(config, **layer_type, **varying)
    return inv_freq.to(torch.float32), float(attention_factor)


def _geometry(config: Any, slot: Slot, parameters: dict[str, Any], original: int, num_pairs: int) -> RopeGeometry:
    config = layer_type_config(config, slot.layer_type)
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    if head_dim and head_dim * parameters.get("partial_rotary_factor", 1.0) % 2 and 2 * num_pairs > head_dim:
        raise RopeScalingError(
            f"The rotary width must be even, because dimensions rotate in pairs; the heads of this model "
            f"are {head_dim} wide."
        )
    return RopeGeometry(
        rotary_dim=2 * num_pairs,
        rope_theta=float(parameters["rope_theta"]),
        original_max_position_embeddings=original,
        head_dim=head_dim,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None),
        layer_type=slot.layer_type,
    )


def _loaded_method(
    rope_type: str, parameters: dict[str, Any], maximum: int | None, geometry: RopeGeometry
) -> FrequencyMethod | None:
    if rope_type == "default":
        return None
    if rope_type not in _NATIVE_METHODS:
        raise RopeScalingError(
            f"This model is loaded with `rope_type` {rope_type!r}, which this library cannot extend. "
            f"It can extend: default, {', '.join(_NATIVE_METHODS)}."
        )
    cls = method_class(_NATIVE_METHODS[rope_type])
    values = {key: value for key, value in parameters.items() if value is not None}
    if "factor" not in values and maximum:
        values["factor"] = max(maximum / geometry.original_max_position_embeddings, 1.0)
    given = {field.name: values[field.name] for field in fields(cls) if field.name in values}
    method: Any = cls(**given)
    without: Any = cls(**{key: value for key, value in given.items() if key != "attention_factor"})
    # A factor that is only the default written out must not outlive a change of the scale it was computed for.
    same = abs(method.inv_freq(geometry)[1] - without.inv_freq(geometry)[1]) < 1e-6
    return without if same else method
