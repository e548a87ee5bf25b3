"""How a model arrived: geometry, the scaling it already has, and how far that reaches; from its config alone."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.frequencies import FrequencyMethod
from rope_scaling.geometry import RopeGeometry
from rope_scaling.hf.older_keys import without_older_keys
from rope_scaling.hf.record import check_record
from rope_scaling.hf.rope_types import check_types, with_static_base
from rope_scaling.hf.rotary import Slot
from rope_scaling.hf.tables import TableSlot, rope_parameters_of
from rope_scaling.methods import factor_of, method_class
from rope_scaling.methods import method_text as method_text
from rope_scaling.notation import changed_fields as changed_fields


RECORD_KEY = "rope_scaling_patch"
"""Where a patched model's config keeps the readable record of the method."""

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
class Pretrained:
    """A slot as the checkpoint defines it, before this library changed anything."""

    geometry: RopeGeometry
    """With the length that the frequencies were first trained at."""
    reach: int
    """The length that the checkpoint reads as it arrives, in tokens; above the trained length if it arrives scaled."""
    method: FrequencyMethod | None
    """The scaling it arrives with."""
    rope_parameters: dict[str, Any]
    """The slot's own part of `config.rope_parameters`."""
    inv_freq: torch.Tensor
    """Frequencies as Transformers computes them from the config, `[R / 2]`, float32; at its reach, if they vary."""
    attention_factor: float
    length_dependent: bool
    """Whether Transformers changes the frequencies with the length of the call."""

    @property
    def other_parameters(self) -> dict[str, Any]:
        """What else stands in `rope_parameters` and must stay, such as `partial_rotary_factor` or `mrope_section`."""
        return {key: value for key, value in self.rope_parameters.items() if key not in _SCALING_KEYS}


def pretrained_settings(config: Any) -> dict[str, Any]:
    """`max_position_embeddings` and `rope_parameters` of the checkpoint as it was before any patch of ours.

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


def read_pretrained(slot: Slot, settings: dict[str, Any], original_length: int | None = None) -> Pretrained:
    """Reads a slot from the settings of its config.

    Args:
        slot (`Slot`): Rotary module and layer type.
        settings (`dict[str, Any]`): What `pretrained_settings` gave.
        original_length (`int`, *optional*): Trained length in tokens, for a config that has none or a wrong one.

    Raises:
        RopeScalingError: the config has no length or no RoPE parameters, or the scaling it arrives with is unknown or
            depends on the length of the call.
    """
    parameters = dict(slot.part_of(settings["rope_parameters"] or {}))
    if not parameters.get("rope_theta"):
        raise RopeScalingError(
            f"The config of {type(slot.module).__name__} has no `rope_parameters` with a `rope_theta`."
        )
    check_types(parameters)
    config = config_with(slot, settings["rope_parameters"], settings["max_position_embeddings"])
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
        kept = {key: value for key, value in parameters.items() if key not in _SCALING_KEYS}
        plain = {**kept, "rope_type": "default", "rope_theta": parameters["rope_theta"]}
        plain = slot.with_part(settings["rope_parameters"], plain)
        raise RopeScalingError(
            f"This model arrives with `rope_type` {rope_type!r}, whose frequencies depend on the length of the call, "
            "so there is no table to scale. Load it with plain frequencies: `from_pretrained(..., rope_parameters="
            f"{json.dumps(plain)})`."
        )
    inv_freq, attention_factor = host_frequencies(slot, config, length=int(original) + 1)
    geometry = _geometry(config, slot, parameters, int(original), len(inv_freq))
    method = _arrived_method(rope_type, parameters, maximum, geometry)
    reach = geometry.original_max_position_embeddings
    if stated:
        reach = reach if method is None else max(int(maximum or 0), round(reach * factor_of(method)))
    else:
        # `linear` does not state the first trained length, only `max_position_embeddings`: what Transformers lets the
        # model read as it arrives.
        geometry = replace(geometry, original_max_position_embeddings=max(round(reach / factor_of(method)), 1))
    varies = rope_type == "longrope" and parameters["short_factor"] != parameters["long_factor"]
    return Pretrained(geometry, reach, method, parameters, inv_freq, attention_factor, varies)


def config_with(slot: Slot, rope_parameters: dict[str, Any], max_position_embeddings: int | None) -> Any:
    """A copy of the slot's config, made the way Transformers makes one from a saved file, with other RoPE settings.

    Raises:
        Exception: whatever the config class raises for settings it does not take.
    """
    values = without_older_keys(slot.config.to_dict())
    values.pop(RECORD_KEY, None)
    values["rope_parameters"] = copy.deepcopy(rope_parameters)
    values.pop("max_position_embeddings", None)
    if max_position_embeddings is not None:
        values["max_position_embeddings"] = max_position_embeddings
    return type(slot.config).from_dict(values)


def host_frequencies(slot: Slot, config: Any, length: int | None = None) -> tuple[torch.Tensor, float]:
    """Frequencies and attention factor that plain Transformers computes from a config, as when it loads a checkpoint.

    Args:
        slot (`Slot`): Rotary module and layer type.
        config: The config to compute from; it is not changed.
        length (`int`, *optional*): Length of the call in tokens, for types that vary with it.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = slot.part_of(rope_parameters_of(config))
    static = with_static_base(parameters, config)
    if static is not parameters:
        config = copy.deepcopy(config)
        config.rope_parameters = slot.with_part(config.rope_parameters, static)
    config = _of_layer_type(config, slot)  # as the modules of such models do
    rope_type = static["rope_type"]
    compute = ROPE_INIT_FUNCTIONS.get(rope_type) or default_function(slot)
    layer_type = {"layer_type": slot.layer_type} if slot.layer_type else {}
    varying = {"seq_len": length} if length and rope_type == "longrope" else {}
    with torch.device("cpu"):
        inv_freq, attention_factor = compute(config, **layer_type, **varying)
    return inv_freq.to(torch.float32), float(attention_factor)


def default_function(slot: Slot) -> Any:
    """The module class's own function for unscaled frequencies, past any that a patch of ours put in front of it.

    Raises:
        RopeScalingError: the class has none, so its frequencies cannot be computed from a config.
    """
    if isinstance(slot, TableSlot):
        return slot.default_frequencies
    name = "compute_default_rope_parameters"
    found = [vars(cls)[name] for cls in type(slot.module).__mro__ if name in vars(cls)]
    if not found:
        raise RopeScalingError(
            f"{type(slot.module).__name__} has no `{name}`, so its frequencies cannot be read from its config."
        )
    return getattr(found[-1], "__func__", found[-1])


def layer_configs(config: Any) -> list[Any]:
    """Every layer's own config: the same one, unless layers differ in heads or windows."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * getattr(config, "num_hidden_layers", 1)


def text_config(config: Any) -> Any:
    """The config of the language model; of the decoder, where an encoder of texts has one too."""
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(decoder=True)


def state_trained_length(config: Any, length: int) -> None:
    """Writes a trained length into the RoPE settings of a config, flat or by layer type, where it has such settings.

    Args:
        config (`PreTrainedConfig` or `dict`): A language model's config, or what its `config.json` holds; changed.
        length (`int`): In tokens.
    """
    for key in ("rope_scaling", "rope_parameters"):
        stated: Any = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
        for part in [one for one in (stated or {}).values() if isinstance(one, dict)] or [stated]:
            if part:
                part["original_max_position_embeddings"] = length


def windows_of(config: Any) -> list[int | None]:
    """The window in tokens that the config states for every layer."""
    own = layer_configs(config)
    return [getattr(one, "sliding_window", None) if getattr(one, "use_sliding_window", True) else None for one in own]


def _of_layer_type(config: Any, slot: Slot) -> Any:
    """The config of a slot's layers, where the heads of layer types differ in number or width."""
    if slot.layer_type and getattr(config, "is_heterogeneous", False):
        try:
            return config.per_layer_config[slot.layer_type]
        except ValueError:
            pass  # layers of one type differ, in something else than their heads
    return config


def _geometry(config: Any, slot: Slot, parameters: dict[str, Any], original: int, num_pairs: int) -> RopeGeometry:
    config = _of_layer_type(config, slot)
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    if head_dim and head_dim * parameters.get("partial_rotary_factor", 1.0) % 2 and 2 * num_pairs > head_dim:
        raise RopeScalingError(
            f"The rotary width must be even, because dimensions turn in pairs; this model's heads are {head_dim} wide."
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


def _arrived_method(
    rope_type: str, parameters: dict[str, Any], maximum: int | None, geometry: RopeGeometry
) -> FrequencyMethod | None:
    if rope_type == "default":
        return None
    if rope_type not in _NATIVE_METHODS:
        raise RopeScalingError(
            f"This model arrives with `rope_type` {rope_type!r}, which this library cannot extend. "
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
