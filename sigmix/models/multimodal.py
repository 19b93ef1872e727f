"""Vision-language bases: what makes a folder one, its processor, and where its language backbone is.

A vision-language model is a vision tower, a projector and a language model (the backbone) that reads the projected
image as if it were words. SVF acts on the backbone, as in section 4 of the paper; tower and projector stay as they
are. `sigmix.models.loading.load_base` loads such a model like any other: its tokenizer knows the processor that it
came with.
"""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from sigmix.errors import BaseModelError, ConfigError
from sigmix.utils.images import Picture
from sigmix.utils.logging import quiet


def bare(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrappers; adapted layers stay in it."""
    while True:
        if isinstance(model, BaseTuner):
            model = model.model
        elif isinstance(model, PeftModel):
            model = model.get_base_model()
        else:
            return model


PROCESSOR = "sigmix_processor"


def is_vision(config: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` is of a vision-language model that transformers can load."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    built = config.get("architectures") or []
    fits = any(name in KNOWN.values() for name in built) if built else config.get("model_type") in KNOWN
    return fits and bool(config.get("vision_config")) and not config.get("is_encoder_decoder")


def auto_class(config: Mapping[str, Any]) -> Any:
    """The transformers class that loads a folder with this ``config.json``."""
    import transformers

    name = "AutoModelForImageTextToText" if is_vision(config) else "AutoModelForCausalLM"
    return getattr(transformers, name)


def load_tokenizer(folder: Path, label: str) -> Any:
    """The tokenizer of a vision-language folder, bound to its processor.

    Raises:
        BaseModelError: Pillow (for Qwen-VL torchvision too) is missing, or there is no processor that can be loaded.
    """
    from transformers import AutoProcessor

    try:
        with quiet():
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise BaseModelError(
            f"{label} reads images, which needs Pillow, and for Qwen-VL torchvision: {error}",
            remedy="pip install 'sigmix[vision]'",
        ) from error
    except Exception as error:
        raise BaseModelError(
            f"the processor of {label} cannot be loaded: {type(error).__name__}: {error}",
            remedy="the folder needs preprocessor_config.json or processor_config.json beside the tokenizer's files",
        ) from error
    if not hasattr(processor, "image_processor"):
        raise BaseModelError(
            f"{label} has a vision tower but no image processor",
            remedy="the folder needs preprocessor_config.json or processor_config.json beside the tokenizer's files",
        )
    return bind(processor)


def bind(processor: Any) -> Any:
    """A processor's tokenizer, padding on the left, from which `processor_of` finds the processor again."""
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    setattr(tokenizer, PROCESSOR, processor)
    return tokenizer


def processor_of(tokenizer: Any) -> Any:
    """The processor that a tokenizer came with, or None for a text model's."""
    return getattr(tokenizer, PROCESSOR, None)


def backbone(model: Any, strict: bool = True) -> tuple[str, Any] | None:
    """Path and module of a vision-language model's language backbone; None for a text model.

    Args:
        model: plain, or with adapted layers, or wrapped by PEFT, whose prefix is then in the path.
        strict: False gives None where the backbone cannot be told apart.

    Raises:
        BaseModelError: it has a vision tower, but its backbone cannot be told apart.
    """
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "vision_config", None):
        return None
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    path = next((name for name, module in model.named_modules() if module is found), "")
    if not path or any(part in path for part in ("vision", "visual", "image")):
        if not strict:
            return None
        raise BaseModelError(
            f"the language backbone of this {config.model_type} cannot be told apart from its vision tower",
            remedy="give target_modules as full module paths",
        )
    return path, found


# --- Images in prompts: an image's tokens are ids below zero, which this image alone has.


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
