"""`Expert`: an immutable set of z with its provenance, loaded from, saved to and checked against a base.

    expert = Expert.from_model(peft_model, name="arithmetic", meta={"domain": "arithmetic"})
    expert.save_pretrained("experts/arithmetic")
    expert = Expert.from_pretrained("experts/arithmetic", base=model)      # raises unless it was made on this very base
    expert.push_to_hub("user/arithmetic");  Expert.from_pretrained("user/arithmetic")

What it does not do: apply itself. `sigmix.engine` and PEFT do that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sigmix.errors import ConfigError, ExpertError, UnknownNameError
from sigmix.experts import hub as remote
from sigmix.experts import serialization as directory
from sigmix.experts.fingerprint import TOLERANCE, Sketch, compare, fingerprint, foreign, sketch, sketch_of
from sigmix.experts.hub import push
from sigmix.experts.metadata import check_authors, check_meta, check_name, check_z, digest_of, freeze, thaw
from sigmix.experts.original_basis import Original, basis_of, check_recorded, original_of
from sigmix.svf.linears import describe, factors_of, linears, matrix_of, shape_of
from sigmix.svf.tuner import svf_layers
from sigmix.utils.io import write_json, write_text


@dataclass(frozen=True, eq=False)
class Expert:
    """One z per adapted matrix, and where it came from. Two experts are equal if name, z and metadata are.

    Attributes:
        name: lower-case letters, digits, ``.``, ``_``, ``-``.
        z: {module path in the base: float32 [r] on the CPU}, r = min(out, in); copies, to be read only.
        meta: read-only; keys as in `sigmix.experts.metadata`.
        origin: "user/name@commit" if it was loaded from the hub, else None; no part of what it is.

    Raises:
        ExpertError: the name, a z (NaN, infinite, negative, no float vector) or the metadata cannot be.
    """

    name: str
    z: Mapping[str, torch.Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)
    origin: str | None = None

    def __post_init__(self) -> None:
        owner = f"expert {check_name(self.name)!r}"
        z = check_z(self.z, owner)
        check_meta(self.meta, z, owner)
        object.__setattr__(self, "z", MappingProxyType(z))
        object.__setattr__(self, "meta", freeze(self.meta))

    # ------------------------------------------------------------------ making

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], base: nn.Module | None = None, *, revision: str | None = None,
        token: str | None = None,
    ) -> Expert:  # fmt: skip
        """Read an expert's directory, ours or one that PEFT or TRL saved, or one on the hub.

        Args:
            path: a folder, or text of the form "user/name" where there is no such folder: a model on the hub, which is
                fetched into the hub's own cache (offline: found there).
            base: check it against this model at once (`check`).
            revision, token: of the hub; default: the main branch, and whoever is logged in.

        Raises:
            ExpertError: damaged, incomplete, or no SVF adapter. FingerprintError: made on another base.
            HubError: the hub has it not, refuses, or cannot be reached. ConfigError: a revision of a folder.
        """
        if remote.names_repo(path):
            found = remote.fetch(os.fspath(path), revision, token)
            expert = cls(*remote.read(found), origin=f"{found.repo}@{found.revision}")
        elif revision is not None:
            raise ConfigError(
                f"{os.fspath(path)!r} is no hub model, so it has no revision {revision!r}", remedy="give 'user/name'"
            )
        else:
            expert = cls(*directory.read(Path(path).expanduser()))
        if base is not None:
            expert.check(base)
        return expert

    @classmethod
    def from_model(
        cls, model: nn.Module, adapter: str = "default", *, name: str, meta: Mapping[str, Any] | None = None
    ) -> Expert:
        """The expert that a PEFT model's adapter is: its effective z, the base's fingerprint, sketches.

        Args:
            model: a PEFT model or one with `SVFLinear` layers injected; merged or not.
            meta: task, domain, description, objective, seed, commit, metrics, license, training.

        Raises:
            ExpertError: nothing is adapted, or z cannot be an expert's. UnknownNameError: no such adapter or key.
        """
        authors = check_authors(meta)
        layers = svf_layers(model)
        known = {one for layer in layers.values() for one in layer.svf_z}
        if not known:
            raise ExpertError("the model has no SVF layer", remedy="wrap it: get_peft_model(model, SVFConfig())")
        if adapter not in known:
            raise UnknownNameError("adapter", adapter, known)
        z = {path: layer.effective_z([adapter]) for path, layer in layers.items() if adapter in layer.svf_z}
        return cls(name, z, authors).sealed(model)

    def with_meta(self, **changes: Any) -> Expert:
        """The same expert with other author metadata, such as ``metrics=[…]``; None removes a key.

        Raises:
            UnknownNameError: a key that authors cannot set.
        """
        meta = {**thaw(self.meta), **check_authors(changes)}
        return replace(self, meta={key: value for key, value in meta.items() if value is not None}, origin=None)

    # ------------------------------------------------------------------ reading

    @property
    def verified(self) -> bool:
        """Whether it knows the base that it was made on, so that `check` can tell."""
        return bool((self.meta.get("base") or {}).get("fingerprint"))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over paths and z."""
        return digest_of(self.z)

    def gain(self, path: str) -> torch.Tensor:
        """z - 1 of one matrix, float32 [r].

        Raises:
            UnknownNameError: the expert does not adapt it.
        """
        if path not in self.z:
            raise UnknownNameError("matrix", path, self.z)
        return self.z[path] - 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Expert):
            return NotImplemented
        return (self.name, self.digest, thaw(self.meta)) == (other.name, other.digest, thaw(other.meta))

    def __hash__(self) -> int:
        return hash((self.name, self.digest))

    def __repr__(self) -> str:
        base = (self.meta.get("base") or {}).get("name", "unknown")
        return f"Expert({self.name!r}, {len(self.z)} matrices, base={base!r}, verified={self.verified})"

    # ------------------------------------------------------------------ writing and checking

    def save_pretrained(self, path: str | os.PathLike[str]) -> Path:
        """Write the directory, whole or not at all; equal experts give equal bytes.

        Raises:
            OutputError: ``path`` holds other files than an expert's, or cannot be written.
        """
        path = Path(path).expanduser()
        directory.write(path, self.name, self.z, self.meta)
        return path

    def push_to_hub(
        self, repo_id: str, *, token: str | None = None, private: bool = False, revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:  # fmt: skip
        """Commit it to the hub's model ``repo_id``, "user/name", which is made if need be; returns that page's address.

        Paths on this machine, such as a base's folder, are cut to their last part (`sigmix.experts.hub`).

        Args:
            token: default: whoever is logged in (``hf auth login``, ``HF_TOKEN``). private: if it is made now.
            revision: a branch, made if need be. commit_message: of the commit.

        Raises:
            ConfigError: no "user/name". OutputError: the model holds other things, or is public against ``private``.
            HubError: the hub refuses or cannot be reached.
        """
        made = push(
            self.name, self.z, self.meta, repo_id, token=token, private=private, revision=revision,
            commit_message=commit_message,
        )  # fmt: skip
        return made.url

    def check(self, base: nn.Module, *, sketches: bool = True, tolerance: float = TOLERANCE) -> None:
        """Raise unless this expert means on ``base`` what it meant where it was made.

        The fingerprint is compared, every matrix must be there with the right size, and the sketches must come out as
        stored. An expert that is not `verified` has only its matrices checked. On a quantised base that was given its
        original's basis (`sigmix.experts.original_basis`) an expert made on the original is held to the original.

        Args:
            base: a model in any state that `fingerprint` understands.
            sketches: False skips the sketches and with them the decomposition of a base that is not adapted yet.
            tolerance: see `sigmix.experts.fingerprint.TOLERANCE`.

        Raises:
            FingerprintError: made on another base. ExpertError: a matrix is missing or differs in size or basis.
        """
        mine = self.meta.get("base") or {}
        original = original_of(base)
        if original is not None and original.fingerprint != mine.get("fingerprint"):
            original = None
        if mine.get("fingerprint") and original is None and (found := fingerprint(base)) != mine["fingerprint"]:
            raise foreign(self.name, mine, {**describe(base), "fingerprint": found})
        check_recorded(self.name, mine.get("basis"), base)
        layers = self._layers(base)
        for path, stored in (self.meta.get("sketches") or {}).items() if sketches and self.verified else ():
            found_sketch = self._sketch(path, layers[path], original)
            compare(self.name, path, Sketch.from_json(stored), found_sketch, tolerance)

    def sealed(self, base: nn.Module) -> Expert:
        """This expert with the base's name and fingerprint, matrix sizes and sketches: from now on it is held to it.

        Raises:
            ExpertError: it adapts what the base does not have, or with another size.
        """
        layers = self._layers(base)
        made = {
            "base": {**describe(base), "fingerprint": fingerprint(base), **basis_of(base)},
            "matrices": {path: list(shape_of(layers[path])) for path in self.z},
            "sketches": {path: self._sketch(path, layers[path]).to_json() for path in self.z},
        }
        return replace(self, meta={**thaw(self.meta), **made}, origin=None)

    def _sketch(self, path: str, module: nn.Module, original: Original | None = None) -> Sketch:
        if original is not None and path in original.left:
            return sketch_of(path, original.left[path], shape_of(module), factors_of(module), self.z[path])
        return sketch(path, matrix_of(module), factors_of(module), self.z[path])

    def _layers(self, base: nn.Module) -> dict[str, nn.Module]:
        """The base's layers that this expert adapts, sizes checked."""
        every = linears(base)
        remedy = f"load the base that it was made on: {(self.meta.get('base') or {}).get('name', 'not recorded')}"
        layers = {path: every[path] for path in self.z if path in every}
        if missing := [path for path in self.z if path not in layers]:
            near = UnknownNameError("matrix", missing[0], every).message
            raise ExpertError(
                f"expert {self.name!r} does not fit this base, which lacks {len(missing)} of its {len(self.z)} "
                f"matrices: {near}",
                remedy=remedy,
            )
        for path, module in layers.items():
            rows, columns = shape_of(module)
            if len(self.z[path]) != min(rows, columns):
                raise ExpertError(
                    f"expert {self.name!r} does not fit this base: z of {path} has {len(self.z[path])} components, but "
                    f"the matrix is {rows}×{columns} and needs {min(rows, columns)}",
                    remedy=remedy,
                )
        return layers


def seal(
    path: str | os.PathLike[str], base: nn.Module, *, name: str | None = None, meta: Mapping[str, Any] | None = None
) -> Expert:
    """Add ``sigmix.json`` (and a model card, if there is no README.md) to a directory that PEFT or TRL saved.

    The caller vouches that ``base`` is what the adapter was trained on; from then on it is held to it. A directory that
    is sealed already is checked against ``base`` and left as it is.

    Args:
        name: default: the folder's name, made valid. meta: as in `Expert.from_model`.

    Raises:
        ExpertError: the directory or its fit. FingerprintError: sealed for another base. OutputError: not writable.
    """
    path = Path(path).expanduser()
    expert = Expert.from_pretrained(path)
    if expert.verified:
        expert.check(base)
        return expert
    expert = Expert(name or expert.name, expert.z, {**thaw(expert.meta), **check_authors(meta)}).sealed(base)
    write_json(path / directory.META, directory.sigmix_json(expert.name, expert.z, thaw(expert.meta)))
    if not (path / directory.CARD).exists():
        numbers = sum(len(value) for value in expert.z.values())
        write_text(path / directory.CARD, directory.card(expert.name, thaw(expert.meta), len(expert.z), numbers))
    return expert
