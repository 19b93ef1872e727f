"""Linear layer with scaled singular values: W'(z) = U diag(s ⊙ z) Vᵀ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from sigmix.svf.functional import Gain, Scale, mix_z, scaled, z_per_row

FORMS = ("factored", "gain")


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
        """`SingularScale` by adapter."""

        def __getitem__(self, key: str) -> SingularScale: ...

else:
    Scales = nn.ModuleDict


class SVFLinear(nn.Module, BaseTunerLayer):
    """Wrapper of a `torch.nn.Linear` or GPT-2 `Conv1D` with one z [r] per adapter, r = min(out, in).

    Attributes:
        form: computation of an unmerged layer: "factored", U diag(s ⊙ z) Vᵀ x, or "gain", W x + ΔW x (the default
            where `gain_only`).
        positions: {adapter: its `SVFConfig.positions`}.
        row_z: None, or float32 [B, r]: z per row of the batch, in place of the active adapters'.
        answer_row_z: z of answer tokens, like `row_z`; None: `row_z`.
        prompt_mask: tokens of the prompt: True for all, False for none, or bool [B, T], see `prompt_only`. None: all,
            unless `sigmix.svf.prompt_tokens` finds others in the pass of a PEFT model.
        side: "in" if the square side of the decomposition is V [in, in], "out" if it is U [out, out].
        svf_short, svf_s, svf_long: factors, see `sigmix.svf.decomposition`; None until `ensure_factors` or first use.
    """

    adapter_layer_names = ("svf_z",)
    svf_short: torch.Tensor
    svf_s: torch.Tensor
    svf_long: torch.Tensor | None

    if TYPE_CHECKING:  # PEFT declares nn.Module

        def get_base_layer(self) -> nn.Linear | Conv1D: ...

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        inference_mode: bool = False,
        cache: bool = True,
        positions: str = "all",
    ) -> None:
        super().__init__()
        if not isinstance(base_layer, (nn.Linear, Conv1D)):
            raise ConfigError(f"SVF adapts torch.nn.Linear and Conv1D, not {type(base_layer).__name__}")
        self.base_layer = base_layer
        self.transposed = isinstance(base_layer, Conv1D)
        self.out_features, self.in_features = weights.shape(base_layer)
        self.side = "in" if self.out_features >= self.in_features else "out"
        self.svf_z = Scales({})
        self.form = "gain" if self.gain_only else "factored"
        self.positions: dict[str, str] = {}
        self.row_z: torch.Tensor | None = None
        self.answer_row_z: torch.Tensor | None = None
        self.prompt_mask: bool | torch.Tensor | None = None
        self._row_gain: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self._cache = cache
        self._kept: torch.Tensor | None = None  # the original weight while another one is merged
        self.checksum: str | None = None  # of the decomposition's cache entry
        self.merged_adapters: list[str] = []
        for name in ("svf_short", "svf_s", "svf_long"):
            self.register_buffer(name, None, persistent=False)
        self.update_layer(adapter_name, inference_mode=inference_mode, positions=positions)

    # ---------------------------------------------------------------------- adapters

    def update_layer(
        self, adapter_name: str, inference_mode: bool = False, positions: str = "all", **_: object
    ) -> None:
        """Add an adapter with z = 1 (the base)."""
        self.ensure_factors()
        self.add_z(adapter_name, positions)
        active = bool(self.active_adapters) and all(name in self.svf_z for name in self.active_adapters)
        self.set_adapter(self.active_adapters if active else adapter_name, inference_mode=inference_mode)

    def add_z(self, adapter_name: str, positions: str = "all") -> SingularScale:
        """Add z = 1 under a name without activating it."""
        if "." in adapter_name or (hasattr(self.svf_z, adapter_name) and adapter_name not in self.svf_z):
            raise ConfigError(f"an adapter cannot be named {adapter_name!r}: torch cannot use it as a module's name")
        self.svf_z[adapter_name] = SingularScale(self.r, self.device)
        self.positions[adapter_name] = positions
        return self.svf_z[adapter_name]

    def effective_z(self, names: list[str] | None = None) -> torch.Tensor:
        """Return z of one adapter, or 1 + Σ(z - 1) over several, float32 [r]; differentiable for a single one."""
        names = [n for n in (self.active_adapters if names is None else names) if n in self.svf_z]
        if len(names) == 1:
            return self.svf_z[names[0]].weight
        return mix_z([self.svf_z[n].weight for n in names], [1.0] * len(names))

    def set_rows(self, z: torch.Tensor, gain: torch.Tensor) -> None:
        """Set ``row_z`` [B, r] together with z - 1 in the weight's dtype, so that forward does not recompute it."""
        set_state(self, row_z=z, answer_row_z=None, _row_gain=(z, gain))

    # ---------------------------------------------------------------------- weight and factors

    @property
    def r(self) -> int:
        """Number of singular values."""
        return min(self.out_features, self.in_features)

    @property
    def gain_only(self) -> bool:
        """True if only the gain form works: the base weight is quantized or offloaded."""
        return weights.kind(self.get_base_layer()) in (weights.QUANTIZED, weights.OFFLOADED)

    @property
    def device(self) -> torch.device:
        """Device of computation; factors and z are there too."""
        return weights.device(self.get_base_layer())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of computation."""
        return weights.dtype(self.get_base_layer())

    def matrix(self) -> torch.Tensor:
        """Return the base weight [out, in], never a merged one: a view, or a copy where `gain_only`."""
        kept: torch.Tensor | None = getattr(self, "_kept", None)
        weight = weights.value(self.get_base_layer()) if kept is None else kept.data
        return weight.T if self.transposed else weight

    def ensure_factors(self) -> None:
        """Decompose the base weight, or read its factors from the cache, unless they are present."""
        if self.svf_short is not None and not self.svf_short.is_meta:
            return
        base = self.get_base_layer()
        if weights.kind(base) == weights.META:
            return  # PEFT's low_cpu_mem_usage: factors come with the first use
        if (digest := getattr(base, "sigmix_basis", None)) is not None:  # see experts.original_basis
            factors = read_factors(digest, (self.out_features, self.in_features))
        else:
            digest = layer_digest(base) if self._cache and self._kept is None else None
            factors = cached_decompose(self.matrix(), digest, cache=self._cache)
        dtype = self.dtype if self.dtype in (torch.float64, torch.float16, torch.bfloat16) else torch.float32
        self.svf_short = factors.short.to(device=self.device, dtype=dtype).contiguous()
        self.svf_s = factors.s.to(self.device)
        self.checksum = factors.checksum

    def forget_factors(self) -> None:
        """Drop the factors; the next use reads or computes them again."""
        self.svf_short = self.svf_s = None  # type: ignore[assignment]  # until `ensure_factors`
        self.svf_long = None

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factored form's weights, [r, in] and [out, r]: W'(z) = second · diag(z) · first."""
        self.ensure_factors()
        short = self.svf_short
        if self.svf_long is None:
            self._require_weight("factored")
            weight = self.matrix().float()
            long = weight @ short.float() if self.side == "in" else weight.T @ short.float()
            self.svf_long = long.to(short.dtype).contiguous()
        return (short.T, self.svf_long) if self.side == "in" else (self.svf_long.T, short)

    def _require_weight(self, form: str) -> None:
        if self.gain_only:
            kind = "quantized" if weights.kind(self.get_base_layer()) == weights.QUANTIZED else "offloaded"
            raise ConfigError(
                f"the {form} form needs the weight itself, but this base is {kind}",
                remedy="use form='gain', or load the base without quantization and offloading",
            )

    def _apply(self, fn, recurse=True):
        before = self.svf_short
        super()._apply(fn, recurse)
        if self._kept is not None:
            self._kept = fn(self._kept)
        if before is not None and self.svf_short.dtype != before.dtype:
            # a cast changes the weight, and with it the factors
            self.forget_factors()
            self.ensure_factors()
        return self

    # ---------------------------------------------------------------------- merging

    def get_delta_weight(self, adapter: str, z: torch.Tensor | None = None) -> torch.Tensor:
        """Return W'(z) - W [out, in] in the weight's dtype, for an adapter or a given z [r]."""
        with torch.no_grad():
            left, right = self._delta_factors(self.svf_z[adapter].weight if z is None else z)
            return left @ right

    def _delta_factors(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W'(z) - W as a product of [out, r] and [r, in]."""
        first, second = self.factors()
        gain = (z.detach().to(first.device) - 1).to(first.dtype)
        return (second * gain, first) if self.side == "in" else (second, first * gain[:, None])

    @torch.no_grad()
    def merged_weight(self, z: torch.Tensor) -> torch.Tensor:
        """Return W'(z) for z [r], in the layout and dtype of the base layer's weight."""
        self._require_weight("merged")
        left, right = self._delta_factors(z)
        weight = self.get_base_layer().weight.data if self._kept is None else self._kept
        # one rounding: the product is added to W in float32 inside the matmul
        return torch.addmm(weight, right.T, left.T) if self.transposed else torch.addmm(weight, left, right)

    def place(self, weight: torch.Tensor) -> None:
        """Put a merged weight into the base layer; `unmerge` restores the original tensor."""
        self._require_weight("merged")
        base = self.get_base_layer()
        if self._kept is None:
            self._kept = base.weight.data
        base.weight.data = weight

    def merge_z(self, z: torch.Tensor) -> None:
        """Place W'(z), or for z = 1 the original tensor itself."""
        if bool((z == 1).all()):
            self.place(self.matrix().T if self.transposed else self.matrix())
        else:
            self.place(self.merged_weight(z))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base layer (PEFT's interface); gains of several are added."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.svf_z]
        if not names:
            return
        z = self.effective_z([*self.merged_adapters, *names]).detach()
        if safe_merge and not bool(torch.isfinite(z).all()):
            raise ValueError(f"NaN or infinite values in z of {names}; the adapter is broken")
        self.merge_z(z)
        self.merged_adapters = [*self.merged_adapters, *names]

    def unmerge(self) -> None:
        """Restore the original weight, bit for bit."""
        if self._kept is not None:
            self.get_base_layer().weight.data = self._kept
            self._kept = None
        if self.merged_adapters:
            self.merged_adapters = []

    # ---------------------------------------------------------------------- forward

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
        mask = True if self.prompt_mask is None or self._same_everywhere(adapter_names) else self.prompt_mask
        z = None if mask is False else self._z(x, adapter_names)
        if mask is not True:
            answer_z = self._z(x, adapter_names, answer=True)
            if isinstance(mask, bool) or z is None:
                z = answer_z
            else:
                return self._masked(x, mask, z, answer_z)
        if z is None:
            return self.base_layer(x, *args, **kwargs)
        gain = None
        if mask is True and self.row_z is not None and self._row_gain[0] is self.row_z:
            assert self._row_gain[1] is not None
            gain = z_per_row(self._row_gain[1], x)
        self.ensure_factors()
        if self.form == "factored":
            return self._factored(x, z, gain)
        if self.form == "gain":
            return self._gain(x, (z - 1) if gain is None else gain)
        raise ConfigError(f"unknown form {self.form!r}; one of {', '.join(FORMS)}")

    def _same_everywhere(self, adapter_names: Sequence[str] | None) -> bool:
        """Return True if prompts and answers have the same z."""
        if self.row_z is not None:
            return self.answer_row_z is None
        names = self.active_adapters if adapter_names is None else adapter_names
        return all(self.positions[name] == "all" for name in names if name in self.svf_z)

    def _z(self, x: torch.Tensor, adapter_names: Sequence[str] | None, answer: bool = False) -> torch.Tensor | None:
        """Effective z of prompt or answer tokens, which broadcasts to [..., r]; None: the base."""
        if self.row_z is not None:
            return z_per_row(self.answer_row_z if answer and self.answer_row_z is not None else self.row_z, x)
        acting = [name for name in self.svf_z if not answer or self.positions[name] == "all"]
        if adapter_names is not None:
            return self._z_of_rows([name if name in acting else "__base__" for name in adapter_names], x)
        names = [name for name in self.active_adapters if name in acting]
        return self.effective_z(names) if names else None

    def _masked(
        self, x: torch.Tensor, mask: torch.Tensor, z: torch.Tensor, answer_z: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply ``z`` at tokens where ``mask`` [B, T] is True, and ``answer_z`` elsewhere."""
        if x.ndim == 3 and len(x) == len(mask) and x.shape[1] < mask.shape[1]:  # a head's layer: the last tokens alone
            mask = mask[:, mask.shape[1] - x.shape[1] :]
        if mask.numel() * x.shape[-1] != x.numel():
            raise ConfigError(f"a mask of {mask.numel()} tokens does not fit an input of {tuple(x.shape)}")
        self.ensure_factors()
        run = self._factored if self.form == "factored" else lambda x, z, _: self._gain(x, z - 1)
        other = self.base_layer(x) if answer_z is None else run(x, answer_z, None)
        return torch.where(mask.to(x.device).reshape(*x.shape[:-1], 1), run(x, z, None), other)

    def _z_of_rows(self, names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        one = torch.ones(self.r, device=x.device)
        z = torch.stack([self.svf_z[n].weight if n in self.svf_z else one for n in names])
        if len(z) != len(x):
            raise ConfigError(f"adapter_names has {len(z)} entries for a batch of {len(x)} rows")
        return z_per_row(z, x)

    def _factored(self, x: torch.Tensor, z: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        first, second = self.factors()
        hidden = F.linear(x.to(first.dtype), first)
        hidden = Scale.apply(hidden, z) if torch.is_grad_enabled() else scaled(hidden, z, gain)
        return F.linear(hidden, second, self._bias(hidden.dtype)).to(x.dtype)

    def _gain(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        if self.side == "in":
            return self.base_layer(x + self._project(x, gain))
        y = self.base_layer(x)
        bias = self._bias(y.dtype)
        return y + self._project(y if bias is None else y - bias, gain)

    def _project(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """S (g ⊙ Sᵀx) with the short side S."""
        short = self.svf_short
        hidden = F.linear(x, short.T)
        trained = torch.is_grad_enabled() and gain.requires_grad
        return F.linear(Gain.apply(hidden, gain) if trained else hidden * gain.to(hidden.dtype), short)

    def _bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        bias = weights.bias(self.get_base_layer())
        return None if bias is None else bias.to(dtype)

    def __repr__(self) -> str:
        return "svf." + super().__repr__()


@contextmanager
def prompt_only(layers: Mapping[str, SVFLinear], mask: bool | torch.Tensor) -> Iterator[None]:
    """Apply each z by its `positions` inside this context.

    Args:
        mask: True at tokens of the prompt: bool [B, T], or one for all. A model's other states (merged, disabled) hold
            for all tokens.
    """
    before = [(layer, layer.prompt_mask) for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.prompt_mask = mask
        yield
    finally:
        for layer, value in before:
            layer.prompt_mask = value


def set_state(layer: SVFLinear, **state: object) -> None:
    """Set attributes that are no parameters, buffers or modules, without `torch.nn.Module`'s checks: in a switch of
    hundreds of layers they take most of the time.
    """
    vars(layer).update(state)
