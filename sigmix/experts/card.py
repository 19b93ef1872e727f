"""The model card of an expert: README.md with the YAML header that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sigmix.experts.metadata import thaw

CARD = """\
---
{header}
---

# {title}

{description}

It holds one factor per singular value of {count} weight matrices ({numbers:,} numbers) of `{base}` and changes nothing
else: W' = U diag(s z) Vᵀ. {fits}

{facts}{metrics}## Use

```python
from sigmix import Bank, Engine, Mix, load_base

model, tokenizer = load_base("{base}")
engine = Engine(model, tokenizer, bank=Bank("folder/of/experts"))
engine.generate(["…"], mix=Mix.parse("{name}"))
```

It is also a PEFT adapter: after `import sigmix.svf.tuner`, `PeftModel.from_pretrained(base, this_folder)` loads it.
"""


def card(name: str, meta: Mapping[str, Any], count: int, numbers: int) -> str:
    """README.md of an expert; the same text for the same expert.

    Args:
        meta: the expert's metadata. count: matrices. numbers: components of z over all matrices.
    """
    base = dict(meta.get("base") or {})
    shown = _shown(base.get("name"))
    metrics = [dict(metric) for metric in meta.get("metrics") or ()]
    facts = {
        "Task": meta.get("task"), "Domain": meta.get("domain"), "Objective": meta.get("objective"),
        "Seed": meta.get("seed"), "Base's dtype": base.get("dtype"), "Commit": meta.get("commit"),
        "Training": meta.get("training"),
    }  # fmt: skip
    if carried := dict(meta.get("carried_from") or {}):
        basis = "the same weights" if carried.get("basis") == "same" else "other weights, by index order"
        facts["Carried from"] = f"{_shown(carried.get('base'))} ({basis})"
    fingerprint = base.get("fingerprint")
    fits = (
        f"It fits this base only (fingerprint `{fingerprint[:12]}`)."
        if fingerprint
        else "Nothing recorded which base exactly it was made on."
    )
    return CARD.format(
        header="\n".join(_header(shown, meta, metrics)),
        title=_line(name),
        name=name,
        description=str(meta.get("description") or "An expert made by singular-value fine-tuning (arXiv 2501.06252)."),
        count=count,
        numbers=numbers,
        base=shown,
        fits=fits,
        facts=_facts(facts),
        metrics=_table(metrics),
    )


def _header(base: str, meta: Mapping[str, Any], metrics: list[dict]) -> list[str]:
    # JSON strings and lists are YAML, so nothing a user writes can break out of its place
    tags = ["sigmix", "svf", "singular-value-fine-tuning", *([meta["domain"]] if meta.get("domain") else [])]
    lines = [f"base_model: {json.dumps(base)}", "library_name: peft", f"tags: {json.dumps(tags)}"]
    if meta.get("license"):
        lines.append(f"license: {json.dumps(meta['license'])}")
    if names := sorted({str(metric["name"]) for metric in metrics if metric.get("name")}):
        lines.append(f"metrics: {json.dumps(names)}")
    return lines


def _facts(facts: Mapping[str, Any]) -> str:
    lines = [f"- {key}: {_line(value)}" for key, value in facts.items() if value not in (None, "", {}, ())]
    return "\n".join(lines) + "\n\n" if lines else ""


def _table(metrics: list[dict]) -> str:
    if not metrics:
        return ""
    columns = list(dict.fromkeys(["name", *(key for metric in metrics for key in metric)]))
    rows = [[_cell(metric.get(column)) for column in columns] for metric in metrics]
    lines = [columns, ["---"] * len(columns), *rows]
    return "## Metrics\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "–".join(_cell(item) for item in value)
    return _line(value).replace("|", "\\|")


def _line(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        value = json.dumps(thaw(value), ensure_ascii=False)
    return " ".join(str(value).split())


def _shown(base: Any) -> str:
    # a base that is a folder is known by its path, which means nothing on another machine and is nobody's business
    text = str(base or "an unknown base")
    return Path(text).name if text.startswith(("/", "~", ".")) or "\\" in text else text
