"""Compiled decode step on a CPU: one call for a token of every row, in place of transformers' modules.

A process of its own compiles the step (`sigmix.engine.cpu.decode_export`); the result is cached. Until it is ready, and
wherever it does not apply, the model's own forward pass runs. Before its first use it is compared with that pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from sigmix.engine.cpu.kernels import joint_linear
from sigmix.engine.cpu.native import Table, has_kernels, set_layers
from sigmix.engine.kv_cache import BatchKVCache
from sigmix.errors import BaseModelError
from sigmix.models.batching import batching
from sigmix.models.multimodal import bare
from sigmix.models.weights import weights_key
from sigmix.svf.layer import SVFLinear
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import read_json_object

log = logging.getLogger(__name__)

VERSION = 3
"""Version of the compiled files."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.06}
"""Largest difference from the model's own forward pass, in units of the largest logit."""

OPERATORS = torch.library.Library("sigmix", "FRAGMENT")
OPERATORS.define("linear(Tensor x, int number, int out_features) -> Tensor")
_present = threading.local()


def _linear(x: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    modules, joint = _present.linears[number]
    if joint is not None:
        return joint(x)
    outputs = [module(x) for module in modules]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


OPERATORS.impl("linear", _linear, "CPU")
LINEAR = torch.ops.sigmix.linear.default
"""Operator of a compiled step's linear layers that share their input; ``number`` selects them. They compute in the
present state of the model: packed, merged, quantized or with a z per row. A `NativeLinear` is called without Python."""


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Return the attention [B, 1, heads, d] of one query per row and head to grouped keys and values.

    Args:
        query: [B, heads, 1, d]. keys, values: [B, groups, P, d]. mask: bool or additive [B, 1 or heads, 1, P].
        softcap: 0: none.
    """
    rows, heads, _, width = query.shape
    groups = keys.shape[1]
    split = query.reshape(rows, groups, heads // groups, 1, width).float()
    scores = (split * keys[:, :, None].float()).sum(-1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        mask = mask[:, :, 0]
        mask = mask[:, None] if mask.shape[1] == 1 else mask.reshape(rows, groups, heads // groups, -1)
        scores = torch.where(mask, scores, float("-inf")) if mask.dtype == torch.bool else scores + mask
    shares = scores.softmax(-1)
    output = (shares[..., None] * values[:, :, None].float()).sum(-2)
    return output.to(query.dtype).reshape(rows, 1, heads, values.shape[-1])


OPERATORS.define(
    "attention(Tensor query, Tensor keys, Tensor values, Tensor mask, float scale, float softcap) -> Tensor"
)
OPERATORS.impl("attention", attention, "CPU")
ATTENTION = torch.ops.sigmix.attention.default
"""Operator of a compiled step's attention in C++, for masks of bool."""


class DecodeStep:
    """Compiled decode step of a model, from the cache or compiled in the background; for one thread at a time.

    Attributes:
        problem: reason for which there is no compiled step, or None.
    """

    def __init__(self, model: Any) -> None:
        self.model = bare(model)
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None
        self._package: Any = None
        self._linears: list[tuple[list[nn.Module], list[nn.Module]]] = []  # modules, and their unadapted layers
        self._places: dict[str, tuple[dict[str, Any], str]] = {}  # where modules hold the constants
        self._constants: list[torch.Tensor] = []  # parameters and buffers that are not of linear layers
        self._constants_key: Any = None
        self._compared: set[bool] = set()  # with one row, with several
        self._native = has_kernels()
        self._table: Table | None = None  # of native layers, in use by the step
        self.problem = _unsupported(self.model)
        if self.problem is None:
            self._config = _config(self.model)
            self.path = cache_dir() / "compiled" / f"{_key(self._config)}.pt2"
            self.problem = read_json_object(self.path.with_suffix(".json")).get("problem")
        if self.problem is None:
            self._start()
        else:
            log.info("no compiled decode step: %s", self.problem)

    @property
    def active(self) -> bool:
        """True if the step is loaded and has agreed with the model's own forward pass."""
        return self._package is not None and bool(self._compared)

    @property
    def ready(self) -> bool:
        """True if the step is compiled and loaded; loads it if it is in the cache."""
        if self._package is None and self.problem is None and (self._process is None or self._finished()):
            with self._failing("loaded"):
                if self.path.is_file():
                    self._load()
        return self._package is not None and self.problem is None

    def _start(self) -> None:
        if self.path.is_file():
            return
        with self._failing("compiled"):
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sigmix.engine.cpu.decode_export", str(self.path)],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors, start_new_session=True,
            )  # fmt: skip
            weakref.finalize(self, _stop, self._process)
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(self._config).encode())
            self._process.stdin.close()
            log.info("compiling the decode step in the background")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the step is ready; return False if there is none."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        return self.ready

    def __call__(self, inputs: Mapping[str, Any], cache: BatchKVCache) -> torch.Tensor:
        """Return the logits [B, V] after one more token of each row; only if `ready`.

        Args:
            inputs: from `BatchKVCache.inputs`; `BatchKVCache.advance` must follow.
        """
        several = len(cache) > 1
        if several in self._compared:
            return self._run(inputs, cache)
        with self._failing("run"):
            logits = self._run(inputs, cache)
        expected: torch.Tensor = self.model(**inputs).logits[:, -1]
        if self.problem is None and bool(expected.isfinite().all()):
            difference = float((logits - expected).abs().max() / expected.abs().max())
            if difference <= TOLERANCE[expected.dtype]:
                self._compared.add(several)
            else:
                self._give_up(f"its logits differ by {difference:.2g} of the largest one")
        return expected

    def _run(self, inputs: Mapping[str, Any], cache: BatchKVCache) -> torch.Tensor:
        # replaced parameters are passed on; one edited in place shares its memory with the step
        if weights_key(held[name] for held, name in self._places.values()) != self._constants_key:
            self._bind()
        linears = _present.linears = [(modules, joint_linear(layers)) for modules, layers in self._linears]
        if self._native:
            self._table = set_layers([joint for _, joint in linears], self._table)
        tokens, lengths = inputs["input_ids"][:, 0], inputs["position_ids"][:, 0]
        return self._package.loader.boxed_run([tokens, lengths, inputs["attention_mask"], *cache.columns()])[0]

    def _load(self) -> None:
        self._package = torch._inductor.aoti_load_package(str(self.path))
        paths = json.loads(self._package.get_metadata()["linears"])
        groups = [[self.model.get_submodule(path) for path in group] for group in paths]
        called = {module for group in groups for module in group}
        adapted = {name: one for name, one in self.model.named_modules() if isinstance(one, SVFLinear)}
        if missed := [name for name, one in adapted.items() if one not in called]:
            raise BaseModelError(f"it would compute {missed[0]} without z")
        self._linears = [(group, list(map(_unadapted, group))) for group in groups]
        self._places = {name: _place(self.model, name) for name in self._package.get_constant_fqns()}
        self._bind()
        log.info("the compiled decode step is loaded")

    def _bind(self) -> None:
        constants = {name: held[leaf].data for name, (held, leaf) in self._places.items()}
        self._package.load_constants(constants, check_full_update=True, user_managed=True)
        self._constants_key = weights_key(held[leaf] for held, leaf in self._places.values())
        self._constants = list(constants.values())

    def _finished(self) -> bool:
        """Return True if compilation has ended; note the problem if it failed."""
        assert self._process is not None
        if self._process.poll() is None:
            return False
        if self._process.returncode and self.problem is None:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines() or [""]
            self._give_up(read_json_object(self.path.with_suffix(".json")).get("problem") or lines[-1])
        return True

    @contextlib.contextmanager
    def _failing(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._give_up(f"it cannot be {action}: {error}")

    def _give_up(self, problem: str) -> None:
        self.problem, self._package = problem, None
        log.warning("no compiled decode step, the model's own forward pass is used: %s", problem)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGTERM)


def _unsupported(model: Any) -> str | None:
    """Return the reason for which the decode step of a model is not compiled, or None."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE is set"
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return "the model is not on the CPU"
    if model.dtype not in TOLERANCE:
        return f"the model is in {model.dtype}"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention is not that of transformers' attention interface"
    if getattr(model.config, "vision_config", None):
        return "the model reads images"
    if batching(model).recurrent or batching(model).varying:
        return "its layers keep states, or its rotary frequencies depend on the length"
    return None


def _config(model: Any) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "architectures", "quantization_config", "transformers_version"):
        config.pop(name, None)
    return config | {"dtype": str(model.dtype).removeprefix("torch.")}


def _key(config: Mapping[str, Any]) -> str:
    """Key of the compiled step: the config, the versions of torch and transformers, and the instructions of the CPU."""
    cpu = {name: present for name, present in torch.cpu.get_capabilities().items() if isinstance(present, bool)}
    content = [VERSION, has_kernels(), torch.__version__, transformers.__version__, sys.platform, cpu, config]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _unadapted(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, SVFLinear) else module


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the parameters or buffers of a module, and the key of one, by its name in the compiled step.

    Raises:
        KeyError: a constant of the traced step that the model does not hold.
    """
    path, _, leaf = name.removeprefix("model.").rpartition(".")
    module = _unadapted(model.get_submodule(path))
    held = module._parameters if leaf in module._parameters else module._buffers
    if leaf not in held:
        raise KeyError(name)
    return held, leaf
