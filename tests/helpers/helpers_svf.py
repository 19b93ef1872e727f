"""Oracles and small builders for the tests of `sigmix.svf`. The oracles are dense, float64 and use LAPACK's SVD."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

from sigmix.svf.layer import SVFLinear
from sigmix.svf.tuner import svf_layers

# Relative error of a vector against the float64 oracle. A unit roundoff is 6e-8 (float32), 5e-4 (float16) and 4e-3
# (bfloat16); a form rounds the short side, the hidden vector and the result, some with sums in between, so the bounds
# lie between 5 and 200 roundoffs.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def dense(weight: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """W'(z) = U diag(s⊙z) Vᵀ for weight [out, in], z [r], in float64; differentiable in z."""
    u, s, vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return (u * (s * z.double())) @ vt


def oracle(layer: SVFLinear, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """What ``layer`` computes for x [..., in] and z [r], in float64."""
    y = x.double() @ dense(layer.matrix(), z).T
    bias = layer.get_base_layer().bias
    return y if bias is None else y + bias.double()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of ``found`` in the Euclidean norm; NaN or a wrong shape never passes a `<`."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def linear(out: int, inn: int, bias: bool = False, kind: str = "linear", dtype=torch.float32, seed: int = 0):
    """A random base layer with weight [out, in] (Conv1D: stored transposed, always with bias)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = Conv1D(out, inn) if kind == "conv1d" else torch.nn.Linear(inn, out, bias=bias)
        for parameter in layer.parameters():
            parameter.data.normal_(0, 0.5)
    return layer.to(dtype).requires_grad_(False)


def wrapped(*args, **kwargs) -> SVFLinear:
    return SVFLinear(linear(*args, **kwargs), "default", cache=False)


def random_z(r: int, seed: int = 1, spread: float = 0.3) -> torch.Tensor:
    return 1 + spread * torch.randn(r, generator=torch.Generator().manual_seed(seed))


def randomise(model: torch.nn.Module, adapter: str = "default", seed: int = 1, spread: float = 0.3) -> None:
    """Give the adapter a random z in every layer."""
    for i, layer in enumerate(svf_layers(model).values()):
        if adapter in layer.svf_z:
            layer.svf_z[adapter].weight.data.copy_(random_z(layer.r, 1000 * seed + i, spread))


def set_form(model, form: str) -> None:
    for layer in svf_layers(model).values():
        layer.form = form


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that is no z."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".svf_z." not in n}


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


IDS = torch.tensor([[5, 9, 33, 71, 120, 8], [77, 3, 250, 14, 14, 60], [19, 200, 6, 42, 91, 133]])
