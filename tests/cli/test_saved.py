"""Every command on every kind of folder: patched, adapters, models that read images, encoders, old families."""

import json
import re

import pytest
import torch
import transformers
from conftest import FAMILIES, TRAINED_LENGTH, make_model

import rope_scaling
from rope_scaling.hf.loading import load_model, load_tokenizer
from rope_scaling.recipes.measure import STAGES


SIZES = FAMILIES["llama"][1] | {"vocab_size": 4096, "eos_token_id": 2}
OLD_SIZES = {
    "vocab_size": 4096,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 8,
    "n_positions": TRAINED_LENGTH,
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama(**changes):
    return make_model("llama", vocab_size=4096, **changes)


def qwen_vl():
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    text = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"fullatt_block_indexes": [0]})
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def llava():
    vision = VISION | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    config = transformers.LlavaConfig(text_config=SIZES | {"model_type": "llama"}, vision_config=vision)
    return transformers.LlavaForConditionalGeneration(config)


def mllama():
    vision = {"num_global_layers": 1, "attention_heads": 2, "image_size": 28, "patch_size": 14, "max_num_tiles": 1}
    vision |= {"vision_output_dim": 64, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    config = transformers.MllamaConfig(
        text_config=SIZES | {"cross_attention_layers": [1]}, vision_config=vision | VISION | {"num_hidden_layers": 1}
    )
    return transformers.MllamaForConditionalGeneration(config)


def adapter(folder, base, **patch):
    """Saves a LoRA adapter on a base model, patched if there is a patch, and returns its folder."""
    from peft import LoraConfig, get_peft_model

    base.save_pretrained(folder / "base")
    name = patch.pop("method", None)
    model = rope_scaling.patch(base, name, **patch) if name else base
    model.name_or_path = str(folder / "base")
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model = rope_scaling.record_adapter(model) if rope_scaling.hf.patch.patch_record(model) else model
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


MODELS = {
    "span": lambda: rope_scaling.patch(llama(), "rerope", window=20),
    "temperature": lambda: rope_scaling.patch(llama(), "log_n"),
    "vision span": lambda: rope_scaling.patch(llava(), "rerope", window=20),
    "qwen-vl": qwen_vl,
    "llava": llava,
    "mllama": mllama,
    "gptj": lambda: transformers.GPTJForCausalLM(transformers.GPTJConfig(**OLD_SIZES, bos_token_id=1, eos_token_id=2)),
    "codegen": lambda: transformers.CodeGenForCausalLM(transformers.CodeGenConfig(**OLD_SIZES, n_ctx=TRAINED_LENGTH)),
}
ADAPTERS = {
    "adapter": lambda folder: adapter(folder, llama(), method="yarn", factor=2),
    "adapter with a span": lambda folder: adapter(folder, llama(), method="rerope", window=20),
    "adapter over a span": lambda folder: adapter(folder, rope_scaling.patch(llama(), "rerope", window=20)),
    "adapter without a patch": lambda folder: adapter(folder, llama()),
    "vision adapter": lambda folder: adapter(folder, llava(), method="rerope", window=20),
}
WITHOUT_SPANS = {"mllama"}  # its layers that look at images attend in their own code
if not transformers.GPTJForCausalLM._supports_attention_backend:  # older versions of Transformers
    WITHOUT_SPANS |= {"gptj", "codegen"}
PATCHED = {
    "span": "rerope",
    "temperature": "log_n",
    "vision span": "rerope",
    "adapter": "yarn",
    "adapter with a span": "rerope",
    "adapter over a span": "rerope",
    "vision adapter": "rerope",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a kind, with the embedded model's tokenizer."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            path = tmp_path_factory.mktemp(re.sub(r"\W", "-", kind))
            torch.manual_seed(0)
            if kind in ADAPTERS:
                folders[kind] = ADAPTERS[kind](path)
                load_tokenizer("demo").save_pretrained(path / "base")
            else:
                MODELS.get(kind, encoder)().save_pretrained(path)
                load_tokenizer("demo").save_pretrained(path)
                folders[kind] = path
        return folders[kind]

    return folder


def encoder():
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**sizes))


KINDS = [*MODELS, *ADAPTERS]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("def f(x):\n    return x + 1\n" * 100)
    return path


def rows_of(command, folder, text, output, *arguments):
    data = ["--data", text, "--lengths", "1x,2x", "--max-documents", 1]
    done = command("evaluate", "--model", folder, *data, "--output", output, *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]


def losses(rows, method):
    return [row["nll"] for row in rows if row["method"] == method and "nll" in row]


@pytest.mark.parametrize("kind", [*KINDS, "encoder"])
def test_describe_and_doctor(kind, saved, command):
    described = command("describe", saved(kind))
    assert described.returncode == 0, described.stderr
    assert f": {PATCHED.get(kind, 'not patched')}" in described.stdout
    assert command("doctor", saved(kind)).returncode in (0, 1)


@pytest.mark.parametrize("kind", [*KINDS, "encoder"])
def test_export(kind, saved, command, tmp_path):
    printed = command("export", saved(kind), "--target", "transformers")
    written = command("export", saved(kind), "--target", "transformers", "--out", tmp_path / "out")
    if kind in ("gptj", "codegen") or PATCHED.get(kind, "yarn") != "yarn":
        assert printed.returncode == written.returncode == 2
        assert re.search("changes attention|hard-codes its rotary frequencies", printed.stderr)
        assert len(printed.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
        return
    keys = json.loads(printed.stdout)
    factor = 1 + (kind == "adapter")
    assert keys.get("text_config", keys)["max_position_embeddings"] == factor * TRAINED_LENGTH
    assert written.returncode == 0, written.stderr
    again = load_model(str(tmp_path / "out"))
    one, other = again.state_dict(), load_model(str(saved(kind))).state_dict()
    assert type(again).__name__ == json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0]
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_measures_the_saved_method_against_the_model_it_was_made_from(kind, saved, text, command, tmp_path):
    beside = "linear" if kind in WITHOUT_SPANS else "sliding_window:window=32"
    rows = rows_of(command, saved(kind), text, tmp_path / "out", "--method", beside)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    own = [name for name in methods if name.startswith("saved ")]
    assert [name.split()[1].partition(":")[0] for name in own] == [PATCHED[kind] for one in PATCHED if one == kind]
    assert methods == ["unpatched", "cropping", "yarn", *own, beside]
    if own:
        plain, again = load_model(str(saved(kind))), tmp_path / "plain"
        rope_scaling.unpatch(plain).save_pretrained(again)
        load_tokenizer("demo").save_pretrained(again)
        method = {"rerope": "rerope:window=20", "yarn": "yarn:factor=2"}.get(PATCHED[kind], PATCHED[kind])
        expected = rows_of(command, again, text, tmp_path / "expected", "--method", method)
        assert losses(rows, own[0]) == pytest.approx(losses(expected, method), abs=1e-6)
        assert losses(rows, "unpatched") == pytest.approx(losses(expected, "unpatched"), abs=1e-6)
        assert losses(rows, own[0]) != losses(rows, "unpatched")


def test_a_sweep_leaves_out_what_the_model_does_not_take(saved, text, command, tmp_path):
    data = ["--data", text, "--lengths", "1x,2x", "--max-documents", 1]
    done = command("evaluate", "--model", saved("mllama"), *data, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    left_out = [line for line in done.stderr.splitlines() if "methods left out (" in line]
    assert len(left_out) == 1 and "rerope" in left_out[0] and "spans cannot be applied to it" in left_out[0]
    methods = {json.loads(line)["method"] for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()}
    assert {"yarn", "linear", "unpatched"} < methods and "rerope" not in methods


def test_evaluate_measures_the_weights_of_an_adapter(saved, text, command, tmp_path):
    merged, base = (
        rows_of(command, folder, text, tmp_path / folder.name, "--method", "linear")
        for folder in (saved("adapter"), saved("adapter").parent / "base")
    )
    assert losses(merged, "unpatched") != pytest.approx(losses(base, "unpatched"), abs=1e-6)


@pytest.mark.parametrize(
    "command_line", [("evaluate", "--model"), ("harness", "--tasks", "ruler", "--method", "yarn", "--model")]
)
def test_an_encoder_is_not_evaluated(command_line, saved, command):
    refused = command(*command_line, saved("encoder"))
    assert refused.returncode == 2 and "(ModernBertForMaskedLM) does not predict the next token" in refused.stderr


@pytest.mark.parametrize("kind", PATCHED)
def test_a_map_of_what_was_saved(kind, saved, command, tmp_path):
    drawn = command("plot", "map", "--model", saved(kind), "--output", tmp_path / "map.png")
    if PATCHED[kind] == "rerope":
        assert drawn.returncode == 0, drawn.stderr
        assert (tmp_path / "map.png").stat().st_size > 5000
    else:
        assert drawn.returncode == 2 and f"saved with {PATCHED[kind]}" in drawn.stderr


def test_from_pretrained_has_the_class_that_the_config_names(saved):
    model = rope_scaling.from_pretrained(saved("vision span"))
    adapted = rope_scaling.load_adapter(saved("vision adapter")).get_base_model()
    assert type(model) is type(adapted) is transformers.LlavaForConditionalGeneration
    assert all("rerope:window=20" in str(rope_scaling.describe(one)) for one in (model, adapted))


def finetune(command, folder, place, *overrides):
    """A recipe of one step on a model, with what it trains under left to the model."""
    for name in ("train.txt", "test.txt"):
        (place / name).write_text(f"the {name} of a recipe, again and again\n" * 60)
    (place / "own.yaml").write_text(
        f"model: {folder}\npatch: {{method: null}}\n"
        "data: {source: ./train.txt, sequence_length: 64}\n"
        "training: {max_steps: 1, report_to: none}\n"
        "evaluation: {source: ./test.txt, lengths: [1x, 2x], max_documents: 1}\n"
    )
    return command("finetune", "own.yaml", *overrides, cwd=place)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_on_it_is_checked(kind, saved, command, tmp_path):
    checked = finetune(command, saved(kind), tmp_path, "--dry-run")
    assert checked.returncode == 0, checked.stderr
    factor = 1 + (kind == "adapter")
    assert f"reads {TRAINED_LENGTH} tokens, is to read {TRAINED_LENGTH * factor}" in " ".join(checked.stdout.split())


@pytest.mark.parametrize("kind", ["span", "vision span", "qwen-vl", "gptj", "codegen", "adapter"])
def test_training_goes_on_under_the_saved_patch(kind, saved, command, tmp_path):
    done = finetune(command, saved(kind), tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs" / "own" / "rows.jsonl").read_text().splitlines()]
    plain, before, after = ([row["nll"] for row in rows if row["stage"] == stage] for stage in STAGES)
    assert (plain == before) == (kind not in PATCHED) and before != after[: len(before)]
    assert f": {PATCHED.get(kind, 'not patched')}" in command("describe", tmp_path / "runs" / "own").stdout


@pytest.mark.parametrize("method", ["yarn"] if "gptj" in WITHOUT_SPANS else ["yarn", "rerope"])
def test_old_families_train_under_a_patch(method, saved, command, tmp_path):
    extent = ["patch.target_length=128"] + ["lora={target_modules: [q_proj]}"] * (method == "yarn")
    done = finetune(command, saved("gptj"), tmp_path, f"patch.method={method}", *extent)
    assert done.returncode == 0, done.stderr
    assert f": {method}" in command("describe", tmp_path / "runs" / "own").stdout


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("encoder", [], "(ModernBertForMaskedLM) does not predict the next token"),
        ("adapter", ["lora={r: 4}"], "an adapter trained on it would name its base model alone"),
    ],
)
def test_what_no_recipe_can_train(kind, overrides, message, saved, command, tmp_path):
    refused = finetune(command, saved(kind), tmp_path, *overrides)
    assert refused.returncode == 2 and message in refused.stderr and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_harness_measures_the_saved_method(command, tmp_path):
    folder = adapter(tmp_path, llama(max_position_embeddings=512), method="rerope")
    load_tokenizer("demo").save_pretrained(tmp_path / "base")
    options = ["--method", "linear", "--samples", 1, "--lengths", "1024", "--output", tmp_path / "out"]
    done = command("harness", "--model", folder, "--tasks", "niah_single_1", *options)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["unpatched", "cropping", "yarn", "saved rerope", "linear"]
