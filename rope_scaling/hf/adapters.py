"""Adapters of PEFT that remember the patch they were trained under."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from rope_scaling.errors import RopeScalingError, cause_of
from rope_scaling.hf.checkpoint import read_checkpoint
from rope_scaling.hf.configs import RECORD_KEY, text_config
from rope_scaling.hf.model_patch import applied_patch
from rope_scaling.hf.overlay import Overlay, lay_over
from rope_scaling.hf.patch import patch, patch_as_recorded, patch_record
from rope_scaling.hf.record import check_record, method_from_record
from rope_scaling.hf.save_guard import is_guarded
from rope_scaling.methods import method_text


HINT_KEY = "load this adapter with rope_scaling.load_adapter"
"""Beside the record. PEFT warns of every key in a config that it does not know, by name."""


def record_adapter(model: Any) -> Any:
    """Makes every adapter that PEFT saves of this model carry the patch in effect at that time, those that are added
    later and Trainer checkpoints included.

    ```python
    rope_scaling.patch(model, "yarn", factor=4)
    model = rope_scaling.record_adapter(get_peft_model(model, LoraConfig(...)))
    model.save_pretrained("adapter")
    model = rope_scaling.load_adapter("adapter")
    ```

    The record goes into `adapter_config.json`. PEFT itself ignores it, and warns that it does, with the name of
    `load_adapter`.

    Args:
        model (`PeftModel`): An adapter on a patched base model.

    Returns:
        `PeftModel`: the model itself.

    Raises:
        RopeScalingError: it is not a PEFT model, or its base is not patched.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        raise RopeScalingError(
            f"`record_adapter` takes what `peft.get_peft_model` returns; got {type(model).__name__}. A patched model "
            "without an adapter needs nothing: its config carries the patch."
        )
    if patch_record(model) is None:
        raise RopeScalingError("The base of this adapter is not patched: there is nothing to record.")
    lay_over(model, _Recorded)
    return model


class _Recorded(Overlay):
    """Writes the patch in effect beside every adapter that is saved."""

    def save_pretrained(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """As of `PeftModel`."""
        save = super().save_pretrained  # type: ignore[misc]
        save(*args, **kwargs)
        record = patch_record(self)  # type: ignore[arg-type]
        given = inspect.signature(save).bind(*args, **kwargs).arguments
        if record is None or not given.get("is_main_process", True):
            return
        for name in given.get("selected_adapters") or list(self.peft_config):  # type: ignore[attr-defined]
            path = Path(given["save_directory"]) / ("" if name == "default" else name) / "adapter_config.json"
            saved = json.loads(path.read_text(encoding="utf-8")) | {RECORD_KEY: record, HINT_KEY: True}
            path.write_text(json.dumps(saved, indent=2, sort_keys=True), encoding="utf-8")


def load_adapter(
    name: str | Path, model: nn.Module | None = None, is_trainable: bool = False, **arguments: Any
) -> Any:
    """Loads an adapter together with the patch that it was trained under.

    Args:
        name (`str` or `Path`): The adapter's folder, or its hub id.
        model (`nn.Module`, *optional*): Its base model, unpatched or patched alike. By default the one that the
            adapter names is loaded.
        is_trainable (`bool`): For training on.
        **arguments: For loading the base model, as `PreTrainedModel.from_pretrained` takes them.

    Returns:
        `PeftModel`: in evaluation mode unless trainable.

    Raises:
        RopeScalingError: there is no adapter, it records no patch, or the base is not the one it was trained on or
            carries another patch.
    """
    from peft import PeftModel

    config = _adapter_config(str(name))
    record = config.get(RECORD_KEY)
    if record is None:
        raise RopeScalingError(
            f"The adapter {str(name)!r} records no patch. If it was trained without one, load it with "
            "`PeftModel.from_pretrained`. If it was trained under one, patch its base model the same way first: "
            "the adapter does not record how."
        )
    if model is None:
        model = _load_base(config, arguments)
    elif arguments:
        raise RopeScalingError(f"{', '.join(arguments)} given beside a loaded model. They are for loading one.")
    checkpoint = read_checkpoint(model)
    own = checkpoint.record
    if own is None:
        patch_as_recorded(model, record)
    elif own != json.loads(json.dumps(check_record(record))):
        raise RopeScalingError(
            f"The adapter {str(name)!r} was trained under {_text(record)}, and the base model carries "
            f"{_text(own)}. `unpatch` it first; the adapter brings its own."
        )
    elif applied_patch(checkpoint.slots) is None:
        patch(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{HINT_KEY}.*", category=UserWarning)
        try:
            loaded = PeftModel.from_pretrained(model, str(name), is_trainable=is_trainable)
        except (OSError, RuntimeError, ValueError) as error:
            cause = cause_of(error)
            if cause.kind != "other":
                raise RopeScalingError(f"Cannot load the adapter {str(name)!r}: {cause}") from error
            lines = str(error).strip().splitlines()
            raise RopeScalingError(
                f"The adapter {str(name)!r} does not fit this base model (it names "
                f"{config.get('base_model_name_or_path')!r}): {' '.join(lines[:2])}"
            ) from error
    return record_adapter(loaded)


def _load_base(config: dict[str, Any], arguments: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig

    from rope_scaling.hf.loading import from_pretrained
    from rope_scaling.hf.skeleton import class_of

    base = config.get("base_model_name_or_path")
    if not base:
        raise RopeScalingError("The adapter names no base model. Give it loaded: `load_adapter(name, model)`.")
    try:
        model_config = AutoConfig.from_pretrained(base)
        if is_guarded(text_config(model_config)):
            return from_pretrained(base, **arguments)
        return class_of(base, model_config).from_pretrained(base, **arguments).eval()
    except RopeScalingError:
        raise
    except Exception as error:  # a checkpoint, a config class or the network may fail in any way
        raise RopeScalingError(
            f"Cannot load {base!r}, the adapter's base model: {cause_of(error)} Or give it loaded: "
            "`load_adapter(name, model)`."
        ) from error


def _adapter_config(name: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    try:
        path = cached_file(name, "adapter_config.json")
        return json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = cause_of(error)
        if cause.kind in ("file", "repository", "other"):
            raise RopeScalingError(
                f"There is no adapter in {name!r}: {cause.reason} Give the folder that `save_pretrained` wrote, or a "
                "hub id."
            ) from error
        raise RopeScalingError(f"Cannot read the adapter config of {name!r}: {cause}") from error


def _text(record: dict[str, Any]) -> str:
    methods = " + ".join(method_text(method_from_record(one)) for one in check_record(record)["methods"])
    return f"{methods} to {record['target_length']} tokens"
