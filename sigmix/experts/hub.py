"""Experts on the Hugging Face hub: download, upload, and collections as banks.

An expert is a model repository with the files of `sigmix.experts.serialization`. Only those are downloaded, so neither
pickles nor code. Endpoint, cache and login are huggingface_hub's (``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN``).
Collections are read only; ``hf collections`` edits them.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sigmix.errors import ConfigError, ExpertError, HubError, OutputError
from sigmix.experts import serialization
from sigmix.experts.metadata import COMPUTED, thaw
from sigmix.experts.model_card import REPO_ID, without_path
from sigmix.experts.requests import RequestStatistics
from sigmix.experts.serialization import CARD, CONFIG, META, REQUESTS, WEIGHTS
from sigmix.models.default import offline
from sigmix.models.hub import hub_errors, near_paths, status_of
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import atomic_dir, file_lock, read_json, read_json_object, write_json, writing
from sigmix.utils.logging import quiet

COLLECTION = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+-[0-9a-f]{24}", re.ASCII)
FILES = (CONFIG, WEIGHTS, META, CARD, REQUESTS)
MAX_BYTES = 1 << 30  # of a file that is downloaded; experts have a few MB
RECORD = ".sigmix-hub.json"  # written by `download_bank`: {"source", "experts": {name: {"repo", "revision"}}}


class Snapshot(NamedTuple):
    """A downloaded expert: its folder in the hub's cache, the repository, and the commit hash."""

    folder: Path
    repo: str
    revision: str


class NoExpertError(ExpertError):
    """Hub model that is not an SVF adapter."""


def is_repo_id(path: object) -> bool:
    """Return whether ``path`` has the form "user/name" and is not an existing path, which takes precedence."""
    return isinstance(path, str) and bool(REPO_ID.fullmatch(path)) and not Path(path).expanduser().exists()


def check_repo_id(repo_id: object) -> None:
    """Raise `ConfigError` unless ``repo_id`` has the form "user/name"."""
    if not isinstance(repo_id, str) or not REPO_ID.fullmatch(repo_id):
        raise ConfigError(f"{repo_id!r} is not a hub id of the form user/name", remedy="for example 'user/dates'")


# ---------------------------------------------------------------------- download


def download(repo_id: str, revision: str | None = None, token: str | None = None) -> Snapshot:
    """Download an expert into the hub's own cache, or find it there.

    Args:
        revision: branch, tag or commit hash; default: the current main branch (offline: the cached one).

    Raises:
        HubError: not found, refused, or unreachable and not cached. NoExpertError: not an SVF adapter.
        ExpertError: incomplete, or a file larger than `MAX_BYTES`.
    """
    import huggingface_hub

    no_expert = NoExpertError(f"the hub model {repo_id!r} is not an expert: no {CONFIG}", remedy="check the name")
    with _hub(repo_id, token, hint=near_paths(Path(repo_id)), instead="give an expert's folder") as key:
        options: dict[str, Any] = {"local_files_only": offline(), "token": key}
        sizes = _file_sizes(repo_id, revision, key)
        for file in FILES:
            if (size := sizes.get(file) or 0) > MAX_BYTES:
                raise ExpertError(
                    f"{file} of the hub model {repo_id!r} has {size / 1e9:.1f} GB, too much for an expert",
                    remedy=f"check the repository; to use it anyway: hf download {repo_id}, and give that folder",
                )
        if sizes and CONFIG not in sizes:  # known without downloading, so a gated base model is no error in a bank
            raise no_expert
        # the small files first: other adapters may have gigabytes of weights
        small = [CONFIG, META, CARD]
        folder = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=small, **options))
        if not (folder / CONFIG).is_file():
            raise no_expert
        if (kind := read_json(folder / CONFIG, ExpertError, serialization.SAVED_AGAIN).get("peft_type")) != "SVF":
            raise NoExpertError(f"the hub model {repo_id!r} is a {kind} adapter, not SVF", remedy="load it with PEFT")
        commit, files = folder.name, list(FILES)
        folder = Path(huggingface_hub.snapshot_download(repo_id, revision=commit, allow_patterns=files, **options))
    if not (folder / WEIGHTS).is_file():
        raise ExpertError(
            f"the hub model {repo_id!r} has no {WEIGHTS}, and pickled weights are not downloaded",
            remedy="save it with safetensors",
        )
    return Snapshot(folder, repo_id, folder.name)


def read(snapshot: Snapshot) -> serialization.Contents:
    """Read a downloaded expert.

    Raises:
        ExpertError: names the repository.
    """
    try:
        return serialization.read(snapshot.folder, snapshot.repo.split("/")[-1])
    except ExpertError as error:
        raise ExpertError(f"the hub model {snapshot.repo!r}: {error.message}", remedy=error.remedy) from error


def download_bank(source: str | Sequence[str], token: str | None = None) -> Path:
    """Copy the experts of a collection, or of several repositories, into a folder of our cache and return it.

    Models of a collection that are not experts, such as their base, are skipped. The folder is keyed by the commits and
    never changed. If the hub is unreachable, a collection resolves to its last folder.

    Args:
        source: a collection's slug, or the experts' repositories.

    Raises:
        HubError, ExpertError: see `download`. ExpertError: no experts, or two of the same name.
    """
    prefix = re.sub(r"[^\w.-]+", "--", source) if isinstance(source, str) else "experts"
    last = cache_dir() / "banks" / f"{prefix}.json"
    if isinstance(source, str):
        label, repos = source, _collection_models(source, token)
        if repos is None:
            return _last_folder(source, last)
    else:
        repos = list(dict.fromkeys(source))
        label = ", ".join(repos)
        if not repos:
            raise ConfigError("the list of repositories is empty", remedy="for example ['user/dates']")
        for repo in repos:
            check_repo_id(repo)
    snapshots = []
    for repo in repos:
        try:
            snapshots.append(download(repo, token=token))
        except NoExpertError:
            if not isinstance(source, str):
                raise
    if not snapshots:
        raise ExpertError(
            f"the collection {label!r} has no experts",
            remedy=f"push one and add it: hf collections add-item {label} user/name model",
        )
    commits = "\n".join(sorted(f"{one.repo}@{one.revision}" for one in snapshots))
    folder = last.parent / f"{prefix}-{hashlib.sha256(commits.encode()).hexdigest()[:16]}"
    with file_lock(last.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            _copy_bank(snapshots, folder, label)
    if isinstance(source, str):
        write_json(last, {"source": source, "folder": folder.name})
    return folder


def pull(source: str, out: Path, revision: str | None = None) -> list[dict[str, str]]:
    """Copy an expert, or each expert of a collection into its own subfolder, to the new folder ``out``.

    Returns:
        One row per expert: name, repo, revision, path.

    Raises:
        OutputError: ``out`` exists. ConfigError: a collection with a revision. Else as `download_bank`.
    """
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists already", remedy="give another --out, or remove it first")
    if COLLECTION.fullmatch(source):
        if revision is not None:
            raise ConfigError(f"{source!r} is a collection, which has no revisions", remedy="leave out --revision")
        folder = download_bank(source)
        rows = [{"name": name, **one, "path": str(out / name)} for name, one in record(folder)["experts"].items()]
        with atomic_dir(out) as temporary:
            for row in rows:
                shutil.copytree(folder / row["name"], temporary / row["name"])
        return rows
    check_repo_id(source)
    snapshot = download(source, revision)
    name = read(snapshot).name
    with atomic_dir(out) as temporary:
        _copy(snapshot, temporary)
    return [{"name": name, "repo": snapshot.repo, "revision": snapshot.revision, "path": str(out)}]


def record(folder: Path) -> dict[str, Any]:
    """Return the `RECORD` of a folder made by `download_bank`; empty for any other folder."""
    return read_json_object(folder / RECORD)


def _file_sizes(repo_id: str, revision: str | None, token: str | None) -> dict[str, int | None]:
    """Return {file: bytes} of a repository; empty if the request fails, which the download then reports."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi(token=token)
        info = None if offline() else api.model_info(repo_id, revision=revision, files_metadata=True)
    except (OSError, ValueError, huggingface_hub.errors.HTTPError):
        return {}
    return {file.rfilename: file.size for file in (info.siblings if info is not None else None) or ()}


def _collection_models(slug: str, token: str | None) -> list[str] | None:
    """Return the models of a collection, or None if the hub is unreachable."""
    import huggingface_hub

    if not REPO_ID.fullmatch(slug):
        raise ConfigError(f"{slug!r} is not a collection slug", remedy="give the end of its address: user/title-<id>")
    if offline():
        return None
    try:
        with _hub(slug, token, action="read the collection") as key:
            items = huggingface_hub.HfApi(token=key).get_collection(slug).items
    except HubError as error:
        status = status_of(error.__cause__)
        if error.__cause__ is not None and (status is None or status >= 500):
            return None
        raise
    return [item.item_id for item in items if item.item_type == "model"]


def _last_folder(slug: str, last: Path) -> Path:
    name = read_json_object(last).get("folder")
    folder = last.parent / str(name)
    if name is None or not folder.is_dir():
        why = "offline mode is set" if offline() else "the hub cannot be reached"
        raise HubError(
            f"the collection {slug!r} is not in the cache, and {why}",
            remedy="unset SIGMIX_OFFLINE and HF_HUB_OFFLINE, or check the network",
        )
    return folder


def _copy_bank(snapshots: Sequence[Snapshot], folder: Path, label: str) -> None:
    """Copy, not link: the hub's cache may be cleared while a bank is in use."""
    by_name: dict[str, Snapshot] = {}
    for one in snapshots:
        if (other := by_name.setdefault(name := read(one).name, one)) is not one:
            raise ExpertError(
                f"two experts of {label} are named {name!r}: {other.repo} and {one.repo}",
                remedy='remove one, or open a list without it: Bank.from_hub(["user/name", …])',
            )
    with atomic_dir(folder) as temporary:
        for name, one in by_name.items():
            (temporary / name).mkdir()
            _copy(one, temporary / name)
        experts = {name: {"repo": one.repo, "revision": one.revision} for name, one in sorted(by_name.items())}
        write_json(temporary / RECORD, {"source": label, "experts": experts})


def _copy(snapshot: Snapshot, folder: Path) -> None:
    for file in FILES:
        if (snapshot.folder / file).is_file():
            with writing(folder / file):
                shutil.copyfile(snapshot.folder / file, folder / file)


@contextlib.contextmanager
def _hub(name: str, token: str | None, **options: Any) -> Iterator[str | None]:
    """`hub_errors` for experts, without progress bars and warnings for files this small."""
    with quiet(), hub_errors(name, HubError, token=token, **options) as key:
        yield key


# ---------------------------------------------------------------------- upload


class Pushed(NamedTuple):
    """URL of the repository, commit hash, and whether anything changed."""

    url: str
    revision: str
    changed: bool


def push(
    name: str, z: Mapping[str, torch.Tensor], meta: Mapping[str, Any], repo_id: str, *,
    requests: RequestStatistics | None = None, token: str | None = None, private: bool = False,
    revision: str | None = None, commit_message: str | None = None,
) -> Pushed:  # fmt: skip
    """Upload an expert in one commit; the repository and the branch are created if missing.

    Local paths in the metadata are shortened (`public_metadata`). The commit is refused if another one came in between.

    Raises:
        ConfigError: not "user/name". OutputError: the repository has files other than an expert's, or is public
        although ``private`` is set. HubError: the hub refuses or cannot be reached.
    """
    import huggingface_hub

    check_repo_id(repo_id)
    if offline():
        raise HubError(
            f"cannot push to {repo_id!r}: offline mode is set", remedy="unset SIGMIX_OFFLINE and HF_HUB_OFFLINE"
        )
    files = serialization.contents(name, z, public_metadata(meta), requests, repo_id)
    additions = [huggingface_hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=files[file]) for file in files]
    with _hub(repo_id, token, action="push to") as key:
        api = huggingface_hub.HfApi(token=key)
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        head = api.model_info(repo_id)
        if private and not head.private:
            raise OutputError(
                f"the hub model {repo_id!r} exists and is public, so nothing was pushed",
                remedy="make it private in its settings, or give another name",
            )
        new_branch = False
        if revision is not None:
            try:
                head = api.model_info(repo_id, revision=revision)
            except huggingface_hub.errors.RevisionNotFoundError:
                new_branch = True
        _check_files(repo_id, [file.rfilename for file in head.siblings or ()])
        if new_branch:
            api.create_branch(repo_id, branch=str(revision), revision=head.sha)
        there = {one.rfilename for one in head.siblings or ()}
        stale = [huggingface_hub.CommitOperationDelete(REQUESTS)] * (REQUESTS in there - files.keys())
        commit = api.create_commit(
            repo_id, [*additions, *stale], commit_message=commit_message or f"Expert {name}", revision=revision,
            parent_commit=head.sha,
        )  # fmt: skip
    return Pushed(str(url), commit.oid, commit.oid != head.sha)


def _check_files(repo_id: str, files: Sequence[str]) -> None:
    allowed = {*serialization.FILES, ".gitattributes", "LICENSE", "LICENSE.md"}
    others = sorted(file for file in files if file not in allowed)
    if CONFIG in files and META not in files:
        others.insert(0, f"the {CONFIG} of another adapter")
    if others:
        raise OutputError(
            f"the hub model {repo_id!r} has other files than an expert's, such as {others[0]}",
            remedy="give the name of a new repository, or remove the other files there",
        )


PART = r"[^\s/\\\"'?&,;]+"
PATHS = re.compile(
    r"(?<![\w+.-])(?P<address>(?!file:)[A-Za-z][\w+.-]+://[^\s/\"'][^\s\"']*)"
    r"|(?<![\w/.~\\])(?:(?:file|[A-Za-z][\w+.-]+(?=:///)):/+(?:[A-Za-z]:[/\\]+)?|[A-Za-z]:[/\\]+|\\{2,}|~?/|\.[/\\]"
    rf"|(?:{PART}[/\\])*?(?:\.\.[/\\])+)(?P<path>{PART}(?:[/\\]+{PART})*)[/\\]?"
)
"""A local path, from its root to its last part; or a URL, which is kept."""


def public_metadata(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata in which every local path is shortened to its last part, and home folders to ``~``."""
    home = str(Path.home())

    def last_part(match: re.Match[str]) -> str:
        if match["address"]:
            return match[0]
        parts = re.split(r"[/\\]+", match["path"])
        if f"/{match['path']}" == home or (len(parts) == 2 and parts[0].lower() in ("home", "users")):
            return "~"  # the last part of a home folder is a user name
        return match[0] if len(parts) == 1 else parts[-1]

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if isinstance(value, str):
            # PATHS ends a path at a blank, so a home folder with blanks goes first
            return PATHS.sub(last_part, value.replace(home, "~") if " " in home else value)
        return value

    plain = thaw(meta)
    public = {key: value if key in COMPUTED else shorten(value) for key, value in plain.items()}
    if name := (plain.get("base") or {}).get("name"):
        public["base"] = {**plain["base"], "name": "~" if shorten(name) == "~" else without_path(name)}
    return public
