"""The settings under which the embedded model learns the embedded task."""

from keras_gemma_ft import config


def get_config():
    """What `python -m keras_gemma_ft.train` runs without any flag."""
    return config.Config(
        data=config.Data(sequence_length=128, batch_size=8),
        lora=config.Lora(rank=16),
        train=config.Train(steps=400, learning_rate=1e-2, warmup="20 steps"),
    )
