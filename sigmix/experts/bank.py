"""`Bank`: a folder of experts, one subfolder each, as a lazily loaded mapping {name: Expert}.

    bank = Bank("experts");  bank.names();  bank["arithmetic"];  "reading" in bank;  bank.add(expert)
    bank = Bank.from_hub("user/skills-0123456789abcdef01234567")      # a collection on the hub
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as dataclass_replace
from pathlib import Path

from sigmix.errors import ExpertError, OutputError, UnknownNameError
from sigmix.experts import hub
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import name_from_folder
from sigmix.experts.requests import RequestStatistics
from sigmix.experts.serialization import CONFIG, META, write_requests
from sigmix.utils.io import read_json_object


class Bank(Mapping[str, Expert]):
    """Experts by name, loaded on first use. Subfolders without an ``adapter_config.json`` are ignored.

    Args:
        folder: parent folder of the experts. A string that is not a folder but a collection's slug or an expert
            "user/name" on the hub is opened with `from_hub`.
        create: allow a folder that does not exist yet, to `add` to it.

    Raises:
        ExpertError: no such folder, or two experts of the same name. HubError: see `from_hub`.
    """

    def __init__(self, folder: str | os.PathLike[str], create: bool = False) -> None:
        if not create and hub.is_repo_id(folder):
            text = os.fspath(folder)
            folder = hub.download_bank(text if hub.COLLECTION.fullmatch(text) else [text])
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir() and (self.folder.exists() or not create):
            problem = "is a file, not a folder" if self.folder.exists() else "does not exist"
            raise ExpertError(
                f"the folder of experts {self.folder} {problem}",
                remedy="give the parent folder of the experts, or train one: `sigmix train --help`",
            )
        self._loaded: dict[str, Expert] = {}
        self.refresh()

    @classmethod
    def bundled(cls) -> Bank:
        """Open the experts that ship with sigmix, for its default base.

        Raises:
            ExpertError: this installation has none.
        """
        package = Path(__file__).resolve().parent.parent
        for folder in (package / "_experts", package.parent / "experts"):  # wheel, source checkout
            # beside an installed package, "experts" may be an unrelated folder
            if folder.is_dir() and (folder.parent == package or (folder.parent / "pyproject.toml").is_file()):
                return cls(folder)
        raise ExpertError(
            "this installation of sigmix has no bundled experts",
            remedy="install it from a release or a full checkout, or give a folder of experts",
        )

    @classmethod
    def from_hub(cls, source: str | Sequence[str], token: str | None = None) -> Bank:
        """Open a read-only bank of a collection, or of several models, in their current state on the hub.

        The copy in our cache is never changed: a new `Bank` sees later commits, `refresh` does not. Offline, or if the
        hub is unreachable, a collection opens in its last downloaded state.

        Args:
            source: a collection's slug "user/title-<id>" (the end of its address), or a list of "user/name".
            token: default: that of ``hf auth login`` or ``HF_TOKEN``.

        Raises:
            HubError: not found, refused or unreachable. ExpertError: no experts, a damaged one, or two of one name.
        """
        return cls(hub.download_bank(source, token))

    def refresh(self) -> None:
        """Scan the folder again and drop loaded experts.

        Raises:
            ExpertError: two experts have the same name.
        """
        self._loaded.clear()
        paths: dict[str, Path] = {}
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            if path.name.startswith(".") or not (path / CONFIG).is_file():
                continue
            name = _name(path)
            if name in paths:
                raise ExpertError(
                    f"two experts in {self.folder} are named {name!r}: {paths[name].name} and {path.name}",
                    remedy="remove one, or give it another 'name' in its sigmix.json",
                )
            paths[name] = path
        self._paths = dict(sorted(paths.items()))
        self._record = hub.record(self.folder)
        self.source = str(self._record.get("source") or self.folder)

    def names(self) -> list[str]:
        """Return all names, sorted."""
        return list(self._paths)

    def path(self, name: str) -> Path:
        """Return an expert's folder.

        Raises:
            UnknownNameError: no such expert; lists the nearest names.
        """
        if name not in self._paths:
            where = f"they are in {self.source}" if self._paths else f"there are none in {self.source}"
            raise UnknownNameError("expert", name, self._paths, remedy=f"`sigmix experts list` lists them; {where}")
        return self._paths[name]

    def __getitem__(self, name: str) -> Expert:
        """Return an expert, loaded on first use.

        Raises:
            UnknownNameError: no such expert (a KeyError too). ExpertError: damaged.
        """
        path = self.path(name)
        if name not in self._loaded:
            expert = Expert.from_pretrained(path)
            if self._record:
                expert = dataclass_replace(expert, origin="{repo}@{revision}".format(**self._record["experts"][name]))
            self._loaded[name] = expert
        return self._loaded[name]

    __eq__ = object.__eq__  # Mapping's own would load all experts
    __hash__ = object.__hash__

    def __contains__(self, name: object) -> bool:
        return name in self._paths  # Mapping's own would load the expert

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __repr__(self) -> str:
        return f"Bank({self.source!r}: {', '.join(self._paths) or 'empty'})"

    def add(self, expert: Expert, replace: bool = False) -> Path:
        """Save an expert in the folder under its name and return its path.

        Raises:
            OutputError: the name is taken and ``replace`` is False, the folder cannot be written, or the bank is on the
            hub.
        """
        if self._record:
            raise OutputError(
                f"{self.source} is on the hub, so {expert.name!r} cannot be added here",
                remedy="push it there, or copy the experts to a folder first: sigmix experts pull",
            )
        path = self._paths.get(expert.name, self.folder / expert.name)
        if path.exists() and not replace:
            raise OutputError(
                f"{self.folder} already has {expert.name!r}", remedy="choose another name, or pass replace=True"
            )
        expert.save_pretrained(path)
        self._paths = dict(sorted({**self._paths, expert.name: path}.items()))
        self._loaded[expert.name] = expert
        return path

    def set_requests(self, name: str, requests: RequestStatistics) -> None:
        """Write the statistics of an expert's requests into its folder; of a bank on the hub, into our copy of it.

        Raises:
            UnknownNameError: no such expert. OutputError: the folder cannot be written.
        """
        write_requests(self.path(name), requests)
        self._loaded.pop(name, None)


def _name(path: Path) -> str:
    """Return the name in ``sigmix.json``, else one derived from the folder; damage is reported on loading."""
    name = read_json_object(path / META).get("name")
    return name if isinstance(name, str) else name_from_folder(path.name)
