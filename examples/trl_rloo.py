"""Train an expert with TRL's RLOOTrainer on a sigmix task, seal it, and measure it against its base.

    python examples/trl_rloo.py --task larger --max-steps 30 --out my-experts/larger-rloo
    sigmix chat --bank my-experts --mix larger-rloo

Needs `pip install "sigmix[trl,tasks]"`. RLOO's baseline is the mean reward of the prompt's other completions.
"""

from __future__ import annotations

import argparse

from trl import RLOOConfig, RLOOTrainer

from sigmix import SVFConfig, load_base
from sigmix.experts.serialization import check_free
from sigmix.integrations.trl import CHAT, KeepZ, finish, prompt_dataset, reward_function
from sigmix.tasks.registry import get_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="name, hub name, folder or .gguf file")
    parser.add_argument("--task", default="addition", help="`sigmix tasks` lists them")
    parser.add_argument("--out", default="my-experts/rloo", help="the expert's folder")
    parser.add_argument("--max-steps", type=int, default=30)
    parser.add_argument("--per-device-train-batch-size", type=int, default=16, help="a multiple of --num-generations")
    parser.add_argument("--num-generations", type=int, default=4, help="completions per prompt")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--beta", type=float, default=0.05, help="KL coefficient")
    parser.add_argument("--max-train-samples", type=int, default=512, help="training prompts")
    parser.add_argument("--max-eval-samples", type=int, default=50, help="validation items")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    names = ("max_steps", "per_device_train_batch_size", "num_generations", "learning_rate", "beta", "seed")
    options = {name: getattr(args, name) for name in names}
    check_free(args.out)  # fail before training
    task = get_task(args.task)
    samples = task.samples("train", args.max_train_samples, seed=args.seed)
    model, tokenizer = load_base(args.base)
    trainer = RLOOTrainer(
        model,
        reward_funcs=reward_function(task, samples),
        args=RLOOConfig(
            output_dir=f"{args.out}.run",
            **options,
            max_completion_length=task.max_new_tokens,
            bf16=False,  # no autocast: compute in the base's dtype
            chat_template_kwargs=CHAT,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=prompt_dataset(samples, tokenizer),
        processing_class=tokenizer,
        peft_config=SVFConfig(target_modules="all-linear"),
        callbacks=[KeepZ()],
    )
    trainer.train()
    trainer.save_model(args.out)

    figures = finish(
        args.out, args.base, task, objective="rloo", dtype=model.dtype, seed=args.seed, n=args.max_eval_samples,
        training=options,
    )  # fmt: skip
    for one in figures["results"]:
        low, high = one["interval"]
        print(f"{one['mix']}: {one['accuracy']:.3f} [{low:.3f}, {high:.3f}] (n = {one['n']}, validation)")


if __name__ == "__main__":
    main()
