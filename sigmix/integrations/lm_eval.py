"""sigmix as a model of EleutherAI's evaluation harness (lm-eval): any of its tasks under any mix, or a mix per request.

    sigmix lm-eval --tasks arc_easy --mix larger:.5+where-is:.5      # registers this model and runs the harness
    lm_eval --model sigmix --model_args mix=auto --tasks arc_easy     # where the harness reads entry points

Requests, truncation and stop strings are treated as the harness's own ``hf`` model treats them, so the base gets the
same numbers; forward passes and answers are the engine's, so rows of one batch may have a mix each. Log-softmax is in
float32 always (``hf`` does so with softmax_dtype=float32).

With ``mix=auto`` a strategy decides once for each distinct request: the last user turn where the harness applied the
chat template, else the harness's whole context, few-shot examples included. A request without context is its own
beginning where a text's likelihood is rolled over it (the first half of the context length), and else gets the base.

What it does not do: several processes, beam search, penalties on repetition, text after a thinking tag.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from sigmix.adapt.base import OTHER, Decision, Strategy
from sigmix.adapt.two_pass import AUTO, letter_of, open_strategy
from sigmix.engine import Engine
from sigmix.engine.prefix_cache import left_pad
from sigmix.engine.tokenization import context_length, has_template, in_parts, no_marks
from sigmix.errors import ConfigError, ContextError, UnknownNameError
from sigmix.experts.bank import Bank
from sigmix.experts.fingerprint import fingerprint
from sigmix.experts.mix import Mix, read_mix
from sigmix.experts.original_basis import check_basis, use_original_basis
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base
from sigmix.models.multimodal import processor_of
from sigmix.utils.io import check_writable, write_text


@register_model("sigmix")
class SigmixLM(HFLM):
    """A base under a mix, or under what a strategy decides, for the harness.

    Args:
        base, dtype, device, quantization: as in `load_base`. bank: folder of experts; None: the bundled bank.
        mix: "a:0.7+b:0.3", a name, "base", a ``.json`` file of a mix, or "auto".
        strategy: what "auto" decides by: A, B, D, or "auto" (the bank's probe, else its classifier, else A). Given
            without a mix it means ``mix=auto``.
        form: how several mixes share a batch, "factored" or "gain"; None: factored.
        decisions: JSONL file that is written with every distinct request and what was decided for it.
        basis: of a quantised base, "own", or "original" for experts made on the base unquantised.
        batch_size: rows; "auto": as many as have `BUDGET` tokens together, at most ``max_batch_size``.
        options: those of the harness's ``hf`` model that `PASSED` names.

    Raises:
        ConfigError, UnknownNameError, OutputError: an option that is not there or cannot work. Others: see
        `load_base`, `Engine.z` and the strategies.
    """

    tokenizer: Any
    made = 0
    """Models made so far in this process: before the first, whatever is wrong is wrong with what was asked."""

    def __init__(
        self,
        base: str = DEFAULT,
        mix: str | None = None,
        strategy: str | None = None,
        bank: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        form: str | None = None,
        decisions: str | None = None,
        batch_size: int | str = AUTO,
        max_batch_size: int = 64,
        quantization: str | None = None,
        basis: str = "own",
        **options: Any,
    ) -> None:
        for name in options:
            if name not in PASSED:
                raise UnknownNameError("model argument", name, [*OWN, *PASSED], remedy="see docs/lm-eval.md")
        mix = str(mix) if mix is not None else AUTO if strategy is not None else "base"
        if mix != AUTO and (strategy is not None or decisions is not None):
            raise ConfigError("strategy and decisions go with mix=auto only", remedy="leave the mix out, or give auto")
        if form not in (None, "factored", "gain"):
            raise ConfigError(f"form must be factored or gain, not {form!r}")
        check_basis(basis, quantization)
        letter_of(strategy or AUTO)
        self.rows = rows_of(batch_size)
        if decisions is not None:
            check_writable(decisions)
        experts = Bank(bank) if bank is not None else Bank.bundled() if mix != "base" else None
        chosen = None if mix == AUTO else read_mix(mix, experts)
        model, tokenizer = load_base(
            base, None if dtype == "auto" else dtype, device_of(device), quantization_config=quantization
        )
        if basis == "original":
            use_original_basis(model)
        if processor_of(tokenizer) is not None and options.get("max_length") is None:
            options["max_length"] = context_length(model)  # the harness looks past the config of the language model
        super().__init__(
            model, backend="causal", tokenizer=tokenizer, batch_size=self.rows or max_batch_size,
            max_batch_size=max_batch_size, enable_thinking=False, **options,
        )  # fmt: skip
        self.form, self._size = form, model.num_parameters()  # before the engine adds its z
        self.engine = Engine(model, tokenizer, experts)
        if chosen is not None:
            self.engine.z(chosen)  # an expert of another base is refused before the work
        opened = open_strategy(self.engine, strategy or AUTO) if chosen is None else None
        self.requests = Requests(chosen, opened, None if decisions is None else Path(decisions))
        self.truncated = 0
        self._turns: dict[str, str] = {}
        SigmixLM.made += 1

    # ------------------------------------------------------------------ what a request is

    @contextlib.contextmanager
    def _template(self) -> Iterator[None]:
        """The harness asks its tokenizer for the chat template; that of a vision-language model is the processor's."""
        own = self.tokenizer
        self.tokenizer = processor_of(own) or own
        try:
            yield
        finally:
            self.tokenizer = own

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, which the harness notes before the first request.

        Raises:
            ConfigError: there is none, or none of that name.
        """
        if chat_template and not has_template(self.tokenizer):
            raise ConfigError(
                f"{self.model.sigmix_base['name']} has no chat template", remedy="leave --apply_chat_template out"
            )
        try:
            with self._template():
                return super().chat_template(chat_template)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The harness's chat as text; its last user turn is what a strategy will be asked about.

        Raises:
            ConfigError: a turn that holds what stands for an image in a vision-language model's prompts.
        """
        processor, turns = processor_of(self.tokenizer), chat_history
        if processor is not None:
            no_marks(processor, *(turn["content"] for turn in chat_history))
            turns = in_parts(chat_history)
        with self._template():
            text = super().apply_chat_template(turns, add_generation_prompt)
        asked = [turn["content"] for turn in chat_history if turn["role"] == "user"]
        if asked:
            self._turns[text] = asked[-1]
        return text

    def tok_encode(self, string: str, *given: Any, **options: Any) -> list[int]:
        """Token ids of a text; see `apply_chat_template` for what is refused."""
        if (processor := processor_of(self.tokenizer)) is not None:
            no_marks(processor, string)
        return super().tok_encode(string, *given, **options)

    def _mixes(self, contexts: Sequence[str]) -> list[Mix]:
        return self.requests.mixes([self._turns.get(text, text) for text in contexts])

    # ------------------------------------------------------------------ likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **__: Any
    ) -> list[tuple[float, bool]]:
        mixes = self._mixes([context for (context, _), _, _ in requests])
        rows = [(mix, context, answer) for mix, (_, context, answer) in zip(mixes, requests, strict=True)]
        found = self._score(rows, disable_tqdm)
        for (texts, _, _), told in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, told)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Natural log-likelihood of whole texts, in windows of the context length that do not overlap."""
        texts = [request.args[0] for request in requests]
        every = [self.tok_encode(text) for text in texts]
        beginning = max(self.max_length // 2, 1)
        mixes = self.requests.mixes([self.tok_decode(tokens[:beginning]) for tokens in every])
        rows: list[tuple[Mix, list[int], list[int]]] = []
        owners: list[int] = []
        for number, (tokens, mix) in enumerate(zip(every, mixes, strict=True)):
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
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
    def _score(self, rows: Sequence[tuple[Mix, list[int], list[int]]], quiet: bool) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy) of answers after contexts, both token ids, under mixes."""
        # answers that differ in their last token only have the same input, which is run once
        wanted: dict[tuple[Mix, tuple[int, ...]], list[int]] = defaultdict(list)
        for number, (mix, context, answer) in enumerate(rows):
            if len(answer) > self.max_length:
                raise ContextError(
                    f"an answer to score has {len(answer)} tokens, more than the context of {self.max_length}",
                    remedy="leave the task out, or give a larger max_length if the model has one",
                )
            self.truncated += len(context) + len(answer) > self.max_length + 1
            wanted[mix, tuple((context + answer)[-(self.max_length + 1) :][:-1])].append(number)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for part in self._batches(sorted(wanted, key=lambda one: -len(one[1])), lambda one: len(one[1]), quiet):
            ids, mask = left_pad([list(one[1]) for one in part], self.engine.pad_id, self.device)
            logits = self.engine.logits(ids, mask, [mix for mix, _ in part], self.form)
            for place, one in enumerate(part):
                for number in wanted[one]:
                    right = torch.tensor(rows[number][2], device=logits.device)
                    own = logits[place, -len(right) :].float().log_softmax(-1)
                    logprob = float(own.gather(1, right[:, None]).sum())
                    found[number] = (logprob, bool(torch.equal(own.argmax(-1), right)))
        return found

    # ------------------------------------------------------------------ answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut before its first stop string. A row's random stream is of its number and torch's seed."""
        mixes = self._mixes([request.args[0] for request in requests])
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(number)
        texts = [""] * len(requests)
        for numbers in alike.values():
            options, stop, special = generation(requests[numbers[0]].args[1], self.max_gen_toks, self.tokenizer)
            room = self.max_length - options["max_new_tokens"]
            if room < 1:
                raise ContextError(
                    f"{options['max_new_tokens']} tokens to answer leave no room in the context of {self.max_length}",
                    remedy="give a smaller --gen_kwargs max_gen_toks=N",
                )
            ids = {n: self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in numbers}
            self.truncated += sum(len(row) > room for row in ids.values())
            ids = {number: row[-room:] for number, row in ids.items()}
            sizes = {number: len(row) + options["max_new_tokens"] for number, row in ids.items()}
            order = sorted(numbers, key=sizes.__getitem__, reverse=True)
            ends, self.engine.ends = self.engine.ends, [*self.engine.ends, *special]
            try:
                for part in self._batches(order, sizes.__getitem__, disable_tqdm):
                    seeds = [torch.initial_seed() + number for number in part]
                    answers = self.engine.generate(
                        [ids[number] for number in part], [mixes[number] for number in part], seeds=seeds,
                        stop_strings=stop, form=self.form, batch_size=len(part), **options,
                    )  # fmt: skip
                    for number, answer in zip(part, answers, strict=True):
                        texts[number] = answer.text
                        self.cache_hook.add_partial("generate_until", requests[number].args, answer.text)
            finally:
                self.engine.ends = ends
        return texts

    def _batches(self, items: Sequence[Any], length: Any, quiet: bool) -> Iterator[list[Any]]:
        """Items, the longest first, by rows or by tokens."""
        rest = iter(items)
        with tqdm(total=len(items), disable=quiet, desc="sigmix") as bar:
            for first in rest:
                rows = self.rows or max(1, min(self.max_batch_size or 64, BUDGET // max(length(first), 1)))
                part = [first, *islice(rest, rows - 1)]
                yield part
                bar.update(len(part))

    def get_model_info(self) -> dict[str, Any]:
        """For the results file: the base, its fingerprint, and which mixes answered how many requests."""
        base = self.model.sigmix_base
        told = {"base": base["name"], "fingerprint": fingerprint(self.model), **self.requests.summary()}
        return {
            "model_num_parameters": self._size,
            "model_dtype": str(self.model.dtype),
            "model_source": base["name"],
            "sigmix": {**told, "truncated": self.truncated},
        }


# --- The harness's options, of the model and of generation, as the engine's; what it does not have is refused.


PASSED = ("max_length", "truncation", "add_bos_token", "prefix_token_id", "chat_template_args")
"""Options of the harness's ``hf`` model that mean the same here."""


OWN = ("base", "mix", "strategy", "bank", "dtype", "device", "form", "decisions", "batch_size", "max_batch_size",
       "quantization", "basis")  # fmt: skip


BUDGET = 8192
"""Tokens in a batch, padding included, with batch_size "auto"."""


NOTHING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None), "num_return_sequences": (1, None), "repetition_penalty": (1, 1.0, None),
    "length_penalty": (1, 1.0, None), "use_cache": (True, None), "top_k": (0, None), "min_p": (0, 0.0, None),
}  # fmt: skip
"""Generation options that the engine does not have, with the values that ask for nothing."""


def generation(given: Mapping[str, Any], most: int, tokenizer: Any) -> tuple[dict[str, Any], list[str], list[int]]:
    """The engine's options, stop strings, and stop tokens (special ones, which no decoded text shows).

    Args:
        given: a request's generation arguments. most: tokens of an answer where they do not say.

    Raises:
        ConfigError: an option that the engine does not have.
    """
    wanted = dict(normalize_gen_kwargs(dict(given), most))
    stop = [mark for mark in handle_stop_sequences(wanted.pop("until", None), eos=None) if mark]
    wanted.pop("do_sample", None)  # without it the temperature is 0 by now
    temperature = float(wanted.pop("temperature", 0) or 0)
    options = {
        "max_new_tokens": int(wanted.pop("max_gen_toks")), "do_sample": temperature > 0, "temperature": temperature,
        "top_p": float(wanted.pop("top_p", 1) or 1),
    }  # fmt: skip
    if not options["do_sample"]:
        wanted.pop("top_k", None)  # of no effect on greedy answers
    for name, value in wanted.items():
        if value not in NOTHING.get(name, ()):
            raise ConfigError(
                f"generation option {name}={value!r} is not supported",
                remedy="supported are until, max_gen_toks, do_sample, temperature and top_p",
            )
    special = [mark for mark in stop if mark in tokenizer.all_special_tokens]
    ids = [int(tokenizer.convert_tokens_to_ids(mark)) for mark in special]
    return options, [mark for mark in stop if mark not in special], ids


def device_of(name: str | None) -> str | None:
    """The harness says cuda:0 where nobody said anything."""
    if name is None or torch.cuda.is_available() or not name.startswith("cuda"):
        return name
    if name == "cuda:0":
        return None
    raise ConfigError(f"there is no CUDA device for --device {name}", remedy="leave it out")


def rows_of(batch_size: int | str) -> int | None:
    """Rows of a batch; None by tokens."""
    if str(batch_size).startswith(AUTO):
        return None
    try:
        rows = int(batch_size)
    except ValueError:
        rows = 0
    if rows < 1:
        raise ConfigError(f"batch_size must be auto or a number of at least 1, not {batch_size!r}")
    return rows


# --- Which mix answers which request of an evaluation, and the account of it.


class Requests:
    """Which mix answers a request: one for all, or what a strategy decides, once for each distinct request."""

    def __init__(self, mix: Mix | None, strategy: Strategy | None, file: Path | None = None) -> None:
        self.mix, self.strategy, self.file = mix, strategy, file
        self.decisions: dict[str, Decision] = {}
        self.count: Counter[str] = Counter()

    def mixes(self, asked: Sequence[str]) -> list[Mix]:
        """A mix for each request, in order; "" is no request, and gets the base."""
        if self.strategy is None:
            assert self.mix is not None
            found = [self.mix] * len(asked)
        else:
            fresh = [text for text in dict.fromkeys(asked) if text not in self.decisions]
            some = [text for text in fresh if text.strip()]
            self.decisions |= dict(zip(some, self.strategy.decide(some) if some else [], strict=True))
            none = Decision(Mix.base(), OTHER, "there is no context to decide by")
            self.decisions |= {text: none for text in fresh if text not in self.decisions}
            found = [self.decisions[text].mix for text in asked]
            if self.file is not None:
                lines = [{"request": text, **one.to_json()} for text, one in self.decisions.items()]
                write_text(self.file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self.count.update(mix.id for mix in found)
        return found

    def summary(self) -> dict[str, Any]:
        """JSON values: mixes with how many requests each answered; with a strategy also what it decided and cost.

        ``mixes`` counts every request of the harness (each choice of a question is one); ``contexts`` and ``labels``
        count what was decided, once for each distinct request. ``tokens`` and ``seconds`` are pass one's, in sum.
        """
        mix = AUTO if self.mix is None else self.mix.id
        told: dict[str, Any] = {"mix": mix, "mixes": dict(self.count.most_common())}
        if self.strategy is not None:
            made = list(self.decisions.values())
            told |= {
                "strategy": self.strategy.name, "contexts": len(made),
                "labels": dict(Counter(one.label for one in made).most_common()),
                "tokens": sum(one.tokens for one in made), "seconds": round(sum(one.seconds for one in made), 3),
            }  # fmt: skip
        return told
