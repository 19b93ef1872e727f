"""Configuration of SVF for PEFT."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field

from peft.config import PeftConfig

from sigmix.errors import ConfigError

POSITIONS = ("all", "prompt")
"""Values of `SVFConfig.positions`."""


class SigmixPeftType(str, enum.Enum):
    """PEFT type of singular-value fine-tuning; hashes and compares like the string "SVF"."""

    SVF = "SVF"


@dataclass
class SVFConfig(PeftConfig):
    """Configuration of singular-value fine-tuning (arXiv 2501.06252, section 3.1).

    Attributes:
        target_modules: "all-linear" (all linear layers but the output head), "attention", "mlp", a module name or
            suffix such as "q_proj", a list of them, or a regular expression over the full path. In a vision-language
            model all of these select from its language backbone; layers outside of it need their full path in a list.
        layers_to_transform: indices of the layers to adapt, one index, or "half": every second layer, beginning with
            the first (the paper adapts half of the layers of a 70B model). None: all.
        layers_pattern: name of the list of layers where it cannot be inferred (as in PEFT).
        exclude_modules: names, suffixes or a regular expression of modules to leave out.
        exclude: alias of `exclude_modules`.
        positions: tokens on which z acts: "all", or "prompt": those of the prompt, from which the first answer token
            comes, while the base decodes the answer over their keys and values. "prompt" leaves out layers that read
            cached latents again, kv_b_proj of multi-head latent attention.
        cache: keep decompositions in the user's cache folder.
    """

    target_modules: list[str] | str | None = field(default="all-linear")
    layers_to_transform: list[int] | int | str | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    exclude: list[str] | str | None = field(default=None)
    positions: str = field(default="all")
    cache: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SigmixPeftType.SVF
        if self.exclude is not None:
            if self.exclude_modules is not None and self.exclude_modules != self.exclude:
                raise ConfigError("exclude and exclude_modules both given and different", remedy="give one of them")
            self.exclude_modules, self.exclude = self.exclude, None
        if isinstance(self.layers_to_transform, str) and self.layers_to_transform != "half":
            raise ConfigError(f"layers_to_transform must be indices or 'half', not {self.layers_to_transform!r}")
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions must be 'all' or 'prompt', not {self.positions!r}")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set)):
                setattr(self, name, sorted(value))
            elif isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise ConfigError(f"{name}: invalid regular expression {value!r}: {error}") from error
