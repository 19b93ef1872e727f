"""Makers of adapted tiny models and experts for the tests of experts."""

from __future__ import annotations

import torch
from peft import get_peft_model

from sigmix.experts.expert import Expert
from sigmix.experts.metadata import thaw
from sigmix.svf.config import SVFConfig
from sigmix.svf.tuner import svf_layers


def adapted(model, seed: int = 0, targets="all-linear"):
    """``model`` wrapped by PEFT with random z around 1, as training leaves it."""
    wrapped = get_peft_model(model, SVFConfig(target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in svf_layers(wrapped).values():
            layer.svf_z["default"].weight += 0.3 * (torch.rand(layer.r, generator=generator) - 0.5)
    return wrapped.eval()


def random_expert(model, name: str = "arithmetic", seed: int = 0, **meta) -> Expert:
    """An expert on ``model``, which stays adapted."""
    return Expert.from_model(adapted(model, seed), name=name, meta=meta)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(4, 20)[None]).logits


def at(positions: str, expert: Expert, name: str | None = None) -> Expert:
    """The same expert with other positions."""
    return Expert(name or expert.name, expert.z, {**thaw(expert.meta), "positions": positions})
