"""OpenAI-compatible server that chooses a mixture of experts for each request; started by `sigmix serve`.

One process serves one model; run one server per GPU.
"""
