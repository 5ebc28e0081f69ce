"""Fine-tune Gemma 2 with LoRA through KerasHub, on JAX, TensorFlow or Torch."""
