"""Images for prompts: identified by content, decoded when needed (Pillow is imported only then)."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sigmix.errors import DataError, reraised
from sigmix.utils.optional import optional


@dataclass(frozen=True)
class Picture:
    """An image.

    Attributes:
        digest: hex SHA-256 of its bytes (of mode, size and pixels for a PIL image).
        name: for messages: a file, a row of a data set.
        source: a path, bytes, a function that returns bytes, or a PIL image.
    """

    digest: str
    name: str
    source: Any = field(compare=False, repr=False)

    def open(self) -> Any:
        """Return a PIL image in RGB.

        Raises:
            DataError: it cannot be read or decoded, it has changed since its digest was taken, or Pillow is missing.
        """
        image_type = optional("PIL.Image", "'sigmix[vision]'", "reading an image", DataError)
        if isinstance(self.source, image_type.Image):
            return self.source.convert("RGB")
        content = _bytes(self.source, self.name)
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise DataError(f"the image {self.name} changed while it was in use", remedy="start again")
        # each format has its own errors, and a bomb guard another
        with reraised(DataError, f"{self.name} cannot be read as an image", "give a PNG or JPEG file"):
            return image_type.open(io.BytesIO(content)).convert("RGB")


Shown = Picture | str | os.PathLike | bytes | Any
"""Types that `picture` accepts; the last is a PIL image or a function that returns bytes."""


def picture(image: Shown, name: str | None = None) -> Picture:
    """Convert a path, bytes, a function that returns bytes, or a PIL image; a `Picture` is returned unchanged.

    Args:
        name: for messages; default: the path.

    Raises:
        DataError: no such file, or none of these types.
    """
    if isinstance(image, Picture):
        return image
    if isinstance(image, (str, os.PathLike)):
        image = Path(image).expanduser()
        name = name or str(image)
    name = name or "an image in memory"
    if isinstance(image, (Path, bytes)) or callable(image):
        return Picture(hashlib.sha256(_bytes(image, name)).hexdigest(), name, image)
    if hasattr(image, "tobytes") and hasattr(image, "mode"):
        # the bytes of an image with a palette are indices into it
        pixels = image.convert("RGB") if image.mode in ("P", "PA") else image
        digest = hashlib.sha256(f"{image.mode} {image.size}\n".encode() + pixels.tobytes())
        return Picture(digest.hexdigest(), name, image)
    raise DataError(f"{image!r:.80} is no image", remedy="give a file's path, its bytes, or a PIL image")


def pictures(images: Shown | Sequence[Shown] | None) -> tuple[Picture, ...]:
    """Convert one image, several, or None."""
    if images is None:
        return ()
    return tuple(picture(image) for image in (images if isinstance(images, (list, tuple)) else [images]))


def _bytes(source: Path | bytes | Callable[[], bytes], name: str) -> bytes:
    if isinstance(source, bytes):
        return source
    if callable(source):
        return source()
    try:
        return source.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the image {name}: {error.strerror or error}", remedy="check the path") from error
