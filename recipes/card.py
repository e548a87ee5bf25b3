"""What a run writes about itself: the table of its losses, and the card of its model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rope_scaling.eval.files import write_atomically
from rope_scaling.eval.formatting import bucket_names, difference_text, perplexity_text
from rope_scaling.recipes.config import Recipe
from rope_scaling.recipes.measure import STAGES


def losses_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Header and one line a bucket of positions: perplexity at every stage, then what training changed, in nats."""
    found = {(row["stage"], row["against"], row["from"], row["to"]): row for row in rows if row["measure"] == "bucket"}
    table = [["positions", "as loaded", "patched", "trained", "trained - as loaded", "trained - patched"]]
    for bucket, name in bucket_names(rows):
        perplexities = [perplexity_text(found[stage, "unpatched", *bucket]["nll"]) for stage in STAGES]
        changes = [difference_text(found["after", against, *bucket]) for against in ("unpatched", "before")]
        table.append([name, *perplexities, *changes])
    return table


def markdown(table: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([lines[0], "|" + " --- |" + " ---: |" * (len(table[0]) - 1), *lines[1:]])


def write(recipe: Recipe, name: str, rows: list[dict[str, Any]], folder: Path) -> None:
    """Writes `README.md` beside the model: what it is, how it was made, how far it reads, how to load it."""
    facts = rows[0]
    first = {"base_model": recipe.model, "library_name": "peft" if recipe.lora else "transformers"}
    first |= {"tags": ["rope-scaling", "long-context"]}
    text = f"""---
{yaml.safe_dump(first, sort_keys=False).strip()}
---

# {folder.name}

`{recipe.model}`, fine-tuned to read {facts["target_length"]:,} tokens instead of {facts["trained_length"]:,}.

| | |
| --- | --- |
| recipe | `{name}` |
| method | {f"`{recipe.patch.methods}`" if recipe.patch.methods else "none"}{_factor(recipe)} |
| trained | {"adapters (LoRA)" if recipe.lora else "all weights"} |
| data | `{recipe.data.source}`, {recipe.data.layout}, sequences of {recipe.data.sequence_length:,} tokens |
| tokens | {facts["trained_tokens"]:,} in {facts["steps"]:,} steps, {facts["minutes"]:.1f} minutes |

Perplexity by position on {max(row["documents"] for row in rows)} documents of `{recipe.evaluation.source}`, 1x =
{facts["trained_length"]:,} tokens; differences in nats a token, on the same tokens, with 95% bootstrap intervals over
documents (`rows.jsonl`):

{markdown(losses_table(rows))}

## Loading it

{_usage(recipe)}

## The recipe

```yaml
{yaml.safe_dump(asdict(recipe), sort_keys=False).strip()}
```

Versions: {", ".join(f"{key} {value}" for key, value in sorted(facts["versions"].items()))}.
"""
    write_atomically(folder / "README.md", text.encode())


def _factor(recipe: Recipe) -> str:
    return f", factor {recipe.patch.factor:g}" if recipe.patch.factor else ""


def _usage(recipe: Recipe) -> str:
    if recipe.lora is not None:
        return (
            "```python\nimport rope_scaling\n\nmodel = rope_scaling.load_adapter(FOLDER)  # its base model too, "
            "patched\nmodel = model.merge_and_unload()  # for servers\n```\n\nPEFT alone ignores the patch, and the "
            "result reads no further than the base model."
        )
    return (
        "```python\nimport rope_scaling\n\nmodel = rope_scaling.from_pretrained(FOLDER)\n```\n\nWith a "
        "frequency method, plain Transformers and servers that read its configs load it as well."
    )
