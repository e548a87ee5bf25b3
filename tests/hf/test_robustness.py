"""Random configs, methods and records: nothing changes that must not, and nothing fails but with our own error."""

import copy
import dataclasses
import json
import logging
import math
import pickle
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import close, make_model, strong, token_ids
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import rope_scaling
from rope_scaling import METHODS, RopeScalingError
from rope_scaling.hf.record import method_from_record
from rope_scaling.hf.save_guard import is_guarded, unwarned
from rope_scaling.methods import to_dict
from rope_scaling.spans.sliding_window import SlidingWindow


FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LENGTH = 40
NUMBERS = st.one_of(
    st.integers(-3, 4096), st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0, 1, 2, 4.0, 8.0, 1e30])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["name", "methods", "format", "factor", "pretrained", "x"]), inner, max_size=4
        ),
    ),
    max_leaves=12,
)


@st.composite
def models(draw):
    """A tiny random model of a Llama-like family, of any shape."""
    heads = draw(st.sampled_from([1, 2, 4]))
    theta = draw(st.sampled_from([10.0, 1e4, 5e5, 1e8]))
    scaled = draw(st.sampled_from(["default", "linear", "yarn", "llama3"]))
    more = {"factor": draw(st.sampled_from([1.0, 2.0, 3.7]))} if scaled != "default" else {}
    if scaled in ("yarn", "llama3"):
        more["original_max_position_embeddings"] = draw(st.sampled_from([8, 16]))
    if scaled == "llama3":
        more |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = getattr(
        transformers, draw(st.sampled_from(["LlamaConfig", "MistralConfig", "Qwen3Config", "PhiConfig"]))
    )(
        vocab_size=64,
        hidden_size=heads * 16,
        intermediate_size=24,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([n for n in (1, 2, 4) if n <= heads and heads % n == 0])),
        max_position_embeddings=draw(st.sampled_from([16, 17, 33, 64])),
        rope_parameters={"rope_type": scaled, "rope_theta": theta, **more},
        initializer_range=0.15,
        pad_token_id=0,
    )
    torch.manual_seed(draw(st.integers(0, 3)))
    return AutoModelForCausalLM.from_config(config).eval()


@st.composite
def arguments(draw):
    """A method by name, with some of its fields set to anything."""
    name = draw(st.sampled_from(sorted(METHODS)))
    fields = {field.name for field in dataclasses.fields(METHODS[name])} | {"name"}
    values = st.one_of(
        NUMBERS, st.none(), st.booleans(), st.sampled_from(["yarn", "", "soft"]), st.lists(NUMBERS, max_size=8)
    )
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True)) if fields else []
    given_values = {key: draw(values) for key in chosen}
    if "factor" in fields and draw(st.integers(0, 3)):
        given_values["factor"] = draw(st.sampled_from([1.5, 2, 4.0, 16]))
    if draw(st.integers(0, 4)) == 0:
        given_values["target_length"] = draw(st.one_of(NUMBERS, st.sampled_from([64, 128])))
    return name, given_values


@torch.no_grad()
def logits(model):
    return model(token_ids(LENGTH), use_cache=False).logits


def refusal(action, *given_values, **named):
    """Our own error's message, or `None` where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action(*given_values, **named)
    except RopeScalingError as error:
        return str(error)
    return None


def state(model):
    """What a failed patch, or a patch taken back, must leave."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("architectures", "dtype")}
    return json.dumps(config, sort_keys=True, default=str), model.config._attn_implementation


WHOLE = [
    (name, f.name) for name, cls in METHODS.items() for f in dataclasses.fields(cls) if f.type in ("int", "int | None")
]


@pytest.mark.parametrize(("name", "field"), WHOLE)
def test_a_whole_number_may_come_as_a_float(name, field):
    """As JSON and YAML write some: the same model, or the same refusal."""
    found = []
    for value in (4, 4.0):
        model = make_model("llama")
        refused = refusal(rope_scaling.patch, model, name, **{field: value})
        found.append(refused.replace("4.0", "4") if refused else logits(model))
    assert found[0] == found[1] if isinstance(found[0], str) else torch.equal(*found)


@FEW
@given(model=models(), call=arguments())
def test_patch_save_load_unpatch(model, call):
    name, values = call
    before, settings_before = logits(model), state(model)
    if refused := refusal(rope_scaling.patch, model, name, **values):
        assert torch.equal(logits(model), before) and state(model) == settings_before
        assert 20 < len(refused) < 2000
        return
    after = logits(model)
    assert after.isfinite().all() and str(rope_scaling.describe(model))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert close(logits(rope_scaling.from_pretrained(folder)), after)
        if is_guarded(model.config):
            with pytest.raises(Exception, match=r"rope_scaling\.from_pretrained"):
                AutoModelForCausalLM.from_pretrained(folder)
        else:
            assert close(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), after)
    assert torch.equal(logits(rope_scaling.unpatch(model)), before)
    assert state(model) == settings_before


ANYTHING = [
    *(None, True, 0, -1, 1, 3.5, math.nan, math.inf, 10**400, 1e300, 1e-300, "", "yarn", {}, {"name": "yarn"}),
    *(
        [],
        [1.0] * 8,
        [0] * 8,
        ["a"],
        (1,),
        [math.nan] * 8,
        [1e300] * 8,
        [-1.0] * 8,
        [[1]],
        rope_scaling.Yarn(factor=2.0),
    ),
]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_field_takes_what_it_can_compute_with_and_refuses_the_rest(name, llama):
    before = logits(llama)
    known = {field.name for field in dataclasses.fields(METHODS[name])}
    usual = {"factor": 4.0, "long_factor": [2.0] * 8, "value": 1.1}
    for field in known:
        for value in ANYTHING:
            values = {**{key: value for key, value in usual.items() if key in known}, field: value}
            if not refusal(rope_scaling.patch, llama, name, **values):
                assert logits(llama).isfinite().all(), values
                rope_scaling.unpatch(llama)
    assert torch.equal(logits(llama), before)


@FEW
@given(record=JSON, data=st.data())
def test_any_record_in_a_config_is_taken_or_refused(record, data):
    model = make_model("llama")
    good = {
        "format": 3,
        "methods": [to_dict(rope_scaling.Yarn(factor=4.0))],
        "target_length": 256,
        "layer_types": None,
        "original_max_position_embeddings": None,
        "pretrained": {"max_position_embeddings": 64, "rope_parameters": copy.deepcopy(model.config.rope_parameters)},
    }
    if isinstance(record, dict) and data.draw(st.booleans()):
        record = {**good, **record}
    elif data.draw(st.booleans()):
        record = {**good, data.draw(st.sampled_from(sorted(good))): record}
    model.config.rope_scaling_patch = record
    for action in (rope_scaling.patch, rope_scaling.unpatch, rope_scaling.describe, rope_scaling.diagnose):
        refusal(action, copy.deepcopy(model))


@FEW
@given(
    parameters=JSON, key=st.sampled_from(["rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings"])
)
@example(parameters={"name": {}}, key="rope_scaling")
@example(parameters={"factor": {}}, key="rope_scaling")
def test_any_settings_in_a_file_are_diagnosed_or_refused(parameters, key):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        key: parameters,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        refusal(lambda: str(rope_scaling.diagnose(folder)))


HOSTILE = {
    "deep": lambda: json.loads("[" * 500 + "]" * 500),
    "wide": lambda: [1.0] * 100_000,
    "not a number": lambda: math.nan,
    "infinite": lambda: math.inf,
    "code": lambda: "__import__('os').system('touch pwned')",
    "path": lambda: "../../../../etc/passwd",
    "huge": lambda: 10**400,
}


@pytest.mark.parametrize("place", ["factor", "name", "rope_theta", "target_length", "layer_types", "long_factor"])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_values_are_refused_quickly(what, place, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = HOSTILE[what]()
    rope_scaling.patch(llama, "longrope", factor=4, long_factor=[2.0] * 8)
    llama.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    record = config["rope_scaling_patch"]
    if place in ("factor", "name", "long_factor"):
        record["methods"][0][place] = value
    elif place == "rope_theta":
        record["pretrained"]["rope_parameters"][place] = value
    else:
        record[place] = value
    path.write_text(json.dumps(config))
    started = time.monotonic()
    assert len(refusal(rope_scaling.from_pretrained, tmp_path / "model")) < 2000
    assert not rope_scaling.diagnose(str(tmp_path / "model")).healthy
    assert time.monotonic() - started < 10
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("method", ["yarn", "self_extend"])
def test_through_everything_that_is_done_to_a_model(method, tmp_path):
    """Patched, wrapped, unwrapped, moved, copied, pickled, compiled, trained, saved: still patched, still verified."""
    plain, wanted = strong("llama"), rope_scaling.patch(strong("llama"), method, **_FACTORS[method])
    model = rope_scaling.patch(plain, method, **_FACTORS[method])
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=True))
    accelerator = Accelerator(cpu=True)
    model = accelerator.unwrap_model(accelerator.prepare(model)).unload()
    steps = [
        lambda m: m.to(torch.bfloat16).to(torch.float32),
        lambda m: m.to("cpu").train().eval().requires_grad_(False),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.compile(m, backend="eager"),
    ]
    rounded = logits(steps[0](copy.deepcopy(wanted)))
    assert close(logits(model), logits(wanted))
    for step in steps:
        model = step(model)
        assert close(logits(model), rounded) and rope_scaling.diagnose(model).healthy
    model = model._orig_mod.requires_grad_(True)
    rows = [{"input_ids": row, "labels": row} for row in token_ids(32, rows=2)]
    settings_of_training = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, learning_rate=0.0
    )
    Trainer(model, settings_of_training, train_dataset=rows).train()
    assert rope_scaling.diagnose(model).healthy and close(logits(model.eval()), rounded)
    assert close(logits(rope_scaling.from_pretrained(tmp_path / "checkpoint-1")), rounded)


_FACTORS = {"yarn": {"factor": 4}, "self_extend": {}}


def test_a_record_holds_what_was_set_to_none(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(SlidingWindow):
        name: ClassVar[str] = "own"
        window: int | None = 8
        kept: int | None = None

    monkeypatch.setitem(METHODS, "own", Own)
    assert to_dict(Own()) == {"name": "own", "window": 8, "num_sinks": 0}
    for method in (Own(), Own(window=None), Own(kept=1)):
        assert method_from_record(json.loads(json.dumps(to_dict(method)))) == method


def test_two_models_two_patches_two_threads():
    wanted = {}
    for name in ("self_extend", "yarn", "rerope"):
        wanted[name] = logits(
            rope_scaling.patch(make_model("llama"), name, **({"factor": 4} if name == "yarn" else {}))
        )
    models_now = {name: make_model("llama") for name in wanted}

    def work(name):
        for _ in range(5):
            rope_scaling.patch(models_now[name], name, **({"factor": 4} if name == "yarn" else {}))
            for _ in range(3):
                assert torch.equal(logits(models_now[name]), wanted[name])
            rope_scaling.unpatch(models_now[name])
        return True

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, wanted))


def test_warnings_of_other_threads_pass_while_one_is_quiet(caplog):
    """Transformers' warnings of rope types are left out in the thread that tries types, and nowhere else."""
    logger = logging.getLogger("transformers.modeling_rope_utils")
    with unwarned():
        logger.warning("from this thread")
        thread = threading.Thread(target=logger.warning, args=("from another thread",))
        thread.start()
        thread.join()
    logger.warning("afterwards")
    said = [record.getMessage() for record in caplog.records]
    assert "from this thread" not in said and {"from another thread", "afterwards"} <= set(said)
