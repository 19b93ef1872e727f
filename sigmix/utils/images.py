"""Images that tasks hand to models: known by their content, read when they are needed.

A `Picture` is a file, bytes, a PIL image, or a way to get bytes (a row of a data set on disk). Its digest decides what
counts as the same image; files are the same if their bytes are. Nothing here knows a model; Pillow is imported only to
decode.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sigmix.errors import DataError

INSTALL = "pip install 'sigmix[vision]'"


@dataclass(frozen=True)
class Picture:
    """One image.

    Attributes:
        digest: hex SHA-256 of its bytes (of mode, size and pixels for an image in memory).
        name: for people: a file, a row of a data set.
        source: where the bytes come from: a path, bytes, a function that returns bytes, or a PIL image itself.
    """

    digest: str
    name: str
    source: Any = field(compare=False, repr=False)

    def open(self) -> Any:
        """The image as PIL's, in RGB.

        Raises:
            DataError: it cannot be read or decoded, it changed since its digest was taken, or Pillow is missing.
        """
        Image = _pillow()
        if isinstance(self.source, Image.Image):
            return self.source.convert("RGB")
        content = _bytes(self.source, self.name)
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise DataError(f"the image {self.name} changed while it was in use", remedy="start again")
        try:
            return Image.open(io.BytesIO(content)).convert("RGB")
        except Exception as error:  # each format has its own errors, and a bomb guard another
            raise DataError(
                f"{self.name} cannot be read as an image: {error}", remedy="give a PNG or JPEG file"
            ) from error


Shown = Picture | str | os.PathLike | bytes | Any
"""What `pictures` takes for one image; the last is a PIL image."""


def picture(image: Shown, name: str | None = None) -> Picture:
    """An image as a `Picture`.

    Args:
        image: a path, bytes, a function that returns bytes, a PIL image, or a `Picture`, which comes back as it is.
        name: for messages; default: the path.

    Raises:
        DataError: there is no such file, or it is none of these.
    """
    if isinstance(image, Picture):
        return image
    if isinstance(image, (str, os.PathLike)):
        path = Path(image).expanduser()
        return Picture(hashlib.sha256(_bytes(path, str(path))).hexdigest(), name or str(path), path)
    if isinstance(image, bytes) or callable(image):
        name = name or "an image in memory"
        return Picture(hashlib.sha256(_bytes(image, name)).hexdigest(), name, image)
    if hasattr(image, "tobytes") and hasattr(image, "mode"):
        total = hashlib.sha256(f"{image.mode} {image.size}\n".encode() + image.tobytes())
        return Picture(total.hexdigest(), name or "an image in memory", image)
    raise DataError(f"{image!r:.80} is no image", remedy="give a file's path, its bytes, or a PIL image")


def pictures(images: Shown | Sequence[Shown] | None) -> tuple[Picture, ...]:
    """Several images, or one, or none."""
    if images is None:
        return ()
    return tuple(picture(one) for one in (images if isinstance(images, (list, tuple)) else [images]))


def _bytes(source: Path | bytes | Callable[[], bytes], name: str) -> bytes:
    if isinstance(source, bytes):
        return source
    if callable(source):
        return source()
    try:
        return source.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the image {name}: {error.strerror or error}", remedy="check the path") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("images need Pillow, which is not installed", remedy=INSTALL) from error
    return Image
