"""Pushing an expert to the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sigmix.errors import HubError, OutputError
from sigmix.experts import directory
from sigmix.experts.asking import asking, check_repo
from sigmix.experts.card import without_path
from sigmix.experts.metadata import COMPUTED, thaw
from sigmix.experts.remote import FILES
from sigmix.fetch import offline

PART = r"[^\s/\\\"'?&,;]+"
PATHS = re.compile(
    r"(?<![\w+.-])(?P<address>(?!file:)[A-Za-z][\w+.-]+://[^\s/\"'][^\s\"']*)"
    r"|(?<![\w/.~\\])(?:(?:file|[A-Za-z][\w+.-]+(?=:///)):/+(?:[A-Za-z]:[/\\]+)?|[A-Za-z]:[/\\]+|\\{2,}|~?/|\.[/\\]"
    rf"|(?:{PART}[/\\])*?(?:\.\.[/\\])+)(?P<path>{PART}(?:[/\\]+{PART})*)[/\\]?"
)
"""A path of some machine, from its root to its last part; or an address, which is none."""


class Pushed(NamedTuple):
    """The repository's page, the commit's hash, and whether anything had changed."""

    url: str
    revision: str
    changed: bool


def push(
    name: str, z: Mapping[str, torch.Tensor], meta: Mapping[str, Any], repo: str, *, token: str | None = None,
    private: bool = False, revision: str | None = None, message: str | None = None,
) -> Pushed:  # fmt: skip
    """Commit an expert to a repository, which is made if it does not exist: all files in one commit or none.

    Paths on this machine are cut to their last part (`published`), so what is loaded again may have another base name;
    z and fingerprint are the same. What the repository holds is looked at first, and the commit is refused if somebody
    else commits in between.

    Raises:
        ConfigError: no "user/name". OutputError: the repository holds more than an expert, or is public and ``private``
        was asked for. HubError: the hub refuses or cannot be reached.
    """
    import huggingface_hub

    check_repo(repo)
    if offline():
        raise HubError(
            f"cannot push to {repo!r}: offline mode is set", remedy="unset SIGMIX_OFFLINE and HF_HUB_OFFLINE"
        )
    files = directory.contents(name, z, published(meta), repo)
    adding = [huggingface_hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=files[file]) for file in FILES]
    with asking(repo, token, revision, writes=True) as key:
        api = huggingface_hub.HfApi(token=key)
        page = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise OutputError(
                f"the hub model {repo!r} exists and is public, so nothing was pushed to it",
                remedy="make it private in its settings, or give another name",
            )
        fresh = False
        try:
            before = api.model_info(repo, revision=revision)
        except huggingface_hub.errors.RevisionNotFoundError:
            before, fresh = api.model_info(repo), True  # what a new branch begins with
        _check_others(repo, [file.rfilename for file in before.siblings or ()])
        if fresh:
            api.create_branch(repo, branch=str(revision), revision=before.sha)
        done = api.create_commit(
            repo, adding, commit_message=message or f"Expert {name}", revision=revision, parent_commit=before.sha
        )
    return Pushed(str(page), done.oid, done.oid != before.sha)


def published(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as the world may see it: paths on this machine, such as a base's folder, cut to their last part."""

    home = str(Path.home())

    def last(found: re.Match[str]) -> str:
        if found["address"]:
            return found[0]
        parts = re.split(r"[/\\]+", found["path"])
        if f"/{found['path']}" == home or (len(parts) == 2 and parts[0].lower() in ("home", "users")):
            return "~"  # somebody's own folder is called as they are
        return found[0] if len(parts) == 1 else parts[-1]

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [cut(item) for item in value]
        if isinstance(value, str):
            # a blank ends a path, as far as one can tell, but not in what is known for one
            return PATHS.sub(last, value.replace(home, "~") if " " in home else value)
        return value

    plain = thaw(meta)
    made = {key: value if key in COMPUTED else cut(value) for key, value in plain.items()}
    if (plain.get("base") or {}).get("name"):
        name = plain["base"]["name"]
        made["base"] = {**plain["base"], "name": "~" if cut(name) == "~" else without_path(name)}
    return made


def _check_others(repo: str, files: Sequence[str]) -> None:
    """As for a folder: a repository with other things in it is not an expert's, and its card not ours to replace."""
    allowed = {*directory.FILES, ".gitattributes", "LICENSE", "LICENSE.md"}
    others = sorted(file for file in files if file not in allowed)
    if directory.CONFIG in files and directory.META not in files:
        others.insert(0, f"the {directory.CONFIG} of another adapter")
    if others:
        raise OutputError(
            f"the hub model {repo!r} holds more than an expert, such as {others[0]}; its card would be replaced",
            remedy="give the name of a new repository, or remove the other files there",
        )
