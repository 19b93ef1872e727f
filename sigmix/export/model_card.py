"""Model cards and metadata of exports: ``README.md`` and ``sigmix_export.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sigmix
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import thaw
from sigmix.experts.mix import Mix
from sigmix.experts.model_card import FROM_FILE, LICENSE_OF_DEFAULT, LICENSES, header, line, on_hub, without_path
from sigmix.export.base import BaseCheckpoint
from sigmix.models.default import DEFAULT

RECORD = "sigmix_export.json"

CACHE_NOTE = (
    "llama-server reuses the keys and values of earlier prompts whatever adapter scales they were computed with: send "
    '"cache_prompt": false with every request, or start it with --no-cache-prompt'
)
"""Warning in files and model cards; see https://github.com/ggml-org/llama.cpp/issues/26207."""

FOLDER_OF_DEFAULT = """ Print the folder of the former with
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
    """Return README.md of a merged checkpoint.

    Args:
        about: `record`, and ``dtype``. vision: the base is a vision-language model.
    """
    base, task = about["base"]["name"], "image-text-to-text" if vision else "text-generation"
    # the weights are modified weights of the base, so the base's license applies
    top = header(base, "finetune", "transformers", _tags(about), about["base"].get("license"), pipeline_tag=task)
    reader, what = ("AutoProcessor", "processor") if vision else ("AutoTokenizer", "tokenizer")
    return _template("merged").format(
        header=top, base=base, mix=about["mix"], dtype=about["dtype"], facts=_facts(about), auto=_auto(vision),
        from_file=FROM_FILE + "\n" if base == DEFAULT else "", reader=reader, what=what,
    )  # fmt: skip


def adapter_card(about: Mapping[str, Any], vision: bool = False) -> str:
    """Return README.md of a PEFT LoRA; ``about`` is `LowRank.describe`, ``vision`` as in `merged_card`."""
    base = about["base"]["name"]
    exact = "All components are kept, so it is exact up to rounding."
    if about["dropped"]:
        exact = (
            f"{about['dropped']} of {about['components']} components, those of the smallest |s (z - 1)|, are dropped: "
            f"an error of {about['error']:.2%} of ‖ΔW‖, {about['error_of_weights']:.2g} of ‖W‖ (Frobenius norms over "
            f"all matrices).{'' if about.get('accuracy') else ' Its accuracy was not measured.'}"
        )
    licenses = {str(expert.get("license") or "").strip().lower() for expert in about["experts"].values()}
    license_ = licenses.pop() if len(licenses) == 1 else None
    loads = base if base != DEFAULT and on_hub(base) else "the base's folder"
    return _template("lora").format(
        header=header(base, "adapter", "peft", _tags(about), license_), mix=about["mix"], base=base, exact=exact,
        accuracy=_accuracy(about.get("accuracy", ())), facts=_facts(about),
        default=FROM_FILE + FOLDER_OF_DEFAULT if base == DEFAULT else "",
        use=PEFT_USE.format(base=loads, auto=_auto(vision)),
    )  # fmt: skip


def gguf_card(
    mix: str, files: Mapping[str, float], abouts: Sequence[Mapping[str, Any]],
    accuracy: Sequence[Mapping[str, Any]] = (),
) -> str:  # fmt: skip
    """Return README.md of a folder of GGUF adapters.

    Args:
        files: {file name: scale in the mixture}. abouts: `LowRank.describe` of each. accuracy: as in `export_lora`, of
            the mixture.
    """
    base = abouts[0]["base"]["name"]
    scales = [{"id": number, "scale": scale} for number, scale in enumerate(files.values())]
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    return _template("gguf").format(
        header=header(base, "adapter", "gguf", _tags(abouts[0]), None), mix=mix, base=base,
        accuracy=_accuracy(accuracy),
        facts=_facts({**abouts[0], "mix": mix, "experts": {k: v for one in abouts for k, v in one["experts"].items()}}),
        loras=" ".join(f"--lora-scaled {name}:0" for name in files), note=CACHE_NOTE,
        request=json.dumps({"messages": messages, "cache_prompt": False, "lora": scales}),
    )  # fmt: skip


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    """Table of the accuracy of a truncated export; "" without rows."""
    if not rows:
        return ""
    lines = ["| task | items | base | exact mixture | this export | difference | McNemar p |", "|" + "---|" * 7]
    figure = "{accuracy:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
    for row in rows:
        cells = [figure.format(**row[kind]) for kind in ("base", "exact", "truncated")]
        test = "{difference:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}] | {p:.2g}".format(**row["paired"])
        task = line(row["task"]).replace("|", "\\|")
        lines.append(f"| `{task}` | {row['paired']['n']} | {' | '.join(cells)} | {test} |")
    title = "Accuracy of greedy answers to held-out items, with 95 % intervals; the difference is to the exact mixture:"
    return "\n".join([title, "", *lines, "", ""])


def _template(name: str) -> str:
    return Path(__file__).with_name(f"{name}.md").read_text(encoding="utf-8")


def _auto(vision: bool) -> str:
    return "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"


def _tags(about: Mapping[str, Any]) -> list[str]:
    return ["sigmix", "svf", "singular-value-fine-tuning", about["form"]]


def _facts(about: Mapping[str, Any]) -> str:
    base = about["base"]
    print_ = f", fingerprint `{base['fingerprint'][:12]}`" if base["fingerprint"] else ""
    lines = [f"- Base: `{base['name']}` read in {base['dtype']}{print_}", f"- Mix: `{about['mix']}`"]
    for name, expert in about["experts"].items():
        fields = [f"{key} {line(expert[key])}" for key in ("task", "domain", "objective", "seed", "commit", "license")
                 if expert.get(key) not in (None, "")]  # fmt: skip
        lines.append(f"- Expert `{name}` (z {expert['digest'][:12]}): {', '.join(fields) or 'no other metadata'}")
    return "\n".join([*lines, f"- Made by sigmix {about['sigmix']}", ""])


def record(base: BaseCheckpoint, mix: Mix, experts: Sequence[Expert]) -> dict[str, Any]:
    """Return the mixture's id and weights, ``base``, ``experts`` {name: …} and the version ``sigmix``.

    The fingerprint of the base is included if an expert was checked against it; local paths are not.
    """
    return {
        "mix": mix.id,
        "weights": mix.to_json()["weights"],
        "base": {
            "name": without_path(base.name), "dtype": base.dtype_name, "fingerprint": base.known_fingerprint,
            "license": _license(base),
        },
        "experts": {expert.name: _expert(expert) for expert in experts},
        "sigmix": sigmix.__version__,
    }  # fmt: skip


def _license(base: BaseCheckpoint) -> str | None:
    """The license in the base's model card, if it is one of the hub's identifiers."""
    if base.kind == "default":
        return LICENSE_OF_DEFAULT
    from huggingface_hub import metadata_load

    try:
        license = str((metadata_load(base.folder / "README.md") or {}).get("license") or "").strip().lower()
    except Exception:  # no card, or whatever the parser of its header raises
        return None
    return license if license in LICENSES - {"other", "unknown"} else None


def _expert(expert: Expert) -> dict[str, Any]:
    meta = thaw(expert.meta)
    kept = {key: meta.get(key) for key in ("task", "domain", "objective", "seed", "commit", "license")}
    return {"digest": expert.digest, "verified": expert.verified, "matrices": len(expert.z), **kept}
