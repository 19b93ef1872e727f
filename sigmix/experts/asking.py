"""Asking the Hugging Face hub: as whom, and what its refusals say.

A token is passed on to `huggingface_hub` and nowhere else: it stands in no message, file or attribute of ours.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from sigmix.errors import ConfigError, HubError, SigmixError
from sigmix.experts.card import REPO
from sigmix.hub import explain, near_paths, scrubbed, shows, status_of


def check_repo(repo: object) -> None:
    """Raise `ConfigError` unless ``repo`` reads as "user/name"."""
    if not isinstance(repo, str) or not REPO.fullmatch(repo):
        raise ConfigError(
            f"{repo!r} is no name of a hub model: it needs a user or an organisation, and a name",
            remedy="for example 'user/addition'",
        )


@contextlib.contextmanager
def asking(
    name: str, token: str | None, revision: str | None = None, *, writes: bool = False, what: str = "hub model"
) -> Iterator[str | None]:
    """Yield the token to ask with (None: nobody's), and turn the hub's refusals into one clear `HubError`.

    Raises:
        ConfigError: a token that cannot be one.
    """
    from huggingface_hub import constants, get_token

    own = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    key = (token or own or "").strip() or None
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        # the HTTP client would quote it in its own error
        raise ConfigError(
            "the token for the hub holds blanks or letters that no token has", remedy="run: hf auth login, or mend it"
        )
    try:
        with _silent():
            yield key
    except SigmixError:
        raise
    except Exception as error:
        found = _refusal(error, name, revision, writes, what)
        if found is None and not shows(error, key):
            raise
        message, remedy = found or (f"asking the hub about {name!r} failed: {error}", "run it again, or: hf auth login")
        raise HubError(scrubbed(message, key), remedy=remedy) from (None if shows(error, key) else error)


def _refusal(
    error: Exception, name: str, revision: str | None, writes: bool, what: str
) -> tuple[str, str] | None:
    from huggingface_hub import constants

    status = status_of(error) or status_of(error.__cause__)
    if what == "collection" and status in (401, 404):
        return f"there is no folder and no public collection {name!r}", (
            "check the slug, the end of its address; if it is private, run: hf auth login"
        )
    if not writes:
        return explain(error, name, revision=revision, hint=near_paths(Path(name)), instead="give an expert's folder")
    owner = name.split("/")[0]
    if status == 401:
        return f"the hub does not let you push to {name!r}: it wants a valid token", (
            f"run: hf auth login, or set HF_TOKEN; {constants.ENDPOINT}/settings/tokens makes one that may write"
        )
    if status == 403:
        return f"your token may not push to {name!r}", (
            f"take one that may write to {owner!r}, from {constants.ENDPOINT}/settings/tokens, or push under your name"
        )
    if status == 404:
        return f"the hub has no {owner!r} to push {name!r} to, or your token may not see it", "check the name"
    if status == 409 or status == 412:
        return f"the hub refuses {name!r} ({status}): somebody else is changing it", "run it again"
    if status == 400 or isinstance(error, ValueError):
        return f"the hub refuses what was pushed to {name!r}: {error}", "mend that and run it again"
    if status is None and not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
        if not isinstance(error, RuntimeError):  # what the library makes of a transfer that fails
            return None
        return f"the upload to {name!r} failed: {error}", "run it again"
    if status is None:
        return f"cannot reach the hub to push to {name!r} ({type(error).__name__})", "check the network, run it again"
    return f"the hub failed on {name!r} with status {status}", "run it again later"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No progress bars and no notes of the library for files this small; its settings come back afterwards."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    level, hidden = logging.get_verbosity(), are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        if not hidden:
            disable_progress_bars()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if not hidden:
                enable_progress_bars()
