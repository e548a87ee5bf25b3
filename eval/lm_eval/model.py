"""lm-eval's class around a model in memory, which refuses the prompts that lm-eval would cut."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

from rope_scaling.errors import RopeScalingError
from rope_scaling.eval.tasks.source import Source


@dataclass(eq=False)
class Bench:
    """What all documents of a run are scored with: the tokenizer, and lm-eval's class around the model."""

    tokenizer: Any
    _lm: Any = None

    @staticmethod
    def of(source: Source) -> Bench:
        """The one of a run, made when it is first needed."""
        if "bench" not in source.shared:
            tokenizer = copy.deepcopy(source.tokenizer)
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            tokenizer.model_max_length = sys.maxsize  # it would warn of every text longer than the trained length
            source.shared["bench"] = Bench(tokenizer)
        return source.shared["bench"]

    def lm(self, model: Any, max_length: int, crop: int | None) -> Any:
        """lm-eval's class around a model, for prompts and answers of `max_length` tokens, cut to `crop` if given."""
        if self._lm is None or self._lm.model is not model:
            self._lm = _lm_class()(pretrained=model, tokenizer=self.tokenizer, batch_size=1)
        self._lm.room, self._lm.crop = crop or max_length, crop
        return self._lm


@cache
def _lm_class() -> Any:
    """lm-eval's own class, which refuses what it would cut, or cuts to `crop` tokens on purpose."""
    from lm_eval.models.huggingface import HFLM

    class Lm(HFLM):
        room = 0
        crop: int | None = None

        @property
        def max_length(self) -> int:
            return self.room

        def tok_batch_encode(
            self, strings: Any, *args: Any, left_truncate_len: int | None = None, **kwargs: Any
        ) -> Any:
            ids, mask = super().tok_batch_encode(strings, *args, left_truncate_len=None, **kwargs)
            if left_truncate_len and ids.shape[1] > left_truncate_len:
                _check_cut(self.crop, ids.shape[1], left_truncate_len)
                ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
            return ids, mask

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **kwargs: Any) -> Any:
            longest = max(len(context) + len(answer) for _, context, answer in requests)
            if longest > self.max_length + 1:
                _check_cut(self.crop, longest, self.max_length)
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, **kwargs)

    return Lm


def _check_cut(crop: int | None, tokens: int, room: int) -> None:
    if crop is None:
        raise RopeScalingError(
            f"A prompt of {tokens} tokens does not fit in {room}; lm-eval would cut its beginning off. Give longer "
            "`--lengths`."
        )
