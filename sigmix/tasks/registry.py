"""Tasks by name: ``NAME[?key=value&key=value]``, from this package, a user's file, or an installed plug-in.

    get_task("addition?digits=3")
    get_task("rg:chain_sum?max_terms=2", suffix="Answer with the number only.")
    get_task("my/task.py:double")          # a file with an @register'ed factory, an @skill, or a Task subclass

Values are JSON if they parse as JSON, else strings; "%26" and the like are decoded. A plug-in is a package with an
entry point in the group ``sigmix.tasks`` that is a factory or a Task subclass. Files and plug-ins run with the user's
rights.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from sigmix.errors import ConfigError, TaskError, UnknownNameError, reraised
from sigmix.tasks.base import Task

Factory = Callable[..., Task]

ENTRY_POINTS = "sigmix.tasks"
_BUILT_IN = (
    "sigmix.tasks.skills",
    "sigmix.tasks.benchmarks",
    "sigmix.tasks.assistant",
    "sigmix.tasks.programs",
    "sigmix.tasks.vqa",
)
_FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[^:?]+)")

_built_in: dict[str, Factory] = {}
_target = _built_in  # where `register` writes; a user's file gets its own table, so it can reuse any name
_loaded = False
_lock = threading.RLock()  # for the two above


def register(name: str) -> Callable[[Factory], Factory]:
    """Register a factory (a function with options as keyword arguments, or a Task class) under ``name``.

    Parameters called ``data_dir`` and ``allow_code`` receive those arguments of `get_task`.

    Raises:
        TaskError: the name is taken or holds one of ":?&= ".
    """

    def decorate(factory: Factory) -> Factory:
        if not name or set(name) & set(":?&= "):
            raise TaskError(f"invalid task name {name!r}", remedy="leave out blanks and the characters : ? & =")
        if name in _target:
            raise TaskError(f"two tasks are named {name!r}", remedy="give one of them another name")
        _target[name] = factory
        return factory

    return decorate


def get_task(spec: str, data_dir: Path | None = None, allow_code: bool = False, **options: Any) -> Task:
    """Build a task.

    Args:
        spec: ``NAME``, ``rg:NAME`` or ``path/to/file.py:NAME``, with options after a question mark.
        data_dir: folder with local data sets; default: the Hugging Face hub.
        allow_code: allow graders to run the program in a reply (in a sandbox).
        options: override those in the spec.

    Raises:
        UnknownNameError: no such task.
        ConfigError: an unknown or invalid option.
        TaskError: a user's file that cannot be loaded.
    """
    name, given = parse_spec(spec)
    given.update(options)
    factory, fixed = _factory(name)
    context = {"data_dir": Path(data_dir) if data_dir is not None else None, "allow_code": allow_code}
    parameters = inspect.signature(factory).parameters
    valid = {key: parameter for key, parameter in parameters.items() if key not in (*context, *fixed)}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in valid.values()):
        for key in given:
            if key not in valid:
                raise ConfigError(f"task {name} has no option {key!r}; it has {', '.join(sorted(valid)) or 'none'}")
    task = factory(**fixed, **{key: value for key, value in context.items() if key in parameters}, **given)
    if not isinstance(task, Task):
        raise TaskError(f"the factory of task {name} returned a {type(task).__name__}, not a Task")
    task.name = format_spec(name, given)
    return task


def task_names(families: bool = True) -> list[str]:
    """Return all names, sorted. ``families=False`` leaves out ``rg:`` names, which are slow to import."""
    names = {*_built_ins(), *_entry_points()}
    if families:
        from sigmix.tasks import procedural

        names |= {f"rg:{name}" for name in procedural.names()}
    return sorted(names)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split a spec into name and options.

    Raises:
        ConfigError: an option without "=", or given twice.
    """
    name, _, query = spec.strip().partition("?")
    options: dict[str, Any] = {}
    for part in query.split("&") if query else []:
        key, equals, text = part.partition("=")
        if not equals or not key:
            raise ConfigError(f"task spec {spec!r}: option {part!r} is not of the form key=value")
        if key in options:
            raise ConfigError(f"task spec {spec!r}: option {key!r} is given twice")
        text = unquote(text)
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return name, options


def format_spec(name: str, options: dict[str, Any]) -> str:
    """Return the canonical spec: options sorted, values as JSON unless a bare string reads back as itself."""
    return name + ("?" if options else "") + "&".join(f"{key}={_encode(options[key])}" for key in sorted(options))


def _encode(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=list)
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            text = value
    return quote(text, safe=" ,.:;/[]{}\"'()!@$^*+-_?<>|")


def _factory(name: str) -> tuple[Factory, dict[str, Any]]:
    """Return the factory of a task and the arguments that the name fixes."""
    if match := _FILE.fullmatch(name):
        return _from_file(Path(match["path"]), match["name"]), {}
    if name.startswith("data:"):
        from sigmix.tasks.dataset import DataTask

        return DataTask, {"source": name.removeprefix("data:")}
    if name.startswith("rg:"):
        from sigmix.tasks import procedural

        return procedural.ReasoningGymTask, {"dataset": name.removeprefix("rg:")}
    if name in _built_ins():
        return _built_in[name], {}
    points = _entry_points()
    if name not in points:
        raise UnknownNameError("task", name, task_names())
    with reraised(TaskError, f"plug-in task {name} ({points[name].value}) does not load"):
        return points[name].load(), {}


def _built_ins() -> dict[str, Factory]:
    global _loaded
    with _lock:
        if not _loaded:
            for module in _BUILT_IN:
                importlib.import_module(module)
            _loaded = True
    return _built_in


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _from_file(path: Path, name: str) -> Factory:
    global _target
    if not path.is_file():
        raise TaskError(f"task file {path} does not exist", remedy="give the path of a Python file before the colon")
    _built_ins()  # first, or their registrations would land in the file's table
    module_name = "sigmix_user_task_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None  # noqa: PT018  # true for every .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a class's module up by name
    registered: dict[str, Factory] = {}
    with _lock:
        before, _target = _target, registered
        try:
            with reraised(TaskError, f"task file {path} does not load"):
                module_spec.loader.exec_module(module)
        finally:
            _target = before
    classes = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Task) and not inspect.isabstract(value)
        and value.__module__ == module_name
    }  # fmt: skip
    factories: dict[str, Factory] = {**classes, **registered}
    if name not in factories:
        raise UnknownNameError(f"task in {path}", name, factories)
    return factories[name]
