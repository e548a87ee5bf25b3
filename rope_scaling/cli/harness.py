"""The work of `rope-scaling harness`: lm-eval's tasks under every method."""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

from rope_scaling.cli import evaluate
from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.loading import tokenizer_source


def run(*, names: str, samples: int, timeout: int, model: str, methods: list[str], **options: Any) -> None:
    """Evaluates and shows; see the command's help for the arguments.

    Raises:
        RopeScalingError: anything that the user can mend.
    """
    evaluate.need_extra()
    if not methods:
        raise RopeScalingError("The harness takes its time for each method. Name them, as in `--method self_extend`.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # lm-eval says the same of the model with every document.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = importlib.import_module("rope_scaling.eval.tasks.harness")
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    made = harness.harness_tasks(chosen, tokenizer=tokenizer_source(model), samples=samples, timeout=timeout)
    texts: dict[str, Any] = {"data": "lm-eval", "column": "text", "split": "test", "subset": None, "pieces": False}
    evaluate.run(
        **texts, **options, model=model, methods=methods, made=made, suite=None, tasks=None, max_documents=None
    )
