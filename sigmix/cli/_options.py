"""sigmix.cli._options"""

from __future__ import annotations

import typer

from sigmix.cli._loading import AUTO

BASE = typer.Option("smollm2-135m", help="Base: smollm2-135m, a hub name, a folder or a .gguf file.")


JSON = typer.Option(False, "--json", help="Print one JSON object.")


BANK = typer.Option(None, help="Folder of experts, or a collection on the hub (its slug). Default: the bundled bank.")


QUANTIZATION = typer.Option(None, help="Keep the base's linear layers in fewer bits: int8, int4 or nf4.")


DEVICE_MAP = typer.Option(
    None, metavar="auto|FILE.json", help="Where the base's parts go: spread by itself, or {module: device} in a file."
)


DTYPE = typer.Option(None, help="Of the base's weights. Default: the one that the expert was made in.")


AS_MADE = typer.Option(None, "--quantization", help="int8, int4 or nf4. Default: that of the expert's base, if any.")


BASIS = typer.Option("own", help="Of a quantised base: own, or original for experts made on the base unquantised.")


STRATEGY = typer.Option(
    AUTO,
    help="How auto chooses: A (prompt), B (classifier), D (probe); auto: the bank's probe, else classifier, else A.",
)
