"""Weighted sums of adapters of one kind on a base model: W' = W + Σₖ αₖ ΔWₖ.

For SVF the sum is the paper's mixture of z (`svf.gains.mix_z`); for LoRA it is that of PEFT's ``get_delta_weight``
(PEFT's ``add_weighted_adapter`` would round the factors to the base's dtype). Both are added in float32 and rounded
once, and both are merged, so both cost the same to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from reproduction.variants import first_answer_tokens
from sigmix.engine.execution import as_base, as_expert
from sigmix.engine.prefix_cache import everywhere
from sigmix.experts.expert import Expert
from sigmix.svf.config import SVFConfig
from sigmix.svf.functional import mix_z
from sigmix.svf.layer import prompt_only
from sigmix.svf.tuner import svf_layers
from sigmix.train.policy import merged_adapter


class Blend:
    """Adapters of one kind on one base model.

    Args:
        base: a model from `load_base`, wrapped in place.
        folders: {name: folder of a saved expert or PEFT adapter, or an `Expert`}.
        policy: "svf", "lora" or "ia3" (which cannot be summed, only used alone).
        cache: keep the base's decomposition in the user's cache.
        positions: at which SVF's z act, whatever the experts' own. answer_tokens: with "prompt", also on so many tokens
            of the answer.
    """

    def __init__(
        self,
        base: Any,
        folders: Mapping[str, Path | Expert],
        policy: str,
        cache: bool = True,
        positions: str = "all",
        answer_tokens: int = 0,
    ) -> None:
        self.policy, self.svf = policy, policy == "svf"
        self.positions, self.answer_tokens = positions, answer_tokens
        if self.svf:
            self.experts = {
                name: one if isinstance(one, Expert) else Expert.from_pretrained(one) for name, one in folders.items()
            }
            every = sorted({path for expert in self.experts.values() for path in expert.z})
            targets = "all-linear" if positions == "all" else every  # what is not merged runs in the factored form
            config = SVFConfig(target_modules=targets, cache=cache, positions=positions)
            self.model: Any = get_peft_model(base, config).eval()
            self.layers = svf_layers(self.model)
        else:
            (first, folder), *others = folders.items()
            self.model = PeftModel.from_pretrained(base, str(folder), adapter_name=first)
            for name, other in others:
                self.model.load_adapter(str(other), adapter_name=name)
            self.model.eval()
        self.places: dict[str, Any] = {
            name.removeprefix("base_model.model."): module
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }

    @property
    def method(self) -> str:
        """Name of the way to merge, for the names of cells."""
        return "mix"

    def reference(self) -> AbstractContextManager[Any]:
        """Return a context in which the model is the base model."""
        return as_base(self.layers) if self.svf else self.model.disable_adapter()

    def prompt_only(self, mask: bool | torch.Tensor) -> AbstractContextManager[None]:
        """Return a context, inside `under`, for tokens of the prompt where ``mask`` is True, of answers elsewhere."""
        if self.positions == "all":
            return everywhere(mask)
        if self.answer_tokens and mask is False:
            return first_answer_tokens(self.model, self.layers, self.answer_tokens)
        return prompt_only(self.layers, mask)

    @contextmanager
    def under(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Return a context in which the model holds the weighted sum; an empty one is the base model."""
        weights = {name: alpha for name, alpha in weights.items() if alpha != 0}
        if not weights:
            with self.reference():
                yield
        elif self.svf:
            with self._prompt(weights) if self.positions == "prompt" else as_expert(self.layers, self.z(weights)):
                yield
        elif self.policy == "lora":
            with self._changed(self.merged(weights)):
                yield
        else:
            (name,) = weights
            self.model.set_adapter(name)
            with merged_adapter(self.model):
                yield

    @contextmanager
    def _prompt(self, weights: Mapping[str, float]) -> Iterator[None]:
        z = self.z(weights)
        with torch.no_grad():
            for path, layer in self.layers.items():
                layer.svf_z["default"].weight.copy_(z[path])
        with prompt_only(self.layers, True):
            yield

    def z(self, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """Return {path: z [r]} of a weighted sum of SVF experts."""
        zs = [self.experts[name].z for name in weights]
        return {path: mix_z([z[path] for z in zs], list(weights.values())) for path in zs[0]}

    def merged(self, weights: Mapping[str, float]) -> Callable[[str], Any]:
        """Return a function from a matrix's path to its merged ΔW, of LoRA."""
        return lambda path: sum(alpha * self.update(path, name) for name, alpha in weights.items())

    @contextmanager
    def _changed(self, update: Callable[[str], Any]) -> Iterator[None]:
        """Return a context in which LoRA's matrices are W + ΔW, in float32, rounded once as SVF's merge is."""
        kept = [(layer.get_base_layer().weight, layer.get_base_layer().weight.data) for layer in self.places.values()]
        try:
            for path, (parameter, data) in zip(self.places, kept, strict=True):
                parameter.data = (data.float() + update(path)).to(data.dtype)
            with self.model.disable_adapter():
                yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    def update(self, path: str, name: str) -> torch.Tensor:
        """Return ΔW float32 [m, n] of one adapter in one matrix, before rounding to the base model's dtype."""
        if self.svf:
            layer, z = self.layers[path], self.experts[name].z
            if path not in z:
                return torch.zeros(layer.matrix().shape)
            return layer.get_delta_weight("default", z[path]).float()
        return self.places[path].get_delta_weight(name).float()
