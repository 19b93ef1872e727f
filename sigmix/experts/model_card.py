"""Model card of an expert: README.md with the YAML header of the Hugging Face hub.

The header is built by `huggingface_hub.ModelCardData`, so `ModelCard.load` reads it back, the metrics as
``eval_results``; their ``metric_args`` hold n, interval and all other fields of the metric.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigmix.experts.metadata import thaw
from sigmix.models.default import DEFAULT

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

DEFAULT_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENSE_OF_DEFAULT = "apache-2.0"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*", re.ASCII)  # a hub id "user/name"
LICENSES = frozenset("""
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl
    zlib
""".split())
"""License ids of the hub; anything else becomes "other" with ``license_name``."""

POSITIONS = {"all": "all tokens", "prompt": "the tokens of the prompt; the base decodes the answer"}
"""Descriptions of `SVFConfig.positions`."""
FROM_FILE = f"""
`{DEFAULT}` is {DEFAULT_ON_HUB} as sigmix reads it from a 4-bit file;
the original's weights are another base."""


def card(name: str, meta: Mapping[str, Any], count: int, numbers: int, repo_id: str | None = None) -> str:
    """Return README.md of an expert; equal experts give equal text.

    Args:
        count: number of matrices. numbers: components of z over all matrices.
        repo_id: hub id that the example loads from; default: a folder.
    """
    base = dict(meta.get("base") or {})
    base_name = without_path(str(base.get("name") or "an unknown base"))
    metrics = [dict(metric) for metric in meta.get("metrics") or ()]
    facts = {
        "Acts on": POSITIONS[meta.get("positions", "all")],
        "Task": meta.get("task"), "Domain": meta.get("domain"), "Objective": meta.get("objective"),
        "Seed": meta.get("seed"), "Base's dtype": base.get("dtype"), "Commit": meta.get("commit"),
        "Training": meta.get("training"),
    }  # fmt: skip
    if carried := dict(meta.get("carried_from") or {}):
        basis = "the same weights" if carried.get("basis") == "same" else "other weights, by index order"
        facts["Carried from"] = f"{without_path(str(carried.get('base')))} ({basis})"
    lines = [f"- {key}: {line(value)}" for key, value in facts.items() if value not in (None, "", {}, ())]
    fingerprint = base.get("fingerprint")
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return template.format(
        header=_header(name, base.get("name"), meta, metrics),
        title=line(name),
        name=name,
        description=str(meta.get("description") or "An expert made by singular-value fine-tuning (arXiv 2501.06252)."),
        count=count,
        numbers=numbers,
        base=base_name,
        fits=f"It fits this base only (fingerprint `{fingerprint[:12]}`)."
        if fingerprint
        else "The exact base is not recorded.",
        default=FROM_FILE if base_name == DEFAULT else "",
        facts="\n".join(lines) + "\n\n" if lines else "",
        metrics=_table(metrics),
        bank=repo_id or "folder/of/experts",
        folder=json.dumps(repo_id) if repo_id else "this_folder",
    )


def header(
    base: str | None, relation: str, library: str | None, tags: list[str], license_: str | None = None, **more: Any
) -> str:
    """Return the YAML of a card without its ``---``.

    Args:
        base: its name; omitted unless it is on the hub. relation: to the base: "adapter" or "finetune".
        license_: free text; an id unknown to the hub becomes "other" with a name.
        more: other fields of `huggingface_hub.ModelCardData`.
    """
    from huggingface_hub import ModelCardData

    base_model = on_hub(base)
    text = str(license_).strip().lower() if license_ else None
    listed = text is None or text in LICENSES
    return ModelCardData(
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        library_name=library,
        tags=tags,
        license=text if listed else "other",
        license_name=None if listed else re.sub(r"[^a-z0-9.+-]+", "-", text or "").strip("-"),
        **more,
    ).to_yaml(line_break="\n").strip("\n")


def on_hub(base: str | None) -> str | None:
    """Return the base's hub id, or None if it is a folder or a file."""
    text = str(base or "")
    if text == DEFAULT:
        return DEFAULT_ON_HUB
    return text if REPO_ID.fullmatch(text) and not text.lower().endswith(".gguf") else None


def line(value: Any) -> str:
    """Return a value as text on one line."""
    if isinstance(value, (Mapping, list, tuple)):
        value = json.dumps(thaw(value), ensure_ascii=False)
    return " ".join(str(value).split())


def without_path(base: str) -> str:
    """Return a base's name; of a local path only the last part."""
    is_path = base.startswith(("/", "~", ".")) or "\\" in base or base[1:3] == ":/"
    return re.split(r"[/\\]", base.rstrip("/\\"))[-1] if is_path else base


def _header(name: str, base: str | None, meta: Mapping[str, Any], metrics: list[dict[str, Any]]) -> str:
    results = _eval_results(name, meta, metrics)
    tags = ["sigmix", "svf", "singular-value-fine-tuning", *([meta["domain"]] if meta.get("domain") else [])]
    return header(
        base, "adapter", "peft", tags, meta.get("license"),
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )  # fmt: skip


def _eval_results(name: str, meta: Mapping[str, Any], metrics: list[dict[str, Any]]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    task = line(meta.get("task") or meta.get("domain") or name)
    results = []
    for metric in metrics:
        value = metric.get("value")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        label = line(metric.get("name") or "score")
        words = label.lower().split()
        args = {key: thaw(more) for key, more in metric.items() if key not in ("name", "value") and more is not None}
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name=task,
                dataset_type=task,
                dataset_name=task,
                dataset_split=next((word for word in ("test", "validation", "train") if word in words), None),
                metric_type="accuracy" if "accuracy" in words else re.sub(r"\W+", "_", label.lower()),
                metric_name=label,
                metric_value=value,
                metric_args=args or None,
            )
        )
    return results


def _table(metrics: list[dict[str, Any]]) -> str:
    if not metrics:
        return ""
    columns = list(dict.fromkeys(["name", *(key for metric in metrics for key in metric)]))
    rows = [[_cell(metric.get(column)) for column in columns] for metric in metrics]
    lines = [columns, ["---"] * len(columns), *rows]
    return "## Metrics\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "–".join(_cell(item) for item in value)
    return line(value).replace("|", "\\|")
