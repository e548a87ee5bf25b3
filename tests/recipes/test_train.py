"""Whole runs on a tiny model: what they leave, how they stop, how they go on, and that launches agree."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests
import torch
from conftest import _COMMON
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.eval.files import read_rows
from rope_scaling.hf.loading import load_tokenizer
from rope_scaling.hf.patch import patch_record
from rope_scaling.recipes import checkpoints, measure, processes, train
from rope_scaling.recipes.checkpoints import MARKER
from rope_scaling.recipes.config import read_recipe
from rope_scaling.recipes.train import finetune


WORDS = ["one", "two", "three", "import", "return", "self", "value", "(", ")", ":", "\n"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model of trained length 64 with a tokenizer, texts to train and to measure on, and a recipe for them."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = LlamaConfig(**_COMMON | {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    load_tokenizer("demo").save_pretrained(folder / "model")
    for split, count in (("train", 12), ("test", 3)):
        (folder / split).mkdir()
        for index in range(count):
            text = " ".join(WORDS[(index * 7 + i * i) % len(WORDS)] for i in range(1200))
            (folder / split / f"{index}.txt").write_text(text)
    (folder / "own.yaml").write_text(
        f"""
model: {folder / "model"}
patch: {{method: yarn, factor: 4}}
data: {{source: {folder / "train"}, sequence_length: 128}}
chunk_size: 64
training:
  max_steps: 6
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  lr_scheduler_type: constant
  weight_decay: 0.1
  logging_steps: 1
  save_steps: 2
  report_to: none
evaluation: {{source: {folder / "test"}, lengths: [1x, 2x, 4x]}}
"""
    )
    return folder


def run(place, output, *overrides, resume=False):
    return finetune(read_recipe(str(place / "own.yaml"), overrides), "own", output, resume)


def launch(place, output, *arguments, launcher=(), **environment):
    command = [
        sys.executable,
        *launcher,
        "-m",
        "rope_scaling.recipes.train",
        "--config",
        str(place / "own.yaml"),
        *arguments,
    ]
    return subprocess.Popen(
        [*command, "--output-dir", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
    )


def losses(output):
    """The logged training losses of a run, by step."""
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def test_a_run_leaves_a_model_that_stands_alone(place, tmp_path):
    rows = run(place, tmp_path / "out", "evaluation.every=3", "training.report_to=tensorboard")
    assert rows == read_rows(tmp_path / "out" / "rows.jsonl")
    assert {row["stage"] for row in rows} == {"unpatched", "before", "after"}
    assert rows[0]["trained_tokens"] == 6 * 4 * 128 and rows[0]["steps"] == 6 and rows[0]["target_length"] == 256
    found = {(row["stage"], row["against"], row["measure"], row["to"]): row for row in rows}
    # It learns: the words are few, and a random model knows none of them.
    assert found["after", "before", "prefix", 256]["difference_high"] < -1
    code = f"""
import sys
sys.modules["rope_scaling"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
print(model.config.max_position_embeddings, model.config.use_cache, model.model.rotary_emb.rope_type)
print(AutoTokenizer.from_pretrained({str(tmp_path / "out")!r}).model_max_length)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["256", "True", "yarn", "256"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "read 256 tokens instead of 64" in card and "| (1x,2x] |" in card and "max_steps: 6" in card
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    logged = [row for row in state["log_history"] if "eval_nll_(1x,2x]" in row]
    assert [row["step"] for row in logged] == [3, 6]
    assert all("memory_gb" in row for row in state["log_history"])
    curves = EventAccumulator(str(next((tmp_path / "out").rglob("events.out.tfevents.*")).parent)).Reload()
    assert [point.step for point in curves.Scalars("eval/nll_(1x,2x]")] == [3, 6]
    assert {point.step: point.value for point in curves.Scalars("train/loss")} == pytest.approx(
        losses(tmp_path / "out")
    )
    with pytest.raises(RopeScalingError, match="is finished. Give another"):
        run(place, tmp_path / "out")


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.layout=pose", "data.sequence_length=64", "data.text_length=128"],
        ["data.layout=packed"],
        ["data.layout=packed", "data.short_share=0.5", "data.short_length=32"],
        ["data.layout=packed", "data.streaming=true", "data.short_share=0.5", "data.short_length=32"],
        ["data.short_share=0.5", "data.short_length=32"],
        ["s2_group_size=32", "lora={modules_to_save: [embed_tokens, norm]}", "train_dtype=bfloat16"],
        ["patch={method: angle_clip, target_length: 256}", "activation_checkpointing=true"],
        ["patch={method: rerope+log_n, target_length: 256}", "lora={}"],
        ["patch={method: drope, target_length: 256}", "data.sequence_length=64", "chunk_size=null"],
        ["patch={}", "data.sequence_length=64"],
        ["patch={}", "data.sequence_length=64", "lora={}"],
    ],
    ids=lambda overrides: " ".join(overrides)[:60],
)
def test_every_kind_of_run(place, tmp_path, overrides):
    rows = run(place, tmp_path / "out", *overrides, "training.max_steps=2")
    after = [row for row in rows if row["stage"] == "after" and row["against"] == "before"]
    assert any(row["difference"] != 0 for row in after)


def test_an_adapter_and_its_checkpoints_carry_the_patch(place, tmp_path):
    run(place, tmp_path / "out", "lora={}", "training.max_steps=2")
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        model = rope_scaling.load_adapter(folder)
        assert patch_record(model)["target_length"] == 256


def test_accumulation_and_two_processes_agree_with_one(place, tmp_path):
    """The same batches of 4 at once, as 2 x 2 accumulated, and as 2 x 2 on two processes, step by step."""
    shared = ["training.save_steps=6"]
    small = ["training.per_device_train_batch_size=2"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launches = {
        "one": launch(place, tmp_path / "one", *shared),
        "accumulated": launch(
            place, tmp_path / "accumulated", *shared, *small, "training.gradient_accumulation_steps=2"
        ),
        "two": launch(place, tmp_path / "two", *shared, *small, launcher=torchrun),
    }
    for process in launches.values():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    wanted = losses(tmp_path / "one")
    assert sorted(wanted) == [1, 2, 3, 4, 5, 6]
    for name in ("accumulated", "two"):
        found = losses(tmp_path / name)
        assert found.keys() == wanted.keys()
        for step, loss in found.items():
            assert loss == pytest.approx(wanted[step], abs=2e-4), (name, step)


@pytest.mark.parametrize(
    ("layout", "streaming", "workers"),
    [("plain", False, 0), ("plain", True, 0), ("pose", False, 2)],
)
def test_killed_and_resumed_it_is_the_run_that_was_not(place, tmp_path, layout, streaming, workers):
    """`kill -9` some time after the first checkpoint; then the same losses, step by step, as without."""
    overrides = [f"data.layout={layout}", "data.sequence_length=64", "training.max_steps=40"]
    overrides += [f"training.dataloader_num_workers={workers}"]
    overrides += [f"data.streaming={str(streaming).lower()}", "training.learning_rate=1e-3"]  # no chaos from rounding
    run(place, tmp_path / "whole", *overrides)
    output = tmp_path / "killed"
    process = launch(place, output, *overrides)
    give_up = time.monotonic() + 120
    while not list(output.glob(f"checkpoint-*/{MARKER}")):
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (output / "rows.jsonl").exists()
    rows = run(place, output, *overrides, resume=True)
    wanted, found = losses(tmp_path / "whole"), losses(output)
    assert len(wanted) == 40 and found == pytest.approx(wanted, abs=1e-4)
    assert rows[0]["frequencies"] == read_rows(tmp_path / "whole" / "rows.jsonl")[0]["frequencies"]


@pytest.mark.parametrize(
    ("layout", "streaming", "workers"),
    [("plain", True, 0), ("pose", False, 0), ("pose", False, 2), ("pose", True, 2)],
)
def test_resumed_exactly(place, tmp_path, layout, streaming, workers):
    """From a checkpoint in the second epoch: the same losses and weights, to the bit."""
    overrides = [f"data.layout={layout}", "data.sequence_length=64", "data.max_sequences=12"]  # 3 steps an epoch
    overrides += [f"data.streaming={str(streaming).lower()}", f"training.dataloader_num_workers={workers}"]
    whole = tmp_path / "whole"
    run(place, whole, *overrides, "training.save_total_limit=9")
    again = tmp_path / "again"
    again.mkdir()
    (whole / "checkpoint-4").rename(again / "checkpoint-4")
    (again / "checkpoint-5").mkdir()  # interrupted while being saved: no marker
    run(place, again, *overrides, "training.save_total_limit=9", resume=True)
    assert losses(again) == losses(whole)
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (whole, again))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    facts = [read_rows(folder / "rows.jsonl")[0]["frequencies"] for folder in (whole, again)]
    assert facts[0] == facts[1]


def test_another_scaling_is_not_resumed(place, tmp_path):
    run(place, tmp_path / "out", "training.max_steps=2")
    (tmp_path / "out" / "rows.jsonl").unlink()
    for override in ("patch.factor=2", "patch.method=ntk", "data.sequence_length=64"):
        with pytest.raises(RopeScalingError, match="belongs to another run"):
            run(place, tmp_path / "out", override, resume=True)
    with pytest.raises(RopeScalingError, match="not empty. Give a new one, or add `--resume`"):
        run(place, tmp_path / "out")
    with pytest.raises(RopeScalingError, match="no whole checkpoint"):
        run(place, tmp_path / "other", resume=True)


def test_weights_that_moved_are_not_resumed(place, tmp_path):
    """As when the folder is trained on, or a hub revision such as `main` moves: adapters belong to their base."""
    base = shutil.copytree(place / "model", tmp_path / "base")
    run(place, tmp_path / "out", f"model={base}", "training.max_steps=1")
    (tmp_path / "out" / "rows.jsonl").unlink()
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    model.save_pretrained(base)
    with pytest.raises(RopeScalingError, match="belongs to another run \\(weights: there"):
        run(place, tmp_path / "out", f"model={base}", "training.max_steps=2", resume=True)


def test_a_refused_run_leaves_nothing(place, tmp_path):
    for override in (
        "data.sequence_length=300",
        f"data.source={place}/test/missing",
        "patch.method=yran",
        "lora.target_modules=[q]",
    ):
        with pytest.raises(RopeScalingError):
            run(place, tmp_path / "out", override)
        assert not (tmp_path / "out").exists()


def test_stopped_before_its_first_step_a_run_starts_again(place, tmp_path):
    (tmp_path / "out" / "curves").mkdir(parents=True)
    assert run(place, tmp_path / "out", "training.max_steps=1")


def test_a_loss_that_is_not_finite_stops_with_the_step(place, tmp_path):
    with pytest.raises(
        RopeScalingError, match=r"loss at step [2-6] is not finite.*Try a lower `training.learning_rate`"
    ):
        run(place, tmp_path / "out", "training.learning_rate=1e30", "training.max_grad_norm=1e30")


def test_a_full_disk_leaves_the_last_checkpoint(place, tmp_path, monkeypatch):
    save = Trainer._save_checkpoint

    def full(self, *arguments, **more):
        save(self, *arguments, **more)
        if self.state.global_step > 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "_save_checkpoint", full)
    with pytest.raises(
        RopeScalingError, match="Saving failed at step 4: .*No space left.* Make room .* add `--resume`"
    ):
        run(place, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert len(run(place, tmp_path / "out", resume=True)) > 0


@pytest.mark.parametrize("room", [0.5, 1.5], ids=["weights do not fit", "optimizer does not fit"])
def test_a_file_that_cannot_be_written(place, tmp_path, room):
    """A limit on the size of files, met by what really writes them."""
    size = int(room * (place / "model" / "model.safetensors").stat().st_size)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(
            RopeScalingError, match="Saving failed at step 2: .* GB free. There is no whole checkpoint"
        ):
            run(place, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


class Failing(torch.utils.data.Dataset):
    """Rows that can be read once, and a few of them a second time."""

    def __init__(self, rows, error):
        self.rows, self.error, self.reads = rows, error, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads > len(self) + 9:
            raise self.error
        return self.rows[index]


@pytest.mark.parametrize(
    ("error", "remedy", "workers"),
    [
        (requests.ConnectionError("Connection reset by peer"), "Check the connection.", 0),
        (requests.ConnectionError("Connection reset by peer"), "Check the connection.", 1),
        (RopeScalingError("Reading the dataset 'org/texts' failed."), "stopped at step 1: Reading the dataset", 1),
        (FileNotFoundError(2, "No such file or directory", "shard-7.bin"), "Put the file back.", 0),
        (OSError(28, "No space left on device"), "Make room on the disk.", 0),
        (torch.OutOfMemoryError("CUDA out of memory."), "a smaller `training.per_device_train_batch_size`", 0),
    ],
)
def test_what_stops_training_is_named_as_what_it_is(place, tmp_path, monkeypatch, error, remedy, workers):
    read, handler = train.training_data, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "training_data", lambda *given: Failing(read(*given), error))
    overrides = ["data.max_sequences=24", f"training.dataloader_num_workers={workers}"]
    overrides += ["training.save_steps=1", "training.dataloader_prefetch_factor=1"][: 1 + workers]
    with pytest.raises(RopeScalingError, match=r"Training stopped at step \d: .*add `--resume`") as caught:
        run(place, tmp_path / "out", *overrides)
    message = str(caught.value)
    assert error.args[-1] in message or str(error) in message
    assert remedy in message and "Saving" not in message and "Traceback" not in message
    assert signal.getsignal(signal.SIGINT) is handler


def test_no_memory_to_measure_in(place, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(measure, "nll_curve", full)
    with pytest.raises(RopeScalingError, match=r"\(unpatched\) ran out of memory: .* smaller `evaluation.chunk_size`"):
        run(place, tmp_path / "out")


def test_an_error_of_the_code_is_not_dressed_up(place, tmp_path, monkeypatch):
    read = train.training_data
    monkeypatch.setattr(train, "training_data", lambda *given: Failing(read(*given), IndexError("list index")))
    with pytest.raises(IndexError, match="list index"):
        run(place, tmp_path / "out", "data.max_sequences=24")


def test_ctrl_c_saves_and_says_how_to_go_on(place, tmp_path):
    process = launch(place, tmp_path / "out", "training.max_steps=4000", "training.save_steps=1000")
    for line in process.stdout:
        if "'loss'" in line:
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Stopped and saved at step" in errors and "`--resume` goes on" in errors and "Traceback" not in errors
    assert list((tmp_path / "out").glob(f"checkpoint-*/{MARKER}"))


def test_a_signal_that_reaches_one_process_stops_all(place, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    overrides = ["training.max_steps=4000", "training.save_steps=1000", "training.ddp_timeout=60"]
    process = launch(place, tmp_path / "out", *overrides, launcher=torchrun)
    for line in process.stdout:
        if "'loss'" in line:
            (second,) = [one for one in psutil.Process(process.pid).children() if one.environ().get("RANK") == "1"]
            second.send_signal(signal.SIGINT)
            break
    try:
        _, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # and with it the processes that wait for each other
        raise
    assert errors.count("Stopped and saved at step") == 2
    (checkpoint,) = (tmp_path / "out").glob(f"checkpoint-*/{MARKER}")
    assert f"at step {checkpoint.parent.name.removeprefix('checkpoint-')} of" in errors


def two_processes(place, mode, *arguments):
    script = str(Path(__file__).with_name("two_processes.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*torchrun, script, mode, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_measuring_may_take_longer_than_collectives_wait(place, tmp_path):
    """A document takes 6 s in the first process, and collectives give up after 10."""
    overrides = ["training.max_steps=2"]
    two_processes(place, "slow", "--config", place / "own.yaml", *overrides, "--output-dir", tmp_path / "two")
    rows = read_rows(tmp_path / "two" / "rows.jsonl")
    alone = run(place, tmp_path / "one", "training.max_steps=2", "training.per_device_train_batch_size=8")
    for row, other in zip(rows, alone, strict=True):
        assert row["documents"] == 3 and row["nll"] == pytest.approx(other["nll"], abs=2e-3)


@pytest.mark.parametrize("method", ["yarn", "rerope"])
def test_only_the_first_process_loads_what_is_sharded(place, method):
    patch = "{method: yarn, factor: 4}" if method == "yarn" else "{method: rerope, target_length: 256}"
    chunks = "null" if torch.__version__ < (2, 13) else "64"
    out = two_processes(place, "sharded", place / "own.yaml", f"patch={patch}", f"chunk_size={chunks}")
    first, second = sorted(
        (json.loads(line) for line in out.splitlines() if line.startswith("{")), key=lambda one: one["rank"]
    )
    assert first["loss"] == second["loss"] == pytest.approx(first["wanted"], abs=1e-5)
    assert first["finite"] and second["finite"] and first["held"] > 0
    assert second["held"] == 0


def test_the_older_fsdp_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "is_fsdp_enabled", lambda: True)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(RopeScalingError, match="Set `fsdp_version: 2` in the accelerate config"):
        processes.only_first_loads()


def test_a_model_that_arrives_patched(place, tmp_path):
    """The recipe's own patch goes on; another is refused."""
    model = rope_scaling.patch(AutoModelForCausalLM.from_pretrained(place / "model"), "yarn", factor=4)
    model.save_pretrained(tmp_path / "patched")
    load_tokenizer("demo").save_pretrained(tmp_path / "patched")
    arrived = [f"model={tmp_path / 'patched'}", "training.max_steps=1"]
    with pytest.raises(RopeScalingError, match="saved under another patch than the recipe's"):
        run(place, tmp_path / "one", *arrived, "patch={method: ntk, factor: 2}")
    assert run(place, tmp_path / "two", *arrived, "patch={}")[0]["target_length"] == 256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here")
@pytest.mark.parametrize("launcher", ["single_gpu", "fsdp2"])
def test_on_a_gpu(place, tmp_path, launcher):
    file = Path(checkpoints.__file__).with_name("accelerate") / f"{launcher}.yaml"
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes=1"]
    process = launch(place, tmp_path / "out", "training.bf16=true", launcher=accelerate)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert read_rows(tmp_path / "out" / "rows.jsonl")
