"""Mixing experts of one kind: candidate sums, tuning of α, and similarity of two updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch

from reproduction.blend import Blend
from reproduction.lab import Lab
from sigmix.engine.prefix_cache import left_pad
from sigmix.engine.tokenization import encode

UNIFORM = (0.25, 0.4, 0.6, 0.8, 1.0)

STEPS = (0.7, 1.4)

REFINED = 3
"""Maximum number of experts for which each α is also tuned on its own."""

KL_ITEMS = 24
"""Number of validation replies for the KL of a common α."""

TOP = 16
"""Dimension of an update's subspace: the rank of the LoRA adapters."""


def average(members: Sequence[str]) -> dict[str, float]:
    """α = 1/K."""
    return {task: round(1 / len(members), 4) for task in members}


def total(members: Sequence[str]) -> dict[str, float]:
    """α = 1: the plain sum of the updates."""
    return dict.fromkeys(members, 1.0)


def validate(
    lab: Lab, blend: Blend, tokenizer: Any, members: Sequence[str], weights: Mapping[str, float], with_kl: bool
) -> dict[str, Any]:
    """Measure a mixture on the members' validation items: {weights, accuracy by task, kl by task or {}, mean}."""
    entry: dict[str, Any] = {"weights": dict(weights), "accuracy": {}, "kl": {}}
    for task in members:
        samples = lab.samples(task, "validation", lab.scale.validation)
        reference = blend.reference if with_kl else None
        result, found = lab.measured(
            task, samples, blend.model, tokenizer, lambda: blend.under(weights), reference, KL_ITEMS, blend.prompt_only
        )
        entry["accuracy"][task] = result.accuracy
        entry["kl"] |= {task: found["kl"]} if with_kl else {}
    return {**entry, "mean": sum(entry["accuracy"].values()) / len(members)}


def tune(lab: Lab, blend: Blend, tokenizer: Any, members: Sequence[str]) -> dict[str, Any]:
    """Tune α by validation accuracy, averaged over the members' tasks: one common α, then each on its own.

    Returns:
        weights, accuracy, and tried: entries of `validate` in order, with KL for common α only.
    """
    tried: list[dict[str, Any]] = []

    def value(weights: Mapping[str, float], with_kl: bool) -> float:
        tried.append(validate(lab, blend, tokenizer, members, weights, with_kl))
        return float(tried[-1]["mean"])

    values = {alpha: value(dict.fromkeys(members, alpha), True) for alpha in UNIFORM}
    common = max(UNIFORM, key=lambda alpha: (values[alpha], -alpha))
    weights, best = dict.fromkeys(members, common), values[common]
    if len(members) <= REFINED:
        for task in members:
            for step in STEPS:
                candidate = {**weights, task: round(common * step, 4)}
                if (found := value(candidate, False)) > best:
                    weights, best = candidate, found
    return {"weights": weights, "accuracy": best, "tried": tried}


def fact(kind: str, seed: int, members: Sequence[str], rule: str = "tuned") -> str:
    """Name of the record of a tuning: of the weighted sum, or of a rule of `reproduction.merging`."""
    return f"{rule}-{kind}-s{seed}-{'+'.join(members)}"


def tuned_cells(
    lab: Lab, blend: Blend, tokenizer: Any, kind: str, seed: int, groups: Iterable[tuple[str, ...]]
) -> None:
    """Tune the mixture of each group of experts, and measure average, sum and tuned α on the members' tasks."""
    for group in groups:
        found = lab.store.fact(fact(kind, seed, group))
        if found is None:
            found = lab.timed(partial(tune, lab, blend, tokenizer, group))
            lab.store.write_fact(fact(kind, seed, group), found)
        for weights in (average(group), total(group), found["weights"]):
            lab.mixed_cells(blend, tokenizer, kind, seed, weights, group)


def geometry(lab: Lab, blend: Blend, tokenizer: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """Compute the pairwise similarity of the experts' updates.

    Returns:
        norm: {task: ‖ΔW‖ / ‖W‖ over all matrices}. pairs, of adapters that are not the base: [{a, b, cosine, overlap,
        activation}]: the cosine of the updates over all matrices; the share of a's energy in the top left directions of
        b's update, and the reverse, averaged (`TOP` of them, mean over matrices); and the mean cosine of what the two
        do to the hidden states of every layer at the last token of validation prompts of all tasks.
    """
    dots = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    shares = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    size, counted = 0.0, 0
    for path, place in blend.places.items():
        updates = [blend.update(path, task) for task in tasks]
        flat = torch.stack([one.flatten() for one in updates]).double().cpu()
        dots += flat @ flat.T
        size += float(place.get_base_layer().weight.detach().float().square().sum())
        if not bool((flat.abs().sum(1) > 0).all()):
            continue
        counted += 1
        torch.manual_seed(0)  # svd_lowrank draws
        tops = [torch.svd_lowrank(one, TOP, 4)[0] for one in updates]
        for i, one in enumerate(updates):
            for j, basis in enumerate(tops):
                shares[i, j] += float((basis.T @ one).square().sum() / one.square().sum())
    states = _states(lab, blend, tokenizer, tasks)
    norms = dots.diagonal().sqrt()
    pairs = []
    for i, j in combinations(range(len(tasks)), 2):
        if not float(norms[i] * norms[j]) > 0:
            continue  # an adapter that is the base has no direction
        cosine = torch.nn.functional.cosine_similarity(states[i], states[j], dim=-1)
        pairs.append(
            {
                "a": tasks[i], "b": tasks[j], "cosine": float(dots[i, j] / (norms[i] * norms[j])),
                "overlap": float(shares[i, j] + shares[j, i]) / 2 / max(counted, 1),
                "activation": float(cosine.mean()),
            }
        )  # fmt: skip
    return {"norm": {t: float(n) / size**0.5 for t, n in zip(tasks, norms, strict=True)}, "pairs": pairs}


@torch.no_grad()
def _states(lab: Lab, blend: Blend, tokenizer: Any, tasks: Sequence[str], each: int = 8) -> list[torch.Tensor]:
    """Return each expert's change of the hidden states [N, layers, d] of the last token of N prompts."""
    rows = []
    for task in tasks:
        rows += [encode(tokenizer, one.prompt, one.system) for one in lab.samples(task, "validation", each)]
    ids, mask = left_pad(rows, tokenizer.pad_token_id, blend.model.get_input_embeddings().weight.device)
    places = (mask.long().cumsum(1) - 1).clamp_min(0)

    def read() -> torch.Tensor:
        out = blend.model(
            input_ids=ids, attention_mask=mask, position_ids=places, output_hidden_states=True, use_cache=False,
            logits_to_keep=1,
        )  # fmt: skip
        return torch.stack([h[:, -1].float() for h in out.hidden_states[1:]], 1)

    with blend.reference():
        base = read()
    found = []
    for task in tasks:
        with blend.under({task: 1.0}):
            found.append(read() - base)
    return found
