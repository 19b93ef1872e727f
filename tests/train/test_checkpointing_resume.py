"""A run that was stopped anywhere and resumed equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_train import Letter, trainer, without_seconds
from safetensors.torch import load_file

from sigmix.errors import ConfigError
from sigmix.experts.expert import Expert
from sigmix.tasks.base import Score

pytestmark = pytest.mark.usefixtures("cache")

# where a listener stops the run: at the first validation, in the first step, within, at and after a checkpoint
PLACES = [("validation", 0), ("step", 0), ("step", 1), ("validation", 2), ("step", 2), ("step", 3), ("step", 5),
          ("validation", 6)]  # fmt: skip
OPTIONS = [{}, {"parametrization": "reference"}, {"policy": "lora", "learning_rate": 0.01, "lora_dropout": 0.2},
           {"policy": "ia3", "learning_rate": 0.01},
           {"objective": "sft", "lr_scheduler_type": "constant"}]  # fmt: skip


class Stop(BaseException):
    """Ends a run without a chance to save, as the kernel does."""


class Hopeless(Letter):
    """No validation is better than the first."""

    def score(self, sample, reply):
        return Score.of(False, reply) if sample.prompt.startswith("validation") else super().score(sample, reply)


def at(place, error):
    def listener(entry):
        if (entry["kind"], entry["step"]) == place:
            raise error

    return listener


def outcome(run):
    best: dict = {}
    if run.run.best.exists():
        adapter = load_file(run.run.best / "adapter_model.safetensors")
        best = adapter if run.config.policy != "svf" else dict(Expert.from_pretrained(run.run.best).z)
    moments = {name: t for name, t in run.run.tensors().items() if name.startswith("optimizer")}
    return without_seconds(run.run.history()), run.best, run.bad, run.policy.z(), best, moments


def same(one, other):
    assert one[0] == other[0]
    assert one[1:3] == other[1:3]
    for mine, theirs in zip(one[3:], other[3:], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture
def whole(tiny, tiny_tokenizer, tmp_path):
    def make(**options):
        run = trainer(tiny(), tiny_tokenizer, tmp_path / "whole", **options)
        run.fit()
        return outcome(run)

    return make


def resumed(tiny, tokenizer, folder, place, error, **options):
    with pytest.raises(type(error)):
        trainer(tiny(), tokenizer, folder, at(place, error), **options).fit()
    run = trainer(tiny(), tokenizer, folder, **options)
    expert = run.fit(resume=True)
    if expert is not None:
        assert all(torch.equal(z, Expert.from_pretrained(run.run.best).z[path]) for path, z in expert.z.items())
    return outcome(run)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("place", [("step", 3), ("validation", 4)])
def test_kinds_of_runs(tiny, tiny_tokenizer, tmp_path, whole, options, place):
    same(resumed(tiny, tiny_tokenizer, tmp_path / "cut", place, KeyboardInterrupt(), **options), whole(**options))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stop()])
def test_places_to_stop(tiny, tiny_tokenizer, tmp_path, whole, place, error):
    same(resumed(tiny, tiny_tokenizer, tmp_path / "cut", place, error), whole())


def test_stopped_again_and_again(tiny, tiny_tokenizer, tmp_path, whole):
    for number, place in enumerate([("validation", 0), ("step", 1), ("step", 1), ("validation", 4), ("step", 5)]):
        with pytest.raises(KeyboardInterrupt):
            trainer(tiny(), tiny_tokenizer, tmp_path / "cut", at(place, KeyboardInterrupt())).fit(resume=number > 0)
    run = trainer(tiny(), tiny_tokenizer, tmp_path / "cut")
    run.fit(resume=True)
    same(outcome(run), whole())


def test_patience_counts_across_a_stop(tiny, tiny_tokenizer, tmp_path, whole):
    options = {"task": Hopeless(), "early_stopping_patience": 3, "max_steps": 12}
    expected = whole(**options)
    assert [entry["step"] for entry in expected[0] if entry["kind"] == "validation"] == [0, 2, 4, 6]
    for place in (("validation", 0), ("validation", 4), ("step", 5)):
        cut = resumed(tiny, tiny_tokenizer, tmp_path / f"cut-{place[1]}", place, KeyboardInterrupt(), **options)
        same(cut, expected)


def test_a_finished_run_resumes_to_its_result(tiny, tiny_tokenizer, tmp_path):
    first = trainer(tiny(), tiny_tokenizer, tmp_path)
    expert = first.fit()
    heard = []
    again = trainer(tiny(), tiny_tokenizer, tmp_path, heard.append).fit(resume=True)
    assert heard == []
    assert again == expert


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", 0.01), ("seed", 1), ("max_steps", 8), ("kl_estimator", "k3")]
)
def test_another_configuration_is_named(tiny, tiny_tokenizer, tmp_path, name, value):
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny(), tiny_tokenizer, tmp_path, at(("step", 1), KeyboardInterrupt())).fit()
    with pytest.raises(ConfigError, match=rf"another configuration: {name} differ"):
        trainer(tiny(), tiny_tokenizer, tmp_path, **{name: value}).fit(resume=True)


def test_a_checkpoint_holds_no_pickle(tiny, tiny_tokenizer, tmp_path):
    trainer(tiny(), tiny_tokenizer, tmp_path, max_steps=2).fit()
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["state.json", "state.safetensors"]
    state = json.loads((tmp_path / "checkpoint/state.json").read_text())
    assert state["step"] == 2
    assert set(state) == {"step", "seconds", "best", "bad", "constant"}
