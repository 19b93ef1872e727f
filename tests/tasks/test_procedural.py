"""reasoning-gym tasks: contract, options, rules in front of lax and dangerous scorers."""

import json

import pytest

pytest.importorskip("reasoning_gym")

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.evals.statistics import best_constant
from sigmix.tasks import get_task, task_names
from sigmix.tasks.procedural import REFUSED, RULES, names, rational, symbolic

CHECKED = """
chain_sum gsm_symbolic game_of_life_halting kakurasu knights_knaves fraction_simplification letter_jumble survo
time_intervals polynomial_equations spell_backward prime_factorization propositional_logic graph_color quantum_lock
string_insertion spiral_matrix simple_integration polynomial_multiplication basic_arithmetic power_function
""".split()


@pytest.mark.parametrize("name", [*CHECKED, pytest.param("puzzle24", marks=pytest.mark.slow)])
def test_contract(name):
    report = get_task(f"rg:{name}").validate(n=6)
    assert report.ok, report.problems[:3]
    assert report.counts["gold_right"] == report.counts["samples"] == 6


def test_every_offered_data_set_is_named():
    assert len(names()) >= 90
    assert {f"rg:{name}" for name in names()} <= set(task_names())
    assert not set(REFUSED) & set(names())
    for name in REFUSED:
        with pytest.raises(ConfigError, match=name):
            get_task(f"rg:{name}")


def test_options_reach_the_generator_and_the_name():
    task = get_task("rg:chain_sum?min_terms=2&max_terms=2&max_digits=1&min_digits=1", suffix="Number only.")
    assert task.name == "rg:chain_sum?max_digits=1&max_terms=2&min_digits=1&min_terms=2&suffix=Number only."
    samples = task.samples("train", 10)
    assert all(sample.prompt.endswith("\nNumber only.") for sample in samples)
    assert all(len(sample.meta["entry"]["metadata"]["expression"].split()) == 3 for sample in samples)
    assert get_task(task.name).samples("train", 10) == samples


def test_suffix_does_not_move_an_item_to_another_split():
    options = "max_terms=2&max_digits=1"
    bare = get_task(f"rg:chain_sum?{options}").samples("test", 15)
    dressed = get_task(f"rg:chain_sum?{options}&suffix=Go.").samples("test", 15)
    assert [sample.prompt + "\nGo." for sample in bare] == [sample.prompt for sample in dressed]


def test_seeds_give_different_items():
    task = get_task("rg:chain_sum")
    one, two = ({sample.id for sample in task.samples("train", 50, seed=seed)} for seed in (0, 1))
    assert len(one & two) < 5


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("rg:chain_sum?max_term=2", "max_terms"), ("rg:chain_sum?min_terms=5&max_terms=2",
        "max_terms must be"),
        ("rg:chain_sum?max_terms=many", "max_terms"), ("rg:chain_sum?seed=3", "seed"), ("rg:chain_sum?partial=2",
        "partial"),
    ],
)  # fmt: skip
def test_bad_options(spec, match):
    with pytest.raises(ConfigError, match=match):
        get_task(spec)


def test_unknown_data_set():
    with pytest.raises(UnknownNameError, match="chain_sum"):
        get_task("rg:chain_sums")


def test_partial_marks_only_on_demand():
    strict, lenient = get_task("rg:chain_sum"), get_task("rg:chain_sum?partial=true")
    sample = strict.samples("train", 1)[0]
    reply = f"I believe it is {sample.gold}"
    assert strict.score(sample, reply).value == 0.0
    assert 0 < lenient.score(sample, reply).value < 1
    assert lenient.score(sample, sample.gold).value == 1.0


def test_a_scorer_that_raises_on_a_reply_makes_it_wrong_with_the_reason(monkeypatch):
    task = get_task("rg:chain_sum")
    sample = task.samples("train", 1)[0]

    def score_answer(answer, entry):
        if answer != entry["answer"]:
            raise ValueError("cannot read that")
        return 1.0

    monkeypatch.setattr(task._scorer, "score_answer", score_answer)
    score = task.score(sample, "garbage")
    assert score.value == 0.0
    assert "cannot read that" in score.explanation


def test_a_scorer_that_raises_on_its_own_answer_is_unscorable(monkeypatch):
    task = get_task("rg:chain_sum")
    sample = task.samples("train", 1)[0]

    def score_answer(answer, entry):
        raise KeyError("broken")

    monkeypatch.setattr(task._scorer, "score_answer", score_answer)
    assert task.score(sample, "garbage").value is None
    assert task.score(sample, sample.gold).value is None
    monkeypatch.setattr(task._scorer, "score_answer", lambda answer, entry: float("nan"))
    assert task.score(sample, "garbage").value is None


@pytest.mark.parametrize("name", ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown",
"puzzle24",
                                  "simple_integration", "polynomial_multiplication"])  # fmt: skip
def test_replies_are_not_run_as_code(name, tmp_path):
    task = get_task(f"rg:{name}")
    sample = task.samples("train", 1)[0]
    mark = tmp_path / "ran"
    for reply in (f"open({str(mark)!r}, 'w').close()", f"[open({str(mark)!r}, 'w')]",
                  f"__import__('pathlib').Path({str(mark)!r}).touch()"):  # fmt: skip
        assert task.score(sample, reply).value == 0.0
    assert not mark.exists()


def test_codeio_runs_programs_only_on_demand(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--allow-code"):
        get_task("rg:codeio")
    monkeypatch.chdir(tmp_path)  # its programs write files
    assert get_task("rg:codeio", allow_code=True).validate(n=3).ok


def test_no_scorer_that_evals_is_left_without_a_rule(monkeypatch):
    monkeypatch.delitem(RULES, "spiral_matrix")
    with pytest.raises(ConfigError, match="spiral_matrix"):
        get_task("rg:spiral_matrix")


def test_puzzle24_needs_the_given_numbers_and_exactly_24():
    task = get_task("rg:puzzle24")
    sample = task.samples("train", 1)[0]
    assert task.score(sample, "6*4*1*1").value == float(
        sorted(sample.meta["entry"]["metadata"]["numbers"]) == [1, 1, 4, 6]
    )
    assert task.score(sample, f"{sample.gold} + 0").value == 0.0


def test_integration_must_be_done():
    task = get_task("rg:simple_integration")
    sample = task.samples("train", 1)[0]
    integrand = sample.meta["entry"]["metadata"]["integrand"]
    variable = sample.meta["entry"]["metadata"]["variable"]
    assert task.score(sample, f"Integral({integrand}, {variable})").value == 0.0
    assert task.score(sample, sample.gold.replace("C", "7")).value == 1.0


def test_halting_compares_words_not_truthiness():
    task = get_task("rg:game_of_life_halting")
    samples = task.samples("train", 40)
    assert {sample.gold for sample in samples} == {"True", "False"}
    assert best_constant(task, samples)[1] < 1


def test_rational():
    assert rational("(1 + 2) * 3 / 4") * 4 == 9
    for bad in ("2**9", "1/0", "a", "1.5", "f(1)", "(" * 300, "", "1 if 1 else 2", "True"):
        with pytest.raises(ValueError):
            rational(bad)


def test_symbolic():
    assert symbolic("3*x**4/2 - sin(2*x) + C", {})
    for bad in (
        "9**9**9**9",
        "x**(2**99)" * 3,
        "factorial(9)",
        "x.y",
        "__x__",
        "lambda: 1",
        "x" * 700,
        "10**9999",
        "[1]",
    ):
        assert not symbolic(bad, {})


def test_meta_stays_out_of_the_prompt():
    sample = get_task("rg:propositional_logic").samples("train", 1)[0]
    assert "example_answer" not in sample.prompt
    assert json.dumps(sample.prompt)
