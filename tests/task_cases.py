"""A case for every task: settings that suit lengths of 256 and 512 tokens, and what planted models score."""

from dataclasses import dataclass

from rope_scaling.eval.config import EvaluationConfig


CONFIG = EvaluationConfig(
    model="planted",
    data="python-reference",
    lengths=[256, 512],
    trained_length=256,
    factor=2.0,
    dtype="float32",
    device="cpu",
    chunk_size=512,
)


@dataclass(frozen=True)
class Case:
    settings: dict
    """Small ones."""
    knows: float | None = None
    """Accuracy of a model that knows the answers; `None` for tasks without answers."""
    guesses: float | None = None
    """Accuracy of a model that finds all tokens equally likely."""


CASES = {
    "perplexity": Case({}),
    "context_gain": Case({"num_targets": 32}),
    "key_tokens": Case({"gain": -100.0, "loss": 100.0, "short_context": 32}),
    "repeats": Case({"ngram": 2}),
    "copy": Case({"trials": 3}, knows=1, guesses=0),
    "kv_retrieval": Case({"trials": 3}, knows=1, guesses=0),
    "passkey": Case({"trials": 3, "depths": 3}, knows=1, guesses=0),
    "niah_single": Case({"trials": 3, "depths": 3}, knows=1, guesses=0),
    "niah_multikey": Case({"trials": 3, "depths": 3}, knows=1, guesses=0),
    "niah_nested": Case({"trials": 3, "depths": 3}, knows=1, guesses=0),
    "niah_multivalue": Case({"trials": 3, "num_values": 2}, knows=1, guesses=0),
    "niah_multiquery": Case({"trials": 3, "num_values": 2}, knows=1, guesses=0),
    "multiple_choice": Case({"trials": 4}, knows=1, guesses=1 / 4),
    "yarn_truncate": Case({}),
    "yarn_stride": Case({"stride": 128}),
    "pose_stride": Case({"stride": 128}),
    "longlora_stream": Case({"stride": 128}),
}
