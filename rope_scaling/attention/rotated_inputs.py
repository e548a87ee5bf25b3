"""A segment's tensors as its kernel calls need them: rotated for each span, and the masks of bands."""

from __future__ import annotations

import torch

from rope_scaling.attention.plan import Plan, RotatedKeySource, apply_rotation
from rope_scaling.attention.sequences import Segment
from rope_scaling.attention.tiling import Schedule, make_schedule


def schedule_of(plan: Plan, segment: Segment) -> Schedule:
    """The kernel calls of a segment, made once for all layers that share the plan."""
    key = ("schedule", segment)
    if key not in plan.memo:
        plan.memo[key] = make_schedule(segment, plan.spans, plan.tile)
    return plan.memo[key]


class Inputs:
    """A segment's tensors, rotated for each span once, or in place from span to span where each differs from the one
    before it in a few pairs (`Span.after`): of all those, one copy is held."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: Plan,
        segment: Segment,
        rotated_keys: RotatedKeySource | None = None,
    ):
        self.plan, self.segment = plan, segment
        self.query = query[segment.rows, :, segment.queries]
        self.key = key[segment.rows, :, segment.keys]
        self.value = value[segment.rows, :, segment.keys]
        self.gain = plan.query_gain(segment)
        self.rotated_keys = rotated_keys
        self._keys: dict[int, torch.Tensor] = {}
        self._first: dict[int, int] = {}
        self._queries: dict[tuple[int, int], torch.Tensor] = {}
        self._tile = (-1, -1)
        # What is rotated on from in place must be a copy of the model's own, whatever was rotated before.
        chained = [span.after for span in plan.spans if span.after is not None]
        self._owned_keys = {id(span.key) for span in chained}
        self._owned_queries = {(id(span.query), id(span.amplitude)) for span in chained}

    def keys(self, index: int, first: int, last: int) -> torch.Tensor:
        """Keys `first .. last - 1` at the angles of span `index`, `[rows, Hk, last - first, d]`."""
        plan, span = self.plan, self.plan.spans[index]
        if span.key is None:
            return self.key[:, :, first:last]
        if id(span.key) not in self._keys:
            reach = schedule_of(plan, self.segment).reach(plan.spans, span.key)
            if self.rotated_keys is not None:
                rotated, self._first[id(span.key)] = self.rotated_keys(self.segment, span, self.key)
            elif span.after is not None and id(span.after.key) in self._keys:
                step = plan.step(self.segment, span.after, span, of_query=False)
                before = self._keys.pop(id(span.after.key))[:, :, :reach]
                rotated = apply_rotation(
                    before, step.part(0, before.shape[2]) if step else None, plan.layout, in_place=True
                )
            else:
                rotation = plan.key_rotation(self.segment, span, 0, reach)
                rotated = apply_rotation(self.key[:, :, :reach], rotation, plan.layout)
                if rotation is None and id(span.key) in self._owned_keys:
                    rotated = rotated.clone()
            self._keys[id(span.key)] = rotated
        start = self._first.get(id(span.key), 0)
        return self._keys[id(span.key)][:, :, first - start : last - start]

    def forget(self, begin: int) -> None:
        """Lets go of rotated keys that no tile after the one at `begin` needs, or that it rotates again."""
        if self._owned_keys:
            self._keys = {}
            return
        later = (pieces for first, _, pieces in schedule_of(self.plan, self.segment).tiles if first > begin)
        needed = {id(self.plan.spans[piece.span].key) for pieces in later for piece in pieces}
        self._keys = {name: keys for name, keys in self._keys.items() if name in needed}

    def queries(self, index: int, begin: int, end: int) -> torch.Tensor:
        """Queries `begin .. end - 1` (a tile) at the angles of span `index`, `[rows, H, end - begin, d]`."""
        if self._tile != (begin, end):
            self._tile, self._queries = (begin, end), {}
        span = self.plan.spans[index]
        name = id(span.query), id(span.amplitude)
        before = span.after and (id(span.after.query), id(span.after.amplitude))
        if name not in self._queries and span.after is not None and before in self._queries:
            rotation = self.plan.step(self.segment, span.after, span, of_query=True)
            part = rotation.part(begin, end) if rotation else None
            self._queries[name] = apply_rotation(self._queries.pop(before), part, self.plan.layout, in_place=True)
        elif name not in self._queries:
            rotated = self.query[:, :, begin:end]
            rotation = self.plan.query_rotation(self.segment, span)
            rotated = apply_rotation(rotated, rotation.part(begin, end) if rotation else None, self.plan.layout)
            if self.gain is not None:
                rotated = (rotated * self.gain[begin:end, None].to(rotated.device)).to(rotated.dtype)
            elif rotation is None and name in self._owned_queries:
                rotated = rotated.clone()
            self._queries[name] = rotated
        return self._queries[name]


def band_mask(inputs: Inputs, size: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Query `i` of a cut sees the keys from `i` on, all but `size - 1` of them; additive, `[1, 1, size, width]`."""
    key = ("mask", size, width, like.dtype)
    if key not in inputs.plan.memo:
        ahead = torch.arange(width) - torch.arange(size)[:, None]
        mask = torch.where((ahead >= 0) & (ahead <= width - size), 0.0, -torch.inf)
        inputs.plan.memo[key] = mask.to(like.dtype)[None, None]
    return inputs.plan.memo[key]


def wide(tensor: torch.Tensor) -> torch.dtype:
    """The dtype to merge and accumulate in: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
