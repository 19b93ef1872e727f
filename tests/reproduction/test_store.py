"""Items are stored whole, read back as they were, and tables follow from them alone."""

from __future__ import annotations

import pytest
from helpers_reproduce import put, result, samples, swept

from reproduction.names import BEYOND, chosen_lr, kl_of, mix_name, next_rate, run_name, single
from reproduction.page import page, write_page
from reproduction.report import Report
from reproduction.scale import SCALES
from reproduction.stages.larger import rate_for
from reproduction.store import LONGEST, Store, safe
from sigmix.errors import ConfigError

LAPTOP = SCALES["laptop"]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "out")


def test_a_cell_comes_back_as_it_was(store):
    put(store, "addition", "svf@1:a/b", [True, False, True], kl=0.5)
    cell = store.cell("addition", "svf@1:a/b")
    assert cell.result == result("addition", [True, False, True])
    assert cell.facts["kl"] == 0.5
    assert store.has("addition", "svf@1:a/b")
    assert not store.has("addition", "svf@1:a-b")
    assert store.cell("addition", "other") is None
    assert store.about("addition")["best_constant"]["accuracy"] == 0.1
    assert store.about("larger") == {}


def test_the_same_items_give_the_same_bytes(tmp_path):
    files = []
    for name in "ab":
        put(Store(tmp_path / name), "addition", "base", [True, False])
        files.append((tmp_path / name / "cells" / "addition" / "base.jsonl").read_bytes())
    assert files[0] == files[1]


def test_damaged_files_are_named(store):
    put(store, "addition", "base", [True, False])
    path = store.folder / "cells" / "addition" / "base.jsonl"
    whole = path.read_bytes()
    for broken in (whole[:-9], b"", b"no json", b"\xff"):
        path.write_bytes(broken)
        with pytest.raises(ConfigError, match=r"base\.jsonl"):
            store.cell("addition", "base")
    path.write_bytes(whole)
    (store.folder / "tasks" / "addition.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"addition\.jsonl"):
        Store(store.folder).cell("addition", "base")
    (store.folder / "facts").mkdir()
    (store.folder / "facts" / "spectra.json").write_text("{")
    with pytest.raises(ConfigError, match=r"spectra\.json"):
        store.fact("spectra")


def test_names_never_meet():
    names = ["a/b", "a-b", "a:b", "x" * 300, "x" * 299 + "y", "x" * LONGEST]
    assert len({safe(name) for name in names}) == len(names)
    assert all(len(safe(name)) < 200 and "/" not in safe(name) for name in names)
    assert run_name("svf-rl", 2e-3, "addition", 1) != run_name("svf-rl", 2e-3, "addition", 1, ["larger"])
    assert mix_name("k", 0.1, {"a": 0.5, "b": 1.0}, 0) != mix_name("k", 0.1, {"a": 1.0, "b": 0.5}, 0)


def test_validation_chooses_the_learning_rate(store):
    assert chosen_lr(store, LAPTOP, "svf-rl") is None
    assert single(store, LAPTOP, "svf-rl", "addition", 0) is None
    swept(store, LAPTOP, "svf-rl", {1e-3: (0.7, 0.5), 2e-3: (0.8, 1.0), 6e-3: (0.8, 3.0)})
    swept(store, LAPTOP, "svf-rl", {1e-2: (0.9, 1.0)}, seed=1)
    swept(store, LAPTOP, "svf-rl", {1e-2: (0.9, 1.0)}, task="addition")
    swept(store, LAPTOP, "svf-rl", {1e-2: (0.9, 1.0)}, after=["addition"])
    assert chosen_lr(store, LAPTOP, "svf-rl") == 2e-3  # the lowest of equal ones, and only of the sweep
    assert chosen_lr(store, LAPTOP, "svf-mlp-rl") == 2e-3
    assert single(store, LAPTOP, "svf-rl", "addition", 1) == "svf-rl@0.002.addition.s1"


def test_a_sweep_is_bounded():
    begun, tried = (1.0, 3.0, 9.0), {}
    while (rate := next_rate(tried, begun)) is not None:
        tried[rate] = rate  # always better
    assert list(tried) == [1.0, 3.0, 9.0, 27.0, 81.0]
    assert len(tried) == len(begun) + BEYOND
    assert next_rate({1.0: 0.5, 3.0: 0.9, 9.0: 0.5}, begun) is None
    assert next_rate({1.0: 0.5, 3.0: 0.5, 9.0: 0.5}, begun) == 0.33  # the lowest of equal ones is at an end
    assert next_rate({3.0: 0.5}, (3.0,)) is None


def test_a_sweep_over_two_tasks_takes_the_best_mean(store):
    scale = SCALES["positions"]
    swept(store, scale, "svf-rl", {2e-3: (0.7, 1.0), 6e-3: (0.8, 1.0)}, task="larger")
    assert chosen_lr(store, scale, "svf-rl") is None
    swept(store, scale, "svf-rl", {6e-3: (0.5, 1.0)}, task="addition")
    assert chosen_lr(store, scale, "svf-rl") == 6e-3  # the only rate with both
    swept(store, scale, "svf-rl", {2e-3: (0.7, 1.0)}, task="addition")
    assert chosen_lr(store, scale, "svf-rl") == 2e-3


def test_the_rate_at_equal_kl(store):
    swept(store, LAPTOP, "svf-rl", {2e-3: (0.8, 1.0)})
    assert chosen_lr(store, LAPTOP, "lora-kl-rl") is None
    swept(store, LAPTOP, "lora-rl", {1e-4: (0.5, 0.2), 3e-4: (0.7, 0.8), 1e-3: (0.9, 4.0)})
    assert chosen_lr(store, LAPTOP, "lora-rl") == 1e-3
    assert chosen_lr(store, LAPTOP, "lora-kl-rl") == 3e-4
    assert kl_of({"best": {"step": 0}, "history": [{"kind": "step", "step": 0, "kl": 3.0}]}) == 0.0


def test_without_a_run_the_tables_say_so(store):
    text = page(store, LAPTOP)
    assert "not run" in text
    assert "addition" in text
    assert page(Store(store.folder / "gpu"), SCALES["gpu"]).count("not run") > 50


def test_tables_follow_from_the_items(store):
    before = page(store, LAPTOP)
    swept(store, LAPTOP, "svf-rl", {2e-3: (0.8, 1.0)})
    put(store, "addition", "base", [False] * 10)
    put(store, "addition", "svf-rl@0.002.addition.s0", [True] * 7 + [False] * 3)
    report = Report(store, LAPTOP)
    names = report.names("svf-rl", "addition")
    assert report.over("addition", names) == "70.0 [39.7, 89.2] (1 seed)"
    assert report.against("addition", names[0], "base").startswith("+70.0 [")
    put(store, "addition", "svf-rl@0.002.addition.s1", [True] * 5 + [False] * 5)
    names = report.names("svf-rl", "addition")
    assert report.over("addition", names).startswith("60.0 [")
    assert report.over("addition", names).endswith("(70.0, 50.0)")
    assert report.over_against("addition", names, ["svf-rl@0.002.addition.s1"]).startswith("+10.0 [")
    assert report.constant("addition") == "10.0"
    after = page(store, LAPTOP)
    assert before != after
    assert "60.0 [" in after


def test_an_item_that_could_not_be_judged_keeps_its_place(store):
    put(store, "addition", "one", [True, True])
    one = result("addition", [True, True])
    from dataclasses import replace

    store.write(replace(one, items=[one.items[0], replace(one.items[1], score=None)]), "two", {"n": 2})
    assert Report(store, LAPTOP).over_against("addition", ["one"], ["two"]).startswith("+50.0 [")


def test_the_page_is_written_with_its_plots(store, tmp_path):
    put(store, "addition", "base", [True, False])
    path = write_page(store, LAPTOP, tmp_path / "tables")
    assert path == tmp_path / "tables" / "laptop.md"
    assert path.read_text(encoding="utf-8") == page(store, LAPTOP)
    assert (tmp_path / "tables" / "laptop-learning.png").exists()
    assert "(laptop-learning.png)" in page(store, LAPTOP)


def test_items_are_kept_once(store):
    store.write_items("addition", samples(3), {"seed": 0})
    store.write_items("addition", samples(5), {"seed": 1})
    assert store.about("addition")["seed"] == 0


@pytest.mark.parametrize(
    ("better_from", "expected"),
    [(2e-3, [2e-3]), (7e-4, [2e-3, 6e-4]), (1e-9, [2e-3, 6e-4, 1.8e-4])],
)
def test_where_training_gives_nothing_a_lower_rate_is_tried(store, better_from, expected):
    """...from the small model's rate downwards by the factor of its sweep, twice at most."""
    swept(store, LAPTOP, "svf-rl", {6e-4: (0.1, 0.1), 2e-3: (0.4, 0.2), 6e-3: (0.3, 0.5)})
    rates = []

    class OneLab:
        scale = LAPTOP
        store: Store

        def trained(self, kind, task, seed, rate):
            rates.append(rate)
            best = {"accuracy": 0.3, "step": 8 if rate <= better_from else 0}
            name = run_name(kind, rate, task, seed)
            self.store.write_run(name, {"name": name, "kind": kind, "task": task, "lr": rate, "best": best})
            return name, None

    lab = OneLab()
    lab.store = store
    assert LAPTOP.kinds["svf-rl"].lrs[:2] == (6e-4, 2e-3)
    assert rate_for(lab, "svf-rl") == expected[-1]
    assert rates == expected
