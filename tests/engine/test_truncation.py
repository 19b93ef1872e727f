"""The truncated form of a whole model: exact at full size, a budget below it, a row's own affair, no trace left."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import TOLERANCE, expert, rows
from helpers_experts import at

from sigmix.engine import Engine
from sigmix.engine.cpu import kernels as packing
from sigmix.engine.scoring import next_logits
from sigmix.engine.truncation import fit, load_truncation, save_truncation
from sigmix.errors import ConfigError, ExpertError, FingerprintError
from sigmix.experts.mix import Mix

pytestmark = pytest.mark.usefixtures("cache")
PROMPTS = rows([14, 22, 12, 17], shared=10)
MIXES = [Mix.one("math"), Mix.base(), Mix.parse("code:-0.4"), Mix.parse("math:0.7+code:0.3")]
ARCHITECTURES = ["llama", "gpt2", "gemma3", "qwen2"]


def engine_of(tiny, tokenizer, arch="llama", dtype=torch.float32, **options):
    bank = {name: expert(tiny(arch).to(dtype), name, seed) for name, seed in (("math", 1), ("code", 2))}
    return Engine(tiny(arch).to(dtype), tokenizer, bank, **options)


def calibrated(engine, **options):
    return fit(engine, rows([20, 30, 25, 12, 9, 40], seed=3), ["math", "code"], max_new_tokens=4, **options)


def logits(engine, form=None, mix=MIXES):
    width = min(map(len, PROMPTS))
    return engine.logits(torch.tensor([row[:width] for row in PROMPTS]), mix=mix, form=form)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_without_a_budget_it_is_the_exact_model(tiny, tiny_tokenizer, arch):
    engine = engine_of(tiny, tiny_tokenizer, arch)
    engine.truncation = calibrated(engine, outputs=999, inputs=999).plan(0.0)
    assert engine.truncation.error < 1e-5
    exact = logits(engine, "factored")
    # subspaces are found in float32, through a Cholesky factor
    torch.testing.assert_close(logits(engine, "truncated"), exact, rtol=2e-3, atol=2e-3)
    assert (exact - logits(engine, None, None)).abs().max() > 0.1
    fine = [Mix({"math": [1.0, -0.5]}), Mix({"code": {next(iter(engine.layers)): 1.0}}), Mix.base(), Mix.one("code")]
    torch.testing.assert_close(
        logits(engine, "truncated", fine), logits(engine, "factored", fine), rtol=2e-3, atol=2e-3
    )
    ours = engine.generate(PROMPTS, MIXES, max_new_tokens=5, form="truncated")
    assert [one.ids for one in ours] == [one.ids for one in engine.generate(PROMPTS, MIXES, max_new_tokens=5)]


def test_experts_for_prompts_are_truncated_where_they_act(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    engine.bank = {"math": engine.bank["math"], "code": at("prompt", engine.bank["code"])}
    engine.truncation = calibrated(engine, outputs=999, inputs=999).plan(0.0)
    ours = engine.generate(PROMPTS, MIXES, max_new_tokens=5, form="truncated")
    assert [one.ids for one in ours] == [one.ids for one in engine.generate(PROMPTS, MIXES, max_new_tokens=5)]
    assert engine.truncation.facts["tokens"] == calibrated(engine_of(tiny, tiny_tokenizer)).facts["tokens"] - 3 * 4
    engine.bank = {name: at("prompt", one) for name, one in engine.bank.items()}
    assert calibrated(engine).facts["tokens"] == 20 + 30 + 25 + 12 + 9 + 40


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_row_of_the_base_is_the_base_and_any_row_is_the_request_alone(tiny, tiny_tokenizer, arch):
    engine = engine_of(tiny, tiny_tokenizer, arch)
    engine.truncation = calibrated(engine).plan(0.3)
    together = engine.generate(PROMPTS, MIXES, max_new_tokens=5, form="truncated")
    for prompt, mix, one in zip(PROMPTS, MIXES, together, strict=True):
        (alone,) = engine.generate([prompt], mix, max_new_tokens=5, form="truncated")
        assert one.ids == alone.ids
        assert one.logprobs == pytest.approx(alone.logprobs, rel=1e-3, abs=1e-3)
    torch.testing.assert_close(logits(engine, "truncated")[1], logits(engine, None, None)[1], **TOLERANCE)
    base = [Mix.base()] * 4
    assert torch.equal(logits(engine, "truncated", base), logits(engine, None, None))


def test_rows_that_leave_take_their_own_cores_along(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    engine.truncation = calibrated(engine).plan(0.2)
    free = engine.generate(PROMPTS, MIXES, max_new_tokens=8, form="truncated")
    engine.eos_token_ids = [free[0].ids[2], free[2].ids[4]]
    bounded = engine.generate(PROMPTS, MIXES, max_new_tokens=8, form="truncated")
    assert len({len(one.ids) for one in bounded}) > 1
    for long, short in zip(free, bounded, strict=True):
        assert long.ids[: len(short.ids)] == short.ids


def test_a_budget_is_kept_and_a_larger_one_costs_less(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    found = calibrated(engine)
    plans = [found.plan(budget) for budget in (1.0, 0.6, 0.3, 0.1)]
    for plan, budget in zip(plans, (1.0, 0.6, 0.3, 0.1), strict=True):
        assert plan.error <= budget
        assert f"{plan.error:.1%}" in plan.describe()
    assert plans[0].parts == {}
    assert plans[0].cost == 0
    assert [plan.cost for plan in plans] == sorted(plan.cost for plan in plans)
    sizes = {tuple(part.cores.shape[2:]) for part in plans[2].parts.values()}
    assert len(sizes) > 1, "one size for all is no choice"
    exact = logits(engine)
    engine.truncation = plans[0]
    assert torch.equal(logits(engine, "truncated"), logits(engine, None, None))
    errors = []
    for plan in plans:
        engine.truncation = plan
        errors.append(float((logits(engine, "truncated") - exact).square().mean()))
    assert errors[3] < errors[2] < errors[0]


@pytest.mark.skipif(not packing.available(), reason="this torch cannot pack bfloat16 weights on this CPU")
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_packed_and_plain_agree_in_bfloat16_and_the_base_row_is_exact(tiny, tiny_tokenizer, arch):
    fast = engine_of(tiny, tiny_tokenizer, arch, torch.bfloat16)
    plain = engine_of(tiny, tiny_tokenizer, arch, torch.bfloat16, keep_packed=0)
    assert fast.execution.packing.on > plain.execution.packing.on
    fast.truncation = calibrated(fast).plan(0.2)
    plain.truncation = calibrated(plain).plan(0.2)
    ours, theirs = logits(fast, "truncated").float(), logits(plain, "truncated").float()
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
    assert torch.equal(logits(fast, "truncated", [Mix.base()] * 4), logits(fast, None, None))


def test_nothing_is_left_in_the_model(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    exact = logits(engine)
    engine.truncation = calibrated(engine).plan(0.3)
    logits(engine, "truncated")
    with pytest.raises(RuntimeError, match="inside"), engine.under(MIXES, "truncated"):
        raise RuntimeError("inside")
    assert not any("forward" in vars(module) for module in engine.model.modules())
    assert all((p == before[name]).all() for name, p in engine.model.named_parameters())
    assert torch.equal(logits(engine), exact)


def test_another_plan_does_not_go_on_from_what_one_has_read(tiny, tiny_tokenizer):
    """Keys and values of a kept prefix belong to the plan that they were computed under."""
    engine = engine_of(tiny, tiny_tokenizer)
    found = calibrated(engine)
    start = PROMPTS[0][:10]
    for budget in (0.6, 0.1):
        engine.truncation = found.plan(budget)
        kept = next_logits(engine, PROMPTS, MIXES, start=start, form="truncated")
        plain = torch.stack([logits_of(engine, row, mix) for row, mix in zip(PROMPTS, MIXES, strict=True)])
        torch.testing.assert_close(kept, plain, **TOLERANCE)
    exact = next_logits(engine, PROMPTS, MIXES, start=start)
    fresh = engine_of(tiny, tiny_tokenizer)
    torch.testing.assert_close(exact, next_logits(fresh, PROMPTS, MIXES, start=start), **TOLERANCE)


def logits_of(engine, row, mix):
    return engine.logits(torch.tensor([row]), mix=mix, form="truncated")[0, -1]


def test_bad_input(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    with pytest.raises(ConfigError, match="at least one prompt"):
        fit(engine, [], ["math"])
    found = calibrated(engine)
    for budget in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="a share from 0 to 1"):
            found.plan(budget)
    small = calibrated(engine, outputs=2, inputs=2)
    with pytest.raises(ConfigError, match="out of reach"):
        small.plan(0.01)
    engine.truncation = found.plan(0.5)
    engine.bank = {**engine.bank, "third": expert(tiny("llama"), "third", 5)}
    with pytest.raises(ConfigError, match="third"):
        engine.generate(PROMPTS, ["third"] * 4, form="truncated")


def test_the_truncated_form_needs_a_plan(tiny, tiny_tokenizer):
    with pytest.raises(ConfigError, match="sigmix adapt --fit-truncation"):
        logits(engine_of(tiny, tiny_tokenizer), "truncated")


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_saved_plan_computes_the_same(tiny, tiny_tokenizer, arch, tmp_path):
    engine = engine_of(tiny, tiny_tokenizer, arch)
    engine.truncation = calibrated(engine).plan(0.3)
    save_truncation(engine.truncation, engine, tmp_path / "t.safetensors")
    other = engine_of(tiny, tiny_tokenizer, arch)
    other.truncation = load_truncation(other, tmp_path / "t.safetensors")
    assert torch.equal(logits(other, "truncated"), logits(engine, "truncated"))
    assert other.truncation.describe() == engine.truncation.describe()
    assert other.truncation.facts["budget"] == 0.3


def test_files_that_are_no_plan(tiny, tiny_tokenizer, tmp_path):
    engine = engine_of(tiny, tiny_tokenizer)
    path = tmp_path / "t.safetensors"
    with pytest.raises(ExpertError, match="no truncation"):
        load_truncation(engine, path)
    save_truncation(calibrated(engine).plan(0.3), engine, path)
    with pytest.raises(FingerprintError, match="fitted on the base"):
        load_truncation(engine_of(tiny, tiny_tokenizer, "qwen2"), path)
    whole = path.read_bytes()
    for broken in (whole[:100], whole[:-50], b"", whole.replace(b"truncation-1", b"truncation-9")):
        path.write_bytes(broken)
        with pytest.raises(ExpertError, match="cannot be read"):
            load_truncation(engine, path)


def test_inputs_that_are_far_larger_in_one_direction(tiny, tiny_tokenizer):
    """Real models have such; their second moment in float32 is not even positive then."""
    model = tiny("llama", intermediate_size=2048)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[:, 0] += 100.0  # the first hidden unit opens all gates
            layer.mlp.up_proj.weight[:, 0] += 1e4 * torch.randn(2048, generator=torch.Generator().manual_seed(0))
    bank = {name: expert(model, name, seed) for name, seed in (("math", 1), ("code", 2))}
    engine = Engine(model, tiny_tokenizer, bank)
    plan = fit(engine, rows([9, 8], seed=3), ["math", "code"], max_new_tokens=2).plan(0.3)
    assert 0 <= plan.error <= 0.3
    engine.truncation = plan
    assert logits(engine, "truncated").isfinite().all()


def test_a_preferred_truncation_serves_the_experts_that_it_was_fitted_for(tiny, tiny_tokenizer):
    engine = engine_of(tiny, tiny_tokenizer)
    engine.truncation = calibrated(engine).plan(0.3)
    engine.execution.prefer_truncated = True
    engine.bank["late"] = expert(tiny(), "late", 9)
    assert engine.execution.choose([Mix.one("math"), Mix.one("code")]) == "truncated"
    assert engine.execution.choose([Mix.one("math"), Mix.one("late")]) == "factored"
    answers = engine.generate(PROMPTS[:2], ["late", "math"], max_new_tokens=6)
    alone = Engine(tiny(), tiny_tokenizer, dict(engine.bank))
    assert answers[0].ids == alone.generate([PROMPTS[0]], "late", max_new_tokens=6)[0].ids
    assert all(len(one.ids) == 6 for one in answers)
