"""Opens what this library saves and what it starts from: the embedded model, a folder, or a hub id.

A folder may hold a plain model, one that was saved patched, or a PEFT adapter; a model is of the class that its config
names, so that images, encoders and other heads come with it. What was saved patched comes with its patch in effect.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rope_scaling.errors import RopeScalingError, cause_of, first_line
from rope_scaling.hf.compat import optional_file
from rope_scaling.hf.configs import RECORD_KEY, keep_older_keys, text_config
from rope_scaling.hf.dtype import compute_dtype, stored_dtype
from rope_scaling.hf.patch import patch, patch_as_recorded
from rope_scaling.hf.save_guard import unwarned
from rope_scaling.hf.sinusoidal_tables import lengthen_tables
from rope_scaling.hf.skeleton import build_skeleton, buildable, class_of, unknown_types_named
from rope_scaling.hf.transformers_v4 import EXPORT_KEY, V4


DEMO = "demo"
"""The name of the embedded model."""

_HUB_ARGUMENTS = ("revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download", "proxies")


def model_source(name: str) -> str:
    """Where Transformers finds a model: the embedded one's folder for `demo`, else the folder or hub id itself.

    Raises:
        RopeScalingError: `name` is written like a path and there is no folder with a `config.json` there.
    """
    if name == DEMO:
        return str(resources.files("rope_scaling.demo") / "model")
    path = Path(name)
    if path.is_dir() and not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
        raise RopeScalingError(f"The folder {name!r} has no model: there is no `config.json`.")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise RopeScalingError(
            f"There is no model folder {name!r}. Give a folder, a hub id such as 'org/name', or 'demo'."
        )
    return name


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    config: Any = None,
    length: int | None = None,
    **arguments: Any,
) -> torch.nn.Module:
    """A model in evaluation mode, under the patch that it was saved with. An adapter is merged into its base model.

    Args:
        name (`str`): `demo`, a folder of a model or an adapter, or a hub id.
        dtype (`str`): `auto` (the checkpoint's, or float32 on a processor that is slow in it), `stored` (the
            checkpoint's in any case, for a model that is only saved again), `float32`, `bfloat16` or `float16`.
        device (`str`): `auto` (a GPU if there is one), or what `torch.device` takes.
        config (`PreTrainedConfig`, *optional*): Used instead of the one saved with the model.
        length (`int`, *optional*): Tokens that it is to be measured at, where a table ends before (see
            `lengthen_tables`).
        **arguments: Further ones, as `PreTrainedModel.from_pretrained` takes them.

    Returns:
        `nn.Module`: the model.

    Raises:
        RopeScalingError: there is no such model, it could not be fetched, or dtype or device are not known.
    """
    place = _device(device)
    if (adapter := _adapter_config(name)) is not None:
        if arguments:
            raise RopeScalingError(f"{name!r} is an adapter, which takes no {', '.join(arguments)}. Merge it first.")
        base = load_model(_base_of(name, adapter), dtype, device, config, length)
        return _merged(name, base)
    config = buildable(config or load_config(name, **_of_hub(arguments)))
    if dtype == "auto" and getattr(config, "quantization_config", None):
        dtype = "stored"  # what quantized weights are computed in, their own code decides
    cls, stored = class_of(name, config), stored_dtype(config)

    def load(source: str, **given: Any) -> Any:
        with unknown_types_named(config):
            return cls.from_pretrained(source, **given).to(place).eval()

    wanted = compute_dtype(dtype, stored, place)
    model = _fetch(load, name, dtype=wanted, config=config, **arguments)
    if dtype == "auto" and stored is None and (wanted := compute_dtype(dtype, model.dtype, place)) != "auto":
        model = _fetch(load, name, dtype=wanted, config=config, **arguments)
    return _as_saved(model, length)


def from_pretrained(name: str | Path, model_class: Any = None, **arguments: Any) -> torch.nn.Module:
    """Loads a patched model that was saved with `save_pretrained`, with the patch in effect.

    Restores what plain Transformers refuses to load, because a span method or a temperature changes attention.
    A checkpoint exported for Transformers 4 keeps the keys that are read there, whenever the model is saved again.

    Args:
        name (`str` or `Path`): A folder, or a hub id.
        model_class (`type`, *optional*): What loads it, such as `AutoModelForImageTextToText`; by default the class
            that its config names.
        **arguments: As its `from_pretrained` takes them (`dtype`, `device_map`, ...).

    Returns:
        `nn.Module`: the model, in evaluation mode.

    Raises:
        RopeScalingError: there is no such model, or its config records no patch.
    """
    name = str(name)
    if _adapter_config(name) is not None:
        raise RopeScalingError(f"{name!r} is an adapter. Load it with `rope_scaling.load_adapter`.")
    config = buildable(arguments.pop("config", None) or load_config(name, **_of_hub(arguments)))
    text = text_config(config)
    if getattr(text, RECORD_KEY, None) is None and getattr(text, EXPORT_KEY, None) != V4:
        raise RopeScalingError(
            f"{name!r} records no patch. Load it with `AutoModelForCausalLM.from_pretrained`, and patch it."
        )
    load = (model_class or class_of(name, config)).from_pretrained
    return _as_saved(_fetch(load, name, config=config, **arguments).eval())


def open_adapter(name: str, base: Any) -> Any:
    """An adapter on its base model, under the patch that the adapter records if it records one.

    Args:
        name (`str`): The adapter's folder or hub id.
        base (`nn.Module`): As `load_model` gives it.

    Returns:
        `PeftModel`: in evaluation mode.

    Raises:
        RopeScalingError: PEFT is not installed, or as `rope_scaling.load_adapter`.
    """
    if find_spec("peft") is None:
        raise RopeScalingError(f"{name!r} is an adapter, which needs PEFT: pip install 'rope-scaling[train]'.")
    from peft import PeftModel

    from rope_scaling.hf.adapters import load_adapter

    if RECORD_KEY in (_adapter_config(name) or {}):
        return load_adapter(name, base)
    return _fetch(lambda source, **_: PeftModel.from_pretrained(base, source).eval(), name)


def load_skeleton(name: str, config: Any = None) -> torch.nn.Module:
    """As `load_model`, without the weights: enough to read and patch frequencies, at the price of the config, which
    may be given. An adapter's is its base model's, under the patch that the adapter records.

    Raises:
        RopeScalingError: there is no such model, or none can be built from its config.
    """
    if (adapter := _adapter_config(name)) is not None:
        model, record = load_skeleton(_base_of(name, adapter), config), adapter.get(RECORD_KEY)
        return model if record is None else patch_as_recorded(model, record)
    try:
        return _as_saved(build_skeleton(name, config or load_config(name)))
    except RopeScalingError:
        raise
    except Exception as error:  # a config that reads may still build no model, in any way
        raise RopeScalingError(
            f"No model can be built from the config of {name!r}: {first_line(error)} Correct its `config.json`."
        ) from error


def check_language_model(name: str, config: Any = None) -> None:
    """Refuses a model that does not predict the next token from those before it, such as an encoder.

    Raises:
        RopeScalingError: it is one, or there is no such model.
    """
    config = config or load_config(name)
    cls = class_of(name, config)
    causal = getattr(text_config(config), "is_decoder", True) and not getattr(config, "is_encoder_decoder", False)
    if not cls.can_generate() or not causal:
        architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        raise RopeScalingError(
            f"{name!r} ({architecture}) does not predict the next token from the tokens before it. Give a causal "
            "language model, or a vision-language model with one inside."
        )


def load_tokenizer(name: str, **arguments: Any) -> Any:
    """The tokenizer of a model; of an adapter's base model, if the adapter has none.

    Args:
        name (`str`): `demo`, a folder of a model or an adapter, or a hub id.
        **arguments: Further ones, as `AutoTokenizer.from_pretrained` takes them.

    Returns:
        `PreTrainedTokenizerBase`: the tokenizer.

    Raises:
        RopeScalingError: there is none, or it could not be fetched.
    """
    from transformers import AutoTokenizer

    return _fetch(AutoTokenizer.from_pretrained, tokenizer_source(name), **arguments)


def tokenizer_source(name: str) -> str:
    """Where Transformers finds the tokenizer of a model: of an adapter's base model, if the adapter has none."""
    adapter = _adapter_config(name)
    if adapter is None or optional_file(name, "tokenizer_config.json"):
        return model_source(name)
    return tokenizer_source(_base_of(name, adapter))


def load_config(name: str, **arguments: Any) -> Any:
    """The config of a model, with the same names as `load_model`. An adapter's is its base model's."""
    from transformers import AutoConfig

    if (adapter := _adapter_config(name)) is not None:
        return load_config(_base_of(name, adapter))
    with unwarned():
        return _fetch(AutoConfig.from_pretrained, name, **arguments)


def _of_hub(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that say where files come from, for the config as for the weights."""
    return {key: value for key, value in arguments.items() if key in _HUB_ARGUMENTS}


def _as_saved(model: Any, length: int | None = None) -> torch.nn.Module:
    """The model under the patch that its config records, and with the keys of Transformers 4 if it was saved so."""
    text = text_config(model.config)
    keep_older_keys(text)
    if length is not None:
        lengthen_tables(model, length)
    return model if getattr(text, RECORD_KEY, None) is None else patch(model)


def is_adapter(name: str) -> bool:
    """Whether a folder or hub id holds a PEFT adapter in place of a model."""
    return _adapter_config(name) is not None


def _merged(name: str, base: Any) -> Any:
    """The base model with an adapter in its weights, which can be trained as those of any loaded model."""
    trainable = {key for key, parameter in base.named_parameters() if parameter.requires_grad}
    model = open_adapter(name, base).merge_and_unload().eval()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trainable)
    return model


def _adapter_config(name: str) -> dict[str, Any] | None:
    """The config of a PEFT adapter, or `None` for a model; what has both is a model."""
    source = Path(model_source(name))
    if not source.is_dir():
        file = _hub_adapter_config(name)
    else:
        file = None if (source / "config.json").exists() else str(source / "adapter_config.json")
    if file is None:
        return None
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RopeScalingError(f"The `adapter_config.json` of {name!r} is not valid: {first_line(error)}") from error


@cache
def _hub_adapter_config(name: str) -> str | None:
    from transformers.utils import find_adapter_config_file

    return find_adapter_config_file(name)


def _base_of(name: str, adapter: dict[str, Any]) -> str:
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise RopeScalingError(
            f"The adapter {name!r} names no base model. Load that and `rope_scaling.load_adapter({name!r}, model)`, "
            "and save what `merge_and_unload()` gives."
        )
    return base


def _fetch(load: Any, name: str, **arguments: Any) -> Any:
    source = model_source(name)
    arguments.setdefault("trust_remote_code", False)  # or Transformers asks on the terminal
    try:
        return load(source, **arguments)
    except Exception as error:  # a checkpoint, a config class or the network may fail in any way
        if "custom code" in str(error):
            raise RopeScalingError(
                f"{name!r} has custom modelling code, which is not run from here. Load it yourself, with "
                "`trust_remote_code=True`, and pass the model to `rope_scaling.patch`: it takes one whose rotary "
                "module is built as Transformers builds its own, and refuses others."
            ) from error
        cause = cause_of(error)
        remedy = cause.remedy or "Give a folder, a hub id such as 'org/name', or 'demo'."
        raise RopeScalingError(f"Cannot load {name!r}: {cause.reason} {remedy}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RopeScalingError(f"`device` {name!r} cannot be used here: {first_line(error)}") from error
    return device
