"""Mixtures in vLLM's engine give the tokens that `Engine` gives: in its batches, prefix cache, preemption, server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from helpers_engine import expert
from helpers_export import ids
from helpers_tiny import build_tiny
from helpers_vllm import ENVIRONMENT, SIZES, home, needs_vllm, start
from safetensors.torch import load_file, save_file

from sigmix.engine import Engine
from sigmix.errors import ConfigError, ExpertError, FingerprintError, SigmixError
from sigmix.experts.mix import Mix
from sigmix.integrations.vllm.adapter import Adapter, Settings
from sigmix.models.loading import load_base

pytestmark = [needs_vllm, pytest.mark.slow]

NAMES = ["base", "math", "word", "ask", "tell", "math:0.7+word:0.3", "ask:0.5+tell:0.5", "math:0.5+ask:0.5"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Base, bank, our engine and `vllm.LLM` with four slots, in this process."""
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "SIGMIX_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        base, bank = home(folder)
        patch.setenv("SIGMIX_VLLM_EXPERTS", str(bank.folder))
        ours = Engine(*load_base(base, "float32"), bank)
        ours.eos_token_ids = []
        numbers: dict[str, int] = {}
        yield SimpleNamespace(base=base, bank=bank, ours=ours, folder=folder, numbers=numbers, llm=start(base, bank))


def request(made, name):
    """LoRARequest of a mixture, with one number for each."""
    from vllm.lora.request import LoRARequest

    if name == "base":
        return None
    adapter = Adapter.find(name, Settings.of())
    return LoRARequest(adapter.name, made.numbers.setdefault(adapter.path, len(made.numbers) + 1), adapter.path)


def params(tokens):
    import vllm

    return vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def answers(made, rows, names, tokens=12, llm=None):
    """Greedy answers of vLLM."""
    prompts, adapters = [{"prompt_token_ids": row} for row in rows], [request(made, name) for name in names]
    found = (llm or made.llm).generate(prompts, params(tokens), lora_request=adapters, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


def expected(made, rows, names, tokens=12):
    """Greedy answers of ours, a request at a time."""
    pairs = zip(rows, names, strict=True)
    return [made.ours.generate([row], name, max_new_tokens=tokens)[0].ids for row, name in pairs]


def test_64_requests_under_32_mixtures_in_one_batch(made):
    draw = torch.Generator().manual_seed(0)
    weights = torch.rand(24, 4, generator=draw).tolist()
    drawn = [Mix(dict(zip(("math", "word", "ask", "tell"), row, strict=True))).id for row in weights]
    mixes = [*NAMES, *drawn]
    rows = [ids(5 + number % 40, number) for number in range(64)]
    names = [mixes[number % 32] for number in range(64)]
    llm = start(made.base, made.bank, max_loras=32)
    want = expected(made, rows, names)
    assert answers(made, rows, names, llm=llm) == want
    plain = expected(made, rows, ["base"] * 64)
    assert sum(own != base for own, base in zip(want, plain, strict=True)) > 40  # the experts act
    # four slots: vLLM waits with requests beyond four mixtures
    assert answers(made, rows, names) == want


def test_bfloat16_answers_agree_as_far_as_those_of_the_base(tmp_path, monkeypatch):
    for name, value in {**ENVIRONMENT, "SIGMIX_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    base, bank = home(tmp_path, torch.bfloat16)
    monkeypatch.setenv("SIGMIX_VLLM_EXPERTS", str(bank.folder))  # `start` sets it
    ours = Engine(*load_base(base, "bfloat16"), bank)
    ours.eos_token_ids = []
    llm = start(base, bank, dtype="bfloat16", max_loras=8)
    made = SimpleNamespace(ours=ours, llm=llm, numbers={})
    rows = [ids(5 + number % 40, number) for number in range(64)]

    def equal_tokens(names):
        """Return the tokens before the first that differs, of each request."""
        pairs = zip(answers(made, rows, names), expected(made, rows, names), strict=True)
        return [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), 12) for pair in pairs]

    names = [NAMES[number % 8] for number in range(64)]
    alone, mixed = equal_tokens(["base"] * 64), equal_tokens(names)
    assert sum(mixed) >= 0.8 * sum(alone)
    plain = expected(made, rows, ["base"] * 64)
    same = sum(own == base for own, base in zip(answers(made, rows, names), plain, strict=True))
    assert same < mixed.count(12)  # the experts act


def test_a_quantized_base_has_the_change_of_the_original(tmp_path, monkeypatch):
    for name, value in {**ENVIRONMENT, "SIGMIX_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    base, bank = home(tmp_path, torch.bfloat16)
    packed, weights = gptq(base, tmp_path / "gptq")
    monkeypatch.setenv("SIGMIX_VLLM_EXPERTS", str(bank.folder))
    monkeypatch.setenv("SIGMIX_VLLM_BASE", str(base))
    llm = start(packed, bank, dtype="bfloat16", max_loras=8)
    made, rows = SimpleNamespace(numbers={}), [ids(20 + number, number) for number in range(len(NAMES))]
    model = load_base(base, "float32")[0]
    originals = {path: model.get_submodule(path).weight.detach().clone() for path in weights}

    @torch.no_grad()
    def expected(name, weights=weights):
        """Log-probabilities in float32 of the tokens after the first of each row."""
        mix = Mix.base() if name == "base" else Mix.parse(name)
        for path, weight in weights.items():
            u, s, vt = torch.linalg.svd(originals[path].double(), full_matrices=False)
            gain = sum(alpha * (bank[one].z[path].double() - 1) for one, alpha in mix.weights.items())
            model.get_submodule(path).weight.copy_(weight + ((u * (s * gain)) @ vt).float())
        logprobs = [model(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in rows]
        return [one.gather(-1, torch.tensor(row[1:])[:, None])[:, 0] for one, row in zip(logprobs, rows, strict=True)]

    def found(names):
        import vllm

        options = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        adapters = [request(made, name) for name in names]
        outputs = llm.generate([{"prompt_token_ids": row} for row in rows], options, lora_request=adapters)
        return [
            torch.tensor([one[token].logprob for token, one in zip(row[1:], output.prompt_logprobs[1:], strict=True)])
            for row, output in zip(rows, outputs, strict=True)
        ]

    def gap(one, other):
        return max(float((a - b).abs().mean()) for a, b in zip(one, other, strict=True))

    plain, mixed = expected("base"), found(NAMES)
    rounding = gap(found(["base"] * len(rows)), plain)
    assert gap(mixed, [expected(name)[number] for number, name in enumerate(NAMES)]) < 2 * rounding
    assert gap(mixed[1:2], plain[1:2]) > 5 * rounding  # the experts act
    assert gap(plain, expected("base", originals)) > 5 * rounding  # and so does the quantization


def gptq(base, folder):
    """Write a copy of a base with 4-bit weights in groups of 32, rounded to nearest, in GPTQ's format.

    Returns:
        The folder, and {path: dequantized float32 weight}.
    """
    tensors, weights = load_file(base / "model.safetensors"), {}
    shutil.copytree(base, folder)
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        weight = tensors.pop(key).float()
        path, (out, inner) = key.removesuffix(".weight"), weight.shape
        scales = (weight.view(out, -1, 32).abs().amax(-1) / 7).bfloat16()
        each = scales.float().repeat_interleave(32, 1)
        levels = (weight / each).round().clamp(-8, 7)
        weights[path] = levels * each
        bits = (levels + 8).long().t().reshape(inner // 8, 8, out) << (4 * torch.arange(8))[None, :, None]
        tensors[f"{path}.qweight"] = bits.sum(1).to(torch.int32)
        tensors[f"{path}.qzeros"] = torch.full((inner // 32, out // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{path}.scales"] = scales.t().contiguous()
        tensors[f"{path}.g_idx"] = torch.arange(inner, dtype=torch.int32) // 32
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "checkpoint_format": "gptq"
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder, weights


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
def test_a_cached_prompt_is_its_mixtures(made, order):
    row = ids(100, 7)  # three full blocks
    first = [answers(made, [row], [name])[0] for name in order]
    assert first == expected(made, [row] * len(order), order)
    assert [answers(made, [row], [name])[0] for name in order] == first  # now from the cache
    assert answers(made, [row] * len(order), order) == first


def test_few_blocks_evict_cached_prompts_and_preempt_requests(made):
    llm = start(made.base, made.bank, max_loras=8, num_gpu_blocks_override=14)
    rows = [ids(50 + number, number % 3) for number in range(16)]
    names = [NAMES[number % 8] for number in range(16)]
    want = expected(made, rows, names, 60)
    for _ in range(2):
        assert answers(made, rows, names, 60, llm) == want


def test_long_prompts_are_read_in_chunks(made):
    llm = start(made.base, made.bank, max_loras=8, max_num_batched_tokens=64)
    rows = [ids(130 + number, number) for number in range(8)]
    assert answers(made, rows, NAMES, llm=llm) == expected(made, rows, NAMES)


@pytest.mark.parametrize("name", ["ask", "math:0.5+ask:0.5", "math"])
def test_answer_tokens_become_prompt_tokens_in_the_next_turn(made, name):
    row = ids(40, 11)
    (reply,) = answers(made, [row], [name], 80)
    longer = [*row, *reply, *ids(9, 12)]
    assert answers(made, [longer], [name]) == expected(made, [longer], [name])
    # and the cached answer serves requests that continue the same prompt
    assert answers(made, [row], [name], 80) == [reply]


def test_mixtures_come_and_go_while_others_are_answered(made):
    engine = made.llm.llm_engine
    rows = [ids(20 + number, 40 + number) for number in range(4)]
    names = ["math", "ask", "base", "math:0.7+word:0.3"]
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        engine.add_request(f"stay-{number}", {"prompt_token_ids": row}, params(30), lora_request=request(made, name))
    engine.add_request("leave", {"prompt_token_ids": rows[0]}, params(30), lora_request=request(made, "word"))
    found, step = {}, 0
    while engine.has_unfinished_requests():
        for one in engine.step():
            if one.finished:
                found[one.request_id] = list(one.outputs[0].token_ids)
        step += 1
        other = request(made, f"tell:0.{step % 9 + 1}")
        engine.add_lora(other)  # takes the slot of the least recently used
        engine.remove_lora(other.lora_int_id)
        if step == 5:
            engine.abort_request(["leave"])
        if step == 8:
            engine.remove_lora(request(made, "math").lora_int_id)  # although it is in use
    want = expected(made, rows, names, 30)
    assert [found[key] for key in sorted(found) if key.startswith("stay")] == want
    assert len(found.get("leave", [])) < 30


def test_an_error_is_the_requests_own(made):
    engine, bank = made.llm.llm_engine, made.bank
    bank.add(expert(build_tiny(seed=5, **SIZES), "stranger", 1))  # with the z of math
    with pytest.raises(FingerprintError, match="'stranger'"):
        engine.add_lora(request(made, "stranger"))
    changing = request(made, "math:0.9")
    changing.lora_path = changing.lora_path.replace(bank["math"].digest, "0" * 64)
    with pytest.raises(ExpertError, match="changed on disk"):
        engine.add_lora(changing)
    other = request(made, "math:0.8")
    other.lora_path = "/adapters/lora"
    with pytest.raises(ConfigError, match="no LoRA adapters"):
        engine.add_lora(other)
    assert answers(made, [ids(9)] * 8, NAMES) == expected(made, [ids(9)] * 8, NAMES)
    (bank.path("stranger") / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SigmixError, match="stranger"):
        Adapter.find("stranger", Settings.of())


def test_an_expert_that_was_trained_again_is_another_mixture(made):
    row, old = ids(40, 13), made.bank["math"]
    before = answers(made, [row], ["math"])
    try:
        made.bank.add(expert(build_tiny(**SIZES), "math", 21), replace=True)
        made.ours.bank = {"math": made.bank["math"]}
        assert answers(made, [row], ["math"]) == expected(made, [row], ["math"]) != before
    finally:
        made.bank.add(old, replace=True)
        made.ours.bank = made.bank
    assert answers(made, [row], ["math"]) == before


def test_another_release_is_refused(made, monkeypatch):
    import vllm

    from sigmix.integrations.vllm.plugin import check_version

    check_version()
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(ConfigError, match=r"supports vLLM 0\.32, not 0\.99\.1"):
        check_version()


# ---------------------------------------------------------------------- tensor parallelism


def sharded(kind, rank, size, **sizes):
    """A layer of vLLM on one of several workers, with what its constructor computes from their number."""
    layer = object.__new__(kind)
    torch.nn.Module.__init__(layer)
    for key, value in {"tp_rank": rank, "tp_size": size, "prefix": "layer", **sizes}.items():
        setattr(layer, key, value)
    return layer


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("fused", [False, True])
def test_workers_together_add_the_whole_change(size, fused):
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )  # fmt: skip

    from sigmix.integrations.vllm.worker import MixtureMethod, Part, Tokens, shards_of

    draw = torch.Generator().manual_seed(0)
    heads, groups, width, inner = 4, 2, 8, 16
    kv = max(1, groups // size) * width
    layers = {
        "column": (ColumnParallelLinear, [32], {"output_size": 32}, [32 // size]),
        "merged": (MergedColumnParallelLinear, [32, 32], {"output_sizes": [32, 32]}, [32 // size] * 2),
        "qkv": (
            QKVParallelLinear, [heads * width, groups * width, groups * width],
            {"num_heads": heads // size, "num_kv_heads": max(1, groups // size), "head_size": width,
             "total_num_heads": heads, "total_num_kv_heads": groups, "num_kv_head_replicas": max(1, size // groups)},
            [heads * width // size, kv, kv],
        ),
        "row": (RowParallelLinear, [32], {"input_size_per_partition": inner // size}, [32]),
    }  # fmt: skip
    x = torch.randn(5, inner, generator=draw)
    for name, (kind, outputs, sizes, local) in layers.items():
        one = fused and len(outputs) > 1
        shapes = [sum(outputs)] if one else outputs
        whole = [
            (torch.randn(6, inner, generator=draw), torch.randn(out, 6, generator=draw), torch.randn(6, generator=draw))
            for out in shapes
        ]
        want = torch.cat([x @ (second @ (gain[:, None] * first)).T for first, second, gain in whole], -1)
        found = []
        for rank in range(size):
            layer = sharded(kind, rank, size, **sizes)
            shards = shards_of(layer, len(shapes))
            parts = [
                Part("", columns, first[:, inputs], second if rows is None else second[rows])
                for (columns, rows, inputs), (first, second, _) in zip(shards, whole, strict=True)
            ]
            tokens = Tokens(5, torch.device("cpu"))
            tokens.rows = None
            method = MixtureMethod(None, parts, 1, tokens, f"{name}-{rank}")
            method.table[0] = torch.cat([gain for _, _, gain in whole])
            y = torch.zeros(5, sum(local))
            method.add_change(x[:, shards[0][2]], y)
            found.append(y)
        if name == "row":
            torch.testing.assert_close(sum(found), want, rtol=1e-4, atol=1e-4)
            continue
        columns = [torch.stack(pieces) for pieces in zip(*(y.split(local, -1) for y in found), strict=True)]
        for number, (pieces, dense) in enumerate(zip(columns, want.split(outputs, -1), strict=True)):
            copies = max(1, size // groups) if name == "qkv" and number else 1  # of a key or value head
            torch.testing.assert_close(torch.cat(list(pieces[::copies]), -1), dense, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- server


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """``vllm serve`` in a process of its own."""

    def __init__(self, made, *options, **environment):
        self.port = port = free_port()
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(made.base), "--dtype", "float32",
            "--enable-lora", "--max-loras", "4", "--max-model-len", "256", "--block-size", "32", "--enforce-eager",
            "--port", str(port), "--host", "127.0.0.1", *options,
        ]  # fmt: skip
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
        self.log = open(made.folder / f"server-{port}.log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while True:
            try:
                self.call("/v1/models")
                return
            except OSError:
                assert self.process.poll() is None, (made.folder / f"server-{port}.log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(1)

    def call(self, path, body=None):
        """Status and JSON of an answer."""
        data = None if body is None else json.dumps(body).encode()
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"content-type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=240) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def complete(self, row, name):
        return self.call(
            "/v1/completions",
            {"model": name, "prompt": row, "max_tokens": 12, "temperature": 0, "ignore_eos": True,
             "return_token_ids": True},
        )  # fmt: skip

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def test_the_server_resolves_mixtures_and_survives_bad_ones(made):
    row = ids(30, 3)
    names = ["math", "word:0.3 + math:0.7", "ask:0.5+tell:0.5"]
    want = expected(made, [row] * 3, names)
    made.bank.add(expert(build_tiny(seed=5, **SIZES), "stranger", 1), replace=True)
    made.bank.add(expert(build_tiny(**SIZES), "broken", 9))
    (made.bank.path("broken") / "adapter_model.safetensors").write_bytes(b"damaged")
    for _ in range(2):  # killed and started again
        server = Server(made)
        try:
            for name, reply in zip(names, want, strict=True):
                status, answer = server.complete(row, name)
                assert status == 200, answer
                assert answer["choices"][0]["token_ids"] == reply
                assert answer["model"] == Mix.parse(name).id
            assert server.complete(row, "nobody")[0] == 404
            assert server.complete(row, "broken")[0] == 404
            assert server.complete(row, "stranger")[0] == 400
            assert server.complete(row, "math")[1]["choices"][0]["token_ids"] == want[0]
            listed = {one["id"] for one in server.call("/v1/models")[1]["data"]}
            assert {"math", "math:0.7+word:0.3"} <= listed
        finally:
            server.kill()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
def test_two_workers_of_a_model_answer_alike(made):
    server = Server(made, "--tensor-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND="0|1")
    try:
        row = ids(30, 3)
        for name, reply in zip(NAMES[1:], expected(made, [row] * 7, NAMES[1:]), strict=True):
            status, answer = server.complete(row, name)
            assert status == 200, answer
            assert answer["choices"][0]["token_ids"] == reply
    finally:
        server.kill()
