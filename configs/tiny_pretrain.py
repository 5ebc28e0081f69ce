"""The embedded model, stage 1: from scratch on books and exercises.

python -m keras_gemma_ft.train --config=configs/tiny_pretrain.py \
    --data.train='BOOKS/*.txt,runs/practice.jsonl' --data.eval=ONE_BOOK.txt
(what comes before and after: keras_gemma_ft/embedded/model.py)

Hardware: 2 CPU cores, JAX, about 25 minutes; every parameter is trained. With
50 public-domain books (4.5 M tokens): held-out loss of "The Wonderful Wizard
of Oz" 8.34 -> 3.65 nats a token after 7.4 M tokens.
"""

from keras_gemma_ft import config


def get_config():
    return config.Config(
        preset="runs/untrained",
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
