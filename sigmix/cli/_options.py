"""Options that several commands share, and options generated from a configuration class."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

DEFAULT = "smollm2-135m"
MIXTURE = "a:0.7+b:0.3, an expert, a .json file"

BASE = typer.Option(DEFAULT, help="Base model: smollm2-135m, a hub name, a folder or a .gguf file.")
BANK = typer.Option(None, help="Folder of experts, or a collection on the hub (its slug). Default: the bundled bank.")
JSON = typer.Option(False, "--json", help="Print one JSON object.")
DATA_DIR = typer.Option(None, help="Folder of local JSONL data, used in place of the hub.")
ALLOW_CODE = typer.Option(False, "--allow-code", help="Allow code tasks to execute generated programs.")
QUANTIZATION = typer.Option(None, help="Quantize the base model's linear layers: int8, int4 or nf4.")
DEVICE_MAP = typer.Option(
    None, metavar="auto|FILE.json", help="Placement of the base model: auto, or a JSON file {module: device}."
)
BASIS = typer.Option(
    "own", help="SVD basis of a quantized base model: own, or original for experts of the unquantized one."
)
DECODE_WEIGHTS = typer.Option(
    None, help="int8: decode the base, and experts of prompt positions, with 8-bit copies of the base's weights."
)
COMPILE = typer.Option(
    False, "--compile", help="Compile decoding on a CPU, in the background, or use what was compiled before."
)
ENGINE = typer.Option("own", metavar="own|vllm", help="Inference engine: sigmix's own, or vLLM if it is installed.")
EXPERT_DTYPE = typer.Option(None, "--dtype", help="dtype of the base model. Default: the dtype in the expert's record.")
EXPERT_QUANTIZATION = typer.Option(
    None, "--quantization", help="int8, int4 or nf4. Default: the quantization in the expert's record."
)
STRATEGY = typer.Option(
    "auto",
    help="Strategy of --mix auto: A (prompt), B (classifier) or D (router). Default: D if an expert has request "
    "statistics, else the bank's classifier, else A.",
)
SAMPLING = {
    "temperature": typer.Option(0.0, min=0.0, help="Sampling temperature; 0 is greedy."),
    "top_p": typer.Option(1.0, min=0.0, max=1.0, help="Cumulative probability of nucleus sampling, above 0."),
    "top_k": typer.Option(0, min=-1, help="Number of most probable tokens to sample from; 0: all."),
    "min_p": typer.Option(0.0, min=0.0, max=1.0, help="Lowest probability to sample, relative to the highest one."),
    "repetition_penalty": typer.Option(1.0, help="Above 1: tokens of the prompt and the answer become less likely."),
    "presence_penalty": typer.Option(
        0.0, min=-2.0, max=2.0, help="Subtracted from the logits of tokens in the answer."
    ),
    "frequency_penalty": typer.Option(
        0.0, min=-2.0, max=2.0, help="Subtracted from a token's logit for each of its occurrences in the answer."
    ),
}
SYSTEM = typer.Option(None, help="System message. Default: the chat template's own.")
TARGETS = typer.Option("all-linear", help="Modules: all-linear, attention, mlp, or comma-separated names.")
LAYERS = typer.Option(None, help="half, or comma-separated layer numbers. Default: all.")


def data_config() -> type:
    """Return the class with the options of commands that read a user's data."""
    from sigmix.tasks.dataset import DataConfig

    return DataConfig


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Add `SAMPLING` to the options of a command, which receives them as ``**sampling``."""
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [one.replace(kind=kind) for one in inspect.signature(command, eval_str=True).parameters.values()][:-1]
    place = 1 + [one.name for one in own].index("max_new_tokens")
    sampling = [
        inspect.Parameter(name, kind, default=option, annotation=type(option.default))
        for name, option in SAMPLING.items()
    ]
    _set_parameters(command, own[:place] + sampling + own[place:])
    return command


def _set_parameters(function: Any, parameters: Sequence[inspect.Parameter]) -> None:
    """Set the signature that typer reads."""
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {one.name: one.annotation for one in parameters}


def generated_command(function: Callable[..., None], *sources: Callable[[], type]) -> type[TyperCommand]:
    """Return a command class that adds an option for each field of some classes to those of ``function``.

    The options are generated, and ``sources`` import the classes, when the command runs or prints its help, so that
    listing the commands imports nothing. ``function`` takes them as ``**keywords``; None: not given.
    """

    class Generated(TyperCommand):
        @functools.cached_property
        def _command(self) -> Any:
            parameters = inspect.signature(function, eval_str=True).parameters.values()
            own = {one.name: one for one in parameters if one.kind is not one.VAR_KEYWORD}
            for source in sources:
                own |= {one.name: one for one in options_from(source()) if one.name not in own}
            positional = [one for one in own.values() if one.kind is not one.KEYWORD_ONLY]
            _set_parameters(function, [*positional, *(one for one in own.values() if one.kind is one.KEYWORD_ONLY)])
            single = typer.Typer(add_completion=False, rich_markup_mode=None)
            single.command()(function)
            return typer.main.get_command(single)

        def get_params(self, ctx: Any) -> Any:
            return self._command.get_params(ctx)

        def invoke(self, ctx: Any) -> Any:
            return self._command.invoke(ctx)

    return Generated


def options_from(cls: type) -> Iterator[inspect.Parameter]:
    """Yield a keyword parameter with a `typer.Option` for each field of a dataclass or a pydantic model.

    The help text is a dataclass field's ``metadata["help"]``, or a pydantic field's description; the option has the
    name of the field, or ``metadata["option"]``. Defaults are shown, and None is passed: the class applies them.
    """
    hints = typing.get_type_hints(cls)
    for name, text, default, option in _fields(cls):
        annotation, choices = _plain_type(hints[name])
        flag = option or f"--{name.replace('_', '-')}"
        if annotation is bool:
            flag += f"/--no-{flag.removeprefix('--')}"
        if default is not None and default is not False and default != "":
            text = f"{text} Default: {default}."
        info = typer.Option(None, flag, help=text, metavar="|".join(choices) or None, show_default=False)
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation)


def _fields(cls: type) -> Iterator[tuple[str, str, Any, str | None]]:
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            default = None if field.default is dataclasses.MISSING else field.default
            yield field.name, field.metadata.get("help", ""), default, field.metadata.get("option")
        return
    for name, field in cls.model_fields.items():  # type: ignore[attr-defined]
        default = field.default if isinstance(field.default, (str, int, float, Path)) else None
        yield name, field.description or "", default, None


def _plain_type(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """Return a type that typer accepts, and the choices of a Literal; ``str | list[int] | None`` is read as text."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [one for one in typing.get_args(hint) if one is not type(None)]
        hint = members[0]
    if typing.get_origin(hint) is typing.Literal:
        return str, typing.get_args(hint)
    return hint, ()
