"""Train an expert with TRL's SFTTrainer on a sigmix task's gold replies, seal it, and measure it against its base.

    python examples/trl_sft.py --task larger --steps 30 --out my-experts/larger-sft
    sigmix chat --bank my-experts --mix larger-sft

Needs `pip install "sigmix[trl,tasks]"`. The loss is on the reply and the token that ends it.
"""

from __future__ import annotations

import argparse

from trl import SFTConfig, SFTTrainer

from sigmix import SVFConfig, load_base
from sigmix.experts.serialization import check_free
from sigmix.integrations.trl import KeepZ, finish, gold_dataset
from sigmix.tasks.registry import get_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="name, hub name, folder or .gguf file")
    parser.add_argument("--task", default="addition", help="`sigmix tasks` lists them")
    parser.add_argument("--out", default="my-experts/sft", help="the expert's folder")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="prompts a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=512, help="prompts to train on")
    parser.add_argument("--eval-n", type=int, default=50, help="validation items, for base and expert each")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    check_free(given.out)  # before the training, not after
    task = get_task(given.task)
    samples = task.samples("train", given.samples, seed=given.seed)
    model, tokenizer = load_base(given.base)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=f"{given.out}.run",
            max_steps=given.steps,
            per_device_train_batch_size=given.batch,
            learning_rate=given.lr,
            bf16=False,  # no autocast: compute in the dtype that the base has
            seed=given.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=gold_dataset(samples, model, tokenizer),
        processing_class=tokenizer,
        peft_config=SVFConfig(target_modules="all-linear"),
        callbacks=[KeepZ()],
    )
    trainer.train()
    trainer.save_model(given.out)

    figures = finish(
        given.out, given.base, task, objective="sft", dtype=model.dtype, seed=given.seed, n=given.eval_n,
        training={"lr": given.lr, "steps": given.steps, "batch": given.batch},
    )  # fmt: skip
    for one in figures["results"]:
        low, high = one["interval"]
        print(f"{one['mix']}: {one['accuracy']:.3f} [{low:.3f}, {high:.3f}] (n = {one['n']}, validation)")


if __name__ == "__main__":
    main()
