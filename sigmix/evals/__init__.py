"""Evaluation: accuracy with intervals, paired comparisons, strategies and dispatch on a task's items."""
