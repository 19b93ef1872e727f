"""vLLM's side of ``python -m benchmarks vllm``: a script for the Python of vLLM's own environment, without sigmix.

Its argument is a JSON object: ``model`` a folder; ``dtype``; ``adapters`` folders of PEFT LoRAs, or none. Requests:
``rows`` of token ids, ``new_tokens``; answers: ``seconds`` and ``ids`` of every row. See `benchmarks.peers`.
"""

import json
import os
import sys
import time


def main() -> None:
    """Answer the requests of standard input."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    import vllm
    from vllm.lora.request import LoRARequest

    given = json.loads(sys.argv[1])
    adapters = [LoRARequest(path, number + 1, path) for number, path in enumerate(given["adapters"])]
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": given["rank"]} if adapters else {}
    llm = vllm.LLM(given["model"], dtype=given["dtype"], **given["options"], **lora)
    print(json.dumps({"version": vllm.__version__}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        rows = [{"prompt_token_ids": row} for row in request["rows"]]
        chosen = [adapters[number % len(adapters)] for number in range(len(rows))] if adapters else None
        params = vllm.SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True)
        start = time.perf_counter()
        answers = llm.generate(rows, params, lora_request=chosen, use_tqdm=False)
        seconds = time.perf_counter() - start
        ids = [list(answer.outputs[0].token_ids) for answer in answers]
        print(json.dumps({"seconds": seconds, "ids": ids}), file=out, flush=True)


if __name__ == "__main__":  # vLLM's own processes import this file
    main()
