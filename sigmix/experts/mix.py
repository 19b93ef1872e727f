"""`Mix`: a mixture of experts, z' = 1 + Σₖ αₖ (zₖ - 1); the empty one is the base.

    Mix.parse("sums:0.7 + dates:0.3")    Mix.parse("dates")    Mix.parse("base")
    Mix({"arithmetic": [0.7, 0.2, …]})           α per layer;  {"arithmetic": {path: 0.7, …}} per matrix

Equal mixtures have equal ids, whatever their order or spelling, so an id is a cache key.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from sigmix.errors import ConfigError, ExpertError, UnknownNameError, reraised
from sigmix.experts.metadata import NAME, check_name
from sigmix.svf.functional import mix_z
from sigmix.utils.io import read_text

if TYPE_CHECKING:
    from sigmix.experts.bank import Bank
    from sigmix.experts.expert import Expert

Alpha: TypeAlias = "float | Sequence[float] | Mapping[str, float]"

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
# a weight that is not a number matches too, for a better error
TERM = re.compile(rf"\s*(?P<name>{NAME.pattern})\s*(?::\s*(?P<alpha>{NUMBER}|[^\s:+]*))?\s*(?P<end>\+|$)")
LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
EXAMPLE = "for example 'sums:0.7+dates:0.3', 'dates' or 'base'"


@dataclass(frozen=True, eq=False)
class Mix:
    """An immutable mixture of experts; equal, with equal hashes, if the non-zero weights are.

    Attributes:
        weights: {expert: α}, names sorted, zeros dropped. α is a float (whole model), a tuple of floats (per layer, by
            the first number in a matrix's path) or a mapping {matrix path: float} (missing ones are 0). Any finite
            number is allowed, negative ones and those above 1 too. A weight of ``base`` has no effect.

    Raises:
        ConfigError: an α that is not finite. ExpertError: an invalid name.
    """

    weights: Mapping[str, Alpha] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = sorted((name for name in self.weights if name != "base"), key=str)  # the base's gain is zero
        clean = {check_name(name): _alpha(name, self.weights[name]) for name in names}
        object.__setattr__(self, "weights", MappingProxyType({n: a for n, a in clean.items() if not _is_zero(a)}))

    # ------------------------------------------------------------------ construction

    @classmethod
    def base(cls) -> Mix:
        """Return the empty mixture: the base itself."""
        return cls({})

    @classmethod
    def one(cls, name: str) -> Mix:
        """Return one expert at weight 1, as it was trained."""
        return cls({name: 1.0})

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Parse ``name:weight+name:weight``; a name alone has weight 1, and ``base`` adds nothing.

        Raises:
            ConfigError: quotes the invalid part and its position.
        """
        weights: dict[str, float] = {}
        position = 0
        while True:
            match = TERM.match(text, position)
            if match is None:
                part = re.split(r"\+(?=\s*[a-z])", text[position:])[0].strip()
                found = repr(part) if part else "nothing"
                raise ConfigError(
                    f"mix {text!r}: expected name:weight, found {found} at character {position + 1}", remedy=EXAMPLE
                )
            name, alpha = match["name"], match["alpha"]
            if alpha is not None and (not re.fullmatch(NUMBER, alpha) or not math.isfinite(float(alpha))):
                raise ConfigError(
                    f"mix {text!r}: the weight of {name} must be a finite number, not {alpha!r}", remedy=EXAMPLE
                )
            if name in weights:
                raise ConfigError(f"mix {text!r} names {name} twice", remedy="add its weights up and name it once")
            weights[name] = 1.0 if alpha is None else float(alpha)
            position = match.end()
            if not match["end"]:
                return cls(weights)

    @classmethod
    def from_json(cls, value: str | Mapping[str, Any]) -> Mix:
        """Return the mixture of `to_json`'s result, given as an object or as text.

        Raises:
            ConfigError: not an object with ``weights``.
        """
        if isinstance(value, str):
            with reraised(ConfigError, "a mix is not valid JSON", EXAMPLE, (ValueError, RecursionError)):
                value = json.loads(value)
        if not isinstance(value, Mapping) or not isinstance(value.get("weights"), Mapping):
            raise ConfigError(
                f"a mix in JSON is an object with 'weights', not {value!r}", remedy="{'weights': {'arithmetic': 0.7}}"
            )
        return cls(value["weights"])

    # ------------------------------------------------------------------ properties

    @cached_property
    def id(self) -> str:
        """Canonical text: sorted names with the shortest exact numbers, or ``base``.

        Weights per layer or matrix are shown as ``name:layers~<hash>`` or ``name:matrices~<hash>``, which `parse`
        refuses; store such a mixture with `to_json`.
        """
        return "+".join(_term(name, alpha) for name, alpha in self.weights.items()) or "base"

    def to_json(self) -> dict[str, Any]:
        """Return {"weights": {name: number, list or {path: number}}}."""
        plain = {
            name: dict(a) if isinstance(a, Mapping) else list(a) if isinstance(a, tuple) else a
            for name, a in self.weights.items()
        }
        return {"weights": plain}

    def alpha(self, name: str, path: str) -> float:
        """Return α of an expert at one matrix; 0 for an expert that is not in the mixture.

        Raises:
            ConfigError: weights per layer, and the matrix is in none of those layers.
        """
        alpha = self.weights.get(name, 0.0)
        if isinstance(alpha, Mapping):
            return alpha.get(path, 0.0)
        if isinstance(alpha, tuple):
            number = LAYER.search(path)
            if number is None or int(number[1]) >= len(alpha):
                problem = "is in no layer" if number is None else f"is in layer {number[1]}"
                raise ConfigError(
                    f"{name} has weights for layers 0 to {len(alpha) - 1}, but {path} {problem}",
                    remedy="give one weight per layer of the model, or weights per matrix",
                )
            return alpha[int(number[1])]
        return alpha  # type: ignore[return-value]

    def z(
        self, bank: Mapping[str, Expert] | Mapping[str, Mapping[str, Tensor]], layers: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Return the effective z of every matrix of a model.

        Args:
            bank: {name: Expert}, such as a `Bank`, or {name: {path: z}}.
            layers: {matrix path: r} of all adapted matrices of the model.

        Returns:
            {path: float32 [r]} for every path of ``layers``. A single expert at weight 1 is bit for bit as stored;
            without an acting expert z is exactly 1. An expert that does not adapt a matrix has z = 1 there.

        Raises:
            UnknownNameError: an expert missing in ``bank``. ConfigError: weights for other matrices.
            ExpertError: an expert adapts a matrix that is not in ``layers``, or with another size.
        """
        layout = Layout(layers)
        flats = {}
        for name in self.weights:
            if name not in bank:
                raise UnknownNameError("expert", name, bank, remedy="`sigmix experts list` lists them")
            expert: Any = bank[name]
            flats[name] = layout.flat(name, getattr(expert, "z", expert))
        return {path: z.clone() for path, z in layout.split(self.flat_z(layout, flats)).items()}

    def flat_z(self, layout: Layout, flats: Mapping[str, Flat]) -> Tensor:
        """Return `z` as one vector [R]; ``flats`` has all experts of the mixture.

        Raises:
            ConfigError: weights for other matrices or layers.
        """
        for name, alpha in self.weights.items():
            if isinstance(alpha, Mapping) and (odd := [path for path in alpha if path not in layout.layers]):
                near = UnknownNameError("matrix", odd[0], layout.layers).message
                raise ConfigError(f"the weights of {name}: {near}", remedy="use the model's module paths")
        if not self.weights:
            return torch.ones(sum(layout.sizes))
        alphas = list(self.weights.values())
        if all(isinstance(a, float) for a in alphas) and all(all(flats[name].adapted) for name in self.weights):
            return mix_z([flats[name].z for name in self.weights], alphas)  # type: ignore[arg-type]
        parts = {name: flats[name].z.split(layout.sizes) for name in self.weights}
        mixed = []
        for index, (path, r) in enumerate(layout.layers.items()):
            acting = [name for name in self.weights if flats[name].adapted[index]]
            zs = [parts[name][index] for name in acting]
            mixed.append(mix_z(zs, [self.alpha(name, path) for name in acting]) if acting else torch.ones(r))
        return torch.cat(mixed)

    def __eq__(self, other: object) -> bool:
        return self.to_json() == other.to_json() if isinstance(other, Mix) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"Mix({self.id!r})"


def answer_note(mix: Mix, bank: Mapping[str, Expert]) -> str | None:
    """Return a sentence on a mixture with experts of both `positions`, else None."""
    every = [name for name in mix.weights if bank[name].positions == "all"]
    if len(every) in (0, len(mix.weights)):
        return None
    return f"{mix.id}: all its experts act on the prompt, on answer tokens only {', '.join(every)}"


def read_mix(text: str, bank: Bank | None = None) -> Mix:
    """Parse a mixture from its text or from a ``.json`` file.

    Args:
        bank: look the experts up here.

    Raises:
        ConfigError: invalid text or file. UnknownNameError: an expert missing in ``bank``.
    """
    path = Path(text).expanduser()
    if path.suffix == ".json":
        mix = Mix.from_json(read_text(path, ConfigError, "give a file, or a:0.7+b:0.3"))
    else:
        mix = Mix.parse(text)
    for name in mix.weights if bank is not None else ():
        bank.path(name)  # type: ignore[union-attr]
    return mix


def _alpha(name: str, alpha: Any) -> float | tuple[float, ...] | Mapping[str, float]:
    try:
        if isinstance(alpha, Mapping):
            return MappingProxyType({p: v for p, a in sorted(alpha.items()) if (v := _finite(a)) != 0})
        if hasattr(alpha, "tolist"):  # tensors and arrays
            alpha = alpha.tolist()
        if isinstance(alpha, Sequence) and not isinstance(alpha, str):
            return tuple(_finite(a) for a in alpha)
        return _finite(alpha)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the weight of {name} must be a finite number, a list of them (per layer) or a mapping (per matrix), "
            f"not {alpha!r}",
            remedy=EXAMPLE,
        ) from error


def _finite(alpha: Any) -> float:
    if isinstance(alpha, (str, bool)):
        raise TypeError("not a number")
    number = float(alpha)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number + 0.0  # -0.0 becomes 0.0


def _is_zero(alpha: Any) -> bool:
    return not any(alpha.values() if isinstance(alpha, Mapping) else alpha if isinstance(alpha, tuple) else [alpha])


def _term(name: str, alpha: Any) -> str:
    if not isinstance(alpha, float):
        kind = "matrices" if isinstance(alpha, Mapping) else "layers"
        content = sorted(alpha.items()) if isinstance(alpha, Mapping) else list(alpha)
        return f"{name}:{kind}~{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}"
    # "+" joins terms, so an exponent is written without it
    return name if alpha == 1 else f"{name}:{repr(alpha).removesuffix('.0').replace('e+', 'e')}"


@dataclass(frozen=True)
class Flat:
    """z of one expert as float32 [R], 1 where it adapts nothing, and which of the M matrices it adapts."""

    z: Tensor
    adapted: tuple[bool, ...]


class Layout:
    """Positions of every matrix's z in one vector [R] over the model, R = Σ r, so that mixing takes few vector sums.

    Args:
        layers: {matrix path: r} of all adapted matrices of the model.
    """

    def __init__(self, layers: Mapping[str, int]) -> None:
        self.layers = dict(layers)
        self.sizes = list(self.layers.values())

    def flat(self, name: str, z: Mapping[str, Tensor]) -> Flat:
        """Return an expert's z as one vector.

        Raises:
            ExpertError: it adapts a matrix that the model has not adapted, or with another size.
        """
        for path, value in z.items():
            if path not in self.layers:
                raise ExpertError(
                    f"expert {name!r} adapts {path}, which this model has not adapted",
                    remedy="adapt all matrices of the bank's experts, or load the base that the expert was made on",
                )
            if len(value) != self.layers[path]:
                raise ExpertError(
                    f"expert {name!r} has {len(value)} components for {path}, where this model has {self.layers[path]}",
                    remedy="load the base that the expert was made on",
                )
        parts = [z[path].cpu() if path in z else torch.ones(r) for path, r in self.layers.items()]
        return Flat(torch.cat(parts) if parts else torch.ones(0), tuple(path in z for path in self.layers))

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return {path: [..., r]}, views of a vector [..., R]."""
        return dict(zip(self.layers, flat.split(self.sizes, -1), strict=True))
