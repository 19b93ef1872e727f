"""Bases from the Hugging Face hub: download into the hub's own cache, and name what went wrong.

Also the hints that a name which leads nowhere gets. Only configs, tokenizers and safetensors are fetched.
"""

from __future__ import annotations

import difflib
import errno
from pathlib import Path

from sigmix.errors import BaseModelError
from sigmix.fetch import DEFAULT, offline

HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja")


def hub_folder(name: str, revision: str | None) -> Path:
    """Download a hub model into the hub's own cache, or find it there, and return its folder."""
    import huggingface_hub
    from huggingface_hub import errors

    url = f"https://huggingface.co/{name}"
    typo = difflib.get_close_matches(name.split("/")[-1].lower(), [DEFAULT], n=1, cutoff=0.6)
    hint = f"; did you mean {DEFAULT!r}?" if typo else near_paths(Path(name))
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(HUB_FILES), local_files_only=offline()
            )
        )
    except errors.GatedRepoError as error:
        raise BaseModelError(
            f"the hub model {name!r} is gated: its owner wants you to accept its terms first",
            remedy=f"accept them at {url}, then run: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BaseModelError(
            f"there is no folder and no public hub model {name!r}{hint}",
            remedy=f"check the name; if the model is private, run: hf auth login; or {base_names()}",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BaseModelError(
            f"the hub model {name!r} has no revision {revision!r}", remedy=f"see {url}/commits for those it has"
        ) from error
    except errors.HFValidationError as error:
        raise BaseModelError(f"{name!r} cannot be a hub name: {error}", remedy=base_names()) from error
    except (errors.HfHubHTTPError, OSError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise BaseModelError(
                f"the disk is full: {name!r} does not fit into {huggingface_hub.constants.HF_HUB_CACHE}",
                remedy="free some space, or set HF_HOME to another disk",
            ) from error
        if offline():
            raise BaseModelError(
                f"{name!r} is no local folder and not in the hub's cache, and offline mode is set{hint}",
                remedy="unset SIGMIX_OFFLINE and HF_HUB_OFFLINE to download it, or give a folder",
            ) from error
        raise BaseModelError(
            f"cannot reach the hub for {name!r} ({type(error).__name__}), and it is not in the hub's cache{hint}",
            remedy=f"check the network and run it again, or {base_names()}",
        ) from error


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
