"""Where the engine meets Transformers: one name in its attention and mask registries, and a hook on the decoder.

The hook reads positions, padding and cache of a forward call and hands them to every layer's attention as a keyword
argument. So a layer recomputed under gradient checkpointing gets what it had, and two models in one process carry
different patches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from rope_scaling.attention.blockwise import blockwise_attention
from rope_scaling.attention.flex import flex_span_attention
from rope_scaling.attention.kernels import choose_kernels
from rope_scaling.attention.plan import Plan
from rope_scaling.attention.sequences import Document, KeyStore, read_documents, segment
from rope_scaling.attention.tiled import tiled_attention
from rope_scaling.attention.whole_spans import whole_span_attention
from rope_scaling.errors import RopeScalingError
from rope_scaling.hf.bidirectional import WindowProgram, bidirectional_error
from rope_scaling.hf.cache import can_retain, key_store, retain, rotated_keys_of
from rope_scaling.hf.compat import cache_argument, is_exporting, take_cache
from rope_scaling.hf.compiled import TracedCall, no_positions_in_a_cache, trace, traceable
from rope_scaling.hf.layer_spans import SpanProgram


NAME = "rope_scaling"
"""What the engine is called in `config._attn_implementation`."""
CALL = "rope_scaling_call"
"""The keyword argument by which a layer's attention gets what the hook read."""

_KEPT_ROTATED = 64
"""Calls of up to this many tokens keep rotated keys beside the cache; in longer ones rotating them costs little
beside attention itself."""
_FEW = 16
"""Calls of up to this many tokens go through all scores at once on a GPU: they are few."""


class Call:
    """One forward call of a patched decoder, as every layer's attention sees it."""

    def __init__(self, program: SpanProgram, documents: list[Document], stores: list[KeyStore], length: int):
        self.program, self.documents, self.stores, self.length = program, documents, stores, length
        self.cache: Any = None
        self.past = 0
        self.attended: set[int] = set()
        """Layers whose attention came here."""
        self._plans: dict[Hashable, Plan] = {}

    def plan(self, layer: int, device: torch.device) -> Plan:
        """Spans and positions of a layer; made once for all layers alike on a device."""
        store = self.stores[layer] if self.stores else KeyStore()
        if device.type != "cuda":
            device = torch.device("cpu")  # others may have no float64
        name = (self.program.kind_of[layer], store, device)
        if name not in self._plans:
            kind = self.program.kinds[self.program.kind_of[layer]]
            segments = [segment(document, store) for document in self.documents]
            plan = Plan(kind.spans, segments, kind.layout, kind.inv_freq, kind.temperature, device=device)
            self._plans[name] = plan
        return self._plans[name]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        dropout: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one layer by the fastest engine that can do it, `[B, H, T, d]`."""
        if self.cache is None and key.shape[2] != self.length:
            raise RopeScalingError(
                f"Attention of layer {layer} got {key.shape[2]} keys in a call of {self.length} tokens, but the "
                "decoder hook found no cache argument, so the positions of those keys are unknown. Pass the cache "
                "to the decoder's forward call; if Transformers is newer than this library, please report its version."
            )
        self.attended.add(layer)
        plan = self.plan(layer, query.device)
        if dropout:
            self.program.warn_of_dropout(dropout)
        engine = self._engine(query, key, value, dropout, softcap)
        if engine is None:
            if query.device.type == "cuda" and not dropout and self.length > _FEW:
                return flex_span_attention(query, key, value, plan, scaling, softcap=softcap, sinks=sinks)
            options: dict[str, Any] = {"dropout": dropout, "softcap": softcap, "sinks": sinks}
            return blockwise_attention(query, key, value, plan, scaling, **options)
        kept = self._kept(layer, query)
        if kept is None:
            return engine(query, key, value, plan, scaling, sinks=sinks)
        rotated = partial(kept.rotated, plan)
        out = engine(query, key, value, plan, scaling, sinks=sinks, rotated_keys=rotated)
        kept.end(self.cache.layers[layer], self.past + self.length)
        return out

    def _engine(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, softcap: float | None
    ) -> Callable[..., torch.Tensor] | None:
        """The engine of fused kernels that can compute a layer, if there is one."""
        if dropout or softcap is not None or value.shape[-1] != query.shape[-1]:
            return None
        gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        kernels = choose_kernels(query, key, value, gradients)
        if kernels is not None:
            self.program.note_kernels(query.device, str(kernels))
            return partial(whole_span_attention, kernels=kernels)
        return tiled_attention if query.device.type == "cpu" else None

    def _kept(self, layer: int, query: torch.Tensor) -> Any:
        if self.cache is None or self.length > _KEPT_ROTATED or query.requires_grad:
            return None
        if getattr(self.cache, "offloading", False) or layer >= len(self.cache.layers):
            return None
        if "Quantized" in type(self.cache.layers[layer]).__name__:
            return None  # rotated keys beside it would take the memory that quantization saves
        return rotated_keys_of(self.cache.layers[layer], self.program)


class MissingHookError(RopeScalingError):
    """The attention function was called without the keyword argument that the decoder hook adds."""


class DecoderHook:
    """A forward pre-hook on the decoder: reads the call, refuses what the engine cannot do, and passes it on."""

    program: Any

    def __init__(self, program: SpanProgram, before: str):
        self.program, self.before = program, before

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return (), kwargs  # the model's own error says what is missing
        if is_exporting() or torch.jit.is_tracing():
            raise RopeScalingError(
                "`torch.export` and `torch.jit.trace` cannot follow span methods and temperatures, which depend on "
                "the positions of a call. Export a model that is patched with a frequency method; to speed this one "
                "up, use `torch.compile`."
            )
        if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise RopeScalingError(
                "`output_attentions=True`: a patched model's attention never stores its probabilities. `unpatch` the "
                "model to look at them."
            )
        cache = take_cache(module, kwargs)
        if torch.compiler.is_dynamo_compiling() and traceable(inputs, cache, _keeps(module, kwargs)):
            kwargs[CALL] = trace(self.program, inputs, cache, kwargs.get("position_ids"), _mask_of(kwargs))
            return (), kwargs
        return self._read(module, inputs, cache, kwargs)

    @torch.compiler.disable
    def _read(
        self, module: Any, inputs: torch.Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        rows, length = inputs.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        documents = read_documents(rows, length, past, kwargs.get("position_ids"), _mask_of(kwargs))
        self.program.warn_beyond_reach(max((int(d.positions[-1]) + 1 for d in documents), default=0))
        if not all(document.contiguous for document in documents):
            if cache is not None:
                raise no_positions_in_a_cache()
            kwargs["use_cache"] = False
        else:
            cache = kwargs[cache_argument(module)] = self._cache(module, cache, kwargs, documents)
        call = Call(self.program, documents, [], length)
        if cache is not None:
            call.cache, call.past = cache, past
            call.stores = [
                KeyStore()
                if index in self.program.without_attention
                else key_store(layer, cache, length, index, self.program.kinds[self.program.kind_of[index]].retained)
                for index, layer in zip_longest(range(len(self.program.layers)), cache.layers)
                if index is not None
            ]
            for layer in cache.layers[: len(self.program.layers)]:
                rotated_keys_of(layer, self.program).begin(layer, past)
        kwargs[CALL] = call
        return (), kwargs

    def _cache(self, module: Any, cache: Any, kwargs: dict[str, Any], documents: list[Document]) -> Any:
        """The call's cache, one whose layers forget where the methods allow it and nothing is in it yet."""
        bounds = [self.program.kinds[kind].retained for kind in self.program.kind_of]
        if not any(bounds):
            return cache
        if cache is None:
            if (
                not _keeps(module, kwargs)
                or (torch.is_grad_enabled() and module.training)
                or self.program.without_attention
            ):
                return None  # recurrent layers need caches of the model's own making
            cache = DynamicCache(config=module.config)
        if can_retain(cache):
            padding = max((document.first_slot for document in documents), default=0)
            retain(cache, [bound and (bound[0] + padding, bound[1]) for bound in bounds])
        return cache


def _keeps(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the call is to give back a cache."""
    wanted = kwargs.get("use_cache")
    return bool(getattr(module.config, "use_cache", False) if wanted is None else wanted)


def _mask_of(kwargs: dict[str, Any]) -> torch.Tensor | None:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):  # by layer type; the mask function below leaves all of them as the caller's
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise RopeScalingError(
            f"`attention_mask` must be a tensor of 1 for tokens and 0 for padding; got {type(mask).__name__}."
        )
    return mask


def span_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of a patched model, in the form that Transformers calls.

    Args:
        module (`nn.Module`): The attention module; its `layer_idx` says which layer's spans to use.
        query (`torch.Tensor`): `[B, H, T, d]`, rotated by the model.
        key (`torch.Tensor`): `[B, Hk, S, d]`, rotated by the model, cached ones first.
        value (`torch.Tensor`): `[B, Hk, S, dv]`.
        attention_mask: Not used; the hook has read it.
        scaling (`float`, *optional*): Multiplier of scores; `d ** -0.5` by default.
        dropout (`float`): Share of probabilities to drop.
        softcap (`float`, *optional*): Scores `s` become `c tanh(s / c)`.
        s_aux (`torch.Tensor`, *optional*): Learned sink score of every head, `[H]`.

    Returns:
        `tuple`: `[B, T, H, dv]`, and `None` in place of probabilities.

    Raises:
        RopeScalingError: called without the hook, or with what the engine does not compute.
    """
    call = kwargs.get(CALL)
    if call is None:
        raise MissingHookError(
            f"{type(module).__name__} has the attention of a patched model, but its decoder has no hook: the hook was "
            "removed, or this model was built from a patched model's config. Patch it (`rope_scaling.patch(model)` "
            "patches as the config records), or give it stock attention with "
            "`model.set_attn_implementation('sdpa')`."
        )
    if not getattr(module, "is_causal", True):
        _note_bidirectional(type(module).__name__)
    for name in ("position_bias", "cache", "block_table", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            raise RopeScalingError(
                f"{type(module).__name__} passes `{name}` to its attention, which spans and temperatures do not "
                "support. Frequency methods work with it."
            )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(call, TracedCall):
        out = call.attend(module.layer_idx, query, key, value, scaling, dropout, softcap, s_aux)  # type: ignore[arg-type]
    else:
        out = _attend(module, call, query, key, value, scaling, dropout, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


@torch.compiler.disable
def _attend(
    module: nn.Module,
    call: Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *settings: Any,
) -> torch.Tensor:
    facts = PROBE_FACTS.get()
    layer: Any = getattr(module, "layer_idx", None) if facts and facts.is_bidirectional else module.layer_idx
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # As stock attention does; the model may hand over queries in float32 and values in bfloat16.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        with torch.autocast(device, enabled=False):
            return call.attend(layer, query, key, value, *settings)
    return call.attend(layer, query, key, value, *settings)


@dataclass
class ProbeFacts:
    """Facts recorded while a model is probed."""

    windows: set[int] = field(default_factory=set)
    """Tokens of the windows and chunks that it asks masks for."""
    is_bidirectional: bool = False
    """Whether its attention is not causal."""


PROBE_FACTS: ContextVar[ProbeFacts | None] = ContextVar("facts", default=None)
"""Set while a model is looked at."""


def no_mask(
    *,
    attention_mask: Any = None,
    mask_function: Any = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    **_: Any,
) -> Any:
    """The mask function of a patched model: the caller's mask as it is, since the hook reads it and spans do the rest.

    Raises:
        RopeScalingError: the model adds a pattern of its own, such as bidirectional attention over images.
    """
    if use_vmap:
        raise RopeScalingError(
            "This model adds its own pattern to the causal mask, which spans cannot express. Frequency "
            "methods work on it."
        )
    facts = None if torch.compiler.is_dynamo_compiling() else PROBE_FACTS.get()  # no graph holds a context variable
    if facts is not None:
        if local_size:
            facts.windows.add(local_size)
        row, query, key = (torch.tensor(index) for index in (0, 0, 1))
        if mask_function is not None and bool(mask_function(row, row, query, key)):
            facts.is_bidirectional = True
    return attention_mask


def _note_bidirectional(name: str) -> None:
    facts = PROBE_FACTS.get()
    if facts is None:
        raise bidirectional_error(name)
    facts.is_bidirectional = True


AttentionInterface.register(NAME, span_attention)
AttentionMaskInterface.register(NAME, no_mask)


class WindowHook(DecoderHook):
    """Marks an encoder whose window is in its masks; the call itself is left alone."""

    def __init__(self, program: WindowProgram, before: str):
        self.program, self.before = program, before

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.program.register()

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs


def install(decoder: Any, program: SpanProgram | WindowProgram) -> None:
    """Puts the engine into a decoder, or a window into an encoder."""
    before = decoder.config._attn_implementation
    if before == NAME and installed(decoder) is None:  # built from a patched model's config
        before = "sdpa"
    hook = DecoderHook(program, before) if isinstance(program, SpanProgram) else WindowHook(program, before)
    decoder.register_forward_pre_hook(hook, with_kwargs=True)
    decoder.set_attn_implementation(_name_of(program))


def _name_of(program: SpanProgram | WindowProgram) -> str:
    return NAME if isinstance(program, SpanProgram) else program.register()


def remove(decoder: Any) -> None:
    """Takes the engine out again."""
    for key, hook in list(decoder._forward_pre_hooks.items()):
        if isinstance(hook, DecoderHook):
            del decoder._forward_pre_hooks[key]
            decoder._forward_pre_hooks_with_kwargs.pop(key, None)
            if decoder.config._attn_implementation == _name_of(hook.program):  # or it was set since
                decoder.set_attn_implementation(hook.before)


def installed(decoder: Any) -> Any:
    """The program in a decoder, if there is one."""
    return next((h.program for h in decoder._forward_pre_hooks.values() if isinstance(h, DecoderHook)), None)
