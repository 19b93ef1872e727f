"""``python -m benchmarks mixed``: a batch with a different mixture in every row.

32 requests of the bank's tasks under 32 mixtures of all its experts, answered with 24 tokens each, prefill included.
The experts act on the prompt alone (`positions="prompt"`: copies of the bank's, since z does not change speed), and
once more at all positions. Contestants, on the same requests in the same dtype:

    exact      sigmix, all rows in one batch, prompts in the factored form
    new        the same under mixtures without a cached prefix
    base       the same batch on the base model, in the same engine
    swap       one request after another: compose and load its weights, answer, restore the base model
    lora_8, lora_32    PEFT's mixed-batch LoRA of rank 16 on the same layers with 8 or 32 distinct adapters

`decode` is the time of the decoding steps alone. Names with `_all` are of the experts at all positions.

First every row of ``exact`` is compared with the same request alone under merged weights, by the logits of its last
prompt token, in float32 and in the timed dtype. The common prefix (the chat template's system turn) is cached for
``exact`` and for ``base``. Ratios are in tokens per second, sigmix over the peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.harness import Aim, device, interleaved, ratio, report, say
from benchmarks.requests import acting_on, bundled_engine, mixtures, prompts
from sigmix.adapt.base import skills
from sigmix.engine import Engine
from sigmix.engine.continuous_batching import ContinuousBatch
from sigmix.engine.generation import SamplingParams, SequenceState
from sigmix.engine.prefix_cache import left_pad
from sigmix.engine.scoring import next_logits
from sigmix.errors import SigmixError
from sigmix.experts.mix import Mix
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base

AIMS = {
    "exact_vs_base": Aim(">=", 0.95), "new_vs_base": Aim(">=", 0.85), "decode_exact_vs_base": Aim(">=", 0.99),
    "vs_swap": Aim(">=", 8.0), "vs_peft_lora_8": Aim(">=", 2.5),
}  # fmt: skip

ADAPTERS = (8, 32)

LEAST_COSINE = {"bfloat16": 0.997, "float16": 0.9999, "float32": 0.999999, "float64": 0.999999}
"""Of the logits of a row in the mixed batch and alone. In bfloat16 either is 0.9993 from float32 at worst (measured on
the default base), so their angles may add up to 0.997."""


def run(
    repeats: int | None = None, dtype: str | None = None, base: str = DEFAULT, rows: int = 32, new_tokens: int = 24,
    bank: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds that count, default 3. dtype, base, bank: what is run. rows, new_tokens: requests, answers.

    Raises:
        SigmixError: a row of the mixed batch is not the same request alone.
    """
    where = device()
    engine = bundled_engine(base, dtype, bank, keep_merged=0, compile=True)
    kind = where["dtype"] = str(engine.model.dtype).removeprefix("torch.")
    texts = [engine.encode(text) for text in prompts(engine, rows)]
    engine.bank = everywhere = acting_on("all", engine.bank)
    mixes_all = mixtures(skills(everywhere), rows)

    on_prompts = {f"{name}-prompt": one for name, one in acting_on("prompt", everywhere).items()}
    engine.bank = {**everywhere, **on_prompts}
    names = {"": skills(on_prompts), "_all": skills(everywhere)}
    mixes = mixtures(names[""], rows)
    cosines = {kind: _agreement(engine, texts, mixes)}
    if kind in ("bfloat16", "float16"):
        # the very weights that the experts were made on, in a type that holds them exactly
        wide = Engine(load_base(base, dtype)[0].float(), engine.tokenizer, engine.bank, keep_merged=0)
        cosines["float32"] = _agreement(wide, texts, mixes)

    def answer(mix: list[Mix] | None = None, form: str | None = None) -> Callable[[int], None]:
        def run(_: int) -> None:
            engine.generate(texts, mix, max_new_tokens=new_tokens, form=form)

        return run

    def new(experts: list[str]) -> Callable[[int], None]:
        return lambda number: answer(mixtures(experts, rows, seed=1000 + number))(number)

    def decode(mix: list[Mix]) -> Callable[[int], float]:
        def run(_: int) -> float:
            pairs = zip(texts, mix, strict=True)
            with ContinuousBatch(engine, chunked=False) as batch:
                batch.add([SequenceState(ids, SamplingParams(new_tokens), own) for ids, own in pairs])
                batch.step()  # reads the prompts
                started = time.perf_counter()
                while batch:
                    batch.step()
            return time.perf_counter() - started

        return run

    def swap(_: int) -> None:
        for text, mix in zip(texts, mixes, strict=True):
            engine.generate([text], mix, max_new_tokens=new_tokens, form="merged")

    contestants: dict[str, Callable[[int], float | None]] = {
        "base": answer(), "exact": answer(mixes), "exact_all": answer(mixes_all),
        "new": new(names[""]), "new_all": new(names["_all"]),
        "decode_base": decode([Mix.base()] * rows), "decode_exact": decode(mixes),
        "decode_exact_all": decode(mixes_all), "swap": swap,
    }  # fmt: skip
    for count in ADAPTERS:
        contestants[f"lora_{count}"] = _lora(base, dtype, engine.pad_id, texts, count, new_tokens)
    seconds = interleaved(contestants, repeats or 3)
    ratios = {
        f"{name}_vs_base": ratio(seconds["base"], seconds[name]) for name in ("exact", "new", "exact_all", "new_all")
    }
    for name in ("decode_exact", "decode_exact_all"):
        ratios[f"{name}_vs_base"] = ratio(seconds["decode_base"], seconds[name])
    ratios["vs_swap"] = ratio(seconds["swap"], seconds["exact"])
    ratios |= {f"vs_peft_lora_{count}": ratio(seconds[f"lora_{count}"], seconds["exact"]) for count in ADAPTERS}
    raw = {
        "base": base, "rows": rows, "new_tokens": new_tokens, "seconds": seconds, "least_cosine": cosines,
        "tokens_per_second": {name: [rows * new_tokens / one for one in taken] for name, taken in seconds.items()},
        "mixes": [mix.id for mix in mixes],
    }  # fmt: skip
    return report("mixed", where, ratios, AIMS, raw)


def _agreement(engine: Any, texts: list[list[int]], mixes: list[Any]) -> float:
    """Least cosine of a row's logits in the mixed batch and alone."""
    together = next_logits(engine, texts, mixes)
    alone = torch.cat([next_logits(engine, [text], mix) for text, mix in zip(texts, mixes, strict=True)])
    cosine = float(torch.cosine_similarity(together.double(), alone.double(), dim=1).min())
    kind = str(engine.model.dtype).removeprefix("torch.")
    say(f"least cosine of a row's logits, mixed and alone: {cosine:.7f} in {kind}")
    if not cosine >= LEAST_COSINE[kind]:
        raise SigmixError(f"a row of the mixed batch is not the same request alone (cosine {cosine:.6f} in {kind})")
    return cosine


def _lora(
    base: str, dtype: str | None, pad_id: int, rows: list[list[int]], count: int, new_tokens: int
) -> Callable[[int], None]:
    """PEFT's mixed batch on a base of its own; adapters are random and not zero."""
    model, _ = load_base(base, dtype)
    model.generation_config.eos_token_id = None
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    names = [f"adapter{number}" for number in range(count)]
    wrapped = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    wrapped.eval()
    ids, mask = left_pad(rows, pad_id, model.device)
    chosen = [names[number % count] for number in range(len(rows))]

    def answer(_: int) -> None:
        with torch.no_grad():
            made = wrapped.generate(
                input_ids=ids, attention_mask=mask.long(), adapter_names=chosen, do_sample=False,
                max_new_tokens=new_tokens, pad_token_id=pad_id,
            )  # fmt: skip
        if made.shape[1] != ids.shape[1] + new_tokens:
            raise SigmixError("PEFT's answers are shorter than ours")

    return answer
