"""Fast computation on a CPU: kernels and packed weights, the compiled decode step, 8-bit decode weights."""
