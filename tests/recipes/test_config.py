"""Recipes are strict data: every shipped one is read, checked dry-run; mistakes name the field, and what is near."""

import dataclasses
import re
from pathlib import Path

import pytest
import transformers
from conftest import _COMMON

from rope_scaling import RopeScalingError
from rope_scaling.hf.loading import model_source
from rope_scaling.methods import Combination, named_method
from rope_scaling.recipes.config import make_recipe, read_recipe, recipe_names
from rope_scaling.recipes.plan import make_plan


WITH_TEXT = Path(__file__).parents[1] / "golden" / "recipes_with_text"
LLAMA3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "head_dim": 128, "hidden_size": 512}
STAND_INS = {
    "huggyllama/llama-7b": ("LlamaConfig", 2048, {}),
    "NousResearch/Llama-2-7b-hf": ("LlamaConfig", 4096, {}),
    "NousResearch/Yarn-Llama-2-7b-64k": (
        "LlamaConfig",
        65536,
        {
            "rope_parameters": {
                **{"rope_type": "yarn", "factor": 16.0, "rope_theta": 1e4},
                "original_max_position_embeddings": 4096,
            }
        },
    ),
    "mistralai/Mistral-7B-v0.1": ("MistralConfig", 8192, {"sliding_window": 4096}),
    "meta-llama/Meta-Llama-3-8B": ("LlamaConfig", 8192, LLAMA3),
    "meta-llama/Meta-Llama-3-8B-Instruct": ("LlamaConfig", 8192, LLAMA3),
    "princeton-nlp/Llama-3-8B-ProLong-64k-Base": ("LlamaConfig", 65536, LLAMA3),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("LlamaConfig", 8192, {"tie_word_embeddings": True}),
    "HuggingFaceTB/SmolLM2-135M": ("LlamaConfig", 8192, {"tie_word_embeddings": True}),
    "HuggingFaceTB/SmolLM2-360M": ("LlamaConfig", 8192, {"tie_word_embeddings": True}),
}
"""Tiny models with the trained length and scaling of those that recipes name."""


def stand_in(name, folder):
    """A folder with the config of a tiny model like that of a hub id; there is no hub here."""
    kind, length, changes = STAND_INS[name]
    values = _COMMON | {"vocab_size": 4096, "max_position_embeddings": length} | changes
    architectures = [kind.replace("Config", "ForCausalLM")]
    getattr(transformers, kind)(**values, architectures=architectures).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_read_and_dry_run(name, tmp_path):
    recipe = read_recipe(name)
    overrides = []
    if recipe.model != "demo":
        overrides = [f"model={stand_in(recipe.model, tmp_path)}", f"tokenizer={model_source('demo')}"]
    overrides += ["parallelism={}", "data.max_sequences=40"]  # its devices are not here, and a few will do
    plan = make_plan(read_recipe(name, overrides), with_data=recipe.model == "demo")
    target = int(re.search(r"is to read ([\d,]+)", plan["patch"])[1].replace(",", ""))
    wanted = re.search(r"_(\d+)k$", name)
    if wanted:
        assert target == int(wanted[1]) * 1024
    if recipe.model == "demo":
        assert target == (256 if name == "demo_control" else 1024) and "tokens beyond" in plan["data"]
    assert int(plan["steps"].partition(",")[0].replace(" tokens", "")) > 0
    assert "GB" in plan["memory"]


def test_the_head_of_every_published_recipe_says_where_it_is_from():
    from importlib import resources

    for name in recipe_names():
        text = (resources.files("rope_scaling.recipes") / f"{name}.yaml").read_text()
        assert f"rope-scaling finetune {name}\n" in text
        if not name.startswith(("demo", "smollm2")):
            assert "# Published: " in text and "# Expected: " in text and "# Hardware: " in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_stepz=3", "Unknown recipe field `training.max_stepz`. Did you mean `max_steps`?"),
        ("training.max_steps=abc", "`training.max_steps`: input should be a valid integer"),
        ("data.sequence_lengt=3", "Unknown recipe field `data.sequence_lengt`. Did you mean `sequence_length`?"),
        ("data.sequence_length=long", "`data.sequence_length`: input should be a valid integer"),
        ("data.layout=stacked", "`data.layout`: input should be 'plain', 'packed' or 'pose'; got 'stacked'"),
        ("modell=x", "Unknown recipe field `modell`. Did you mean `model`?"),
        ("patch=yarn", "`patch`: input should be a dictionary"),
        ("lora.rank=8", "Unknown recipe field `lora.rank`"),
        ("training.output_dir=x", "there are `--output-dir`, `--resume` and `parallelism`"),
        ("model.name=x", "`model` is not a section of a recipe"),
        (
            "patch.target_length=long",
            "`patch.target_length`: input should be tokens such as 32768 or 32k, or a multiple",
        ),
        ("data.sequence_length=8x", "`data.sequence_length`: input should be a valid integer"),
        ("max_steps", "An override is `field=value`"),
        ("data.sequence_length=[", "is not valid YAML"),
    ],
)
def test_mistakes_name_the_field(override, message):
    with pytest.raises(RopeScalingError) as caught:
        read_recipe("demo_yarn", [override])
    assert message in str(caught.value)


def test_files(tmp_path):
    with pytest.raises(RopeScalingError, match="Unknown recipe 'demo_yran'. Did you mean 'demo_yarn'?"):
        read_recipe("demo_yran")
    with pytest.raises(RopeScalingError, match="Cannot read the recipe"):
        read_recipe("missing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(RopeScalingError, match="must hold a mapping of fields; it holds list"):
        read_recipe(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(RopeScalingError, match="is not valid YAML"):
        read_recipe(str(tmp_path / "broken.yaml"))
    with pytest.raises(RopeScalingError, match="The recipe lacks `data`"):
        make_recipe({"model": "demo"})
    with pytest.raises(
        RopeScalingError, match=r"^Unknown recipe field `dta`. Did you mean `data`\? The recipe lacks `data`"
    ):
        make_recipe({"model": "demo", "dta": {"sequence_length": 64}})
    (tmp_path / "own.yaml").write_text("model: demo\ndata: {sequence_length: 64}\n")
    assert read_recipe(str(tmp_path / "own.yaml"), ["patch.method=yarn", "patch.factor=2"]).patch.factor == 2


def names_and_fields(methods):
    parts = methods.methods if isinstance(methods, Combination) else (methods,)
    return [named_method(part) for part in parts], getattr(methods, "extent", {})


@pytest.mark.parametrize("path", sorted(WITH_TEXT.iterdir()), ids=lambda path: path.stem)
def test_recipes_that_name_their_method_as_text_still_say_the_same(path):
    """Files of the version before recipes stated methods as mappings."""
    before, now = read_recipe(str(path)), read_recipe(path.stem)
    assert isinstance(before.patch.method, str) and isinstance(now.patch.method, dict)
    assert names_and_fields(before.patch.methods) == names_and_fields(now.patch.methods)
    assert dataclasses.replace(before, patch=now.patch) == now


@pytest.mark.parametrize(
    "method",
    [
        "yarn:beta_fast=16+log_n",
        ["yarn:beta_fast=16", "log_n"],
        [{"name": "YaRN", "beta_fast": 16}, {"name": "log_n"}],
    ],
)
def test_a_method_is_text_a_mapping_or_a_list(method):
    recipe = make_recipe({"model": "demo", "patch": {"method": method}, "data": {"sequence_length": 64}})
    assert str(recipe.patch.methods) == "yarn:beta_fast=16+log_n"


def test_one_field_of_a_method_is_set_alone():
    recipe = read_recipe("demo_mixed_window", ["patch.method.steps=[1, 8]"])
    assert str(recipe.patch.methods) == "dynamic_yarn:steps=[1,8]"


def test_lengths_are_tokens_or_a_multiple():
    overrides = [
        "patch.factor=null",
        "patch.target_length=4x",
        "data.sequence_length=1k",
        "evaluation.lengths=[1x, 1k]",
    ]
    recipe = read_recipe("demo_yarn", [*overrides, "chunk_size=0.5k"])
    assert (recipe.patch.target_length, recipe.data.sequence_length, recipe.chunk_size) == ("4x", 1024, 512)
    plan = make_plan(recipe, with_data=False)
    assert plan["patch"] == "yarn: reads 256 tokens, is to read 1,024" and plan["evaluation"].endswith(
        "256, 1024 tokens"
    )
    assert read_recipe("demo_yarn", ["patch.target_length=32k"]).patch.target_length == 32768


PRE_FLIGHT = [
    (["data.layout=packed", "parallelism.cp_size=2"], "cannot go with `parallelism.cp_size`"),
    (["patch={method: rerope, target_length: 1024}", "parallelism.sp_size=2"], "decides what attention computes"),
    (["data.sequence_length=2048"], "is 2048, and the model is to read 1024"),
    (["patch.method=null"], "`patch.factor` goes with `patch.method`"),
    (["s2_group_size=1024"], "holds a whole sequence"),
    (["s2_group_size=33"], "must be even"),
    (["data.text_length=4096"], "is for `data.layout=pose`"),
    (["data.short_share=0.5"], "go together"),
    (["data.streaming=true", "training.max_steps=-1"], "give `training.max_steps`"),
    (["lora.modules_to_save=[embed_tokens]", "lora.ensure_weight_tying=false"], "they would part"),
    (["data.source=./missing"], "There is no file or folder"),
    (["data.sequence_length=1024", "data.source=python-reference", "patch.method=yran"], "Did you mean 'yarn'?"),
    (["evaluation.split=train"], "is what is trained on ('stdlib', split 'train')"),
    (["lora.target_modules=[query]"], "Target modules"),
]


@pytest.mark.parametrize(("overrides", "message"), PRE_FLIGHT)
def test_pre_flight_refuses_with_the_reason(overrides, message):
    with pytest.raises(RopeScalingError) as caught:
        make_plan(read_recipe("demo_yarn", ["data.max_sequences=4", *overrides]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("patch", "reads"),
    [
        ("{method: yarn+log_n, target_length: 1024}", "reads 256 tokens, is to read 1,024"),
        ("{method: yarn+log_n, factor: 4}", "reads 256 tokens, is to read 1,024"),
        ("{method: yarn, factor: 8, original_max_position_embeddings: 128}", "reads 128 tokens, is to read 1,024"),
    ],
)
def test_how_far_a_patch_is_to_read(patch, reads):
    plan = make_plan(read_recipe("demo_yarn", [f"patch={patch}"]), with_data=False)
    assert plan["patch"].endswith(reads)


def test_pre_flight_on_other_models(tmp_path):
    """A window without a policy, frequencies that differ by rank, a foreign tokenizer."""
    own = [f"tokenizer={model_source('demo')}"]
    mistral = [f"model={stand_in('mistralai/Mistral-7B-v0.1', tmp_path / 'mistral')}", *own]
    with pytest.raises(RopeScalingError, match="sees the last 4096 tokens only, and it is to read 65536"):
        make_plan(read_recipe("yarn_mistral_64k", [*mistral, "patch.sliding_window=null"]), with_data=False)
    values = _COMMON | {"vocab_size": 4096, "architectures": ["LlamaForCausalLM"]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope |= {"original_max_position_embeddings": 64, "factor": 4.0}
    transformers.LlamaConfig(**values, rope_parameters=rope).save_pretrained(tmp_path / "longrope")
    overrides = [f"model={tmp_path / 'longrope'}", *own, "patch={}", "data.sequence_length=64"]
    with pytest.raises(RopeScalingError, match="every rank would compute its own"):
        make_plan(read_recipe("demo_yarn", [*overrides, "parallelism.cp_size=2"]), with_data=False)
    transformers.LlamaConfig(**values | {"vocab_size": 100}).save_pretrained(tmp_path / "small")
    overrides = [f"model={tmp_path / 'small'}", *own, "data.sequence_length=64"]
    with pytest.raises(RopeScalingError, match="4096 tokens and the model's embedding 100 rows"):
        make_plan(read_recipe("demo_yarn", overrides), with_data=False)


def test_launch_files_are_those_of_the_installed_accelerate():
    from importlib import resources

    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin

    kinds = {}
    for file in (resources.files("rope_scaling.recipes") / "accelerate").iterdir():
        config = load_config_from_file(str(file))
        kinds[file.name] = config.distributed_type.value
        assert f"--config_file recipes/accelerate/{file.name}" in file.read_text()
        if config.fsdp_config:
            assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"]  # only the first process holds all weights
            known = set(FullyShardedDataParallelPlugin.__dataclass_fields__)
            assert {
                name.removeprefix("fsdp_").replace("version", "fsdp_version") for name in config.fsdp_config
            } <= known
    wanted = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    wanted |= {"fsdp2_context_parallel": "FSDP", "deepspeed_sequence_parallel": "DEEPSPEED"}
    assert kinds == {f"{name}.yaml": kind for name, kind in wanted.items()}
