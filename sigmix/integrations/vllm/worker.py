"""vLLM's worker side: the weight change of each token's mixture, added to the output of every adapted layer.

With the decomposition's factors of a matrix, W = second · first, a token x under gains g = z - 1 gets

    y = W x + second (g ⊙ first x)

and where the layer is not quantized and all its matrices are adapted, y = second ((1 + g) ⊙ first x) alone, which is
cheaper. The factors are shared by all mixtures; a slot holds the gains alone, for prompt and for answer tokens.

Under tensor parallelism, layers that split outputs have rows of ``second``, and layers that split inputs have columns
of ``first``: the change is linear in x, so it is part of what the all-reduce sums.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.utils.torch_utils import direct_register_custom_op

from sigmix.errors import ConfigError, ExpertError, SigmixError
from sigmix.experts.expert import Expert
from sigmix.export.base import BaseCheckpoint
from sigmix.integrations.vllm.adapter import Adapter, Settings
from sigmix.svf.functional import scaled
from sigmix.svf.layer import SVFLinear

MAX_GAIN = 1e4
"""Largest gain. Larger ones could overflow, and vLLM's attention on a CPU lets a NaN in a freed block of its KV cache
into other requests."""

log = logging.getLogger("vllm.sigmix")  # vLLM configures its own loggers alone


class Tokens:
    """Gains of the current batch's tokens.

    Attributes:
        index: int64 [max tokens], row of the gain tables for each token; a persistent buffer, so that captured graphs
            read it.
        rows: int64, tokens with a gain other than zero; None: all, or not known.
        others: int64, the other tokens; None: not known.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.index = torch.zeros(count, dtype=torch.long, device=device)
        self.rows: torch.Tensor | None = self.index[:0]
        self.others: torch.Tensor | None = None


@dataclass
class Part:
    """Matrix of a layer: its path in the base, columns in the output, and its local factors [r, in] and [out, r]."""

    path: str
    columns: slice
    first: torch.Tensor
    second: torch.Tensor


class MixtureMethod:
    """Linear method of a layer: the base's, then the change under each token's mixture.

    Args:
        method: the layer's own. parts: adapted matrices. slots: mixtures at once. tokens: of the batch. name: unique.
        whole: the parts are all of the layer, and it is not quantized.

    Attributes:
        table: float32 [2 (slots + 1), R], gains of the parts beside each other: of prompt tokens by slot, then of
            answer tokens; the last row of both is the base.
    """

    def __init__(
        self, method: Any, parts: Sequence[Part], slots: int, tokens: Tokens, name: str, whole: bool = False
    ) -> None:
        self.method, self.parts, self.tokens, self.name, self.whole = method, list(parts), tokens, name, whole
        self.sizes = [len(part.first) for part in parts]
        self.first = torch.cat([part.first for part in parts]).contiguous()
        for part, rows in zip(self.parts, self.first.split(self.sizes), strict=True):
            part.first = rows
        self.table = torch.zeros(2 * (slots + 1), sum(self.sizes), device=self.first.device)
        METHODS[name] = self

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["method"], name)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        rows, others = self.tokens.rows, self.tokens.others
        if torch.compiler.is_compiling() or not self.whole or others is None or (rows is not None and not len(rows)):
            y = self.method.apply(layer, x, bias)
            if torch.compiler.is_compiling():
                torch.ops.vllm.sigmix_add_change(x, y, self.name)
            else:
                self.add_change(x, y)
            return y
        flat = x.reshape(-1, x.shape[-1])
        index = self.tokens.index[: len(flat)]
        if rows is None:
            y = self._changed(flat, index, bias)
        else:
            unchanged = self.method.apply(layer, flat[others], bias)
            y = unchanged.new_empty(len(flat), unchanged.shape[-1])
            y[others], y[rows] = unchanged, self._changed(flat[rows], index[rows], bias)
        return y.view(*x.shape[:-1], -1)

    def _changed(self, x: torch.Tensor, index: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Outputs [N, out] of tokens [N, in] that have the rows ``index`` of the table."""
        hidden = scaled(F.linear(x, self.first), 1 + self.table[index])
        pairs = zip(hidden.split(self.sizes, -1), self.parts, strict=True)
        y = torch.cat([F.linear(own, part.second) for own, part in pairs], -1)
        return y if bias is None else y + bias

    def add_change(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the change of tokens x [N, in] to their outputs y [N, out] in place."""
        rows = self.tokens.rows
        if rows is not None and not len(rows):
            return
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        index = self.tokens.index[: len(flat)]
        if rows is not None:
            flat, index = flat[rows], index[rows]
        hidden = F.linear(flat, self.first)
        hidden = (hidden.float() * self.table[index]).to(hidden.dtype)
        for part, own in zip(self.parts, hidden.split(self.sizes, -1), strict=True):
            change, columns = F.linear(own, part.second), out[:, part.columns]
            columns.add_(change) if rows is None else columns.index_add_(0, rows, change)


METHODS: dict[str, MixtureMethod] = {}
"""By name, for the custom operator."""


def _add_change(x: torch.Tensor, y: torch.Tensor, name: str) -> None:
    METHODS[name].add_change(x, y)


def _no_change(x: torch.Tensor, y: torch.Tensor, name: str) -> None:
    """Operator on tensors without data."""


if not hasattr(torch.ops.vllm, "sigmix_add_change"):
    direct_register_custom_op(
        op_name="sigmix_add_change", op_func=_add_change, mutates_args=["y"], fake_impl=_no_change
    )


class MixtureManager:
    """Mixtures of a worker, in the place of vLLM's `LRUCacheWorkerLoRAManager`.

    The least recently used slot that the current batch does not need is replaced. A mixture that lost its slot is
    computed again from its experts, which stay in memory.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, embedding_modules: Any = None) -> None:
        settings, config = Settings.of(), vllm_config.lora_config
        if settings is None or config is None:
            raise ConfigError("mixtures need SIGMIX_VLLM_EXPERTS and --enable-lora", remedy="see docs/vllm.md")
        self.settings, self.device, self.config = settings, device, vllm_config
        self.slots = config.max_loras
        self.layers: list[MixtureMethod] = []
        self._tokens = Tokens(vllm_config.scheduler_config.max_num_batched_tokens, device)
        self._answers: np.ndarray | None = None  # bool, one per token of the batch; None: not known
        self._acting = np.zeros(2 * (self.slots + 1), dtype=bool)  # rows of the tables that are not zero
        self._experts: dict[tuple[str, str], Expert] = {}  # by base and digest, those that may be used
        self._basis: dict[tuple[str, str], SigmixError | None] = {}  # likewise: do their singular vectors differ?
        self._adapters: dict[int, Adapter | None] = {}  # by vLLM's number, also those without a slot; None: no change
        self._slot: OrderedDict[int, int] = OrderedDict()  # slot by number, least recently used first
        self._pinned: set[int] = set()

    # ------------------------------------------------------------------ layers

    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig | None = None) -> nn.Module:
        """Adapt the layers that an expert of the bank changes; returns the model.

        Raises:
            SigmixError: the base cannot be read, or lacks a matrix of the experts.
        """
        base = self.settings.base or self.config.model_config.model
        dtype = str(self.config.model_config.dtype).removeprefix("torch.")
        self.base = BaseCheckpoint(base, dtype)
        experts = self._readable()
        wanted = {path for expert in experts for path in expert.z}
        packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        found: set[str] = set()
        for prefix, layer in model.named_modules():
            if not isinstance(layer, LinearBase):
                continue
            parent, _, last = prefix.rpartition(".")
            paths = [self._path(f"{parent}.{part}" if parent else part) for part in packed.get(last, [last])]
            if acting := {path: number for number, path in enumerate(paths) if path in wanted}:
                shards = shards_of(layer, len(paths))
                parts = [self._part(path, experts, *shards[number]) for path, number in acting.items()]
                whole = len(acting) == len(paths) and isinstance(layer.quant_method, UnquantizedLinearMethod)
                layer.quant_method = MixtureMethod(layer.quant_method, parts, self.slots, self._tokens, prefix, whole)
                self.layers.append(layer.quant_method)
                found.update(acting)
        if missing := sorted(wanted - found):
            raise ExpertError(
                f"vLLM's {type(model).__name__} has no layer for {missing[0]}, one of {len(missing)} matrices of the "
                f"experts in {self.settings.experts}",
                remedy="serve the base of these experts, or set SIGMIX_VLLM_EXPERTS to experts of this base",
            )
        log.info("sigmix: %d layers adapted, %d mixtures at once", len(self.layers), self.slots)
        return model

    def _path(self, name: str) -> str:
        """Path in the base of a matrix that vLLM calls ``name``: the only one with the longest common ending, or ""."""
        ends = name.split(".")
        for start in range(len(ends)):
            ending = ".".join(ends[start:])
            same = [path for path in self.base.linears if path == ending or path.endswith(f".{ending}")]
            if same:
                return same[0] if len(same) == 1 else ""
        return ""

    def _readable(self) -> list[Expert]:
        """Experts of the bank on this base; another one is an error for the requests that name it."""
        bank, experts = self.settings.bank(), []
        for name in bank:
            try:
                self.base.check(bank[name])
                experts.append(bank[name])
            except SigmixError as error:
                log.error("expert %s cannot be served: %s", name, error)
        return experts

    def _part(
        self, path: str, experts: Sequence[Expert], columns: slice, outputs: torch.Tensor | None, inputs: slice
    ) -> Part:
        layer = self.base.layer(path)
        for expert in experts:
            self._check_basis(expert, path, layer)
        first, second = layer.factors()
        second = second if outputs is None else second[outputs]
        return Part(path, columns, first[:, inputs].to(self.device), second.contiguous().to(self.device))

    # ------------------------------------------------------------------ mixtures

    def add_adapter(self, request: LoRARequest) -> bool:
        """Give a mixture a slot; returns False if it has one.

        Raises:
            SigmixError: a damaged or changed expert, one of another base, or matrices that no expert had at start.
        """
        self._register(request)
        return self._place(request.lora_int_id)

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """Give a mixture without any change a slot, for vLLM's warm-up."""
        self._adapters.setdefault(request.lora_int_id, None)
        return self._place(request.lora_int_id)

    def _register(self, request: LoRARequest) -> None:
        if request.lora_int_id not in self._adapters:
            adapter = Adapter.parse(request.lora_path)
            self._check(adapter)
            self._adapters[request.lora_int_id] = adapter

    @torch.inference_mode(False)  # vLLM's loop is in that mode, whose tensors have no version to recognize them by
    def _check(self, adapter: Adapter) -> None:
        if adapter.prompt and self.config.use_v2_model_runner:
            raise ConfigError(
                f"{adapter.name} has experts that act on prompt tokens only, which vLLM's second model runner does not "
                "tell apart",
                remedy="set VLLM_USE_V2_MODEL_RUNNER=0",
            )
        bank = self.settings.bank()
        for name, digest in adapter.experts.items():
            if (key := (adapter.base, digest)) not in self._experts:
                expert = bank[name]
                if _key(expert) != key:
                    raise ExpertError(
                        f"expert {name!r} has changed on disk since {adapter.name} was named", remedy="request it again"
                    )
                self.base.check(expert)
                for path in () if key in self._basis else expert.z:
                    self._check_basis(expert, path, self.base.layer(path))
                if (error := self._basis[key]) is not None:
                    raise error
                self._experts[key] = expert
        for gains in self._gains(adapter):
            if any(float(gain.abs().max()) > MAX_GAIN for gain in gains.values()):
                raise ExpertError(
                    f"{adapter.name} changes a singular value by more than {MAX_GAIN:g} times",
                    remedy="use smaller weights",
                )

    def _check_basis(self, expert: Expert, path: str, layer: SVFLinear) -> None:
        """Compare an expert's sketch of a matrix with the factors; the first error stays."""
        known = self._basis.setdefault(_key(expert), None)
        if known is None and path in expert.z:
            try:
                self.base.check_sketches([expert], path, layer)
            except ExpertError as error:
                self._basis[_key(expert)] = error

    def _gains(self, adapter: Adapter) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """{path: float32 gain [r]} of prompt tokens, and of answer tokens."""
        experts = {name: self._experts[adapter.base, digest] for name, digest in adapter.experts.items()}
        ranks = {
            part.path: size
            for layer in self.layers
            for part, size in zip(layer.parts, layer.sizes, strict=True)
        }  # fmt: skip
        answer = type(adapter.mix)({k: a for k, a in adapter.mix.weights.items() if experts[k].positions == "all"})
        prompt_z, answer_z = adapter.mix.z(experts, ranks), answer.z(experts, ranks)
        return {path: z - 1 for path, z in prompt_z.items()}, {path: z - 1 for path, z in answer_z.items()}

    def _place(self, number: int, needed: Collection[int] = ()) -> bool:
        if number in self._slot:
            self._slot.move_to_end(number)
            return False
        if len(self._slot) < self.slots:
            slot = next(one for one in range(self.slots) if one not in self._slot.values())
        else:
            free = (one for one in self._slot if one not in needed and one not in self._pinned)
            oldest = next(free, None)
            if oldest is None:
                raise ConfigError(f"all {self.slots} slots are in use or pinned", remedy="raise --max-loras")
            slot = self._slot.pop(oldest)
        adapter = self._adapters[number]
        both = ({}, {}) if adapter is None else self._gains(adapter)
        for kind, gains in enumerate(both):
            row = kind * (self.slots + 1) + slot
            self._acting[row] = any(bool(gain.any()) for gain in gains.values())
            for layer in self.layers:
                if gains:
                    layer.table[row] = torch.cat([gains[part.path] for part in layer.parts]).to(self.device)
                else:
                    layer.table[row] = 0
        self._slot[number] = slot
        return True

    # ------------------------------------------------------------------ batches

    @contextmanager
    def tokens(self, scheduled: np.ndarray, computed: np.ndarray, prompts: np.ndarray) -> Iterator[None]:
        """Set which tokens of the next batch are answer tokens.

        Args:
            scheduled: tokens of each request in the batch. computed: those before. prompts: length of its prompt.
        """
        ends = np.cumsum(scheduled)
        positions = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - scheduled - computed, scheduled)
        self._answers = positions >= np.repeat(prompts, scheduled)
        try:
            yield
        finally:
            self._answers = None

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Give the batch's mixtures slots, and each token its row of the gain tables."""
        for request in requests:
            self._register(request)
        if mapping is None:
            return
        numbers = np.asarray(mapping.index_mapping)
        needed = {int(number) for number in np.unique(numbers) if number > 0}
        for number in needed:  # two spellings of a mixture are equal requests with different numbers
            self._place(number, needed)
        rows = np.full(len(numbers), self.slots)
        for number in needed:
            rows[numbers == number] = self._slot[number]
        if self._answers is not None:
            rows += self._answers[: len(rows)] * (self.slots + 1)
        tokens = self._tokens
        tokens.index.fill_(self.slots)
        tokens.index[: len(rows)] = torch.from_numpy(rows).to(self.device)
        if self.device.type != "cpu":  # a captured graph computes all tokens, and those of the base bit for bit
            tokens.rows = None if needed else tokens.index[:0]
            return
        acting = self._acting[rows]
        tokens.rows = None if acting.all() else torch.from_numpy(np.flatnonzero(acting))
        tokens.others = torch.from_numpy(np.flatnonzero(~acting))

    # ------------------------------------------------------------------ vLLM's interface

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Warm up inside this context; mixtures without a change cost nothing."""
        yield

    def get_dummy_lora_warmup_rank(self, default: int) -> int:
        """Return the rank of `add_dummy_lora`, which has no meaning here."""
        return default

    def supports_tower_connector_lora(self) -> bool:
        """Return False: experts change the language model."""
        return False

    def remove_adapter(self, number: int) -> bool:
        """Free a mixture's slot; returns False if it has none."""
        self._pinned.discard(number)
        self._adapters.pop(number, None)
        return self._slot.pop(number, None) is not None

    def remove_all_adapters(self) -> None:
        """Free all slots."""
        for number in list(self._slot):
            self.remove_adapter(number)

    def pin_adapter(self, number: int) -> bool:
        """Keep a mixture in its slot."""
        if number not in self._adapters:
            raise ConfigError(f"there is no mixture with the number {number}")
        self._place(number)
        self._pinned.add(number)
        return True

    def list_adapters(self) -> set[int]:
        """Return the numbers of the mixtures in slots."""
        return set(self._slot)


def _key(expert: Expert) -> tuple[str, str]:
    """Identity of an expert's numbers: experts of different bases can have equal z."""
    return str(expert.base.get("fingerprint")), expert.digest


def shards_of(layer: LinearBase, count: int) -> list[tuple[slice, torch.Tensor | None, slice]]:
    """Return, for each of ``count`` matrices that a layer holds, its part on this worker.

    Returns:
        For each matrix: its columns in the layer's local output; the rows of the matrix there, None: all; the columns
        of the matrix there.
    """
    every = slice(None)
    rank, size = layer.tp_rank, layer.tp_size
    if isinstance(layer, RowParallelLinear):
        width = layer.input_size_per_partition
        return [(every, None, slice(rank * width, (rank + 1) * width))]
    if not isinstance(layer, ColumnParallelLinear):
        return [(every, None, every)]
    if isinstance(layer, QKVParallelLinear):
        heads = [layer.num_heads * layer.head_size, *([layer.num_kv_heads * layer.head_size] * 2)]
        ranks = [rank, *([rank // layer.num_kv_head_replicas] * 2)]
        totals = [layer.total_num_heads * layer.head_size, *([layer.total_num_kv_heads * layer.head_size] * 2)]
    else:
        totals = list(layer.output_sizes) if isinstance(layer, MergedColumnParallelLinear) else [layer.output_size]
        heads, ranks = [total // size for total in totals], [rank] * len(totals)
    if count == 1:  # one matrix of the base for all parts of the layer
        begins = [sum(totals[:number]) for number in range(len(totals))]
        rows = torch.cat([
            torch.arange(begin + own * width, begin + (own + 1) * width)
            for begin, own, width in zip(begins, ranks, heads, strict=True)
        ])  # fmt: skip
        return [(every, rows, every)]
    if count != len(totals):
        raise ConfigError(f"vLLM's {layer.prefix} holds {len(totals)} matrices, but the base has {count} for it")
    ends = [sum(heads[: number + 1]) for number in range(count)]
    return [
        (slice(end - width, end), torch.arange(own * width, (own + 1) * width), every)
        for end, width, own in zip(ends, heads, ranks, strict=True)
    ]
