"""`sigmix experts push | pull`: experts on the Hugging Face hub.

There is no option for a token: what stands on a command line is seen by everybody on the machine.
"""

from __future__ import annotations

from pathlib import Path

import typer

from sigmix.cli.shared import BANK, JSON, emit, working


def add(group: typer.Typer) -> None:
    """Register the commands."""
    group.command("push", epilog="Example: sigmix experts push addition user/addition --private")(push)
    group.command("pull", epilog="Example: sigmix experts pull user/addition --out my-experts/addition")(pull)


def push(
    name: str = typer.Argument(..., help="A name in the bank, or an expert's folder."),
    repo: str = typer.Argument(..., metavar="USER/NAME", help="The model on the hub; it is made if need be."),
    private: bool = typer.Option(False, "--private", help="Only you can see it."),
    revision: str = typer.Option(None, help="Branch to commit to; it is made if need be."),
    message: str = typer.Option(None, help="Message of the commit."),
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """Commit an expert and its card to the hub, as whoever `hf auth login` or HF_TOKEN says."""
    from sigmix.cli.named import folder_of
    from sigmix.experts.asking import check_repo
    from sigmix.experts.expert import Expert
    from sigmix.experts.publish import push as pushed

    check_repo(repo)
    expert = Expert.load(folder_of(name, bank))
    with working(f"pushing {name}"):
        options = {"private": private, "revision": revision, "message": message}
        done = pushed(expert.name, expert.z, expert.meta, repo, **options)  # type: ignore[arg-type]
    figures = {"expert": expert.name, "repo": repo, **done._asdict()}
    what = f"at {done.revision[:12]}" if done.changed else "there was nothing to change"
    emit(figures, as_json, f"{expert.name} is at {done.url}, {what}")


def pull(
    source: str = typer.Argument(..., metavar="SOURCE", help="An expert, user/name, or a collection's slug."),
    out: Path = typer.Option(None, help="New folder: the expert's, or for a collection the bank's. Default: its name."),
    revision: str = typer.Option(None, help="Branch, tag or commit of an expert. Default: main."),
    as_json: bool = JSON,
) -> None:
    """Copy an expert, or all of a collection, from the hub to a new folder."""
    from sigmix.experts.remote import pull as pulled

    folder = out if out is not None else Path(source.rstrip("/").split("/")[-1])
    with working(f"pulling {source}"):
        rows = pulled(source, folder.expanduser(), revision)
    text = [f"{row['name']} from {row['repo']} at {row['revision'][:12]}: {row['path']}" for row in rows]
    emit({"out": str(folder), "experts": rows}, as_json, "\n".join(text))
