"""Images: digests of content, sources, and what cannot be read."""

import io

import PIL.Image
import pytest
from helpers_vision import shape

from sigmix.errors import DataError
from sigmix.utils.images import picture, pictures


def test_a_file_its_bytes_and_a_function_have_one_digest(tmp_path):
    file = tmp_path / "a.png"
    shape("red").save(file)
    content = file.read_bytes()
    found = pictures([file, str(file), content, lambda: content])
    assert len({one.digest for one in found}) == 1
    assert found[0].name == str(file)
    assert all(one.open().mode == "RGB" for one in found)
    assert picture(found[0]) is found[0]
    assert pictures(None) == ()
    assert pictures(content) == (picture(content),)


def test_pixels_mode_and_palette_decide_the_digest_of_an_image_in_memory():
    red, again, blue = (shape(colour) for colour in ("red", "red", "blue"))
    assert picture(red).digest == picture(again).digest != picture(blue).digest
    first, second = (PIL.Image.new("P", (2, 2), 0) for _ in range(2))
    first.putpalette([255, 0, 0])
    second.putpalette([0, 0, 255])
    assert picture(first).digest != picture(second).digest


def test_a_file_that_changes_is_noticed(tmp_path):
    file = tmp_path / "a.png"
    shape("red").save(file)
    found = picture(file)
    shape("blue").save(file)
    with pytest.raises(DataError, match=r"a\.png"):
        found.open()


def test_what_is_no_image(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png"):
        picture(tmp_path / "gone.png")
    with pytest.raises(DataError, match="3"):
        picture(3)
    content = io.BytesIO()
    shape("red").save(content, "PNG")
    for bad in (b"no image", b"", content.getvalue()[:60]):
        with pytest.raises(DataError, match="PNG"):
            picture(bad).open()
