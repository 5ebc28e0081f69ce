"""A Gemma 2 that can be tuned: presets, forward pass, LoRA, quantisation."""
