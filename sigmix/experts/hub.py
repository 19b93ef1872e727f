"""Experts on the Hugging Face hub: fetching one, and a collection of them as a folder.

An expert there is a model repository with the files of `sigmix.experts.serialization`. Only those four are ever
fetched, so
no pickle and no code. Where the hub is (``HF_ENDPOINT``), its cache (``HF_HOME``) and who asks (``hf auth login`` or
``HF_TOKEN``) is the business of `huggingface_hub`.

What it does not do: make or change collections; ``hf collections`` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sigmix.errors import ConfigError, ExpertError, HubError, OutputError, SigmixError
from sigmix.experts import serialization as directory
from sigmix.experts.metadata import COMPUTED, thaw
from sigmix.experts.model_card import REPO, without_path
from sigmix.models.default import offline
from sigmix.models.hub import explain, near_paths, scrubbed, shows, status_of
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import atomic_dir, file_lock, write_json, writing

COLLECTION = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+-[0-9a-f]{24}", re.ASCII)
"""A collection's slug: "user/title-" and 24 hexadecimal digits."""


FILES = (directory.CONFIG, directory.WEIGHTS, directory.META, directory.CARD)


SMALL = (directory.CONFIG, directory.META, directory.CARD)


LARGEST = 1 << 30
"""Bytes of a file that is fetched at most: experts take a few MB."""


NOTE = ".sigmix-hub.json"
"""In a folder that `gather` made: {"source", "experts": {name: {"repo", "revision"}}}."""


class Fetched(NamedTuple):
    """A snapshot in the hub's cache: its folder, the repository, and the commit's hash."""

    folder: Path
    repo: str
    revision: str


class NoExpertError(ExpertError):
    """A hub model that holds no expert."""


def names_repo(path: object) -> bool:
    """Whether it reads as "user/name" and is no path that exists: what exists wins."""
    return isinstance(path, str) and bool(REPO.fullmatch(path)) and not Path(path).expanduser().exists()


def names_collection(path: object) -> bool:
    """Whether it reads as a collection's slug and is no path that exists."""
    return names_repo(path) and bool(COLLECTION.fullmatch(str(path)))


def fetch(repo: str, revision: str | None = None, token: str | None = None) -> Fetched:
    """Download an expert into the hub's own cache, or find it there.

    Args:
        revision: a branch, a tag or a commit's hash; default: the main branch as it is now (offline: as it was last).

    Raises:
        HubError: the hub has it not, refuses, or cannot be reached and the cache has it not.
        NoExpertError: it holds something else. ExpertError: it is incomplete, or a file is larger than `LARGEST`.
    """
    import huggingface_hub

    def snapshot(files: Sequence[str], at: str | None) -> Path:
        with asking(repo, token, revision) as key:
            return Path(
                huggingface_hub.snapshot_download(
                    repo, revision=at, allow_patterns=list(files), local_files_only=offline(), token=key
                )
            )

    none = NoExpertError(
        f"the hub model {repo!r} is no expert: it has no {directory.CONFIG}", remedy="give an expert's repository"
    )
    # the list of files, which a gated model shows too, so that a base whose terms nobody accepted is known for one
    listed = _files(repo, revision, token)
    if listed is not None and directory.CONFIG not in listed:
        raise none
    _check_sizes(repo, listed or {})
    # first what is small: a model that is no expert may have weights of many gigabytes
    folder = snapshot(SMALL, revision)
    config = folder / directory.CONFIG
    if not config.is_file():
        raise none
    kind = directory.read_json(config).get("peft_type")
    if kind != "SVF":
        raise NoExpertError(
            f"the hub model {repo!r} holds a {kind or 'PEFT'} adapter, not SVF, so it has no z",
            remedy="load it with PEFT; sigmix experts are trained with SVFConfig",
        )
    folder = snapshot(FILES, folder.name)
    if not (folder / directory.WEIGHTS).is_file():
        raise ExpertError(
            f"the hub model {repo!r} is no complete expert: it has no {directory.WEIGHTS}; weights of another kind, "
            "such as pickled ones, are not fetched",
            remedy="have its author save it with safetensors",
        )
    return Fetched(folder, repo, folder.name)


def read(found: Fetched) -> directory.Contents:
    """What a snapshot holds, checked like any expert's directory.

    Raises:
        ExpertError: names the repository and what is wrong with it.
    """
    try:
        return directory.read(found.folder, found.repo.split("/")[-1])
    except ExpertError as error:
        raise ExpertError(f"the hub's expert {found.repo!r}: {error.message}", remedy=error.remedy) from error


def gather(source: str | Sequence[str], token: str | None = None) -> Path:
    """A folder in our cache with the experts of a collection, or of several repositories, as they are on the hub now.

    Models of a collection that are no experts, such as their base, are left out. The folder is made once for the same
    commits and never changed; without the hub, it is the one that was made last.

    Args:
        source: a collection's slug, or experts' repositories.

    Raises:
        HubError, ExpertError: see `fetch`. ExpertError: there are no experts, or two have the same name.
    """
    short = re.sub(r"[^\w.-]+", "--", source) if isinstance(source, str) else "experts"
    last = cache_dir() / "banks" / f"{short}.json"
    found: list[Fetched] = []
    if isinstance(source, str):
        label, listed = source, _listed(source, token)
        if listed is None:
            return _last(source, last)
        repos = listed
    else:
        repos = list(dict.fromkeys(source))
        if not repos:
            raise ConfigError("no repositories of experts were named", remedy="for example ['user/addition']")
        for repo in repos:
            check_repo(repo)
        label = ", ".join(repos)
    for repo in repos:
        try:
            found.append(fetch(repo, token=token))
        except NoExpertError:
            if not isinstance(source, str):
                raise
    if not found:
        raise ExpertError(
            f"the collection {label!r} holds no experts",
            remedy=f"push one and add it: hf collections add-item {label} user/name model",
        )
    key = hashlib.sha256("\n".join(sorted(f"{one.repo}@{one.revision}" for one in found)).encode()).hexdigest()[:16]
    folder = last.parent / f"{short}-{key}"
    with file_lock(last.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            _copy(found, folder, label)
    if isinstance(source, str):
        write_json(last, {"source": source, "folder": folder.name})
    return folder


def pull(source: str, out: Path, revision: str | None = None, token: str | None = None) -> list[dict[str, str]]:
    """Copy an expert, or the experts of a collection each into a folder of its own, to the new folder ``out``.

    Returns:
        One row per expert: name, repo, revision, path.

    Raises:
        OutputError: there is something at ``out``. ConfigError: a collection with a revision. Else as `gather`.
    """
    if out.exists() or out.is_symlink():
        raise OutputError(f"there is something at {out} already", remedy="give another --out, or remove it first")
    if COLLECTION.fullmatch(source):
        if revision is not None:
            raise ConfigError(f"{source!r} is a collection, which has no revisions", remedy="leave out --revision")
        made = gather(source, token)
        rows = [{"name": name, **one, "path": str(out / name)} for name, one in note(made)["experts"].items()]
        with atomic_dir(out) as temporary:
            for row in rows:
                shutil.copytree(made / row["name"], temporary / row["name"])
        return rows
    check_repo(source)
    one = fetch(source, revision, token)
    name = read(one).name
    with atomic_dir(out) as temporary:
        _copy_files(one, temporary)
    return [{"name": name, "repo": one.repo, "revision": one.revision, "path": str(out)}]


def note(folder: Path) -> dict[str, Any]:
    """What `gather` noted in a folder; an empty object for any other."""
    return directory.read_json(folder / NOTE) if (folder / NOTE).is_file() else {}


def _files(repo: str, revision: str | None, token: str | None) -> dict[str, int | None] | None:
    """{file: bytes, if the hub says} of a model; None if the hub does not tell, and then fetching says why."""
    import huggingface_hub

    if offline():
        return None
    try:
        with asking(repo, token, revision) as key:
            about = huggingface_hub.HfApi(token=key).model_info(repo, revision=revision, files_metadata=True)
    except HubError:
        return None
    return {file.rfilename: file.size for file in about.siblings or ()}


def _check_sizes(repo: str, listed: Mapping[str, int | None]) -> None:
    for file in FILES:
        if (count := listed.get(file) or 0) > LARGEST:
            raise ExpertError(
                f"the {file} of the hub's {repo!r} has {count / 1e9:.1f} GB, as no expert has, so it was not fetched",
                remedy="ask its author what it is; hf download fetches it all the same, and its folder can be loaded",
            )


def _listed(slug: str, token: str | None) -> list[str] | None:
    """The models of a collection; None if the hub cannot be asked."""
    import huggingface_hub

    if not REPO.fullmatch(slug):
        raise ConfigError(f"{slug!r} is no collection's slug", remedy="it is the end of its address: user/title-<id>")
    if offline():
        return None
    try:
        with asking(slug, token, what="collection") as key:
            items = huggingface_hub.HfApi(token=key).get_collection(slug).items
    except HubError as error:
        status = status_of(error.__cause__)
        if error.__cause__ is not None and (status is None or status >= 500):
            return None
        raise
    return [item.item_id for item in items if item.item_type == "model"]


def _last(slug: str, noted: Path) -> Path:
    """The folder that was made of a collection last."""
    found = directory.read_json(noted).get("folder") if noted.is_file() else None
    folder = noted.parent / str(found)
    if found is None or not folder.is_dir():
        why = "offline mode is set" if offline() else "the hub cannot be reached"
        raise HubError(
            f"the collection {slug!r} is not in the cache, and {why}",
            remedy="unset SIGMIX_OFFLINE and HF_HUB_OFFLINE to download it, or check the network",
        )
    return folder


def _copy(found: Sequence[Fetched], folder: Path, label: str) -> None:
    """Copies and not links: the hub's cache may be cleared while a bank is in use."""
    names: dict[str, Fetched] = {}
    for one in found:
        name = read(one).name
        if name in names:
            raise ExpertError(
                f"two experts of {label} are called {name!r}: {names[name].repo} and {one.repo}",
                remedy='remove one, or open a list without it: Bank.from_hub(["user/name", …])',
            )
        names[name] = one
    with atomic_dir(folder) as temporary:
        for name, one in names.items():
            (temporary / name).mkdir()
            _copy_files(one, temporary / name)
        experts = {name: {"repo": names[name].repo, "revision": names[name].revision} for name in sorted(names)}
        write_json(temporary / NOTE, {"source": label, "experts": experts})


def _copy_files(found: Fetched, folder: Path) -> None:
    for file in FILES:
        if (found.folder / file).is_file():
            with writing(folder / file):
                shutil.copyfile(found.folder / file, folder / file)


# --- Pushing an expert to the Hugging Face hub.


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
    private: bool = False, revision: str | None = None, commit_message: str | None = None,
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
            repo, adding, commit_message=commit_message or f"Expert {name}", revision=revision, parent_commit=before.sha
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


# --- Asking the Hugging Face hub: as whom, and what its refusals say.


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
