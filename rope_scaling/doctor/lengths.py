"""What can be wrong with the lengths that a config states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

from rope_scaling.doctor.findings import NOTE, Finding, found
from rope_scaling.doctor.sources import Source, family_reads
from rope_scaling.errors import is_number
from rope_scaling.hf.configs import windows_of


_SCALED_TO_A_LENGTH = {"yarn", "llama3", "longrope"}
_OTHER_NAMES = (
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "max_seq_len",
    "seq_length",
    "n_positions",
)
"""Keys under which other code states the length that a model reads."""


def check_part(source: Source, kind: str, where: str, written: dict, read: dict) -> Iterator[Finding]:
    """The lengths of one scaling: trained, factor, and what both make together."""
    length, original, factor = source.length, read.get("original_max_position_embeddings"), read.get("factor")
    if not is_length(length):
        return
    if kind in _SCALED_TO_A_LENGTH:
        stated = written.get("original_max_position_embeddings"), source.text.get("original_max_position_embeddings")
        if written and not any(stated):
            yield found(
                "RS102",
                f"{kind!r}{where} without `original_max_position_embeddings`: Transformers takes "
                f"`max_position_embeddings`, {length}, for the length that the model was trained at. If that is the "
                "extended length already, every frequency is wrong.",
                "Write the trained length there: the `max_position_embeddings` of the model before it was scaled.",
            )
            return
    if kind == "linear" and is_number(factor):
        yield from _before_linear(source, factor, where)
    if not is_length(original) or not is_number(factor):
        return
    product = original * factor
    # Some round the length down a little: 128000 for 131072.
    if kind in ("yarn", "longrope") and factor > 1 and not 0.95 * product <= length <= product + 1:
        equal = " The length was not raised with the factor, so tools that go by it stop at the trained length."
        other = f", or `factor` to {length / original:g}, whichever the model was trained with"
        yield found(
            "RS103",
            f"`original_max_position_embeddings` {original} times `factor` {factor:g} is {product:g}, but "
            f"`max_position_embeddings` is {length}{where}.{equal if length == original else ''}",
            f"Set `max_position_embeddings` to {product:.0f}{other if length > original else ''}.",
        )
    if kind == "llama3" and original >= length:
        yield found(
            "RS103",
            f"`original_max_position_embeddings` {original} is not below `max_position_embeddings` {length}{where}: "
            "'llama3' scales from the first to the second.",
            "Set them to the lengths before and after the scaling.",
        )


def _before_linear(source: Source, factor: float, where: str) -> Iterator[Finding]:
    """`linear` states no trained length, so `max_position_embeddings` may be that before or after the scaling."""
    length = source.length
    places = {"`model_max_length` in `tokenizer_config.json`": source.files.get("tokenizer_config.json", {})}
    stated = {place: values.get("model_max_length") for place, values in places.items()}
    stated |= {f"`{key}`": source.text.get(key) for key in _OTHER_NAMES}
    for place, value in stated.items():
        if factor > 1 and is_length(value) and abs(value - length * factor) <= 1:
            yield found(
                "RS115",
                f"'linear'{where} with factor {factor:g}, `max_position_embeddings` {length}, and {place} {value}, "
                f"which is {length} times {factor:g}: {length} is the trained length, before the scaling. Tools that "
                f"go by it stop there, and an extension counts from {length / factor:g} trained tokens.",
                f"Set `max_position_embeddings` to {value}; or give "
                f"`rope_scaling.patch(..., original_max_position_embeddings={length})`.",
            )
            return


def check_other_lengths(source: Source) -> Iterator[Finding]:
    """Lengths under other keys than `max_position_embeddings`, and those that depend on keys that are ignored."""
    length, text = source.length, source.text
    if not is_length(length):
        return
    longer = {key: text[key] for key in _OTHER_NAMES if is_length(text.get(key)) and length < text[key] < 2**40}
    factor = source.stated.get("factor")
    if longer and not (is_number(factor) and any(abs(one - length * factor) <= 1 for one in longer.values())):
        key, value = max(longer.items(), key=lambda item: item[1])
        yield found(
            "RS115",
            f"`max_position_embeddings` is {length}, but `{key}` is {value}: Transformers, servers and this library "
            f"go by the first, so the model is cut off at {length} tokens, and an extension counts from there.",
            f"If the model reads {value} tokens, set `max_position_embeddings` to {value}; or give "
            f"`rope_scaling.patch(..., original_max_position_embeddings={value})`.",
        )
    yield from _on_ignored_attention(source)
    yield from _on_ignored_scaling(source)


def _on_ignored_attention(source: Source) -> Iterator[Finding]:
    key, length = "dual_chunk_attention_config", source.length
    chunks = source.text.get(key)
    if not isinstance(chunks, dict) or family_reads(source.config, key):
        return
    trained = chunks.get("original_max_position_embeddings") or chunks.get("chunk_size")
    if is_length(trained) and trained < length:
        yield found(
            "RS116",
            f"`max_position_embeddings` {length} depends on `{key}`, which Transformers and current servers ignore: "
            f"they run plain attention, and the model was trained at {trained} tokens.",
            f"Use `rope_scaling.patch(model, 'dual_chunk', original_max_position_embeddings={trained}, "
            f"target_length={length})`, or set `max_position_embeddings` to {trained}.",
        )


def _on_ignored_scaling(source: Source) -> Iterator[Finding]:
    trained, length = source.text.get("max_trained_positions"), source.length
    if not is_length(trained) or trained >= length or family_reads(source.config, "max_trained_positions"):
        return
    factor = source.text.get("rotary_scaling_factor")
    ignored = f" `rotary_scaling_factor` {factor:g} is ignored." if is_number(factor) and factor != 1 else ""
    yield found(
        "RS116",
        f"`max_position_embeddings` is {length}, but the model was trained at `max_trained_positions` {trained}, and "
        f"Transformers scales nothing.{ignored}",
        f"Use `rope_scaling.patch(model, 'ntk', original_max_position_embeddings={trained}, target_length={length})`, "
        f"or set `max_position_embeddings` to {trained}.",
    )


def check_windows(source: Source, target_length: int | None) -> Iterator[Finding]:
    """Windows of every layer that are shorter than the length; a note at the length that the config states itself."""
    length = target_length or source.length
    if source.config is None or not is_length(length):
        return
    windows = windows_of(source.config)
    short = [window for window in windows if window and window < length]
    kinds = getattr(source.config, "layer_types", None)
    limited = len(short) if kinds is None else sum("sliding" in str(kind) for kind in kinds) if short else 0
    if limited and limited == len(windows):
        extended = is_length(source.length) and length > source.length
        yield found(
            "RS111",
            f"Every layer attends to the last {max(short)} tokens only, so none sees {length} tokens at once, "
            "whatever its frequencies.",
            "State the policy yourself: a larger `sliding_window` (the model was not trained with one), or none of "
            "the long text will be read but through the window.",
            None if extended else NOTE,
        )


def is_length(value: Any) -> TypeGuard[int]:
    """Whether a value of a config is a number of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
