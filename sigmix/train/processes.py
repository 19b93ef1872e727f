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
import hashlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch

from sigmix.errors import ConfigError, SigmixError
from sigmix.train.environment import launched, number

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
