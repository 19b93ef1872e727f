"""``python -m benchmarks pass1``: the first pass of strategies A, B and D as a share of two-pass inference.

64 requests of the bank's tasks, answered with 32 tokens each in mixed batches. A strategy that the bank has no
statistics or classification expert for is left out. The prompt's prefix is cached, as in a server; the paper's first
pass takes 13 to 47 % (Table 3).
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Aim, device, interleaved, report, say
from benchmarks.requests import bundled_engine, prompts
from sigmix.adapt import ClassifierDispatch, PromptDispatch, RouterDispatch, TwoPass
from sigmix.errors import InputError, SigmixError
from sigmix.models.default import DEFAULT

AIMS = {"share_A": Aim("<=", 0.10), "share_B": Aim("<=", 0.10), "share_D": Aim("<=", 0.03)}

STRATEGIES = {"A": PromptDispatch, "B": ClassifierDispatch, "D": RouterDispatch}


def run(
    repeats: int | None = None, dtype: str | None = None, base: str = DEFAULT, rows: int = 64, new_tokens: int = 32,
    bank: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds that count, default 3. dtype, base, bank: what is run. rows, new_tokens: requests, answers.

    Raises:
        SigmixError: the bank has nothing for any strategy.
    """
    where = device()
    engine = bundled_engine(base, dtype, bank)
    where["dtype"] = str(engine.model.dtype).removeprefix("torch.")
    texts = prompts(engine, rows)
    runners, left_out = {}, {}
    for letter, kind in STRATEGIES.items():
        ends, engine.eos_token_ids = engine.eos_token_ids, [engine.tokenizer.eos_token_id]  # labels end with it
        try:
            runners[letter] = TwoPass(engine, kind(engine))
        except InputError as error:
            left_out[letter] = str(error)
            say(f"{letter} is left out: {error}")
        engine.eos_token_ids = ends
    if not runners:
        raise SigmixError("the bank has nothing for any strategy")
    times: dict[str, list[tuple[float, float]]] = {letter: [] for letter in runners}

    def contestant(letter: str) -> Any:
        def decide_and_answer(_: int) -> float:
            runners[letter].generate(texts, max_new_tokens=new_tokens, batch_size=rows)
            times[letter].append(runners[letter].seconds)
            return sum(runners[letter].seconds)

        return decide_and_answer

    repeats = repeats or 3
    seconds = interleaved({letter: contestant(letter) for letter in runners}, repeats)
    shares = {
        f"share_{letter}": [first / (first + second) for first, second in taken[-repeats:]]
        for letter, taken in times.items()
    }
    raw = {
        "base": base, "requests": rows, "new_tokens": new_tokens, "left_out": left_out,
        "pass1_pass2_seconds": {letter: taken[-repeats:] for letter, taken in times.items()}, "seconds": seconds,
    }  # fmt: skip
    aims = {name: aim for name, aim in AIMS.items() if name in shares}
    return report("pass1", where, shares, aims, raw)
