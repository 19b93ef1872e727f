"""Statistics of requests: their file, and experts that carry them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sigmix.errors import ExpertError
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.requests import RequestStatistics

pytest_plugins = ["helpers_hub"]
Z = {"layers.0.q": torch.tensor([0.5, 1.5])}
FILE = "requests.safetensors"


def statistics(**changes) -> RequestStatistics:
    given = {
        "mean": torch.tensor([0.0, 3.0, 0.0]), "directions": torch.tensor([[1.0], [0.0], [0.0]]),
        "excess": torch.tensor([0.5]), "floor": 0.75, "weight": torch.tensor([0.25, -1.0, 2.0]), "bias": -0.5,
        "threshold": -3.5, "base": "b" * 64, "background": "k", "facts": {"train_n": 4, "validation_n": 2},
    }  # fmt: skip
    return RequestStatistics(**{**given, **changes})


def new_expert(**changes) -> Expert:
    return Expert("sums", Z, {"domain": "arithmetic"}, requests=statistics(**changes))


def test_scores_are_those_of_classifier_and_density():
    found = statistics()
    states = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 3
    covariance = 0.75 * torch.eye(3) + 0.5 * found.directions @ found.directions.T
    own, others = (
        torch.distributions.MultivariateNormal(mean, matrix).log_prob(states)
        for mean, matrix in ((found.mean, covariance), (torch.zeros(3), torch.eye(3)))
    )
    logit = states @ found.weight + found.bias
    torch.testing.assert_close(found.scores(states), logit + 2 * (own - others) / 20)


def test_a_file_has_the_values_in_few_bytes():
    random = torch.Generator().manual_seed(0)
    mean, weight, states = torch.randn(52, 576, generator=random).split([1, 1, 50])
    directions = torch.linalg.qr(torch.randn(576, 32, generator=random))[0]
    excess = torch.rand(32, generator=random)
    exact = statistics(mean=3 * mean[0], weight=weight[0], directions=directions, excess=excess)
    rounded = exact.rounded()
    assert rounded.rounded().to_bytes() == rounded.to_bytes() == exact.to_bytes()
    assert len(exact.to_bytes()) < 22_000
    torch.testing.assert_close(rounded.scores(states), exact.scores(states), atol=0.2, rtol=1e-3)
    assert statistics(directions=torch.zeros(3, 0), excess=torch.zeros(0)).rounded().directions.shape == (3, 0)


def test_an_expert_carries_its_statistics_and_its_digest_stays(tmp_path):
    expert = new_expert()
    again = Expert.from_pretrained(expert.save_pretrained(tmp_path / "sums"))
    assert again == expert
    assert again != replace(expert, requests=None) != new_expert(threshold=-3.0)
    assert again.digest == replace(expert, requests=None).digest
    assert again.requests.to_bytes() == expert.requests.to_bytes()
    assert again.with_meta(domain="x").requests is again.requests
    bank = Bank(tmp_path / "bank", create=True)
    bank.add(expert)
    bank.add(replace(expert, requests=None), replace=True)
    assert not (bank.folder / "sums" / FILE).exists()
    (bank.folder / "sums" / "curve.png").write_bytes(b"a plot")
    bank.set_requests("sums", statistics())
    assert bank["sums"] == expert == Bank(bank.folder)["sums"]
    assert (bank.folder / "sums" / "curve.png").read_bytes() == b"a plot"


def test_the_hub_carries_statistics(hub):
    new_expert().push_to_hub("user/sums", token=hub.writer)
    assert Expert.from_pretrained("user/sums") == new_expert()
    replace(new_expert(), requests=None).push_to_hub("user/sums", token=hub.writer)
    assert FILE not in hub.files("user/sums")
    assert Expert.from_pretrained("user/sums").requests is None


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "flipped", "folder"])
def test_damage_is_an_error_that_names_the_file(tmp_path, damage):
    file = new_expert().save_pretrained(tmp_path / "sums") / FILE
    content = file.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"cut": content[:-4], "text": b"hello", "empty": b"", "flipped": flipped}[damage])
    with pytest.raises(ExpertError, match=FILE):
        Expert.from_pretrained(file.parent)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": torch.zeros(2)}, {"weight": torch.zeros(4)}, {"weight": torch.zeros(3, 1)},
        {"directions": torch.zeros(2, 1)}, {"floor": 0.0}, {"threshold": float("nan")}, {"bias": float("inf")},
        {"excess": torch.tensor([-1.0])}, {"mean": torch.full((3,), float("inf"))},
    ],
)  # fmt: skip
def test_invalid_values(changes):
    with pytest.raises(ExpertError, match="sigmix experts statistics"):
        statistics(**changes)
