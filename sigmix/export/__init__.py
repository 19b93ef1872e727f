"""Exports: what other programs load. A merged checkpoint, a PEFT LoRA, a GGUF LoRA adapter, a vLLM plugin.

    source    a base on disk, read one tensor at a time; experts checked against it
    merged    W'(z) as a checkpoint that plain transformers loads
    lowrank   ΔW = B A without another SVD, ranks and the error of a truncation
    lora      that as a PEFT adapter
    gguf_lora that as an adapter for llama.cpp
    verify    the export loaded in the other program, and its logits compared with ours
    vllm      a plugin that makes an adapter of a mix when vLLM asks for it by name

No module here has a whole model in memory but `verify`, and `source` for the fingerprint of a base whose checkpoint has
tensors that loading splits or fuses (`Source.loads_whole`).
"""
