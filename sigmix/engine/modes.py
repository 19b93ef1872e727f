"""Switching the adapted layers of a model between the base, one merged z, and a z per row; nothing is ever rewritten.

The layers are those that PEFT injected (`sigmix.svf.tuner`); a plain model gets them on first use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model
from torch import nn

from sigmix.svf.layer import SVFLinear
from sigmix.svf.tuner import SVFConfig, svf_layers

ENGINE_ADAPTER = "sigmix"


def adapted_layers(model: nn.Module, targets: list[str] | str = "all-linear") -> dict[str, SVFLinear]:
    """The model's SVF layers by base path, injected if it has none."""
    layers = svf_layers(model)
    if not layers and not isinstance(model, PeftModel):
        inject_adapter_in_model(SVFConfig(target_modules=targets, inference_mode=True), model, ENGINE_ADAPTER)
        layers = svf_layers(model)
    return layers


@contextmanager
def as_base(layers: Mapping[str, SVFLinear]) -> Iterator[None]:
    """Inside, the layers compute the base's W x, bit for bit."""
    with _restored(layers):
        for layer in layers.values():
            layer.unmerge()
            layer._disable_adapters = True
        yield


def merged_weights(layers: Mapping[str, SVFLinear], z: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W'(z) by path, for the layers that z [r] moves at all."""
    return {
        path: layer.merged_weight(z[path].detach().to(layer.device))
        for path, layer in layers.items()
        if path in z and not bool((z[path] == 1).all())
    }


@contextmanager
def as_merged(layers: Mapping[str, SVFLinear], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the layers hold given weights W'(z), and the base where there is none. The base comes back after."""
    with _restored(layers):
        for path, layer in layers.items():
            layer.row_z = None
            if path in weights:
                layer._disable_adapters = False
                layer.place(weights[path])
            else:
                layer.unmerge()
                layer._disable_adapters = True
        yield


def gain_only(layers: Mapping[str, SVFLinear]) -> bool:
    """Whether any layer is quantised or offloaded, so that nothing can be merged or factored."""
    return any(layer.gain_only for layer in layers.values())


@contextmanager
def as_expert(layers: Mapping[str, SVFLinear], z: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, all rows are computed under z [r] by path: merged, or in the gain form where nothing can be merged."""
    if not gain_only(layers):
        with as_merged(layers, merged_weights(layers, z)):
            yield
        return
    one = [z[path].detach().cpu() if path in z else torch.ones(layer.r) for path, layer in layers.items()]
    with as_rows(layers, torch.cat(one)[None], "gain"):
        yield


@contextmanager
def as_rows(layers: Mapping[str, SVFLinear], table: torch.Tensor, form: str) -> Iterator[Any]:
    """Inside, row b of a batch is computed under z = table[b].

    Args:
        table: float32 [B, R], z over all layers in their order.

    Yields:
        A function that keeps only the rows with given indices; None: all again.
    """
    with _restored(layers):
        gains = (table - 1).to(next(iter(layers.values())).dtype)
        for layer in layers.values():
            layer.unmerge()
            layer._disable_adapters = False
            layer.form = form

        def keep(indices: list[int] | None) -> None:
            z, gain = (table, gains) if indices is None else (table[indices], gains[indices])
            sizes = [layer.r for layer in layers.values()]
            for layer, own, shift in zip(layers.values(), z.split(sizes, 1), gain.split(sizes, 1), strict=True):
                layer.set_rows(own.to(layer.device), shift.to(layer.device, layer.dtype))

        keep(None)
        yield keep


@contextmanager
def _restored(layers: Mapping[str, SVFLinear]) -> Iterator[None]:
    before = {path: (layer._disable_adapters, layer.form, layer.row_z) for path, layer in layers.items()}
    try:
        yield
    finally:
        for path, layer in layers.items():
            layer.unmerge()
            layer._disable_adapters, layer.form, layer.row_z = before[path]
