"""`sigmix serve` and `sigmix keys`."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

import typer

from sigmix.cli._console import emit, note, table, working
from sigmix.cli._loading import open_bank, open_base
from sigmix.cli._options import BANK, BASIS, DEVICE_MAP, QUANTIZATION

keys_app = typer.Typer(help="API keys of `sigmix serve`.", no_args_is_help=True)


STATE = typer.Option(None, help="The server's state folder. Default: its setting.")


def add(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(epilog="Example: sigmix serve --port 8000, then open http://localhost:8000")(serve)
    app.add_typer(keys_app, name="keys", epilog="Example: sigmix keys add alice --per-minute 60")


def serve(
    config: Path = typer.Option(None, help="TOML file of settings, see docs/serving.md."),
    base: str = typer.Option(None, help="Base: smollm2-135m, a hub name, a folder or a .gguf file."),
    quantization: str = QUANTIZATION,
    basis: str = typer.Option(None, help=BASIS.help),
    device_map: str = DEVICE_MAP,
    bank: Path = BANK,
    host: str = typer.Option(None, help="Address to listen on. Default 127.0.0.1; any other needs API keys."),
    port: int = typer.Option(None, help="Port. Default 8000; 0 takes a free one."),
    policy: str = typer.Option(None, help="What the model `auto` decides by: A, B, D, bandit, or auto."),
    form: str = typer.Option(None, help="How several mixes share a batch: exact or truncated."),
    state: Path = typer.Option(None, help="Folder of saved mixes, feedback and keys."),
    expert_folder: list[Path] = typer.Option(None, help="Folder that experts may be loaded from while serving."),
    allow_host: list[str] = typer.Option(None, help="Name by which clients call the server."),
    allow_origin: list[str] = typer.Option(None, help="Origin of a web page that may call it."),
    rows: int = typer.Option(None, help="Answers that decode together. Default 32."),
    threads: int = typer.Option(None, help="Threads of the model. Default: all cores."),
    log_format: str = typer.Option(None, help="json or text."),
) -> None:
    """Serve the base and its experts to any OpenAI client; a page to try them is at the server's address."""
    try:
        from sigmix.serve import Server, Service, load_settings
        from sigmix.serve.observability import set_up
    except ModuleNotFoundError as error:
        from sigmix.errors import ConfigError

        raise ConfigError(
            f"serving needs the package {error.name}, which is not installed", remedy="pip install 'sigmix[serve]'"
        ) from error
    settings = load_settings(
        config, base=base, bank=bank, host=host, port=port, policy=policy, form=form, state=state,
        expert_folders=expert_folder or None, hosts=allow_host or None, origins=allow_origin or None, rows=rows,
        threads=threads, log_format=log_format, quantization=quantization, basis=basis, device_map=device_map,
    )  # fmt: skip
    set_up(settings.log_level, settings.log_format)
    experts = open_bank(settings.bank)
    model, tokenizer = open_base(
        settings.base, settings.dtype, settings.quantization, settings.basis, settings.device_map
    )
    with working("checking the experts"):
        service = Service(model, tokenizer, experts, settings, _judges())
    with working("warming up"):
        service.start()
    server = Server(service)
    socket = server.config.bind_socket()
    host_, port_ = socket.getsockname()[:2]
    shown = f"[{host_}]" if ":" in host_ else host_
    note(f"sigmix serves {settings.base} with {len(experts)} experts at http://{shown}:{port_} (Ctrl-C stops it)")
    # uvicorn sends itself the signal again when all has ended; that is no failure
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[socket])


def _judges() -> dict[str, Any]:
    from sigmix.tasks.graders import exact, strict_number

    def judged(score: Any) -> Any:
        return lambda reply, gold: score(reply, gold).value or 0.0

    return {"exact": judged(exact), "number": judged(strict_number)}


def _keys_file(state: Path | None) -> Path:
    from sigmix.serve import load_settings

    return load_settings(None, state=state).keys_file


@keys_app.command("add", epilog="Example: sigmix keys add alice --per-minute 60 --at-once 4")
def add_key(
    name: str = typer.Argument(help="Who it is for: lower-case letters, digits, - and _."),
    admin: bool = typer.Option(False, "--admin", help="May load experts, save mixes and read metrics."),
    per_minute: int = typer.Option(None, min=1, help="Requests a minute."),
    at_once: int = typer.Option(None, min=1, help="Requests under way at once."),
    max_new_tokens: int = typer.Option(None, min=1, help="Tokens of an answer."),
    state: Path = STATE,
) -> None:
    """Make a key and print it; it is shown this once and stored only as a hash."""
    from sigmix.serve.auth import add_key as made

    allowed = {"admin": admin, "per_minute": per_minute, "at_once": at_once, "max_new_tokens": max_new_tokens}
    typer.echo(made(_keys_file(state), name, **allowed))


@keys_app.command("list", epilog="Example: sigmix keys list")
def list_keys(state: Path = STATE, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Who has a key, and what it allows."""
    from sigmix.serve.auth import read_keys

    found = [{k: v for k, v in vars(key).items() if k != "hash"} for key in read_keys(_keys_file(state))]
    if as_json:
        emit({"keys": found}, True, "")
    elif found:
        table("keys", list(found[0]), [list(one.values()) for one in found])
    else:
        typer.echo("no keys")


@keys_app.command("remove", epilog="Example: sigmix keys remove alice")
def remove(name: str = typer.Argument(help="Whose."), state: Path = STATE) -> None:
    """Take a key away; a server that runs notices within seconds."""
    from sigmix.serve.auth import remove_key

    remove_key(_keys_file(state), name)
    typer.echo(f"{name} has no key any more")
