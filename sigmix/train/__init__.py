"""Training of experts: reinforcement learning on z against a correctness reward (arXiv 2501.06252, section 3.2)."""
