"""Tiny random vision-language models with their processors, made in memory, and pictures of one coloured shape."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from helpers_tiny import SIZES, build_tokenizer

TEXT = {k: v for k, v in SIZES.items() if k != "tie_word_embeddings"}
COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (20, 160, 60), "yellow": (230, 220, 40)}
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ image }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
IMAGE = {"llava": "<image>", "qwen": "<|vision_start|><|image_pad|><|vision_end|>"}


def tokenizer(kind: str):
    """The letter tokenizer with the kind's special tokens from 100 on; no chat template of its own."""
    letters = build_tokenizer()
    own = {"llava": "<image>", "qwen": "<|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|>"}[kind]
    letters.add_special_tokens({"additional_special_tokens": own.split()})
    letters.chat_template = None
    return letters


def vlm(kind: str = "llava", seed: int = 0, **text):
    """(model, processor) of one kind: llava, llava_next, qwen2_vl or qwen2_5_vl; float32, random, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pair = {"llava": _llava, "llava_next": _llava_next}.get(kind, _qwen)(kind, text)
        with torch.no_grad():
            for name, parameter in pair[0].named_parameters():
                if parameter.dim() > 1 or name.endswith("bias"):
                    parameter.normal_(0.0, 0.15)
    return pair[0].eval(), pair[1]


def _clip(side: int):
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=side, patch_size=8,
        projection_dim=16,
    )  # fmt: skip


def _llava(kind, text):
    from transformers import CLIPImageProcessor, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    words = tokenizer("llava")
    config = LlavaConfig(
        vision_config=_clip(32), text_config=LlamaConfig(**{**TEXT, **text}), image_token_id=len(words) - 1,
        vision_feature_layer=-2,
    )  # fmt: skip
    pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        pixels, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("image }}", f"'{IMAGE['llava']}' }}}}"),
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _llava_next(kind, text):
    from transformers import (
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    words, grid = tokenizer("llava"), [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        vision_config=_clip(32), text_config=LlamaConfig(**{**TEXT, **text}), image_token_id=len(words) - 1,
        vision_feature_layer=-2, image_grid_pinpoints=grid,
    )  # fmt: skip
    pixels = LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grid
    )
    processor = LlavaNextProcessor(
        pixels, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("image }}", f"'{IMAGE['llava']}' }}}}"),
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config), processor


def _qwen(kind, text):
    import transformers

    words = tokenizer("qwen")
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in (
        ("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>"),
        ("vision_end", "<|vision_end|>"))}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    words_config = {**TEXT, "rope_parameters": rope, **text}
    if kind == "qwen2_vl":
        see = {"depth": 2, "embed_dim": 32, "hidden_size": words_config["hidden_size"], "num_heads": 2, "mlp_ratio": 2}
        name = "Qwen2VL"
    else:
        see = {"depth": 2, "hidden_size": 32, "out_hidden_size": words_config["hidden_size"], "num_heads": 2,
               "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
        name = "Qwen2_5_VL"
    see |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = getattr(transformers, f"{name}Config")(vision_config=see, text_config=words_config, **ids)
    pixels = transformers.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    template = TEMPLATE.replace("image }}", f"'{IMAGE['qwen']}' }}}}")
    processor = _qwen_processor(getattr(transformers, f"{name}Processor"), pixels, words, template)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), processor


def _qwen_processor(known, pixels, words, template):
    """The real processor, or without torchvision, which its video half needs, one that knows images only."""
    from transformers.processing_utils import ProcessorMixin
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        from transformers import Qwen2VLVideoProcessor

        video = Qwen2VLVideoProcessor(patch_size=4, merge_size=2, temporal_patch_size=2)
        return known(pixels, words, video, chat_template=template)

    class ImagesOnly(known):
        def __init__(self, image_processor, tokenizer, chat_template):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = map(
                tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token)
            )
            self.video_processor = None
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

    return ImagesOnly(pixels, words, chat_template=template)


def shape(colour: str, kind: str = "circle", seed: int = 0, size: tuple[int, int] = (32, 32)):
    """A PIL image of one shape on a pale ground, at a place and of a size that the seed decides."""
    from PIL import Image, ImageDraw

    draw = random.Random(f"{colour}{kind}{seed}")
    image = Image.new("RGB", size, tuple(draw.randint(225, 255) for _ in range(3)))
    width, height = draw.randint(size[0] // 2, size[0] - 8), draw.randint(size[1] // 2, size[1] - 8)
    left, top = draw.randint(0, size[0] - width - 1), draw.randint(0, size[1] - height - 1)
    box, pen = (left, top, left + width, top + height), ImageDraw.Draw(image)
    if kind == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif kind == "rectangle":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=COLOURS[colour])
    return image


def saved(folder: Path, kind: str = "llava", **options) -> Path:
    """A complete folder of a tiny model with its processor."""
    model, processor = vlm(kind, **options)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
