"""Vision-language bases: their processor, their language backbone, and images in prompts.

A vision-language model is a vision tower, a projector and a language model (the backbone) that reads the projected
image vectors in place of token embeddings. SVF adapts the backbone (paper, section 4). A prompt is a list of token
ids; the ids of an image's tokens are negative and derived from its content, so caches keyed by ids keep working.
"""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sigmix.errors import BaseModelError, ConfigError, reraised
from sigmix.models.weights import weights_key
from sigmix.utils.images import Picture
from sigmix.utils.logging import quiet
from sigmix.utils.lru import LRUCache

PROCESSOR = "sigmix_processor"

TESTED = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")
BUDGET = 1 << 30  # bytes of image vectors kept for a model: some 200 images of LLaVA-1.5-7B in bfloat16
PLACE_BITS, KEY_BITS = 16, 46
"""Bits of a negative id: the position within the image, and the hash of image and processor."""


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside PEFT's wrappers, with its adapted layers."""
    from peft import PeftModel  # here, so that reading a tokenizer does not import PEFT
    from peft.tuners.tuners_utils import BaseTuner

    while True:
        if isinstance(model, BaseTuner):
            model = model.model
        elif isinstance(model, PeftModel):
            model = model.get_base_model()
        else:
            return model


def is_vision(config: Mapping[str, Any]) -> bool:
    """Return True if ``config.json`` is that of a vision-language model that transformers can load."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISION

    built = config.get("architectures") or []
    fits = any(name in VISION.values() for name in built) if built else config.get("model_type") in VISION
    return fits and bool(config.get("vision_config")) and not config.get("is_encoder_decoder")


def auto_class(config: Mapping[str, Any]) -> Any:
    """Return transformers' auto class for a folder with this ``config.json``."""
    import transformers

    return transformers.AutoModelForImageTextToText if is_vision(config) else transformers.AutoModelForCausalLM


def load_tokenizer(folder: Path, label: str) -> Any:
    """Load the tokenizer of a vision-language folder, bound to its processor.

    Raises:
        BaseModelError: Pillow (or torchvision, for Qwen-VL) is missing, or the processor cannot be loaded.
    """
    from transformers import AutoProcessor

    remedy = "the folder needs preprocessor_config.json or processor_config.json beside the tokenizer's files"
    needs = f"{label} reads images, which needs Pillow, and for Qwen-VL torchvision"
    with (
        reraised(BaseModelError, f"the processor of {label} cannot be loaded", remedy),
        reraised(BaseModelError, needs, "pip install 'sigmix[vision]'", ImportError),
        quiet(),
    ):
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    if not hasattr(processor, "image_processor"):
        raise BaseModelError(f"{label} has a vision tower but no image processor", remedy=remedy)
    return bind(processor)


def bind(processor: Any) -> Any:
    """Return a processor's tokenizer, padding on the left, from which `processor_of` returns the processor."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    setattr(tokenizer, PROCESSOR, processor)
    return tokenizer


def processor_of(tokenizer: Any) -> Any:
    """Return the processor that a tokenizer belongs to, or None for a text model's."""
    return getattr(tokenizer, PROCESSOR, None)


def backbone(model: Any, strict: bool = True) -> tuple[str, Any] | None:
    """Return path and module of a vision-language model's language backbone; None for a text model.

    Args:
        model: plain, or with adapted layers, or wrapped by PEFT, which prefixes the path.
        strict: raise if the backbone cannot be identified; otherwise return None.

    Raises:
        BaseModelError: it has a vision tower, but its backbone cannot be identified.
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "vision_config", None):
        return None
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    if path and not any(part in path for part in ("vision", "visual", "image")):
        return path, decoder
    if strict:
        raise BaseModelError(
            f"the language backbone of this {config.model_type} cannot be told apart from its vision tower",
            remedy="give target_modules as full module paths",
        )
    return None


@dataclass(eq=False)
class ShownImage:
    """An image as one processor splits it into tokens.

    Attributes:
        key: hash of content and processor.
        tokens: number of token ids.
        grid: [1, 3] of Qwen-VL's patches, else None.
    """

    key: int
    picture: Picture
    tokens: int
    processor: Any = field(repr=False)
    grid: torch.Tensor | None = None

    def pixels(self) -> dict[str, torch.Tensor]:
        """Return the processor's output for the image, placeholder ids included."""
        token = self.processor.image_token
        return dict(self.processor(text=[token], images=[self.picture.open()], return_tensors="pt"))


class ImagePrompt(list):
    """Token ids of a prompt with images; keeps its images alive.

    A pickle or copy holds the ids alone: images and processor stay in the process that read them.
    """

    def __init__(self, ids: Sequence[int], shown: Sequence[ShownImage]) -> None:
        super().__init__(ids)
        self.shown = tuple(shown)

    def __reduce__(self) -> tuple[type[list], tuple[list[int]]]:
        return list, (list(self),)


_KNOWN: weakref.WeakValueDictionary[int, ShownImage] = weakref.WeakValueDictionary()
_VECTORS: weakref.WeakKeyDictionary[Any, ImageVectors] = weakref.WeakKeyDictionary()


def image_prompt(processor: Any, inputs: Any, pictures: Sequence[Picture]) -> list[int]:
    """Return the token ids of one prompt with images.

    Args:
        inputs: the processor's output, a batch of one.

    Raises:
        ConfigError: the placeholders do not match the images.
    """
    ids = inputs["input_ids"][0].tolist()
    token = _image_token(processor)
    places = [place for place, one in enumerate(ids) if one == token]
    runs = _runs(places) if len(pictures) != 1 else [places]
    if len(runs) != len(pictures) or not all(runs):
        raise ConfigError(
            f"this model's chat template separates {len(runs)} images of the {len(pictures)} given",
            remedy="give one image to a prompt",
        )
    if not pictures:
        return ids
    grids = inputs.get("image_grid_thw")
    shown = []
    for number, (run, picture) in enumerate(zip(runs, pictures, strict=True)):
        image = _known(processor, picture, len(run), None if grids is None else grids[number : number + 1])
        shown.append(image)
        for place, position in enumerate(run):
            ids[position] = -1 - ((image.key << PLACE_BITS) | place)
    return ImagePrompt(ids, shown)


def as_token_ids(prompt: Sequence[int]) -> list[int]:
    """Return a prompt of ids as a list; an `ImagePrompt` is returned unchanged."""
    return prompt if isinstance(prompt, ImagePrompt) else list(prompt)


def is_image_token(token: int) -> bool:
    """Return True if a negative id is that of a token of an image that is still in use."""
    number = -1 - token
    image = _KNOWN.get(number >> PLACE_BITS)
    return image is not None and number & ((1 << PLACE_BITS) - 1) < image.tokens


def embed_inputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` [N, R], or ``inputs_embeds`` [N, R, d] if there are images among the ids."""
    if not bool((ids < 0).any()):
        return {"input_ids": ids}
    base = bare(model)
    if base not in _VECTORS:
        _VECTORS[base] = ImageVectors(base)
    embeddings = model.get_input_embeddings()(ids.clamp_min(0))
    vectors = _VECTORS[base].of(ids[ids < 0]).to(embeddings.device, embeddings.dtype)
    return {"inputs_embeds": embeddings.masked_scatter((ids < 0)[..., None], vectors)}


def forward_inputs(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """Return the arguments of one pass over whole prompts [N, R] with padding mask [N, R], without a KV cache."""
    positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp_min(0)
    used = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    grid = grid_positions(model, [row[own].tolist() for row, own in zip(ids, used, strict=True)])
    if grid is not None:
        positions = ids.new_zeros(3, *ids.shape)
        for number, own in enumerate(grid):
            positions[:, number, used[number]] = own.to(ids.device)
    return {**embed_inputs(model, ids), "attention_mask": mask, "position_ids": positions}


def grid_positions(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor] | None:
    """Return positions int64 [3, length] (time, height, width) of every row; None where they are simply 0, 1, 2, …

    In Qwen-VL a token of an image has three positions, and the text after an image continues from the largest.
    """
    inner = getattr(bare(model), "model", None)
    if not hasattr(inner, "get_rope_index") or not any(min(row, default=0) < 0 for row in rows):
        return None
    return [_positions(inner, row) for row in rows]


class ImageVectors:
    """Cache of a model's image vectors, within a budget of bytes.

    Raises:
        ConfigError: vision tower or projector are adapted, so the vectors would depend on the mixture.
    """

    def __init__(self, model: Any, budget: int = BUDGET) -> None:
        self._model = weakref.ref(model)
        self.cache: LRUCache[Any, torch.Tensor] = LRUCache(budget)
        self._sound = model.config.model_type in TESTED

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the vectors [n, d] of negative ids int64 [n]."""
        numbers = (-1 - ids).cpu()
        keys, places = numbers >> PLACE_BITS, numbers & ((1 << PLACE_BITS) - 1)
        model: Any = self._model()
        state = _state(model)
        parts = {key: self._image(model, key, state) for key in keys.unique().tolist()}
        first = next(iter(parts.values()))
        gathered = first.new_empty(len(ids), first.shape[1])
        for key, vectors in parts.items():
            here = keys == key
            gathered[here.to(gathered.device)] = vectors[places[here].to(vectors.device)]
        return gathered

    @torch.no_grad()
    def _image(self, model: Any, key: int, state: Any) -> torch.Tensor:
        name = (key, state)
        if (kept := self.cache.get(name)) is not None:
            return kept
        _check_frozen(model)
        image = _KNOWN.get(key)
        if image is None:
            raise ConfigError("the image of a prompt has been freed", remedy="keep a reference to the encoded prompt")
        weight = model.get_input_embeddings().weight
        inputs = {
            k: v.to(weight.device, weight.dtype) if v.is_floating_point() else v.to(weight.device)
            for k, v in image.pixels().items()
        }
        accepted = inspect.signature(model.get_image_features).parameters
        out = model.get_image_features(**{k: v for k, v in inputs.items() if k in accepted}, return_dict=True)
        vectors = torch.cat([part.reshape(-1, part.shape[-1]) for part in out.pooler_output])
        if len(vectors) != image.tokens:
            raise BaseModelError(
                f"{image.picture.name} has {image.tokens} tokens, but the model returned {len(vectors)} vectors",
                remedy="load model and processor from the same folder",
            )
        if not self._sound:
            _check_sound(model, image.processor, inputs, vectors)
            self._sound = True
        self.cache.put(name, vectors, vectors.nbytes)
        return vectors


def _known(processor: Any, picture: Picture, tokens: int, grid: torch.Tensor | None) -> ShownImage:
    content = f"{picture.digest} {processor.image_processor.to_json_string()} {tokens}"
    key = int(hashlib.sha256(content.encode()).hexdigest(), 16) >> (256 - KEY_BITS)
    image = _KNOWN.get(key)
    if image is None:
        if tokens >> PLACE_BITS:
            raise ConfigError(f"{picture.name} takes {tokens} tokens; the limit is {(1 << PLACE_BITS) - 1}")
        image = _KNOWN[key] = ShownImage(key, picture, tokens, processor, grid)
    return image


def _image_token(processor: Any) -> int:
    token = getattr(processor, "image_token_id", None)
    return token if token is not None else processor.tokenizer.convert_tokens_to_ids(processor.image_token)


def _runs(places: Sequence[int]) -> list[list[int]]:
    """Split ascending numbers into runs of consecutive ones."""
    return [[place for _, place in run] for _, run in groupby(enumerate(places), lambda pair: pair[1] - pair[0])]


def _positions(inner: Any, row: Sequence[int]) -> torch.Tensor:
    length, row = len(row), list(row)
    keys = [(-1 - one) >> PLACE_BITS if one < 0 else None for one in row]
    images = [_KNOWN[key] for key, _ in groupby(keys) if key is not None]
    if row[-1] < 0:  # a prefix that ends inside an image has the positions of the whole image
        place = (-1 - row[-1]) & ((1 << PLACE_BITS) - 1)
        row += [-1] * (images[-1].tokens - place - 1)
    is_image = torch.tensor([one < 0 for one in row])
    ids = torch.tensor(row).clamp_min(0)[None]
    grids = torch.cat([image.grid for image in images if image.grid is not None]) if images else None
    positions, _ = inner.get_rope_index(ids, is_image.int()[None], image_grid_thw=grids)
    return positions[:, 0, :length]


def _state(model: Any) -> tuple:
    """Return what changes when a weight outside the language backbone is cast, moved or edited in place."""
    inside = backbone(model)
    root = f"{inside[0]}." if inside is not None else " "
    return weights_key(p for name, p in model.named_parameters() if not name.startswith(root))


def _check_frozen(model: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside = backbone(model)
    for name, module in model.named_modules():
        if inside is not None and isinstance(module, BaseTunerLayer) and not name.startswith(f"{inside[0]}."):
            raise ConfigError(
                f"{name} is adapted outside the language backbone, so image vectors would depend on the mixture",
                remedy="adapt the language backbone alone, the default of SVFConfig, or use the model through PEFT",
            )


def _check_sound(model: Any, processor: Any, inputs: dict[str, torch.Tensor], vectors: torch.Tensor) -> None:
    """Raise unless the model reads an image through its input embeddings alone, as far as its logits show."""
    own = model(**inputs, use_cache=False).logits[0, -1].float()
    ids = inputs["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    embeddings = embeddings.masked_scatter((ids == _image_token(processor))[..., None], vectors.to(embeddings.dtype))
    ours = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1].float()
    gap = float((own - ours).abs().max() / own.abs().max())
    if not gap <= 0.02:
        raise BaseModelError(
            f"{model.config.model_type} does not read images through its input embeddings alone (logits differ by "
            f"{gap:.1%})",
            remedy=f"use one of {', '.join(TESTED)}; prompts without images work",
        )
