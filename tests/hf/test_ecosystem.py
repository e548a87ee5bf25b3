"""Patched models in what people build on Transformers. Packages that are not installed are skipped with their name."""

import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import strong, token_ids
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    QuantizedCache,
    QuantoConfig,
    TextIteratorStreamer,
    TorchAoConfig,
    pipeline,
)

import rope_scaling
from rope_scaling import RopeScalingError
from rope_scaling.hf.compat import CACHE_NAME
from rope_scaling.hf.loading import model_source


SOURCE = model_source("demo")
METHODS = {"yarn": {"factor": 4}, "self_extend": {}}


def base(**arguments):
    return AutoModelForCausalLM.from_pretrained(SOURCE, **{"dtype": torch.float32, **arguments}).eval()


def patched(model, method):
    return rope_scaling.patch(model, method, **METHODS[method])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SOURCE)


@pytest.fixture(scope="module")
def ids(tokenizer):
    text = Path(json.__file__).with_name("decoder.py").read_text()
    return tokenizer(text, return_tensors="pt").input_ids[:, :600]


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits.float()


def off(one, other):
    return float((one - other).norm() / other.norm())


def quantized(name):
    if name == "quanto":
        pytest.importorskip("optimum.quanto")
        return base(quantization_config=QuantoConfig(weights="int8"))
    if name == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        return base(quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")
    quantization = pytest.importorskip("torchao.quantization")
    return base(quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["quanto", "bitsandbytes", "torchao"])
def test_quantized_weights(name, method, ids):
    model, wanted = quantized(name), logits(patched(base(), method), ids)
    before = logits(model, ids)
    found = logits(patched(model, method), ids)
    assert off(found, wanted) < 0.05 and off(before, wanted) > 3 * off(found, wanted)
    assert rope_scaling.diagnose(model).healthy
    assert torch.equal(logits(rope_scaling.unpatch(model), ids), before)


@pytest.mark.parametrize("method", ["yarn", "self_extend", "rerope", "angle_clip", "streaming", "dual_chunk"])
def test_quantized_caches(method):
    """All that such a cache does but round: then a token at a time is what one call is."""
    pytest.importorskip("optimum.quanto")
    model, tokens = rope_scaling.patch(strong("llama"), method, **METHODS.get(method, {})), token_ids(160)
    cache = QuantizedCache("quanto", config=model.config, nbits=4, q_group_size=16, residual_length=16)
    for layer in cache.layers:
        layer._quantize, layer._dequantize = (lambda tensor, axis: tensor.clone()), (lambda tensor: tensor)
    with torch.no_grad():
        pieces = [
            model(piece, **{CACHE_NAME: cache}).logits for piece in (tokens[:, :100], *tokens[:, 100:].split(1, 1))
        ]
    assert off(torch.cat(pieces, 1), logits(model, tokens)) < 1e-5
    arguments = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 16},
    }
    assert model.generate(tokens, max_new_tokens=4, do_sample=False, **arguments).shape == (1, 164)


@pytest.mark.parametrize("method", METHODS)
def test_weights_from_a_gguf_file(method, ids, tmp_path):
    pytest.importorskip("gguf")
    from references.gguf_files import write_llama

    write_llama(base(), tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    wanted = logits(patched(base(), method), ids)
    assert off(logits(patched(model.eval(), method), ids), wanted) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_layers_on_disk(method, ids, tmp_path):
    layers = {
        f"model.layers.{index}": "disk" if index % 2 else "cpu" for index in range(base().config.num_hidden_layers)
    }
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **layers}
    model = base(device_map=places, offload_folder=str(tmp_path))
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert off(logits(patched(model, method), ids), logits(patched(base(device_map="auto"), method), ids)) < 1e-6


def test_torch_export_of_frequencies_for_any_length(ids):
    inputs = {"input_ids": ids[:, :300], "use_cache": False}
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=4096)}, "use_cache": None}
    export = functools.partial(torch.export.export, args=(), kwargs=inputs, dynamic_shapes=shapes, strict=False)
    try:
        export(base())
    except torch._dynamo.exc.UserError as error:
        pytest.skip(f"this torch exports not even the unpatched model for any length: {str(error)[:100]}")
    model = patched(base(), "yarn")
    program = export(model)
    assert off(program.module()(input_ids=ids, use_cache=False).logits, logits(model, ids)) < 1e-6


def test_torch_export_of_attention_is_refused(ids):
    with pytest.raises(RopeScalingError, match=r"`torch\.export`.*frequency method"):
        torch.export.export(patched(base(), "self_extend"), (ids,), {"use_cache": False}, strict=False)


@pytest.mark.parametrize("method", METHODS)
def test_pipelines_and_streamers_say_what_generate_says(method, ids, tokenizer):
    model, prompt = patched(base(), method), ids[:, :400]
    wanted = tokenizer.decode(model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 400:])
    text = tokenizer.decode(prompt[0], skip_special_tokens=True)
    assert tokenizer(text, return_tensors="pt").input_ids.equal(prompt)
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        text, max_new_tokens=12, do_sample=False, return_full_text=False
    )
    assert answer[0]["generated_text"] == wanted
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, args=(prompt,), kwargs={"max_new_tokens": 12, "do_sample": False, "streamer": streamer}
    )
    thread.start()
    assert "".join(streamer) == wanted
    thread.join()


def test_chat_templates(ids, tokenizer):
    model = patched(base(), "self_extend")
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    chat = [{"role": "user", "content": tokenizer.decode(ids[0, :400])}]
    inputs = tokenizer.apply_chat_template(chat, chat_template=template, return_tensors="pt", return_dict=True)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] == inputs.input_ids.shape[1] + 4


@pytest.mark.parametrize("method", METHODS)
def test_trl_trains_and_saves_a_patched_model(method, ids, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = patched(base(), method)
    data = Dataset.from_dict({"input_ids": [row.tolist() for row in ids[0, :512].split(256)] * 4})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=256, max_steps=2, per_device_train_batch_size=2, save_steps=2,
        use_cpu=True, bf16=False, report_to=[], learning_rate=1e-3,
    )  # fmt: skip
    trl.SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=arguments).train()
    assert rope_scaling.diagnose(model).healthy
    trained = logits(model.eval(), ids)
    assert off(trained, logits(patched(base(), method), ids)) > 1e-3
    load = rope_scaling.from_pretrained if method == "self_extend" else AutoModelForCausalLM.from_pretrained
    assert off(logits(load(tmp_path / "checkpoint-2", dtype=torch.float32).eval(), ids), trained) < 1e-6


def served(folder, log):
    """A running `transformers serve`, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment), f"http://127.0.0.1:{port}"


def ask(address, body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_transformers_serve(method, ids, tokenizer, tmp_path):
    pytest.importorskip("fastapi", reason="needs transformers[serving]")
    pytest.importorskip("uvicorn", reason="needs transformers[serving]")
    model = patched(base(), method)
    model.save_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    prompt = tokenizer.decode(ids[0, :400])
    wanted = tokenizer.decode(model.generate(ids[:, :400], max_new_tokens=8, do_sample=False)[0, 400:])
    body = {"model": str(tmp_path / "model"), "messages": [{"role": "user", "content": prompt}], "max_tokens": 8}
    with open(tmp_path / "log", "w") as log:
        server, address = served(tmp_path / "model", log)
        try:
            answer, end = None, time.monotonic() + 90
            while answer is None and time.monotonic() < end and server.poll() is None:
                try:
                    answer = ask(address, body)
                except OSError:
                    time.sleep(1)
        finally:
            server.kill()
            server.wait()
    if method == "yarn":
        assert answer == wanted
    else:  # it must not be served without its attention
        assert answer is None and "rope_scaling.from_pretrained" in (tmp_path / "log").read_text()
