"""SVF as a PEFT tuner, and the one place that decides which layers are adapted.

    from peft import get_peft_model
    from sigmix import SVFConfig
    model = get_peft_model(base, SVFConfig(target_modules="all-linear"))     # trains z and nothing else

With positions="prompt", `sigmix.svf.prompt_tokens` finds the prompt in every forward pass, also in transformers' and
TRL's code.

PEFT does injection, saving and loading. `register_peft_method` accepts members of PEFT's own enum only, so `register`
fills PEFT's mappings directly; ``import sigmix`` calls it as soon as PEFT is imported.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, TypeAlias, cast

import torch
from peft import mapping
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers.pytorch_utils import Conv1D

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.models.multimodal import backbone, bare
from sigmix.models.weights import OFFLOADED, kind, prevent_repacking
from sigmix.svf.config import SigmixPeftType, SVFConfig
from sigmix.svf.functional import mix_z
from sigmix.svf.layer import SVFLinear
from sigmix.svf.prompt_tokens import unwatch, watch

Linear: TypeAlias = "nn.Linear | Conv1D"

SHORTHANDS = {
    "all-linear": re.compile(""),
    "attention": re.compile(r"(^|[._])(self_attn|attn|attention|self_attention|crossattention)([._]|$)"),
    "mlp": re.compile(r"(^|[._])(mlp|feed_forward|ffn|block_sparse_moe|shared_expert|experts)([._]|$)"),
}
"""Values of ``target_modules`` that are no names: patterns of module paths. None of them matches the output head."""


class SVFModel(BaseTuner):
    """PEFT tuner that replaces targeted linear layers by `SVFLinear`."""

    prefix = "svf_"
    tuner_layer_cls = SVFLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]  # PEFT's have no ClassVar

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> SVFConfig:
        assert isinstance(peft_config, SVFConfig)
        if peft_config.positions == "prompt":
            watch(self.model)
        prevent_repacking(self.model)
        layers = target_layers(self.model, peft_config)
        if peft_config.layers_to_transform is not None:
            peft_config.layers_to_transform = sorted(set(_layer_numbers(layers, peft_config).values()))
        elif (
            isinstance(peft_config.target_modules, list)
            and backbone(self.model, strict=False) is None
            and not any(map(reads_cache, peft_config.target_modules))
        ):
            return peft_config  # PEFT matches names as `target_layers` does
        peft_config.target_modules = sorted(layers)
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
                remedy="exclude it, or untie the two (tie_word_embeddings=False)",
            )
        if isinstance(target, SVFLinear):
            target.update_layer(adapter_name, peft_config.inference_mode, peft_config.positions)
        else:
            new = SVFLinear(target, adapter_name, peft_config.inference_mode, peft_config.cache, peft_config.positions)
            if kind(target) == OFFLOADED:
                setattr(parent, target_name, new)  # PEFT would move z to the weight's device, which is meta
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
        layers = svf_layers(self.model).values()
        if unknown := set(adapter_names) - {name for layer in layers for name in layer.svf_z} - {"__base__"}:
            raise ValueError(f"adapters that do not exist: {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams")
        if isinstance(beams, int) and beams > 1:
            adapter_names = [name for name in adapter_names for _ in range(beams)]
        hook = partial(_pass_adapter_names, adapter_names=adapter_names)
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---------------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base layers.

        Raises:
            ConfigError: one of them has positions "prompt".
        """
        self._check_positions(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT declares no result
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_positions(adapter_names)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unwatch(model)
        return model

    def _check_positions(self, adapters: list[str] | None) -> None:
        for name in adapters or self.active_adapters:
            if cast(SVFConfig, self.peft_config[name]).positions == "prompt":
                raise ConfigError(
                    f"adapter {name!r} has positions 'prompt', but merged weights would act on answers too",
                    remedy="use it unmerged, serve it with sigmix's Engine, or train one with positions='all'",
                )

    # ---------------------------------------------------------------------- mixing

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add an adapter with z = 1 + Σ weights·(z - 1) over existing adapters of the same positions."""
        if missing := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"adapters that do not exist: {', '.join(missing)}")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters need as many weights and at least one, not {len(weights)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter {adapter_name!r} exists already")
        positions = {name: cast(SVFConfig, self.peft_config[name]).positions for name in adapters}
        if len(set(positions.values())) > 1:
            raise ConfigError(
                f"one z has one kind of positions, but {', '.join(f'{n} has {kind}' for n, kind in positions.items())}",
                remedy=f"activate them together: model.base_model.set_adapter({adapters})",
            )
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
            # active adapters stay as they are
            layer.add_z(adapter_name, config.positions).weight.data.copy_(mixed[path])
            layer.svf_z[adapter_name].requires_grad_(False)


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": adapter_names}


# ---------------------------------------------------------------------- which layers are adapted


def target_layers(model: nn.Module, config: SVFConfig | None = None) -> dict[str, Linear]:
    """Return the linear layers that a config adapts, by their path in the base model, in the model's order.

    Args:
        model: plain or wrapped by PEFT (base layers are returned), loaded or on the meta device.
        config: default: ``SVFConfig()``, all linear layers but the output head.

    Raises:
        UnknownNameError: a name in ``target_modules`` that no linear layer has.
        ConfigError: no layer is left, or ``layers_to_transform`` do not exist.
        BaseModelError: a vision-language model with an unknown language backbone.
    """
    config = SVFConfig() if config is None else config
    model = bare(model)
    every = layers = {path: layer for path, layer in linear_layers(model).items() if _adaptable(path, layer)}
    targets = "all-linear" if config.target_modules is None else config.target_modules
    full = set(targets) & layers.keys() if isinstance(targets, list) else set()
    # full paths reach every layer; everything else means the language backbone of a vision-language model
    inside = None if full and len(full) == len(targets) else backbone(model)
    if inside is not None:
        layers = {path: layer for path, layer in layers.items() if path.startswith(f"{inside[0]}.") or path in full}
    where = f"this {getattr(getattr(model, 'config', None), 'model_type', 'model')}"
    where += "" if inside is None else f"'s language backbone {inside[0]}"

    if isinstance(targets, str) and targets.lower() in SHORTHANDS:
        pattern, head = SHORTHANDS[targets.lower()], _head(model, config)
        paths = [path for path, layer in layers.items() if layer is not head and pattern.search(path)]
    elif isinstance(targets, str):
        paths = [path for path in layers if _named(path, targets)]
        paths = paths or [path for path in layers if re.fullmatch(targets, path)]
        if not paths and re.fullmatch(r"[\w.]+", targets):
            raise _unknown(targets, model, layers, where)
    else:
        for name in targets:
            if name.lower() in SHORTHANDS:
                raise ConfigError(f"target_modules: {name!r} stands alone", remedy=f"give {name} without other names")
            if not any(_named(path, name) for path in every):
                raise _unknown(name, model, layers, where)
        paths = [path for path in layers if any(_named(path, name) for name in targets)]
    if paths and config.layers_to_transform is not None:
        numbers = _layer_numbers(layers, config)
        selected = _selected(config.layers_to_transform, set(numbers.values()))
        paths = [path for path in paths if numbers.get(path) in selected]
    if isinstance(excluded := config.exclude_modules or [], str):
        paths = [path for path in paths if not re.fullmatch(excluded, path)]
    else:
        modules = [base_path(path) for path, _ in model.named_modules()] if excluded else []
        for name in excluded:
            if not any(_named(path, name) for path in modules):
                raise UnknownNameError("excluded module", name, {path.split(".")[-1] for path in layers})
        paths = [path for path in paths if not any(_named(path, name) for name in excluded)]
    if config.positions == "prompt":
        paths = [path for path in paths if not reads_cache(path)]
    if not paths:
        at = config.layers_to_transform
        raise ConfigError(
            f"target_modules {targets!r} match no linear layer of {where}" + (f" in layers {at}" if at else ""),
            remedy="name the modules, for example target_modules=['q_proj', 'v_proj']",
        )
    return {path: layers[path] for path in paths}


def reads_cache(path: str) -> bool:
    """Return True for a layer that computes keys and values from cached latents again for every answer token (MLA).

    It has no z with positions "prompt": the base would decode the answer over other keys and values.
    """
    return path.rsplit(".", 1)[-1] == "kv_b_proj"


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Return all linear layers of the base model by path: base layers of adapted ones, adapters' own left out."""
    layers: dict[str, Linear] = {}
    adapters: set[int] = set()
    for name, module in bare(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            base, inner = module.get_base_layer(), cast(nn.Module, module).modules()
            adapters.update(id(child) for child in inner if child is not base)
        elif isinstance(module, (nn.Linear, Conv1D)) and id(module) not in adapters:
            layers[base_path(name)] = module
    return layers


def _layer_numbers(layers: Iterable[str], config: SVFConfig) -> dict[str, int]:
    """{path: index of its layer}; PEFT's own ``layers_to_transform`` skips regular expressions and full names."""
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    index = re.compile(rf"(?:^|\.)(?:{'|'.join(patterns)})\.(\d+)\." if patterns else r"(?:^|\.)(\d+)\.")
    return {path: int(match[1]) for path in layers if (match := index.search(path))}


def _selected(layers: list[int] | int | str, existing: set[int]) -> set[int]:
    if layers == "half":
        return {number for number in existing if number % 2 == 0}
    selected: set = set(layers) if isinstance(layers, list) else {layers}
    if not selected or (selected - existing):
        raise ConfigError(
            f"layers_to_transform selects {sorted(selected - existing, key=str) if selected else 'no layers'}, "
            f"but the layers of this model are {sorted(existing)}",
            remedy="give their indices, or 'half', or leave it out for all",
        )
    return selected


def _head(model: nn.Module, config: SVFConfig) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get()
    if head is None and config.task_type == "SEQ_CLS":
        head = next((getattr(model, name) for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)), None)
    return getattr(head, "base_layer", head)


def _adaptable(path: str, layer: Linear) -> bool:
    """Return False for layers without rows, or with a weight that the model multiplies by itself.

    These are routers, experts that read some tokens of a batch, and the step size of Mamba.
    """
    return not (type(layer).__name__.endswith("Router") or re.search(r"\.experts\.\d+\.|(^|\.)dt_proj$", path))


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _unknown(name: str, model: nn.Module, layers: dict[str, Linear], where: str) -> ConfigError | UnknownNameError:
    module = next((m for path, m in model.named_modules() if name and _named(base_path(path), name)), None)
    if module is not None and not isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)):
        return ConfigError(f"target module {name} is of type {type(module).__name__}, not a torch.nn.Linear or Conv1D")
    if isinstance(module, (nn.Linear, Conv1D)):
        return ConfigError(f"target module {name} of {where} is not applied to whole rows of a batch as a layer")
    length = name.count(".") + 1
    names = {".".join(path.split(".")[-length:]) for path in layers} | set(difflib.get_close_matches(name, SHORTHANDS))
    return UnknownNameError("target module", name, names, remedy=f"name linear layers of {where}")


# ---------------------------------------------------------------------- adapted layers of a model


def svf_layers(model: nn.Module) -> dict[str, SVFLinear]:
    """Return all adapted layers by their path in the base model."""
    return {base_path(name): m for name, m in model.named_modules() if isinstance(m, SVFLinear)}


def base_path(name: str) -> str:
    """Return the path in the base model of a module inside a PEFT model."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer").replace(".base_layer.", ".")


def register() -> None:
    """Register SVF with PEFT. Idempotent."""
    # PEFT's enum cannot be extended
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[SigmixPeftType.SVF] = SVFConfig  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[SigmixPeftType.SVF] = SVFModel  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[SigmixPeftType.SVF] = SVFModel.prefix  # type: ignore[index]


register()
