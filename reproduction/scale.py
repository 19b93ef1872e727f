"""Kinds of adapters that are compared, and scales of a reproduction.

A scale names tasks, sizes and seeds; the stages are the same for all. `laptop` takes two cores and the embedded model,
`positions` the same for a study of its own, `positions-float32` parts of that in float32, `positions-mixtures` its
mixtures, `half-billion` the paper's own benchmarks on two cores, `gpu` those with the paper's preset, `smoke` a tiny
model, to test the program and not the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from reproduction.tiny import TINY
from sigmix.errors import UnknownNameError


@dataclass(frozen=True)
class Kind:
    """One way to train an adapter.

    Attributes:
        label: for tables. options: fields of `TrainConfig`. lrs: ascending learning rates that the sweep begins with;
            it goes on beyond an end that wins. sweep: tasks of the sweep; default: the scale's.
        like: a kind whose sweep stands for this one's: its best rate is taken, or, with match, the one whose KL to the
            base is nearest to what the kind ``match`` has at its best.
        tasks: that it is trained on in Table 1, besides those of the sweep; default: the scale's.
        answer_tokens, both, l1: see `reproduction.variants`.
    """

    label: str
    options: Mapping[str, Any]
    lrs: tuple[float, ...] = ()
    sweep: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    like: str | None = None
    match: str | None = None
    answer_tokens: int = 0
    both: bool = False
    l1: float = 0.0

    @property
    def varied(self) -> bool:
        """True if its training is one of `reproduction.variants`."""
        return bool(self.answer_tokens or self.both or self.l1)

    @property
    def positions(self) -> str:
        """Tokens on which z acts, see `SVFConfig`."""
        return str(self.options.get("positions", "all"))

    @property
    def policy(self) -> str:
        """svf, lora or ia3."""
        return str(self.options.get("policy", "svf"))


QV = ["q_proj", "v_proj"]

ANSWERS = 64
"""Answers of a step, where neither preset nor scale says otherwise; next token has fewer in `sigmix train`."""

LORA = {"policy": "lora", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}

GOLD = {"objective": "sft", "num_generations": 1, "beta": 0.0}

SVF_LRS, LORA_LRS = (6e-4, 2e-3, 6e-3), (3e-4, 1e-3, 3e-3)

KINDS: dict[str, Kind] = {
    "svf-rl": Kind("SVF, policy gradient", {}, SVF_LRS),
    "svf-sft": Kind("SVF, next token", GOLD, SVF_LRS),
    "lora-rl": Kind("LoRA 16 on all, policy gradient", LORA, LORA_LRS),
    "lora-sft": Kind("LoRA 16 on all, next token", {**LORA, **GOLD}, LORA_LRS),
    "lora-qv-rl": Kind("LoRA 16 on q and v, policy gradient", {**LORA, "target_modules": QV}, LORA_LRS),
    "lora-qv-sft": Kind("LoRA 16 on q and v, next token", {**LORA, **GOLD, "target_modules": QV}, LORA_LRS),
    # as many numbers as SVF has on the default model: 115,200 against 97,920
    "lora-small-rl": Kind(
        "LoRA 2 on q and v, policy gradient",
        {**LORA, "lora_r": 2, "lora_alpha": 4, "target_modules": QV},
        (1e-3, 3e-3, 1e-2),
    ),
    "lora-kl-rl": Kind("LoRA 16 on all, at SVF's KL", LORA, like="lora-rl", match="svf-rl"),
    "svf-qv-rl": Kind("SVF on q and v, policy gradient", {"target_modules": QV}, like="svf-rl"),
    "svf-mlp-rl": Kind("SVF on the MLP, policy gradient", {"target_modules": "mlp"}, like="svf-rl"),
    "svf-none": Kind("no baseline", {"baseline": "none"}, like="svf-rl"),
    "svf-mean": Kind("mean of the batch", {"baseline": "mean"}, like="svf-rl"),
    "svf-k3": Kind("leave-one-out, k3", {"kl_estimator": "k3"}, like="svf-rl"),
    "svf-reference": Kind("reference's sigmoid", {"parametrization": "reference"}, (6e-3, 2e-2, 6e-2)),
}  # fmt: skip


PROMPT = {"positions": "prompt"}

MATRICES: dict[str, Any] = {
    "down": ["down_proj"], "gate-up": ["gate_proj", "up_proj"], "o": ["o_proj"], "kv": ["k_proj", "v_proj"],
    "attention": "attention",
}  # fmt: skip

L1 = (0.1, 0.3, 0.6)
"""Strengths of the penalty on |z - 1|, in learning rates a step."""

WHERE: dict[str, Mapping[str, Any]] = {"svf": {}, "svf-prompt": PROMPT}

POSITION_KINDS: dict[str, Kind] = {
    # the best rate for larger alone is far too high for addition
    "svf-rl": Kind("all tokens", {}, SVF_LRS, ("addition", "larger")),
    "svf-prompt-rl": Kind("prompt", PROMPT, SVF_LRS, ("addition", "larger")),
    "svf-sft": Kind("all tokens", GOLD, SVF_LRS),
    "svf-prompt-sft": Kind("prompt", {**PROMPT, **GOLD}, SVF_LRS),
    "svf-prompt-1-rl": Kind("prompt and 1 answer token", PROMPT, like="svf-prompt-rl", answer_tokens=1),
    "svf-prompt-4-rl": Kind("prompt and 4 answer tokens", PROMPT, like="svf-prompt-rl", answer_tokens=4),
    "svf-both-rl": Kind("half of the answers each way", PROMPT, like="svf-prompt-rl", both=True),
    **{
        f"{name}-{part}-rl": Kind(part, {**where, "target_modules": modules}, like=f"{name}-rl")
        for name, where in WHERE.items()
        for part, modules in MATRICES.items()
    },
    **{
        f"{name}-l1-{strength:g}-rl": Kind(f"L1 {strength:g}", where, like=f"{name}-rl", l1=strength)
        for name, where in WHERE.items()
        for strength in L1
    },
}
"""Kinds of the study of positions."""

SMOKE_VARIANTS = (
    "svf-prompt-rl", "svf-prompt-sft", "svf-prompt-4-rl", "svf-both-rl", "svf-prompt-down-rl", "svf-prompt-l1-0.3-rl",
)  # fmt: skip

CHOSEN_KINDS: dict[str, Kind] = {
    "svf-rl": replace(POSITION_KINDS["svf-rl"], lrs=(2e-3,)),
    "svf-prompt-rl": replace(POSITION_KINDS["svf-prompt-rl"], lrs=(6e-3,)),
}
"""Both positions at the rates that the study's sweeps chose."""

FLOAT32_KINDS: dict[str, Kind] = {
    **CHOSEN_KINDS,
    **{
        name: POSITION_KINDS[name]
        for name in ("svf-o-rl", "svf-kv-rl", "svf-attention-rl", *(f"svf-l1-{strength:g}-rl" for strength in L1))
    },
}
"""Kinds of the study of positions that are run in float32."""

PAPER_STAGES = (
    "sweep", "table1", "composition", "merging", "table4", "table2", "dispatch", "fewshot", "transfer", "continual",
    "ablations", "spectra", "larger", "speed",
)  # fmt: skip

POSITION_STAGES = ("positions", "snips", "position-variants", "position-mixtures", "gsm8k")


@dataclass(frozen=True)
class Scale:
    """Size of a reproduction.

    Attributes:
        base: of `load_base`; dtype: None is the faster one on the machine.
        tasks: those that experts are trained on with every seed. extra: more experts, of the first seed.
        conflict: two of the tasks that ask nearly the same for opposite answers, if there are such.
        peer: the kind that SVF by policy gradient is compared with, with every seed. pairs: mix all pairs of experts.
        sweep: the task on which learning rates are chosen, by validation. unseen: tasks that nothing is trained on.
        seeds: of training. n: test items a cell; items: other numbers, by task. validation: items that choose α.
        training: fields of `TrainConfig` for every run. preset: its preset.
        classifier_steps: of the training of strategy B's expert. per_label: test requests a kind for its confusion.
        examples: task whose training and validation items stand for those of an unseen task that has none.
        shots: of the few-shot tables. search: overrides of the few-shot searches, for the smoke test.
        few_shot: the unseen task of the few-shot tables. ia3_steps: of IA3's training on the same examples.
        larger: base of the larger model, if there is one. larger_training: what its runs do otherwise.
        batch: test items answered at once.
        stages: that the scale has, in order.
    """

    name: str
    base: str
    tasks: tuple[str, ...]
    extra: tuple[str, ...]
    sweep: str
    unseen: tuple[str, ...]
    conflict: tuple[str, str] | None
    few_shot: str
    seeds: tuple[int, ...] = (0, 1, 2)
    dtype: str | None = None
    n: int = 500
    items: Mapping[str, int] = field(default_factory=dict)
    peer: str = "lora-rl"
    pairs: bool = False
    validation: int = 48
    preset: str = "laptop"
    training: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=lambda: KINDS)
    classifier_steps: int = 40
    per_label: int = 60
    examples: Mapping[str, str] = field(default_factory=lambda: {"humaneval": "mbpp"})
    shots: tuple[int, ...] = (3, 5, 10, 20)
    search: Mapping[str, Any] = field(default_factory=dict)
    ia3_steps: int = 100
    larger: str | None = None
    larger_training: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 128
    stages: tuple[str, ...] = PAPER_STAGES

    @property
    def compared(self) -> tuple[str, str]:
        """The two kinds that are trained with every seed."""
        return "svf-rl", self.peer


# one question of ours: must z act on the answer's tokens, too? Tasks, training and items are laptop's
POSITIONS = Scale(
    name="positions",
    base="smollm2-135m",
    tasks=("addition", "larger", "date-iso", "where-is"),
    extra=("smallest-of-three", "who-has"),
    sweep="larger",
    unseen=(),
    conflict=None,
    few_shot="",
    training={"max_steps": 24, "eval_steps": 8, "lr_scheduler_type": "constant"},
    # one prompt's answers a pass: activations of 32 answers of 400 tokens do not fit into 24 GB
    larger_training={
        "max_steps": 20,
        "eval_steps": 10,
        "generation_batch_size": 32,
        "max_eval_samples": 64,
        "per_device_train_batch_size": 4,
    },
    kinds=POSITION_KINDS,
    stages=("sweep", "positions", "snips", "position-variants", "gsm8k"),
)


SCALES: dict[str, Scale] = {
    "laptop": Scale(
        name="laptop",
        base="smollm2-135m",
        tasks=("addition", "larger", "date-iso"),
        extra=("smallest-of-three", "where-is", "who-has"),
        sweep="larger",
        unseen=("subtraction", "time-24h", "sort-numbers"),
        conflict=("larger", "smallest-of-three"),
        few_shot="time-24h",
        # some tasks find their form first and their answers late; a cosine over so few steps ends before that
        training={"max_steps": 24, "eval_steps": 8, "lr_scheduler_type": "constant"},
        larger_training={"generation_batch_size": 32},
    ),
    "positions": POSITIONS,
    # what of that study ran on a CPU without bfloat16, with experts of its own
    "positions-float32": replace(
        POSITIONS,
        name="positions-float32",
        dtype="float32",
        kinds=FLOAT32_KINDS,
        stages=("position-variants",),
    ),
    # with experts of its own, since those of the study are not kept
    "positions-mixtures": replace(
        POSITIONS, name="positions-mixtures", kinds=CHOSEN_KINDS, stages=("position-mixtures",)
    ),
    # the paper's tasks on two cores: one run of each kind, LoRA by next token but for one task
    "half-billion": Scale(
        name="half-billion",
        base="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        tasks=("gsm8k", "mbpp", "arc-easy"),
        extra=(),
        sweep="arc-easy",
        unseen=("humaneval", "arc-challenge", "svamp"),
        conflict=None,
        few_shot="arc-challenge",
        seeds=(0,),
        items={"arc-easy": 1000, "arc-challenge": 1172, "svamp": 1000},
        peer="lora-sft",
        pairs=True,
        training={
            "max_steps": 24,
            "eval_steps": 8,
            "lr_scheduler_type": "constant",
            "generation_batch_size": 32,
            "per_device_train_batch_size": 4,
            "max_eval_samples": 64,
        },
        kinds={
            "svf-rl": KINDS["svf-rl"],
            "lora-sft": KINDS["lora-sft"],
            "lora-rl": replace(KINDS["lora-rl"], tasks=("gsm8k",)),
        },
        stages=("sweep", "table1", "table2", "dispatch", "composition", "transfer"),
    ),
    # the paper's tasks; of its preset, steps, clip and baseline are ours, to fit a GPU's hours; any base by --base
    "gpu": Scale(
        name="gpu",
        base="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        tasks=("gsm8k", "mbpp", "arc-easy"),
        extra=("boolq", "openbookqa"),
        sweep="arc-easy",
        unseen=("humaneval", "arc-challenge", "svamp"),
        conflict=None,
        few_shot="arc-challenge",
        preset="paper",
        training={
            "max_steps": 60,
            "eval_steps": 20,
            "max_grad_norm": 1.0,
            "num_generations": 4,
            "baseline": "leave-one-out",
        },
        n=2000,
        validation=200,
    ),
    "smoke": Scale(
        name="smoke",
        base=TINY,
        tasks=("addition", "larger"),
        extra=("smallest-of-three",),
        sweep="larger",
        unseen=("subtraction", "sort-numbers"),
        conflict=("larger", "smallest-of-three"),
        few_shot="sort-numbers",
        seeds=(0, 1),
        n=6,
        validation=3,
        training={
            "max_steps": 1,
            "eval_steps": 1,
            "generation_batch_size": 4,
            "max_eval_samples": 3,
            "max_new_tokens": 3,
        },
        shots=(3, 10),
        search={"population": 4, "iterations": 1},
        classifier_steps=1,
        per_label=2,
        ia3_steps=1,
        larger=TINY,
        kinds={
            name: replace(kind, lrs=kind.lrs[1:2])
            for name, kind in {**POSITION_KINDS, **KINDS}.items()
            if name in (*KINDS, *SMOKE_VARIANTS)
        },
        stages=(*PAPER_STAGES, *POSITION_STAGES),
    ),
}


def get_scale(name: str) -> Scale:
    """A scale by its name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in SCALES:
        raise UnknownNameError("scale", name, SCALES)
    return SCALES[name]
