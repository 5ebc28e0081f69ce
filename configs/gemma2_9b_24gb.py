"""Gemma 2 9B with QLoRA on one GPU of 24 GB: kernels in NF4, adapters in float32.

python -m keras_gemma_ft.train --config=configs/gemma2_9b_24gb.py \
    --data.train=mine.jsonl

Hardware: an L4, A10G, RTX 3090 or RTX 4090. By `plan --backend=torch`,
not run on such a card yet: 8.8 GiB, 5.7 of them weights; 400 token/s on an L4
and 1,000 on an RTX 4090, scaled from an H200.
"""

from keras_gemma_ft import config


def get_config():
    return config.Config(
        preset="gemma2_9b_en",
        run_dir="runs/gemma2_9b_24gb",
        data=config.Data(
            sequence_length=2048, batch_size=16, micro_batch_size=1
        ),
        lora=config.Lora(rank=16, alpha=16.0, style="standard"),
        model=config.Model(quantize="nf4", remat="block"),
    )
