"""Training runs and cells are made once, can be stopped anywhere, and say what happened."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from helpers_reproduce import lab, swept

from reproduction.banks import bank_of
from reproduction.blend import Blend
from reproduction.lab import Lab
from reproduction.names import BEYOND
from reproduction.scale import KINDS, SCALES
from reproduction.stages import chosen, stages
from reproduction.stages.groups import groups, kinds
from reproduction.stages.sweep import Sweep
from reproduction.stages.transfer import moved, requantise
from sigmix.errors import ConfigError, FingerprintError, UnknownNameError
from sigmix.experts.expert import Expert

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def home(tmp_path):
    return lab(tmp_path)


def test_a_run_is_computed_once_and_recorded(home):
    name, folder = home.trained("lora-rl", "larger", 1, 1e-3)
    assert name == "lora-rl@0.001.larger.s1"
    assert (folder / "adapter_model.safetensors").exists()
    record = home.store.run(name)
    assert (record["kind"], record["task"], record["seed"], record["lr"]) == ("lora-rl", "larger", 1, 1e-3)
    assert record["config"]["lora_r"] == 16
    assert record["parameters"] == 29_696
    assert record["outcome"] == "done"
    (folder.parent / "metrics.jsonl").write_text("")  # a second run would need it
    assert home.trained("lora-rl", "larger", 1, 1e-3) == (name, folder)
    with pytest.raises(LookupError, match="sweep"):
        home.trained("lora-rl", "larger", 1)


def test_stored_cells_need_no_adapter(home):
    name = home.single_cells("svf-rl", "larger", 0, lr=0.05)
    shutil.rmtree(home.work / "runs")  # an unpacked archive on another machine
    assert home.single_cells("svf-rl", "larger", 0, lr=0.05) == name
    assert not (home.work / "runs").exists()
    home.single_cells("svf-rl", "larger", 0, positions="prompt", lr=0.05)
    assert (home.work / "runs" / name / "best").exists()


def test_a_run_that_was_cut_goes_on(home, tmp_path, monkeypatch):
    from sigmix.train.trainer import Trainer

    whole = lab(tmp_path / "whole", training={**home.scale.training, "max_steps": 3})
    cut = lab(tmp_path / "cut", training={**home.scale.training, "max_steps": 3})
    name, _ = whole.trained("svf-rl", "larger", 0, 0.05)
    log = Trainer._log

    def stop(self, entry):
        log(self, entry)
        if entry["kind"] == "step" and entry["step"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", stop)
        with pytest.raises(KeyboardInterrupt):
            cut.trained("svf-rl", "larger", 0, 0.05)
    assert cut.store.run(name) is None
    _, folder = cut.trained("svf-rl", "larger", 0, 0.05)

    def plain(record):
        history = [{k: v for k, v in e.items() if k != "seconds"} for e in record["history"]]
        return {**record, "seconds": 0, "history": history}

    assert plain(cut.store.run(name)) == plain(whole.store.run(name))
    whole_z = Expert.from_pretrained(whole.work / "runs" / name / "best").z
    assert all(torch.equal(z, whole_z[path]) for path, z in Expert.from_pretrained(folder).z.items())


def test_a_run_that_diverges_is_a_result(home):
    wild = lab(home.work / "wild", training={**home.scale.training, "max_steps": 4, "kl_limit": 1e-9, "beta": 0.1})
    name, folder = wild.trained("svf-rl", "larger", 0, 0.5)
    assert "collapsed" in wild.store.run(name)["outcome"]
    assert folder.exists()


def test_one_adapter_learns_task_after_task(home):
    for kind in ("svf-rl", "lora-rl"):
        name, folder = home.trained(kind, "larger", 0, 0.01, after=["addition"])
        first = home.store.run(f"{kind}@0.01.addition.s0")
        second = home.store.run(name)
        assert first is not None
        assert second["after"] == ["addition"]
        assert folder.exists()


def test_a_cell_is_measured_once_with_its_kl(home):
    model, tokenizer = home.base()
    draw = torch.Generator().manual_seed(0)
    z = {
        path: 1 + torch.rand(min(m.weight.shape), generator=draw) - 0.5
        for path, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and path != "lm_head"
    }
    blend = Blend(model, {"it": Expert("it", z)}, "svf")
    cell = home.cell(
        "larger", "moved", blend.model, tokenizer, lambda: blend.under({"it": 1.0}), blend.reference, note=3
    )
    assert cell.facts["kl"] > 0.01
    assert (cell.facts["n"], cell.facts["note"]) == (home.scale.n, 3)
    still = home.cell("larger", "unmoved", blend.model, tokenizer, blend.reference, blend.reference)
    assert still.facts["kl"] == pytest.approx(0, abs=1e-6)
    assert [item.reply for item in still.result.items] != [item.reply for item in cell.result.items]

    def never():
        raise AssertionError("measured again")

    assert home.cell("larger", "moved", None, None, never).result == cell.result
    home.base_cells(["larger"])
    assert home.store.cell("larger", "base").result == still.result
    assert home.store.about("larger")["best_constant"]["accuracy"] > 0


def test_a_sweep_goes_on_beyond_an_end_that_wins_and_then_stops(home, monkeypatch):
    made: list[float] = []

    def trained(kind, task, seed, lr):
        made.append(lr)
        accuracy = 0.5 - abs(lr - 0.02)
        record = {
            "kind": kind, "task": task, "seed": seed, "lr": lr, "after": [], "best": {"accuracy": accuracy, "step": 1},
        }  # fmt: skip
        home.store.write_run(f"{kind}@{lr:g}.{task}.s{seed}", record)

    monkeypatch.setattr(home, "trained", trained)
    home.scale = replace(home.scale, kinds={"svf-rl": KINDS["svf-rl"]})
    Sweep().run(home)
    assert made == [6e-4, 2e-3, 6e-3, 0.02, 0.067]
    Sweep().run(home)
    assert len(made) == 3 + BEYOND


def test_z_in_another_order():
    z = {f"model.layers.{n}.up": torch.arange(4.0) + 10 * n for n in range(3)}
    expert = Expert("it", z)
    assert all(torch.equal(moved(expert, "in order").z[path], z[path]) for path in z)
    shuffled = moved(expert, "shuffled").z
    assert all(sorted(shuffled[path].tolist()) == z[path].tolist() for path in z)
    assert any(not torch.equal(shuffled[path], z[path]) for path in z)
    on = moved(expert, "one layer on").z
    assert [float(on[f"model.layers.{n}.up"][0]) for n in range(3)] == [20, 0, 10]
    back = moved(expert, "layers reversed").z
    assert [float(back[f"model.layers.{n}.up"][0]) for n in range(3)] == [20, 10, 0]


def test_a_requantised_base_is_another_base(home):
    _, folder = home.trained("svf-rl", "larger", 0, 0.01)
    model, _ = home.base()
    before = {n: p.clone() for n, p in model.named_parameters()}
    requantise(model)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) == 14
    error = (model.model.layers[0].mlp.up_proj.weight - before["model.layers.0.mlp.up_proj.weight"]).norm()
    assert 0.01 < error / before["model.layers.0.mlp.up_proj.weight"].norm() < 0.15
    with pytest.raises(FingerprintError):
        Expert.from_pretrained(folder, base=model)


def test_a_bank_of_ones_own(home):
    swept(home.store, home.scale, "svf-rl", {0.01: (0.1, 1.0)})
    bank = bank_of(home, "two", ["addition", "larger"], 0)
    assert bank.names() == ["addition", "larger"]
    assert bank["addition"].meta["task"] == "addition"
    assert bank_of(home, "two", ["addition", "larger"], 0).names() == bank.names()
    swept(home.store, home.scale, "svf-rl", {0.02: (0.5, 1.0)})
    assert bank_of(home, "two", ["addition"], 0).folder != bank.folder  # other experts


def test_a_store_takes_one_scale_only(home):
    home.begin()
    home.begin()
    other = Lab(replace(home.scale, base="another"), home.store, home.work)
    with pytest.raises(ConfigError, match=r"another base: base was 'tiny', not 'another'.*--out"):
        other.begin()
    longer = Lab(replace(home.scale, training={"steps": 2}, n=7), home.store, home.work)
    with pytest.raises(ConfigError, match="another n and training"):
        longer.begin()


def test_stages_that_are_needed_run_first():
    laptop = SCALES["laptop"]
    assert [stage.name for stage in chosen(laptop, ["ablations"])] == ["sweep", "table1", "ablations"]
    assert [stage.name for stage in chosen(laptop, [])] == list(stages(laptop))
    assert [stage.name for stage in chosen(SCALES["positions"], ["snips"])] == ["snips"]
    with pytest.raises(UnknownNameError, match="snips"):
        chosen(laptop, ["snips"])
    assert [len(group) for group in groups(laptop, "lora-rl", 0)] == [2, 3, 6, 2]
    assert [len(group) for group in groups(laptop, "lora-small-rl", 0)] == [2, 3, 6]
    assert [len(group) for group in groups(laptop, "lora-rl", 1)] == [2, 3]


def test_equal_kl_is_an_arm_of_its_own_only_if_it_is_another_rate(home):
    swept(home.store, home.scale, "svf-rl", {2e-3: (0.8, 1.0)})
    swept(home.store, home.scale, "lora-rl", {3e-4: (0.7, 0.2), 1e-3: (0.9, 1.1)})
    assert "lora-kl-rl" not in kinds(home.store, home.scale)
    swept(home.store, home.scale, "lora-rl", {3e-4: (0.95, 0.2)})
    assert "lora-kl-rl" in kinds(home.store, home.scale)
