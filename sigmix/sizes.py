"""Counts of a model, from its config and its plan, that estimates of memory and time are made of (`sigmix.budget`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from sigmix.errors import BaseModelError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
BITS = {"int8": 8.5, "int4": 8.5, "nf4": 4.5}
"""Bits of a weight with its scales; int4 as torchao keeps it on a CPU, a byte each."""
PACKED = {**BITS, "int4": 4.5}
"""The same on a GPU, where int4 is packed."""


class Sizes:
    """Numbers of weights and of what SVF adds; bytes a number ``b``.

    Args:
        plan: from `sigmix.plan.model_plan`. b: bytes of a number of the weights. cuda: whether they lie on GPUs.

    Attributes:
        adapted, ranks, short, both: numbers in the adapted matrices, of their singular values, in their short sides and
            in both sides. weights: bytes of all weights, quantised ones with their scales. read: of them, those that
            writing a token reads. met: weights that a token is multiplied with.

    Raises:
        BaseModelError: on asking for what the config does not say of its layers, such as the number of heads.
    """

    def __init__(self, config: Any, plan: Mapping[str, Any], b: int, quantization: str | None, cuda: bool) -> None:
        self.text, self.plan, self.b, self.quantised = config.get_text_config(), plan, b, quantization is not None
        self.shapes = [(one["out"], one["in"], one["count"]) for one in plan["by_shape"]]
        self.parameters = plan["parameters"]
        self.adapted = sum(m * n * c for m, n, c in self.shapes)
        self.ranks = plan["z_parameters"]
        self.short = sum(min(m, n) ** 2 * c for m, n, c in self.shapes)
        self.both = sum(min(m, n) * (m + n) * c for m, n, c in self.shapes)
        bits = (PACKED if cuda else BITS)[quantization] / 8 if quantization is not None else b
        self.weights = int(b * (self.parameters - self.adapted) + bits * self.adapted)
        self.read = self.weights - b * plan["lookup_parameters"]
        self.met = self.parameters - plan["lookup_parameters"] - self._idle()

    def _idle(self) -> int:
        """Weights of fused experts that a token is not routed to."""
        experts = self._given("num_local_experts", "num_experts", "n_routed_experts")
        chosen = self._given("num_experts_per_tok", "num_experts_per_token", "moe_topk")
        if not isinstance(experts, int) or not isinstance(chosen, int):
            return 0
        shapes = [(one["parameters"], one["shape"]) for one in self.plan["not_adapted"]]
        fused = sum(count for count, shape in shapes if len(shape) == 3 and shape[0] == experts)
        return fused * max(experts - chosen, 0) // experts

    @cached_property
    def layers(self) -> int:
        return self._number("num_hidden_layers", "n_layer")

    @cached_property
    def hidden(self) -> int:
        return self._number("hidden_size", "n_embd")

    @cached_property
    def heads(self) -> int:
        return self._number("num_attention_heads", "n_head")

    @cached_property
    def kv_heads(self) -> int:
        return self._number("num_key_value_heads", default=self.heads)

    @cached_property
    def head(self) -> int:
        """Width of a head."""
        return self._number("head_dim", default=self.hidden // self.heads)

    @cached_property
    def inner(self) -> int:
        """Width of the feed-forward block."""
        return self._number("intermediate_size", "n_inner", default=4 * self.hidden)

    @cached_property
    def vocab(self) -> int:
        return self._number("vocab_size")

    @cached_property
    def kv_token(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head * self.b

    @property
    def factors(self) -> int:
        """Bytes of what training and mixed batches keep of the decomposition."""
        return self.b * ((self.short if self.quantised else self.both) + 2 * self.ranks)

    def kept(self, scores: int = 0) -> int:
        """Bytes that the backward pass keeps of one token; ``scores``: attention scores of it that are kept, a head.

        A frozen linear layer keeps nothing. Kept are h of every matrix before its scaling, queries, keys, values and
        what attention returns, the gate, its activation and the factor that it gates, and both norms' input in float32.
        """
        q, kv = self.heads * self.head, self.kv_heads * self.head
        numbers = self.ranks // self.layers + 2 * q + 2 * kv + 3 * self.inner
        return self.layers * (self.b * numbers + 2 * 4 * self.hidden + (self.b + 4) * self.heads * scores)

    def _given(self, *names: str) -> Any:
        return next((value for name in names if (value := getattr(self.text, name, None))), None)

    def _number(self, *names: str, default: int | None = None) -> int:
        given = self._given(*names) or default
        if isinstance(given, int):
            return given
        kind = getattr(self.text, "model_type", type(self.text).__name__)
        said = "does not say" if given is None else "has one for each layer as"
        raise BaseModelError(
            f"models of the kind {kind!r} are not planned for: the config {said} {names[0]}",
            remedy="plan for a model whose layers are all alike and attend; without --plan its matrices are counted",
        )
