"""A base that does not fit one device, spread over the processes of a run with torch's FSDP2 (`fully_shard`).

Every process holds 1/N of each weight W and of each decomposition's square side (the factors are made parameters for
that), and all of z, whose gradients are added up as without sharding. A decoder block is whole only while it runs. So
nothing here merges: acting and learning both use the gain form, W (x + V (g ⊙ Vᵀx)) or y + U (g ⊙ Uᵀy), which moves
mn + r² numbers per matrix between processes where the factored form would move r (m + n), and mn again for the KL.

The base itself stays on the CPU as it was loaded. transformers maps a safetensors file into memory where the dtype is
the file's own, and then the processes of a machine share its pages; blocks are copied to the device one at a time.
Fingerprint and sketches are taken from that base.

All processes must run the same passes, for every pass gathers weights. Where they learn they do by construction; where
they answer, those that are done first run along on one token until all are done.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sigmix.errors import ConfigError
from sigmix.experts.base import factors_of, linears
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import fingerprint
from sigmix.files import cache_dir
from sigmix.svf import weights
from sigmix.svf.decompose import weight_digest
from sigmix.svf.tuner import SVFConfig, svf_layers
from sigmix.tasks.base import Sample
from sigmix.train.config import TrainConfig
from sigmix.train.policy import PeftPolicy, SVFPolicy, make_policy
from sigmix.train.processes import Processes


def shared_policy(base: Any, config: TrainConfig, processes: Processes, shard: bool) -> SVFPolicy | PeftPolicy:
    """The policy of a run of one or several processes, which hold the same base and the same decompositions.

    Raises:
        ConfigError: `shard` where there is one process only, with another policy than SVF, with the reference
            parameterisation, or for a base that is quantised, offloaded or without blocks; LoRA's dropout in several
            processes. ProcessError: processes hold different bases or decompositions.
    """
    if processes.count > 1 and config.policy == "lora" and config.lora_dropout:
        raise ConfigError(
            f"with lora_dropout {config.lora_dropout} the result would depend on the number of processes: each draws "
            "what it drops by itself",
            remedy="leave lora_dropout at 0, or start one process",
        )
    if shard:
        _check_shardable(base, config, processes)
    if processes.count == 1:
        return make_policy(base, config)
    paths: list[str] = []
    if config.policy == "svf":
        paths = processes.gather(lambda: _decompose_share(base, config, processes))[processes.rank]
    if not shard:
        policy = make_policy(base, config)
        layers = svf_layers(policy.model)
        _check_same(policy.model, ((path, layers[path].svf_short) for path in paths), processes)
        return policy
    modules = linears(base)
    _check_same(base, ((path, factors_of(modules[path]).short) for path in paths), processes)
    made: list[ShardedPolicy] = []
    processes.gather(lambda: made.append(ShardedPolicy(base, config, processes)))
    return made[0]


def check_text(samples: Sequence[Sample]) -> None:
    """Raise `ConfigError` if a sample shows images, which are read outside the passes that gather a sharded base."""
    if shown := next((sample for sample in samples if sample.images), None):
        raise ConfigError(
            f"--shard reads text only, and sample {shown.id} shows {shown.images[0].name}",
            remedy="leave out --shard, or choose a task without images",
        )


def skeleton(base: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are on the meta device, without values; buffers are copied.

    What a parameter has beside shape and dtype is left behind: a quantised one becomes an empty plain one, and an
    offloaded one has no disk to be read from.
    """
    # not empty_like, which quantised tensors do not know
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
        for p in base.parameters()
    }
    memo |= {id(module._hf_hook): None for module in base.modules() if weights.is_offloaded(module)}
    return copy.deepcopy(base, memo)


def _check_shardable(base: Any, config: TrainConfig, processes: Processes) -> None:
    if processes.count == 1:
        raise ConfigError(
            "a base is sharded over several processes, and this is one",
            remedy="start them with accelerate launch or torchrun, or leave out --shard",
        )
    if config.policy != "svf" or config.parameterisation != "direct":
        raise ConfigError("--shard goes with the svf policy in its direct parameterisation only")
    kinds = {weights.kind(module) for module in linears(base).values()}
    if unfit := sorted(kinds & {weights.QUANTISED, weights.OFFLOADED}):
        raise ConfigError(
            f"--shard splits plain weights, and this base is {unfit[-1]}",
            remedy="leave out --shard, or load the base without quantization and offloading",
        )
    _blocks(base)


def _targets(config: TrainConfig) -> SVFConfig:
    return SVFConfig(target_modules=config.targets, layers_to_transform=config.layers)


def _decompose_share(base: nn.Module, config: TrainConfig, processes: Processes) -> list[str]:
    """Put this process's share of the decompositions into the cache, so that each is computed once.

    Returns:
        The paths of all layers that the policy adapts.
    """
    layers = svf_layers(get_peft_model(skeleton(base), _targets(config)))
    modules = linears(base)
    for path in sorted(layers, key=lambda path: (-layers[path].r, path))[processes.rank :: processes.count]:
        factors_of(modules[path])
    return list(layers)


def _check_same(model: nn.Module, shorts: Iterable[tuple[str, torch.Tensor]], processes: Processes) -> None:
    """Raise `ProcessError` unless all processes hold the same base and the same short sides, one in memory at a time.

    Gradients of z from other decompositions would be added up as if they belonged to the same components. Machines
    without a common cache can differ so, because near-equal singular values let hardware rotate their vectors.
    """

    def work() -> dict[str, str]:
        sides = {f"another decomposition of {path}": weight_digest(short) for path, short in shorts}
        return {"another base": fingerprint(model), **sides}

    processes.check_same(
        work,
        "give all machines the same files of the base and the same decompositions: a cache folder that they share "
        f"(SIGMIX_CACHE), or copies of {cache_dir() / 'svd'} of process 0's machine",
    )


class ShardedPolicy(SVFPolicy):
    """`SVFPolicy` on a sharded base.

    Args:
        base: a whole model on the CPU, which stays as it is. processes: at least two.
    """

    sharded = True

    def __init__(self, base: nn.Module, config: TrainConfig, processes: Processes) -> None:
        self.base, self.processes = base, processes
        self._answering = False
        super().__init__(base, config)
        for layer in self.layers.values():
            layer.form = "gain"
        processes.meets = True  # from the first pass on; until here an error can still be carried to the others

    def _wrapped(self, base: nn.Module, targets: SVFConfig) -> nn.Module:
        device = self.processes.device or torch.device("cpu")
        empty = skeleton(base)
        model: Any = get_peft_model(empty, targets).eval()
        values = dict(base.named_parameters(remove_duplicate=False))
        # every parameter of the skeleton knows which of the base's it stands for; tied ones are one
        meaning = {id(p): values[name] for name, p in _base_names(empty)}
        learnt = set()
        for layer in svf_layers(model).values():
            z = nn.Parameter(torch.ones(layer.r, device=device))
            layer.svf_z["default"].weight = z
            learnt.add(z)
        mesh = init_device_mesh(device.type, (self.processes.count,))
        for part in [*_blocks(empty), model]:
            _fill(part, meaning)
            fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=learnt)
        # before FSDP's own hook, which gathers weights
        model.register_forward_pre_hook(self._announce, prepend=True)
        return model

    def expert(self, name: str, meta: Mapping[str, Any]) -> Expert:
        """The current z as an expert, sealed for the base."""
        return Expert(name, self.z(), meta).sealed(self.base)

    @contextmanager
    def acting(self, z: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
        """As `SVFPolicy.acting`, in the gain form; leaves only when all processes do."""
        own = {path: parameter.data for path, parameter in self.parameters().items()}
        try:
            for path, parameter in self.parameters().items():
                parameter.data = own[path] if z is None else z[path].to(own[path])
            self._answering = True
            yield
            self._run_along()
        finally:
            self._answering = False
            for path, parameter in self.parameters().items():
                parameter.data = own[path]

    @contextmanager
    def learning(self) -> Iterator[None]:
        yield

    def _announce(self, *_: Any) -> None:
        if self._answering:
            self.processes.anyone(True)

    @torch.no_grad()
    def _run_along(self) -> None:
        device = self.processes.device or torch.device("cpu")
        while self.processes.anyone(False):
            self._answering = False  # the others announce this pass
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
            self._answering = True


def _base_names(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The base's parameters inside an adapted model, by the names that they have in the base."""
    return [
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ".svf_z." not in name
    ]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, as transformers names their classes.

    Raises:
        ConfigError: it names none, so there is nothing that could be gathered and freed on its own.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} names no blocks to shard by", remedy="leave out --shard, or choose another base"
        )
    return found


def _fill(module: nn.Module, meaning: Mapping[int, torch.Tensor]) -> None:
    """Give a module's empty parameters the base's values, and make the factors of its layers parameters too.

    Values are of the base's own storage: whoever moves them makes the copy.
    """
    made: dict[int, nn.Parameter] = {}  # a tied one must stay one
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = meaning[id(parameter)].data
                part.register_parameter(
                    name, made.setdefault(id(parameter), nn.Parameter(value, requires_grad=False))
                )
    for layer in svf_layers(module).values():
        if layer.svf_short is None:
            layer.ensure_factors()
            short = layer.svf_short
            del layer.svf_short
            layer.register_parameter("svf_short", nn.Parameter(short, requires_grad=False))
