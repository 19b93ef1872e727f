"""What is trained: a policy knows its parameters and puts the model into three states.

    acting      rollouts and validation, under its own or another z: merged weights, no cost per token (the gain form
                on a quantised base)
    learning    gradients reach the parameters, never W
    reference   the base, exactly

`SVFPolicy` is the paper's. `PeftPolicy` is PEFT's own LoRA or IA3 in the same loop, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize

from sigmix.engine.execution import as_base, as_expert, gain_only
from sigmix.errors import ConfigError
from sigmix.experts.expert import Expert
from sigmix.svf.config import SVFConfig
from sigmix.svf.functional import reference_z
from sigmix.svf.tuner import svf_layers
from sigmix.train.config import TrainConfig
from sigmix.utils.io import atomic_dir


class Policy(Protocol):
    """The interface of the loop."""

    model: nn.Module
    sharded: bool

    def parameters(self) -> dict[str, nn.Parameter]: ...
    def acting(self, z: Mapping[str, torch.Tensor] | None = None) -> AbstractContextManager[None]: ...
    def learning(self) -> AbstractContextManager[None]: ...
    def reference(self) -> AbstractContextManager[None]: ...
    def after_step(self) -> None: ...
    def z(self) -> dict[str, torch.Tensor]: ...
    def start_from(self, folder: Path) -> None: ...


class ReferenceZ(nn.Module):
    """z from the raw parameter p as in the public implementation; p starts at 0.1 + 0.01·N(0, 1)."""

    s: torch.Tensor

    def __init__(self, s: torch.Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("s", s, persistent=False)
        self.start = 0.1 + 0.01 * torch.randn(len(s), generator=generator)

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        return reference_z(p, self.s)

    def right_inverse(self, z: torch.Tensor) -> torch.Tensor:
        return self.start.to(z.device)


class SVFPolicy:
    """z on the singular values (section 3.1 of the paper), through PEFT.

    Attributes:
        sharded: whether every pass is a meeting of several processes, see `sigmix.train.distributed`.
    """

    sharded = False

    def __init__(self, base: nn.Module, config: TrainConfig) -> None:
        targets = SVFConfig(target_modules=config.target_modules, layers_to_transform=config.layers_to_transform)
        self.model = self._wrapped(base, targets)
        self.layers = svf_layers(self.model)
        self.direct = config.parametrization == "direct"
        if not self.direct:
            random = torch.Generator().manual_seed(config.seed)
            for layer in self.layers.values():
                holder = layer.svf_z["default"]
                parametrize.register_parametrization(holder, "weight", ReferenceZ(layer.svf_s, random))

    def _wrapped(self, base: nn.Module, targets: SVFConfig) -> Any:
        return get_peft_model(base, targets).eval()

    def expert(self, name: str, meta: Mapping[str, Any]) -> Expert:
        """The current z as an expert, sealed for the base."""
        return Expert.from_model(self.model, name=name, meta=meta)

    def parameters(self) -> dict[str, nn.Parameter]:
        """{path: float32 [r]}: z itself, or p under the reference parameterisation."""
        if self.direct:
            return {path: layer.svf_z["default"].weight for path, layer in self.layers.items()}
        raw = "parametrizations.weight.original"
        return {path: layer.svf_z["default"].get_parameter(raw) for path, layer in self.layers.items()}

    def z(self) -> dict[str, torch.Tensor]:
        """Effective z by path, float32 [r] on the CPU, detached."""
        return {path: layer.svf_z["default"].weight.detach().cpu().clone() for path, layer in self.layers.items()}

    def acting(self, z: Mapping[str, torch.Tensor] | None = None) -> AbstractContextManager[None]:
        return as_expert(self.layers, self.z() if z is None else z)

    def reference(self) -> AbstractContextManager[None]:
        return as_base(self.layers)

    @contextmanager
    def learning(self) -> Iterator[None]:
        form = "gain" if gain_only(self.layers) else "factored"
        for layer in self.layers.values():
            layer.form = form
        yield

    def start_from(self, folder: Path) -> None:
        """Take the z of a saved expert."""
        z = Expert.from_pretrained(folder).z
        with torch.no_grad():
            for path, parameter in self.parameters().items():
                parameter.copy_(z[path])

    def after_step(self) -> None:
        # a negative factor would turn a component round, which is not a volume; no file may hold one
        if self.direct:
            with torch.no_grad():
                for parameter in self.parameters().values():
                    parameter.clamp_(min=0.0)


class PeftPolicy:
    """PEFT's own LoRA or IA3 in the same loop; acting merges into copies, so the base stays bit for bit.

    LoRA adapts `TrainConfig.targets`; IA3 the modules that PEFT's own table names for the architecture.
    """

    sharded = False

    def __init__(self, base: nn.Module, config: TrainConfig) -> None:
        torch.manual_seed(config.seed)
        self.model = get_peft_model(base, _peft_config(config)).eval()
        self._layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def z(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.parameters().items()}

    @contextmanager
    def acting(self, z: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
        if z is not None:
            raise ConfigError("PEFT's own policies act under their own parameters only")
        with merged_adapter(self.model):
            yield

    @contextmanager
    def reference(self) -> Iterator[None]:
        with self.model.disable_adapter():
            yield

    @contextmanager
    def learning(self) -> Iterator[None]:
        # LoRA's own dropout alone: GPT-2's and Phi's would make the policy another one than the one that acted
        dropouts = [module for layer in self._layers for module in getattr(layer, "lora_dropout", {}).values()]
        for module in dropouts:
            module.train()
        try:
            yield
        finally:
            for module in dropouts:
                module.eval()

    def after_step(self) -> None:
        pass

    def save(self, folder: Path) -> None:
        """Write a PEFT adapter folder, in place of what is there, atomically."""
        with atomic_dir(folder) as temporary:
            self.model.save_pretrained(str(temporary))

    def start_from(self, folder: Path) -> None:
        """Take the parameters of a saved adapter of the same shape."""
        set_peft_model_state_dict(self.model, load_peft_weights(str(folder), device="cpu"))


@contextmanager
def merged_adapter(model: Any) -> Iterator[None]:
    """Inside, a PEFT model's active adapter is merged into copies of the weights; the base's own come back after."""
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


def _peft_config(config: TrainConfig) -> PeftConfig:
    if config.policy == "ia3":
        return IA3Config()
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules,
    )


def make_policy(base: Any, config: TrainConfig) -> SVFPolicy | PeftPolicy:
    """The policy that the configuration names, injected into the base."""
    return SVFPolicy(base, config) if config.policy == "svf" else PeftPolicy(base, config)
