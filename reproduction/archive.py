"""Archives of raw results: ``STUDY.tar.xz`` and ``manifest.json``, which lists every archive with its SHA-256.

The same files give the same tar archive: names are sorted, and times, owners and modes are fixed.

    python -m reproduction.archive FOLDER STUDY --command "…" --seed 0 --commit 1a2b3c4     # pack
    python -m reproduction.archive                                                          # verify all
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sigmix.errors import DataError
from sigmix.utils.io import atomic_dir, atomic_file, sha256_file, write_json

RESULTS = Path(__file__).parent / "results"
MANIFEST = "manifest.json"
SUFFIX = ".tar.xz"


def read_archive(path: Path) -> dict[str, bytes]:
    """Return {name: content} of an archive's files.

    Raises:
        DataError: damaged archive, or a name outside its folder.
    """
    try:
        content = lzma.decompress(path.read_bytes())
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(f"{path} is damaged: {error}", remedy=f"git checkout -- {path.name}") from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{path} has a file outside its folder: {name}")
    return files


def unpack(path: Path, folder: Path) -> None:
    """Write an archive's files into a new folder, completely or not at all."""
    files = read_archive(path)
    with atomic_dir(folder, new=True) as temporary:
        for name, content in files.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def pack(folder: Path, archive: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write a folder's files into an archive and its entry into the manifest beside it.

    Args:
        facts: JSON values about the study: command, seed, commit.

    Returns:
        The entry: study, ``facts``, archive, sha256, bytes, files and rows (lines of the JSON-lines files).
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    buffer, rows = io.BytesIO(), 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            content = (folder / name).read_bytes()
            rows += content.count(b"\n") if name.endswith(".jsonl") else 0
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    with atomic_file(archive) as temporary:
        temporary.write_bytes(lzma.compress(buffer.getvalue(), preset=9))
    entry = {
        "study": archive.name.removesuffix(SUFFIX), **facts, "archive": archive.name, "sha256": sha256_file(archive),
        "bytes": archive.stat().st_size, "files": len(names), "rows": rows,
    }  # fmt: skip
    others = [one for one in manifest(archive.parent) if one["study"] != entry["study"]]
    write_json(archive.parent / MANIFEST, sorted([*others, entry], key=lambda one: one["study"]))
    return entry


def manifest(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the manifest's entries, sorted by study."""
    path = folder / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def verify(folder: Path = RESULTS) -> None:
    """Check every archive against the manifest.

    Raises:
        DataError: archive that is missing, differs or is not listed.
    """
    listed = {entry["archive"]: entry for entry in manifest(folder)}
    present = {path.name for path in folder.glob(f"*{SUFFIX}")}
    if odd := sorted(present ^ set(listed)):
        raise DataError(f"{folder / MANIFEST} and the archives beside it differ: {', '.join(odd)}")
    for name, entry in listed.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != entry["sha256"]:
            raise DataError(f"{folder / name} does not have the SHA-256 of {MANIFEST}")


def main() -> None:
    """Pack a folder, or verify all archives."""
    parser = argparse.ArgumentParser(prog="python -m reproduction.archive", description="Pack or verify raw results.")
    parser.add_argument("folder", nargs="?", type=Path, help="folder to pack; default: verify the archives")
    parser.add_argument("study", nargs="?", help="name of the study")
    parser.add_argument("--command", help="command that produced the files")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--commit", nargs="*", help="commits that the study ran on")
    options = parser.parse_args()
    if options.folder is None:
        verify()
        print(f"{len(manifest())} archives match {RESULTS / MANIFEST}")
        return
    facts = {"command": options.command, "seed": options.seed, "commit": options.commit}
    archive = RESULTS / f"{options.study or options.folder.name}{SUFFIX}"
    print(json.dumps(pack(options.folder, archive, facts), indent=2))


if __name__ == "__main__":
    main()
