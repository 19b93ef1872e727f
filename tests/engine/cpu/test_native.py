"""Linear layers in C++: kernels against plain arithmetic, and what of an answer is computed with 8-bit weights."""

from __future__ import annotations

import copy
import ctypes
import itertools
import subprocess

import pytest
import torch
from helpers_engine import TOLERANCE, expert, rows
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sigmix.engine import Engine
from sigmix.engine.continuous_batching import ContinuousBatch
from sigmix.engine.cpu import decode_step, native
from sigmix.engine.generation import SamplingParams, SequenceState
from sigmix.engine.prefix_cache import prefill
from sigmix.errors import ConfigError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix


def can_run() -> bool:
    try:
        native.check_decode_weights("int8")
    except ConfigError:
        return False
    return True


pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(not can_run(), reason="8-bit decode weights need AVX-512 VNNI and a C++ compiler"),
]
bfloat16 = pytest.mark.skipif(not native.has_bfloat16(), reason="this machine has no AVX-512 BF16")
PROMPTS = rows([9, 12, 10])
STEPS = 6


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] rounded to 8 bits a row, in float64."""
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scales.where(scales > 0, 1)).round().double() * scales.double()


def prompt_only(one: Expert) -> Expert:
    return Expert(one.name, one.z, {**one.meta, "positions": "prompt"})


@pytest.fixture
def bank(tiny):
    return {"all": expert(tiny("llama"), "all", 1), "prompt": prompt_only(expert(tiny("llama"), "prompt", 2))}


def engines(tiny, tokenizer, bank):
    """(with 8-bit decode weights, without)."""
    return [Engine(tiny("llama"), tokenizer, bank, decode_weights=one) for one in ("int8", None)]


# ------------------------------------------------------------------ the kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("out", "size"), [(1, 1), (5, 3), (16, 16), (37, 50), (192, 576), (576, 1536)])
def test_it_computes_the_rounded_weight_and_leaves_inputs_exact(dtype, out, size):
    draw = torch.Generator().manual_seed(out)
    weight, bias = torch.randn(out, size, generator=draw).to(dtype), torch.randn(out, generator=draw).to(dtype)
    x = torch.randn(7, size, generator=draw).to(dtype)
    x[2] *= 20  # rows have their own scale
    for shift in (bias, None):
        packed = native.int8_linear(weight, shift)
        y = packed(x)
        assert y.dtype == dtype
        expected = F.linear(x.double(), rounded(weight), None if shift is None else shift.double())
        # 16 bits of the largest input, or the output's own rounding
        error = (y.double() - expected).abs() / expected.abs().amax(1, keepdim=True)
        assert float(error.max()) < {torch.float32: 2e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]


@bfloat16
@pytest.mark.parametrize(("out", "size"), [(1, 2), (5, 4), (16, 16), (37, 50), (100, 576), (576, 1536)])
def test_bfloat16_weights_compute_what_float64_does(out, size):
    draw = torch.Generator().manual_seed(out)
    weight, bias = torch.randn(out, size, generator=draw).bfloat16(), torch.randn(out, generator=draw).bfloat16()
    for count, shift in itertools.product((1, 11, 16, 24, 75), (bias, None)):
        x = torch.randn(count, size, generator=draw).bfloat16()
        y = native.bfloat16_linear(weight, shift)(x)
        assert y.dtype == torch.bfloat16
        expected = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
        # half a unit in the last place of the output, and sums in float32
        assert ((y.double() - expected).abs() <= expected.abs() / 256 + 1e-5 * size).all()


@bfloat16
@pytest.mark.parametrize("size", [50, 64])
def test_bfloat16_weights_pass_on_numbers_that_are_not_finite(size):
    layer, x = native.bfloat16_linear(torch.ones(20, size).bfloat16()), torch.ones(3, size).bfloat16()
    x[0, 7], x[1, 3] = float("nan"), float("inf")
    y = layer(x)
    assert y[0].isnan().all()
    assert y[1].isinf().all()
    assert (y[2] == size).all()


@bfloat16
def test_bfloat16_weights_take_no_other_inputs():
    with pytest.raises(TypeError, match="float32"):
        native.bfloat16_linear(torch.ones(4, 4).bfloat16())(torch.ones(1, 4))


@bfloat16
@pytest.mark.parametrize("size", [1, 7, 16, 100, 5000])
def test_greedy_tokens_and_their_log_probabilities(size):
    logits = (torch.randn(6, size, generator=torch.Generator().manual_seed(size)) * 8).bfloat16()
    logits[1] = 3  # the first of equal ones
    logits[2, : size // 2] = float("-inf")
    tokens, logprobs = native.greedy(logits)
    assert torch.equal(tokens, logits.argmax(-1))
    expected = logits.double().log_softmax(-1).amax(-1)
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-6, rtol=1e-6)


@bfloat16
def test_greedy_log_probabilities_of_numbers_that_are_not_finite():
    logits = torch.ones(4, 40).bfloat16()
    logits[0, 7], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    tokens, logprobs = native.greedy(logits)
    assert logprobs.isnan().tolist() == [True, True, True, False]
    assert ((tokens >= 0) & (tokens < 40)).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(native.int8_linear, torch.float32, id="int8"),
        pytest.param(native.bfloat16_linear, torch.bfloat16, id="bfloat16", marks=bfloat16),
    ],
)
def test_a_row_does_not_depend_on_the_others(make, dtype, threads):
    torch.set_num_threads(threads)
    for size in (200, 256):  # AMX takes multiples of 32
        layer, x = make(torch.randn(112, size).to(dtype)), torch.randn(39, size).to(dtype)
        together = layer(x)
        for count in (*range(1, 10), 23, 33):
            assert torch.equal(layer(x[:count]), together[:count])
        assert torch.equal(layer(x.reshape(39, 1, size))[:, 0], together)


def test_zeros_and_numbers_that_are_not_finite():
    packed, x = native.int8_linear(torch.zeros(20, 50) + torch.arange(20)[:, None], torch.ones(20)), torch.randn(4, 50)
    x[0], x[1, 7], x[2, 3] = 0, float("nan"), float("inf")
    y = packed(x)
    assert (y[0] == 1).all()
    assert not y[1].isfinite().any()
    assert not y[2].isfinite().any()
    assert y[3].isfinite().all()
    assert y[3, 0] == 1  # a row of zeros in the weight


def test_rows_too_long_for_32_bit_sums_are_refused():
    with pytest.raises(ConfigError, match="input features"):
        native.int8_linear(torch.empty(1, native.MAX_IN_FEATURES + 1))


def test_it_takes_a_byte_for_a_weight():
    packed = native.int8_linear(torch.randn(256, 512))
    assert packed.nbytes == 256 * 512 + 4 * 256


def attention(*tensors: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    """Call the C function of the attention operator, as a compiled step does."""
    pointer, python = ctypes.c_void_p, ctypes.pythonapi
    python.PyCapsule_GetPointer.restype, python.PyCapsule_GetPointer.argtypes = pointer, [ctypes.py_object, pointer]
    python.PyCapsule_New.restype, python.PyCapsule_New.argtypes = ctypes.py_object, [pointer, pointer, pointer]
    call = native.load_kernels().aoti_torch_cpu_attention
    call.argtypes = [*[pointer] * 4, ctypes.c_double, ctypes.c_double, ctypes.POINTER(pointer)]
    result, handles = pointer(), torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    addresses = [python.PyCapsule_GetPointer(handle, None) for handle in handles]
    assert call(*addresses, scale, softcap, ctypes.byref(result)) == 0
    return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(python.PyCapsule_New(result.value, None, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(
    ("heads", "groups", "columns", "width", "out"),
    [(9, 3, 40, 64, 64), (4, 4, 1, 16, 16), (6, 1, 100, 80, 80), (2, 2, 17, 20, 12), (4, 2, 33, 192, 128)],
)
def test_attention(dtype, softcap, heads, groups, columns, width, out):
    draw = torch.Generator().manual_seed(columns)
    query = torch.randn(5, 1, heads, width, generator=draw).to(dtype).transpose(1, 2)
    # parts of buffers
    keys = torch.randn(6, groups, columns + 9, width, generator=draw).to(dtype)[:5, :, 4 : 4 + columns]
    values = torch.randn(6, groups, columns + 9, out, generator=draw).to(dtype)[:5, :, 4 : 4 + columns]
    for mask_heads in (1, heads):
        mask = torch.rand(5, mask_heads, 1, columns, generator=draw) < 0.6
        mask[..., -1] = True
        found = attention(query, keys, values, mask, scale=0.3, softcap=softcap)
        expected = decode_step.attention(*(x.double() for x in (query, keys, values)), mask, 0.3, softcap)
        assert found.dtype == dtype
        assert found.shape == (5, 1, heads, out)
        error = (found.double() - expected).abs().max()
        assert float(error) < (0.01 if dtype == torch.bfloat16 else 1e-5)


# ------------------------------------------------------------------ what is computed with them


def eight_bits(model: nn.Module) -> nn.Module:
    """A copy of a model with all linear layers rounded to 8 bits."""
    other = copy.deepcopy(model)
    other.lm_head.weight = nn.Parameter(other.lm_head.weight.detach().clone())  # not the embedding
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight))
            elif isinstance(module, Conv1D):
                module.weight.copy_(rounded(module.weight.T).T)
    return other


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "gpt2", "mixtral"])
@torch.no_grad()
def test_answers_are_decoded_with_8_bits_over_an_exact_prompt(tiny, tiny_tokenizer, arch):
    plain = tiny(arch)
    answer_model = eight_bits(plain)
    engine = Engine(tiny(arch), tiny_tokenizer, decode_weights="int8")
    ours = engine.generate(PROMPTS, max_new_tokens=STEPS, logit_bias=dict.fromkeys(engine.eos_token_ids, -100.0))
    if arch == "mixtral":  # its experts' matrices are no linear layers: they stay as they are
        answer_model.load_state_dict({k: v for k, v in plain.state_dict().items() if "experts" in k}, strict=False)
    for prompt, one in zip(PROMPTS, ours, strict=True):
        state = prefill(plain, [prompt], 0)
        scores = [state.logits[0].log_softmax(-1)]
        for token in one.ids[:-1]:
            out = answer_model(input_ids=torch.tensor([[token]]), past_key_values=state.cache, use_cache=True)
            scores.append(out.logits[0, -1].log_softmax(-1))
        expected = [float(row[token]) for row, token in zip(scores, one.ids, strict=True)]
        assert one.logprobs == pytest.approx(expected, abs=2e-3)  # activations in 16 bits


def test_prompts_and_scores_are_bit_for_bit_those_without(tiny, tiny_tokenizer, bank):
    small, full = engines(tiny, tiny_tokenizer, bank)
    mixes = ["prompt", None, "all"]
    for mix in (None, "prompt", "all", "prompt+all", mixes):
        ids = torch.tensor([row[:9] for row in PROMPTS])
        assert torch.equal(small.logits(ids, mix=mix), full.logits(ids, mix=mix))
        assert small.score(PROMPTS, PROMPTS, mix) == full.score(PROMPTS, PROMPTS, mix)
        first = [engine.generate(PROMPTS, mix, max_new_tokens=1)[0].logprobs for engine in (small, full)]
        assert first[0] == first[1]
    ours, theirs = (engine.generate(PROMPTS, "prompt", max_new_tokens=STEPS) for engine in (small, full))
    assert [one.logprobs[0] for one in ours] == [one.logprobs[0] for one in theirs]
    assert [one.logprobs[1:] for one in ours] != [one.logprobs[1:] for one in theirs]


@pytest.mark.parametrize("mix", ["all", "all+prompt", ["all", "base", "prompt"]], ids=str)
def test_batches_with_experts_of_all_positions_are_exact(tiny, tiny_tokenizer, bank, mix):
    small, full = engines(tiny, tiny_tokenizer, bank)
    ours, theirs = (engine.generate(PROMPTS, mix, max_new_tokens=STEPS) for engine in (small, full))
    assert ours == theirs


def test_a_row_decodes_alone_as_in_a_batch(tiny, tiny_tokenizer, bank):
    small, _ = engines(tiny, tiny_tokenizer, bank)
    mixes = ["prompt", None, "prompt:0.5"]
    together = small.generate(PROMPTS, mixes, max_new_tokens=STEPS)
    for prompt, mix, one in zip(PROMPTS, mixes, together, strict=True):
        (single,) = small.generate([prompt], mix, max_new_tokens=STEPS)
        assert single.ids == one.ids
        assert single.logprobs == pytest.approx(one.logprobs, abs=1e-3)  # inputs are rounded to 16 bits


def test_a_change_of_the_base_reaches_the_copies(tiny, tiny_tokenizer):
    engine = Engine(tiny("llama"), tiny_tokenizer, decode_weights="int8")
    with torch.no_grad():
        for module in engine.model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(0.5)
    other = Engine(copy.deepcopy(engine.model), tiny_tokenizer, decode_weights="int8")
    assert engine.generate(PROMPTS, max_new_tokens=STEPS) == other.generate(PROMPTS, max_new_tokens=STEPS)


def test_nothing_is_left_in_the_model(tiny, tiny_tokenizer, bank):
    small, _ = engines(tiny, tiny_tokenizer, bank)
    before = {name: p.clone() for name, p in small.model.named_parameters()}
    small.generate(PROMPTS, "prompt", max_new_tokens=STEPS)
    assert not any("forward" in vars(module) for module in small.model.modules())
    assert all(torch.equal(p, before[name]) for name, p in small.model.named_parameters())


# ------------------------------------------------------------------ cached conversations


def conversation(engine: Engine, ids: list[int], mix: Mix) -> SequenceState:
    one = SequenceState(ids, SamplingParams(STEPS), mix, cache_prefix=True)
    with ContinuousBatch(engine) as batch:
        batch.add([one])
        while batch:
            batch.step()
    return one


@pytest.mark.parametrize("mix", ["base", "prompt"])
def test_the_next_turn_of_a_conversation_reads_the_answer_exactly(tiny, tiny_tokenizer, bank, mix):
    (ids,), mix = rows([40]), Mix.parse(mix)
    small, full = engines(tiny, tiny_tokenizer, bank)
    answer = conversation(small, ids, mix).ids
    turn = [*ids, *answer, *rows([8], seed=3)[0]]
    cached = small.cached_prefix(turn, mix)
    assert cached is not None
    assert cached.length == len(ids)  # the answer's keys and values are of 8-bit weights
    again, fresh = (conversation(engine, turn, mix) for engine in (small, full))
    assert again.logprobs[0] == pytest.approx(fresh.logprobs[0], abs=TOLERANCE["atol"])


def test_a_conversation_with_an_expert_of_all_positions_is_cached_whole(tiny, tiny_tokenizer, bank):
    (ids,) = rows([40])
    small, _ = engines(tiny, tiny_tokenizer, bank)
    one = conversation(small, ids, Mix.one("all"))
    cached = small.cached_prefix([*one.token_ids, 9, 9], Mix.one("all"))
    assert cached is not None
    assert cached.length >= len(ids) + STEPS - 1


# ------------------------------------------------------------------ what cannot have them


@pytest.mark.parametrize("value", ["int9", "", "INT8", True, 8])
def test_unknown_formats_are_named(tiny_llama, tiny_tokenizer, value):
    with pytest.raises(ConfigError, match="int8"):
        Engine(tiny_llama, tiny_tokenizer, decode_weights=value)


def test_a_quantized_or_offloaded_base_is_refused(tiny, tiny_tokenizer, tmp_path):
    pytest.importorskip("torchao")
    from accelerate import cpu_offload
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantized = tiny("llama")
    quantize_(quantized, Int8WeightOnlyConfig())
    with pytest.raises(ConfigError, match="quantized.*decode_weights"):
        Engine(quantized, tiny_tokenizer, decode_weights="int8")
    offloaded = cpu_offload(tiny("llama"), execution_device="cpu")
    with pytest.raises(ConfigError, match="offloaded.*decode_weights"):
        Engine(offloaded, tiny_tokenizer, decode_weights="int8")


def test_another_device_is_refused(tiny_llama, tiny_tokenizer, monkeypatch):
    execution = Engine(tiny_llama, tiny_tokenizer).execution
    monkeypatch.setattr(execution, "model", tiny_llama.to("meta"))
    with pytest.raises(ConfigError, match="meta.*CPU"):
        execution._check_plain("int8")


def test_a_machine_that_cannot_compute_with_them_is_named(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": False, "avx512_vnni": False})
        with pytest.raises(ConfigError, match="AVX-512 VNNI"):
            native.check_decode_weights("int8")
        with pytest.raises(ConfigError, match="AVX-512"):
            native.load_kernels.__wrapped__()
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(ConfigError, match=rf"{compiler}.*g\+\+"):
            native.load_kernels.__wrapped__()


def test_the_kernel_is_compiled_once(monkeypatch, cache):
    native.load_kernels.__wrapped__()
    run, commands = subprocess.run, []

    def recorded(command, **options):
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", recorded)
    assert native.load_kernels.__wrapped__()
    assert all("--version" in command for command in commands)
    assert len(list((cache / "compiled").iterdir())) == 1
