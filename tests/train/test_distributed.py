"""Several processes train the same z as one, sharded or not; an error in one ends all; a killed run resumes.

The processes communicate over gloo on the CPU, in float32, where sampling does not depend on their number.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers_processes import SECONDS, command, in_processes
from helpers_tiny import build_tiny, build_tokenizer
from helpers_train import Letter, config, without_seconds
from helpers_vision import shape, vlm
from safetensors.torch import load_file

from sigmix.cli import main
from sigmix.errors import ConfigError, SigmixError
from sigmix.experts.expert import Expert
from sigmix.models.loading import load_base
from sigmix.models.multimodal import bind
from sigmix.models.quantization import QUANTIZATIONS
from sigmix.svf import decomposition as decompose
from sigmix.svf.linears import linears, shape_of
from sigmix.tasks.base import Sample, Score
from sigmix.train.checkpointing import RunDir
from sigmix.train.distributed import Processes, ProcessLostError
from sigmix.train.trainer import Trainer
from sigmix.utils.images import picture


class Graded(Letter):
    """Nearly every reply has a value of its own, so every step has a gradient that is more than rounding."""

    max_new_tokens = 4

    def score(self, sample, reply):
        return Score(None) if reply[:1] == "q" else Score(sum(map(ord, reply)) % 11 / 10, reply[:1] or None)


class Shown(Graded):
    """Every prompt shows one of three images."""

    def samples(self, split, n=None, seed=0):
        images = [picture(shape(colour)) for colour in ("red", "blue", "green")]
        return [Sample.make(f"{split} {i}?", "w", images=[images[i % 3]]) for i in range(n or 16)]


# architecture, sharded, what differs from the configuration; of 15 validation items one process gets 7, the other 8
CASES = {
    "groups": ("llama", False, {"max_eval_samples": 15}),
    "batch-mean": (
        "qwen2",
        False,
        {"num_generations": 1, "baseline": "mean", "kl_estimator": "k3", "per_device_train_batch_size": 8},
    ),
    "next-token": ("llama", False, {"objective": "sft", "generation_batch_size": 8, "num_generations": 1}),
    "lora": ("llama", False, {"policy": "lora", "learning_rate": 0.002, "generation_batch_size": 8}),
    "images": (
        "llava",
        False,
        {"generation_batch_size": 8, "num_generations": 2, "max_eval_samples": 5, "max_steps": 2},
    ),
    "int8": (
        "qwen2",
        False,
        {
            "quantization": "int8",
            "generation_batch_size": 8,
            "num_generations": 2,
            "max_eval_samples": 5,
            "max_steps": 2,
        },
    ),
    "nf4": (
        "llama",
        False,
        {
            "quantization": "nf4",
            "generation_batch_size": 8,
            "num_generations": 2,
            "max_eval_samples": 5,
            "max_steps": 2,
        },
    ),
    "sharded": ("gemma3", True, {"max_eval_samples": 15, "num_generations": 2, "per_device_train_batch_size": 4}),
    "sharded-gpt2": ("gpt2", True, {"generation_batch_size": 16}),
    "prompt": ("llama", False, {"positions": "prompt", "generation_batch_size": 8}),
    "sharded-prompt": ("llama", True, {"positions": "prompt", "generation_batch_size": 16, "max_steps": 2}),
}
CASES = {name: case for name, case in CASES.items() if find_spec(QUANTIZATIONS.get(name, "torch"))}
QUICK = ["groups", "sharded"]
SHARDED = [name for name, case in CASES.items() if case[1]]


def marked(names):
    """Parameters of a test: the quick cases, and the others with the marker `slow`."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def base(arch: str, folder: str, quantization: str | None = None):
    """(model, tokenizer)."""
    if quantization is not None:
        return load_base(Path(folder).parent / arch, "float32", quantization_config=quantization)
    if arch == "llava":
        model, processor = vlm(arch, max_position_embeddings=512)
        return model, bind(processor)
    return build_tiny(arch), build_tokenizer()


def train(case: str, folder: str, alone: bool = False) -> None:
    """One case's run in this process, and what this process saw of it."""
    arch, shard, changes = CASES[case]
    settings = config(**{"max_steps": 3, "learning_rate": 0.02, **changes})
    run = Path(folder) / case
    spread = shard and not alone
    task = Shown() if arch == "llava" else Graded()
    trainer = Trainer(*base(arch, folder, settings.quantization), task, settings, run, "letter", shard=spread)
    expert = trainer.fit()
    if expert is None:
        return
    expert, figures = trainer.test(expert, 13)
    if trainer.processes.is_main:
        (run / "held-out.json").write_text(json.dumps(figures))
        expert.save_pretrained(run / "expert")
    if spread:
        held = [*trainer.policy.model.parameters(), *trainer.policy.model.buffers()]
        z = sum(p.numel() for p in trainer.policy.parameters().values())
        own = sum(getattr(t, "_local_tensor", t).numel() for t in held) - z
        whole = sum(t.numel() for t in held) - z
        (run / f"held-{trainer.processes.rank}.json").write_text(json.dumps([own, whole]))


def train_all(cases: list[str], folder: str) -> None:
    for case in cases:
        train(case, folder)


def trouble(folder: str) -> None:
    """Runs that must not start, or must stop, in each of two processes; their errors go to errors-RANK.json."""
    rank = int(os.environ["RANK"])
    os.environ["SIGMIX_CACHE"] = f"{folder}/cache-{rank}"  # as on two machines
    errors: dict = {}

    def begin(name, model, tokenizer, task=None, shard=False, report=False, **changes):
        settings = config(**{"generation_batch_size": 8, "max_eval_samples": 2, **changes})
        processes = Processes.from_environment()
        try:
            with processes.report_once() if report else contextlib.nullcontext():
                Trainer(model, tokenizer, task or Graded(), settings, f"{folder}/{name}", "x", None, processes,
                        shard).fit()  # fmt: skip
        except (SigmixError, SystemExit) as error:
            errors[name] = f"{type(error).__name__}: {error}"

    plain = base("llama", folder)
    begin("base", build_tiny(seed=rank), plain[1])
    real = decompose.decompose
    if rank == 1:
        decompose.decompose = turned
    begin("turned", *base("llama", folder))
    begin("turned-sharded", *base("qwen2", folder), shard=True)
    decompose.decompose = real
    shutil.rmtree(f"{folder}/cache-{rank}")
    begin("dropout", *base("llama", folder), policy="lora", lora_dropout=0.1)
    begin("images-sharded", *base("llava", folder), Shown(), shard=True)
    if "int8" in CASES:
        begin("int8-sharded", *base("qwen2", folder, "int8"), shard=True, quantization="int8")
    model = build_tiny()
    paths = [path for path in linears(model) if path != "lm_head"]
    z = {path: torch.full((min(shape_of(linears(model)[path])),), 1.0 + rank) for path in paths}
    Expert("start", z).save_pretrained(f"{folder}/start-{rank}")
    begin("start", model, plain[1], init_from=f"{folder}/start-{rank}")
    # reported by one process only
    begin("nowhere", *base("llama", folder), shard=True, report=True, init_from=f"{folder}/nowhere")
    model = build_tiny()
    model._no_split_modules = None
    begin("blocks", model, plain[1], shard=True, report=True)
    begin("collapse", *base("llama", folder), shard=True, report=True, learning_rate=1.0, kl_limit=1e-9)
    state = torch.distributed.is_initialized()
    own = ["an object"]
    errors["own"] = state and Processes.from_environment().gather(lambda: own)[rank] is own
    Path(f"{folder}/errors-{rank}.json").write_text(json.dumps(errors))


def turned(weight: torch.Tensor) -> decompose.Factors:
    """Another basis of the same weight: its first two components, turned by a thousandth."""
    factors = DECOMPOSE(weight)
    angle = torch.tensor(1e-3)
    turn = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])
    factors.short[:, :2] = factors.short[:, :2] @ turn
    return factors


DECOMPOSE = decompose.decompose


def run_cases(cases: list[str], folder: Path) -> dict[str, Path]:
    """{"one" or "two": folder with each case's run, by one process or by two; "output": what the two printed}."""
    torch.set_num_threads(1)  # module-scoped fixtures run before the one that does so for every test
    for arch in ("qwen2", "llama"):
        build_tiny(arch).save_pretrained(folder / arch)
        build_tokenizer().save_pretrained(folder / arch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(folder / "cache"))
        codes = in_processes(2, train_all, cases, str(folder / "two"), folder=folder / "output")
        assert codes == [0, 0], (folder / "output/err-0").read_text() + (folder / "output/err-1").read_text()
        for case in cases:
            train(case, str(folder / "one"), alone=True)
    return {name: folder / name for name in ("one", "two", "output")}


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory):
    return run_cases(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory):
    return run_cases([case for case in CASES if case not in QUICK], tmp_path_factory.mktemp("slow"))


@pytest.fixture
def runs(request):
    case = request.node.callspec.params["case"]
    return request.getfixturevalue("quick_runs" if case in QUICK else "slow_runs")


def parameters(run: Path) -> torch.Tensor:
    tensors = load_file(run / "checkpoint/state.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.startswith("parameter")])


@pytest.mark.parametrize("case", marked(CASES))
def test_two_processes_give_the_z_of_one(runs, case):
    one, two = (parameters(runs[kind] / case) for kind in ("one", "two"))
    start = 0.0 if case == "lora" else 1.0
    moved = float((one - start).norm())
    # sums in another order round otherwise, and AdamW passes that on in proportion to a gradient. Measured: 1e-6 of the
    # way; 4e-4 where one of gpt2's 512 numbers has a gradient of 4e-8, which is rounding itself
    assert float((one - two).norm()) < (2e-3 if case in SHARDED else 1e-4) * moved
    assert moved > 0.1


@pytest.mark.parametrize("case", marked(CASES))
def test_two_processes_sample_what_one_does(runs, case):
    one, two = (without_seconds(RunDir(runs[kind] / case).history()) for kind in ("one", "two"))
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if name in ("loss", "kl", "entropy", "grad_norm"):  # sums in another order
                assert theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
            else:
                assert theirs[name] == value, name


def test_only_the_main_process_writes(quick_runs):
    one, two = (quick_runs[kind] / "groups" for kind in ("one", "two"))
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    assert (two / "held-out.json").read_text() == (one / "held-out.json").read_text()
    for name in ("test-base.jsonl", "test-expert.jsonl", "config.json"):
        assert (two / name).read_text() == (one / name).read_text()
    assert not (quick_runs["output"] / "out-1").read_text()


@pytest.mark.parametrize("case", marked(["groups", *SHARDED]))
def test_the_expert_is_sealed_for_the_base(runs, case):
    expert = Expert.from_pretrained(runs["two"] / case / "expert", base=build_tiny(CASES[case][0]))
    assert expert.verified
    assert expert.meta["training"]["processes"] == 2
    assert expert.meta["metrics"][0]["n"] == 13


@pytest.mark.parametrize("case", marked(SHARDED))
def test_a_sharded_process_holds_half_of_weights_and_factors(runs, case):
    sizes = [json.loads((runs["two"] / case / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    whole = sizes[0][1]
    base = sum(p.numel() for p in build_tiny(CASES[case][0]).parameters())
    assert whole > 1.2 * base  # the square sides of the decompositions are in it
    for own, _ in sizes:
        assert own < 0.55 * whole


# ------------------------------------------------------------------ errors


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """(errors of each of two processes by the name of the run, the folder of the runs)."""
    folder = tmp_path_factory.mktemp("errors")
    for arch in ("qwen2", "llama"):
        build_tiny(arch).save_pretrained(folder / arch)
        build_tokenizer().save_pretrained(folder / arch)
    codes = in_processes(2, trouble, str(folder / "two"), folder=folder / "output")
    assert codes == [0, 0], (folder / "output/err-0").read_text() + (folder / "output/err-1").read_text()
    return [json.loads((folder / "two" / f"errors-{rank}.json").read_text()) for rank in (0, 1)], folder / "two"


@pytest.mark.parametrize(
    "name, parts",
    [
        ("base", ["process 1 of 2", "another base"]),
        ("turned", ["process 1 of 2", "another decomposition of model.layers.0.", "SIGMIX_CACHE"]),
        ("turned-sharded", ["process 1 of 2", "another decomposition of model.layers.0."]),
        ("dropout", ["ConfigError", "lora_dropout"]),
        ("images-sharded", ["ConfigError", "--shard"]),
        ("start", ["process 1 of 2", "another z of", "--init-from"]),
    ],
)
def test_processes_that_differ_do_not_start(errors, name, parts):
    for each in errors[0]:
        for part in parts:
            assert part in each[name]
    assert not (errors[1] / name).exists()


@pytest.mark.skipif("int8" not in CASES, reason="torchao is not installed")
def test_a_quantized_base_is_not_sharded(errors):
    assert all(each["int8-sharded"].startswith("ConfigError: --shard") for each in errors[0])


@pytest.mark.parametrize(
    "name, error, code", [("blocks", "ConfigError", 2), ("nowhere", "ExpertError", 2), ("collapse", "DivergedError", 1)]
)
def test_an_error_of_all_processes_is_reported_once_when_sharded(errors, name, error, code):
    main, other = errors[0]
    assert main[name].startswith(f"{error}: ")
    assert other[name] == f"SystemExit: {code}"


def test_gather_returns_the_own_object(errors):
    assert all(each["own"] is True for each in errors[0])


@pytest.fixture
def one_of_two():
    """This process as one of two, of which there is no other."""
    before = signal.getsignal(signal.SIGTERM)
    yield Processes(0, 2)
    signal.signal(signal.SIGTERM, before)


def test_a_grader_that_catches_exceptions_does_not_swallow_sigterm(one_of_two):
    with pytest.raises(ProcessLostError, match="--resume"), one_of_two.report_once():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("caught as an exception of the grader")


LAUNCHER = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict.fromkeys(["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]),
         "RANK='', LOCAL_RANK='', MASTER_PORT='', MASTER_ADDR=''"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many'"),
        ({"RANK": "first"}, "RANK='first'"),
        ({"RANK": "2"}, "RANK='2'"),
    ],
)  # fmt: skip
def test_launcher_variables_are_checked(changes, message, monkeypatch):
    for name, value in {**LAUNCHER, **changes}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="unset WORLD_SIZE") as raised:
        Processes.from_environment()
    assert message in str(raised.value)


TASK = '''
"""Replies are judged by their letters; once, in one process, something happens in the middle of it."""
import contextlib
import os
import signal
from pathlib import Path

from sigmix.tasks.base import Sample, Score, Task


class Fatal(Task):
    name, domain, description = "fatal", "format", "Anything."
    max_new_tokens = 2

    def samples(self, split, n=None, seed=0):
        return [Sample.make(f"{split} {'long ' * (i % 3)}{i}?", "w") for i in range(n or 16)]

    def score(self, sample, reply):
        plan = Path(os.environ["PLAN"])
        with contextlib.suppress(FileNotFoundError):  # the other process may remove it at any moment
            rank, place, what = plan.read_text().split()
            if (rank, place) == (os.environ.get("RANK"), sample.prompt.split()[-1]) and "train" in sample.prompt:
                plan.unlink()
                if what == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ZeroDivisionError("the verifier is broken")
        return Score(sum(map(ord, reply)) % 11 / 10, reply[:1] or None)
'''


@pytest.fixture(scope="module")
def fatal(tmp_path_factory):
    """Folder with a base and the task."""
    folder = tmp_path_factory.mktemp("fatal")
    torch.set_num_threads(1)
    build_tiny().save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    (folder / "fatal.py").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(folder / "cache"))
        patch.setenv("PLAN", str(folder / "plan"))
        yield folder


@pytest.fixture(scope="module")
def whole(fatal):
    """The run of two processes without an error."""
    codes = in_processes(2, command, *arguments(fatal, "whole"), folder=fatal / "output")
    assert codes == [0, 0], (fatal / "output/err-0").read_text()
    return fatal / "whole/run"


def arguments(folder, name, *more):
    """Of sigmix train for a run in ``folder/NAME``: a step sees 4 prompts, 2 in each of two processes."""
    return ["train", "--task", folder / "fatal.py:Fatal", "--base", folder / "base", "--out", folder / name / "x",
            "--run", folder / name / "run", "--max-steps", 5, "--generation-batch-size", 16, "--num-generations", 4,
            "--eval-steps", 2, "--learning-rate", "0.02", "--max-eval-samples", 4, "--test-n", 4, "--dtype", "float32",
            *more]  # fmt: skip


def plan(folder, rank, step, what):
    """What happens in a process at the first reply that it judges in a step."""
    (folder / "plan").write_text(f"{rank} {place_of(step, rank)} {what}")


def place_of(step: int, rank: int) -> str:
    """The question that a process judges in a step and not before."""
    from sigmix.train.rollout import PromptStream

    numbers = PromptStream([str(i) for i in range(20)], 4, 0).step(step)  # type: ignore[list-item]
    return f"{numbers[2 * rank]}?"


def final_z(run: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(run / "checkpoint/state.safetensors").items() if k.startswith("parameter")}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def said(folder: Path, rank: int) -> list[str]:
    return [line for line in (folder / f"err-{rank}").read_text().splitlines() if line.startswith("sigmix: ")]


def steps_on_disk(run: Path) -> int:
    return json.loads((run / "checkpoint/state.json").read_text())["step"]


def one_process(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sigmix", *map(str, arguments)])
    main()


@pytest.mark.slow
def test_a_killed_worker_under_the_launcher(fatal, whole, tmp_path, monkeypatch):
    plan(fatal, 1, 3, "die")
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes",
              "2", "--main_process_port", "0", "-m", "sigmix", *arguments(fatal, "cut")]  # fmt: skip
    done = subprocess.run(
        list(map(str, launch)), capture_output=True, text=True, timeout=SECONDS,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode != 0
    assert not (fatal / "plan").exists(), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("sigmix: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("sigmix: process 0 of 2")
    assert "--resume" in lines[0]
    assert steps_on_disk(fatal / "cut/run") == 3  # the last whole step, though the last validation was after 2
    shutil.copytree(fatal / "cut", fatal / "other")

    resumed = in_processes(2, command, *arguments(fatal, "cut", "--resume"), folder=tmp_path)
    assert resumed == [0, 0], (tmp_path / "err-0").read_text()
    assert same(final_z(fatal / "cut/run"), final_z(whole))
    one_process(arguments(fatal, "other", "--resume"), monkeypatch)  # another number of processes
    torch.testing.assert_close(parameters(fatal / "other/run"), parameters(whole), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_killed_main_process(fatal, whole, tmp_path):
    plan(fatal, 0, 3, "die")
    assert in_processes(2, command, *arguments(fatal, "main"), folder=tmp_path) == [-signal.SIGKILL, 1]
    (line,) = said(tmp_path, 1)
    assert line.startswith("sigmix: process 1 of 2: ")
    assert "--resume" in line
    assert steps_on_disk(fatal / "main/run") == 2  # what it had saved
    assert in_processes(2, command, *arguments(fatal, "main", "--resume"), folder=tmp_path) == [0, 0]
    assert same(final_z(fatal / "main/run"), final_z(whole))


@pytest.mark.parametrize("shard", [False, True])
def test_an_error_in_one_process_ends_all(fatal, tmp_path, shard):
    plan(fatal, 1, 1, "raise")
    more = ["--shard"] if shard else []
    codes = in_processes(2, command, *arguments(fatal, f"error-{shard}", *more), folder=tmp_path)
    assert codes == [1, 1]
    (line,) = said(tmp_path, 1)
    assert "ZeroDivisionError: the verifier is broken" in line
    others = said(tmp_path, 0)
    if shard:  # the other process waits inside a forward pass
        assert len(others) == 1
        assert "--resume" in others[0]
    else:
        assert not others


def test_invalid_input_is_reported_once(fatal, tmp_path):
    codes = in_processes(2, command, *arguments(fatal, "odd", "--generation-batch-size", 12), folder=tmp_path)
    assert codes == [2, 2]
    assert said(tmp_path, 1) == []
    (line,) = said(tmp_path, 0)
    assert "--generation-batch-size" in line
    assert "8" in line
    assert not (fatal / "odd/run").exists()


def test_shard_requires_several_processes(fatal, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        one_process(arguments(fatal, "alone", "--shard"), monkeypatch)
    assert left.value.code == 2
    assert "accelerate launch" in capsys.readouterr().err


def test_shares_are_contiguous_and_complete():
    for count in range(1, 6):
        for number in range(12):
            shares = []
            for rank in range(count):
                shares.append(Processes(rank, count).share(number))
            assert [i for share in shares for i in range(number)[share]] == list(range(number))
            sizes = [share.stop - share.start for share in shares]
            assert max(sizes) - min(sizes) <= 1
