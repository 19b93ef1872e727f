"""Model cards of exports: README.md with the YAML header that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sigmix
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import thaw
from sigmix.experts.mix import Mix
from sigmix.experts.model_card import FROM_FILE, LICENSE_OF_DEFAULT, LICENSES, header, line, on_hub, without_path
from sigmix.export.source import Source
from sigmix.models.default import DEFAULT

MERGED = """\
---
{header}
---

# {base} under the mix {mix}

A full checkpoint: the experts below are merged into the weights, W' = U diag(s z) Vᵀ with z = 1 + Σ α (z_k - 1), and
nothing but transformers is needed to load it. Weights are stored in {dtype}.

{facts}{from_file}
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

{facts}{default}
{use}"""


FOLDER_OF_DEFAULT = """ Where sigmix keeps the folder of the former:
`python -c "from sigmix.models.loading import locate; print(locate()[1])"`.
"""


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
    # the weights are the base's, a little changed, so its licence holds, and the experts' says nothing about it
    top = header(base, "finetune", "transformers", _tags(about), about["base"].get("license"), pipeline_tag=kind)
    reader, what = ("AutoProcessor", "processor") if vision else ("AutoTokenizer", "tokenizer")
    return MERGED.format(
        header=top,
        base=base,
        mix=about["mix"],
        dtype=about["dtype"],
        facts=_facts(about),
        from_file=FROM_FILE + "\n" if base == DEFAULT else "",
        auto=_auto(vision),
        reader=reader,
        what=what,
    )


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
        header=header(base, "adapter", "peft", _tags(about), _common_license(about)),
        mix=about["mix"],
        base=base,
        exact=exact,
        scale="lora_alpha equals the rank everywhere, so the scale is 1.",
        facts=_facts(about),
        default=FROM_FILE + FOLDER_OF_DEFAULT if base == DEFAULT else "",
        use=PEFT_USE.format(
            base=base if base != DEFAULT and on_hub(base) else "the base's folder", auto=_auto(vision)
        ),
    )


def _auto(vision: bool) -> str:
    return "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"


def _tags(about: Mapping[str, Any]) -> list[str]:
    return ["sigmix", "svf", "singular-value-fine-tuning", about["form"]]


def _common_license(about: Mapping[str, Any]) -> Any:
    """That of all the experts, if they have one."""
    found = {str(expert.get("license") or "").strip().lower() for expert in about["experts"].values()}
    return found.pop() if len(found) == 1 else None


def _facts(about: Mapping[str, Any]) -> str:
    base = about["base"]
    print_ = f", fingerprint `{base['fingerprint'][:12]}`" if base["fingerprint"] else ""
    lines = [f"- Base: `{base['name']}` read in {base['dtype']}{print_}", f"- Mix: `{about['mix']}`"]
    for name, expert in about["experts"].items():
        known = [f"{key} {line(expert[key])}" for key in ("task", "domain", "objective", "seed", "commit", "license")
                 if expert.get(key) not in (None, "")]  # fmt: skip
        lines.append(f"- Expert `{name}` (z {expert['digest'][:12]}): {', '.join(known) or 'nothing more is recorded'}")
    return "\n".join([*lines, f"- Made by sigmix {about['sigmix']}", ""])


# --- What an export is made of, in ``sigmix_export.json`` beside it and in its card.


RECORD = "sigmix_export.json"


def record(source: Source, mix: Mix, experts: Sequence[Expert]) -> dict[str, Any]:
    """``mix`` (id), ``weights``, ``base`` {name, dtype, fingerprint, license}, ``experts`` {name: …} and ``sigmix``.

    The fingerprint is there where an expert was checked against it, the licence where the base's own card says it; no
    local path is.
    """
    return {
        "mix": mix.id,
        "weights": mix.to_json()["weights"],
        "base": {
            "name": without_path(source.name), "dtype": source.dtype, "fingerprint": source.known_fingerprint,
            "license": _license(source),
        },
        "experts": {expert.name: _expert(expert) for expert in experts},
        "sigmix": sigmix.__version__,
    }  # fmt: skip


def _license(source: Source) -> str | None:
    """What the card in the base's folder says, if the hub knows it; "other" says nothing."""
    if source.kind == "default":
        return LICENSE_OF_DEFAULT
    from huggingface_hub import metadata_load

    try:
        found = str((metadata_load(source.folder / "README.md") or {}).get("license") or "").strip().lower()
    except Exception:  # no card, or whatever the parser of its header raises
        return None
    return found if found in LICENSES - {"other", "unknown"} else None


def _expert(expert: Expert) -> dict[str, Any]:
    meta = thaw(expert.meta)
    kept = {key: meta.get(key) for key in ("task", "domain", "objective", "seed", "commit", "license")}
    return {"digest": expert.digest, "verified": expert.verified, "matrices": len(expert.z), **kept}
