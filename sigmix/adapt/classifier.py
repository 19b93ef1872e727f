"""Strategy B (Transformer², section 3.2): a classification expert z_c classifies the request by strategy A's prompt."""

from __future__ import annotations

from collections.abc import Mapping

from sigmix.adapt.base import DISPATCH, labels
from sigmix.adapt.prompt import PromptDispatch
from sigmix.engine.base import InferenceEngine
from sigmix.errors import ConfigError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix

REMEDY = "train one: sigmix train --task dispatch --bank FOLDER --out FOLDER/dispatch"


class ClassifierDispatch(PromptDispatch):
    """Strategy B: the label that the base model finds most likely under a classification expert.

    Raises:
        ConfigError: no or several classification experts, or other labels.
    """

    name = "B (classifier)"

    def __init__(self, engine: InferenceEngine) -> None:
        self.expert = expert = _classifier(engine.bank)
        self.subject = f"the classification expert {expert}"
        super().__init__(engine, calibrate=False, mix=Mix.one(expert))


def _classifier(bank: Mapping[str, Expert]) -> str:
    """Return the name of the classification expert, checked against the bank's labels."""
    experts = [name for name in bank if bank[name].meta.get("domain") == DISPATCH]
    if len(experts) != 1:
        remedy = f"keep one of {', '.join(experts)} in it" if experts else REMEDY
        raise ConfigError(f"the bank has {len(experts)} classification experts, expected one", remedy=remedy)
    (expert,) = experts
    trained = (bank[expert].meta.get("training") or {}).get("labels")
    names = [label.name for label in labels(bank)]
    if trained is not None and list(trained) != names:
        raise ConfigError(
            f"the classification expert {expert} was trained for {', '.join(trained)}; the bank has {', '.join(names)}",
            remedy=REMEDY,
        )
    return expert
