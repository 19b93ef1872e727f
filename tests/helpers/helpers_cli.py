"""A tiny base, another one, and a bank on the first, made once; and a way to run the command line in this process.

A plugin and not a conftest.py: a second module of that name would hide the parent's from `from conftest import …`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

# the parent's makers, by path: whichever conftest.py was loaded last has the name "conftest"
_spec = importlib.util.spec_from_file_location("sigmix_tests_root", Path(__file__).parents[1] / "conftest.py")
root = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(root)

TASKS = {"arithmetic": "addition?digits=1", "reading": "first-letter"}


def add_expert(bank, base: Path, name: str, seed: int = 0, **meta):
    """An expert with random z on a base folder, put into a bank."""
    import torch
    from peft import get_peft_model

    from sigmix import Expert, SVFConfig, load_base
    from sigmix.svf.tuner import svf_layers

    model = get_peft_model(load_base(base)[0], SVFConfig(target_modules="all-linear"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in svf_layers(model).values():
            layer.svf_z["default"].weight += 0.6 * (torch.rand(layer.r, generator=generator) - 0.5)
    return bank.add(Expert.from_model(model, name=name, meta=meta))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """cache, base, other (a base with other weights), bank, strict: folders. Tests leave them as they are.

    ``strict`` is the base with a chat template that refuses system messages, as Gemma's does.
    """
    from sigmix import Bank

    folder = tmp_path_factory.mktemp("cli")
    places = SimpleNamespace(cache=folder / "cache", base=folder / "tiny", other=folder / "other", bank=folder / "bank")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(places.cache))
        for seed, path in enumerate((places.base, places.other)):
            root.build_tiny(seed=seed).save_pretrained(path)
            root.build_tokenizer().save_pretrained(path)
        places.strict = folder / "strict"
        root.build_tiny(seed=0).save_pretrained(places.strict)
        tokenizer = root.build_tokenizer()
        raises = "{{ raise_exception('System role not supported') }}"
        refusal = f"{{% if messages[0]['role'] == 'system' %}}{raises}{{% endif %}}"
        tokenizer.chat_template = refusal + tokenizer.chat_template
        tokenizer.save_pretrained(places.strict)
        bank = Bank(places.bank, create=True)
        for seed, (name, task) in enumerate(TASKS.items()):
            add_expert(bank, places.base, name, seed, task=task, domain=name, description=f"knows {name}")
    return places


@pytest.fixture
def run(home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """``run("generate", "hi", stdin="…")`` -> exit code, stdout, stderr lines, and stdout's JSON when asked for."""
    monkeypatch.setenv("SIGMIX_CACHE", str(home.cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: object, stdin: str | bytes = "") -> SimpleNamespace:
        from sigmix.cli import main

        monkeypatch.setattr(sys, "argv", ["sigmix", *map(str, arguments)])
        content = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as left:
            code = left.code
        out, err = capsys.readouterr()
        figures = json.loads(out) if "--json" in arguments and code == 0 else None
        return SimpleNamespace(code=code, out=out, err=err.splitlines(), json=figures)

    return call


@pytest.fixture
def refused(run) -> Callable:
    """Run, and demand exit code 2, one line on stderr, no traceback; returns that line."""

    def call(*arguments: object, stdin: str | bytes = "", silent: bool = True) -> str:
        done = run(*arguments, stdin=stdin)
        assert done.code == 2, (done.out, done.err)
        assert len(done.err) == 1, done.err
        assert done.err[0].startswith("sigmix: ")
        assert "Traceback" not in done.err[0]
        assert not (silent and done.out)
        return done.err[0]

    return call
