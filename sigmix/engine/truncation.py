"""Truncated form: the effect of a bank's experts on each group of layers in a few directions, with a known error.

`fit` finds the directions on calibration prompts, `Calibration.plan` chooses their number for an error budget.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn import functional as F

from sigmix.engine.cpu.kernels import Group, Pack, Packing, Shared, find_groups, patch
from sigmix.engine.execution import as_base
from sigmix.engine.prefix_cache import right_pad
from sigmix.errors import ConfigError, ExpertError, FingerprintError, SigmixError
from sigmix.experts.fingerprint import short
from sigmix.svf.subspace import LowRank, Subspace, subspace
from sigmix.utils.io import atomic_file

if TYPE_CHECKING:
    from sigmix.engine.engine import Engine


@dataclass(eq=False)
class Truncation:
    """Plan for mixtures of given experts.

    Attributes:
        groups: groups of the model's layers. parts: low-rank change by a group's first path; groups without one
            compute the base.
        error: expected share of the experts' squared effect on the layers' outputs that is lost, over the calibration
            inputs, each layer relative to its own output.
        cost: extra multiply-adds per token, as a share of the base's.
        experts: {name: digest}, in the order of the parts' cores. facts: metadata of the fit.
    """

    groups: list[Group]
    parts: dict[str, LowRank]
    error: float
    cost: float
    experts: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """Return a one-line summary."""
        ins = sum(len(part.inputs) for part in self.parts.values())
        outs = sum(part.outputs.shape[1] for part in self.parts.values())
        return (
            f"truncated: {ins} input and {outs} output directions in {len(self.parts)} of {len(self.groups)} groups "
            f"of layers, {self.cost:.1%} more work, expected error {self.error:.1%} of what the experts do"
        )

    @contextmanager
    def using(self, packing: Packing, alphas: torch.Tensor, places: list[int]) -> Iterator[Any]:
        """Compute W x + Q core_b A x in the adapted layers for row b inside this context.

        Args:
            alphas: [D, K, M], mixing weights of D mixtures over the plan's K experts at each adapted matrix.
            places: index of each row's mixture.

        Yields:
            A function that restricts the state to some rows.
        """
        cores = {}
        for group in self.groups:
            if (part := self.parts.get(group.paths[0])) is not None:
                own = alphas[:, :, group.place : group.place + len(group.paths)].to(part.cores.device)
                # transposed, because rows multiply it from the left
                cores[group.paths[0]] = part.core(own)[places].transpose(1, 2).contiguous()
        now = dict(cores)

        def select(rows: list[int] | None) -> None:
            now.update(cores if rows is None else {path: core[rows] for path, core in cores.items()})

        with ExitStack() as patches:
            for group in self.groups:
                self._patch(group, packing, now, patches)
            yield select

    def _patch(self, group: Group, packing: Packing, now: dict[str, torch.Tensor], patches: ExitStack) -> None:
        key, part, sizes = group.paths[0], self.parts.get(group.paths[0]), group.sizes
        if part is None:  # the layers are switched to the base already
            return
        if packing.on:

            def both_of(*_: Any) -> Pack:
                bias = group.bias()
                bias = None if bias is None else torch.cat([bias, bias.new_zeros(len(part.inputs))])
                return packing.pack(torch.cat([group.weight(), part.inputs]), bias)

            first = packing.of((key, "in"), [*group.sources(), part.inputs], both_of)
            second = packing.of((key, "out"), [part.outputs])
            total = sum(sizes)

            def packed(x: torch.Tensor) -> Sequence[torch.Tensor]:
                both = first(x)
                inner = _mixed(both[..., total:], now[key])
                return (both[..., :total] + second(inner)).split(sizes, -1)

            shared = Shared(packed)
        else:

            def plain(x: torch.Tensor) -> Sequence[torch.Tensor]:
                change = F.linear(_mixed(F.linear(x, part.inputs), now[key]), part.outputs).split(sizes, -1)
                return [layer.base_layer(x) + own for layer, own in zip(group.layers, change, strict=True)]

            shared = Shared(plain)
        for number, layer in enumerate(group.layers):
            patch(patches, layer, "forward", functools.partial(_take, shared, number))


def _mixed(h: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """Multiply h [B, T, k] by each row's core [B, k, j]."""
    if h.shape[1] == 1:  # where a batched matmul would call a kernel for every row
        return (h.transpose(1, 2) * core).sum(1, keepdim=True)
    return torch.bmm(h, core)


def _take(shared: Shared, number: int, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    # 2-d inputs (experts of a mixture-of-experts model) have no rows
    if x.ndim != 3:
        raise ConfigError("the truncated form needs inputs [rows, tokens, features]", remedy="use form='factored'")
    return shared.take(number, x)


# ------------------------------------------------------------------ fitting


INPUTS = (4, 8, 12, 16, 20, 24, 32, 48)

OUTPUTS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of directions to try."""

EXACT = 1e-4
"""Share that may be lost to rounding in float32."""

CALL = 300_000
"""Cost of the extra calls of one group, in multiply-adds per row (measured: about 50 µs at 32 rows)."""


@dataclass
class Calibration:
    """Subspaces at full size, for plans of any error budget."""

    groups: list[Group]
    full: dict[str, Subspace]
    gains: dict[str, list[torch.Tensor]]
    base_cost: int
    experts: dict[str, str]
    facts: dict[str, Any]
    like: torch.Tensor

    def plan(self, budget: float) -> Truncation:
        """Return the cheapest plan that loses at most a share ``budget`` of the experts' effect.

        Raises:
            ConfigError: a budget outside [0, 1], or below the loss of all fitted directions.
        """
        check_budget(budget)
        whole = sum(part.total for part in self.full.values()) or 1.0

        def lost(sizes: Mapping[str, tuple[int, int]]) -> float:
            return sum(self.full[key].lost(*pair) * self.full[key].total for key, pair in sizes.items()) / whole

        low, high = -12.0, 3.0  # log10 of the price of work: from all directions to none
        sizes = self._sizes(10**low)
        if lost(sizes) > max(budget, EXACT):
            raise ConfigError(
                f"an error budget of {budget:.1%} is out of reach: all fitted directions lose {lost(sizes):.1%}",
                remedy="allow more, fit with more directions, or use form='factored', which is exact",
            )
        for _ in range(40):
            middle = (low + high) / 2
            trial = self._sizes(10**middle)
            if lost(trial) <= budget:
                low, sizes = middle, trial
            else:
                high = middle
        parts = {k: self.full[k].cut(*pair, self.gains[k], self.like) for k, pair in sizes.items() if min(pair)}
        cost = sum(self._cost(group, *sizes[group.paths[0]], call=0) for group in self.groups) / self.base_cost
        return Truncation(self.groups, parts, lost(sizes), cost, self.experts, {**self.facts, "budget": budget})

    def _sizes(self, price: float) -> dict[str, tuple[int, int]]:
        whole = sum(part.total for part in self.full.values()) or 1.0
        sizes = {}
        for group in self.groups:
            part = self.full[group.paths[0]]
            most = tuple(size - 1 for size in part.captured.shape)
            options = [(j, k) for j in {*OUTPUTS, most[0]} for k in {*INPUTS, most[1]} if j <= most[0] and k <= most[1]]
            options = [(0, 0), *sorted(options)]
            share = part.total / whole
            values = [part.lost(*pair) * share + price * self._cost(group, *pair) / 1e6 for pair in options]
            sizes[group.paths[0]] = options[values.index(min(values))]
        return sizes

    @staticmethod
    def _cost(group: Group, j: int, k: int, call: int = CALL) -> int:
        return k * group.layers[0].in_features + j * sum(group.sizes) + j * k + call * (k > 0)


def check_budget(budget: float) -> None:
    """Raise `ConfigError` unless an error budget is in [0, 1]."""
    if not 0 <= budget <= 1:
        raise ConfigError(f"an error budget is a share from 0 to 1, not {budget}")


@torch.no_grad()
def fit(
    engine: Engine,
    prompts: Sequence[Any],
    experts: Sequence[str],
    *,
    max_new_tokens: int = 16,
    outputs: int = OUTPUTS[-1],
    inputs: int = INPUTS[-1],
) -> Calibration:
    """Fit subspaces to the layers' inputs on the tokens where the experts act: prompts, and their answers to them.

    Args:
        prompts: training prompts of the experts' tasks; user turns or token ids.
        experts: names of K experts; prompt i is answered by expert i % K.
        outputs, inputs: largest numbers of directions of a group.

    Raises:
        ConfigError: no prompts or no experts.
    """
    if not prompts or not experts:
        raise ConfigError("a truncation is fitted on at least one prompt and one expert")
    rows = [engine.encode(prompt) for prompt in prompts]
    mixes = engine.mixes([experts[number % len(experts)] for number in range(len(rows))], len(rows))
    answers = engine.generate(rows, mixes, max_new_tokens=max_new_tokens)
    acting = [engine.execution.decoding(mix) == mix for mix in mixes]  # on answers, too
    whole = [row + answer.ids if on else row for row, answer, on in zip(rows, answers, acting, strict=True)]
    with as_base(engine.layers):
        groups = find_groups(engine.model, engine.layers, every=True)
    seconds = _second_moments(engine, groups, whole)
    table = torch.stack([engine.execution.z(mix) for mix in engine.mixes(list(experts), len(experts))])
    full, every = {}, {}
    for group in groups:
        second = seconds.pop(group.paths[0])
        single = second.float()
        gains = list((table[:, group.first : group.first + sum(group.ranks)] - 1).split(group.ranks, 1))
        every[group.paths[0]] = gains
        factors, sizes = [], []
        for layer in group.layers:
            first, last = layer.factors()  # [r, in], [out, r]
            factors.append((last.float().cpu(), first.float().cpu().T))
            weight = layer.matrix().float().cpu()
            sizes.append(((weight @ single) * weight).sum())
        full[group.paths[0]] = subspace(factors, gains, sizes, second, outputs, inputs)
    digests = {name: engine.bank[name].digest for name in experts}
    facts = {"prompts": len(rows), "tokens": sum(map(len, whole))}
    return Calibration(groups, full, every, _work(engine), digests, facts, next(iter(engine.layers.values())).matrix())


def _work(engine: Engine) -> int:
    """Return the multiply-adds of the base's linear layers per token."""
    adapted = sum(layer.in_features * layer.out_features for layer in engine.layers.values())
    return adapted + sum(module.weight.numel() for module in engine.execution.packing.others)


def _second_moments(engine: Engine, groups: Sequence[Group], rows: list[list[int]], batch: int = 16) -> dict[str, Any]:
    """Return the mean x xᵀ float64 [in, in] of each group's inputs over all tokens, by the group's first path."""
    moments = {group.paths[0]: torch.zeros(*[group.layers[0].in_features] * 2, dtype=torch.float64) for group in groups}
    mask = torch.empty(0)

    def watch(key: str) -> Any:
        def hook(_: Any, args: Any) -> None:
            x = args[0].flatten(0, -2)[mask.flatten()].cpu().double()
            moments[key] += x.T @ x

        return hook

    handles = [group.layers[0].register_forward_pre_hook(watch(group.paths[0])) for group in groups]
    device = engine.model.get_input_embeddings().weight.device
    try:
        with as_base(engine.layers):
            for start in range(0, len(rows), batch):
                ids, mask = right_pad(rows[start : start + batch], engine.pad_id, device)
                positions = (mask.long().cumsum(1) - 1).clamp_min(0)
                engine.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {key: total / sum(map(len, rows)) for key, total in moments.items()}


# ------------------------------------------------------------------ files


FILE = "truncation.safetensors"

FORMAT = "sigmix-truncation-1"

REMEDY = "fit one: sigmix adapt --fit-truncation --bank FOLDER"


def save_truncation(plan: Truncation, engine: Engine, path: str | os.PathLike[str]) -> None:
    """Write a plan as a safetensors file, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    for number, part in enumerate(plan.parts.values()):
        tensors |= {f"{number}.inputs": part.inputs, f"{number}.outputs": part.outputs, f"{number}.cores": part.cores}
    about = {
        "format": FORMAT, "base": engine.base_fingerprint, "groups": list(plan.parts), "error": plan.error,
        "cost": plan.cost, "experts": plan.experts, "facts": plan.facts,
    }  # fmt: skip
    content = save({k: v.cpu().contiguous() for k, v in tensors.items()}, {"truncation": json.dumps(about)})
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def load_truncation(engine: Engine, path: str | os.PathLike[str]) -> Truncation:
    """Read a plan for an engine on the same base.

    Raises:
        ExpertError: the file is missing or damaged. FingerprintError: the plan was fitted on another base.
    """
    path = Path(path)
    if not path.is_file():
        raise ExpertError(f"no truncation at {path}", remedy=REMEDY)
    with as_base(engine.layers):
        groups = {group.paths[0]: group for group in find_groups(engine.model, engine.layers, every=True)}
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["truncation"])
            if about["format"] != FORMAT:
                raise ValueError(about["format"])
            if (own := engine.base_fingerprint) != about["base"]:
                raise FingerprintError(
                    f"the truncation was fitted on the base {short(about['base'])} (fingerprint), this one is "
                    f"{short(own)}",
                    remedy="fit it anew on this base: sigmix adapt --fit-truncation --bank FOLDER",
                )
            count = len(about["experts"])
            parts = {key: _part(file, number, groups[key], count) for number, key in enumerate(about["groups"])}
        return Truncation(
            list(groups.values()), parts, float(about["error"]), float(about["cost"]), dict(about["experts"]),
            dict(about["facts"]),
        )  # fmt: skip
    except SigmixError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ExpertError(f"the truncation {path} cannot be read: {error!r}", remedy=REMEDY) from error


def _part(file: Any, number: int, group: Any, experts: int) -> LowRank:
    weight = group.layers[0].matrix()

    def read(name: str, *shape: int | None) -> torch.Tensor:
        tensor = file.get_tensor(f"{number}.{name}")
        sound = tensor.ndim == len(shape) and bool(tensor.isfinite().all())
        if not sound or any(want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)):
            raise ValueError(f"{name} of {group.paths[0]} is {tuple(tensor.shape)}")
        return tensor.to(weight.device, weight.dtype)

    inputs, outputs = read("inputs", None, weight.shape[1]), read("outputs", sum(group.sizes), None)
    cores = read("cores", len(group.paths), experts, outputs.shape[1], len(inputs))
    return LowRank(inputs, outputs, cores)


def bank_truncation(engine: Engine) -> Truncation:
    """Read the plan in the folder of the engine's bank.

    Raises:
        ConfigError: the bank has no folder. ExpertError, FingerprintError: see `load_truncation`.
    """
    folder = getattr(engine.bank, "folder", None)
    if folder is None:
        raise ConfigError("this bank has no folder to look for a truncation in", remedy="set engine.truncation")
    return load_truncation(engine, Path(folder) / FILE)
