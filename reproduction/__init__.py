"""`python -m reproduction`: the paper's tables and our own experiments, as resumable stages over stored items."""
