"""Hugging Face hub: download a base model into the hub's own cache, and translate the hub's errors.

Only configs, tokenizers and the safetensors that transformers loads are downloaded: some repositories hold the same
weights a second time, in other formats or in folders.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sigmix.errors import BaseModelError, ConfigError, SigmixError
from sigmix.models.default import DEFAULT, OFFLINE_VARIABLES, offline
from sigmix.utils.safetensors import INDEX, SINGLE, weight_files

HUB_FILES = ("model.safetensors", "model*-of-*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
IGNORED = ("*/*",)  # in the hub's patterns a star matches slashes too
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def hub_folder(name: str, revision: str | None, check: Callable[[Path], None] | None = None) -> Path:
    """Download a base model into the hub's own cache, or find it there, and return its folder.

    Args:
        check: called before a first download of weights with the folder of ``config.json``; raises to refuse the model.

    Raises:
        BaseModelError: not found, gated, or unreachable and not cached, or cached only in part; the cache cannot be
            written.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    typo = difflib.get_close_matches(name.split("/")[-1].lower(), [DEFAULT], n=1, cutoff=0.6)
    hint = f"; did you mean {DEFAULT!r}?" if typo else near_paths(Path(name))
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    broken_off = any(cache.glob("blobs/*.incomplete"))
    if broken_off:
        hint = "; it is in the hub's cache only in part"
    with hub_errors(name, BaseModelError, hint=hint, instead=base_names()) as token:
        options: dict[str, Any] = {"revision": revision, "local_files_only": offline(), "token": token}
        if check is not None and not any(cache.glob("snapshots/*/*.safetensors*")):
            check(Path(huggingface_hub.snapshot_download(name, allow_patterns=["config.json"], **options)))
        folder = Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(HUB_FILES), ignore_patterns=list(IGNORED), **options
            )
        )
    # online the folder is complete, unless the hub was unreachable and the cache answered
    if (offline() or broken_off) and (lacking := _lacking(folder)):
        version = f" --revision {revision}" if revision else ""
        raise BaseModelError(
            f"{name} is in the hub's cache only in part: {folder} lacks {', '.join(lacking)}",
            remedy=f"run it again online (without {', '.join(OFFLINE_VARIABLES)}), or: hf download {name}{version}",
        )
    return folder


def _lacking(folder: Path) -> list[str]:
    """Return the files that a snapshot of a model lacks."""
    files = {entry.name for entry in folder.iterdir() if entry.is_file()}  # a link to a missing blob is no file
    lacking = [] if "config.json" in files else ["config.json"]
    if files.isdisjoint((SINGLE, INDEX)):
        lacking.append(SINGLE)
    else:
        lacking += [name for name in weight_files(folder) if name not in files]
    if files.isdisjoint(TOKENIZERS):
        lacking.append("a tokenizer")
    return lacking


@contextlib.contextmanager
def hub_errors(
    name: str,
    error_class: type[SigmixError],
    *,
    action: str = "download",
    token: str | None = None,
    hint: str = "",
    instead: str = "",
) -> Iterator[str | None]:
    """Yield the token to send, and re-raise huggingface_hub's errors with its own message and one line of remedy.

    The token appears neither in the message nor in a chained exception, even if a proxy echoes it. Other errors pass.

    Args:
        name: repository or collection. action: verb for the message, such as "push to".
        token: default: that of ``hf auth login`` or ``HF_TOKEN``.
        hint: appended to the message. instead: appended to the remedy: an alternative to the hub.

    Raises:
        error_class: an error of the hub, the network or the hub's cache. ConfigError: a malformed token.
    """
    token = None if offline() else _token(token)
    try:
        yield token
    except SigmixError:
        raise
    except Exception as error:
        remedy, exposed = _remedy(error, name), _shows(error, token)
        if remedy is None and not exposed:
            raise
        if status_of(error) is None and status_of(error.__cause__) is not None:
            text = str(error.__cause__)  # the download falls back to the cache, and only that error is raised
        else:
            text = str(error) or type(error).__name__
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("For more information")]
        text = " ".join(lines[:2]).rstrip(".")
        message = f"cannot {action} {name!r}: {text}{hint}"
        if token:
            message = message.replace(token, "<token>")
        remedy = f"{remedy or 'run: hf auth login'}{f'; or {instead}' if instead else ''}"
        raise error_class(message, remedy=remedy) from (None if exposed else error)


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error response, or None."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _remedy(error: Exception, name: str) -> str | None:
    """Return the fix for an error of huggingface_hub, or None if the error is not one of its own."""
    from huggingface_hub import constants, errors

    url = f"{constants.ENDPOINT}/{name}"
    status = status_of(error) or status_of(error.__cause__)
    if isinstance(error, errors.GatedRepoError):
        return f"accept its terms at {url}, then run: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"choose a revision from {url}/commits"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return "check the name; if it is private, run: hf auth login"
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return "free some space, or set HF_HOME to another disk"
    if isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"set HF_HOME to a folder that you can write to (now {constants.HF_HUB_CACHE})"
    if isinstance(error, ValueError):  # an invalid name, or a model card that the hub rejects
        return "correct it and run it again"
    if not isinstance(error, (OSError, RuntimeError)) and not type(error).__module__.startswith("httpx"):
        return None  # RuntimeError: a failed upload
    if offline():
        return "unset SIGMIX_OFFLINE and HF_HUB_OFFLINE to download it, or give a folder"
    if status in (401, 403):
        return f"run: hf auth login, with a token from {constants.ENDPOINT}/settings/tokens that has the permission"
    if status == 429:
        return "run it again in a few minutes"
    return "run it again" if status is not None else "check the network and run it again"


def _token(given: str | None) -> str | None:
    """Return the token to send. Malformed ones are refused here: the HTTP client would quote them in its error."""
    from huggingface_hub import constants, get_token

    stored = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    token = (given or stored or "").strip() or None
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError("the token for the hub has invalid characters", remedy="run: hf auth login")
    return token


def _shows(error: BaseException | None, token: str | None) -> bool:
    """Return whether any error of a chain contains the token: a proxy may echo it."""
    seen: set[int] = set()
    while token and error is not None and id(error) not in seen:
        seen.add(id(error))
        if token in f"{error} {error!r}":
            return True
        error = error.__cause__ or error.__context__
    return False


def base_names() -> str:
    """Return the valid ways to name a base model, for remedies."""
    return f"give {DEFAULT!r}, a model folder, a .gguf file or a hub name like 'Qwen/Qwen3-0.6B'"


def near_paths(path: Path) -> str:
    """Return a hint ("; nearest: …") with similar names beside ``path``, or an empty string."""
    try:
        entries = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return f"; the folder {path.parent} does not exist" if len(path.parts) > 2 or path.is_absolute() else ""
    near = difflib.get_close_matches(path.name, entries, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(str(path.parent / entry) for entry in near)}" if near else ""
