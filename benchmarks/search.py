"""``python -m benchmarks search``: one CEM iteration in mixed batches against swapping weights for every candidate.

32 candidates on 10 examples of the bank's first task, by experts that act on the prompt alone (copies of the bank's),
and by experts at all positions (`_all`). `FewShotSearch.evaluate` scores all 320 rows in mixed batches; the swap
composes and loads the weights of one candidate after another, as the public reference does, and answers the 10 examples
under each. The run fails if the log-likelihoods of a candidate differ by more than the dtype explains.
Answers end at the end token, unlike in the other benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.harness import Aim, device, interleaved, ratio, report
from benchmarks.requests import acting_on, bundled_engine, mixtures, tasks
from sigmix.adapt.base import skills
from sigmix.adapt.few_shot import Example, FewShotSearch
from sigmix.engine.tokenization import eos_token_ids
from sigmix.errors import SigmixError
from sigmix.models.default import DEFAULT

AIMS = {"speedup_vs_swap": Aim(">=", 4.0)}

TOLERANCE = {"bfloat16": 0.1, "float16": 0.02, "float32": 1e-3, "float64": 1e-6}
"""Largest difference of a candidate's mean log-likelihood (nats per token) between the two ways."""


def run(
    repeats: int | None = None, dtype: str | None = None, base: str = DEFAULT, population: int = 32, shots: int = 10,
    bank: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds that count, default 3. dtype, base, bank: what is run. population, shots: of the iteration.
    """
    where = device()
    engine = bundled_engine(base, dtype, bank, keep_merged=0, compile=True)
    engine.eos_token_ids = eos_token_ids(engine.model, engine.tokenizer)
    kind = where["dtype"] = str(engine.model.dtype).removeprefix("torch.")
    names = skills(engine.bank)
    task = next(iter(tasks(engine.bank).values()))
    examples = [Example(one.prompt, one.gold, one) for one in task.samples("train", shots)]
    banks = {end: acting_on(positions, engine.bank) for end, positions in (("", "prompt"), ("_all", "all"))}
    values: dict[str, list[tuple[float, float]]] = {}

    def searcher(end: str) -> FewShotSearch:
        engine.bank = banks[end]
        return FewShotSearch(
            engine, examples, lambda example, reply: task.score(example.extra, reply).value or 0.0,
            max_new_tokens=task.max_new_tokens,
        )  # fmt: skip

    def mixed(end: str) -> Callable[[int], None]:
        def run(number: int) -> None:
            values["mixed"] = searcher(end).evaluate(mixtures(names, population, number))

        return run

    def swapped(end: str) -> Callable[[int], None]:
        def run(number: int) -> None:
            one = searcher(end)
            values["swap"] = [one.evaluate([mix])[0] for mix in mixtures(names, population, number)]
            differences.append(max(abs(a[1] - b[1]) for a, b in zip(values["mixed"], values["swap"], strict=True)))
            accuracies.append(max(abs(a[0] - b[0]) for a, b in zip(values["mixed"], values["swap"], strict=True)))

        return run

    differences: list[float] = []
    accuracies: list[float] = []
    seconds = interleaved(
        {f"{name}{end}": way(end) for end in banks for name, way in (("mixed", mixed), ("swap", swapped))}, repeats or 3
    )
    if max(differences) > TOLERANCE[kind]:
        raise SigmixError(
            f"the two ways disagree: log-likelihoods differ by up to {max(differences):.3g} nats per token in {kind}"
        )
    raw = {
        "base": base, "task": task.name, "population": population, "shots": shots, "seconds": seconds,
        "largest_loglik_difference": max(differences), "largest_accuracy_difference": max(accuracies),
    }  # fmt: skip
    ratios = {f"speedup_vs_swap{end}": ratio(seconds[f"swap{end}"], seconds[f"mixed{end}"]) for end in banks}
    return report("search", where, ratios, AIMS, raw)
