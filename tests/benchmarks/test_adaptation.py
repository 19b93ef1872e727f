"""The benchmarks of the engine, of search and of pass one, on a tiny base: what they compare, not how fast it is."""

from __future__ import annotations

import shutil

import pytest
from helpers_cli import add_expert

from benchmarks import engine, mixed, pass1, requests, search
from sigmix.errors import SigmixError

pytest_plugins = ["helpers_cli"]


@pytest.fixture
def bank(home, monkeypatch):
    from sigmix.experts.bank import Bank

    monkeypatch.setenv("SIGMIX_CACHE", str(home.cache))
    return Bank(home.bank)


@pytest.mark.slow
def test_engine(home, bank):
    result = engine.run(repeats=1, dtype="float32", base=str(home.base), new_tokens=4, bank=bank)
    assert set(result["ratios"]) == {"vs_generate_1", "vs_generate_8", "vs_generate_64"} == set(result["aims"])
    assert set(result["raw"]["share_of_equal_answers"].values()) == {1.0}


def test_engine_fails_if_the_answers_differ(home, bank, monkeypatch):
    monkeypatch.setattr(engine, "_ours", lambda e, rows, n, found: lambda _: found.update(ours=[[0]] * len(rows)))
    with pytest.raises(SigmixError, match="100%"):
        engine.run(repeats=1, dtype="float32", base=str(home.base), new_tokens=4, bank=bank)


def test_search(home, bank):
    result = search.run(repeats=1, base=str(home.base), population=3, shots=2, bank=bank)
    assert set(result["ratios"]) == {"speedup_vs_swap", "speedup_vs_swap_all"}
    assert 0 <= result["raw"]["largest_loglik_difference"] <= search.TOLERANCE[result["device"]["dtype"]]
    assert len(result["raw"]["seconds"]["mixed"]) == 1


def test_experts_without_data_have_no_requests_and_stay_in_the_bank(home, bank, tmp_path):
    from sigmix.experts.bank import Bank

    more = Bank(shutil.copytree(home.bank, tmp_path / "more"))
    add_expert(more, home.base, "a", 5, task="commands", domain="commands")  # the first by name
    assert set(requests.tasks(more)) == set(bank)
    everything = requests.bundled_engine(str(home.base), bank=more)
    assert requests.prompts(everything, 6) == requests.prompts(requests.bundled_engine(str(home.base), bank=bank), 6)
    result = search.run(repeats=1, base=str(home.base), population=3, shots=2, bank=more)
    assert result["raw"]["task"] == bank["arithmetic"].meta["task"]


def test_search_fails_if_the_two_ways_disagree(home, bank, monkeypatch):
    calls = []
    plain = search.FewShotSearch.evaluate

    def off(self, mixes):
        calls.append(len(mixes))
        return [(a, b + len(calls)) for a, b in plain(self, mixes)]

    monkeypatch.setattr(search.FewShotSearch, "evaluate", off)
    with pytest.raises(SigmixError, match="disagree"):
        search.run(repeats=1, base=str(home.base), population=3, shots=2, bank=bank)


def test_pass1_leaves_out_what_the_bank_has_nothing_for(home, bank):
    result = pass1.run(repeats=1, base=str(home.base), rows=4, new_tokens=2, bank=bank)
    assert set(result["ratios"]) == set(result["aims"]) == {"share_A"}
    assert set(result["raw"]["left_out"]) == {"B", "D"}
    assert 0 < result["ratios"]["share_A"]["median"] < 1


@pytest.mark.slow
def test_mixed(home, bank):
    result = mixed.run(repeats=1, base=str(home.base), rows=9, new_tokens=3, bank=bank)
    assert set(result["ratios"]) == {
        *mixed.AIMS, "exact_all_vs_base", "new_all_vs_base", "decode_exact_all_vs_base", "vs_peft_lora_32"
    }  # fmt: skip
    assert len(set(result["raw"]["mixes"])) == 9
    assert result["raw"]["least_cosine"]["float32"] >= mixed.LEAST_COSINE["float32"]


def test_mixed_fails_if_a_row_is_not_the_request_alone(home, bank, monkeypatch):
    plain = mixed.next_logits
    monkeypatch.setattr(mixed, "next_logits", lambda e, rows, mix: plain(e, rows, mix) * (1 if len(rows) > 1 else -1))
    with pytest.raises(SigmixError, match="alone"):
        mixed.run(repeats=1, base=str(home.base), rows=3, new_tokens=3, bank=bank)
