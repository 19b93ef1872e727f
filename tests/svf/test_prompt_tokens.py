"""Adapters with positions="prompt" in transformers' and PEFT's code, against dense weights with a cache in between."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from helpers_engine import answer_scores as scores
from helpers_engine import dense, expert, rows
from helpers_experts import at
from helpers_svf import IDS, logits, randomise, weights
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch.testing import assert_close

from sigmix.engine import Engine
from sigmix.errors import ConfigError
from sigmix.svf.config import SVFConfig
from sigmix.svf.layer import prompt_only
from sigmix.svf.tuner import svf_layers

STEPS = 6
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}


def adapt(model, spread: float = 0.4, **config):
    model = get_peft_model(model, SVFConfig(positions="prompt", **config)).eval()
    randomise(model, spread=spread)
    return model


def zs(model, *adapters: str) -> dict[str, torch.Tensor]:
    """z = 1 + Σ (z - 1) over adapters."""
    layers = svf_layers(model).items()
    return {p: 1 + sum(layer.svf_z[name].weight.detach() - 1 for name in adapters) for p, layer in layers}


def greedy(read, write, prompt) -> list[int]:
    answer: list[int] = []
    for _ in range(STEPS):
        row = scores(read, write, prompt, [*answer, 0])[-1]
        row[2] = float("-inf")  # the end token, which min_new_tokens excludes
        answer.append(int(row.argmax()))
    return answer


def oracles(model, tiny, arch="llama"):
    """(reads the prompt, writes the answer)."""
    return dense(tiny(arch), zs(model, "default")), tiny(arch)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "mixtral"])
def test_generate_reads_the_prompt_with_z_and_decodes_with_the_base(arch, tiny):
    model = adapt(tiny(arch))
    read, write = oracles(model, tiny, arch)
    expected = [greedy(read, write, row) for row in IDS.tolist()]
    found = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    assert found[:, IDS.shape[1] :].tolist() == expected
    assert expected != [greedy(read, read, row) for row in IDS.tolist()], "z at all positions answers otherwise"
    assert expected != [greedy(write, write, row) for row in IDS.tolist()]
    assert all(layer.prompt_mask is None for layer in svf_layers(model).values())


def test_a_state_of_a_fixed_size_is_a_cache_too(tiny):
    def build():
        torch.manual_seed(0)
        config = transformers.MambaConfig(
            hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=256, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, initializer_range=0.5,
        )  # fmt: skip
        return transformers.MambaForCausalLM(config).eval()

    model = adapt(build())
    read, write = dense(build(), zs(model, "default")), build()
    expected = [greedy(read, write, row) for row in IDS.tolist()]
    assert model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GREEDY)[:, 6:].tolist() == expected
    assert expected != [greedy(read, read, row) for row in IDS.tolist()]


@pytest.mark.parametrize("kind", ["causal", "plain", "injected"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 2},
     {"cache_implementation": "static"}],
    ids=lambda one: next(iter(one), "cache"),
)  # fmt: skip
def test_every_way_of_greedy_decoding_gives_the_same_answer(options, kind, tiny):
    prompt = [5, 9, 33, 9, 33, 71, 9]
    if kind == "injected":
        model = inject_adapter_in_model(SVFConfig(positions="prompt"), tiny(), "default")
        randomise(model, spread=0.4)
    else:
        model = adapt(tiny(), task_type="CAUSAL_LM" if kind == "causal" else None)
    found = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, 7).long(), **GREEDY, **options
    )
    assert found[0, 7:].tolist() == greedy(*oracles(model, tiny), prompt)


def test_left_padding_and_the_ways_of_giving_a_prompt(tiny):
    model = adapt(tiny(), task_type="CAUSAL_LM")
    read, write = oracles(model, tiny)
    rows = [[5, 9, 33], [77, 3, 250, 14, 14]]
    expected = [greedy(read, write, row) for row in rows]
    ids = torch.tensor([[0, 0, *rows[0]], rows[1]])
    mask = (torch.arange(5) >= torch.tensor([[2], [0]])).long()
    assert model.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, 5:].tolist() == expected
    assert model.generate(ids, attention_mask=mask, **GREEDY)[:, 5:].tolist() == expected
    embeds = model.get_input_embeddings()(ids).detach()
    assert model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY).tolist() == expected
    one = model.generate(input_ids=torch.tensor([[5]]), **GREEDY)
    assert one[0, 1:].tolist() == greedy(read, write, [5])
    begin = model.generate(**{**GREEDY, "bos_token_id": 1})
    assert begin[0, 1:].tolist() == greedy(read, write, [1])


def test_a_prompt_behind_a_given_cache(tiny):
    model = adapt(tiny(), task_type="CAUSAL_LM")
    row = IDS[:1]
    with torch.no_grad():
        cache = model(input_ids=row[:, :4], use_cache=True).past_key_values
    found = model.generate(input_ids=row, attention_mask=torch.ones_like(row), past_key_values=cache, **GREEDY)
    assert found[0, 6:].tolist() == greedy(*oracles(model, tiny), row[0].tolist())


def test_samples_and_beams_have_the_scores_of_decoding(tiny):
    model = adapt(tiny())
    read, write = oracles(model, tiny)
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "return_dict_in_generate": True}
    torch.manual_seed(0)
    sampled = model.generate(
        **given, max_new_tokens=4, do_sample=True, num_return_sequences=3, output_logits=True, eos_token_id=None
    )
    found = torch.stack(sampled.logits, 1).log_softmax(-1)
    for row, sequence in enumerate(sampled.sequences.tolist()):
        assert_close(found[row], scores(read, write, sequence[:6], sequence[6:]), rtol=1e-4, atol=1e-4)
    beams = model.generate(
        **given, max_new_tokens=4, do_sample=False, num_beams=3, num_return_sequences=3, eos_token_id=None,
        length_penalty=0.0, output_scores=True,
    )  # fmt: skip
    for value, sequence in zip(beams.sequences_scores.tolist(), beams.sequences.tolist(), strict=True):
        rows = scores(read, write, sequence[:6], sequence[6:])
        assert value == pytest.approx(float(rows.gather(1, torch.tensor(sequence[6:])[:, None]).sum()), abs=1e-3)


def labelled(prompt: int = 4) -> torch.Tensor:
    labels = IDS.clone()
    labels[:, :prompt] = -100
    return labels


def test_a_pass_with_labels_has_the_scores_of_decoding(tiny):
    model = adapt(tiny())
    read, write = oracles(model, tiny)
    ragged = labelled()
    ragged[1, 4] = -100  # a prompt of five tokens
    ragged[2] = -100  # a prompt alone
    found = logits(model, IDS, labels=ragged).log_softmax(-1)
    for row, length in ((0, 4), (1, 5), (2, 6)):
        ids = IDS[row].tolist()
        expected = scores(read, write, ids[:length], [*ids[length:], 0])
        assert_close(found[row, length - 1 :], expected, rtol=1e-4, atol=1e-4)
    positional = model(IDS, torch.ones_like(IDS), labels=ragged).logits.log_softmax(-1)
    assert torch.equal(positional[:, 3:], found[:, 3:])


def test_padding_is_no_part_of_a_prompt_or_an_answer(tiny):
    model = adapt(tiny())
    read, write = oracles(model, tiny)
    ids = torch.tensor([[0, 0, 5, 9, 33, 71], [77, 3, 250, 14, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, -100, 33, 71], [-100, -100, -100, 14, -100, -100]])
    found = logits(model, ids, attention_mask=mask, labels=labels, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    found = found.log_softmax(-1)
    assert_close(found[0, 3:], scores(read, write, [5, 9], [33, 71, 0]), rtol=1e-4, atol=1e-4)
    assert_close(found[1, 2:4], scores(read, write, [77, 3, 250], [14, 0]), rtol=1e-4, atol=1e-4)


def test_passes_without_labels(tiny):
    model = adapt(tiny())
    read, write = oracles(model, tiny)
    assert_close(logits(model, IDS), logits(read, IDS), rtol=1e-4, atol=1e-4)  # all tokens are the prompt
    with torch.no_grad():
        cache = model(input_ids=IDS[:1, :4], use_cache=True).past_key_values
        found = model(input_ids=IDS[:1, 4:], past_key_values=cache).logits[0].log_softmax(-1)
    expected = scores(read, write, IDS[0, :4].tolist(), [*IDS[0, 4:].tolist(), 0])[1:]
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with prompt_only(svf_layers(model), torch.arange(6).expand(3, 6) < 4):
        assert_close(logits(model, IDS)[:, 3:], logits(model, IDS, labels=labelled())[:, 3:])


def gradients(model, *passes) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(one() for one in passes).backward()
    return {path: layer.svf_z["default"].weight.grad.clone() for path, layer in svf_layers(model).items()}


def test_gradients_flow_through_keys_and_values(tiny):
    model = adapt(tiny()).double()
    labels = labelled()

    def two_passes():
        first = model(input_ids=IDS[:, :4], use_cache=True)
        with prompt_only(svf_layers(model), False):
            rest = model(input_ids=IDS[:, 4:5], past_key_values=first.past_key_values)
        rows = torch.cat([first.logits[:, -1:], rest.logits], 1).log_softmax(-1)
        return -rows.gather(2, IDS[:, 4:, None]).mean()

    found = gradients(model, lambda: model(input_ids=IDS, labels=labels).loss)
    expected = gradients(model, two_passes)
    assert all(float(grad.abs().max()) > 1e-6 for path, grad in found.items() if "v_proj" in path)
    for path, grad in found.items():
        assert_close(grad, expected[path], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_each_pass_under_its_own_mask(reentrant, tiny):
    model = adapt(tiny()).train()
    model.enable_input_require_grads()
    passes = [
        lambda: model(input_ids=IDS, labels=labelled(4), use_cache=False).loss,
        lambda: model(input_ids=IDS, labels=labelled(2), use_cache=False).loss,
    ]
    plain = gradients(model, *passes)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, *passes)
    assert all(torch.equal(grad, plain[path]) for path, grad in found.items())
    model.gradient_checkpointing_disable()


def test_adapters_of_both_kinds_add_on_prompts_and_only_one_acts_on_answers(tiny):
    model = adapt(tiny(), task_type="CAUSAL_LM")
    model.add_adapter("every", SVFConfig(positions="all"))
    randomise(model, "every", 2, 0.4)
    model.base_model.set_adapter(["default", "every"])
    read, write = dense(tiny(), zs(model, "default", "every")), dense(tiny(), zs(model, "every"))
    mask = torch.ones_like(IDS)
    found = model.generate(input_ids=IDS, attention_mask=mask, **GREEDY)[:, 6:].tolist()
    assert found == [greedy(read, write, row) for row in IDS.tolist()]
    assert_close(
        logits(model, IDS, labels=labelled())[0, 3:].log_softmax(-1),
        scores(read, write, IDS[0, :4].tolist(), [*IDS[0, 4:].tolist(), 0]), rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    names = ["default", "every", "__base__"]
    rows = model.generate(input_ids=IDS, attention_mask=mask, adapter_names=names, **GREEDY)[:, 6:].tolist()
    alone = [(dense(tiny(), zs(model, "default")), tiny()), (write, write), (tiny(), tiny())]
    assert rows == [greedy(*pair, row) for pair, row in zip(alone, IDS.tolist(), strict=True)]
    model.set_adapter("every")
    found = model.generate(input_ids=IDS, attention_mask=mask, **GREEDY)[:, 6:].tolist()
    assert found == [greedy(write, write, row) for row in IDS.tolist()]


def test_save_load_and_copy(tiny, tmp_path):
    model = adapt(tiny(), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    expected = model.generate(input_ids=IDS, **GREEDY)
    assert PeftConfig.from_pretrained(tmp_path).positions == "prompt"
    assert torch.equal(loaded.generate(input_ids=IDS, **GREEDY), expected)
    other = copy.deepcopy(model)
    randomise(model, seed=5, spread=0.4)
    assert torch.equal(other.generate(input_ids=IDS, **GREEDY), expected)
    assert not torch.equal(model.generate(input_ids=IDS, **GREEDY), expected)


def test_merging_is_refused_and_unloading_gives_the_base_back(tiny):
    model = adapt(tiny(), task_type="CAUSAL_LM")
    model.add_adapter("every", SVFConfig(target_modules="attention"))
    before = weights(model)
    for merge in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: model.merge_adapter(["every", "default"]),
        lambda: model.merge_and_unload(adapter_names=["default"]),
    ):
        with pytest.raises(ConfigError, match=r"'default' has positions 'prompt'.*Engine.*positions='all'"):
            merge()
    after = weights(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    model.merge_adapter(["every"])
    model.unmerge_adapter()
    base = model.unload()
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert torch.equal(base.generate(input_ids=IDS, **GREEDY), tiny().generate(input_ids=IDS, **GREEDY))


def test_weighted_adapters_keep_the_positions_and_have_one_kind(tiny):
    model = adapt(tiny())
    for name, positions in (("second", "prompt"), ("every", "all")):
        model.add_adapter(name, SVFConfig(positions=positions))
        randomise(model, name, 3)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    assert model.peft_config["both"].positions == "prompt"
    assert {layer.positions["both"] for layer in svf_layers(model).values()} == {"prompt"}
    with pytest.raises(ConfigError, match=r"default has prompt, every has all.*set_adapter"):
        model.add_weighted_adapter(["default", "every"], [0.5, 0.5], "mixed")
    assert "mixed" not in model.peft_config


@pytest.mark.parametrize("odd", ["promt", "Prompt", "", None, 1, ["prompt"], True])
def test_odd_positions_are_named(odd, tmp_path):
    with pytest.raises(ConfigError, match=r"'all' or 'prompt', not"):
        SVFConfig(positions=odd)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SVF", "positions": odd}))
    with pytest.raises(ConfigError, match=r"'all' or 'prompt', not"):
        PeftConfig.from_pretrained(tmp_path)


def test_passes_that_cannot_be_divided_are_refused(tiny):
    model = adapt(tiny())
    with pytest.raises(ConfigError, match="first token.*-100"):
        model(input_ids=IDS, labels=IDS)
    padded = torch.tensor([[0, 0, 1, 1, 1, 1]] * 3)
    with pytest.raises(ConfigError, match="first token"):
        model(input_ids=IDS, attention_mask=padded, labels=labelled(2))
    turns = labelled(2)
    turns[0, 4] = -100
    with pytest.raises(ConfigError, match="gaps.*turn"):
        model(input_ids=IDS, labels=turns)
    with pytest.raises(ConfigError, match="packed"):
        model(input_ids=IDS, labels=labelled(), cu_seq_lens_q=torch.tensor([0, 6]))
    with pytest.raises(ConfigError, match="paged"):  # transformers' continuous batching
        model.generate_batch(IDS.tolist(), generation_config=model.generation_config)
    model.train()
    with pytest.raises(ConfigError, match="labels"):
        model(input_ids=IDS)
    with torch.no_grad():
        model(input_ids=IDS)
    assert all(layer.prompt_mask is None for layer in svf_layers(model).values())
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    encoder = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(ConfigError, match="encoder"):
        get_peft_model(encoder, SVFConfig(positions="prompt"))
    get_peft_model(encoder, SVFConfig())


def test_an_engine_on_the_model_reads_by_its_own_rules(tiny, tiny_tokenizer):
    """Prefixes that rows share, chunks of prompts and answers behind a cache, under mixtures of both kinds."""
    bank = {name: expert(tiny(), name, seed) for seed, name in enumerate(("math", "word"), 1)}
    bank["word"] = at("prompt", bank["word"])
    prompts, mixes = rows([30, 40, 35, 12], shared=10), ["math", "word", "math:0.5+word:0.5", "base"]
    engines = [Engine(model, tiny_tokenizer, bank) for model in (tiny(), adapt(tiny(), task_type="CAUSAL_LM"))]
    first, second = (engine.generate(prompts, mixes, max_new_tokens=6) for engine in engines)
    assert [one.ids for one in first] == [one.ids for one in second]
    same = [engine.generate(prompts, "word", max_new_tokens=6) for engine in engines]
    assert [one.ids for one in same[0]] == [one.ids for one in same[1]]
    answers = [one.ids for one in first]
    assert_close(*(torch.tensor(engine.score(prompts, answers, mixes)) for engine in engines), rtol=1e-4, atol=1e-4)
    streams = ["".join(engine.stream(prompts[0], "word", max_new_tokens=6)) for engine in engines]
    assert streams[0] == streams[1]
