"""The dtype that a model is loaded in follows the checkpoint and the processor."""

import json
import os
import platform
import subprocess
import sys
import timeit
from functools import partial

import pytest
import torch
from conftest import make_model

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.hf.dtype import is_fast
from rope_scaling.hf.loading import load_model, load_tokenizer


NEVER_FAST = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86")


def on_avx2(code, cwd):
    """What a process prints that has no more of the processor than AVX2, on its two streams."""
    environment = os.environ | NEVER_FAST | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@on_x86
def test_auto_on_a_processor_without_bfloat16(tmp_path):
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        make_model("llama").to(dtype).save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        del config["dtype"]
        make_model("llama").to(dtype).save_pretrained(tmp_path / f"{name}, as weights alone know")
        (tmp_path / f"{name}, as weights alone know" / "config.json").write_text(json.dumps(config))
    code = """
from pathlib import Path
from rope_scaling.hf.loading import load_model
for folder in sorted(Path().iterdir()):
    for dtype in ("auto", "stored", "bfloat16"):
        print(folder.name.partition(",")[0], dtype, load_model(f"./{folder}", dtype).dtype)
"""
    printed, said = on_avx2(code, tmp_path)
    loaded = [line.split() for line in printed.splitlines()]
    assert len(loaded) == 18
    for stored, asked, found in loaded:
        assert found == "torch." + {"auto": "float32", "stored": stored, "bfloat16": "bfloat16"}[asked]
    lines = [line for line in said.splitlines() if "rope-scaling: " in line]
    assert len(lines) == 2, said
    assert "is in bfloat16, which this processor is slow in, so it is loaded in float32" in lines[0]
    assert "is in float16" in lines[1]


@on_x86
def test_commands_measure_in_what_is_fast_and_write_what_was_stored(tmp_path):
    make_model("llama", vocab_size=4096).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    load_tokenizer("demo").save_pretrained(tmp_path / "model")
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(f"the {name} of a recipe, again and again\n" * 60)
    (tmp_path / "own.yaml").write_text(
        "model: ./model\npatch: {method: rerope}\ndata: {source: ./train.txt, sequence_length: 64}\n"
        "training: {max_steps: 1, report_to: none}\n"
        "evaluation: {source: ./test.txt, lengths: [1x], max_documents: 1}\n"
    )
    code = """
from rope_scaling.cli.main import main
for command in (
    "evaluate --model ./model --data test.txt --method yarn --lengths 1x,2x --output evaluated",
    "export ./model --target sglang --method yarn --factor 2 --out exported",
    "finetune own.yaml --output-dir trained",
):
    try:
        main(command.split())
    except SystemExit as done:
        assert done.code == 0, command
"""
    _, said = on_avx2(code, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "evaluated" / "rows.jsonl").read_text().splitlines()]
    assert {row["dtype"] for row in rows} == {"float32"}
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["dtype"] == "bfloat16"
    assert said.count("rope-scaling: ") == 1
    trained = [json.loads(line) for line in (tmp_path / "trained" / "rows.jsonl").read_text().splitlines()]
    before, after = ([row["nll"] for row in trained if row["stage"] == stage] for stage in ("before", "after"))
    assert before != after[: len(before)]


def test_auto_follows_the_checkpoint_onto_a_processor_that_is_fast_in_it(tmp_path):
    fast = is_fast(torch.bfloat16)
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == (torch.bfloat16 if fast else torch.float32)
    assert load_model(str(tmp_path), "stored").dtype == torch.bfloat16
    assert is_fast(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_counts_as_fast_is_not_slow(dtype):
    """Products take 0.1 to 0.6 times as long as in float32 where a dtype is fast, and 3 to 80 where it is not."""
    if not is_fast(dtype):
        pytest.skip(f"this processor is slow in {dtype}")
    seconds = {}
    for one in (dtype, torch.float32):
        matrix = torch.ones(256, 256, dtype=one)
        seconds[one] = min(timeit.repeat(partial(torch.mm, matrix, matrix), number=1, repeat=20))
    assert seconds[dtype] < 2 * seconds[torch.float32]


def test_config_and_weights_come_from_the_same_place(tmp_path):
    """Two revisions in a cache of the hub that is not the usual one."""
    repository = tmp_path / "models--org--name"
    for name, commit, method in (("main", "a" * 40, "rerope"), ("older", "b" * 40, "log_n")):
        folder = repository / "snapshots" / commit
        rope_scaling.patch(make_model("llama"), method).save_pretrained(folder)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    for arguments, method in (({}, "rerope"), ({"revision": "older"}, "log_n")):
        model = rope_scaling.from_pretrained("org/name", cache_dir=tmp_path, **arguments)
        assert f": {method}" in str(rope_scaling.describe(model))
        assert f": {method}" in str(rope_scaling.describe(load_model("org/name", cache_dir=tmp_path, **arguments)))


def test_an_adapter_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "demo"}')
    with pytest.raises(RopeScalingError, match=r"is an adapter. Load it with `rope_scaling.load_adapter`"):
        rope_scaling.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(RopeScalingError, match=r"The `adapter_config.json` of .* is not valid"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RopeScalingError, match="names no base model"):
        load_model(str(tmp_path))
