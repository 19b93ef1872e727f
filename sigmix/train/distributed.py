"""Training in several processes: shared work, gathered results, summed gradients, and errors that end all of them.

    accelerate launch --num_processes 8 -m sigmix train …      (or torchrun --nproc_per_node 8 -m -- sigmix …)

accelerate's `PartialState` joins the processes (NCCL on GPUs, gloo on CPUs) and assigns their devices. `Processes`
splits the work, gathers results, sums gradients, and ends all processes if one fails. With one process it adds nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from sigmix.errors import ConfigError, SigmixError

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
