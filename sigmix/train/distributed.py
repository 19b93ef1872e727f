"""The processes of one run: which share of the work is this one's, and what all of them must agree on.

    accelerate launch --num_processes 8 -m sigmix train …      (or torchrun --nproc_per_node 8 -m -- sigmix …)

starts as many equal processes; accelerate's `PartialState` makes them a group (NCCL on GPUs, gloo on CPUs) and gives
each its device. Here is only what a training run does with that: take a share, gather what was found, add up gradients.
With one process everything here is the plain call, without any group.

An error anywhere ends the run everywhere: `gather` carries a failure to all processes, and one of them speaks
(`one_voice`). A process that is killed cannot say so; the others see a broken connection or the launcher's SIGTERM, and
both become `ProcessLostError`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sigmix.errors import ConfigError, SigmixError
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import fingerprint
from sigmix.models import weights
from sigmix.models.digests import weight_digest
from sigmix.svf.config import SVFConfig
from sigmix.svf.linears import factors_of, linears
from sigmix.svf.tuner import svf_layers
from sigmix.tasks.base import Sample
from sigmix.train.config import TrainConfig
from sigmix.train.policy import PeftPolicy, SVFPolicy, make_policy
from sigmix.utils.cache import cache_dir

T = TypeVar("T")


DRIFTED = "all processes need the same software and kind of device; go on from the last checkpoint with --resume"


PATIENCE = timedelta(hours=2)
"""How long a process waits for the others at one point. Long, since a verifier or a decomposition may be slow; one that
died is noticed at once, whatever this says."""


class ProcessError(SigmixError):
    """Another process of the same run failed; the message is its own."""


class ProcessLostError(SigmixError):
    """Another process of the same run ended without a word, or the launcher ended this one."""


class Terminated(BaseException):
    """SIGTERM inside `Processes.one_voice`, which makes a `ProcessLostError` of it.

    No `Exception`, like KeyboardInterrupt: it comes in the middle of anything, and a verifier that catches all errors
    of a reply must not take it for one.
    """


class Processes:
    """This process among those of a run.

    Attributes:
        rank: of this one, from 0. count: how many there are. main: whether this one writes the files and speaks.
        device: where this process computes; None with one process, where the base's own place decides.
        meets: set where the base is sharded, so that processes wait for each other inside of passes too.
    """

    def __init__(self, state: Any = None) -> None:
        self._state = state
        self.rank: int = state.process_index if state else 0
        self.count: int = state.num_processes if state else 1
        self.device: torch.device | None = state.device if state else None
        self.meets = False
        self._told_to_end = False

    @classmethod
    def launched(cls) -> Processes:
        """Join the processes that a launcher started (torchrun's environment variables); just this one without any.

        Raises:
            ConfigError: more processes on this machine than it has GPUs, or WORLD_SIZE without what launchers set
                beside it.
        """
        if not launched():
            return cls()
        from accelerate import PartialState

        gpus, local = torch.cuda.device_count(), number("LOCAL_WORLD_SIZE", 1)
        if 0 < gpus < local:
            if number("LOCAL_RANK", 0):
                sys.exit(ConfigError.exit_code)  # there is no group yet, and one message is enough
            raise ConfigError(
                f"{local} processes were started on a machine with {gpus} GPUs",
                remedy=f"start {gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU",
            )
        return cls(PartialState(cpu=not gpus, timeout=PATIENCE))

    @property
    def main(self) -> bool:
        return self.rank == 0

    # ------------------------------------------------------------------ sharing work

    def share(self, number: int) -> slice:
        """Which of `number` things in a row are this process's: contiguous, in the order of ranks, sizes within 1."""
        return slice(number * self.rank // self.count, number * (self.rank + 1) // self.count)

    def gather(self, work: Callable[[], T], meeting: bool = False) -> list[T]:
        """Do some work on every process; returns all results, by rank. Results travel by pickle.

        Args:
            meeting: processes wait for each other inside the work (a sharded base). Then a failure cannot be carried to
                the others: this process ends, and they find it gone.

        Raises:
            ProcessError: the work failed on another process. ProcessLostError: another process is gone. Whatever the
            work raised here.
        """
        if self.count == 1:
            return [work()]
        try:
            result = work()
        except Exception as error:
            if meeting:
                if _gone(error):
                    raise self._lost() from error
                _shared(error, self.rank)
            elif not isinstance(error, ProcessLostError):
                # the others may be told and gone, and the launcher's SIGTERM here, before this process has seen it
                with contextlib.suppress(ProcessLostError, Terminated):
                    self._exchange(None, error)
            raise
        return self._exchange(result)

    def from_main(self, work: Callable[[], T]) -> T:
        """What the main process finds; the others do nothing but wait for it. Errors as in `gather`."""
        return self.gather(work if self.main else lambda: None)[0]  # type: ignore[return-value]

    def alike(self, work: Callable[[], T]) -> T:
        """Do what gives the same on every process, without meeting: an error, which all have then, is told once."""
        try:
            return work()
        except Exception as error:
            _shared(error, 0)
            raise

    def add_up(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by the sum over all processes, in one transfer of float32."""
        if self.count == 1:
            return
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([grad.float().flatten() for grad in grads])
        with self._together():
            torch.distributed.all_reduce(flat)
        sizes = [p.numel() for p in parameters]
        for parameter, grad, total in zip(parameters, grads, flat.split(sizes), strict=True):
            parameter.grad = total.view_as(grad).to(grad.dtype)

    def anyone(self, here: bool) -> bool:
        """Whether it is so on any process."""
        if self.count == 1:
            return here
        flag = torch.tensor([float(here)], device=self.device)
        with self._together():
            torch.distributed.all_reduce(flag)
        return bool(flag.item())

    def check_equal(self, tensors: Mapping[str, torch.Tensor], what: str, remedy: str = DRIFTED) -> None:
        """Raise unless all processes hold the same bytes.

        Raises:
            ProcessError: they do not, so the run is no longer one run.
        """
        if self.count == 1:
            return
        digest = hashlib.sha256()
        for name in sorted(tensors):
            raw = tensors[name].detach().cpu().contiguous().view(torch.uint8)
            digest.update(name.encode() + raw.numpy().tobytes())
        self.check_same(lambda: {"other numbers": digest.hexdigest()}, remedy, f"{what}: ")

    def check_same(self, work: Callable[[], Mapping[str, str]], remedy: str, where: str = "") -> None:
        """Raise unless all processes find the same digests.

        Args:
            work: gives digests by what a process with another one holds, such as "another base". The first that differs
                is told. remedy, where: end and beginning of the message.

        Raises:
            ProcessError: they differ. Whatever the work raises, as in `gather`.
        """
        if self.count == 1:
            return
        told = self.gather(lambda: dict(work()))
        for held, digest in told[0].items():
            if other := [rank for rank, found in enumerate(told) if found.get(held) != digest]:
                message = f"{where}process {other[0]} of {self.count} holds {held} than process 0"
                raise _shared(ProcessError(message, remedy=remedy), 0)

    # ------------------------------------------------------------------ trouble

    @contextlib.contextmanager
    def one_voice(self) -> Iterator[None]:
        """Around a whole command: an error on any process ends all of them, and one of them says why.

        SIGTERM, with which launchers end the others when one process is gone, raises `ProcessLostError` from here.
        Inside it is a `Terminated`; where something swallows even that, the next transfer raises it again.
        """
        if self.count == 1:
            yield
            return
        before = signal.signal(signal.SIGTERM, self._terminated)
        try:
            yield
            self._state.destroy_process_group()
        except Terminated:
            self.ending()
            raise ProcessLostError(
                f"process {self.rank} of {self.count} was told to end (SIGTERM), as launchers do when another one is "
                "gone",
                remedy="go on from the last checkpoint with --resume",
            ) from None
        except KeyboardInterrupt:
            self.ending()
            if not self.main:
                sys.exit(130)
            raise
        except Exception as error:
            self.ending()
            if not (hasattr(error, "sigmix_speaker") or isinstance(error, ProcessLostError) or self.meets):
                with contextlib.suppress(ProcessError, ProcessLostError, Terminated):
                    self._exchange(None, error)
            if getattr(error, "sigmix_speaker", self.rank) != self.rank:
                sys.exit(getattr(error, "exit_code", 1))
            raise
        finally:
            if signal.getsignal(signal.SIGTERM) == self._terminated:  # else there is still something to say
                signal.signal(signal.SIGTERM, before)

    def ending(self) -> None:
        """This process is ending by itself, and the launcher's SIGTERM need not stop it from saving and saying why."""
        if signal.getsignal(signal.SIGTERM) == self._terminated:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _terminated(self, *_: object) -> None:
        self.ending()
        self._told_to_end = True
        raise Terminated

    def _exchange(self, result: Any, error: Exception | None = None) -> list[Any]:
        """All results by rank; an error on any process raises on all (here: `error` itself is left to the caller)."""
        from accelerate.utils import gather_object

        failure = None
        if error is not None:
            exit_code = error.exit_code if isinstance(error, SigmixError) else 1
            failure = (str(error) if isinstance(error, SigmixError) else f"{type(error).__name__}: {error}", exit_code)
        with self._together():
            found = gather_object([(result, failure)])
        found[self.rank] = (result, failure)  # the very objects, which may hold more than a pickle does
        for rank, (_, failed) in enumerate(found):
            if failed is not None:
                if error is not None:
                    _shared(error, rank)
                    return []
                made = ProcessError(f"process {rank} of {self.count}: {failed[0]}")
                made.exit_code = failed[1]
                raise _shared(made, rank)
        return [one for one, _ in found]

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Around a transfer: a process that is gone breaks it."""
        if self._told_to_end:
            raise Terminated
        try:
            yield
        except RuntimeError as error:  # gloo's own, and torch's DistBackendError
            raise self._lost() from error

    def _lost(self) -> ProcessLostError:
        return ProcessLostError(
            f"process {self.rank} of {self.count}: another process of this run is gone",
            remedy="see above or in the launcher's report which and why; go on from the last checkpoint with --resume",
        )


def _gone(error: Exception) -> bool:
    """Whether an error of some work is that of a broken connection; out of memory is a RuntimeError too."""
    broken = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
    return isinstance(error, RuntimeError) and broken


def _shared(error: Any, speaker: int) -> Any:
    """Mark an error that the others need not be told of (any more); `speaker` is to print it."""
    error.sigmix_speaker = speaker
    return error


# --- The environment variables with which torchrun and accelerate launch tell a process which of how many it is.


NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


REMEDY = "start the processes with torchrun or accelerate launch, or for one process unset WORLD_SIZE"


def launched() -> bool:
    """Whether a launcher started several processes, this one among them.

    Raises:
        ConfigError: its variables are not complete, as where another program has set WORLD_SIZE, or no numbers.
    """
    count = number("WORLD_SIZE", 1)
    if count < 2:
        return False
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        raise ConfigError(
            f"the environment variable WORLD_SIZE says that this is one of {count} processes, but {', '.join(missing)} "
            "of a launcher's variables are not set",
            remedy=REMEDY,
        )
    for name in NEEDED:
        if name != "MASTER_ADDR":
            number(name, 0)
    if not 0 <= (rank := number("RANK", 0)) < count:
        raise ConfigError(f"the environment variable RANK is {rank}, and WORLD_SIZE {count}", remedy=REMEDY)
    return True


def number(name: str, default: int) -> int:
    """The value of a variable, or the default where it is not set.

    Raises:
        ConfigError: it is no whole number.
    """
    given = os.environ.get(name) or str(default)
    try:
        return int(given)
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {given!r}, not a whole number", remedy=REMEDY) from None


# --- A base that does not fit one device, spread over the processes of a run with torch's FSDP2 (`fully_shard`).


def shared_policy(base: Any, config: TrainConfig, processes: Processes, shard: bool) -> SVFPolicy | PeftPolicy:
    """The policy of a run of one or several processes, which hold the same base and the same decompositions.

    Raises:
        ConfigError: `shard` where there is one process only, with another policy than SVF, with the reference
            parameterisation, or for a base that is quantised, offloaded or without blocks; LoRA's dropout in several
            processes. ProcessError: processes hold different bases or decompositions.
    """
    if processes.count > 1 and config.policy == "lora" and config.lora_dropout:
        raise ConfigError(
            f"with lora_dropout {config.lora_dropout} the result would depend on the number of processes: each draws "
            "what it drops by itself",
            remedy="leave lora_dropout at 0, or start one process",
        )
    if shard:
        _check_shardable(base, config, processes)
    if processes.count == 1:
        return make_policy(base, config)
    paths: list[str] = []
    if config.policy == "svf":
        paths = processes.gather(lambda: _decompose_share(base, config, processes))[processes.rank]
    if not shard:
        policy = make_policy(base, config)
        layers = svf_layers(policy.model)
        _check_same(policy.model, ((path, layers[path].svf_short) for path in paths), processes)
        return policy
    modules = linears(base)
    _check_same(base, ((path, factors_of(modules[path]).short) for path in paths), processes)
    made: list[ShardedPolicy] = []
    processes.gather(lambda: made.append(ShardedPolicy(base, config, processes)))
    return made[0]


def check_text(samples: Sequence[Sample]) -> None:
    """Raise `ConfigError` if a sample shows images, which are read outside the passes that gather a sharded base."""
    if shown := next((sample for sample in samples if sample.images), None):
        raise ConfigError(
            f"--shard reads text only, and sample {shown.id} shows {shown.images[0].name}",
            remedy="leave out --shard, or choose a task without images",
        )


def skeleton(base: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are on the meta device, without values; buffers are copied.

    What a parameter has beside shape and dtype is left behind: a quantised one becomes an empty plain one, and an
    offloaded one has no disk to be read from.
    """
    # not empty_like, which quantised tensors do not know
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
        for p in base.parameters()
    }
    memo |= {id(module._hf_hook): None for module in base.modules() if weights.is_offloaded(module)}
    return copy.deepcopy(base, memo)


def _check_shardable(base: Any, config: TrainConfig, processes: Processes) -> None:
    if processes.count == 1:
        raise ConfigError(
            "a base is sharded over several processes, and this is one",
            remedy="start them with accelerate launch or torchrun, or leave out --shard",
        )
    if config.policy != "svf" or config.parametrization != "direct":
        raise ConfigError("--shard goes with the svf policy in its direct parameterisation only")
    kinds = {weights.kind(module) for module in linears(base).values()}
    if unfit := sorted(kinds & {weights.QUANTIZED, weights.OFFLOADED}):
        raise ConfigError(
            f"--shard splits plain weights, and this base is {unfit[-1]}",
            remedy="leave out --shard, or load the base without quantization and offloading",
        )
    _blocks(base)


def _targets(config: TrainConfig) -> SVFConfig:
    return SVFConfig(target_modules=config.target_modules, layers_to_transform=config.layers_to_transform)


def _decompose_share(base: nn.Module, config: TrainConfig, processes: Processes) -> list[str]:
    """Put this process's share of the decompositions into the cache, so that each is computed once.

    Returns:
        The paths of all layers that the policy adapts.
    """
    layers = svf_layers(get_peft_model(skeleton(base), _targets(config)))
    modules = linears(base)
    for path in sorted(layers, key=lambda path: (-layers[path].r, path))[processes.rank :: processes.count]:
        factors_of(modules[path])
    return list(layers)


def _check_same(model: nn.Module, shorts: Iterable[tuple[str, torch.Tensor]], processes: Processes) -> None:
    """Raise `ProcessError` unless all processes hold the same base and the same short sides, one in memory at a time.

    Gradients of z from other decompositions would be added up as if they belonged to the same components. Machines
    without a common cache can differ so, because near-equal singular values let hardware rotate their vectors.
    """

    def work() -> dict[str, str]:
        sides = {f"another decomposition of {path}": weight_digest(short) for path, short in shorts}
        return {"another base": fingerprint(model), **sides}

    processes.check_same(
        work,
        "give all machines the same files of the base and the same decompositions: a cache folder that they share "
        f"(SIGMIX_CACHE), or copies of {cache_dir() / 'svd'} of process 0's machine",
    )


class ShardedPolicy(SVFPolicy):
    """`SVFPolicy` on a sharded base.

    Args:
        base: a whole model on the CPU, which stays as it is. processes: at least two.
    """

    sharded = True

    def __init__(self, base: nn.Module, config: TrainConfig, processes: Processes) -> None:
        self.base, self.processes = base, processes
        self._answering = False
        super().__init__(base, config)
        for layer in self.layers.values():
            layer.form = "gain"
        processes.meets = True  # from the first pass on; until here an error can still be carried to the others

    def _wrapped(self, base: nn.Module, targets: SVFConfig) -> nn.Module:
        device = self.processes.device or torch.device("cpu")
        empty = skeleton(base)
        model: Any = get_peft_model(empty, targets).eval()
        values = dict(base.named_parameters(remove_duplicate=False))
        # every parameter of the skeleton knows which of the base's it stands for; tied ones are one
        meaning = {id(p): values[name] for name, p in _base_names(empty)}
        learnt = set()
        for layer in svf_layers(model).values():
            z = nn.Parameter(torch.ones(layer.r, device=device))
            layer.svf_z["default"].weight = z
            learnt.add(z)
        mesh = init_device_mesh(device.type, (self.processes.count,))
        for part in [*_blocks(empty), model]:
            _fill(part, meaning)
            fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=learnt)
        # before FSDP's own hook, which gathers weights
        model.register_forward_pre_hook(self._announce, prepend=True)
        return model

    def expert(self, name: str, meta: Mapping[str, Any]) -> Expert:
        """The current z as an expert, sealed for the base."""
        return Expert(name, self.z(), meta).sealed(self.base)

    @contextmanager
    def acting(self, z: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
        """As `SVFPolicy.acting`, in the gain form; leaves only when all processes do."""
        own = {path: parameter.data for path, parameter in self.parameters().items()}
        try:
            for path, parameter in self.parameters().items():
                parameter.data = own[path] if z is None else z[path].to(own[path])
            self._answering = True
            yield
            self._run_along()
        finally:
            self._answering = False
            for path, parameter in self.parameters().items():
                parameter.data = own[path]

    @contextmanager
    def learning(self) -> Iterator[None]:
        yield

    def _announce(self, *_: Any) -> None:
        if self._answering:
            self.processes.anyone(True)

    @torch.no_grad()
    def _run_along(self) -> None:
        device = self.processes.device or torch.device("cpu")
        while self.processes.anyone(False):
            self._answering = False  # the others announce this pass
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
            self._answering = True


def _base_names(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The base's parameters inside an adapted model, by the names that they have in the base."""
    return [
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ".svf_z." not in name
    ]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, as transformers names their classes.

    Raises:
        ConfigError: it names none, so there is nothing that could be gathered and freed on its own.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} names no blocks to shard by", remedy="leave out --shard, or choose another base"
        )
    return found


def _fill(module: nn.Module, meaning: Mapping[int, torch.Tensor]) -> None:
    """Give a module's empty parameters the base's values, and make the factors of its layers parameters too.

    Values are of the base's own storage: whoever moves them makes the copy.
    """
    made: dict[int, nn.Parameter] = {}  # a tied one must stay one
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = meaning[id(parameter)].data
                part.register_parameter(name, made.setdefault(id(parameter), nn.Parameter(value, requires_grad=False)))
    for layer in svf_layers(module).values():
        if layer.svf_short is None:
            layer.ensure_factors()
            short = layer.svf_short
            del layer.svf_short
            layer.register_parameter("svf_short", nn.Parameter(short, requires_grad=False))
