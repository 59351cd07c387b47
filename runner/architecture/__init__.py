"""What transformers and PEFT make of a config: classes without weights, and how stored names map to parameters."""
