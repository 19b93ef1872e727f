"""SVF as a PEFT tuner: `SVFConfig` and `SVFModel`, registered with PEFT when this module is imported.

    from peft import get_peft_model
    from sigmix import SVFConfig
    model = get_peft_model(base, SVFConfig(target_modules="all-linear"))     # trains z and nothing else

There is one way into a model: PEFT does injection, target matching, saving and loading. `register_peft_method` insists
on PEFT's own enum, so the registration fills PEFT's mappings with an enum member of ours; a process that loads an SVF
adapter through plain PEFT must have imported sigmix first.
"""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from peft import mapping
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, match_target_against_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from sigmix.errors import ConfigError
from sigmix.models.multimodal import backbone
from sigmix.models.weights import OFFLOADED, kind
from sigmix.svf.config import SigmixPeftType, SVFConfig
from sigmix.svf.layer import SVFLinear

ATTENTION = re.compile(r"(^|[._])(self_attn|attn|attention|self_attention|crossattention)([._]|$)")


MLP = re.compile(r"(^|[._])(mlp|feed_forward|ffn|block_sparse_moe|shared_expert|experts)([._]|$)")


class SVFModel(BaseTuner):
    """The tuner that replaces targeted linear layers by `SVFLinear`."""

    prefix = "svf_"
    tuner_layer_cls = SVFLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]  # PEFT's have no ClassVar

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> SVFConfig:
        assert isinstance(peft_config, SVFConfig)
        # PEFT's own shorthand "all-linear" is resolved later by PEFT; ours and the layer selection, which PEFT allows
        # only with a list, are resolved here to full module names
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        targets = peft_config.target_modules
        # with the original layers wrapped by another adapter, names end in .base_layer
        linear = {n.removesuffix(".base_layer"): m for n, m in self.model.named_modules() if _is_linear(m)}
        paths = set() if isinstance(targets, str) else set(targets)
        inside = None if paths and paths <= linear.keys() else backbone(self.model)
        if inside is None and peft_config.layers_to_transform is None and targets not in ("attention", "mlp"):
            return peft_config
        if inside is not None:
            linear = {n: m for n, m in linear.items() if n.startswith(f"{inside[0]}.") or n in paths}
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        if head is not None and hasattr(head, "base_layer"):
            head = head.base_layer
        names = [name for name, module in linear.items() if _targeted(name, targets, module is head)]
        if names and peft_config.layers_to_transform is not None:
            names = _in_layers(names, list(linear), peft_config, model_config)
        if not names:
            raise ConfigError(
                f"no linear layer of this {model_config.get('model_type', 'model')}"
                + (f"'s language backbone, {inside[0]}," if inside is not None else "")
                + f" matches {targets!r}"
                + (f" in layers {at}" if (at := peft_config.layers_to_transform) is not None else ""),
                remedy="name the modules, for example target_modules=['q_proj', 'v_proj']",
            )
        peft_config.target_modules = sorted(names)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, SVFConfig)
        if parameter_name is not None:
            raise ConfigError(f"SVF adapts linear layers, not the bare parameter {parameter_name}")
        embedding = self.model.get_input_embeddings() if hasattr(self.model, "get_input_embeddings") else None
        if target is not embedding and getattr(target, "weight", target) is getattr(embedding, "weight", None):
            raise ConfigError(
                f"{current_key} shares its weight with the input embedding, which a merge would change too",
                remedy="leave it out, or untie the two (tie_word_embeddings=False)",
            )
        if isinstance(target, SVFLinear):
            target.update_layer(adapter_name, inference_mode=peft_config.inference_mode)
        else:
            new = SVFLinear(target, adapter_name, inference_mode=peft_config.inference_mode, cache=peft_config.cache)
            if kind(target) == OFFLOADED:
                setattr(parent, target_name, new)  # PEFT would send z after the weight, to the meta device
            else:
                self._replace_module(parent, target_name, new, target)
            target = new
        if adapter_name not in self.active_adapters:
            target.svf_z[adapter_name].requires_grad_(False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        # PEFT's mixed batches: model(..., adapter_names=[one per row]), "__base__" for the base
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names cannot be used in training mode")
        known = {name for layer in svf_layers(self.model).values() for name in layer.svf_z} | {"__base__"}
        if unknown := set(adapter_names) - known:
            raise ValueError(f"adapters that do not exist: {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams")
        if isinstance(beams, int) and beams > 1:
            adapter_names = [name for name in adapter_names for _ in range(beams)]
        hook = partial(_pass_adapter_names, adapter_names=adapter_names)
        handles = [
            layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in svf_layers(self.model).values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add an adapter whose z is 1 + Σ weights·(z - 1) over existing adapters."""
        from sigmix.svf.functional import mix_z

        if missing := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"adapters that do not exist: {', '.join(missing)}")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters need as many weights, and one at least, not {len(weights)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already")
        layers = {p: m for p, m in svf_layers(self.model).items() if any(name in m.svf_z for name in adapters)}
        mixed = {}
        for path, layer in layers.items():
            one = torch.ones(layer.r, device=layer.device)
            zs = [layer.svf_z[name].weight.detach() if name in layer.svf_z else one for name in adapters]
            mixed[path] = mix_z(zs, weights)
        config = copy.copy(self.peft_config[adapters[0]])
        assert isinstance(config, SVFConfig)
        config.target_modules, config.layers_to_transform = sorted(layers), None
        self.peft_config[adapter_name] = config
        for path, layer in layers.items():
            layer.add_z(adapter_name).weight.data.copy_(mixed[path])  # which adapters are active stays as it is
            layer.svf_z[adapter_name].requires_grad_(False)


def svf_layers(model: nn.Module) -> dict[str, SVFLinear]:
    """All adapted layers by their path in the base model, as experts name them."""
    return {base_path(name): m for name, m in model.named_modules() if isinstance(m, SVFLinear)}


def base_path(name: str) -> str:
    """A module path inside a PEFT model, as the base model names it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer").replace(".base_layer.", ".")


def coverage(model: nn.Module) -> dict[str, Any]:
    """What is adapted and what is not.

    Returns:
        adapted: {path: [out, in]}; numbers: how many z there are; not_adapted: {path: reason} for weights of two or
        more dimensions that stay as they are (embeddings, the output head, routers, fused experts, all of vision);
        share: adapted weights over all of the base's.
    """
    layers = svf_layers(model)
    inside = {id(layer.get_base_layer().weight) for layer in layers.values()}
    language = backbone(model, strict=False)
    skipped: dict[str, str] = {}
    total = adapted = sum(layer.out_features * layer.in_features for layer in layers.values())
    for name, parameter in model.named_parameters():
        if ".svf_z." in name:
            continue
        if id(parameter) in inside:
            continue
        total += parameter.numel()
        if parameter.ndim < 2:
            continue
        path = base_path(name.removesuffix(".weight"))
        if parameter.ndim == 3:
            skipped[path] = "fused experts (a 3-D parameter, not linear layers)"
        elif "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name:
            skipped[path] = "embedding or output head"
        elif language is not None and not name.startswith(f"{language[0]}."):
            skipped[path] = "vision tower or projector"
        else:
            skipped[path] = "not targeted"
    return {
        "adapted": {path: [layer.out_features, layer.in_features] for path, layer in layers.items()},
        "numbers": sum(layer.r for layer in layers.values()),
        "not_adapted": skipped,
        "share": adapted / max(total, 1),
    }


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, SVFLinear)


def _targeted(name: str, targets: list[str] | str, head: bool) -> bool:
    if targets in ("attention", "mlp", "all-linear"):
        pattern = {"attention": ATTENTION, "mlp": MLP}.get(targets)
        return not head and (pattern is None or bool(pattern.search(name)))
    if isinstance(targets, str):
        return bool(match_target_against_key(targets, name))
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _in_layers(names: list[str], every: list[str], config: SVFConfig, model_config: dict) -> list[str]:
    """The names in the layers that ``config`` asks for; PEFT ignores layers for regular expressions and full names."""
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    index = re.compile(rf"(?:^|\.)(?:{'|'.join(patterns)})\.(\d+)\." if patterns else r"(?:^|\.)(\d+)\.")
    layer = {name: int(found[1]) for name in every if (found := index.search(name))}
    if config.layers_to_transform == "half":
        config.layers_to_transform = list(range(0, _layer_count(model_config), 2))
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else wanted
    if not wanted or (unknown := set(wanted) - set(layer.values())):
        raise ConfigError(
            f"layers_to_transform asks for {sorted(unknown, key=str) if wanted else 'no layers'}, "
            f"and the layers of this model are {sorted(set(layer.values()))}",
            remedy="give their indices, or 'half', or leave it out for all",
        )
    return [name for name in names if layer.get(name) in wanted]


def _layer_count(model_config: dict) -> int:
    for source in (model_config, model_config.get("text_config") or {}):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if source.get(key):
                return int(source[key])
    raise ConfigError("the number of layers is not in this model's config", remedy="give layers_to_transform as a list")


def register() -> None:
    """Enter SVF in PEFT's mappings; safe to call more than once."""
    # PEFT's enum cannot be extended
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[SigmixPeftType.SVF] = SVFConfig  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[SigmixPeftType.SVF] = SVFModel  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[SigmixPeftType.SVF] = SVFModel.prefix  # type: ignore[index]


register()
