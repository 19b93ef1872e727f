"""Registration in vLLM: the resolver of mixtures, and the three places of vLLM that the plugin replaces."""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Any

import numpy as np

from sigmix.errors import ConfigError, SigmixError
from sigmix.integrations.vllm.adapter import PREFIX, Adapter, Settings

log = logging.getLogger(__name__)

NAME = "sigmix"

SUPPORTED = ("0.32",)
"""Releases of vLLM with the classes and functions that `register` replaces, as major.minor."""

ANSWER = "sigmix-answer"
"""Tag of the hash keys of blocks with answer tokens under experts that act on prompt tokens only."""

ANSWERS_FROM = "sigmix_answers_from"
"""Key of ``SamplingParams.extra_args``: position in the prompt of the first token of a given answer, to be scored."""


def register() -> None:
    """Register mixtures as adapters if the environment has `Settings`; vLLM's general plugin, run in each process.

    Raises:
        ConfigError: an invalid setting, or a release of vLLM that is not supported. ImportError: no vLLM.
    """
    settings = Settings.of()
    if settings is None:
        return
    check_version()
    settings.bank()  # a missing folder is an error at start
    from vllm.lora.resolver import LoRAResolverRegistry
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.worker import lora_model_runner_mixin

    from sigmix.integrations.vllm.worker import MixtureManager

    # `register_resolver` would warn where the plugin is loaded again
    LoRAResolverRegistry.resolvers[NAME] = resolver(settings)
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = MixtureManager
    runner = lora_model_runner_mixin.LoRAModelRunnerMixin
    runner.set_active_loras = _with_positions(runner.set_active_loras)
    kv_cache_utils._gen_prompt_embeds_extra_hash_keys = _with_answer_keys(
        kv_cache_utils._gen_prompt_embeds_extra_hash_keys
    )


def check_version() -> None:
    """Raise `ConfigError` unless the plugin supports the installed vLLM."""
    import vllm

    if ".".join(vllm.__version__.split(".")[:2]) not in SUPPORTED:
        raise ConfigError(
            f"sigmix's vLLM plugin supports vLLM {', '.join(SUPPORTED)}, not {vllm.__version__}",
            remedy=f"pip install 'vllm=={SUPPORTED[-1]}.*', or unset SIGMIX_VLLM_EXPERTS",
        )


def resolver(settings: Settings) -> Any:
    """Return a ``vllm.lora.resolver.LoRAResolver`` of mixtures. Raises ImportError without vLLM."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class SigmixResolver(LoRAResolver):
        """Mixtures of sigmix experts by name."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """Return the adapter, or None: vLLM then tries the next resolver and finally answers 404."""
            try:
                adapter = await asyncio.to_thread(Adapter.find, lora_name, settings)
            except SigmixError as error:
                log.error("no mixture %r: %s", lora_name, error)
                return None
            # vLLM replaces the number with its own
            return adapter and LoRARequest(lora_name=adapter.name, lora_int_id=1, lora_path=adapter.path)

    return SigmixResolver()


def answer_start(params: Any, prompt_tokens: int) -> int:
    """Return the position of a request's first answer token: that of `ANSWERS_FROM`, else the prompt's length."""
    first = (getattr(params, "extra_args", None) or {}).get(ANSWERS_FROM)
    return min(first, prompt_tokens) if isinstance(first, int) else prompt_tokens


def _with_positions(original: Any) -> Any:
    """Wrap `LoRAModelRunnerMixin.set_active_loras`: its mappings do not separate prompt and answer tokens, see
    `answer_start`."""
    if hasattr(original, "__wrapped__"):
        return original

    @functools.wraps(original)
    def set_active_loras(self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> None:
        rows = len(num_scheduled_tokens)
        lengths = zip(input_batch.req_ids[:rows], input_batch.num_prompt_tokens[:rows].tolist(), strict=True)
        prompts = [answer_start(self.requests[name].sampling_params, length) for name, length in lengths]
        with self.lora_manager.tokens(
            num_scheduled_tokens, input_batch.num_computed_tokens_cpu[:rows], np.array(prompts)
        ):
            original(self, input_batch, num_scheduled_tokens, *args, **kwargs)

    return set_active_loras


def _with_answer_keys(original: Any) -> Any:
    """Wrap the function for a block's own hash keys: add one to blocks with answer tokens that the base computed.

    In a later conversation these tokens are prompt tokens, so their keys and values must not be taken from the cache.
    """
    if hasattr(original, "__wrapped__"):
        return original

    @functools.wraps(original)
    def extra_keys(request: Any, start_token_idx: int, end_token_idx: int) -> list[tuple[str, Any]]:
        keys = original(request, start_token_idx, end_token_idx)
        adapter, first = request.lora_request, answer_start(request.sampling_params, request.num_prompt_tokens)
        if adapter is None or end_token_idx <= first or not adapter.lora_path.startswith(PREFIX):
            return keys
        return [*keys, (ANSWER, first)] if Adapter.parse(adapter.lora_path).prompt else keys

    return extra_keys
