"""Self-adaptation: which experts does a request need? Strategies A to D, and the search behind C.

from sigmix.adapt import PromptDispatch, ClassifierDispatch, FewShotSearch, ProbeDispatch, TwoPass

TwoPass(engine, ProbeDispatch(engine)).generate(["What is 17 + 25?"])[0].text
"""

from __future__ import annotations

from sigmix.adapt.decision import OTHER, Decision, Strategy
from sigmix.adapt.fewshot import Example, FewShotSearch
from sigmix.adapt.probe import Probe, ProbeDispatch
from sigmix.adapt.prompt import ClassifierDispatch, PromptDispatch
from sigmix.adapt.spaces import AlphaSpace
from sigmix.adapt.twopass import Answer, TwoPass

__all__ = [
    "OTHER", "AlphaSpace", "Answer", "ClassifierDispatch", "Decision", "Example", "FewShotSearch", "Probe",
    "ProbeDispatch", "PromptDispatch", "Strategy", "TwoPass",
]  # fmt: skip
