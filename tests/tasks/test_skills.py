"""Every built-in skill keeps the contract: sound grader, disjoint splits, no winning constant, short texts."""

import hashlib
import pickle

import pytest

from sigmix.errors import ConfigError
from sigmix.evals.statistics import best_constant
from sigmix.tasks import get_task, task_names
from sigmix.tasks.skills import wording
from sigmix.tasks.skills.base import SkillTask
from sigmix.tasks.skills.words import CATEGORIES, OPPOSITES, PLURALS

WANTED = """
addition subtraction multiplication larger smallest-of-three sort-numbers first-letter alphabetical spell reverse-words
plural opposite repeat-last-word longest-word uppercase who-has where-is fact-lookup json-record csv-row bullet-list
date-iso time-24h transitive boolean odd-even syllogism odd-one-out
""".split()
TWO_VALUED = {"boolean", "odd-even", "syllogism"}


def test_all_skills_are_registered():
    assert set(WANTED) <= set(task_names(families=False))


@pytest.mark.parametrize("name", WANTED)
def test_contract(name):
    task = get_task(name)
    assert isinstance(task, SkillTask)
    for split in ("train", "test"):
        report = task.validate(split, 40)
        assert report.ok, report.problems[:3]
        assert report.counts["gold_right"] == report.counts["samples"] > 0
        assert report.counts["wrong_refused"] == report.counts["wrong_replies"] >= 10 * report.counts["samples"]
    assert task.domain != "other"
    assert task.description.endswith(".")


@pytest.mark.parametrize("name", WANTED)
def test_no_constant_reply_wins(name):
    task = get_task(name)
    _, accuracy = best_constant(task, task.samples("train", 150))
    assert accuracy <= (0.6 if name in TWO_VALUED else 0.16)


@pytest.mark.parametrize("name", WANTED)
def test_samples_are_deterministic_distinct_and_short(name):
    task = get_task(name)
    samples = task.samples("train", 60, seed=3)
    assert samples == get_task(task.name).samples("train", 60, seed=3)
    assert samples[:20] == task.samples("train", 20, seed=3)
    assert samples != task.samples("train", 60, seed=4)
    assert len({sample.id for sample in samples}) == len(samples)
    assert max(len(sample.prompt.split()) for sample in samples) <= 40
    assert max(len(sample.gold) for sample in samples) <= 60
    assert pickle.loads(pickle.dumps(samples)) == samples


def test_where_the_answer_stands_does_not_give_it_away():
    for name in ("larger", "alphabetical", "longest-word", "odd-one-out", "who-has", "transitive"):
        samples = get_task(name).samples("train", 300)
        first = sum(
            sample.prompt.casefold().find(sample.gold.casefold())
            == min(
                sample.prompt.casefold().find(other.casefold())
                for other in [sample.gold, *(w for w in sample.meta["wrong"] if " " not in w and w in sample.prompt)]
            )
            for sample in samples
        )
        assert 0.12 < first / len(samples) < 0.65, name


def test_longer_number_is_not_always_the_larger():
    samples = get_task("larger").samples("train", 300)
    same_length = sum(len(s.gold) == len(s.meta["wrong"][0]) for s in samples)
    assert same_length > 120


def test_false_sentences_about_numbers_are_refused():
    task = get_task("larger")
    sample = next(s for s in task.samples("train", 50) if s.gold != s.meta["wrong"][0])
    low, high = sample.meta["wrong"][0], sample.gold
    for reply in (f"{low} is larger than {high}.", f"{low} {high}", f"{low} or {high}", low, f"{high}."):
        assert task.score(sample, reply).value == float(reply == f"{high}.")


def test_commuted_sums_stay_in_one_split():
    task = get_task("addition", digits=1)
    pairs = {}
    for split in ("train", "validation", "test"):
        for sample in task.samples(split):
            a, _, b = sample.prompt.removeprefix("What is ").split("?")[0].split()
            assert pairs.setdefault(frozenset((a, b)), split) == split


def test_small_space_gives_all_it_has():
    task = get_task("addition", digits=1)
    sizes = [len(task.samples(split, 500)) for split in ("train", "validation", "test")]
    assert sum(sizes) == 81
    assert min(sizes) > 0


def test_pairs_that_share_a_word_stay_in_one_split():
    owner = {}
    task = get_task("opposite")
    for split in ("train", "validation", "test"):
        for sample in task.samples(split):
            word = sample.prompt.split('"')[1]
            for member in (word, sample.gold, *sample.meta["extra"]["accept"]):
                if member in wording._GROUPS:
                    assert owner.setdefault(wording._GROUPS[member], split) == split
    for word, _, others in wording._OPPOSITE_ENTRIES:
        assert all(wording._GROUPS[other] == wording._GROUPS[word] for other in others if other in wording._GROUPS)


def test_opposite_accepts_every_listed_answer():
    task = get_task("opposite")
    sample = next(s for split in ("train", "validation", "test") for s in task.samples(split) if '"big"' in s.prompt)
    assert task.score(sample, "Little.").value == 1.0
    assert task.score(sample, "large").value == 0.0


def test_negative_results_only_on_demand():
    assert all(int(s.gold) >= 0 for s in get_task("subtraction").samples("train", 100))
    assert any(int(s.gold) < 0 for s in get_task("subtraction", negative=True).samples("train", 100))


@pytest.mark.parametrize("options", [{"digits": "two"}, {"digits": 0}, {"digits": 13}, {"digits": True}, {"digit": 2}])
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        get_task("addition", **options)


def test_word_lists():
    members = [word for words in CATEGORIES.values() for word in words]
    assert len(members) == len(set(members))
    assert len(OPPOSITES) >= 120
    assert len(PLURALS) >= 150
    assert all(plural != word for word, plural in PLURALS.items())
    assert all(left not in rights for left, _, _, rights in OPPOSITES)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("addition", "b955e692d9a1f2f7"),
        ("larger", "c0ff8e79e96c56e0"),
        ("date-iso", "771d8e9c4e17d315"),
        ("odd-one-out", "c20a12c115e3ffa8"),
        ("who-has", "f7b4c9c8331122d0"),
        ("opposite", "aae592637623d330"),
    ],
)
def test_samples_are_those_that_published_results_refer_to(name, ids):
    found = get_task(name).samples("test", 50, seed=0)
    assert hashlib.sha256(" ".join(sample.id for sample in found).encode()).hexdigest()[:16] == ids
