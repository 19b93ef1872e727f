"""sigmix as a model of EleutherAI's lm-evaluation-harness: any of its tasks under a mixture, or a mixture per request.

    lm_eval --model sigmix --model_args mix=auto --tasks arc_easy     # through the entry point

Requests, truncation and stop strings follow the harness's ``hf`` model, so the base scores the same. Forward passes and
generation are the engine's, so every row of a batch may have its own mixture. Log-softmax is always in float32 (``hf``
with softmax_dtype=float32). The context of a request is its prompt, and the continuation the answer.

With ``mix=auto`` a strategy decides once for each distinct request: on the last user turn if the harness applied a chat
template, else on its whole context, few-shot examples included. For rolling likelihoods it sees the first half of the
context length; other requests without context get the base.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from sigmix.adapt.base import Decision
from sigmix.adapt.two_pass import AUTO, TwoPass, letter_of
from sigmix.engine import Engine
from sigmix.engine.base import ENGINES
from sigmix.engine.generation import SamplingParams
from sigmix.engine.prefix_cache import left_pad
from sigmix.engine.tokenization import check_tokens, context_length, has_template, in_parts, no_marks, template_error
from sigmix.errors import ConfigError, ContextError, UnknownNameError, reraised
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix, answer_note, read_mix
from sigmix.experts.original_basis import check_basis, use_original_basis
from sigmix.integrations.vllm.engine import VllmEngine
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base
from sigmix.models.multimodal import processor_of
from sigmix.utils.io import check_writable, write_text

HF_OPTIONS = ("max_length", "truncation", "add_bos_token", "prefix_token_id", "chat_template_args")
"""Options of the harness's ``hf`` model that are passed on."""
OPTIONS = ("base", "mix", "strategy", "bank", "dtype", "device", "form", "decisions", "batch_size", "max_batch_size",
           "quantization", "basis", "engine")  # fmt: skip
TOKEN_BUDGET = 8192
"""Tokens of a batch, padding included, with batch_size "auto"."""
VLLM_ROWS = 1024
"""Rows of a call of vLLM, which forms its own batches."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None), "num_return_sequences": (1, None), "length_penalty": (1, 1.0, None),
    "use_cache": (True, None),
}  # fmt: skip
"""Unsupported generation options, with the values that have no effect."""
SAMPLING: dict[str, type] = {
    one.name: type(one.default) for one in fields(SamplingParams) if one.name.endswith(("_p", "_k", "_penalty"))
}
"""Options that the engine has under the same name, and their types."""
OPTIONS_REMEDY = f"supported are until, max_gen_toks, do_sample, temperature, {', '.join(SAMPLING)}"

log = logging.getLogger(__name__)

T = TypeVar("T")
Row = tuple[Mix, list[int], list[int]]  # mixture, context and continuation as token ids


@register_model("sigmix")
class SigmixLM(HFLM):
    """A base under a mixture, or under the choices of a strategy, as a model of the harness.

    Args:
        base, dtype, device, quantization: see `load_base`. bank: folder of experts; None: the bundled bank.
        mix: "a:0.7+b:0.3", a name, "base", a ``.json`` file of a mixture, or "auto".
        strategy: A, B, D, or "auto" (see `open_strategy`); implies ``mix=auto``.
        form: of batches with several mixtures, "factored" or "gain"; None: factored.
        decisions: JSONL file for every distinct request and its decision.
        basis: of a quantized base, "own", or "original" for experts of the unquantized base.
        engine: "own", or "vllm" for `VllmEngine`, which has no device, form, quantization and basis.
        batch_size: rows; "auto": up to `TOKEN_BUDGET` tokens and ``max_batch_size`` rows.
        options: see `HF_OPTIONS`.

    Raises:
        ConfigError, UnknownNameError, OutputError: an invalid option. Others: see `load_base`, `Engine.z` and
        `open_strategy`.
    """

    tokenizer: Any
    instances = 0  # instances created in this process; before the first, errors are errors of the options

    def __init__(
        self, base: str = DEFAULT, mix: str | None = None, strategy: str | None = None, bank: str | None = None,
        dtype: str | None = None, device: str | None = None, form: str | None = None, decisions: str | None = None,
        batch_size: int | str = AUTO, max_batch_size: int = 64, quantization: str | None = None, basis: str = "own",
        engine: str = "own", **options: Any,
    ) -> None:  # fmt: skip
        for name in options:
            if name not in HF_OPTIONS:
                raise UnknownNameError("model argument", name, [*OPTIONS, *HF_OPTIONS], remedy="see docs/lm-eval.md")
        mix = str(mix) if mix is not None else AUTO if strategy is not None else "base"
        if mix != AUTO and (strategy is not None or decisions is not None):
            raise ConfigError("strategy and decisions go with mix=auto only", remedy="leave the mix out, or give auto")
        if form not in (None, "factored", "gain"):
            raise ConfigError(f"form must be factored or gain, not {form!r}")
        if (length := options.get("max_length")) is not None and not (isinstance(length, int) and length > 0):
            raise ConfigError(f"max_length must be a number of tokens, at least 1, not {length!r}")
        if engine not in ENGINES:
            raise UnknownNameError("engine", engine, ENGINES, remedy="engine=own or engine=vllm")
        check_basis(basis, quantization)
        auto = str(batch_size).startswith(AUTO)
        if not auto and not (str(batch_size).isdecimal() and int(batch_size) > 0):
            raise ConfigError(f"batch_size must be auto or a number of at least 1, not {batch_size!r}")
        self.rows = None if auto else int(batch_size)
        if decisions is not None:
            check_writable(decisions)
        experts = Bank(bank) if bank is not None else Bank.bundled() if mix != "base" else None
        self.mix = None if mix == AUTO else read_mix(mix, experts)
        letter = letter_of(strategy or AUTO)
        if device == "cuda:0" and not torch.cuda.is_available():  # the harness's default
            device = None
        dtype = None if dtype == "auto" else dtype
        self._vllm: VllmEngine | None = None
        if engine == "vllm":
            given = {"device": device, "form": form, "quantization": quantization, "basis": basis != "own"}
            if unfit := [name for name, value in given.items() if value]:
                raise ConfigError(f"{unfit[0]} cannot be combined with engine=vllm", remedy="use engine=own")
            self.rows = self.rows or VLLM_ROWS
            self._vllm = VllmEngine(base, experts, dtype)
            model, tokenizer = self._vllm.model, self._vllm.tokenizer
            # vLLM reads a row only with room for one more token
            options["max_length"] = min(length or self._vllm.context_length, self._vllm.context_length - 1)
        else:
            model, tokenizer = load_base(base, dtype, device, quantization_config=quantization)
        if basis == "original":
            use_original_basis(model)
        if processor_of(tokenizer) is not None and options.get("max_length") is None:
            options["max_length"] = context_length(model)  # the harness misses the nested text config
        super().__init__(
            model, backend="causal", tokenizer=tokenizer, batch_size=self.rows or max_batch_size,
            max_batch_size=max_batch_size, enable_thinking=False, **options,
        )  # fmt: skip
        self.form, self._size = form, model.num_parameters()  # before the engine adds z
        self.engine: Any = self._vllm or Engine(model, tokenizer, experts)
        self._runner = TwoPass(self.engine, letter)
        if self.mix is not None:
            self.engine.check_mix(self.mix)  # raises for an expert of another base
            if text := answer_note(self.mix, self.engine.bank):
                log.warning(text)
        self.strategy = self._runner.strategy if self.mix is None else None
        self._decisions: dict[str, Decision] = {}
        self._decisions_file = None if decisions is None else Path(decisions)
        self._mix_counts: Counter[str] = Counter()
        self.truncated = 0
        self._user_turns: dict[str, str] = {}
        SigmixLM.instances += 1

    def _mixes(self, requests: Sequence[str]) -> list[Mix]:
        """Return the mixture of each request, given as its context."""
        if self.mix is not None:
            mixes = [self.mix] * len(requests)
        else:
            texts = [self._user_turns.get(text, text) for text in requests]
            new = [text for text in dict.fromkeys(texts) if text not in self._decisions]
            self._decisions |= zip(new, self._runner.decide(new), strict=True)
            mixes = [self._decisions[text].mix for text in texts]
            if self._decisions_file is not None:
                lines = [{"request": text, **decision.to_json()} for text, decision in self._decisions.items()]
                write_text(self._decisions_file, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines))
        self._mix_counts.update(mix.id for mix in mixes)
        return mixes

    def get_model_info(self) -> dict[str, Any]:
        """Return the entry of the results file: ``mixes`` of all requests (each choice of a question is one),
        ``contexts`` and ``labels`` of those that were decided on, sums of ``tokens`` and ``seconds`` of pass one."""
        base = self.model.sigmix_base["name"]
        info = {
            "base": base, "fingerprint": self.engine.base_fingerprint, "mix": AUTO if self.mix is None else self.mix.id,
            "mixes": dict(self._mix_counts.most_common()),
        }  # fmt: skip
        if self.strategy is not None:
            decisions = list(self._decisions.values())
            info |= {
                "strategy": self.strategy.name, "contexts": len(decisions),
                "labels": dict(Counter(decision.label for decision in decisions).most_common()),
                "tokens": sum(decision.tokens for decision in decisions),
                "seconds": round(sum(decision.seconds for decision in decisions), 3),
            }  # fmt: skip
        return {
            "model_num_parameters": self._size, "model_dtype": str(self.model.dtype), "model_source": base,
            "sigmix": {**info, "truncated": self.truncated},
        }  # fmt: skip

    # ------------------------------------------------------------------ text

    @contextlib.contextmanager
    def _processor_as_tokenizer(self) -> Iterator[None]:
        """A vision-language model's chat template is its processor's; the harness reads the tokenizer's."""
        tokenizer = self.tokenizer
        self.tokenizer = processor_of(tokenizer) or tokenizer
        try:
            yield
        finally:
            self.tokenizer = tokenizer

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template, which the harness reads before the first request.

        Raises:
            ConfigError: there is none, or none of that name.
        """
        if chat_template and not has_template(self.tokenizer):
            raise ConfigError(
                f"{self.model.sigmix_base['name']} has no chat template", remedy="leave --apply_chat_template out"
            )
        try:
            with self._processor_as_tokenizer():
                return super().chat_template(chat_template)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat as text and remember its last user turn for the strategy.

        Raises:
            ConfigError: a turn with an image placeholder of a vision-language model.
            PromptError: the template rejects the turns.
        """
        processor, turns = processor_of(self.tokenizer), chat_history
        if processor is not None:
            no_marks(processor, *(turn["content"] for turn in chat_history))
            turns = in_parts(chat_history)
        try:
            with self._processor_as_tokenizer():  # the harness's own method drops a system turn that is rejected
                text = self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt, **self.chat_template_args,
                )  # fmt: skip
        except Exception as error:  # templates raise arbitrary errors
            raise template_error(error, chat_history) from error
        if user_turns := [turn["content"] for turn in chat_history if turn["role"] == "user"]:
            self._user_turns[text] = user_turns[-1]
        return text

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        """Return token ids. Raises as `apply_chat_template`."""
        if (processor := processor_of(self.tokenizer)) is not None:
            no_marks(processor, string)
        return super().tok_encode(string, *args, **options)

    # ------------------------------------------------------------------ likelihoods

    @property
    def prefix_token_id(self) -> int:
        """Token that stands for an empty context.

        Raises:
            ConfigError: the tokenizer has neither a start nor an end token.
        """
        token = super().prefix_token_id
        if token is None:
            raise ConfigError(
                f"the tokenizer of {self.model.sigmix_base['name']} has no start and no end token",
                remedy="give one with --model_args prefix_token_id=N",
            )
        return token

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return token ids: a context of blanks becomes the prefix token, and a continuation that merges into the
        context's last token is encoded by itself."""
        context_ids, ids = super()._encode_pair(context, continuation)
        if continuation and not ids:
            ids = self.tok_encode(continuation, add_special_tokens=False)
        return context_ids or [self.prefix_token_id], ids

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of continuations; an empty one has (0.0, True)."""
        scored = [number for number, request in enumerate(requests) if request.args[1]]
        scores = [(0.0, True)] * len(requests)
        for number, score in zip(
            scored, super().loglikelihood([requests[number] for number in scored], disable_tqdm), strict=True
        ):
            scores[number] = score
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        mixes = self._mixes([context for (context, _), _, _ in requests])
        rows = [(mix, context, answer) for mix, (_, context, answer) in zip(mixes, requests, strict=True)]
        scores = self._score(rows, disable_tqdm)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return natural log-likelihoods of whole texts, in disjoint windows of the context length."""
        texts = [request.args[0] for request in requests]
        token_ids = [self.tok_encode(text) for text in texts]
        half = max(self.max_length // 2, 1)
        mixes = self._mixes([self.tok_decode(ids[:half]) for ids in token_ids])
        rows: list[Row] = []
        owners: list[int] = []
        for number, (ids, mix) in enumerate(zip(token_ids, mixes, strict=True)):
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for context, answer in map(make_disjoint_window, windows):
                rows.append((mix, context, answer))
                owners.append(number)
        totals = [0.0] * len(texts)
        for number, (logprob, _) in zip(owners, self._score(rows, disable_tqdm), strict=True):
            totals[number] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    @torch.no_grad()
    def _score(self, rows: Sequence[Row], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Return (sum of log-probabilities, whether greedy) of each row's continuation."""
        # continuations that differ in their last token only have the same input, which is run once
        inputs: dict[tuple[Mix, tuple[int, ...], int], list[int]] = defaultdict(list)
        for number, (mix, context, answer) in enumerate(rows):
            if len(answer) > self.max_length:
                raise ContextError(
                    f"an answer to score has {len(answer)} tokens, more than the context of {self.max_length}",
                    remedy="leave the task out, or give a larger max_length if the model has one",
                )
            if not answer:
                continue
            self.truncated += len(context) + len(answer) > self.max_length + 1
            ids = (context + answer)[-(self.max_length + 1) :]
            check_tokens(self.engine.model, ids, "a text to score", self.tokenizer)
            inputs[mix, tuple(ids[:-1]), len(answer)].append(number)
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(inputs, key=lambda one: -len(one[1]))
        for batch in self._batches(order, lambda one: len(one[1]), disable_tqdm):
            if self._vllm is not None:
                each = [(number, one) for one in batch for number in inputs[one]]
                found = self._vllm.token_scores(
                    [tokens[: len(tokens) + 1 - length] for _, (_, tokens, length) in each],
                    [rows[number][2] for number, _ in each], [mix for _, (mix, *_) in each],
                )  # fmt: skip
                for (number, _), tokens in zip(each, found, strict=True):
                    scores[number] = (sum(logprob for logprob, _ in tokens), all(greedy for _, greedy in tokens))
                continue
            padded, mask = left_pad([list(tokens) for _, tokens, _ in batch], self.engine.pad_id, self.device)
            ends = torch.tensor([padded.shape[1] - length + 1 for *_, length in batch])  # the last token is not read
            is_prompt = (torch.arange(padded.shape[1]) < ends[:, None]).to(self.device)
            logits = self.engine.logits(padded, mask, [mix for mix, *_ in batch], self.form, is_prompt)
            for index, one in enumerate(batch):
                for number in inputs[one]:
                    target = torch.tensor(rows[number][2], device=logits.device)
                    logprobs = logits[index, -len(target) :].float().log_softmax(-1)
                    logprob = float(logprobs.gather(1, target[:, None]).sum())
                    scores[number] = (logprob, bool(torch.equal(logprobs.argmax(-1), target)))
        return scores

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return completions, cut before the first stop string. Row i is seeded with torch's initial seed + i."""
        mixes = self._mixes([request.args[0] for request in requests])
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            options = generation_options(requests[numbers[0]].args[1], self.max_gen_toks)
            room = self.max_length - options["max_new_tokens"]
            if room < 1:
                raise ContextError(
                    f"{options['max_new_tokens']} new tokens leave no room in the context of {self.max_length}",
                    remedy="give a smaller --gen_kwargs max_gen_toks=N",
                )
            prompts = {n: self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in numbers}
            self.truncated += sum(len(ids) > room for ids in prompts.values())
            prompts = {number: ids[-room:] for number, ids in prompts.items()}
            lengths = {number: len(ids) + options["max_new_tokens"] for number, ids in prompts.items()}
            order = sorted(numbers, key=lengths.__getitem__, reverse=True)
            for batch in self._batches(order, lengths.__getitem__, disable_tqdm):
                generations = self.engine.generate(
                    [prompts[number] for number in batch], [mixes[number] for number in batch], form=self.form,
                    seeds=[torch.initial_seed() + number for number in batch], batch_size=len(batch), **options,
                )  # fmt: skip
                for number, generation in zip(batch, generations, strict=True):
                    texts[number] = generation.text
                    self.cache_hook.add_partial("generate_until", requests[number].args, generation.text)
        return texts

    def _batches(self, items: Sequence[T], length: Callable[[T], int], disable_tqdm: bool) -> Iterator[list[T]]:
        """Yield batches of items, sorted longest first, by rows or by tokens."""
        rest = iter(items)
        with tqdm(total=len(items), disable=disable_tqdm, desc="sigmix") as bar:
            for first in rest:
                rows = self.rows or max(1, min(self.max_batch_size or 64, TOKEN_BUDGET // max(length(first), 1)))
                batch = [first, *islice(rest, rows - 1)]
                yield batch
                bar.update(len(batch))


def generation_options(kwargs: Mapping[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """Return the engine's options.

    Args:
        kwargs: a request's generation arguments. max_gen_toks: default.

    Raises:
        ConfigError: an unsupported option.
    """
    with reraised(ConfigError, f"generation options {dict(kwargs)}", OPTIONS_REMEDY):
        given = {name: value for name, value in kwargs.items() if value is not None}
        rest = dict(normalize_gen_kwargs(given, max_gen_toks))
        stop_strings = [text for text in handle_stop_sequences(rest.pop("until", None), eos=None) if text]
        rest.pop("do_sample", None)  # normalize_gen_kwargs sets the temperature to 0 without it
        temperature = float(rest.pop("temperature", 0) or 0)
        max_new_tokens = int(rest.pop("max_gen_toks"))
        rest["top_p"] = rest.get("top_p") or 1  # greedy tasks have 0
        sampling = {name: kind(rest.pop(name)) for name, kind in SAMPLING.items() if name in rest}
        if max_new_tokens < 1 or not all(isinstance(text, str) for text in stop_strings):
            raise ValueError("max_gen_toks must be at least 1 and until a list of strings")
    for name, value in rest.items():
        if value not in NEUTRAL.get(name, ()):
            raise ConfigError(f"generation option {name}={value!r} is not supported", remedy=OPTIONS_REMEDY)
    return {
        "max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "temperature": temperature,
        "stop_strings": stop_strings, **sampling,
    }  # fmt: skip
