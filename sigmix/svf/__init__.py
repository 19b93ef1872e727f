"""The algebra of singular-value fine-tuning: decomposition, gains, the adapted layer and its PEFT tuner."""
