"""vLLM plugin: SVF as an adapter kind, exact, with a mixture per request in vLLM's own batches.

    SIGMIX_VLLM_EXPERTS=bundled VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-loras 32

A request with ``"model": "sums:0.7+dates:0.3"`` runs under that mixture. vLLM treats a mixture as a LoRA adapter:
its scheduler, its prefix cache and its API are unchanged, and `worker` replaces the computation. vLLM finds `register`
through the entry point group ``vllm.general_plugins``. docs/vllm.md describes the variables ``SIGMIX_VLLM_…``.
"""

from sigmix.integrations.vllm.plugin import register

__all__ = ["register"]
