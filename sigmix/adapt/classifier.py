"""sigmix.adapt.classifier"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sigmix.adapt.base import DISPATCH
from sigmix.adapt.prompt import PromptDispatch
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.mix import Mix


class ClassifierDispatch(PromptDispatch):
    """Strategy B: ask under a classification expert, made by ``sigmix train --task dispatch --bank …``.

    Args:
        expert: its name in the bank; None: the only expert of the bank with domain "dispatch".

    Raises:
        UnknownNameError: no such expert. ConfigError: none or several in the bank, or it was trained for other labels.
    """

    name = "B (classifier)"

    def __init__(
        self,
        engine: Any,
        bank: Mapping[str, Any] | None = None,
        *,
        expert: str | None = None,
        calibrate: bool = False,
        batch_size: int = 64,
    ) -> None:
        self.expert = expert
        super().__init__(engine, bank, calibrate=calibrate, batch_size=batch_size)

    def _under(self) -> Mix:
        train = "make one: sigmix train --task dispatch --bank FOLDER --out FOLDER/dispatch"
        if self.expert is None:
            found = [name for name in self.bank if self.bank[name].meta.get("domain") == DISPATCH]
            if len(found) != 1:
                raise ConfigError(
                    f"the bank has {len(found)} classification experts where one is needed",
                    remedy=train if not found else f"name one of {', '.join(found)}",
                )
            self.expert = found[0]
        elif self.expert not in self.bank:
            raise UnknownNameError("expert", self.expert, self.bank, remedy=train)
        known = dict(self.bank[self.expert].meta.get("training") or {}).get("labels")
        names = [label.name for label in self.labels]
        if known is not None and list(known) != names:
            raise ConfigError(
                f"the classification expert {self.expert} was trained for {', '.join(known)}; the bank has "
                f"{', '.join(names)}",
                remedy=train,
            )
        mix = Mix.one(self.expert)
        self.engine.z(mix)
        return mix

    def _who(self) -> str:
        return f"the classification expert {self.expert}"
