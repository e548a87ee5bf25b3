"""RULER's documents, made by lm-eval's generators in a process of their own.

They are made in forks of a process with one seed, so they do not depend on what was made before; they are kept, and a
generator that never ends (`ruler_vt` and `ruler_cwe` at short lengths) is stopped.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.files import write_atomically
from rope_scaling.eval.hashes import hash_of
from rope_scaling.eval.lm_eval.definitions import family_manager, load_task


_ENDLESS_BELOW = {"ruler_vt": 2048, "ruler_cwe": 2048}
"""Lengths at which lm-eval's generators find nothing short enough and try for ever."""


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
    path = None if folder is None else folder / f"{name}-{length}-{key}.json"
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
    first, and what one length leaves in random states does not affect another."""

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
            random.setstate(state)  # Python seeds a fork again
            with os.fdopen(out, "w") as stream:
                stream.write(_documents(*json.loads(line)) + "\n")
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            os.write(out, b"\n")  # killed, such as for its memory


def _documents(name: str, length: int, tokenizer: str) -> str:
    try:
        task = load_task(family_manager("ruler", max_seq_lengths=(length,), tokenizer=tokenizer), name)
        return json.dumps(list(task.eval_docs))
    except Exception as error:  # lm-eval's, a tokenizer's or the network's
        return json.dumps({"error": " ".join(str(error).split())})


if __name__ == "__main__":
    main(*sys.argv[1:])
