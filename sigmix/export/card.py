"""Model cards of exports: README.md with the YAML header that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MERGED = """\
---
{header}
---

# {base} under the mix {mix}

A full checkpoint: the experts below are merged into the weights, W' = U diag(s z) Vᵀ with z = 1 + Σ α (z_k - 1), and
nothing but transformers is needed to load it. Weights are stored in {dtype}.

{facts}
```python
from transformers import {auto}, {reader}

model = {auto}.from_pretrained("this folder", dtype="auto")
{what} = {reader}.from_pretrained("this folder")
```
"""

ADAPTER = """\
---
{header}
---

# LoRA of the mix {mix} on {base}

What the experts below change in the weights, ΔW = U diag(s (z - 1)) Vᵀ with z = 1 + Σ α (z_k - 1), written as B A.
{exact} {scale}

{facts}
{use}"""

PEFT_USE = """\
```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "this folder")
```
"""


def merged_card(about: Mapping[str, Any], vision: bool = False) -> str:
    """README.md of a merged checkpoint; ``about`` is what `record` says, and ``dtype``.

    Args:
        vision: of a vision-language model.
    """
    base, kind = about["base"]["name"], "image-text-to-text" if vision else "text-generation"
    lines = [*_header(about), "library_name: transformers", f"pipeline_tag: {kind}"]
    reader, what = ("AutoProcessor", "processor") if vision else ("AutoTokenizer", "tokenizer")
    return MERGED.format(
        header="\n".join(lines), base=base, mix=about["mix"], dtype=about["dtype"], facts=_facts(about),
        auto=_auto(vision), reader=reader, what=what,
    )  # fmt: skip


def adapter_card(about: Mapping[str, Any], vision: bool = False) -> str:
    """README.md of a PEFT LoRA; ``about`` is what `record` and `LowRank.describe` say, ``vision`` as in `merged_card`.
    """
    base = about["base"]["name"]
    exact = "All components are there, so it is exact up to rounding."
    if about["dropped"]:
        exact = (
            f"{about['dropped']} of {about['components']} components, the smallest |s (z - 1)|, are left out: an error "
            f"of {about['error']:.2%} of ‖ΔW‖, {about['error_of_weights']:.2g} of ‖W‖ (Frobenius norms, all matrices)."
        )
    return ADAPTER.format(
        header="\n".join([*_header(about), "library_name: peft"]),
        mix=about["mix"],
        base=base,
        exact=exact,
        scale="lora_alpha equals the rank everywhere, so the scale is 1.",
        facts=_facts(about),
        use=PEFT_USE.format(base=base, auto=_auto(vision)),
    )


def _auto(vision: bool) -> str:
    return "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"


def _header(about: Mapping[str, Any]) -> list[str]:
    # JSON strings and lists are YAML, so nothing that a user wrote can break out of its place
    tags = ["sigmix", "svf", "singular-value-fine-tuning", about["form"]]
    lines = [f"base_model: {json.dumps(about['base']['name'])}", f"tags: {json.dumps(tags)}"]
    licenses = {expert.get("license") for expert in about["experts"].values()} - {None}
    return [*lines, f"license: {json.dumps(min(licenses))}"] if len(licenses) == 1 else lines


def _facts(about: Mapping[str, Any]) -> str:
    base = about["base"]
    print_ = f", fingerprint `{base['fingerprint'][:12]}`" if base["fingerprint"] else ""
    lines = [f"- Base: `{base['name']}` read in {base['dtype']}{print_}", f"- Mix: `{about['mix']}`"]
    for name, expert in about["experts"].items():
        known = [f"{key} {_line(expert[key])}" for key in ("task", "domain", "objective", "seed", "commit", "license")
                 if expert.get(key) not in (None, "")]  # fmt: skip
        lines.append(f"- Expert `{name}` (z {expert['digest'][:12]}): {', '.join(known) or 'nothing more is recorded'}")
    return "\n".join([*lines, f"- Made by sigmix {about['sigmix']}", ""])


def _line(value: Any) -> str:
    return " ".join(str(value).split())
