"""z as a module's parameter, h ⊙ z with a gradient for z, and h ⊙ g with one for g."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from sigmix.errors import ConfigError
from sigmix.models import weights
from sigmix.models.digests import layer_digest
from sigmix.svf.decomposition import cached_decompose, read_factors
from sigmix.svf.functional import Gain, Scale, mix_z, scaled, truncate


class SingularScale(nn.Module):
    """Holder of one z: `weight`, float32 [r]. A module, so that names end in ``.<adapter>.weight`` (PEFT, TRL)."""

    def __init__(self, r: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(r, dtype=torch.float32, device=device))

    def _apply(self, fn, recurse=True):
        # z stays float32 in model.bfloat16(): bfloat16 has no number between 1 and 1.0078
        kept = {name: parameter.data for name, parameter in self._parameters.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            if self._parameters[name].dtype != data.dtype:
                self._parameters[name].data = data.to(self._parameters[name].device)
        return self


if TYPE_CHECKING:

    class Scales(nn.ModuleDict):
        """`SingularScale`s by adapter."""

        def __getitem__(self, key: str) -> SingularScale: ...

else:
    Scales = nn.ModuleDict


# --- SVFLinear: a linear layer W [m, n] whose singular values are scaled by z, W'(z) = U diag(s⊙z) Vᵀ.


FORMS = ("merged", "factored", "gain", "truncated")


class SVFLinear(nn.Module, BaseTunerLayer):
    """A `torch.nn.Linear` or GPT-2 `Conv1D` with one z [r] per adapter, r = min(out_features, in_features).

    Attributes:
        form: how an unmerged layer computes: "factored" (default), "gain" (default where `gain_only`) or "truncated".
        row_z: None, or float32 [B, r]: z per row of the batch, in place of the active adapters'.
        k: components kept by the truncated form.
    """

    adapter_layer_names = ("svf_z",)
    # buffers; the first two are None until `ensure_factors`
    svf_short: torch.Tensor
    svf_s: torch.Tensor
    svf_long: torch.Tensor | None

    if TYPE_CHECKING:  # PEFT says any module; __init__ takes no other

        def get_base_layer(self) -> nn.Linear | Conv1D: ...

    def __init__(self, base_layer: nn.Module, adapter_name: str, inference_mode: bool = False, cache: bool = True):
        super().__init__()
        if not isinstance(base_layer, (nn.Linear, Conv1D)):
            raise ConfigError(f"SVF adapts torch.nn.Linear and Conv1D, not {type(base_layer).__name__}")
        self.base_layer = base_layer
        self.transposed = isinstance(base_layer, Conv1D)
        self.out_features, self.in_features = weights.shape(base_layer)
        self.svf_z = Scales({})
        self.form = "gain" if self.gain_only else "factored"
        self.row_z: torch.Tensor | None = None
        self._row_gain: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self.k: int | None = None
        self._cache = cache
        self._kept: torch.Tensor | None = None
        self.checksum: str | None = None  # of the decomposition's cache entry
        self.merged_adapters: list[str] = []
        for name in ("svf_short", "svf_s", "svf_long"):
            self.register_buffer(name, None, persistent=False)
        self.side = "in" if self.out_features >= self.in_features else "out"
        self.update_layer(adapter_name, inference_mode=inference_mode)

    # ------------------------------------------------------------------ weights

    @property
    def r(self) -> int:
        """Number of singular values, min(out_features, in_features)."""
        return min(self.out_features, self.in_features)

    @property
    def gain_only(self) -> bool:
        """Whether the base layer is quantised or offloaded, so that its weight is not at hand."""
        return weights.kind(self.get_base_layer()) in (weights.QUANTIZED, weights.OFFLOADED)

    @property
    def device(self) -> torch.device:
        """Where the layer computes; its factors and z are there too."""
        return weights.device(self.get_base_layer())

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in."""
        return weights.dtype(self.get_base_layer())

    def matrix(self) -> torch.Tensor:
        """The base weight as [out, in], never a merged one: a view, or a copy where `gain_only`."""
        kept: torch.Tensor | None = getattr(self, "_kept", None)
        weight = weights.value(self.get_base_layer()) if kept is None else kept.data
        return weight.T if self.transposed else weight

    def ensure_factors(self) -> None:
        """Decompose the base weight (or read the cache) if that has not been done yet; idempotent."""
        if self.svf_short is not None and not self.svf_short.is_meta:
            return
        base = self.get_base_layer()
        if weights.kind(base) == weights.META:
            return  # PEFT's low_cpu_mem_usage: factors come with the first use
        if (named := getattr(base, "sigmix_basis", None)) is not None:  # of another weight, see experts.original
            factors = read_factors(named, (self.out_features, self.in_features))
        else:
            digest = layer_digest(base) if self._cache and self._kept is None else None
            factors = cached_decompose(self.matrix(), digest, cache=self._cache)
        dtype = self.dtype if self.dtype in (torch.float64, torch.float16, torch.bfloat16) else torch.float32
        self.svf_short = factors.short.to(device=self.device, dtype=dtype).contiguous()
        self.svf_s = factors.s.to(self.device)
        self.checksum = factors.checksum

    def _long(self) -> torch.Tensor:
        # U diag(s) [m, r] or V diag(s) [n, r]; only the factored form needs it
        if self.svf_long is None:
            self._refuse("factored")
            weight, short = self.matrix().float(), self.svf_short.float()
            self.svf_long = (weight @ short if self.side == "in" else weight.T @ short).to(self.svf_short.dtype)
            self.svf_long = self.svf_long.contiguous()
        return self.svf_long

    def forget_factors(self) -> None:
        """Have the factors read or computed anew on the next use."""
        self.svf_short = self.svf_s = None  # type: ignore[assignment]  # until `ensure_factors`
        self.svf_long = None

    def _refuse(self, form: str) -> None:
        if self.gain_only:
            kept = "quantised" if weights.kind(self.get_base_layer()) == weights.QUANTIZED else "offloaded"
            raise ConfigError(
                f"the {form} form needs the weight itself, but this base is {kept}",
                remedy="use form='gain', or load the base whole, without quantization or offloading",
            )

    def _apply(self, fn, recurse=True):
        before = self.svf_short
        super()._apply(fn, recurse)
        if self._kept is not None:
            self._kept = fn(self._kept)
        if before is not None and self.svf_short.dtype != before.dtype:
            # after a cast the weight is another one, and the factors are its own
            self.forget_factors()
            self.ensure_factors()
        return self

    def update_layer(self, adapter_name: str, inference_mode: bool = False, **_: object) -> None:
        """Add an adapter with z = 1 (the base)."""
        self.ensure_factors()
        self.add_z(adapter_name)
        self.set_adapter(self.active_adapters if self._has_active() else adapter_name, inference_mode=inference_mode)

    def add_z(self, adapter_name: str) -> SingularScale:
        """Add z = 1 under a name, without activating it."""
        if "." in adapter_name or (hasattr(self.svf_z, adapter_name) and adapter_name not in self.svf_z):
            raise ConfigError(f"an adapter cannot be named {adapter_name!r}: torch cannot use it as a module's name")
        self.svf_z[adapter_name] = SingularScale(self.r, self.device)
        return self.svf_z[adapter_name]

    def _has_active(self) -> bool:
        return all(name in self.svf_z for name in self.active_adapters) and bool(self.active_adapters)

    # ------------------------------------------------------------------ z

    def effective_z(self, names: list[str] | None = None) -> torch.Tensor:
        """float32 [r]: z of one adapter, or 1 + Σ(z - 1) over several; differentiable for a single one."""
        names = [n for n in (self.active_adapters if names is None else names) if n in self.svf_z]
        if len(names) == 1:
            return self.svf_z[names[0]].weight
        return mix_z([self.svf_z[n].weight for n in names], [1.0] * len(names))

    def get_delta_weight(self, adapter: str, z: torch.Tensor | None = None) -> torch.Tensor:
        """W'(z) - W [out, in] in the weight's dtype, for an adapter or a given z [r]."""
        z = self.svf_z[adapter].weight if z is None else z
        with torch.no_grad():
            left, right = self._delta_factors(z)
            return left @ right

    def _delta_factors(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[out, r] and [r, in], whose product is W'(z) - W."""
        self.ensure_factors()
        gain = (z.detach().to(self.svf_short.device) - 1).to(self.svf_short.dtype)
        scaled, short = self._long() * gain, self.svf_short
        return (scaled, short.T) if self.side == "in" else (short, scaled.T)

    def set_rows(self, z: torch.Tensor, gain: torch.Tensor) -> None:
        """Set ``row_z`` where z - 1 [B, r] in the weight's dtype is known too, so that no pass works it out again."""
        self.row_z, self._row_gain = z, (z, gain)

    # ------------------------------------------------------------------ merging

    @torch.no_grad()
    def merged_weight(self, z: torch.Tensor) -> torch.Tensor:
        """W'(z) for z [r], in the layout and dtype of the base layer's weight."""
        self._refuse("merged")
        left, right = self._delta_factors(z)
        weight = self.get_base_layer().weight.data if self._kept is None else self._kept
        # one rounding: the product is added to W in float32 inside the matmul
        return torch.addmm(weight, right.T, left.T) if self.transposed else torch.addmm(weight, left, right)

    def place(self, weight: torch.Tensor) -> None:
        """Put a merged weight into the base layer; the original tensor is kept and comes back with `unmerge`."""
        self._refuse("merged")
        base = self.get_base_layer()
        if self._kept is None:
            self._kept = base.weight.data
        base.weight.data = weight

    def merge_z(self, z: torch.Tensor) -> None:
        """`place` W'(z); for z = 1 that is the original tensor itself."""
        same = bool((z == 1).all())
        self.place(self.matrix().T if same and self.transposed else self.matrix() if same else self.merged_weight(z))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base layer (PEFT's interface); several are combined by adding their gains."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.svf_z]
        if not names:
            return
        z = self.effective_z([*self.merged_adapters, *names]).detach()
        if safe_merge and not bool(torch.isfinite(z).all()):
            raise ValueError(f"NaN or infinite values in z of {names}; the adapter is broken")
        self.merge_z(z)
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Put the kept original weight back, bit for bit."""
        if self._kept is not None:
            self.get_base_layer().weight.data = self._kept
            self._kept = None
        self.merged_adapters = []

    # ------------------------------------------------------------------ forward

    def forward(
        self, x: torch.Tensor, *args: object, adapter_names: Sequence[str] | None = None, **kwargs: object
    ) -> torch.Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        if self.disable_adapters:
            if self._kept is not None:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self._kept is not None:
            if adapter_names is not None or self.row_z is not None:
                raise ConfigError("rows cannot have their own z while a z is merged", remedy="unmerge it first")
            return self.base_layer(x, *args, **kwargs)
        gain = None
        if self.row_z is not None:
            z = self.row_z
            gain = self._row_gain[1] if self._row_gain[0] is z else None
            if x.ndim == 3:
                z, gain = z.unsqueeze(1), None if gain is None else gain.unsqueeze(1)
        elif adapter_names is not None:
            z = self._z_of_rows(adapter_names, x)
        elif any(n in self.svf_z for n in self.active_adapters):
            z = self.effective_z()
        else:
            return self.base_layer(x, *args, **kwargs)
        self.ensure_factors()
        if self.form == "factored":
            return self._factored(x, z, gain)
        if self.form == "gain":
            return self._gain(x, (z - 1) if gain is None else gain)
        if self.form == "truncated":
            return self._truncated(x, z - 1)
        raise ConfigError(f"unknown form {self.form!r}; one of {', '.join(FORMS)}")

    def _z_of_rows(self, names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        one = torch.ones(self.r, device=x.device)
        z = torch.stack([self.svf_z[n].weight if n in self.svf_z else one for n in names])
        if len(z) != len(x):
            raise ConfigError(f"adapter_names has {len(z)} entries for a batch of {len(x)} rows")
        return z.unsqueeze(1) if x.ndim == 3 else z

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The factored form's two weights, [r, in] and [out, r]: W'(z) = second · diag(z) · first."""
        self.ensure_factors()
        long, short = self._long(), self.svf_short
        return (short.T, long) if self.side == "in" else (long.T, short)

    def _factored(self, x: torch.Tensor, z: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        first, second = self.factors()
        hidden = F.linear(x.to(first.dtype), first)
        hidden = Scale.apply(hidden, z) if torch.is_grad_enabled() else scaled(hidden, z, gain)
        return F.linear(hidden, second, self._bias(hidden.dtype)).to(x.dtype)

    def _gain(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        if self.side == "in":
            return self.base_layer(x + self._turned(x, gain))
        y = self.base_layer(x)
        bias = self._bias(y.dtype)
        return y + self._turned(y if bias is None else y - bias, gain)

    def _turned(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """V (g ⊙ Vᵀx)."""
        short = self.svf_short
        hidden = F.linear(x, short.T)
        learns = torch.is_grad_enabled() and gain.requires_grad
        return F.linear(Gain.apply(hidden, gain) if learns else hidden * gain.to(hidden.dtype), short)

    def _truncated(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        index, common, _ = truncate(gain, self.svf_s, self.r if self.k is None else self.k)
        rest = (gain.index_select(-1, index) - common).to(x.dtype)
        short, common = self.svf_short[:, index], common.to(x.dtype)
        if self.side == "in":
            return self.base_layer(x + common * x + F.linear(F.linear(x, short.T) * rest, short))
        y = self.base_layer(x)
        bias = self._bias(y.dtype)
        inner = y if bias is None else y - bias
        return y + common * inner + F.linear(F.linear(inner, short.T) * rest, short)

    def _bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        bias = weights.bias(self.get_base_layer())
        return None if bias is None else bias.to(dtype)

    def __repr__(self) -> str:
        return "svf." + super().__repr__()
