"""Replies out of a list only: which tokens may follow, and what that does to scores, samples and gradients."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import rows

from sigmix.engine.constrained import MASKED, TokenTrie
from sigmix.engine.generation import SamplingParams, complete
from sigmix.errors import ConfigError

REPLIES = [[5, 6, 2], [5, 7, 2], [5, 2], [8, 2]]


def test_what_may_follow():
    trie = TokenTrie(REPLIES)
    assert trie.allowed([]) == [5, 8]
    assert trie.allowed([5]) == [2, 6, 7]
    assert trie.allowed([5, 6]) == [2]
    assert trie.allowed([5, 6, 2]) == trie.allowed([9]) == []
    assert trie.branches() == [(), (5,)]


def test_all_else_is_out_of_reach_and_gets_no_gradient():
    trie = TokenTrie(REPLIES)
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = trie.constrain(logits, [[], [5], [9, 9]])
    chances = found.softmax(-1)
    assert chances[0, [5, 8]].sum() == 1
    assert chances[1, [2, 6, 7]].sum() == 1
    assert torch.equal(found[2], logits[2])  # no beginning of a reply: left alone
    chances[:2].square().sum().backward()
    assert (logits.grad != 0).nonzero().tolist() == [[0, 5], [0, 8], [1, 2], [1, 6], [1, 7]]


def test_answers_are_constrained_token_by_token():
    trie = TokenTrie(REPLIES)
    answers = torch.tensor([[5, 7, 2], [8, 2, 0]])
    logits = torch.zeros(2, 3, 10)
    found = trie.constrain_answers(logits, answers)
    allowed = [[(row > MASKED).nonzero().flatten().tolist() for row in rows_] for rows_ in found]
    assert allowed[0] == [[5, 8], [2, 6, 7], [2]]
    assert allowed[1][:2] == [[5, 8], [2]]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_every_answer_is_one_of_them(tiny_llama, temperature):
    trie = TokenTrie(REPLIES)
    prompts = rows([14, 22, 11, 17], shared=9) * 4
    sampling = [SamplingParams(5, temperature > 0, temperature, seed=seed) for seed in range(16)]
    done = complete(tiny_llama, prompts, sampling, [2], pad_id=0, trie=trie)
    assert {tuple(row.ids) for row in done} <= {tuple(ids) for ids in REPLIES}
    if temperature == 50.0:  # then all options at a fork are nearly alike
        assert len({tuple(row.ids) for row in done}) > 2
    for row in done:
        assert all(logprob <= 0 for logprob in row.logprobs)
        assert row.logprobs[-1] == 0 or len(row.ids) == 2


def test_texts_that_a_tokenizer_cannot_tell_apart(tiny_tokenizer):
    assert TokenTrie.from_texts(tiny_tokenizer, ["a", "b"], [2]).branches() == [()]
    with pytest.raises(ConfigError, match="a, a"):
        TokenTrie.from_texts(tiny_tokenizer, ["a", "a"], [2])
    with pytest.raises(ConfigError):
        TokenTrie.from_texts(tiny_tokenizer, ["a", ""], [2])
