"""``python -m benchmarks engine``: tokens per second of `Engine.generate` and of transformers' `generate`.

Both answer the same chat prompts greedily, with a KV cache and without end tokens, so that the work is equal. The peer
is a separate model from `from_pretrained`, without packed weights. In float32 both must generate the same tokens, or
the run fails; in half precision rounding decides near-ties, and the share of equal answers is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Aim, device, interleaved, ratio, report, say
from benchmarks.requests import bundled_engine, prompts
from sigmix.engine.prefix_cache import left_pad
from sigmix.errors import SigmixError
from sigmix.models.default import DEFAULT
from sigmix.models.loading import load_base

AIMS = {"vs_generate_1": Aim(">=", 1.0), "vs_generate_8": Aim(">=", 1.5), "vs_generate_64": Aim(">=", 1.5)}

ROWS = (1, 8, 64)


def run(
    repeats: int | None = None, dtype: str | None = None, base: str = DEFAULT, new_tokens: int = 32, bank: Any = None
) -> dict[str, Any]:
    """Run the benchmark; see `harness.report` for the result.

    Args:
        repeats: rounds that count, default 5. dtype, base, bank: what is run. new_tokens: of every answer.
    """
    where = device()
    engine = bundled_engine(base, dtype, bank, compile=True)
    where["dtype"] = str(engine.model.dtype).removeprefix("torch.")
    texts = prompts(engine, max(ROWS))
    peer, _ = load_base(base, dtype)
    peer.generation_config.eos_token_id = None
    seconds, ratios, same = {}, {}, {}
    for count in ROWS:
        rows = [engine.encode(text) for text in texts[:count]]
        found: dict[str, list[list[int]]] = {}
        say(f"{count} rows")
        contestants = {
            "ours": _ours(engine, rows, new_tokens, found),
            "theirs": _theirs(peer, engine.pad_id, rows, new_tokens, found),
        }
        taken = interleaved(contestants, repeats or 5)
        same[count] = sum(a == b for a, b in zip(found["ours"], found["theirs"], strict=True)) / count
        if same[count] < 1 and where["dtype"] in ("float32", "float64"):
            raise SigmixError(f"ours and transformers' answers differ in {1 - same[count]:.0%} of {count} rows")
        seconds[f"rows_{count}"] = taken
        ratios[f"vs_generate_{count}"] = ratio(taken["theirs"], taken["ours"])
    raw = {"base": base, "new_tokens": new_tokens, "seconds": seconds, "share_of_equal_answers": same}
    return report("engine", where, ratios, AIMS, raw)


def _ours(engine: Any, rows: list[list[int]], new_tokens: int, found: dict[str, Any]) -> Callable[[int], None]:
    def answer(_: int) -> None:
        found["ours"] = [one.ids for one in engine.generate(rows, max_new_tokens=new_tokens)]

    return answer


def _theirs(
    model: Any, pad_id: int, rows: list[list[int]], new_tokens: int, found: dict[str, Any]
) -> Callable[[int], None]:
    def answer(_: int) -> None:
        ids, mask = left_pad(rows, pad_id, model.device)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=new_tokens,
                pad_token_id=pad_id,
            )  # fmt: skip
        found["theirs"] = output[:, ids.shape[1] :].tolist()

    return answer
