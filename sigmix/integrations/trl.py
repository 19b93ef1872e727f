"""SVF in TRL's trainers: a task's prompts and verifier as TRL takes them, z kept an expert's, the result sealed.

    task = get_task("addition")
    samples = task.samples("train", 512)
    trainer = GRPOTrainer(
        model, reward_function(task, samples), GRPOConfig("runs/mine", beta=0.05, chat_template_kwargs=CHAT),
        train_dataset=prompt_dataset(samples, tokenizer), processing_class=tokenizer,
        peft_config=SVFConfig(), callbacks=[KeepZ()],
    )

`SVFConfig` alone is all that TRL needs. The helpers here make its runs comparable with `sigmix train`: identical prompt
ids, identical rewards, and z that `Expert.from_pretrained` accepts. TRL computes the KL to the base by disabling the
adapter. The two log-probabilities come from different code paths (factored with z, W x without), so in bfloat16 the KL
of z = 1 is not 0 but of the size of rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from sigmix.engine.tokenization import bare_text, encode, end_ids, reply_ids, turns_of
from sigmix.errors import ConfigError, DataError
from sigmix.models.multimodal import processor_of
from sigmix.svf.tuner import svf_layers
from sigmix.tasks.base import Sample, Split, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers.utils.quantization_config import QuantizationConfigMixin


CHAT = {"enable_thinking": False}
"""`chat_template_kwargs` of TRL's configs with which it writes prompts as sigmix does."""


Reward = Callable[..., list[float | None]]


def prompt_dataset(samples: Sequence[Sample], tokenizer: Any) -> Dataset:
    """Prompts for GRPOTrainer and RLOOTrainer, which encode them to the very ids that `Engine.encode` gives.

    Args:
        samples: of a task. tokenizer: messages where it has a chat template (give the config `CHAT`), else text.

    Returns:
        A `datasets.Dataset` with the columns ``prompt`` and ``sample``, the id by which `reward_function` finds it.

    Raises:
        DataError: no samples. ConfigError: they show images, or belong to a vision-language model whose prompts TRL
            would write otherwise, without their text.
    """
    from datasets import Dataset

    _check(samples)
    chat = getattr(tokenizer, "chat_template", None) is not None
    write = turns_of if chat else bare_text
    if processor_of(tokenizer) is not None:
        _check_written(tokenizer, samples[0], chat)
    return Dataset.from_list([{"prompt": write(one.prompt, one.system), "sample": one.id} for one in samples])


def gold_dataset(samples: Sequence[Sample], model: Any, tokenizer: Any) -> Dataset:
    """Prompts with their gold replies for SFTTrainer; the loss is on the reply and the token that ends it.

    They are encoded here: written by the chat template as a conversation, a prompt can differ from the one that asks
    for a reply.

    Args:
        model: whose end token closes a reply.

    Returns:
        A `datasets.Dataset` with the columns ``input_ids`` and ``labels`` (-100 for the prompt), unpadded.

    Raises:
        DataError: no samples. ConfigError: they show images.
    """
    from datasets import Dataset

    _check(samples)
    ends = end_ids(model, tokenizer)
    rows = []
    for one in samples:
        prompt = encode(tokenizer, one.prompt, one.system)
        reply = reply_ids(tokenizer, one.gold, ends)
        rows.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    return Dataset.from_list(rows)


def reward_function(task: Task, samples: Sequence[Sample]) -> Reward:
    """A task's verifier as a reward function of TRL's: +1 for a right reply, -1 for a wrong one, as in the paper.

    A reply that cannot be judged gets None, which TRL leaves out of means and advantages.

    Args:
        samples: all that ``prompt_dataset`` was made of, those for evaluation too.

    Raises:
        ConfigError: from the function, for a row of a dataset that was not made of these samples.
    """
    known = {one.id: one for one in samples}

    def reward(completions: Sequence[Any], sample: Sequence[str] | None = None, **_: Any) -> list[float | None]:
        if sample is None or not known.keys() >= set(sample):
            lost = "has no column 'sample'" if sample is None else "has samples that the reward function was not given"
            raise ConfigError(
                f"the data set {lost}", remedy="make both of the same samples: prompt_dataset(samples, tokenizer)"
            )
        scores = [task.score(known[name], _text(reply)).value for name, reply in zip(sample, completions, strict=True)]
        return [None if value is None else 2 * value - 1 for value in scores]

    return reward


class KeepZ(TrainerCallback):
    """Keeps z what an expert's must be: float32, and never below 0.

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
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str],
    task: Task,
    *,
    objective: str,
    dtype: str | torch.dtype | None = None,
    quantization_config: str | QuantizationConfigMixin | None = None,
    seed: int = 0,
    n: int = 50,
    split: Split = "validation",
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure what a trainer saved against its base on the same items, and seal it with the figures.

    Args:
        folder: where ``trainer.save_model`` wrote; its name becomes the expert's. base: as `load_base` takes it.
        objective: "grpo", "rloo", "sft" …, for the expert's metadata. training: other JSON values, such as lr.
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
    if (made := commit()) is not None:
        meta["commit"] = made
    seal(folder, model, meta=meta)
    return {**figures, "expert": expert.name}


def _text(completion: Any) -> str:
    # TRL gives the messages of a turn where prompts are messages, and text where they are text
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _trained(model: Any) -> list[torch.nn.Parameter]:
    every = [z.weight for layer in svf_layers(model).values() for z in layer.svf_z.values()]
    return [z for z in every if isinstance(z, torch.nn.Parameter) and z.requires_grad]


def _check(samples: Sequence[Sample]) -> None:
    if not samples:
        raise DataError("a data set needs at least one sample", remedy='for example task.samples("train", 512)')
    if shown := next((one for one in samples if one.images), None):
        raise ConfigError(
            f"the sample {shown.prompt[:40]!r} shows {shown.images[0].name}, and a data set for TRL holds text only",
            remedy="train on images with sigmix train",
        )


def _check_written(tokenizer: Any, sample: Sample, chat: bool) -> None:
    """Raise unless TRL, which asks the tokenizer, writes a prompt as the engine, which asks the processor."""
    if chat:
        turns = turns_of(sample.prompt, sample.system)
        made = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, **CHAT)["input_ids"]
    else:
        made = tokenizer(bare_text(sample.prompt, sample.system))["input_ids"]
    if list(made) != encode(tokenizer, sample.prompt, sample.system):
        raise ConfigError(
            "TRL would write this vision-language model's prompts otherwise than its processor does, or without text: "
            + ("the tokenizer's chat template is another" if chat else "only the processor has a chat template"),
            remedy="train it with sigmix train, or with SFTTrainer on gold_dataset, which is encoded already",
        )
