"""Evaluation: a task under a way of answering -> items, accuracy with an interval, paired comparisons."""
