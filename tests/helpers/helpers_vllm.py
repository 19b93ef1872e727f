"""The part of vLLM's interface that a resolver meets, written after vLLM's sources for tests without vLLM.

After ``vllm/lora/resolver.py``, ``vllm/lora/request.py``, ``vllm/lora/peft_helper.py`` and the resolving of an unknown
adapter in ``vllm/entrypoints/openai/models/serving.py`` (main branch, 2026). Not vLLM's code; nothing of it computes.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None

    def __post_init__(self):
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


class Registry:
    def __init__(self):
        self.resolvers: dict[str, LoRAResolver] = {}

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name: str) -> LoRAResolver:
        return self.resolvers[resolver_name]


def install(monkeypatch) -> Registry:
    """Put the stand-in where ``import vllm`` finds it, for one test."""
    registry = Registry()
    made = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.resolver", "vllm.lora.request")}
    made["vllm.lora.resolver"].LoRAResolver = LoRAResolver
    made["vllm.lora.resolver"].LoRAResolverRegistry = registry
    made["vllm.lora.request"].LoRARequest = LoRARequest
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return registry


def legal(config: dict, max_lora_rank: int) -> None:
    """What vLLM refuses when it loads an adapter's config."""
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert config["r"] <= max_lora_rank
    assert config.get("bias", "none") == "none"
    assert not config.get("use_dora")
    assert not config.get("modules_to_save")
