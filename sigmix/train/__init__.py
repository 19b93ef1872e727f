"""Training of experts by reinforcement learning or supervised fine-tuning of z (arXiv 2501.06252, section 3.2)."""
