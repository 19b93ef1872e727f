"""Ahead-of-time compilation of a decode step, in a process of its own; see `sigmix.engine.cpu.decode_step`.

    python -m sigmix.engine.cpu.decode_export OUTPUT.pt2 < config.json

`torch.export` traces transformers' forward pass of one token per row, for any number of rows and columns, and
AOTInductor compiles it. No weights are read: the compiled step gets them from the model. Linear layers become calls of
the operator ``sigmix::linear``, one for those that share their input, so that their weights may be packed, merged or
quantized, and run without Python where `sigmix.engine.cpu.native` has kernels. Attention reads grouped keys and
values without repeating them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map
from transformers import CONFIG_MAPPING, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.initialization import no_init_weights
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sigmix.engine.cpu.decode_step import ATTENTION, LINEAR, OPERATORS
from sigmix.engine.cpu.decode_step import attention as plain_attention
from sigmix.engine.cpu.native import SHIMS, has_kernels
from sigmix.errors import BaseModelError
from sigmix.models.memory import empty_model
from sigmix.models.multimodal import auto_class
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import atomic_file, file_lock, write_json

INTERFACE = "sigmix_decode"
"""Name in transformers' attention interface."""

ROWS, COLUMNS, WIDTH = 8, 90, 160
"""Example sizes, for which AOTInductor decides what runs in parallel."""


def _linear_shape(x: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _attention_shape(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], values.shape[-1])


# not where the operators are defined: it reads the source of every imported module, and so imports optional ones
torch.library.register_fake("sigmix::linear", _linear_shape, lib=OPERATORS)
torch.library.register_fake("sigmix::attention", _attention_shape, lib=OPERATORS)


def stored(x: torch.Tensor) -> torch.Tensor:
    """Return x as it is; Inductor computes it once, and not anew for every reader (every key, every layer)."""
    x = x.clone(memory_format=torch.contiguous_format)
    return x.as_strided(x.shape, x.stride())


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one query per row and head, in transformers' attention interface.

    Args:
        query: [B, heads, 1, d]. key, value: [B, groups, P, d]. attention_mask: bool or additive [B, 1 or heads, 1, P].

    Raises:
        BaseModelError: an option that changes the result and is not supported.
    """
    ignored = {"is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions", "cache_position"}
    if extra := sorted(name for name, option in options.items() if option is not None and name not in ignored):
        raise BaseModelError(f"the compiled attention does not support {', '.join(extra)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    native = has_kernels() and query.dtype in (torch.bfloat16, torch.float32)
    if native and attention_mask is not None and attention_mask.dtype == torch.bool:
        return ATTENTION(query, key, value, attention_mask, scale, softcap or 0.0), None
    return plain_attention(stored(query), key, value, attention_mask, scale, softcap or 0.0), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    mask = sdpa_mask(*args, **kwargs)
    return None if mask is None else stored(mask)


class _Columns(DynamicLayer):
    """Keys and values [B, groups, P, d] with the last column still to be written."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2] - 1


class _Step(nn.Module):
    """One token per row: tokens, lengths [B], mask bool [B, P], keys and values of the layers -> logits [B, V]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, lengths: torch.Tensor, mask: torch.Tensor, states: list[torch.Tensor]
    ) -> torch.Tensor:
        cache = DynamicCache()
        cache.layers = [_Columns(*pair) for pair in zip(states[::2], states[1::2], strict=True)]
        output = self.model(
            input_ids=tokens[:, None], attention_mask=mask, position_ids=lengths[:, None], past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        return output.logits[:, -1]


def export(config: PretrainedConfig) -> ExportedProgram:
    """Trace the decode step of the model of a config, in its dtype.

    Raises:
        BaseModelError: a model with another cache than keys and values, or attention that is not supported.
    """
    dtype: Any = config.dtype
    shapes = _states(config)
    with no_init_weights():  # pages of the weights are never touched
        model = auto_class(config.to_dict()).from_config(config, dtype=dtype, attn_implementation="eager").eval()
    ALL_ATTENTION_FUNCTIONS.register(INTERFACE, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE, _mask)
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(lambda _, args, tables: tree_map(stored, tables))
    model.config._attn_implementation = INTERFACE
    states = [torch.zeros(ROWS + 1, groups, WIDTH, d, dtype=dtype) for groups, d in shapes]
    # parts of buffers, as in a `BatchKVCache`, so that strides are not derived from sizes
    mask = torch.ones(ROWS + 1, WIDTH, dtype=torch.bool)
    inputs = (
        torch.arange(ROWS), torch.arange(ROWS) + 2, mask[:ROWS, 5 : 5 + COLUMNS],
        [state[:ROWS, :, 5 : 5 + COLUMNS] for state in states],
    )  # fmt: skip
    free = Dim.DYNAMIC
    sizes = ({0: free}, {0: free}, {0: free, 1: free}, [{0: free, 2: free}] * len(states))
    with torch.no_grad():
        program = torch.export.export(_Step(model), inputs, dynamic_shapes=sizes, strict=False)
    for symbol, bounds in program.range_constraints.items():
        if bounds.lower > 2 or bounds.upper < 1 << 30:
            raise BaseModelError(f"the decode step depends on a size: {symbol} in {bounds}")
    return program


def _states(config: Any) -> list[tuple[int, int]]:
    """Return (groups, width) of keys and values of every layer in turn."""
    with torch.no_grad():
        cache = empty_model(config)(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta")).past_key_values
    layers = getattr(cache, "layers", [])
    if not layers or any(type(one) not in (DynamicLayer, DynamicSlidingWindowLayer) for one in layers):
        raise BaseModelError("the decode step of this cache is not compiled")
    return [(one.shape[1], one.shape[3]) for layer in layers for one in (layer.keys, layer.values)]


def join_linears(program: ExportedProgram) -> list[list[str]]:
    """Replace linear layers by the operator `LINEAR`, one call for those with the same input.

    Returns:
        Paths of the modules of each call.
    """
    graph = program.graph
    by_input: dict[torch.fx.Node, list[tuple[str, torch.fx.Node]]] = {}
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if node.target is torch.ops.aten.linear.default and stack and stack[-1][1] == "torch.nn.modules.linear.Linear":
            path = stack[-1][0].removeprefix("model.")
            by_input.setdefault(node.args[0], []).append((path, node))
    for number, (x, members) in enumerate(by_input.items()):
        sizes = [node.meta["val"].shape[-1] for _, node in members]
        joint = members[0][1]
        with graph.inserting_before(joint):
            whole = graph.call_function(LINEAR, (x, number, sum(sizes)))
            value = x.meta["val"]
            whole.meta["val"] = value.new_empty(*value.shape[:-1], sum(sizes))
            first = 0
            for size, (_, node) in zip(sizes, members, strict=True):
                part = graph.call_function(torch.ops.aten.slice.Tensor, (whole, -1, first, first + size))
                part.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(part)
                first += size
    for members in by_input.values():
        for _, node in members:
            graph.erase_node(node)
    program.graph_module.recompile()
    return [[path for path, _ in members] for members in by_input.values()]


def compile_step(config: PretrainedConfig, path: Path) -> None:
    """Compile the decode step of the model of a config, and write it to a file."""
    program = export(config)
    options = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.metadata": {"linears": json.dumps(join_linears(program))},
        "compile_threads": 1,
        "cpp.dynamic_threads": True,
        "aot_inductor.custom_ops_to_c_shims": {LINEAR: [SHIMS["linear"]], ATTENTION: [SHIMS["attention"]]}
        if has_kernels()
        else {},
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=os.path.join(folder, "step.pt2"), inductor_configs=options
        )
        with atomic_file(path) as temporary:
            shutil.copyfile(package, temporary)


def main(path: Path) -> None:
    """Compile the step of a config from stdin; a model without one gets a file that records the reason."""
    os.nice(10)  # a tenth of a busy core
    torch.set_num_threads(1)
    fields = json.load(sys.stdin)
    with file_lock(cache_dir() / "locks" / f"{path.stem}.lock"):
        if path.exists():  # another process has compiled it in the meantime
            return
        get_cpp_compiler()  # raises if there is none
        try:
            compile_step(CONFIG_MAPPING[fields["model_type"]].from_dict(fields), path)
        except Exception as error:
            write_json(path.with_suffix(".json"), {"problem": f"{type(error).__name__}: {error}"[:500]})
            raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
