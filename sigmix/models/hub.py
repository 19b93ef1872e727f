"""Bases from the Hugging Face hub: download into the hub's own cache, and name what went wrong.

Also the hints that a name which leads nowhere gets. Only configs, tokenizers and the safetensors that transformers
loads are fetched: some makers keep the same weights a second time beside them, or in a folder.
"""

from __future__ import annotations

import difflib
import errno
from pathlib import Path

from sigmix.errors import BaseModelError
from sigmix.models.default import DEFAULT, offline

HUB_FILES = ("model.safetensors", "model*-of-*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


FOLDERS = ("*/*",)
"""Never fetched; in these patterns a star stands for slashes too."""


def hub_folder(name: str, revision: str | None) -> Path:
    """Download a hub model into the hub's own cache, or find it there, and return its folder."""
    import huggingface_hub

    typo = difflib.get_close_matches(name.split("/")[-1].lower(), [DEFAULT], n=1, cutoff=0.6)
    hint = f"; did you mean {DEFAULT!r}?" if typo else near_paths(Path(name))
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(FOLDERS),
                local_files_only=offline(),
            )
        )  # fmt: skip
    except Exception as error:
        found, key = explain(error, name, revision=revision, hint=hint, instead=base_names()), own_token()
        if found is None and not shows(error, key):
            raise
        message, remedy = found or (f"the hub model {name!r} cannot be had: {error}", "run it again, or: hf auth login")
        raise BaseModelError(scrubbed(message, key), remedy=remedy) from (None if shows(error, key) else error)


def explain(
    error: Exception, name: str, *, revision: str | None = None, hint: str = "", instead: str = "give a folder"
) -> tuple[str, str] | None:
    """What a failed request to the hub says to a person, and the remedy; None for an error that is not the hub's.

    Args:
        name: what was asked for. hint: appended where the name may be wrong. instead: what else can be given.
    """
    from huggingface_hub import constants, errors

    url = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"the hub model {name!r} is gated: its owner wants you to accept its terms first",
            f"accept them at {url}, then run: hf auth login",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no folder and no public hub model {name!r}{hint}",
            f"check the name; if the model is private, run: hf auth login; or {instead}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub model {name!r} has no revision {revision!r}", f"see {url}/commits for those it has"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} cannot be a hub name: {error}", instead
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return (
            f"the disk is full: {name!r} does not fit into {constants.HF_HUB_CACHE}",
            "free some space, or set HF_HOME to another disk",
        )
    if isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return (
            f"{name!r} cannot be written to the hub's cache {constants.HF_HUB_CACHE}: {error.strerror}",
            "set HF_HOME to a folder that you can write to",
        )
    # httpx, under whatever name this release of huggingface_hub has it, is not among the operating system's errors
    if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
        return None
    if offline():
        return (
            f"{name!r} is no local folder and not in the hub's cache, and offline mode is set{hint}",
            "unset SIGMIX_OFFLINE and HF_HUB_OFFLINE to download it, or give a folder",
        )
    # a hub that cannot be reached lets the download look into the cache, and only that finds nothing
    status = status_of(error) or status_of(error.__cause__)
    if status == 401:
        return f"the hub wants a valid token for {name!r}", "run: hf auth login, or set HF_TOKEN"
    if status == 403:
        return (
            f"the hub refuses {name!r} to your token (403)",
            f"look at {constants.ENDPOINT}/settings/tokens for what it may do, or run: hf auth login",
        )
    if status == 429:
        return f"the hub refuses {name!r} for now: too many requests (429)", "run it again in a few minutes"
    if status is not None:
        return f"the hub failed on {name!r} with status {status}", f"run it again later, or {instead}"
    return (
        f"cannot reach the hub for {name!r} ({type(error).__name__}), and it is not in the hub's cache{hint}",
        f"check the network and run it again, or {instead}",
    )


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of an answer that became an exception, or None."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def own_token() -> str | None:
    """The token that huggingface_hub asks with when it is given none."""
    from huggingface_hub import get_token

    return (get_token() or "").strip() or None


def shows(error: BaseException | None, key: str | None) -> bool:
    """Whether any error of a chain has the token ``key`` in its words: a proxy may send back what it was sent."""
    seen: set[int] = set()
    while key and error is not None and id(error) not in seen:
        seen.add(id(error))
        if key in f"{error} {error!r}":
            return True
        error = error.__cause__ or error.__context__
    return False


def scrubbed(text: str, key: str | None) -> str:
    """``text`` without the token ``key``."""
    return text.replace(key, "<token>") if key else text


def base_names() -> str:
    """What a base can be given as, for remedies."""
    return f"give {DEFAULT!r}, a model folder, a .gguf file or a hub name like 'Qwen/Qwen3-0.6B'"


def near_paths(path: Path) -> str:
    """A hint ("; nearest: …") with the entries beside ``path`` whose names come close, or an empty string."""
    try:
        there = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return f"; the folder {path.parent} does not exist" if len(path.parts) > 2 or path.is_absolute() else ""
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(str(path.parent / entry) for entry in near)}" if near else ""
