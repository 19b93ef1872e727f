"""sigmix inside other projects' programs: TRL's trainers (`trl`) and EleutherAI's evaluation harness (`lm_eval`)."""
