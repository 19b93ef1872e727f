"""Exports of a mixture for other programs: a merged checkpoint, a PEFT LoRA, a GGUF LoRA adapter.

    base = BaseCheckpoint("smollm2-135m")
    export_merged(base, Mix.parse("sums:0.7+dates:0.3"), Bank.bundled(), Path("merged"))
    export_lora(LowRank.from_mix(base, Mix.one("dates"), Bank.bundled()), Path("lora"))

Tensors are read, composed and written one at a time; only `verify`, and the fingerprint of checkpoints that loading
fuses (`Checkpoint.complete`), load a whole model.
"""
