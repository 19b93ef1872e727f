"""SVF in TRL's trainers: datasets and reward functions of a task, a callback that keeps z valid, and the result sealed.

`SVFConfig` alone is all that TRL needs. The helpers here make its runs comparable with `sigmix train`: identical prompt
ids, identical rewards, and z that `Expert.from_pretrained` accepts; docs/trl.md has an example. TRL computes the KL to
the base by disabling the adapter. The two log-probabilities come from different code paths (factored with z, W x
without), so in bfloat16 the KL of z = 1 is not 0 but of the size of rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from sigmix.engine.tokenization import bare_text, encode, eos_token_ids, reply_ids, turns_of
from sigmix.errors import ConfigError, DataError
from sigmix.models.multimodal import processor_of
from sigmix.svf.tuner import svf_layers
from sigmix.tasks.base import Sample, Split, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

CHAT = {"enable_thinking": False}
"""`chat_template_kwargs` for TRL's configs, with which it formats prompts as sigmix does."""
Reward = Callable[..., list[float | None]]


def prompt_dataset(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return prompts for GRPOTrainer and RLOOTrainer, which encode them to the same ids as `Engine.encode`.

    Prompts are conversations if the tokenizer has a chat template (give the config `CHAT`), else text.

    Returns:
        A `datasets.Dataset` with the columns ``prompt`` and ``sample``, the key of `reward_function`.

    Raises:
        DataError: no samples. ConfigError: samples with images, or a vision-language model for which TRL would format
            the prompts differently.
    """
    from datasets import Dataset

    _check_samples(samples)
    chat = getattr(tokenizer, "chat_template", None) is not None
    write = turns_of if chat else bare_text
    if processor_of(tokenizer) is not None:
        _check_format(tokenizer, samples[0], chat)
    return Dataset.from_list([{"prompt": write(one.turns, one.system), "sample": one.id} for one in samples])


def gold_dataset(
    samples: Sequence[Sample], model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Return encoded prompts with their targets for SFTTrainer; the loss is on the reply and its end token.

    They are encoded here because a chat template may format the prompt of a whole conversation differently from a
    generation prompt.

    Returns:
        A `datasets.Dataset` with the columns ``input_ids`` and ``labels`` (-100 for the prompt), unpadded.

    Raises:
        DataError: no samples. ConfigError: samples with images.
    """
    from datasets import Dataset

    _check_samples(samples)
    ends = eos_token_ids(model, tokenizer)
    rows = []
    for one in samples:
        prompt = encode(tokenizer, one.turns, one.system)
        reply = reply_ids(tokenizer, one.target, ends)
        rows.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    return Dataset.from_list(rows)


def reward_function(task: Task, samples: Sequence[Sample]) -> Reward:
    """Return a task's grader as a TRL reward function: +1 for a correct reply, -1 for a wrong one, as in the paper.

    A reply that cannot be graded gets None, which TRL leaves out of means and advantages.

    Args:
        samples: all samples of the training and evaluation datasets.

    Raises:
        ConfigError: from the function, for a dataset of other samples.
    """
    by_id = {one.id: one for one in samples}

    def reward(completions: Sequence[Any], sample: Sequence[str] | None = None, **_: Any) -> list[float | None]:
        if sample is None or not by_id.keys() >= set(sample):
            problem = "has no column 'sample'" if sample is None else "has samples unknown to the reward function"
            raise ConfigError(
                f"the dataset {problem}", remedy="make both of the same samples: prompt_dataset(samples, tokenizer)"
            )
        # TRL passes messages for conversational prompts, else text
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
        scores = [task.score(by_id[name], text).value for name, text in zip(sample, texts, strict=True)]
        return [None if value is None else 2 * value - 1 for value in scores]

    return reward


class KeepZ(TrainerCallback):
    """Keep z in float32 and at least 0, as an expert requires.

    An optimizer step may make a factor negative, which flips the sign of its component; `Expert.from_pretrained`
    refuses such a file. And TRL casts the trained parameters of a quantized base's adapter to bfloat16, which has no
    number between 1 and 1.0078.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for z in _trained(model):
            z.data = z.data.float()

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for z in _trained(model):
            z.clamp_(min=0.0)


def finish(
    folder: str | os.PathLike[str], base: str | os.PathLike[str], task: Task, *, objective: str,
    dtype: str | torch.dtype | None = None, quantization_config: str | QuantizationConfigMixin | None = None,
    seed: int = 0, n: int = 50, split: Split = "validation", training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a saved adapter and its base on the same items, and seal the adapter with the figures.

    Args:
        folder: of ``trainer.save_model``; its name becomes the expert's. base: see `load_base`.
        objective: "grpo", "rloo", "sft" …, for the metadata. training: other JSON values for it, such as lr.
        dtype, quantization_config: those of the base in training; an expert is bound to its base's exact weights.
        n, split, seed: of the items, see `Task.samples`.

    Returns:
        The figures of `sigmix.evals.accuracy.run`, the base first, and ``expert``: its name.

    Raises:
        ExpertError, FingerprintError: see `Expert.from_pretrained` and `seal`. Others: see `load_base` and `run`.
    """
    from sigmix.engine import Engine
    from sigmix.evals.accuracy import commit, run
    from sigmix.experts.expert import Expert, seal
    from sigmix.experts.mix import Mix
    from sigmix.models.loading import load_base

    folder = Path(folder)
    expert = Expert.from_pretrained(folder)
    model, tokenizer = load_base(base, dtype, quantization_config=quantization_config)
    engine = Engine(model, tokenizer, {expert.name: expert})
    figures, _ = run(engine, task, [Mix.one(expert.name)], split=split, n=n, seed=seed)
    before, after = figures["results"]
    metric = {
        "name": f"{split} accuracy", "value": after["accuracy"], "n": after["n"], "interval": after["interval"],
        "base": before["accuracy"], "base_interval": before["interval"], "p": after["paired"]["p"],
    }  # fmt: skip
    meta = {
        "task": task.name, "domain": task.domain, "objective": objective, "seed": seed, "metrics": [metric],
        "training": {"trainer": "TRL", **(training or {})},
    }  # fmt: skip
    if (revision := commit()) is not None:
        meta["commit"] = revision
    seal(folder, model, meta=meta)
    return {**figures, "expert": expert.name}


def _trained(model: nn.Module) -> list[nn.Parameter]:
    weights = [z.weight for layer in svf_layers(model).values() for z in layer.svf_z.values()]
    return [z for z in weights if isinstance(z, nn.Parameter) and z.requires_grad]


def _check_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise DataError("a dataset needs at least one sample", remedy='for example task.samples("train", 512)')
    if with_image := next((one for one in samples if one.images), None):
        raise ConfigError(
            f"the sample {with_image.prompt[:40]!r} has the image {with_image.images[0].name}, and datasets for TRL "
            "hold text only",
            remedy="train on images with sigmix train",
        )


def _check_format(tokenizer: PreTrainedTokenizerBase, sample: Sample, chat: bool) -> None:
    """Raise unless TRL, which uses the tokenizer, formats a prompt like the engine, which uses the processor."""
    own = encode(tokenizer, sample.turns, sample.system)
    if chat:
        turns = turns_of(sample.turns, sample.system)
        options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True, **CHAT}
        ids = tokenizer.apply_chat_template(turns, **options)["input_ids"]  # type: ignore[arg-type,call-overload,index]
    else:
        ids = tokenizer(bare_text(sample.turns, sample.system))["input_ids"]
    if list(ids) != own:
        raise ConfigError(
            "TRL would format this vision-language model's prompts differently: "
            + ("the tokenizer has another chat template" if chat else "only the processor has a chat template"),
            remedy="train it with sigmix train, or with SFTTrainer on gold_dataset, which is encoded already",
        )
