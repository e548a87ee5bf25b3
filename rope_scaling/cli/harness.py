"""The work of `rope-scaling harness`: lm-eval's tasks under every method."""

from __future__ import annotations

import logging
import os

from rope_scaling.cli.evaluate import RunOptions, TextOptions, evaluate_tasks, need_extra
from rope_scaling.errors import RopeScalingError


def run(options: RunOptions, names: str, samples: int, timeout: int) -> None:
    """Evaluates lm-eval's tasks, whose names are separated by commas, and shows what came out.

    Raises:
        RopeScalingError: anything that the user can fix.
    """
    need_extra()
    if not options.methods:
        raise RopeScalingError("The harness takes its time for each method. Name them, as in `--method self_extend`.")
    from rope_scaling.eval.lm_eval.task import harness_tasks
    from rope_scaling.eval.methods import parse_method
    from rope_scaling.hf.loading import tokenizer_source

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # lm-eval says the same of the model with every document.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    tokenizer = tokenizer_source(options.model)
    tasks = harness_tasks(chosen, tokenizer=tokenizer, samples=samples, timeout=timeout)
    methods = [parse_method(text) for text in options.methods]
    evaluate_tasks(options, TextOptions(data="lm-eval"), methods, tasks)
