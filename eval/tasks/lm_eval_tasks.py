"""lm-eval's tasks as it defines them, with documents of the length that is asked for.

- RULER's documents are made in forks of a process with one seed, so they do not depend on what was made before; they
  are kept, and a generator that never ends (`ruler_vt` and `ruler_cwe` at short lengths) is stopped.
- `ruler_cwe` gets the example that NVIDIA's RULER shows the model, and questions with several accepted answers
  (`ruler_qa_*`) count as right with any of them, as there; lm-eval drops the one and averages the other.
- BABILong is taken in the size of each length. lm-eval takes `0k` when nothing is said: facts without a haystack.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.rows import hash_of, write_atomically


RULER = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multiquery", "niah_multivalue", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad", "ruler_qa_hotpot"),
)
BABILONG = tuple(f"babilong_qa{number}" for number in range(1, 6))
"""Those whose facts stand in a haystack; the others of the twenty are short."""
_ENDLESS_BELOW = {"ruler_vt": 2048, "ruler_cwe": 2048}
"""Lengths at which lm-eval's generators find nothing short enough and try for ever."""
_ONE_IS_ENOUGH = ("ruler_qa_squad", "ruler_qa_hotpot")
_BABILONG_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Thousands of GPT-2's tokens."""


def check_installed() -> None:
    """Raises `RopeScalingError` with the name of the extra if lm-eval or what RULER needs is missing."""
    from importlib.util import find_spec

    missing = [name for name in ("lm_eval", "wonderwords", "nltk") if find_spec(name) is None]
    if missing:
        raise RopeScalingError(f"The harness needs {' and '.join(missing)}: pip install 'rope-scaling[harness]'.")


@cache
def manager() -> Any:
    """All of lm-eval's tasks: reading the thousands of them takes it some twenty seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def plain_task(name: str) -> Any:
    """lm-eval's task as it is.

    Raises:
        RopeScalingError: it cannot be loaded, or measures perplexity over windows.
    """
    task = _load(manager(), name)
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise RopeScalingError(
            f"{name!r} measures perplexity over disjoint windows, most tokens of which have little before them; that "
            "says nothing of long context. Use the perplexity task of `rope-scaling evaluate`."
        )
    return task


def babilong_task(name: str, length: int) -> Any:
    """BABILong's task in the largest size that is no longer than `length` tokens.

    Raises:
        RopeScalingError: the task has no haystack, or there is no such size.
    """
    if name not in BABILONG:
        raise RopeScalingError(
            f"{name!r} has no long texts, only its facts; those that have: {', '.join(BABILONG)} (`babilong_longctx`)."
        )
    size = max((size for size in _BABILONG_SIZES if size * 1024 <= length), default=None)
    if size is None or length >= 2048 * _BABILONG_SIZES[-1]:
        raise RopeScalingError(
            f"BABILong has texts of 1,024 to {1024 * _BABILONG_SIZES[-1]:,} tokens; got a length of {length}. Leave "
            "the task or the length out."
        )
    return _load(_family_manager("babilong", max_seq_lengths=f"{size}k"), name)


def ruler_task(name: str, documents: list[dict[str, Any]]) -> Any:
    """RULER's task with documents made already, and NVIDIA's prompt and score where lm-eval departs from them."""
    import datasets

    given: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(documents)},
    }
    if name == "ruler_cwe":
        given["doc_to_text"] = "{{input_example}}\n{{input}}"
    if name in _ONE_IS_ENOUGH:
        given["process_results"] = _any_answer
    # Alone, a mapping would be a task of its own; as a member of a group, it changes lm-eval's task of that name.
    return _family_manager("ruler").load([{"group": "given", "task": [given]}])["tasks"][name]


def make_ruler(
    name: str,
    length: int,
    tokenizer: str,
    tokenizer_sha256: str,
    seed: int,
    timeout: int,
    folder: Path | None,
    shared: dict[Any, Any],
) -> list[dict[str, Any]]:
    """RULER's documents of one length, from `folder` if they were made before with the same tokenizer.

    Args:
        name (`str`): One of `RULER`.
        length (`int`): In tokens.
        tokenizer (`str`): Folder or hub id, which lm-eval's generators load.
        tokenizer_sha256 (`str`): Hash of its contents.
        seed (`int`): Of all random numbers.
        timeout (`int`): Seconds that the generator may take.
        folder (`Path`, *optional*): Where documents are kept.
        shared (`dict`): What lasts as long as the run; holds the process that generates.

    Raises:
        RopeScalingError: the generator does not end at this length, or in this time, or fails.
    """
    if length < _ENDLESS_BELOW.get(name, 0):
        raise RopeScalingError(
            f"lm-eval's generator of {name!r} does not end at {length} tokens; it takes {_ENDLESS_BELOW[name]} or "
            "more. Leave the task or the length out."
        )
    key = hash_of(repr((name, length, seed, tokenizer_sha256, version("lm_eval"))).encode())
    path = None if folder is None else folder / "ruler" / f"{name}-{length}-{key}.json"
    if path is not None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    generator = shared.setdefault(("ruler", seed), _Generator(seed))
    try:
        text = generator.answer(name, length, tokenizer, timeout)
    except TimeoutError:
        raise RopeScalingError(
            f"lm-eval's generator of {name!r} did not end within {timeout} seconds at {length} tokens. "
            "Leave it out, give a greater `--timeout`, or longer `--lengths`."
        ) from None
    documents = json.loads(text or '{"error": "its process ended without a message"}')
    if isinstance(documents, dict):
        raise RopeScalingError(
            f"lm-eval could not make the documents of {name!r} at {length} tokens: {documents['error']}"
        )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    return documents


class _Generator:
    """A process with lm-eval's generators, which forks for each length: loading any of them sorts six million words
    first, and what one length leaves in random states does not reach another."""

    def __init__(self, seed: int):
        self._command = [sys.executable, "-m", __name__, str(seed)]
        self._process: Any = None

    def answer(self, *request: Any) -> str:
        """A line of JSON: documents, or what went wrong; nothing if the process died.

        Raises:
            TimeoutError: it took longer than the request's last item, in seconds.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        process, (*arguments, timeout) = self._process, request
        with ThreadPoolExecutor(1) as pool:
            try:
                print(json.dumps(arguments), file=process.stdin, flush=True)
                return pool.submit(process.stdout.readline).result(timeout)
            except BaseException:
                self._process = None
                os.killpg(process.pid, signal.SIGKILL)  # with what it forked; reading then ends
                process.wait()
                raise


@cache
def _family_manager(family: str, **metadata: Any) -> Any:
    """One folder of lm-eval's tasks, in place of all."""
    from lm_eval import tasks

    return tasks.TaskManager(
        include_path=str(Path(tasks.__file__).parent / family), include_defaults=False, metadata=metadata or None
    )


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])["tasks"][name]
    except Exception as error:
        reason = " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])
        raise RopeScalingError(f"lm-eval cannot load the task {name!r}: {reason}") from error


def _any_answer(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    text = results[0].lower()
    return {str(document["max_length"]): float(any(one.lower() in text for one in document["outputs"]))}


def main(seed: str) -> None:
    """Makes RULER's documents for every request on standard input, a line of JSON each, in a fork of this process.

    Every fork has the random states of a new process with this seed.
    """
    random.seed(int(seed))
    np.random.seed(int(seed))
    torch.manual_seed(int(seed))
    out = os.dup(1)
    os.dup2(2, 1)  # generators print
    importlib.import_module("lm_eval.tasks.ruler.prepare_niah")  # it draws too, before any generator does
    state = random.getstate()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            random.setstate(state)  # Python seeds a fork anew
            with os.fdopen(out, "w") as stream:
                stream.write(_documents(*json.loads(line)) + "\n")
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            os.write(out, b"\n")  # killed, such as for its memory


def _documents(name: str, length: int, tokenizer: str) -> str:
    try:
        task = _load(_family_manager("ruler", max_seq_lengths=(length,), tokenizer=tokenizer), name)
        return json.dumps(list(task.eval_docs))
    except Exception as error:  # lm-eval's, a tokenizer's or the network's
        return json.dumps({"error": " ".join(str(error).split())})


if __name__ == "__main__":
    main(*sys.argv[1:])
