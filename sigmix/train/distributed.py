"""Training in several processes: data parallelism, and a base model sharded with FSDP2.

    accelerate launch --num_processes 8 -m sigmix train …      (or torchrun --nproc_per_node 8 -m -- sigmix …)

accelerate's `PartialState` joins the processes (NCCL on GPUs, gloo on CPUs) and assigns their devices. `Processes`
splits the work, gathers results, sums gradients, and ends all processes if one fails. With one process it adds nothing.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import fully_shard

from sigmix.errors import ConfigError, SigmixError
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import fingerprint
from sigmix.models import weights
from sigmix.models.digests import weight_digest
from sigmix.svf.config import SVFConfig
from sigmix.svf.linears import factors_of, shape_of
from sigmix.svf.tuner import svf_layers, target_layers
from sigmix.tasks.base import Sample
from sigmix.train.config import TrainConfig
from sigmix.train.policy import Policy, SVFPolicy, make_policy, svf_config
from sigmix.utils.cache import cache_dir

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""Timeout of a collective operation; a grader or a decomposition may be slow. A dead process is noticed at once."""


class ProcessError(SigmixError, RuntimeError):
    """Another process of the run failed; it reports the error itself."""


class ProcessLostError(SigmixError, ConnectionError):
    """Another process of the run was killed, or the launcher terminated this one."""


class Terminated(KeyboardInterrupt):
    """SIGTERM. Not an Exception, so that no grader swallows it."""


class Processes:
    """The processes of a training run.

    Attributes:
        rank: index of this process. world_size: number of processes.
        device: device of this process; None with one process, where the base's placement decides.
        collective_forward: True once forward passes communicate (a sharded base).
    """

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.collective_forward = False
        self._failed = False

    @classmethod
    def from_environment(cls) -> Processes:
        """Join the processes that torchrun or accelerate launch started; without a launcher, this process alone.

        Raises:
            ConfigError: the launcher's environment variables are incomplete or invalid, or there are more processes
                than GPUs on this machine.
        """
        names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
        values = {name: os.environ.get(name, "") for name in names}
        if values["WORLD_SIZE"] in ("", "0", "1"):
            return cls()
        invalid = [name for name in names if not (values[name] if name == "MASTER_ADDR" else values[name].isdecimal())]
        if not invalid and int(values["RANK"]) >= int(values["WORLD_SIZE"]):
            invalid = ["RANK", "WORLD_SIZE"]
        if invalid:
            listed = ", ".join(f"{name}={values[name]!r}" for name in invalid)
            raise ConfigError(
                f"environment variables of a distributed launcher are missing or invalid: {listed}",
                remedy="start the processes with torchrun or accelerate launch, or for one process unset WORLD_SIZE",
            )
        gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if 0 < gpus < local:
            if values["LOCAL_RANK"] != "0":
                sys.exit(ConfigError.exit_code)  # local rank 0 reports the error
            raise ConfigError(
                f"{local} processes were started on a machine with {gpus} GPUs",
                remedy=f"start {gpus}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU",
            )
        from accelerate import PartialState

        state = PartialState(cpu=not gpus, timeout=TIMEOUT)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """True if this process writes files and prints."""
        return self.rank == 0

    # ------------------------------------------------------------------ work

    def share(self, count: int) -> slice:
        """Return this process's contiguous share of ``count`` items; sizes differ by at most 1."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def gather(self, work: Callable[[], T], collective: bool = False) -> list[T]:
        """Run ``work`` in every process and return all results by rank. Other processes' results are pickled.

        Args:
            collective: ``work`` communicates by itself (forward passes of a sharded base). Its failure cannot be sent
                to the other processes; they find the connection broken.

        Raises:
            ProcessError: the work failed in another process, of a lower rank if it failed here too.
            ProcessLostError: another process is gone.
        """
        if self.world_size == 1:
            return [work()]
        try:
            result = work()
        except Exception as error:
            if not collective:
                self._exchange(None, error)
            self._failed = True
            if _connection_lost(error):
                raise self._lost() from error
            raise
        return self._exchange(result)

    def from_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the main process and return its result in all. Errors as in `gather`."""
        return self.gather(work if self.is_main else lambda: None)[0]  # type: ignore[return-value]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes, with one all-reduce in float32."""
        if self.world_size == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self._all_reduce(torch.cat([grad.float().flatten() for grad in grads]))
        for parameter, grad, total in zip(parameters, grads, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = total.view_as(grad).to(grad.dtype)

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is True in any process."""
        return flag if self.world_size == 1 else bool(self._all_reduce(torch.tensor([float(flag)])).item())

    def check_equal(self, digests: Callable[[], Mapping[str, str]], remedy: str) -> None:
        """Compare {what: digest} of all processes.

        Raises:
            ConfigError: a digest differs; `ProcessError` in processes other than the main one.
        """
        gathered = self.gather(lambda: dict(digests())) if self.world_size > 1 else []

        def compare() -> None:
            for rank, other in enumerate(gathered):
                if differing := [what for what, digest in gathered[0].items() if other.get(what) != digest]:
                    message = f"process {rank} of {self.world_size} has another {differing[0]} than process 0"
                    raise ConfigError(message, remedy=remedy)

        self.from_main(compare)

    # ------------------------------------------------------------------ errors

    @contextmanager
    def report_once(self) -> Iterator[None]:
        """End all processes if the wrapped command fails in one, which alone reports the error.

        SIGTERM, by which launchers end the remaining processes, becomes `ProcessLostError`; of a single process it ends
        the run as Ctrl-C does.
        """
        previous = signal.signal(signal.SIGTERM, _terminate)
        if self.world_size == 1:
            try:
                yield
            finally:
                signal.signal(signal.SIGTERM, previous)
            return
        try:
            yield
            torch.distributed.destroy_process_group()
        except Terminated:
            raise ProcessLostError(
                f"process {self.rank} of {self.world_size} was terminated (SIGTERM), as launchers do when another "
                "process is gone",
                remedy="continue from the last checkpoint with --resume",
            ) from None
        except KeyboardInterrupt:
            if not self.is_main:
                sys.exit(130)
            raise
        except Exception as error:
            self.ignore_sigterm()
            reported = self._first_error(error)
            if isinstance(reported, ProcessError):
                sys.exit(reported.exit_code)
            get_error_handler().record_exception(reported)  # for the launcher's own report
            raise
        else:
            signal.signal(signal.SIGTERM, previous)

    def ignore_sigterm(self) -> None:
        """Ignore the launcher's SIGTERM while this process ends by itself: saves a checkpoint, reports an error."""
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _first_error(self, error: Exception) -> Exception:
        """Return the error that is reported: of the lowest rank, once the others have been informed."""
        if not (self._failed or self.collective_forward or isinstance(error, ProcessLostError)):
            try:
                self._exchange(None, error)
            except Exception as first:
                return first
        return error

    def _exchange(self, result: Any, error: Exception | None = None) -> list[Any]:
        """All-gather results; if any process has an error, raise its own in the first such process."""
        from accelerate.utils import gather_object

        failure = None
        if error is not None:
            self.ignore_sigterm()
            message = str(error) if isinstance(error, SigmixError) else f"{type(error).__name__}: {error}"
            failure = (message, getattr(error, "exit_code", 1))
        try:
            gathered = gather_object([(result, failure)])
        except RuntimeError as lost:
            raise (error or self._lost()) from lost
        failures = [(rank, failed) for rank, (_, failed) in enumerate(gathered) if failed is not None]
        if not failures:
            gathered[self.rank] = (result, None)  # the object itself
            return [one for one, _ in gathered]
        self._failed = True
        rank, (message, exit_code) = failures[0]
        if rank == self.rank and error is not None:
            raise error
        failed = ProcessError(f"process {rank} of {self.world_size}: {message}")
        failed.exit_code = exit_code
        raise failed from error

    def _all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.device)
        try:
            torch.distributed.all_reduce(tensor)
        except RuntimeError as error:
            raise self._lost() from error
        return tensor

    def _lost(self) -> ProcessLostError:
        return ProcessLostError(
            f"process {self.rank} of {self.world_size}: another process of this run is gone",
            remedy="see the output above or the launcher's report; continue from the last checkpoint with --resume",
        )


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _connection_lost(error: Exception) -> bool:
    # gloo raises plain RuntimeErrors; out of memory is one too
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


# ---------------------------------------------------------------------- policies


def build_policy(base: nn.Module, config: TrainConfig, processes: Processes, shard: bool) -> Policy:
    """Return the policy of a run, after checking that all processes have the same base and decompositions.

    Gradients of z from different decompositions must not be summed. Machines without a common cache can disagree,
    because near-equal singular values let the hardware rotate their singular vectors.

    Raises:
        ConfigError: ``shard`` with one process, another policy than SVF, the reference parametrization, or a base that
            is quantized, offloaded or without decoder blocks; LoRA dropout in several processes; processes differ.
    """
    if processes.world_size > 1 and config.policy == "lora" and config.lora_dropout:
        raise ConfigError(
            f"lora_dropout {config.lora_dropout} draws differently in each process, so that the result would depend on "
            "their number",
            remedy="set lora_dropout to 0, or start one process",
        )
    if shard:
        _check_shardable(base, config, processes)
    if processes.world_size == 1:
        return make_policy(base, config)
    if config.policy == "svf":
        processes.gather(lambda: _decompose_share(base, config, processes))
    policy: Policy = ShardedPolicy(base, config, processes) if shard else make_policy(base, config)

    def digests() -> dict[str, str]:
        if isinstance(policy, ShardedPolicy):
            return policy.digests
        layers = svf_layers(policy.model)
        sides = {f"decomposition of {path}": weight_digest(layer.svf_short) for path, layer in layers.items()}
        return {"base": fingerprint(policy.model), **sides}

    processes.check_equal(
        digests,
        "give all machines the same files of the base and the same decompositions: a cache folder that they share "
        f"(SIGMIX_CACHE), or copies of {cache_dir() / 'svd'} of process 0's machine",
    )
    return policy


def check_text(samples: Sequence[Sample]) -> None:
    """Raise `ConfigError` if a sample contains images: they are embedded outside the passes that gather weights."""
    if sample := next((sample for sample in samples if sample.images), None):
        raise ConfigError(
            f"--shard supports text only, and sample {sample.id} contains {sample.images[0].name}",
            remedy="leave out --shard, or choose a task without images",
        )


def _decompose_share(base: nn.Module, config: TrainConfig, processes: Processes) -> None:
    """Decompose this process's share of the layers into the cache, so that each is decomposed once."""
    layers = target_layers(base, svf_config(config))
    order = sorted(layers, key=lambda path: (-min(shape_of(layers[path])), path))
    for path in order[processes.rank :: processes.world_size]:
        factors_of(layers[path])


def _check_shardable(base: nn.Module, config: TrainConfig, processes: Processes) -> None:
    if processes.world_size == 1:
        raise ConfigError(
            "--shard requires several processes",
            remedy="start them with accelerate launch or torchrun, or leave out --shard",
        )
    if config.policy != "svf" or config.parametrization != "direct":
        raise ConfigError("--shard requires policy svf in its direct parametrization")
    kinds = {weights.kind(layer) for layer in target_layers(base, svf_config(config)).values()}
    if unsupported := sorted(kinds & {weights.QUANTIZED, weights.OFFLOADED}):
        raise ConfigError(
            f"--shard splits plain weights, and this base is {unsupported[-1]}",
            remedy="leave out --shard, or load the base without quantization and offloading",
        )
    _blocks(base)


class ShardedPolicy(SVFPolicy):
    """`SVFPolicy` with weights and factors sharded over the processes, one decoder block at a time (FSDP2).

    Every forward pass is collective. Only the gain form runs, since merging would need whole weights.

    Args:
        base: whole model on the CPU, which stays as it is. processes: at least two.

    Attributes:
        digests: of the base and of each decomposition, taken before they are split.
    """

    sharded = True

    def __init__(self, base: nn.Module, config: TrainConfig, processes: Processes) -> None:
        self.base, self.processes = base, processes
        self.digests = {"base": fingerprint(base)}
        self._announcing = False
        super().__init__(base, config)
        processes.collective_forward = True

    def _inject(self, base: nn.Module, config: SVFConfig) -> PeftModel:
        device = self.processes.device or torch.device("cpu")
        # a copy on the meta device, filled block by block, so that no more than one block's factors are whole
        meta = {p: nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in base.parameters()}
        source = {id(empty): parameter for parameter, empty in meta.items()}
        skeleton = copy.deepcopy(base, {id(parameter): empty for parameter, empty in meta.items()})
        model: Any = get_peft_model(skeleton, config).eval()
        layers = svf_layers(model)
        z = set()
        for layer in layers.values():
            layer.svf_z["default"].weight = nn.Parameter(torch.ones(layer.r, device=device))
            z.add(layer.svf_z["default"].weight)
        paths = {layer: path for path, layer in layers.items()}
        mesh = init_device_mesh(device.type, (self.processes.world_size,))
        for block in [*_blocks(skeleton), model]:
            _fill(block, source)
            for layer in svf_layers(block).values():
                if layer.svf_short is None:
                    layer.ensure_factors()
                    short = layer.svf_short
                    self.digests[f"decomposition of {paths[layer]}"] = weight_digest(short)
                    del layer.svf_short
                    layer.register_parameter("svf_short", nn.Parameter(short, requires_grad=False))
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=z)
        model.register_forward_pre_hook(self._announce, prepend=True)  # before FSDP's hook, which gathers weights
        return model

    def expert(self, name: str, meta: Mapping[str, Any]) -> Expert:
        """Return the current z as an expert of the base."""
        return Expert(name, self.z(), {**meta, "positions": self.positions}).sealed(self.base)

    @contextmanager
    def acting(self, z: Mapping[str, torch.Tensor] | None = None, tokens: int | None = None) -> Iterator[None]:
        """Apply the policy's z, or another one, for inference; returns when all processes have finished.

        A process with fewer passes than the others (shorter completions) runs empty ones along, since every pass is
        collective.
        """
        own = {path: parameter.data for path, parameter in self.parameters().items()}
        try:
            for path, parameter in self.parameters().items():
                parameter.data = own[path] if z is None else z[path].to(own[path])
            self._announcing = True
            with self.learning():
                yield
            self._run_along()
        finally:
            self._announcing = False
            for path, parameter in self.parameters().items():
                parameter.data = own[path]

    def _announce(self, *_: Any) -> None:
        if self._announcing:
            self.processes.any(True)

    @torch.no_grad()
    def _run_along(self) -> None:
        while self.processes.any(False):
            self._announcing = False  # the other processes announced this pass
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.processes.device), use_cache=False)
            self._announcing = True


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks, by transformers' ``_no_split_modules``.

    Raises:
        ConfigError: the model's class names none.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        message = f"{type(model).__name__} names no decoder blocks (_no_split_modules) to shard by"
        raise ConfigError(message, remedy="leave out --shard, or choose another base")
    return blocks


def _fill(module: nn.Module, source: Mapping[int, nn.Parameter]) -> None:
    """Replace a module's meta parameters by the base's values, without a copy."""
    filled: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                key = id(parameter)
                value = filled.setdefault(key, nn.Parameter(source[key].data, requires_grad=False))
                part.register_parameter(name, value)
