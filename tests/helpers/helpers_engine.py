"""Slow oracles: every row alone, without a cache, with dense weights."""

from __future__ import annotations

import random
from functools import partial

import torch
from peft import get_peft_model
from transformers.pytorch_utils import Conv1D

from sigmix.experts.expert import Expert
from sigmix.svf.config import SVFConfig
from sigmix.svf.tuner import svf_layers

# float32, two layers, logits of size 10: batched and single matmuls round differently by a few 1e-6
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def rows(lengths, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Random token ids of these lengths, the first `shared` of them common, the next ones different."""
    draw = random.Random(seed)
    prefix = [draw.randrange(4, 99) for _ in range(shared)]
    # the first own token is the row's number, so that the common prefix is `shared` and no longer
    return [
        prefix + [4 + i, *(draw.randrange(4, 99) for _ in range(n - shared - 1))][: n - shared]
        for i, n in enumerate(lengths)
    ]


def alone(model, ids) -> torch.Tensor:
    """Logits [T, V] of one row: no batch, no padding, no cache."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def greedy(model, ids, steps: int, ends=()) -> tuple[list[int], list[float]]:
    """Greedy answer to one row and its log-probabilities, the whole sequence again for every token."""
    ids, answer, logprobs = list(ids), [], []
    with torch.no_grad():
        for _ in range(steps):
            scores = alone(model, ids)[-1].log_softmax(-1)
            token = int(scores.argmax())
            answer.append(token)
            logprobs.append(float(scores[token]))
            ids.append(token)
            if token in ends:
                break
    return answer, logprobs


def expert(
    model, name: str, seed: int, width: float = 0.6, targets="all-linear", positions: str = "all"
) -> Expert:
    """An expert with random z around 1, made on `model`, which is wrapped by this."""
    wrapped = get_peft_model(model, SVFConfig(target_modules=targets, positions=positions))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in svf_layers(wrapped).values():
            layer.svf_z["default"].weight += width * (torch.rand(layer.r, generator=draw) - 0.5)
    return Expert.from_model(wrapped, name=name)


@torch.no_grad()
def dense(model, z):
    """`model` with W'(z) = U diag(s⊙z) Vᵀ written into its weights, computed in float64 by LAPACK's SVD."""
    modules = dict(model.named_modules())
    for path, factors in z.items():
        layer = modules[path]
        layer.weight.copy_(_scaled(layer, factors))
    return model


@torch.no_grad()
def answer_scores(read, write, prompt, answer) -> torch.Tensor:
    """Log-probabilities [len(answer), V]: `read` computes the prompt, `write` the answer over its keys and values."""
    out = read(input_ids=torch.tensor([prompt]), use_cache=True)
    rows = [out.logits[0, -1]]
    cache = {name: out[name] for name in ("past_key_values", "cache_params") if out.get(name) is not None}
    for token in answer[:-1]:
        rows.append(write(input_ids=torch.tensor([[token]]), use_cache=True, **cache).logits[0, -1])
    return torch.stack(rows).log_softmax(-1)


def _scaled(layer, z) -> torch.Tensor:
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    adapted = (u * (s * z.double())) @ vt
    return (adapted.T if isinstance(layer, Conv1D) else adapted).to(weight.dtype)


class Divided:
    """A model with dense weights W'(prompt_z) on the first ``boundary`` tokens of a row and W'(answer_z) on the others.

    It reads one row at a time, without a cache.
    """

    def __init__(self, model, prompt_z, answer_z, boundary: int) -> None:
        self.model, self.boundary = model, boundary
        modules = dict(model.named_modules())
        with torch.no_grad():
            for path in prompt_z:
                layer = modules[path]
                weights = [_scaled(layer, z[path]) if path in z else layer.weight for z in (prompt_z, answer_z)]
                layer.register_forward_hook(partial(self._replace, weights))

    def _replace(self, weights, layer, args, _):
        parts = args[0][..., : self.boundary, :], args[0][..., self.boundary :, :]
        mats = [weight if isinstance(layer, Conv1D) else weight.T for weight in weights]
        y = torch.cat([part @ mat for part, mat in zip(parts, mats, strict=True)], -2)
        return y if layer.bias is None else y + layer.bias

    def __call__(self, **inputs):
        return self.model(**inputs)
