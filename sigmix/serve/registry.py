"""Registry of served models: experts, saved mixtures, `base` and `auto`."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sigmix.adapt.two_pass import AUTO
from sigmix.errors import ConfigError, ExpertError, InputError, UnknownNameError
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import check_name, name_from_folder
from sigmix.experts.mix import Mix
from sigmix.serve.store import Store

BASE = Mix.base().id

MAX_MIXES_PER_CLIENT = 100

FINE_TUNED = re.compile(r"ft:[^:+\s]*:[^:+\s]*:[a-z]+")
"""Name of a fine-tuned model, ft:BASE:SUFFIX:ID, in an expression; the expert is named by `name_from_folder` of it."""


class ModelRegistry(Mapping[str, Expert]):
    """Experts by name, usable as an engine's bank, and saved mixtures by name.

    Readers need no lock: the dictionaries are replaced, never changed.

    Args:
        bank: initial experts.
        store: persistent store of mixtures.
        expert_folders: folders from which experts may be loaded.
    """

    def __init__(self, bank: Mapping[str, Expert], store: Store, expert_folders: Sequence[Path] = ()) -> None:
        self.store = store
        self.expert_folders = [Path(folder).expanduser().resolve() for folder in expert_folders]
        self.folder: Path | None = getattr(bank, "folder", None)  # strategies load their fitted files from here
        self._lock = threading.Lock()
        self.experts: dict[str, Expert] = dict(bank.items())
        self.mixes = store.mixes()
        self.model_names: dict[str, str] = {}  # of fine-tuned models, by expert

    def __getitem__(self, name: str) -> Expert:
        if name not in self.experts:
            raise UnknownNameError("expert", name, self.experts, remedy="GET /v1/models lists all models")
        return self.experts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.experts)

    def __len__(self) -> int:
        return len(self.experts)

    def load(self, folder: str) -> Expert:
        """Load an expert from one of the allowed folders, without adding it.

        Args:
            folder: absolute, or relative to an allowed folder; must not contain ``..`` or symbolic links.

        Raises:
            ConfigError: no folders are allowed.
            ExpertError: forbidden folder, or not an expert.
        """
        if not self.expert_folders:
            raise ConfigError("loading experts is disabled", remedy="start the server with --expert-folders FOLDER")
        given = Path(folder)
        if ".." in given.parts or "\0" in folder:
            raise ExpertError(f"invalid path {folder!r}", remedy="name a folder inside an allowed one, without '..'")
        for root in self.expert_folders:
            path = given if given.is_absolute() else root / given
            if path != root and path.is_relative_to(root) and path.is_dir():
                parents = [parent for parent in path.parents if parent != root and parent.is_relative_to(root)]
                if any(part.is_symlink() for part in [path, *parents, *path.iterdir()]):
                    raise ExpertError(f"{folder!r} contains a symbolic link", remedy="copy the files of the expert")
                return Expert.from_pretrained(path)
        raise ExpertError(f"{folder!r} is not inside an allowed folder", remedy="GET /v1/experts lists the folders")

    def add(self, expert: Expert) -> None:
        """Add an expert that has been checked against the base model.

        Raises:
            ConfigError: the name is taken.
        """
        with self._lock:
            if expert.name in self.experts or expert.name in self.mixes:
                raise ConfigError(f"the name {expert.name!r} is taken", remedy=f"DELETE /v1/experts/{expert.name}")
            self.experts = {**self.experts, expert.name: expert}

    def remove(self, name: str) -> None:
        """Remove an expert that no request uses.

        Raises:
            UnknownNameError: no such expert.
        """
        with self._lock:
            self[name]
            self.experts = {other: expert for other, expert in self.experts.items() if other != name}

    def check_mix_name(self, name: str, client: str | None = None) -> None:
        """Check that a client may save a mixture under a name.

        Args:
            client: None for an administrator, who may replace any mixture.

        Raises:
            ConfigError: the name is taken, or the client has too many mixtures.
            ExpertError: not a valid name.
        """
        if check_name(name) in self.experts:
            raise ConfigError(f"the name {name!r} is taken", remedy="choose another name")
        if client is None:
            return
        if name in self.mixes and self.mixes[name][1].get("client") != client:
            raise ConfigError(f"the name {name!r} is taken by another client", remedy="choose another name")
        if sum(metadata.get("client") == client for _, metadata in self.mixes.values()) >= MAX_MIXES_PER_CLIENT:
            raise ConfigError(f"{client} has {MAX_MIXES_PER_CLIENT} saved mixtures", remedy="DELETE /v1/mixes/NAME")

    def save_mix(self, name: str, mix: Mix, metadata: Mapping[str, Any], client: str | None = None) -> None:
        """Save a mixture under a name; see `check_mix_name`.

        Raises:
            OutputError: the store cannot be written.
        """
        with self._lock:
            self.check_mix_name(name, client)
            saved = {**metadata, "client": client} if client is not None else dict(metadata)
            self.store.save_mix(name, mix, saved)
            self.mixes = {**self.mixes, name: (mix, saved)}

    def delete_mix(self, name: str) -> None:
        """Delete a saved mixture.

        Raises:
            UnknownNameError: no such mixture.
        """
        with self._lock:
            if name not in self.mixes:
                raise UnknownNameError("mixture", name, self.mixes)
            self.store.delete_mix(name)
            self.mixes = {other: saved for other, saved in self.mixes.items() if other != name}

    def resolve(self, model: str) -> Mix | None:
        """Return the mixture of a request's ``model``; None for `auto`.

        Raises:
            UnknownNameError: unknown model or expert.
            ConfigError: invalid weights in a mixture of known experts.
        """
        if model == AUTO:
            return None
        if re.fullmatch(rf"{FINE_TUNED.pattern}:ckpt-step-\d+", model):
            remedy = "checkpoints are not served; call the model of the job, which is its best checkpoint"
            raise UnknownNameError("model", model, self.model_names.values(), remedy=remedy)
        invalid: InputError | None = None
        try:
            expression = FINE_TUNED.sub(lambda match: name_from_folder(match[0]), model)
            mix = self.mixes[model][0] if model in self.mixes else Mix.parse(expression)
            names = list(mix.weights)
        except InputError as error:  # any other string is the name of an unknown model
            invalid, names = error, [term.split(":")[0].strip() for term in model.split("+")]
        for name in names:
            if name not in self.experts and name != BASE:
                models = [*self.experts, *self.mixes, AUTO, BASE]
                shown = name if len(names) > 1 else model
                raise UnknownNameError("model", shown, models, remedy="GET /v1/models lists all models")
        if invalid is not None:
            raise invalid
        return mix
