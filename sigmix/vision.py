"""Vision-language bases: what makes a folder one, its processor, and where its language backbone is.

A vision-language model is a vision tower, a projector and a language model (the backbone) that reads the projected
image as if it were words. SVF acts on the backbone, as in section 4 of the paper; tower and projector stay as they
are. `sigmix.models.load_base` loads such a model like any other: its tokenizer knows the processor that it came with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sigmix.errors import BaseModelError
from sigmix.gguf import quiet

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
