"""Train an expert with TRL's RLOOTrainer on a sigmix task, seal it, and measure it against its base.

    python examples/trl_rloo.py --task larger --steps 30 --out my-experts/larger-rloo
    sigmix chat --bank my-experts --mix larger-rloo

Needs `pip install "sigmix[trl,tasks]"`. RLOO's baseline for a reply is the mean reward of the others to its prompt.
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
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="replies a step, a multiple of --generations")
    parser.add_argument("--generations", type=int, default=4, help="replies to each prompt")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--beta", type=float, default=0.05, help="weight of the KL to the base")
    parser.add_argument("--samples", type=int, default=512, help="prompts to train on")
    parser.add_argument("--eval-n", type=int, default=50, help="validation items, for base and expert each")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    check_free(given.out)  # before the training, not after
    task = get_task(given.task)
    samples = task.samples("train", given.samples, seed=given.seed)
    model, tokenizer = load_base(given.base)
    trainer = RLOOTrainer(
        model,
        reward_funcs=reward_function(task, samples),
        args=RLOOConfig(
            output_dir=f"{given.out}.run",
            max_steps=given.steps,
            per_device_train_batch_size=given.batch,
            num_generations=given.generations,
            max_completion_length=task.max_new_tokens,
            learning_rate=given.lr,
            beta=given.beta,
            bf16=False,  # no autocast: compute in the dtype that the base has
            chat_template_kwargs=CHAT,
            seed=given.seed,
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
    trainer.save_model(given.out)

    figures = finish(
        given.out, given.base, task, objective="rloo", dtype=model.dtype, seed=given.seed, n=given.eval_n,
        training={"lr": given.lr, "beta": given.beta, "steps": given.steps, "batch": given.batch},
    )  # fmt: skip
    for one in figures["results"]:
        low, high = one["interval"]
        print(f"{one['mix']}: {one['accuracy']:.3f} [{low:.3f}, {high:.3f}] (n = {one['n']}, validation)")


if __name__ == "__main__":
    main()
