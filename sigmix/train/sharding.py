"""Policies of several processes: equal copies of the base, or one base that is sharded with FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sigmix.errors import ConfigError
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import fingerprint
from sigmix.models import weights
from sigmix.models.digests import weight_digest
from sigmix.svf.config import SVFConfig
from sigmix.svf.linears import factors_of, shape_of
from sigmix.svf.tuner import svf_layers, target_layers
from sigmix.tasks.base import Sample
from sigmix.train.config import TrainConfig
from sigmix.train.distributed import Processes
from sigmix.train.policy import Policy, SVFPolicy, make_policy, svf_config
from sigmix.utils.cache import cache_dir


def build_policy(base: nn.Module, config: TrainConfig, processes: Processes, shard: bool) -> Policy:
    """Return the policy of a run, after checking that all processes have the same base and decompositions.

    Gradients of z from different decompositions must not be summed. Machines without a common cache can disagree,
    because near-equal singular values let the hardware rotate their singular vectors.

    Raises:
        ConfigError: ``shard`` with one process, another policy than SVF, the reference parametrization, or a base that
            is quantized, offloaded or without decoder blocks; LoRA dropout in several processes; processes differ.
    """
    if processes.world_size > 1 and config.policy == "lora" and config.lora_dropout:
        raise ConfigError(
            f"lora_dropout {config.lora_dropout} draws differently in each process, so that the result would depend on "
            "their number",
            remedy="set lora_dropout to 0, or start one process",
        )
    if shard:
        _check_shardable(base, config, processes)
    if processes.world_size == 1:
        return make_policy(base, config)
    if config.policy == "svf":
        processes.gather(lambda: _decompose_share(base, config, processes))
    policy: Policy = ShardedPolicy(base, config, processes) if shard else make_policy(base, config)

    def digests() -> dict[str, str]:
        if isinstance(policy, ShardedPolicy):
            return policy.digests
        layers = svf_layers(policy.model)
        sides = {f"decomposition of {path}": weight_digest(layer.svf_short) for path, layer in layers.items()}
        return {"base": fingerprint(policy.model), **sides}

    processes.check_equal(
        digests,
        "give all machines the same files of the base and the same decompositions: a cache folder that they share "
        f"(SIGMIX_CACHE), or copies of {cache_dir() / 'svd'} of process 0's machine",
    )
    return policy


def check_text(samples: Sequence[Sample]) -> None:
    """Raise `ConfigError` if a sample contains images: they are embedded outside the passes that gather weights."""
    if sample := next((sample for sample in samples if sample.images), None):
        raise ConfigError(
            f"--shard supports text only, and sample {sample.id} contains {sample.images[0].name}",
            remedy="leave out --shard, or choose a task without images",
        )


def _decompose_share(base: nn.Module, config: TrainConfig, processes: Processes) -> None:
    """Decompose this process's share of the layers into the cache, so that each is decomposed once."""
    layers = target_layers(base, svf_config(config))
    order = sorted(layers, key=lambda path: (-min(shape_of(layers[path])), path))
    for path in order[processes.rank :: processes.world_size]:
        factors_of(layers[path])


def _check_shardable(base: nn.Module, config: TrainConfig, processes: Processes) -> None:
    if processes.world_size == 1:
        raise ConfigError(
            "--shard requires several processes",
            remedy="start them with accelerate launch or torchrun, or leave out --shard",
        )
    if config.policy != "svf" or config.parametrization != "direct":
        raise ConfigError("--shard requires policy svf in its direct parametrization")
    kinds = {weights.kind(layer) for layer in target_layers(base, svf_config(config)).values()}
    if unsupported := sorted(kinds & {weights.QUANTIZED, weights.OFFLOADED}):
        raise ConfigError(
            f"--shard splits plain weights, and this base is {unsupported[-1]}",
            remedy="leave out --shard, or load the base without quantization and offloading",
        )
    _blocks(base)


class ShardedPolicy(SVFPolicy):
    """`SVFPolicy` with weights and factors sharded over the processes, one decoder block at a time (FSDP2).

    Every forward pass is collective. Only the gain form runs, since merging would need whole weights.

    Args:
        base: whole model on the CPU, which stays as it is. processes: at least two.

    Attributes:
        digests: of the base and of each decomposition, taken before they are split.
    """

    sharded = True

    def __init__(self, base: nn.Module, config: TrainConfig, processes: Processes) -> None:
        self.base, self.processes = base, processes
        self.digests = {"base": fingerprint(base)}
        self._announcing = False
        super().__init__(base, config)
        processes.collective_forward = True

    def _inject(self, base: nn.Module, config: SVFConfig) -> PeftModel:
        device = self.processes.device or torch.device("cpu")
        # a copy on the meta device, filled block by block, so that no more than one block's factors are whole
        meta = {p: nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in base.parameters()}
        source = {id(empty): parameter for parameter, empty in meta.items()}
        skeleton = copy.deepcopy(base, {id(parameter): empty for parameter, empty in meta.items()})
        model: Any = get_peft_model(skeleton, config).eval()
        layers = svf_layers(model)
        z = set()
        for layer in layers.values():
            layer.svf_z["default"].weight = nn.Parameter(torch.ones(layer.r, device=device))
            z.add(layer.svf_z["default"].weight)
        paths = {layer: path for path, layer in layers.items()}
        mesh = init_device_mesh(device.type, (self.processes.world_size,))
        for block in [*_blocks(skeleton), model]:
            _fill(block, source)
            for layer in svf_layers(block).values():
                if layer.svf_short is None:
                    layer.ensure_factors()
                    short = layer.svf_short
                    self.digests[f"decomposition of {paths[layer]}"] = weight_digest(short)
                    del layer.svf_short
                    layer.register_parameter("svf_short", nn.Parameter(short, requires_grad=False))
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=z)
        model.register_forward_pre_hook(self._announce, prepend=True)  # before FSDP's hook, which gathers weights
        return model

    def expert(self, name: str, meta: Mapping[str, Any]) -> Expert:
        """Return the current z as an expert of the base."""
        return Expert(name, self.z(), {**meta, "positions": self.positions}).sealed(self.base)

    @contextmanager
    def acting(self, z: Mapping[str, torch.Tensor] | None = None, tokens: int | None = None) -> Iterator[None]:
        """Apply the policy's z, or another one, for inference; returns when all processes have finished.

        A process with fewer passes than the others (shorter completions) runs empty ones along, since every pass is
        collective.
        """
        own = {path: parameter.data for path, parameter in self.parameters().items()}
        try:
            for path, parameter in self.parameters().items():
                parameter.data = own[path] if z is None else z[path].to(own[path])
            self._announcing = True
            with self.learning():
                yield
            self._run_along()
        finally:
            self._announcing = False
            for path, parameter in self.parameters().items():
                parameter.data = own[path]

    def _announce(self, *_: Any) -> None:
        if self._announcing:
            self.processes.any(True)

    @torch.no_grad()
    def _run_along(self) -> None:
        while self.processes.any(False):
            self._announcing = False  # the other processes announced this pass
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.processes.device), use_cache=False)
            self._announcing = True


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks, by transformers' ``_no_split_modules``.

    Raises:
        ConfigError: the model's class names none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        message = f"{type(model).__name__} names no decoder blocks (_no_split_modules) to shard by"
        raise ConfigError(message, remedy="leave out --shard, or choose another base")
    return blocks


def _fill(module: nn.Module, source: Mapping[int, nn.Parameter]) -> None:
    """Replace a module's meta parameters by the base's values, without a copy."""
    filled: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                key = id(parameter)
                value = filled.setdefault(key, nn.Parameter(source[key].data, requires_grad=False))
                part.register_parameter(name, value)
