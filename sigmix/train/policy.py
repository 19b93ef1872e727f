"""Policies of the training loop. A policy puts its model into one of three states:

acting      rollouts and validation under z: merged weights, or unmerged where that is faster
learning    gradients reach the policy's parameters, never the base's weights
reference   the base, bit for bit

With `TrainConfig.positions` "prompt" the adapter acts on prompts alone: inside `prompt_only` the base reads the tokens
of the answers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize

from sigmix.engine.cpu.kernels import Packing
from sigmix.engine.execution import as_base, as_expert, gain_only, merging_pays
from sigmix.errors import ConfigError
from sigmix.experts.expert import Expert
from sigmix.models.batching import batching
from sigmix.svf.config import SVFConfig
from sigmix.svf.functional import reference_z
from sigmix.svf.layer import SingularScale, prompt_only
from sigmix.svf.tuner import svf_layers, target_layers
from sigmix.train.config import TrainConfig
from sigmix.utils.io import atomic_dir


class ReferenceZ(nn.Module):
    """Parametrization of z in the public implementation; its parameter p is initialized to 0.1 + 0.01·N(0, 1)."""

    s: torch.Tensor

    def __init__(self, s: torch.Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("s", s, persistent=False)
        self.initial = 0.1 + 0.01 * torch.randn(len(s), generator=generator)

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        return reference_z(p, self.s)

    def right_inverse(self, z: torch.Tensor) -> torch.Tensor:
        return self.initial.to(z.device)


class SVFPolicy:
    """Trains z, the scales of the singular values (section 3.1 of the paper).

    Attributes:
        sharded: True if every forward pass is collective, see `sigmix.train.sharding.ShardedPolicy`.
        positions: see `TrainConfig`.
    """

    sharded = False

    def __init__(self, base: nn.Module, config: TrainConfig) -> None:
        self.positions = config.positions
        self.model = self._inject(base, svf_config(config))
        self.layers = svf_layers(self.model)
        self.direct = config.parametrization == "direct"
        if not self.direct:
            generator = torch.Generator().manual_seed(config.seed)
            for layer in self.layers.values():
                parametrize.register_parametrization(
                    layer.svf_z["default"], "weight", ReferenceZ(layer.svf_s, generator)
                )

    def _inject(self, base: nn.Module, config: SVFConfig) -> PeftModel:
        return get_peft_model(base, config).eval()

    def expert(self, name: str, meta: Mapping[str, Any]) -> Expert:
        """Return the current z as an expert of the base."""
        return Expert.from_model(self.model, name=name, meta=meta)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return {path: float32 [r]}: z, or p with the reference parametrization."""
        name = "weight" if self.direct else "parametrizations.weight.original"
        return {path: layer.svf_z["default"].get_parameter(name) for path, layer in self.layers.items()}

    def z(self) -> dict[str, torch.Tensor]:
        """Return the effective z by path, float32 [r] on the CPU."""
        return {path: layer.svf_z["default"].weight.detach().cpu().clone() for path, layer in self.layers.items()}

    def acting(
        self, z: Mapping[str, torch.Tensor] | None = None, tokens: int | None = None
    ) -> AbstractContextManager[None]:
        """Apply the policy's z, or another one, for inference.

        Args:
            tokens: upper bound of the answers' tokens, for which merging may not pay; None: many.
        """
        if z is not None and all(bool((one == 1).all()) for one in z.values()):
            return self.reference()
        many = tokens is None or merging_pays(self.layers, tokens)
        if self.positions == "all" and (many or not self._packing.on):
            return as_expert(self.layers, self.z() if z is None else z)
        return self._unmerged({} if z is None else z)

    @functools.cached_property
    def _packing(self) -> Packing:
        with self.reference():
            return Packing(self.model, self.layers)

    @contextmanager
    def _unmerged(self, z: Mapping[str, torch.Tensor]) -> Iterator[None]:
        own = {path: self.layers[path].svf_z["default"] for path in z}
        try:
            for path in z:
                layer = self.layers[path]
                layer.svf_z["default"] = SingularScale(layer.r, layer.device)
                layer.svf_z["default"].weight.data.copy_(z[path])
            with self.learning(), self._packing.using(None, "factored" if self.positions == "all" else None):
                yield
        finally:
            for path, scale in own.items():
                self.layers[path].svf_z["default"] = scale

    def prompt_only(self, mask: bool | torch.Tensor) -> AbstractContextManager[None]:
        """Read answers, the tokens where ``mask`` (for all, or [B, T]) is False, as `TrainConfig.positions` says."""
        return prompt_only(self.layers, mask) if self.positions == "prompt" else nullcontext()

    def reference(self) -> AbstractContextManager[None]:
        """Apply the base."""
        return as_base(self.layers)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Apply the policy's z with gradients."""
        form = "gain" if self.sharded or gain_only(self.layers) else "factored"
        for layer in self.layers.values():
            layer.form = form
        with prompt_only(self.layers, True):  # the passes are divided here, not by `sigmix.svf.prompt_tokens`
            yield

    def load(self, folder: Path) -> None:
        """Load the z of a saved expert."""
        z = Expert.from_pretrained(folder).z
        with torch.no_grad():
            for path, parameter in self.parameters().items():
                parameter.copy_(z[path])

    def after_step(self) -> None:
        """Clamp z at 0: a negative z flips the component's sign, and no expert may hold one."""
        if self.direct:
            with torch.no_grad():
                for parameter in self.parameters().values():
                    parameter.clamp_(min=0.0)


class PeftPolicy:
    """Trains PEFT's LoRA on `TrainConfig.target_modules`, or its IA3 on the modules of PEFT's table."""

    sharded = False

    def __init__(self, base: nn.Module, config: TrainConfig) -> None:
        self.positions = config.positions
        if self.positions == "prompt" and (batching(base).recurrent or batching(base).threshold is not None):
            raise ConfigError(
                f"policy {config.policy} cannot act on prompts alone on this base, where answers are not read behind "
                "cached keys and values",
                remedy="set positions to all, or policy to svf",
            )
        torch.manual_seed(config.seed)
        self.model: PeftModel = get_peft_model(base, _peft_config(base, config)).eval()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def z(self) -> dict[str, torch.Tensor]:
        """Return copies of the parameters on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters().items()}

    @contextmanager
    def acting(self, z: Mapping[str, torch.Tensor] | None = None, tokens: int | None = None) -> Iterator[None]:
        """Apply the adapter for inference: merged, or as it is for prompts alone."""
        if z is not None:
            raise ConfigError("a LoRA or IA3 policy acts under its own parameters only")
        with merged_adapter(self.model) if self.positions == "all" else nullcontext():
            yield

    def prompt_only(self, mask: bool | torch.Tensor) -> AbstractContextManager[None]:
        """Read answers as `TrainConfig.positions` says; a mask of single tokens does not occur, see `__init__`."""
        assert isinstance(mask, bool)
        return self.reference() if self.positions == "prompt" and not mask else nullcontext()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Apply the base."""
        with self.model.disable_adapter():
            yield

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Apply the adapter with gradients and LoRA's dropout; the base's own dropout stays off, as while acting."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        dropouts = nn.ModuleList(m for layer in layers for m in getattr(layer, "lora_dropout", {}).values()).train()
        try:
            yield
        finally:
            dropouts.eval()

    def after_step(self) -> None:
        """Do nothing: the parameters have no constraints."""

    def save(self, folder: Path) -> None:
        """Write a PEFT adapter folder atomically."""
        with atomic_dir(folder) as temporary:
            self.model.save_pretrained(str(temporary))

    def load(self, folder: Path) -> None:
        """Load the parameters of a saved adapter of the same shape."""
        set_peft_model_state_dict(self.model, load_peft_weights(str(folder), device="cpu"))


Policy: TypeAlias = SVFPolicy | PeftPolicy


@contextmanager
def merged_adapter(model: PeftModel) -> Iterator[None]:
    """Merge a PEFT model's active adapter into copies of the weights; the base's weights return bit for bit."""
    bases: list[Any] = [m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    kept = [(p, p.data) for base in bases for p in (base.weight, getattr(base, "bias", None)) if p is not None]
    try:
        for parameter, data in kept:
            parameter.data = data.clone()
        model.merge_adapter()
        yield
    finally:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merged_adapters.clear()
        for parameter, data in kept:
            parameter.data = data


def svf_config(config: TrainConfig) -> SVFConfig:
    """Return the PEFT configuration of an SVF run."""
    return SVFConfig(
        target_modules=config.target_modules, layers_to_transform=config.layers_to_transform, positions=config.positions
    )


def _peft_config(base: nn.Module, config: TrainConfig) -> PeftConfig:
    if config.policy == "ia3":
        return IA3Config()
    targets = config.target_modules
    if targets != "all-linear":  # names that match nothing are refused, as for SVF
        targets = sorted(target_layers(base, svf_config(config)))
    return LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets
    )


def make_policy(base: nn.Module, config: TrainConfig) -> Policy:
    """Inject the configured adapter into the base, in this process."""
    return SVFPolicy(base, config) if config.policy == "svf" else PeftPolicy(base, config)
