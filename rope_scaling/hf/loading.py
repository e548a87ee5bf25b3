"""Loading models and tokenizers for the command line: the embedded one, a folder, or a hub id."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.loud import is_loud, unwarned
from rope_scaling.hf.older_keys import EXPORT_KEY, V4, keep_older_keys
from rope_scaling.hf.pretrained import RECORD_KEY
from rope_scaling.hf.record import check_record
from rope_scaling.hf.rope_types import check_types
from rope_scaling.hf.skeleton import without_weights
from rope_scaling.hf.tables import rope_parameters_of


DEMO = "demo"
"""The name of the embedded model."""

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_source(name: str) -> str:
    """Where Transformers finds a model: the embedded one's folder for `demo`, else the folder or hub id itself.

    Raises:
        RopeScalingError: `name` is written like a path and there is no folder with a `config.json` there.
    """
    if name == DEMO:
        return str(resources.files("rope_scaling.demo") / "model")
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise RopeScalingError(f"The folder {name!r} holds no model: it has no `config.json`.")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise RopeScalingError(
            f"There is no model folder {name!r}. Give a folder, a hub id such as 'org/name', or 'demo'."
        )
    return name


def load_model(name: str, dtype: str = "auto", device: str = "auto", **arguments: Any) -> torch.nn.Module:
    """A causal language model in evaluation mode.

    Args:
        name (`str`): `demo`, a folder, or a hub id.
        dtype (`str`): `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        device (`str`): `auto` (a GPU if there is one), or what `torch.device` takes.
        **arguments: Further ones, as `AutoModelForCausalLM.from_pretrained` takes them.

    Raises:
        RopeScalingError: there is no such model, it could not be fetched, or dtype or device are not known.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in _DTYPES:
        raise RopeScalingError(f"`dtype` must be one of {', '.join(_DTYPES)}; got {dtype!r}.")
    place = _device(device)
    model = _fetch(AutoModelForCausalLM.from_pretrained, name, dtype=_DTYPES[dtype], **arguments)
    return model.to(place).eval()


def from_pretrained(name: str | Path, model_class: Any = None, **arguments: Any) -> torch.nn.Module:
    """Loads a patched model that was saved with `save_pretrained`, with the patch in effect.

    What plain Transformers refuses to load, because a span method or a temperature lives in attention, this restores.
    A checkpoint exported for Transformers 4 keeps the keys that are read there, whenever the model is saved again.

    Args:
        name (`str` or `Path`): A folder, or a hub id.
        model_class (`type`, *optional*): What loads it, such as `AutoModelForImageTextToText`; by default
            `AutoModelForCausalLM`.
        **arguments: As its `from_pretrained` takes them (`dtype`, `device_map`, ...).

    Returns:
        `nn.Module`: the causal language model, in evaluation mode.

    Raises:
        RopeScalingError: there is no such model, or its config records no patch.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from rope_scaling.hf.patch import patch

    name = str(name)
    with unwarned():
        config = arguments.pop("config", None) or _fetch(AutoConfig.from_pretrained, name)
    text = config.get_text_config()
    record = getattr(text, RECORD_KEY, None)
    load = (model_class or AutoModelForCausalLM).from_pretrained
    if record is None and getattr(text, EXPORT_KEY, None) == V4:
        model = _fetch(load, name, config=config, **arguments).eval()
        keep_older_keys(model.config.get_text_config())
        return model
    if record is None:
        raise RopeScalingError(
            f"{name!r} records no patch. Load it with `AutoModelForCausalLM.from_pretrained`, and patch it."
        )
    pretrained = check_record(record)["pretrained"]
    if is_loud(text):
        for key, value in pretrained.items():
            setattr(text, key, copy.deepcopy(value))
    return patch(_fetch(load, name, config=config, **arguments).eval())


def load_skeleton(name: str, config: Any = None) -> torch.nn.Module:
    """The same model without its weights: enough to read and patch its frequencies, at the price of its config, which
    may be given.

    Raises:
        RopeScalingError: it is no causal language model, or Transformers does not compute its type of scaling.
    """
    from transformers import AutoModelForCausalLM

    config = config or load_config(name)
    try:
        with without_weights():
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise RopeScalingError(f"{name!r} is no causal language model: {_first_line(error)}") from error
    except (KeyError, TypeError):
        check_types(rope_parameters_of(config.get_text_config()))
        raise


def load_tokenizer(name: str, **arguments: Any) -> Any:
    """The tokenizer of a model, with the same names as `load_model`."""
    from transformers import AutoTokenizer

    return _fetch(AutoTokenizer.from_pretrained, name, **arguments)


def load_config(name: str, **arguments: Any) -> Any:
    """The config of a model, with the same names as `load_model`."""
    from transformers import AutoConfig

    return _fetch(AutoConfig.from_pretrained, name, **arguments)


def _fetch(load: Any, name: str, **arguments: Any) -> Any:
    source = model_source(name)
    arguments.setdefault("trust_remote_code", False)  # or Transformers asks on the terminal
    try:
        return load(source, **arguments)
    except Exception as error:  # a checkpoint, a config class or the network may fail in any way
        if "custom code" in str(error):
            raise RopeScalingError(
                f"{name!r} brings modelling code of its own, which is not run from here. Load it yourself, with "
                "`trust_remote_code=True`, and hand the model to `rope_scaling.patch`: it takes one whose rotary "
                "module is built as Transformers builds its own, and refuses others."
            ) from error
        raise RopeScalingError(
            f"Cannot load {name!r}: {_first_line(error)} Give a folder, a hub id such as 'org/name', or 'demo'; "
            "after an interrupted download, run the command again."
        ) from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RopeScalingError(f"`device` {name!r} cannot be used here: {_first_line(error)}") from error
    return device


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith((".", "?", "!")) else f"{line}."
