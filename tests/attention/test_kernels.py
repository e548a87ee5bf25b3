"""Stock kernels, their twins and the self-check; rotating and merging by Triton."""

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import ClassVar

import pytest
import torch
from attention_twins import CUDNN, EFFICIENT, FLASH, TWINS
from engine_cases import LAYOUTS, METHODS, by_model, plan, tensors, whole

from rope_scaling.attention import fused, kernels
from rope_scaling.attention.kernels import CuDnn, Efficient, Flash, Kernel, Kernels, choose_kernels
from rope_scaling.attention.reference import reference_attention
from rope_scaling.attention.rotation import RotaryLayout, Rotation
from rope_scaling.attention.whole_spans import whole_span_attention


needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]
on_a_gpu = pytest.param("cuda", marks=needs_gpu)
SHAPES = ["full", "causal", "reversed", "band"]


def heads(device="cpu", dtype=torch.float32, count=4, key_count=2, width=16):
    return [torch.empty(1, number, 1, width, device=device, dtype=dtype) for number in (count, key_count)]


@pytest.mark.parametrize("kernel", [FLASH, CUDNN, EFFICIENT], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_twins_are_the_definition(kernel, shape):
    """Outputs, log-sum-exps and gradients; queries and keys of unequal number where the shape has them."""
    if shape not in kernel.shapes:
        pytest.skip("cut into triangles, or reversed by the engine")
    assert kernels._difference(kernel, *heads(), shape, gradients=True) < 1e-5


@pytest.mark.parametrize("shape", ["full", "causal", "reversed", "band"])
def test_the_definition_is_a_loop(shape):
    queries, keys = 5, {"full": 3, "band": 8}.get(shape, 5)
    q, k, v = torch.randn(1, 2, queries, 4), torch.randn(1, 1, keys, 4), torch.randn(1, 1, keys, 4)
    out, lse = kernels.dense(q, k, v, shape, 0.3)
    for head in range(2):
        for i in range(queries):
            seen = {
                "full": range(keys),
                "causal": range(i + 1),
                "reversed": range(i, keys),
                "band": range(i, i + keys - queries + 1),
            }[shape]
            scores = torch.stack([q[0, head, i] @ k[0, 0, j] * 0.3 for j in seen])
            wanted = sum(weight * v[0, 0, j] for weight, j in zip(scores.softmax(0), seen, strict=True))
            assert torch.allclose(out[0, head, i], wanted, atol=1e-6)
            assert torch.allclose(lse[0, head, i], scores.logsumexp(0), atol=1e-6)


@dataclass(frozen=True)
class Broken(Kernel):
    """A kernel with a fault."""

    name: ClassVar[str] = "Broken"
    fault: str

    def forward(self, query, key, value, shape, scaling):
        if self.fault == "fails":
            raise RuntimeError("no kernel image is available for execution on the device\nmore")
        out, lse = CUDNN.forward(query, key, value, "full" if self.fault == "ignores the mask" else shape, scaling)
        return out, lse + (0.7 if self.fault == "log-sum-exp in another base" else 0)

    def backward(self, grad, query, key, value, out, lse, shape, scaling):
        of_query, of_key, of_value = CUDNN.backward(grad, query, key, value, out, lse, shape, scaling)
        return of_query, of_key * {"wrong gradients": 2, "NaN": torch.nan}.get(self.fault, 1), of_value


FAULTS = ["fails", "ignores the mask", "log-sum-exp in another base", "wrong gradients", "NaN"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_that_is_wrong_here_is_left_out_with_a_warning(fault, monkeypatch):
    monkeypatch.setattr(kernels, "_candidates", lambda *_: [Broken(fault), FLASH])
    kernels._chosen.cache_clear()
    with pytest.warns(UserWarning, match=r"Broken is not used for heads of width 16 in torch.float32 \(torch .*\): "):
        found = kernels._chosen(torch.device("cpu"), torch.float32, 4, 2, 16, True)
    assert found == Kernels(FLASH, FLASH, "the one that works here")
    monkeypatch.setattr(kernels, "_candidates", lambda *_: [Broken(fault)])
    kernels._chosen.cache_clear()
    with pytest.warns(UserWarning, match="Broken is not used"):
        assert kernels._chosen(torch.device("cpu"), torch.float32, 4, 2, 16, True) is None
    kernels._chosen.cache_clear()


def test_a_kernel_whose_gradients_are_wrong_serves_without_them(monkeypatch):
    monkeypatch.setattr(kernels, "_candidates", lambda *_: [Broken("wrong gradients"), FLASH])
    kernels._chosen.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kernels._chosen(torch.device("cpu"), torch.float32, 4, 2, 16, False)
    assert isinstance(found.large, Broken)
    kernels._chosen.cache_clear()


def test_no_memory_for_the_comparison_says_nothing_of_the_kernel(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(kernels, "dense", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        kernels._agrees(FLASH, *heads(), gradients=False)


@pytest.mark.parametrize(("capability", "names"), [((7, 5), [Efficient]), ((8, 0), [Flash])])
def test_half_precision_by_the_age_of_the_card(capability, names, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert [type(kernel) for kernel in kernels._candidates(*heads(dtype=torch.float16))] == names


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float64, 64), (torch.bfloat16, 36), (torch.float16, 264), (torch.float32, 30)]
)
def test_heads_that_no_kernel_takes(dtype, width):
    assert kernels._candidates(*heads(dtype=dtype, width=width)) == []


def test_a_cpu_and_unequal_widths_have_engines_of_their_own():
    q, k, v = tensors(8)
    assert choose_kernels(q, k, v, False) is None
    assert choose_kernels(q, k, v[..., :4], False) is None


@dataclass(frozen=True, eq=False)
class Counting(Kernel):
    """A kernel that counts what it is called with."""

    name: ClassVar[str] = "Counting"
    shapes: ClassVar[frozenset[str]] = frozenset(SHAPES)
    calls: list

    def forward(self, query, key, value, shape, scaling):
        self.calls.append((shape, query.shape[2], key.shape[2]))
        return FLASH.forward(query, key, value, shape, scaling)

    def backward(self, *arguments):
        return FLASH.backward(*arguments)


# Kernel calls, rotations of queries and keys, merges; what moves and what stays of a span are a call each.
COUNTS = {
    "rerope": (3, 2, 1),
    "self_extend": (3, 2, 1),
    "clip": (3, 2, 1),
    "lm_infinite": (4, 2, 2),
    "window": (4, 0, 2),
}


@pytest.mark.parametrize("name", COUNTS)
def test_calls_and_rotations_of_a_layer(name, monkeypatch):
    """Near and far, and the far queries' merge: nothing for each tile, chunk or token."""
    rotations, merges = [], []
    rotate, merge = fused.rotate, fused.merge_
    module = "rope_scaling.attention.whole_spans"

    def counted_rotate(x, rotation, *more):
        rotations.extend([x.shape[2]] if rotation is not None else [])
        return rotate(x, rotation, *more)

    def counted_merge(out, *more, **options):
        merges.append(out.shape)
        return merge(out, *more, **options)

    monkeypatch.setattr(f"{module}.rotate", counted_rotate)
    monkeypatch.setattr(f"{module}.merge_", counted_merge)
    counting = Counting([])
    q, k, v = tensors(700)
    made = plan(METHODS[name], whole(700), LAYOUTS[0])
    whole_span_attention(q, k, v, made, 0.3, Kernels(counting, counting))
    assert (len(counting.calls), len(rotations), len(merges)) == COUNTS[name], counting.calls


def test_decoding_is_a_call_for_each_span():
    """One token: near and far are a call each, and see every key once."""
    counting = Counting([])
    q, k, v = tensors(700)
    (segment,) = whole(700)
    last = replace(segment, queries=slice(0, 1), positions=segment.positions[-1:])
    made = plan(METHODS["rerope"], [last], LAYOUTS[0])
    rotated = made.key_rotation(last, made.spans[1]).apply(k, LAYOUTS[0])
    out = whole_span_attention(
        q[:, :, -1:], k, v, made, 0.3, Kernels(counting, counting), rotated_keys=lambda *_: (rotated, 0)
    )
    assert [shape for shape, _, _ in counting.calls] == ["full", "full"]
    assert sum(keys for _, _, keys in counting.calls) == 700
    wanted = reference_attention(q[:, :, -1:], k, v, made, 0.3)
    assert torch.allclose(out, wanted, atol=1e-6)


LAYOUTS_OF_HEADS = [
    RotaryLayout(32),
    RotaryLayout(32, interleaved=True),
    RotaryLayout(16, start=8),
    RotaryLayout(32, backward=True),
    RotaryLayout(16, interleaved=True, start=4, backward=True),
]


def check_fused(device):
    """Rotating and merging by Triton against plain PyTorch, with every layout, gain and stride."""
    torch.manual_seed(0)
    for layout in LAYOUTS_OF_HEADS:
        x = torch.randn(2, 50, 3, 40, device=device).transpose(1, 2)
        angles = torch.randn(50, layout.rotary_dim // 2, dtype=torch.float64)
        angles[:, :2] = 0
        trimmed = Rotation.by(angles)
        every = Rotation.on_device(lambda begin, end, angles=angles: angles[begin:end].to(device), 50)
        for rotation in (trimmed.to(x.device), every, None):
            for gain in (None, torch.rand(50, device=device) + 0.5):
                wanted = x if rotation is None else rotation.apply(x, layout)
                wanted = wanted if gain is None else wanted * gain[:, None]
                found = fused.rotate(x, rotation, layout, gain)
                assert torch.allclose(found, wanted, atol=1e-5), layout
    parts = [torch.randn(4, 70, 9, 20, device=device).transpose(1, 2) for _ in range(2)]
    lses = [torch.randn(4, 9, 70, device=device) for _ in range(2)]
    parts[0][:, :, :5], lses[0][:, :, :5] = 0, -torch.inf
    shares = torch.softmax(torch.stack(lses), 0)[..., None]
    wanted = parts[0] * shares[0] + parts[1] * shares[1], torch.logaddexp(*lses)
    for is_reversed in (False, True):
        out, lse = parts[0].clone(), lses[0].clone()
        part, part_lse = (x.flip(2) if is_reversed else x for x in (parts[1], lses[1]))
        fused.merge_(out, lse, part, part_lse, is_reversed=is_reversed)
        assert torch.allclose(out, wanted[0], atol=1e-5) and torch.allclose(lse, wanted[1], atol=1e-5)
    assert torch.equal(fused.reverse_tokens(parts[0]), parts[0].flip(2))
    layout, total = RotaryLayout(16, start=2), torch.randn(1, 9, 300, 20, device=device)
    blocks = total.as_strided((4, 9, 70, 20), (75 * 20, *total.stride()[1:]), 3 * 20)
    angles = torch.randn(300, 8, dtype=torch.float64)
    rotation, gain = (
        Rotation.on_device(lambda begin, end: angles[begin:end].to(device), 300),
        torch.rand(300, device=device),
    )
    for rotation_part, factor in ((rotation, gain), (rotation, None), (None, None)):
        for is_reversed in (False, True):
            wanted = blocks.clone()
            for index, into in enumerate(wanted):
                at = slice(75 * index, 75 * index + 70)
                block = parts[1][index : index + 1].flip(2) if is_reversed else parts[1][index : index + 1]
                into += fused.rotate(
                    block,
                    rotation_part and rotation_part.part(at.start, at.stop),
                    layout,
                    None if factor is None else factor[at],
                )[0]
            more = {"step": 75, "is_reversed": is_reversed}
            fused.add_rotated_(blocks, parts[1], rotation_part, layout, factor, **more)
            assert torch.allclose(blocks, wanted, atol=1e-5)


def test_fused_without_triton():
    check_fused("cpu")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which CPU builds of torch come without")
def test_fused_in_tritons_interpreter():
    code = (
        "import test_kernels as t; from rope_scaling.attention import fused;"
        "fused._use_triton = lambda x: True; t.check_fused('cpu')"
    )
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), *sys.path])
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}, check=True
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here")
class TestOnAGpu:
    def test_fused(self):
        assert fused._works()
        check_fused("cuda")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(("count", "key_count", "width"), [(32, 8, 128), (9, 3, 64), (4, 4, 80), (8, 1, 256)])
    def test_kernels_are_their_twins(self, dtype, count, key_count, width):
        like = heads("cuda", dtype, count, key_count, width)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = choose_kernels(*like, like[1], gradients=width < 256)
        assert found is not None
        for kernel, twin in ((Flash(), FLASH), (CuDnn(), CUDNN), (Efficient(), EFFICIENT)):
            if kernel not in (found.large, found.small):
                continue
            for shape in sorted(kernel.shapes):
                keys = {"full": 100, "band": 190}.get(shape, 64)
                q, k, v = (
                    torch.randn(2, tokens, x.shape[1], width, device="cuda", dtype=dtype).transpose(1, 2)
                    for x, tokens in zip((*like, like[1]), (64, keys, keys), strict=True)
                )
                out, lse = kernel.forward(q, k, v, shape, 0.1)
                wanted, wanted_lse = twin.forward(*(x.float() for x in (q, k, v)), shape, 0.1)
                assert torch.allclose(out.float(), wanted, atol=0.02)
                assert torch.allclose(lse, wanted_lse, atol=0.01)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("name", METHODS)
    def test_whole_spans(self, name, dtype, monkeypatch):
        monkeypatch.setattr(kernels, "_LARGE", 48)
        length = 700
        q, k, v = tensors(length, head_dim=32, dtype=torch.float32)
        q, k = (by_model(x, LAYOUTS[0]) for x in (q, k))
        made = plan(METHODS[name], whole(length), LAYOUTS[0])
        wanted = reference_attention(q, k, v, made, 0.3)
        made = replace(made, device=torch.device("cuda"), memo={})
        q, k, v = (x.to("cuda", dtype) for x in (q, k, v))
        found = whole_span_attention(q, k, v, made, 0.3, choose_kernels(q, k, v, False))
        assert torch.allclose(found.cpu().float(), wanted, atol=0.06 if dtype == torch.bfloat16 else 1e-4)


def test_twins_stand_for_every_choice():
    assert {kernels.large.name for kernels in TWINS.values()} == {Flash.name, CuDnn.name, Efficient.name}
