"""Pre-training of the embedded model from scratch on public-domain books.

python -m keras_gemma_ft.embedded.model --output=runs/untrained
python -m keras_gemma_ft.train --config=configs/tiny_pretrain.py \
    --preset=runs/untrained --data.train='BOOKS/*.txt'

Hardware: 2 CPU cores (JAX). Every parameter is trained (--lora.rank=0).
"""

from keras_gemma_ft import config


def get_config():
    return config.Config(
        run_dir="runs/tiny_pretrain",
        data=config.Data(sequence_length=256, batch_size=12),
        lora=config.Lora(rank=0),
        train=config.Train(
            steps=2400,
            learning_rate=3e-3,
            warmup="100 steps",
            weight_decay=0.1,
            log_every="20 steps",
            eval_every="200 steps",
            checkpoint_every="200 steps",
            samples=3,
        ),
    )
