"""Self-adaptation: which experts does a request need? Strategies A to D, and the search behind C.

from sigmix.adapt import PromptDispatch, ClassifierDispatch, FewShotSearch, RouterDispatch, TwoPass

TwoPass(engine, RouterDispatch(engine)).generate(["What is 17 + 25?"])[0].text
"""

from __future__ import annotations

from sigmix.adapt.base import OTHER, Decision, Strategy
from sigmix.adapt.classifier import ClassifierDispatch
from sigmix.adapt.few_shot import AlphaSpace, Example, FewShotSearch
from sigmix.adapt.prompt import PromptDispatch
from sigmix.adapt.router import RouterDispatch, request_statistics
from sigmix.adapt.two_pass import Answer, TwoPass

__all__ = [
    "OTHER", "AlphaSpace", "Answer", "ClassifierDispatch", "Decision", "Example", "FewShotSearch",
    "PromptDispatch", "RouterDispatch", "Strategy", "TwoPass", "request_statistics",
]  # fmt: skip
