"""`Expert`: an immutable set of z with its provenance, loaded from, saved to and checked against a base model.

    expert = Expert.from_model(peft_model, name="arithmetic", meta={"domain": "arithmetic"})
    expert.save_pretrained("experts/arithmetic")
    expert = Expert.from_pretrained("experts/arithmetic", base=model)    # raises unless it was made on this very base
    expert.push_to_hub("user/arithmetic");  Expert.from_pretrained("user/arithmetic")

`sigmix.engine` and PEFT apply it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sigmix.errors import ConfigError, ExpertError, OutputError, UnknownNameError
from sigmix.experts import hub, serialization
from sigmix.experts.fingerprint import TOLERANCE, Sketch, compare, fingerprint, mismatch, sketch, sketch_of
from sigmix.experts.metadata import check_author_meta, check_meta, check_name, check_z, digest_of, freeze, thaw
from sigmix.experts.original_basis import check_recorded, original_of, recorded_basis
from sigmix.experts.requests import RequestStatistics
from sigmix.svf.layer import SVFLinear
from sigmix.svf.linears import describe, factors_of, linears, matrix_of, shape_of
from sigmix.svf.tuner import svf_layers
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import write_text


@dataclass(frozen=True, eq=False)
class Expert:
    """One z per adapted matrix, with its provenance. Experts are equal if name, z, metadata and statistics are.

    Attributes:
        name: lower-case letters, digits, ``.``, ``_``, ``-``.
        z: {module path in the base: float32 [r] on the CPU}, r = min(out, in); do not modify.
        meta: read-only; keys as in `sigmix.experts.metadata`.
        requests: statistics of its training requests, which the router needs; see `sigmix.adapt.router`.
        origin: "user/name@commit" if loaded from the hub, else None; ignored by equality.

    Raises:
        ExpertError: invalid name, z (NaN, infinite, negative, not a float vector) or metadata.
    """

    name: str
    z: Mapping[str, torch.Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)
    requests: RequestStatistics | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        owner = f"expert {check_name(self.name)!r}"
        z = check_z(self.z, owner)
        check_meta(self.meta, z, owner)
        object.__setattr__(self, "z", MappingProxyType(z))
        object.__setattr__(self, "meta", freeze(self.meta))

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], base: nn.Module | None = None, *, revision: str | None = None,
        token: str | None = None,
    ) -> Expert:  # fmt: skip
        """Load an expert from a folder (saved by sigmix, PEFT or TRL) or from the hub.

        Args:
            path: a folder; or "user/name" if there is no such folder: a hub model, downloaded into the hub's cache.
            base: run `check` against this model.
            revision: branch, tag or commit on the hub. token: default: that of ``hf auth login`` or ``HF_TOKEN``.

        Raises:
            ExpertError: damaged, incomplete, or not an SVF adapter. FingerprintError: made on another base.
            HubError: not found, refused or unreachable. ConfigError: a revision of a folder.
        """
        if hub.is_repo_id(path):
            snapshot = hub.download(os.fspath(path), revision, token)
            expert = cls(*hub.read(snapshot), origin=f"{snapshot.repo}@{snapshot.revision}")
        elif revision is not None:
            raise ConfigError(
                f"{os.fspath(path)!r} is not a hub model, so it has no revision {revision!r}", remedy="give 'user/name'"
            )
        else:
            expert = cls(*serialization.read(Path(path).expanduser()))
        if base is not None:
            expert.check(base)
        return expert

    @classmethod
    def from_model(
        cls, model: nn.Module, adapter: str = "default", *, name: str, meta: Mapping[str, Any] | None = None
    ) -> Expert:
        """Extract the effective z of a PEFT model's adapter, with the base's fingerprint and sketches.

        Args:
            model: a PEFT model or one with `SVFLinear` layers injected; merged or not.
            meta: task, domain, description, objective, seed, commit, metrics, license, training.

        Raises:
            ExpertError: nothing is adapted, or z is invalid. UnknownNameError: no such adapter or metadata key.
        """
        author_meta = check_author_meta(meta)
        layers = svf_layers(model)
        adapters = {adapter for layer in layers.values() for adapter in layer.svf_z}
        if not adapters:
            raise ExpertError("the model has no SVF layer", remedy="wrap it: get_peft_model(model, SVFConfig())")
        if adapter not in adapters:
            raise UnknownNameError("adapter", adapter, adapters)
        z = {path: layer.effective_z([adapter]) for path, layer in layers.items() if adapter in layer.svf_z}
        positions = next(layer.positions[adapter] for layer in layers.values() if adapter in layer.svf_z)
        return cls(name, z, {**author_meta, "positions": positions}).sealed(model)

    def with_meta(self, **changes: Any) -> Expert:
        """Return a copy with other author metadata, such as ``metrics=[…]``; None removes a key.

        Raises:
            UnknownNameError: not a key that authors set.
        """
        meta = {**thaw(self.meta), **check_author_meta(changes)}
        return replace(self, meta={key: value for key, value in meta.items() if value is not None}, origin=None)

    # ------------------------------------------------------------------ properties

    @property
    def base(self) -> Mapping[str, Any]:
        """Recorded base model: name, dtype, fingerprint; empty if unknown."""
        return self.meta.get("base") or {}

    @property
    def verified(self) -> bool:
        """True if a fingerprint of its base is recorded, which `check` needs."""
        return bool(self.base.get("fingerprint"))

    @property
    def positions(self) -> str:
        """Tokens on which z acts: "all" or "prompt", see `SVFConfig`."""
        return str(self.meta.get("positions", "all"))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over positions, paths and z."""
        return digest_of(self.z, self.positions)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Expert):
            return NotImplemented
        return self._content() == other._content()

    def _content(self) -> tuple[Any, ...]:
        requests = None if self.requests is None else self.requests.to_bytes()
        return self.name, self.digest, thaw(self.meta), requests

    def __hash__(self) -> int:
        return hash((self.name, self.digest))

    def __repr__(self) -> str:
        base = self.base.get("name", "unknown")
        return f"Expert({self.name!r}, {len(self.z)} matrices, base={base!r}, verified={self.verified})"

    # ------------------------------------------------------------------ saving

    def save_pretrained(self, path: str | os.PathLike[str]) -> Path:
        """Write the expert's folder atomically; equal experts give equal bytes.

        Raises:
            OutputError: ``path`` holds other files than an expert's, or cannot be written.
        """
        path = Path(path).expanduser()
        serialization.write(path, self.name, self.z, self.meta, self.requests)
        return path

    def push_to_hub(
        self, repo_id: str, *, token: str | None = None, private: bool = False, revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:  # fmt: skip
        """Upload the expert in one commit and return the URL of its page. See `sigmix.experts.hub.push`.

        Args:
            repo_id: "user/name"; created if missing. token: default: that of ``hf auth login`` or ``HF_TOKEN``.
            private: create it private. revision: a branch, created if missing.

        Raises:
            ConfigError: not "user/name". OutputError: the repository has other files, or is public although ``private``
            is set. HubError: the hub refuses or cannot be reached.
        """
        return hub.push(
            self.name, self.z, self.meta, repo_id, requests=self.requests, token=token, private=private,
            revision=revision, commit_message=commit_message,
        ).url  # fmt: skip

    # ------------------------------------------------------------------ checks against a base

    def check(self, base: nn.Module, *, sketches: bool = True, tolerance: float = TOLERANCE) -> None:
        """Raise unless this expert was made on ``base`` and its singular vectors are the same there.

        Compares the fingerprint, the paths and sizes of all matrices, and the sketches. An expert without a recorded
        fingerprint has only its matrices checked. A quantized base under
        `sigmix.experts.original_basis.use_original_basis` accepts experts of the original weights.

        Args:
            base: a model in any state that `fingerprint` supports.
            sketches: False skips the sketches, and the decomposition of a base that is not adapted yet.
            tolerance: see `sigmix.experts.fingerprint.TOLERANCE`.

        Raises:
            FingerprintError: made on another base. ExpertError: a matrix is missing or differs in size or basis.
        """
        recorded = self.base.get("fingerprint")
        original = original_of(base)
        if original is not None and original.fingerprint != recorded:
            original = None
        if recorded and original is None and (own := fingerprint(base)) != recorded:
            raise mismatch(self.name, self.base, {**describe(base), "fingerprint": own})
        check_recorded(self.name, self.base.get("basis"), base)
        layers = self.layers(base)
        if not sketches or not self.verified:
            return
        passed = self._passed_file(layers, tolerance) if original is None else None
        if passed is not None and passed.exists():
            return
        for path, stored in (self.meta.get("sketches") or {}).items():
            module = layers[path]
            factors = factors_of(module)
            if original is not None and path in original.left:
                current = sketch_of(path, original.left[path], shape_of(module), factors, self.z[path])
            else:
                # float32: its error is about 1e-5 of the norm, far below the tolerance, at a fraction of the cost
                current = sketch(path, matrix_of(module), factors, self.z[path], torch.float32)
            compare(self.name, path, Sketch.from_json(stored), current, tolerance)
        if passed is not None:
            with suppress(OutputError):  # a read-only cache
                write_text(passed, "")

    def _passed_file(self, layers: Mapping[str, nn.Module], tolerance: float) -> Path | None:
        """Return the file in the cache that records that the sketches agree with these very decompositions.

        None if a layer is not adapted yet, or its decomposition is not in the cache.
        """
        parts = ["v1", self.digest, self.base["fingerprint"], thaw(self.meta.get("sketches")), tolerance]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for path, layer in layers.items():
            if not isinstance(layer, SVFLinear) or layer.checksum is None:
                return None
            # the checksum is a sum and so the same for permuted columns, which a projection distinguishes
            short = layer.svf_short
            projection = short @ torch.arange(len(short), device=short.device).sin().to(short.dtype)
            key.update(f"{path} {layer.checksum}".encode() + projection.float().cpu().numpy().tobytes())
        return cache_dir() / "svd" / "ledgers" / f"expert-{key.hexdigest()}"

    def sealed(self, base: nn.Module) -> Expert:
        """Return a copy bound to ``base``: with its name, fingerprint, matrix sizes and sketches.

        Raises:
            ExpertError: a matrix is missing in the base or differs in size.
        """
        layers = self.layers(base)
        computed = {
            "base": {**describe(base), "fingerprint": fingerprint(base), **recorded_basis(base)},
            "matrices": {path: list(shape_of(layer)) for path, layer in layers.items()},
            "sketches": {
                path: sketch(path, matrix_of(layer), factors_of(layer), self.z[path]).to_json()
                for path, layer in layers.items()
            },
        }
        return replace(self, meta={**thaw(self.meta), **computed}, origin=None)

    def layers(self, base: nn.Module) -> dict[str, nn.Module]:
        """Return the base's layers that this expert adapts, by path, after a check of their sizes.

        Raises:
            ExpertError: a matrix is missing or has another size.
        """
        available = linears(base)
        remedy = f"load the base that it was made on: {self.base.get('name', 'not recorded')}"
        if missing := [path for path in self.z if path not in available]:
            near = UnknownNameError("matrix", missing[0], available).message
            raise ExpertError(
                f"expert {self.name!r} does not fit this base, which lacks {len(missing)} of its {len(self.z)} "
                f"matrices: {near}",
                remedy=remedy,
            )
        layers = {path: available[path] for path in self.z}
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
    """Add ``sigmix.json`` (and a model card, if there is no README.md) to a folder that PEFT or TRL saved.

    The caller asserts that the adapter was trained on ``base``. A sealed folder is checked against ``base`` instead.

    Args:
        name: default: derived from the folder. meta: as in `Expert.from_model`.

    Raises:
        ExpertError: damaged, or does not fit. FingerprintError: sealed for another base. OutputError: not writable.
    """
    path = Path(path).expanduser()
    expert = Expert.from_pretrained(path)
    if expert.verified:
        expert.check(base)
        return expert
    expert = Expert(name or expert.name, expert.z, {**thaw(expert.meta), **check_author_meta(meta)}).sealed(base)
    files = serialization.contents(expert.name, expert.z, expert.meta)
    write_text(path / serialization.META, files[serialization.META].decode())
    if not (path / serialization.CARD).exists():
        write_text(path / serialization.CARD, files[serialization.CARD].decode())
    return expert
