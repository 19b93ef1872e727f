"""Self-adaptation: which experts does a request need? Strategies A to D, and the search behind C.

from sigmix.adapt import PromptDispatch, ClassifierDispatch, FewShotSearch, ProbeDispatch, TwoPass

TwoPass(engine, ProbeDispatch(engine)).generate(["What is 17 + 25?"])[0].text
"""

from __future__ import annotations

from sigmix.adapt.base import OTHER, Decision, Strategy
from sigmix.adapt.classifier import ClassifierDispatch
from sigmix.adapt.few_shot import AlphaSpace, Example, FewShotSearch
from sigmix.adapt.probe import Probe, ProbeDispatch
from sigmix.adapt.prompt import PromptDispatch
from sigmix.adapt.two_pass import Answer, TwoPass

__all__ = [
    "OTHER", "AlphaSpace", "Answer", "ClassifierDispatch", "Decision", "Example", "FewShotSearch", "Probe",
    "ProbeDispatch", "PromptDispatch", "Strategy", "TwoPass",
]  # fmt: skip
