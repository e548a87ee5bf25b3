"""What a recipe is: strict data. A YAML file is mapped onto these dataclasses, with dotted overrides on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import BeforeValidator, ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from rope_scaling.errors import RopeScalingError, unknown_name
from rope_scaling.lengths import has_unit, multiple, tokens, tokens_or_multiple
from rope_scaling.methods import Combination, Method, from_dict
from rope_scaling.strict import sentence, unknown_field, unknown_first, yaml_mapping


_STRICT = ConfigDict(extra="forbid")


def _tokens(value: Any) -> Any:
    return tokens("length", value) if isinstance(value, str) and has_unit(value) else value


def _tokens_or_multiple(value: Any) -> Any:
    if multiple(value) is not None:
        return tokens_or_multiple("length", value)
    if isinstance(value, str) and not (value.isdigit() or has_unit(value)):
        raise PydanticCustomError("length", "input should be tokens such as 32768 or 32k, or a multiple such as 8x")
    return _tokens(value)


Tokens = Annotated[int, BeforeValidator(_tokens)]
"""Tokens, as in 32768 or `32k`."""


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """The patch that the model is trained under; `method: null` trains the model as loaded."""

    __pydantic_config__ = _STRICT

    method: str | dict[str, Any] | list[str | dict[str, Any]] | None = None
    """A mapping with the method's `name` and its fields, as in `{name: yarn, beta_fast: 16}`; a list of these; or text
    as on the command line: `yarn`, `rerope+log_n`."""
    factor: float | None = None
    """Target length divided by the context length of the model as loaded."""
    target_length: Annotated[int | str, BeforeValidator(_tokens_or_multiple)] | None = None
    """The same in tokens (`32768`, `32k`), or as `8x`."""
    original_max_position_embeddings: Tokens | None = None
    """Trained length in tokens, where the model's config has none or a wrong one."""
    sliding_window: Literal["keep", "target"] | None = None
    """For models all of whose layers attend to a window: `target` widens it to the target, `keep` leaves it."""

    @property
    def methods(self) -> Method | Combination | None:
        """What `method` names, if it names one.

        Raises:
            RopeScalingError: as `rope_scaling.methods.from_dict`.
        """
        return None if self.method is None else from_dict(self.method)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Long documents, and how they become sequences."""

    __pydantic_config__ = _STRICT

    source: str = "stdlib"
    """`stdlib`, a file, a folder, a table, or a dataset on the hub."""
    split: str = "train"
    column: str = "text"
    subset: str | None = None
    layout: Literal["plain", "packed", "pose"] = "plain"
    """`plain`: one piece of a document a sequence. `packed`: several documents a sequence, isolated. `pose`: pieces
    whose positions skip ahead, up to the target length."""
    sequence_length: Tokens
    """Tokens of a training sequence, with the BOS."""
    min_length: Tokens | None = None
    """Shorter pieces are left out; by default all have the sequence's length (1 when packed)."""
    num_chunks: int = 2
    """Runs of consecutive positions, for `pose`."""
    text_length: Tokens | None = None
    """Tokens of text from which a `pose` sequence draws its chunks; by default its own length."""
    short_share: float = 0.0
    """Share of tokens that come in sequences of `short_length`."""
    short_length: Tokens | None = None
    short_source: str | None = None
    """By default the same documents."""
    max_sequences: int | None = None
    streaming: bool = False
    """Read documents only as training needs them."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters; fields are PEFT's."""

    __pydantic_config__ = _STRICT

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    modules_to_save: list[str] | None = None
    """Trained in full beside the adapters: `embed_tokens` and `norm` in LongLoRA."""
    ensure_weight_tying: bool = True
    """Keeps a head that shares the embedding's weights sharing them."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Losses by position, before and after."""

    __pydantic_config__ = _STRICT

    source: str = "stdlib"
    split: str = "test"
    column: str = "text"
    subset: str | None = None
    lengths: list[str | int] = field(default_factory=lambda: ["1x", "2x", "4x"])
    max_documents: int = 16
    pieces: bool = False
    """Cut each text into as many documents as it holds."""
    every: int | None = None
    """Also every so many steps while training, on two documents."""
    chunk_size: Tokens = 2048


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    __pydantic_config__ = _STRICT

    model: str
    """`demo`, a folder, or a hub id."""
    revision: str | None = None
    tokenizer: str | None = None
    """By default the model's."""
    patch: PatchConfig = field(default_factory=PatchConfig)
    data: DataConfig
    lora: LoraConfig | None = None
    s2_group_size: Tokens | None = None
    """Tokens of a group of S2 attention, while training."""
    chunk_size: Tokens | None = 512
    """Tokens whose logits are in memory at once; `null` for the model's own loss."""
    train_dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of the weights that are trained; frozen ones are held in it too. `auto`: the checkpoint's, or float32 on a
    processor that is slow in it."""
    activation_checkpointing: bool = False
    """Compute what a layer keeps for backward once more instead of keeping it."""
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of `transformers.TrainingArguments`, spelt as there."""
    parallelism: dict[str, Any] = field(default_factory=dict)
    """Fields of `accelerate.ParallelismConfig`, spelt as there."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("rope_scaling.recipes")
    names = (file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    return sorted(name for name in names if not name.startswith("pretrain"))


def recipe_about(name: str) -> str:
    """What the head of a recipe that comes with the package says first: what it does."""
    head = _text(name).split("\n#\n")[0]
    return " ".join(line.removeprefix("#").strip() for line in head.splitlines()).partition(" https://")[0]


def read_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by name or from a YAML file, and sets single fields.

    Args:
        name (`str`): One of `recipe_names()`, or a path that ends in `.yaml`.
        overrides (list of `str`): `field=value` with a dotted field and a YAML value: `training.learning_rate=1e-5`.

    Raises:
        RopeScalingError: there is no such recipe, a field is not known or has the wrong type, or one is missing.
    """
    data = yaml_mapping(name, _text(name))
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path:
            raise RopeScalingError(f"An override is `field=value`, as in `training.max_steps=100`; got {override!r}.")
        try:
            _set(data, path, yaml.safe_load(value) if value else None)
        except yaml.YAMLError:
            raise RopeScalingError(f"The value of `{override}` is not valid YAML.") from None
    return make_recipe(data)


def make_recipe(data: dict[str, Any]) -> Recipe:
    """A recipe from nested plain data.

    Raises:
        RopeScalingError: as `read_recipe`.
    """
    try:
        recipe = TypeAdapter(Recipe).validate_python(data)
    except ValidationError as error:
        raise RopeScalingError(" ".join(map(_sentence, unknown_first(error.errors())[:3]))) from None
    return dataclasses.replace(recipe, training=training_fields(recipe.training))


def training_fields(given: dict[str, Any]) -> dict[str, Any]:
    """`given` with every value in its type.

    Raises:
        RopeScalingError: a key is not a field of `TrainingArguments`, or its value is not of the field's type.
    """
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    known = {one.name: hints[one.name] for one in dataclasses.fields(TrainingArguments)}
    found = {}
    for name, value in given.items():
        if name not in known:
            raise unknown_field(f"training.{name}", "recipe", known)
        if name in ("output_dir", "resume_from_checkpoint", "parallelism_config"):
            raise RopeScalingError(
                f"`training.{name}` is not for a recipe: there are `--output-dir`, `--resume` and `parallelism`."
            )
        try:
            found[name] = TypeAdapter(known[name]).validate_python(value)
        except ValidationError as error:
            raise RopeScalingError(_sentence({**error.errors()[0], "loc": ("training", name)})) from None
        except PydanticUserError:  # a type that only the Trainer itself can check
            found[name] = value
    return found


_SECTIONS = {"patch": PatchConfig, "data": DataConfig, "lora": LoraConfig, "evaluation": EvaluationConfig}


def _sentence(error: Any) -> str:
    owner: Any = _SECTIONS.get(error["loc"][0], Recipe) if len(error["loc"]) > 1 else Recipe
    return sentence(error, "recipe", owner)


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise RopeScalingError(f"`{path}`: `{section}` is not a section of a recipe.")
    data[name] = value


def _text(name: str) -> str:
    if name.endswith((".yaml", ".yml")):
        try:
            return Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise RopeScalingError(f"Cannot read the recipe {name!r}: {error.strerror}.") from None
    if name not in recipe_names():
        raise unknown_name("recipe", name, recipe_names())
    return (resources.files("rope_scaling.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
