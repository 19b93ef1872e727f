"""Images in prompts: an image's tokens are ids below zero, which this image alone has.

A prompt stays a list of token ids. Where the processor puts placeholders for an image, the list has numbers made of the
image's content and of the place in it, so that all that compares ids is right for images too: prompts share a prefix
only as far as they show the same image, and keys and values kept for a prefix are found for that image alone. When a
prompt is read, such ids become the vectors that vision tower and projector make of the image; these do not depend on
any z, because SVF acts on the language backbone, so they are computed once and kept.

What this needs of a model: an image enters through its input embeddings (and, as in Qwen2-VL, through the positions),
and nowhere else. LLaVA, LLaVA-NeXT, Qwen2-VL and Qwen2.5-VL are tested; any other is compared with its own way of
reading on the first image, and refused if it differs.
"""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from sigmix.errors import BaseModelError, ConfigError
from sigmix.experts.base import bare
from sigmix.pictures import Picture
from sigmix.vision import backbone

BUDGET = 1 << 30
"""Bytes of image vectors that are kept for a model: some 200 images of LLaVA-1.5-7B in bfloat16."""

TESTED = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")
PLACE_BITS = 16
KEY_BITS = 46


@dataclass(eq=False)
class ShownImage:
    """One image as one processor cuts it up.

    Attributes:
        key: of content and processor. tokens: how many ids it takes. grid: [1, 3] of Qwen-VL's patches, else None.
    """

    key: int
    picture: Picture
    tokens: int
    processor: Any = field(repr=False)
    grid: torch.Tensor | None = None

    def pixels(self) -> dict[str, torch.Tensor]:
        """What the processor makes of the image, placeholders included."""
        token = self.processor.image_token
        return dict(self.processor(text=[token], images=[self.picture.open()], return_tensors="pt"))


class ImagePrompt(list):
    """Token ids of a prompt with images; it keeps its images known as long as it lives.

    A pickle or copy has the ids alone: images and processor stay in the process that reads them.
    """

    def __init__(self, ids: Sequence[int], shown: Sequence[ShownImage]) -> None:
        super().__init__(ids)
        self.shown = tuple(shown)

    def __reduce__(self) -> tuple[type[list], tuple[list[int]]]:
        return list, (list(self),)


_KNOWN: weakref.WeakValueDictionary[int, ShownImage] = weakref.WeakValueDictionary()
_VECTORS: weakref.WeakKeyDictionary[Any, Vectors] = weakref.WeakKeyDictionary()


def with_images(processor: Any, inputs: Any, pictures: Sequence[Picture]) -> list[int]:
    """Token ids of what a processor made of one prompt and its images.

    Args:
        inputs: the processor's output, a batch of one.

    Raises:
        ConfigError: the placeholders are not those of the images.
    """
    ids = inputs["input_ids"][0].tolist()
    token = _image_token(processor)
    places = [place for place, one in enumerate(ids) if one == token]
    runs = _runs(places) if len(pictures) != 1 else [places]
    if len(runs) != len(pictures) or not all(runs):
        raise ConfigError(
            f"this model's template keeps {len(runs)} places apart for {len(pictures)} images",
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


def as_ids(prompt: Sequence[int]) -> list[int]:
    """A prompt given as ids; one with images stays what it is."""
    return prompt if isinstance(prompt, ImagePrompt) else list(prompt)


def embedded(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments with which a model reads ids [N, R]: the ids, or embeddings [N, R, d] where images are among them."""
    if not bool((ids < 0).any()):
        return {"input_ids": ids}
    base = bare(model)
    if base not in _VECTORS:
        _VECTORS[base] = Vectors(base)
    found = model.get_input_embeddings()(ids.clamp_min(0))
    vectors = _VECTORS[base].of(ids[ids < 0]).to(found.device, found.dtype)
    return {"inputs_embeds": found.masked_scatter((ids < 0)[..., None], vectors)}


def whole(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """Arguments of one pass over whole prompts [N, R], padded where the mask [N, R] is 0, without a cache."""
    positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp_min(0)
    used = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    places = grid_positions(model, [row[own].tolist() for row, own in zip(ids, used, strict=True)])
    if places is not None:
        positions = ids.new_zeros(3, *ids.shape)
        for number, own in enumerate(places):
            positions[:, number, used[number]] = own.to(ids.device)
    return {**embedded(model, ids), "attention_mask": mask, "position_ids": positions}


def grid_positions(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor] | None:
    """Positions int64 [3, length] (time, height, width) of every row; None where they are simply 0, 1, 2, …

    In Qwen-VL a token of an image has three positions, and the text after an image goes on from the largest.
    """
    inner = getattr(bare(model), "model", None)
    if not hasattr(inner, "get_rope_index") or not any(min(row, default=0) < 0 for row in rows):
        return None
    return [_positions(inner, row) for row in rows]


class Vectors:
    """What a model makes of images, within a memory budget; those used last stay.

    Raises:
        ConfigError: vision tower or projector are adapted, so that an image's vectors would depend on the mix.
    """

    def __init__(self, model: Any, budget: int = BUDGET) -> None:
        self._model, self.budget, self.bytes = weakref.ref(model), budget, 0
        self._kept: OrderedDict[Any, torch.Tensor] = OrderedDict()
        self._sound = model.config.model_type in TESTED

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [n, d] of ids int64 [n] below zero."""
        numbers = (-1 - ids).cpu()
        keys, places = numbers >> PLACE_BITS, numbers & ((1 << PLACE_BITS) - 1)
        model: Any = self._model()
        state = _state(model)
        parts = {key: self._image(model, key, state) for key in keys.unique().tolist()}
        first = next(iter(parts.values()))
        found = first.new_empty(len(ids), first.shape[1])
        for key, vectors in parts.items():
            here = keys == key
            found[here.to(found.device)] = vectors[places[here].to(vectors.device)]
        return found

    @torch.no_grad()
    def _image(self, model: Any, key: int, state: Any) -> torch.Tensor:
        name = (key, state)
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        _check_frozen(model)
        image = _KNOWN.get(key)
        if image is None:
            raise ConfigError("a prompt's image is not known any more", remedy="encode the prompt again, and keep it")
        weight = model.get_input_embeddings().weight
        inputs = {
            k: v.to(weight.device, weight.dtype) if v.is_floating_point() else v.to(weight.device)
            for k, v in image.pixels().items()
        }
        known = inspect.signature(model.get_image_features).parameters
        out = model.get_image_features(**{k: v for k, v in inputs.items() if k in known}, return_dict=True)
        made = torch.cat([part.reshape(-1, part.shape[-1]) for part in out.pooler_output])
        if len(made) != image.tokens:
            raise BaseModelError(
                f"the processor has {image.tokens} places for {image.picture.name}, and the model {len(made)} vectors",
                remedy="load model and processor from the same folder",
            )
        if not self._sound:
            _check_sound(model, image.processor, inputs, made)
            self._sound = True
        if made.nbytes <= self.budget:
            self._kept[name] = made
            self.bytes += made.nbytes
            while self.bytes > self.budget:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes
        return made


def _known(processor: Any, picture: Picture, tokens: int, grid: torch.Tensor | None) -> ShownImage:
    mark = f"{picture.digest} {processor.image_processor.to_json_string()} {tokens}"
    key = int(hashlib.sha256(mark.encode()).hexdigest(), 16) >> (256 - KEY_BITS)
    found = _KNOWN.get(key)
    if found is None:
        if tokens >> PLACE_BITS:
            raise ConfigError(f"{picture.name} takes {tokens} tokens; {1 << PLACE_BITS} are too many")
        found = _KNOWN[key] = ShownImage(key, picture, tokens, processor, grid)
    return found


def _image_token(processor: Any) -> int:
    token = getattr(processor, "image_token_id", None)
    return token if token is not None else processor.tokenizer.convert_tokens_to_ids(processor.image_token)


def _runs(places: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _positions(inner: Any, row: Sequence[int]) -> torch.Tensor:
    length, row = len(row), list(row)
    keys = [(-1 - one) >> PLACE_BITS if one < 0 else None for one in row]
    images, before = [], None
    for key in keys:
        if key is not None and key != before:
            images.append(_KNOWN[key])
        before = key
    if row[-1] < 0:  # a prefix may end inside an image, whose positions are those of the whole
        place = (-1 - row[-1]) & ((1 << PLACE_BITS) - 1)
        row += [-1] * (images[-1].tokens - place - 1)
    below = torch.tensor([one < 0 for one in row])
    ids = torch.tensor(row).clamp_min(0)[None]
    grids = torch.cat([image.grid for image in images if image.grid is not None]) if images else None
    found, _ = inner.get_rope_index(ids, below.int()[None], image_grid_thw=grids)
    return found[:, 0, :length]


def _state(model: Any) -> tuple:
    """Changes when a weight outside the language backbone was cast, moved or edited in place."""
    inside = backbone(model)
    root = f"{inside[0]}." if inside is not None else " "
    return tuple(
        (p.data_ptr(), p.dtype, p._version) for name, p in model.named_parameters() if not name.startswith(root)
    )


def _check_frozen(model: Any) -> None:
    inside = backbone(model)
    for name, module in model.named_modules():
        if inside is not None and isinstance(module, BaseTunerLayer) and not name.startswith(f"{inside[0]}."):
            raise ConfigError(
                f"{name} is adapted, which is outside the language backbone: an image would be another one under every "
                "mix",
                remedy="adapt the language backbone alone, the default of SVFConfig, or use the model through PEFT",
            )


def _check_sound(model: Any, processor: Any, inputs: dict[str, torch.Tensor], vectors: torch.Tensor) -> None:
    """Compare with the model's own way of reading an image: it may do more than put vectors in place of tokens."""
    own = model(**inputs, use_cache=False).logits[0, -1].float()
    ids = inputs["input_ids"]
    found = model.get_input_embeddings()(ids)
    found = found.masked_scatter((ids == _image_token(processor))[..., None], vectors.to(found.dtype))
    ours = model(inputs_embeds=found, use_cache=False).logits[0, -1].float()
    gap = float((own - ours).abs().max() / own.abs().max())
    if not gap <= 0.02:
        raise BaseModelError(
            f"{model.config.model_type} reads images in more ways than through its input embeddings (logits differ by "
            f"{gap:.1%}), which sigmix does not do",
            remedy=f"use one of {', '.join(TESTED)}; text alone works",
        )
