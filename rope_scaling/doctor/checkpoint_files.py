"""What can be wrong beside the settings: the record of a patch, an adapter's, the tokenizer, the generation config."""

from __future__ import annotations

from collections.abc import Iterator

from rope_scaling.doctor.findings import Finding, found
from rope_scaling.doctor.sources import Source
from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.configs import RECORD_KEY
from rope_scaling.hf.record import check_record, method_from_record


def check_files(source: Source, target_length: int | None) -> Iterator[Finding]:
    """Everything that the other files of a checkpoint show, and the record in its config."""
    yield from _record(source.text.get(RECORD_KEY), source.guarded)
    if adapter := source.files.get("adapter_config.json"):
        yield from _adapter(adapter, source)
    length = target_length or source.length
    if not isinstance(length, int):
        return
    limit = source.files.get("tokenizer_config.json", {}).get("model_max_length")
    if isinstance(limit, (int, float)) and limit < length:
        yield found(
            "RS205",
            f"`model_max_length` in `tokenizer_config.json` is {limit:g}, and the model is to read {length} tokens: "
            "whoever truncates (`truncation=True`, many servers and evaluation tools) cuts texts there.",
            f"Set it to {length}; `rope-scaling export` does.",
        )
    stop = source.files.get("generation_config.json", {}).get("max_length")
    if isinstance(stop, int) and 20 < stop < length:  # 20 stands for "not set"
        yield found(
            "RS206",
            f"`max_length` in `generation_config.json` is {stop}: prompt and answer together end there, and the model "
            f"is to read {length} tokens.",
            "Remove it, or raise it.",
        )


def _record(record: object, guarded: bool) -> Iterator[Finding]:
    if record is None:
        return
    try:
        methods = [method_from_record(one) for one in check_record(record)["methods"]]
    except RopeScalingError as error:
        yield found("RS202", str(error), "Take the config from the folder that `save_pretrained` wrote.")
        return
    if guarded:
        yield found(
            "RS201",
            f"Saved under {' + '.join(map(str, methods))}, which changes attention: plain Transformers and servers "
            "refuse to load it, so that it is never run without the patch.",
            "Load it with `rope_scaling.from_pretrained`; `rope-scaling export` names the nearest method for servers.",
        )


def _adapter(adapter: dict, source: Source) -> Iterator[Finding]:
    base = adapter.get("base_model_name_or_path")
    if (record := adapter.get(RECORD_KEY)) is not None:
        try:
            check_record(record)
        except RopeScalingError as error:
            yield found("RS202", f"In `adapter_config.json`: {error}", "Take the file from where it was trained.")
        return
    scaling = source.stated.get("rope_type", "none") if source.text else "whatever that model has"
    yield found(
        "RS204",
        f"`adapter_config.json` does not say under which scaling the adapter was trained. On its base ({base}) it "
        f"gets {scaling}; if it was trained with other scaling, its outputs are silently wrong.",
        "Ask its author; patch the base in the same way, load the adapter on it, and save it with "
        "`rope_scaling.record_adapter`, which records the scaling.",
    )
