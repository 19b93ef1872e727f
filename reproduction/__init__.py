"""`python -m reproduction`: the paper's tables and further experiments, as resumable stages over stored items."""
