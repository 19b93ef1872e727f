"""CPU kernels and layout workarounds: faster computation of the same values, up to rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sigmix.engine.cpu.native import bfloat16_linear, has_bfloat16, int8_linear
from sigmix.models.multimodal import backbone
from sigmix.models.weights import is_quantized, weights_key
from sigmix.svf.functional import scaled
from sigmix.svf.layer import SVFLinear

SCORES_BYTES = 8 << 20
"""Largest size of one layer's float32 attention scores that may be stored for the backward pass."""


def contiguous_head(model: Any) -> None:
    """Make the output head's inputs contiguous.

    oneDNN's bf16 matmul on the strided slice that `logits_to_keep` makes was measured 40 times slower than on a copy.
    """
    head = model.get_output_embeddings()
    if head is not None and not getattr(head, "_sigmix_contiguous", False):
        head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
        head._sigmix_contiguous = True


@contextmanager
def short_attention(model: Any, scores: int) -> Iterator[None]:
    """Use transformers' "eager" attention inside this context for short sequences in half precision on a CPU.

    The backward pass of torch's fused attention was measured 6 times slower there than that of plain matmuls (64 rows
    of 7 queries and 53 keys, 9 heads, bf16: 23 ms against 4 ms). Long sequences stay fused, which stores no scores.

    Args:
        model: a transformers model, PEFT's wrapper around it or not.
        scores: rows × heads × queries × keys of the largest pass.
    """
    embeddings = model.get_input_embeddings().weight
    before = getattr(model.config, "_attn_implementation", None)
    half = embeddings.dtype in (torch.bfloat16, torch.float16) and embeddings.device.type == "cpu"
    if not half or before != "sdpa" or 4 * scores > SCORES_BYTES:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# ------------------------------------------------------------------ packed weights


PACKED_BYTES = 2 << 30
"""Default budget of packed copies."""

ROWS = 32
"""Number of rows that oneDNN optimizes the packed layout for; others work as well."""

JOINT = "_sigmix_joint"
"""Attribute of a group's first layer inside `Packing.using`: (layers, function that returns their packed layer)."""

Pack = Callable[[torch.Tensor], torch.Tensor]
"""Linear layer with a packed weight, x [..., in] -> [..., out], without gradients."""


def pack(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Pack:
    """Return the layer of a packed copy of a weight [out, in], and a bias [out].

    In oneDNN's layout: equal to `linear` bit for bit, where oneDNN computes that.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@functools.cache
def available() -> bool:
    """Return True if this machine can pack weights, and packed layers agree with `linear`."""
    try:
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(48, 32, generator=draw).bfloat16()
        x = torch.randn(2, 3, 32, generator=draw).bfloat16()
        bias = torch.randn(48, generator=draw).bfloat16()
        same = [
            torch.allclose(pack(weight, b)(x).float(), F.linear(x, weight, b).float(), rtol=0.02, atol=0.02)
            for b in (None, bias)
        ]
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return all(same)


class Packing:
    """Packed copies of a model's weights, which linear layers use inside `using`.

    Layers that share their input run as one matmul. A copy is made when its layer first runs, so that passes over the
    first layers alone do not cost the memory of the others.

    Args:
        layers: adapted layers of the model.
        budget: bytes of copies of the base's weights and factors; none are made if they would not fit. Packed merged
            weights count as merged weights.
        int8: make 8-bit copies of the base's weights, too, regardless of the budget.
        native: pack for the kernels in C++ where they apply, which are faster and round differently.

    Attributes:
        on: True on a CPU, in bfloat16, within the budget, if torch supports it.
        groups: adapted layers by input, if on.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, SVFLinear],
        budget: int = PACKED_BYTES,
        int8: bool = False,
        native: bool = False,
    ) -> None:
        own = {id(layer.get_base_layer()) for layer in layers.values()}
        linears = [module for module in model.modules() if type(module) is nn.Linear]
        self.others = [module for module in linears if id(module) not in own]
        size = sum(module.weight.nbytes for module in linears)
        size += sum(2 * layer.r * (layer.in_features + layer.out_features) for layer in layers.values())
        kinds = {(module.weight.device.type, module.weight.dtype) for module in linears}
        plain = not any(is_quantized(module.weight) for module in linears)
        self.on = plain and kinds == {("cpu", torch.bfloat16)} and size <= budget and available()
        self._native = native and self.on and has_bfloat16()
        self.groups: list[Group] = find_groups(model, layers) if self.on and layers else []
        self._packed: dict[Any, tuple[Any, list[torch.Tensor], Pack]] = {}
        self._int8_groups = find_groups(model, layers, every=True) if int8 else []
        self._int8_others = self.others if int8 else []
        if int8 and (text := backbone(model)) is not None:  # images are not decoded
            inside: set[Any] = {*text[1].modules(), model.get_output_embeddings()}  # type: ignore[operator]
            self._int8_others = [module for module in self.others if module in inside]
        if int8:
            with self.using(None, None, int8=True):
                pass

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Pack:
        """Return the layer of a packed copy of a weight [out, in], and a bias [out]."""
        return (bfloat16_linear if self._native and weight.shape[1] % 2 == 0 else pack)(weight, bias)

    def of(
        self,
        key: Any,
        sources: Sequence[torch.Tensor | None],
        make: Callable[..., Pack] | None = None,
    ) -> Pack:
        """Return the packed layer under a key; repack if its sources were replaced or changed in place.

        Args:
            sources: arguments of ``make``. make: `pack` by default, of a weight and a bias or None.
        """
        present = [source for source in sources if source is not None]
        state = weights_key(present)
        entry = self._packed.get(key)
        if entry is None or entry[0] != state:
            make_layer: Callable[..., Pack] = make or self.pack
            # references to the sources keep other tensors from getting their addresses
            entry = self._packed[key] = (state, [source.detach() for source in present], make_layer(*sources))
        return entry[2]

    def merged(self, weights: Mapping[str, torch.Tensor]) -> dict[str, Pack]:
        """Pack merged weights, by the first path of each group that has one."""
        if not self.on:
            return {}
        return {
            group.paths[0]: self.pack(group.weight(weights), group.bias())
            for group in self.groups
            if any(path in weights for path in group.paths)
        }

    @contextmanager
    def using(self, merged: Mapping[str, Pack] | None, form: str | None, int8: bool = False) -> Iterator[None]:
        """Compute linear layers with packed weights inside this context.

        Args:
            merged: packed W'(z) by the first path of each group that has one.
            form: form of a mixed batch; None if all rows have the same weights.
            int8: compute the base with 8-bit weights, without gradients.
        """
        with ExitStack() as patches:
            if int8:  # copies exist since the beginning
                for module in self._int8_others:
                    get = self._later(self.of, ("int8", id(module)), [module.weight, module.bias], int8_linear)
                    patch(patches, module, "forward", get())
                    patch(patches, module, JOINT, ([module], get))
                for group in self._int8_groups:
                    get = self._later(self.base, group, int8_linear)
                    get()
                    self._joint(group, get, patches, _eight_bits)
            elif self.on:
                for module in self.others:
                    get = self._later(self.of, id(module), [module.weight, module.bias])
                    patch(patches, module, "forward", functools.partial(_forward, module, get))
                    patch(patches, module, JOINT, ([module], get))
                for group in self.groups:
                    if form == "factored":
                        self._factored(group, patches)
                    else:
                        packed = (merged or {}).get(group.paths[0])
                        self._joint(group, self._later(self._given, group, packed), patches, _shared)
            yield

    def base(self, group: Group, make: Callable[..., Pack] | None = None) -> Pack:
        """Return a group's layer with the base weights, packed by ``make`` or `pack`."""
        make_layer: Callable[..., Pack] = make or self.pack
        return self.of((make, group.paths[0]), group.sources(), lambda *_: make_layer(group.weight(), group.bias()))

    def _given(self, group: Group, packed: Pack | None) -> Pack:
        return self.base(group) if packed is None else packed

    @staticmethod
    def _later(make: Callable[..., Pack], *args: Any) -> Callable[[], Pack]:
        return functools.cache(functools.partial(make, *args))

    def _joint(
        self, group: Group, get: Callable[[], Pack], patches: ExitStack, forward: Callable[..., torch.Tensor]
    ) -> None:
        sizes, bases = group.sizes, [one.get_base_layer() for one in group.layers]
        shared = Shared(lambda x: get()(x).split(sizes, -1))
        patch(patches, bases[0], JOINT, (bases, get))
        for number, base in enumerate(bases):
            patch(patches, base, "forward", functools.partial(forward, base, shared, number))

    def _factored(self, group: Group, patches: ExitStack) -> None:
        factors = [layer.factors() for layer in group.layers]
        key, ranks = group.paths[0], group.ranks
        first = self.of((key, 1), [first for first, _ in factors], lambda *firsts: self.pack(torch.cat(firsts)))
        shared = Shared(lambda x: first(x).split(ranks, -1))
        for number, (path, layer) in enumerate(zip(group.paths, group.layers, strict=True)):
            second = self.of((path, 2), [factors[number][1], layer.get_base_layer().bias])
            patch(patches, layer, "_factored", functools.partial(_factored, layer, shared, number, second))


def joint_linear(layers: Sequence[nn.Module]) -> Pack | None:
    """Return the layer that computes the concatenated outputs of unadapted layers that share their input.

    None unless all rows have the same weights, and these are packed.
    """
    members, get = layers[0].__dict__.get(JOINT, (None, None))
    return get() if get is not None and members == layers else None


def _plain_pass(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() or x.dtype != torch.bfloat16


def _forward(module: nn.Linear, get: Callable[[], Pack], x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias) if _plain_pass(x) else get()(x)


def _shared(module: nn.Linear, shared: Shared, number: int, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias) if _plain_pass(x) else shared.take(number, x)


def _eight_bits(module: nn.Module, shared: Shared, number: int, x: torch.Tensor) -> torch.Tensor:
    return shared.take(number, x)


def _factored(
    layer: SVFLinear,
    shared: Shared,
    number: int,
    second: Pack,
    x: torch.Tensor,
    z: torch.Tensor,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    if _plain_pass(x):
        return SVFLinear._factored(layer, x, z, gain)
    return second(scaled(shared.take(number, x), z, gain))


# ------------------------------------------------------------------ layers that share their input


@dataclass(frozen=True)
class Group:
    """Adapted layers with the same input, such as queries, keys and values, in the order of the model's layers."""

    paths: tuple[str, ...]
    layers: tuple[SVFLinear, ...]

    @property
    def sizes(self) -> list[int]:
        """Output features of each layer."""
        return [layer.out_features for layer in self.layers]

    @property
    def ranks(self) -> list[int]:
        """Number of singular values of each layer."""
        return [layer.r for layer in self.layers]

    def weight(self, others: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Concatenated weights [Σ out, in]; ``others`` replaces some by path."""
        mats = [(others or {}).get(path, layer.matrix()) for path, layer in zip(self.paths, self.layers, strict=True)]
        return mats[0] if len(mats) == 1 else torch.cat(mats)

    def sources(self) -> list[torch.Tensor | None]:
        """Weights and biases of the layers."""
        bases: list[Any] = [layer.get_base_layer() for layer in self.layers]
        return [tensor for base in bases for tensor in (base.weight, base.bias)]

    def bias(self) -> torch.Tensor | None:
        """Concatenated biases [Σ out], zeros for layers without; None if no layer has one."""
        biases = [layer.get_base_layer().bias for layer in self.layers]
        if all(bias is None for bias in biases):
            return None
        weight = self.layers[0].matrix()
        parts = [weight.new_zeros(m) if b is None else b.data for m, b in zip(self.sizes, biases, strict=True)]
        return torch.cat(parts)


def find_groups(model: Any, layers: Mapping[str, SVFLinear], every: bool = False) -> list[Group]:
    """Group the adapted `torch.nn.Linear` layers that a forward pass of the base calls in turn with the same tensor.

    Args:
        every: include GPT-2's `Conv1D` layers.
    """

    def fits(path: str) -> bool:
        return every or type(layers[path].get_base_layer()) is nn.Linear

    calls: list[tuple[str, torch.Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: calls.append((path, args[0])))
        for path, layer in layers.items()
    ]
    device = model.get_input_embeddings().weight.device
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    names = list(layers)
    once = {path for path in names if sum(path == called for called, _ in calls) == 1}
    groups: list[list[str]] = []
    last: torch.Tensor | None = None
    for path, x in calls:
        if not fits(path) or path not in once:
            last = None
            continue
        follows = groups and names.index(path) == names.index(groups[-1][-1]) + 1  # so that their z lie side by side
        if x is last and follows:
            groups[-1].append(path)
        else:
            groups.append([path])
        last = x
    seen = {path for group in groups for path in group}
    groups += [[path] for path in names if path not in seen and fits(path)]
    return [Group(tuple(group), tuple(layers[path] for path in group)) for group in groups]


class Shared:
    """Joint computation of a group's outputs, which its layers take one by one.

    Args:
        compute: x [B, T, in] -> an output for each layer.
    """

    def __init__(self, compute: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> None:
        self.compute = compute
        self._x: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def take(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Return the output of layer ``number`` for x."""
        if x is not self._x or self._parts[number] is None:
            self._x, self._parts = x, list(self.compute(x))
        part, self._parts[number] = self._parts[number], None
        if all(other is None for other in self._parts):
            self._x = None
        return part  # type: ignore[return-value]


def patch(stack: ExitStack, module: nn.Module, name: str, function: Any) -> None:
    """Replace a method of a module until the stack is closed."""
    before = module.__dict__.get(name)
    object.__setattr__(module, name, function)
    if before is None:
        stack.callback(object.__delattr__, module, name)
    else:
        stack.callback(object.__setattr__, module, name, before)
