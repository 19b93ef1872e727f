"""The command line with a vision-language base: answers about image files, evaluation, training."""

from __future__ import annotations

import json

import pytest
from helpers_vision import saved, shape

from sigmix import Bank, Expert

pytest_plugins = ["helpers_cli"]


@pytest.fixture
def place(tmp_path):
    saved(tmp_path / "seeing", max_position_embeddings=512)
    folder = tmp_path / "easy_vqa"
    (folder / "images").mkdir(parents=True)
    for split in ("train", "test"):
        rows = []
        for number in range(24):
            colour = ("red", "blue")[number % 2]
            shape(colour, seed=number + 100 * (split == "train")).save(folder / f"images/{split}{number}.png")
            rows.append({"question": "what color?", "answer": colour, "image": f"images/{split}{number}.png"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_generate_with_images(place, run, refused):
    red, blue = (place / "easy_vqa/images" / name for name in ("test0.png", "test1.png"))
    common = ("--base", place / "seeing", "--max-new-tokens", 6, "--json")
    both = run("generate", "what?", "what?", "--image", red, "--image", blue, *common).json["answers"]
    assert both[0]["ids"] != both[1]["ids"]
    one = run("generate", "what?", "what else?", "--image", red, *common).json["answers"]
    assert one[0]["ids"] == both[0]["ids"]
    without = run("generate", "what?", *common).json["answers"][0]
    assert one[0]["prompt_tokens"] == both[0]["prompt_tokens"] == without["prompt_tokens"] + 16  # of 8 × 8 pixels each
    assert "2 --image for 3 prompts" in refused("generate", "a", "b", "c", "--image", red, "--image", blue, *common)
    assert "gone.png: No such file" in refused("generate", "a", "--image", place / "gone.png", *common)


def test_images_for_a_text_base(place, home, refused):
    image = place / "easy_vqa/images/test0.png"
    assert "llava-hf/" in refused("generate", "a", "--image", image, "--base", home.base)
    text = refused("eval", "--task", "easy_vqa", "--data-dir", place, "--n", 2, "--base", home.base, silent=False)
    assert "llava-hf/" in text


def test_train_and_evaluate(place, run):
    options = ("--task", "easy_vqa", "--data-dir", place, "--base", place / "seeing")
    steps = ("--max-steps", 1, "--generation-batch-size", 8, "--max-eval-samples", 2, "--test-n", 4,
             "--dtype", "float32", "--layers", "half")  # fmt: skip
    done = run("train", *options, *steps, "--out", place / "bank/looks", "--run", place / "run", "--json")
    assert done.json["test"]["n"] == 4, done.err
    expert = Expert.from_pretrained(place / "bank/looks")
    assert {path.split(".")[3] for path in expert.z} == {"0"}  # half of the backbone's two layers
    assert expert.meta["task"] == "easy_vqa"
    first = json.loads((place / "run/test-base.jsonl").read_text().splitlines()[0])
    assert first["images"][0].endswith(".png")
    assert Bank(place / "bank").names() == ["looks"]
