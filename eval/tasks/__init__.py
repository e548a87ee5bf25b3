"""Tasks by name. Each is a small module that owns its items, scores, rows, tables and figures; see `Task`."""

from __future__ import annotations

from rope_scaling.eval.files import Row
from rope_scaling.eval.tasks.base import Scores, Task
from rope_scaling.eval.tasks.context_gain import ContextGain
from rope_scaling.eval.tasks.copying import Copy, KvRetrieval
from rope_scaling.eval.tasks.key_tokens import KeyTokens
from rope_scaling.eval.tasks.multiple_choice import MultipleChoice
from rope_scaling.eval.tasks.niah import NiahMultikey, NiahMultiquery, NiahMultivalue, NiahSingle, Passkey
from rope_scaling.eval.tasks.niah_nested import NiahNested
from rope_scaling.eval.tasks.perplexity import Perplexity
from rope_scaling.eval.tasks.prompts import PromptTask
from rope_scaling.eval.tasks.protocols import LongLoraStream, PoseStride, YarnStride, YarnTruncate
from rope_scaling.eval.tasks.repeats import Repeats
from rope_scaling.eval.tasks.retrieval_task import RetrievalTask
from rope_scaling.eval.tasks.source import Source
from rope_scaling.eval.tasks.work import Work, prepare


TASKS: dict[str, type[Task]] = {
    "perplexity": Perplexity,
    "context_gain": ContextGain,
    "key_tokens": KeyTokens,
    "repeats": Repeats,
    "copy": Copy,
    "kv_retrieval": KvRetrieval,
    "passkey": Passkey,
    "niah_single": NiahSingle,
    "niah_multikey": NiahMultikey,
    "niah_nested": NiahNested,
    "niah_multivalue": NiahMultivalue,
    "niah_multiquery": NiahMultiquery,
    "multiple_choice": MultipleChoice,
    "yarn_truncate": YarnTruncate,
    "yarn_stride": YarnStride,
    "pose_stride": PoseStride,
    "longlora_stream": LongLoraStream,
}

__all__ = ["PromptTask", "Row", "RetrievalTask", "Scores", "Source", "TASKS", "Task", "Work", "prepare"]
