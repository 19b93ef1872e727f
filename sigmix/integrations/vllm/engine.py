"""vLLM as an inference engine: generation and scoring under mixtures of experts in vLLM's batches.

    engine = VllmEngine("smollm2-135m", Bank("experts"))
    engine.generate(["17 + 25 = ?"], mix="sums:0.7+dates:0.3", max_new_tokens=16)

Every prompt may have a mixture of its own. Greedy completions and scores are those of `sigmix.engine.Engine` up to
rounding; samples are drawn from the same distribution with vLLM's random numbers. There are no hidden states.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sigmix.engine.base import Mixes, Prompt
from sigmix.engine.base_engine import BaseEngine
from sigmix.engine.detokenizer import token_decoder
from sigmix.engine.generation import SamplingParams, SequenceState
from sigmix.engine.scoring import encode_answered
from sigmix.errors import ConfigError, ExpertError, UnknownNameError, reraised
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.integrations.vllm.adapter import VARIABLES, Adapter
from sigmix.integrations.vllm.plugin import ANSWERS_FROM, SUPPORTED, check_version, register
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_tokenizer_for
from sigmix.utils.optional import optional

DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors keep their class, and one process fewer
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second one does not separate prompt and answer tokens
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for results
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Variables of vLLM, where they are not set."""


@dataclass(frozen=True)
class Request:
    """Token ids, vLLM's sampling options, a mixture, and a function of each output that returns True to end it."""

    ids: Sequence[int]
    params: Any
    mix: Mix
    receive: Callable[[Any], bool]


class VllmEngine(BaseEngine):
    """An inference engine on vLLM, see `sigmix.engine.base.InferenceEngine`.

    Args:
        base, dtype: see `load_base`; a base of text, not quantized.
        bank: a `Bank` or its folder; None: the base only.
        max_mixtures: mixtures in one batch, vLLM's ``max_loras``; requests of further ones wait.
        max_model_len: context length in tokens; default: the base's.
        options: further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization`` or ``tensor_parallel_size``.

    Raises:
        ConfigError: vLLM is missing, of another release, or cannot serve the base; experts that are not in a folder.
        BaseModelError: see `load_base`. ExpertError: experts that do not fit the base.

    Attributes:
        llm: the ``vllm.LLM``. checkpoint: the base on disk.
    """

    def __init__(
        self,
        base: str | os.PathLike[str] = DEFAULT,
        bank: Bank | str | os.PathLike[str] | None = None,
        dtype: str | None = None,
        *,
        max_mixtures: int = 32,
        max_model_len: int | None = None,
        **options: Any,
    ) -> None:
        if bank is not None and not isinstance(bank, (Bank, str, os.PathLike)):
            raise ConfigError("VllmEngine reads experts from a folder", remedy="save them: Bank(folder, create=True)")
        self.bank: Bank | Mapping[str, Expert] = {} if bank is None else bank if isinstance(bank, Bank) else Bank(bank)
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        vllm = optional("vllm", f"'vllm=={SUPPORTED[-1]}.*'", "VllmEngine")
        check_version()
        self.checkpoint = checkpoint = BaseCheckpoint(os.fspath(base), dtype or "auto")
        if checkpoint.vision:
            raise ConfigError(f"VllmEngine takes text, but {checkpoint.name} is a vision-language model")
        if isinstance(self.bank, Bank):
            os.environ |= {f"{VARIABLES}EXPERTS": str(self.bank.folder.resolve()), f"{VARIABLES}BASE": checkpoint.base}
            register()  # here, since vLLM may have loaded its plugins before
        # compiling for a CPU takes minutes
        options = {"enforce_eager": not torch.cuda.is_available(), "max_loras": max_mixtures, **options}
        with reraised(ConfigError, f"vLLM cannot serve {checkpoint.name}", "see docs/vllm.md"):
            self.llm = vllm.LLM(
                str(checkpoint.folder), dtype=checkpoint.dtype_name, max_model_len=max_model_len,
                enable_lora=isinstance(self.bank, Bank), skip_tokenizer_init=True, use_tqdm_on_load=False, **options,
            )  # fmt: skip
        self._adapters: dict[str, Any] = {}  # vLLM's LoRARequest by `Adapter.path`, for the engine's life
        model: Any = checkpoint.model
        super().__init__(model.to(checkpoint.dtype), load_tokenizer_for(model, base))

    # ------------------------------------------------------------------ base and mixtures

    @property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base model."""
        return self.checkpoint.fingerprint()

    @property
    def context_length(self) -> int:
        """Context length in tokens."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    @cached_property
    def layers(self) -> dict[str, Any]:
        """Matrices that an expert of the bank changes, by path, on the meta device."""
        acting = {path for expert in self.bank.values() for path in expert.z}
        return {path: layer for path, layer in self.checkpoint.linears.items() if path in acting}

    def check_expert(self, expert: Expert) -> None:
        """Raise `FingerprintError` or `ExpertError` if an expert was made on another base; sketches are not checked."""
        self.checkpoint.check(expert)

    def check_mix(self, mix: Mix) -> None:
        """Raise `UnknownNameError`, `FingerprintError` or `ExpertError` unless a mixture can run on this base."""
        self._adapter(mix)

    def _adapter(self, mix: Mix) -> Any:
        """Return a mixture's LoRARequest, None for the base. A bad one is an error here and not in vLLM's loop."""
        if not mix.weights:
            return None
        from vllm.lora.request import LoRARequest

        for name in mix.weights:
            if name not in self.bank:
                raise UnknownNameError("expert", name, self.bank, remedy="`sigmix experts list` lists them")
        adapter = Adapter.of(mix, self.bank)
        if adapter.path not in self._adapters:
            request = LoRARequest(adapter.name, len(self._adapters) + 1, adapter.path)
            with reraised(ExpertError, f"vLLM cannot run {mix.id}"):
                self.llm.llm_engine.add_lora(request)
            self._adapters[adapter.path] = request
        return self._adapters[adapter.path]

    # ------------------------------------------------------------------ generation

    def decode(self, sequences: Sequence[SequenceState], form: str | None, batch_size: int, keep_errors: bool) -> None:
        """Run sequences to their end in vLLM's own batches; ``batch_size`` has no effect.

        Raises:
            ConfigError: a form, a structured output, or a sampling option that vLLM does not have.
        """
        if form is not None or any(one.matcher is not None for one in sequences):
            raise ConfigError("VllmEngine has no option form and no structured_output", remedy="leave it out")
        self._run([self._generation_request(one) for one in sequences])
        error = next((one.error for one in sequences if one.error is not None), None)
        if error is not None and not keep_errors:
            raise error

    def _generation_request(self, one: SequenceState) -> Request:
        own = one.params
        sampling: dict[str, Any] = {"temperature": 0.0}
        if own.do_sample:
            sampling = {name: getattr(own, name) for name in ("temperature", "top_p", "top_k", "min_p")}
            sampling["seed"] = int(own.seed) % 2**63
        # the text decides the end: it is looked at after every token
        final = one.detokenizer is None or not one.detokenizer.stop_strings
        params = _params(
            max_tokens=own.max_new_tokens, stop_token_ids=self.eos_token_ids, logprobs=0, final=final,
            repetition_penalty=own.repetition_penalty, presence_penalty=own.presence_penalty,
            frequency_penalty=own.frequency_penalty, logit_bias=dict(own.logit_bias) or None, **sampling,
        )  # fmt: skip

        def receive(output: Any) -> bool:
            (completion,) = output.outputs
            for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
                if not one.finish:
                    one.add(token, entry[token].logprob, self.eos_token_ids)
            return bool(one.finish)

        return Request(one.prompt_ids, params, one.mix, receive)

    # ------------------------------------------------------------------ scoring

    def replies_and_logprobs(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], mix: Mixes = None, *, max_new_tokens: int,
        start: Sequence[int] | None = None, batch_size: int = 64,
    ) -> tuple[list[str], list[list[float]]]:  # fmt: skip
        """Return greedy replies and scores of answers, see `sigmix.engine.scoring.replies_and_logprobs`."""
        rows, mixes = encode_answered(self, prompts, answers, max_new_tokens), self.mixes(mix, len(prompts))
        params = SamplingParams(max_new_tokens)
        replies = [SequenceState(row, params, own) for row, own in zip(rows, mixes, strict=True) if max_new_tokens]
        scores = self.token_scores(rows, answers, mixes, besides=list(map(self._generation_request, replies)))
        decoder = token_decoder(self.tokenizer)
        texts = [decoder.decode(one.ids, end=self.eos_token_ids) for one in replies]
        return texts, [[logprob for logprob, _ in row] for row in scores]

    def next_logprobs(
        self, prompts: Sequence[Prompt], tokens: Sequence[int], mix: Mixes = None, *, answer: Sequence[int] = (),
        start: Sequence[int] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return log-probabilities float32 [N, K] of K tokens after each prompt, normalised over these tokens."""
        rows = [self.encode(prompt) for prompt in prompts]
        for number, row in enumerate(rows):
            self.check_prompt(row, len(answer) + 1, f"prompt {number}")
        pairs = list(zip(rows, self.mixes(mix, len(rows)), strict=True))
        scores = self.token_scores(
            [[*row, *answer] for row, _ in pairs for _ in tokens], [[token] for _ in rows for token in tokens],
            [own for _, own in pairs for _ in tokens], [len(row) for row in rows for _ in tokens],
        )  # fmt: skip
        logprobs = torch.tensor([logprob for ((logprob, _),) in scores])
        return logprobs.reshape(len(rows), len(tokens)).log_softmax(-1)

    def token_scores(
        self, rows: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], mixes: Sequence[Mix],
        starts: Sequence[int] | None = None, besides: Sequence[Request] = (),
    ) -> list[list[tuple[float, bool]]]:  # fmt: skip
        """Return the log-probability of each token of given answers, and whether it is the most probable one.

        Answers that differ in their last token only are one request, since that token is not read.

        Args:
            rows: token ids before the answers. answers: token ids, none empty.
            starts: number of prompt tokens in each row, see `SVFConfig.positions`; default: all.
            besides: other requests to run in the same batches.
        """
        from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

        scores: list[list[tuple[float, bool]]] = [[] for _ in rows]
        groups: dict[Any, list[int]] = defaultdict(list)
        starts = list(map(len, rows)) if starts is None else starts
        for number, (row, answer, mix, start) in enumerate(zip(rows, answers, mixes, starts, strict=True)):
            groups[mix, (*row, *answer[:-1]), len(row), start].append(number)

        def request(numbers: Sequence[int], mix: Mix, ids: Sequence[int], first: int, start: int) -> Request:
            read = ids[first:]
            lasts = {number: answers[number][-1] for number in numbers}

            def receive(output: Any) -> bool:
                (completion,), before = output.outputs, output.prompt_logprobs[first:] if read else []
                head = [(one[token].logprob, one[token].rank == 1) for token, one in zip(read, before, strict=True)]
                for number, token in lasts.items():
                    last = completion.logprobs[0][token].logprob, token == completion.token_ids[0]
                    scores[number] = [*head, last]
                return True

            params = _params(
                max_tokens=1, temperature=0.0, logprob_token_ids=list(dict.fromkeys(lasts.values())),
                prompt_logprobs=0 if read else None, extra_args={ANSWERS_FROM: start} if start < len(ids) else None,
            )  # fmt: skip
            return Request(ids, params, mix, receive)

        limit = MAX_LOGPROB_TOKEN_IDS
        self._run([
            *besides,
            *(request(every[place : place + limit], *key)
              for key, every in groups.items() for place in range(0, len(every), limit)),
        ])  # fmt: skip
        return scores

    def cached_tokens(self, prefix: Sequence[int]) -> int:
        """Return the tokens of a common prefix in whole blocks of vLLM's prefix cache."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return len(prefix) // cache.block_size * cache.block_size if cache.enable_prefix_caching else 0

    # ------------------------------------------------------------------ vLLM

    def _run(self, requests: Sequence[Request]) -> None:
        """Run requests to their end, after all their mixtures were registered."""
        from vllm.inputs.engine import tokens_input

        adapters = {mix: self._adapter(mix) for mix in dict.fromkeys(one.mix for one in requests)}
        engine, names = self.llm.llm_engine, list(map(str, range(len(requests))))
        try:
            for name, one in zip(names, requests, strict=True):
                engine.add_request(name, tokens_input(list(one.ids)), one.params, lora_request=adapters[one.mix])
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if requests[int(output.request_id)].receive(output) and not output.finished:
                        engine.abort_request([output.request_id])
        except BaseException:
            engine.abort_request(names)  # the next call must not receive them
            raise


def _params(final: bool = True, **options: Any) -> Any:
    """Return vLLM's sampling options; ``final``: of an output at the end only, else after every token."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as Params

    kind = RequestOutputKind.FINAL_ONLY if final else RequestOutputKind.DELTA
    with reraised(ConfigError, "vLLM does not have these sampling options"):
        # the tokens that end a completion are ours, and so is its text
        return Params(ignore_eos=True, detokenize=False, output_kind=kind, **options)
