"""Checkpoints: a run that was stopped anywhere and resumed equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers_train import Letter, config, trainer, without_seconds
from safetensors.torch import load_file

from sigmix.errors import ConfigError, OutputError
from sigmix.experts.expert import Expert
from sigmix.tasks.base import Score
from sigmix.train.checkpointing import RunDir

pytestmark = pytest.mark.usefixtures("cache")

OPTIONS = [{}, {"parametrization": "reference"}, {"policy": "lora", "learning_rate": 0.01, "lora_dropout": 0.2},
           {"policy": "ia3", "learning_rate": 0.01},
           {"objective": "sft", "lr_scheduler_type": "constant"}, {"positions": "prompt"},
           {"positions": "prompt", "policy": "lora", "learning_rate": 0.01}]  # fmt: skip


class Stop(BaseException):
    """Ends a run without a chance to save, as the kernel does."""


# at the first validation, in the first step, within, at and after a checkpoint
PLACES = [("validation", 0), ("step", 0), ("step", 1), ("validation", 2), ("step", 2), ("step", 3), ("step", 5),
          ("validation", 6)]  # fmt: skip
INTERRUPTIONS = [(KeyboardInterrupt(), ("step", 1)), (Stop(), ("step", 0)), (Stop(), ("validation", 2)),
                 (Stop(), ("step", 3))]  # fmt: skip
MORE = [(error, place) for error in (KeyboardInterrupt(), Stop()) for place in PLACES]


class Hopeless(Letter):
    """No validation is better than the first."""

    def score(self, sample, reply):
        return Score.of(False, reply) if sample.prompt.startswith("validation") else super().score(sample, reply)


def at(place, error):
    def on_log(entry):
        if (entry["kind"], entry["step"]) == place:
            raise error

    return on_log


def outcome(run):
    best: dict = {}
    if run.run.best.exists():
        adapter = load_file(run.run.best / "adapter_model.safetensors")
        best = adapter if run.config.policy != "svf" else dict(Expert.from_pretrained(run.run.best).z)
    moments = {name: t for name, t in run.run.tensors().items() if name.startswith("optimizer")}
    return without_seconds(run.run.history()), run.best, run._bad_validations, run.policy.z(), best, moments


def same(one, other):
    assert one[0] == other[0]
    assert one[1:3] == other[1:3]
    for mine, theirs in zip(one[3:], other[3:], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


UNINTERRUPTED: dict = {}


@pytest.fixture
def whole(tiny, tiny_tokenizer, tmp_path):
    """Outcome of an uninterrupted run, once for each set of options."""

    def make(**options):
        key = repr(options)
        if key not in UNINTERRUPTED:
            run = trainer(tiny(), tiny_tokenizer, tmp_path / "whole", **options)
            run.fit()
            UNINTERRUPTED[key] = outcome(run)
        return UNINTERRUPTED[key]

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
@pytest.mark.parametrize("place", [("step", 3), pytest.param(("validation", 4), marks=pytest.mark.slow)])
def test_kinds_of_runs(tiny, tiny_tokenizer, tmp_path, whole, options, place):
    same(resumed(tiny, tiny_tokenizer, tmp_path / "cut", place, KeyboardInterrupt(), **options), whole(**options))


@pytest.mark.parametrize(
    ("error", "place"), [*INTERRUPTIONS, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE)]
)
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
    for place in (("validation", 4), ("step", 5)):
        cut = resumed(tiny, tiny_tokenizer, tmp_path / f"cut-{place[1]}", place, KeyboardInterrupt(), **options)
        same(cut, expected)


def test_a_finished_run_resumes_to_its_result(tiny, tiny_tokenizer, tmp_path):
    first = trainer(tiny(), tiny_tokenizer, tmp_path)
    expert = first.fit()
    entries = []
    again = trainer(tiny(), tiny_tokenizer, tmp_path, entries.append).fit(resume=True)
    assert entries == []
    assert again == expert


def test_another_configuration_is_named(tiny, tiny_tokenizer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny(), tiny_tokenizer, tmp_path, at(("step", 1), KeyboardInterrupt())).fit()
    for name, value in {"learning_rate": 0.01, "seed": 1, "max_steps": 8, "positions": "prompt"}.items():
        with pytest.raises(ConfigError, match=name):
            trainer(tiny(), tiny_tokenizer, tmp_path, **{name: value}).fit(resume=True)


def test_a_checkpoint_holds_no_pickle(tiny, tiny_tokenizer, tmp_path):
    trainer(tiny(), tiny_tokenizer, tmp_path, max_steps=2).fit()
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["state.json", "state.safetensors"]
    state = json.loads((tmp_path / "checkpoint/state.json").read_text())
    assert state["step"] == 2
    assert set(state) == {"step", "seconds", "best", "bad", "constant"}


# ------------------------------------------------------------------ files


def test_a_used_folder_is_refused_without_resume(tiny, tiny_tokenizer, tmp_path):
    trainer(tiny(), tiny_tokenizer, tmp_path, max_steps=2).fit()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(OutputError, match="--resume"):
        trainer(tiny(), tiny_tokenizer, tmp_path, max_steps=2).fit()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


HOLD = """
import sys
from sigmix.train.checkpointing import RunDir
with RunDir(sys.argv[1]).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_write_one_folder(tiny, tiny_tokenizer, tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="--run"):
            trainer(tiny(), tiny_tokenizer, tmp_path, max_steps=2).fit()
        assert not (tmp_path / "config.json").exists()
    finally:
        other.communicate()
    trainer(tiny(), tiny_tokenizer, tmp_path, max_steps=2).fit()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"), RunDir(tmp_path / "file" / "run").locked():
        pass


def test_resume_of_nothing(tmp_path):
    with pytest.raises(ConfigError, match="--resume"):
        RunDir(tmp_path).begin(config(), resume=True)


@pytest.mark.parametrize("file", ["config.json", "checkpoint/state.json"])
def test_resume_of_a_damaged_run(tmp_path, file):
    run = RunDir(tmp_path)
    run.begin(config(), resume=False)
    run.save({"step": 1}, {"parameter.a": torch.ones(1)})
    (tmp_path / file).write_text("{")
    with pytest.raises(ConfigError, match=file):
        run.begin(config(), resume=True)


def test_a_crash_between_the_two_renames_of_a_checkpoint_loses_nothing(tmp_path):
    run = RunDir(tmp_path)
    run.begin(config(), resume=False)
    run.save({"step": 1}, {"parameter.a": torch.ones(1)})
    run.checkpoint.rename(tmp_path / ".checkpoint.old")  # as `atomic_dir` does first
    assert run.begin(config(), resume=True) == {"step": 1}


def test_metrics_and_checkpoints_come_back(tmp_path):
    run = RunDir(tmp_path)
    assert run.history() == []
    for entry in ({"kind": "step", "step": 0}, {"kind": "validation", "step": 1}, {"kind": "step", "step": 1}):
        run.log(entry)
    run.truncate_history(1)
    assert run.history() == [{"kind": "step", "step": 0}, {"kind": "validation", "step": 1}]
    run.save({"step": 1}, {"parameter.a": torch.arange(3.0)})
    run.save({"step": 2}, {"parameter.a": torch.arange(4.0)})
    assert run.tensors()["parameter.a"].tolist() == [0, 1, 2, 3]
    (run.checkpoint / "state.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="state.safetensors"):
        run.tensors()


def test_a_torn_last_line_is_left_out_and_does_not_stop_a_resume(tmp_path):
    run = RunDir(tmp_path)
    for step in range(3):
        run.log({"kind": "step", "step": step, "loss": 0.5})
    with open(run.metrics, "a") as file:
        file.write('{"kind": "step", "st')
    assert [entry["step"] for entry in run.history()] == [0, 1, 2]
    run.truncate_history(2)
    run.log({"kind": "step", "step": 2, "loss": 0.25})
    assert [(entry["step"], entry["loss"]) for entry in run.history()] == [(0, 0.5), (1, 0.5), (2, 0.25)]


def test_values_that_are_not_finite_are_logged_as_null(tmp_path):
    run = RunDir(tmp_path)
    run.log({"kind": "step", "step": 0, "loss": float("nan"), "grad_norm": float("inf"), "kl": 0.5})
    line = json.loads(run.metrics.read_text(), parse_constant=lambda name: f"not JSON: {name}")
    assert (line["loss"], line["grad_norm"], line["kl"]) == (None, None, 0.5)
