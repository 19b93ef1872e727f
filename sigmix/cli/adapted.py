"""`sigmix eval --strategy …` and `sigmix eval --dispatch`: what adaptation is worth, and how often it chooses right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sigmix.cli.opening import open_bank, open_engine
from sigmix.cli.shared import Ticker, accuracy, check_output, emit, note, paired, table, working
from sigmix.cli.strategies import LETTERS, open_strategy


def strategies(
    task: Any, letters: list[str], shots: int, n: int, split: str, seed: int, batch: int, out: Path | None, base: str,
    bank: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Accuracy of strategies on a task, on the same items as the base."""
    from sigmix.adapt import Example, FewShotSearch
    from sigmix.adapt.labels import skills
    from sigmix.errors import UnknownNameError
    from sigmix.evals.run import save
    from sigmix.evals.strategies import EACH, NAMES, ORACLE, run_strategies

    for letter in letters:
        if letter not in NAMES:
            raise UnknownNameError("strategy", letter, NAMES)
    task.score(task.samples(split, 1, seed=seed)[0], "")
    if out is not None:
        check_output(out, "summary.json")
    engine = open_engine(base, open_bank(bank))
    chosen = {}
    for letter in letters:
        if letter in LETTERS:
            chosen[letter] = open_strategy(engine, letter)
        elif letter == "C":
            given = [Example(one.prompt, one.gold, one, one.images) for one in task.samples("train", shots, seed=seed)]
            search = FewShotSearch(
                engine, given, lambda example, reply: task.score(example.extra, reply).value or 0.0,
                max_new_tokens=task.max_new_tokens, seed=seed, settings="light",
            )  # fmt: skip
            with working("searching a mixture"):
                search.fit()
            chosen[letter] = search
    alone = bool({EACH, ORACLE} & set(letters))
    runs = 1 + len(chosen) + (len(skills(engine.bank)) if alone else 0)
    with Ticker("base", n * runs) as ticker:
        figures, results = run_strategies(
            engine, task, chosen, each_expert=alone, split=split, n=n, seed=seed,  # type: ignore[arg-type]
            batch_size=batch, progress=lambda count, name: ticker.advance(count, name),
        )  # fmt: skip
    if "C" in chosen:
        figures["few_shot"] = {**chosen["C"].evidence(), "mix": chosen["C"].result.id}
    if out is not None:
        save(out, {**figures, "results": [{**one, "mix": one["strategy"]} for one in figures["results"]]}, results)
    if as_json:
        emit(figures, True, "")
        return
    rows = [
        [one["strategy"], one["n"], accuracy(one), *paired(one["paired"]),
         ", ".join(f"{mix} {count}" for mix, count in list(one["chosen"].items())[:3])]
        for one in figures["results"]
    ]  # fmt: skip
    columns = ["strategy", "n", "accuracy [95 %]", "difference [95 %]", "won/lost", "McNemar p", "mixes chosen"]
    table(f"{task.name}, {split} split, seed {seed}, base {figures['base']}", columns, rows)
    if figures["best_constant"]:
        note(f"best constant answer: {figures['best_constant']['accuracy']:.3f}")


def dispatch(
    letters: list[str], n: int, seed: int, split: str, out: Path | None, base: str, bank: Path | None,
    data_dir: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Confusion matrices of strategies over the bank's labels, and over domains that nobody trained for."""
    from sigmix.errors import UnknownNameError
    from sigmix.evals.dispatch import confusion, plot, requests, unseen_tasks
    from sigmix.evals.run import provenance
    from sigmix.files import write_json, write_text

    for letter in letters:
        if letter not in LETTERS:
            raise UnknownNameError("strategy for --dispatch", letter, LETTERS)
    if out is not None:
        check_output(out, "dispatch.json")
    experts = open_bank(bank)
    found = requests(experts, split, n, seed=seed, unseen=unseen_tasks(experts), data_dir=data_dir)  # type: ignore[arg-type]
    engine = open_engine(base, experts)
    figures: dict[str, Any] = {"split": split, "seed": seed, "base": base, "strategies": []}
    for letter in letters:
        strategy = open_strategy(engine, letter)
        with working(f"deciding with {strategy.name}"):
            one = confusion(strategy, found, [label.name for label in strategy.labels])
        items = one.pop("items")
        figures["strategies"].append(one)
        if out is not None:
            import json

            lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            write_text(out / f"dispatch-{letter}.jsonl", lines)
            plot(one, out / f"dispatch-{letter}.png")
    if out is not None:
        write_json(out / "dispatch.json", {**figures, **provenance()})
    if as_json:
        emit(figures, True, "")
        return
    for one in figures["strategies"]:
        rows = [[row["label"], row["n"], accuracy(row), *row["counts"]] for row in one["rows"]]
        title = f"{one['strategy']}: {accuracy(one)} of {one['n']}, {split} split"
        table(title, ["request is", "n", "right [95 %]", *one["labels"]], rows)
    if out is not None:
        note(f"matrices, items and summary: {out}")
