"""OpenAI's embeddings: request and response."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from sigmix.serve.protocol.base import MAX_TEXT, RequestModel, as_prompts, field_error

MAX_INPUTS = 2048
"""Texts of one request, as in OpenAI's API."""

Text = Annotated[str, Field(max_length=MAX_TEXT)]


class EmbeddingsRequest(RequestModel):
    """POST /v1/embeddings."""

    ignored = frozenset({"user"})

    model: str = Field("base", description="base, an expert, a saved mixture, or a mixture such as a:.7+b:.3.")
    input: Text | list[Text] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="Size of the model's hidden states.")

    @model_validator(mode="after")
    def _check_count(self) -> EmbeddingsRequest:
        if not 1 <= (count := len(as_prompts(self.input))) <= MAX_INPUTS:
            raise field_error("input", f"must hold 1 to {MAX_INPUTS} texts, not {count}")
        return self


def embeddings_response(
    model: str, vectors: Sequence[torch.Tensor], tokens: int, encoding_format: str, mix: str
) -> dict[str, Any]:
    """Return the response with float32 vectors; base64 is that of their little-endian bytes."""
    data = [{"object": "embedding", "index": index, "embedding": _encode(vector, encoding_format)}
            for index, vector in enumerate(vectors)]  # fmt: skip
    return {
        "object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "sigmix": {"mix": mix, "pooling": "mean", "normalized": True},
    }  # fmt: skip


def _encode(vector: torch.Tensor, encoding_format: str) -> str | list[float]:
    if encoding_format == "float":
        return [float(value) for value in vector.tolist()]
    return base64.b64encode(vector.float().numpy().astype("<f4").tobytes()).decode()
