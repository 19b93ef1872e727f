"""`sigmix serve`: OpenAI-compatible server, with the fields of `Settings` as options; `sigmix keys`: its API keys."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

import typer

from sigmix.cli import app
from sigmix.cli._console import emit, note, table, working
from sigmix.cli._loading import open_bank, open_base
from sigmix.cli._options import JSON, generated_command
from sigmix.utils.optional import optional

keys = typer.Typer(
    help="API keys of `sigmix serve`.", no_args_is_help=True, epilog="Example: sigmix keys add alice --per-minute 60"
)
STATE = typer.Option(None, help="State folder of the server. Default: that of its settings.")


def serve(config: Path = typer.Option(None, help="TOML file of settings; see docs/serving.md."), **flags: Any) -> None:
    """Serve the base model and its experts to OpenAI clients, with a web page to try them.

    Settings come from options, then environment variables (SIGMIX_SERVE_…), then the TOML file, then defaults.
    """
    from sigmix.engine.cpu.native import check_decode_weights
    from sigmix.serve.app import Server
    from sigmix.serve.observability import configure_logging
    from sigmix.serve.service import Service
    from sigmix.serve.settings import load_settings
    from sigmix.tasks.graders import GRADERS

    settings = load_settings(config, **{name: None if value == [] else value for name, value in flags.items()})
    configure_logging(settings.log_level, settings.log_format)
    check_decode_weights(settings.decode_weights, settings.quantization)
    bank = open_bank(settings.bank)
    model, tokenizer = open_base(
        settings.base, settings.dtype, settings.quantization, settings.basis, settings.device_map
    )
    graders = {
        name: lambda reply, gold, score=score: score(reply, gold).value or 0.0
        for name, score in GRADERS.items()
        if name != "math"  # sympy has a time limit on the main thread only
    }
    with working("checking the experts"):
        service = Service(model, tokenizer, bank, settings, graders)
    with working("warming up"):
        service.start()
    server = Server(service)
    socket = server.bind()
    host, port = socket.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    through = f" through {', '.join(settings.upstream)}" if settings.upstream else ""
    note(f"sigmix serves {settings.base} with {len(bank)} experts{through} at http://{shown}:{port} (Ctrl-C stops it)")
    # uvicorn raises the signal again after its shutdown
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[socket])


def _settings() -> type:
    optional("pydantic_settings", "'sigmix[serve]'", "sigmix serve")
    from sigmix.serve.settings import Settings

    return Settings


app.command(
    "serve", cls=generated_command(serve, _settings), help=serve.__doc__,
    epilog="Example: sigmix serve --port 8000, then open http://localhost:8000",
)(lambda: None)  # fmt: skip
app.add_typer(keys, name="keys")


def _keys_file(state: Path | None) -> Path:
    _settings()

    from sigmix.serve.settings import load_settings

    return load_settings(None, state=state).keys_file


@keys.command(epilog="Example: sigmix keys add alice --per-minute 60 --at-once 4")
def add(
    name: str = typer.Argument(help="Client name: lower-case letters, digits, - and _."),
    admin: bool = typer.Option(
        False, "--admin", help="Allow loading experts, saving mixtures, reading metrics, and all files and jobs."
    ),
    allow_code: bool = typer.Option(
        False, "--allow-code", help="Allow python graders, where the server was started with --allow-code."
    ),
    per_minute: int = typer.Option(None, min=1, help="Requests per minute."),
    at_once: int = typer.Option(None, min=1, help="Concurrent requests."),
    max_new_tokens: int = typer.Option(None, min=1, help="Tokens per answer."),
    state: Path = STATE,
) -> None:
    """Create a key and print it; only its hash is stored."""
    from sigmix.serve.auth import add_key

    rights = {"admin": admin, "allow_code": allow_code}
    limits = {"per_minute": per_minute, "at_once": at_once, "max_new_tokens": max_new_tokens}
    typer.echo(add_key(_keys_file(state), name, **rights, **limits))


@keys.command("list", epilog="Example: sigmix keys list")
def list_keys(state: Path = STATE, as_json: bool = JSON) -> None:
    """List client names and their limits."""
    from sigmix.serve.auth import read_keys

    rows = [{k: v for k, v in vars(key).items() if k != "hash"} for key in read_keys(_keys_file(state))]
    if emit({"keys": rows}, as_json):
        return
    if rows:
        table("keys", list(rows[0]), [list(row.values()) for row in rows])
    else:
        typer.echo("no keys")


@keys.command(epilog="Example: sigmix keys remove alice")
def remove(name: str = typer.Argument(help="Client name."), state: Path = STATE) -> None:
    """Revoke a key; a running server follows within seconds."""
    from sigmix.serve.auth import remove_key

    remove_key(_keys_file(state), name)
    typer.echo(f"removed the key of {name}")
