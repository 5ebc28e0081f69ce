"""Gemma 2 2B with QLoRA: frozen kernels in NF4, adapters in float32.

python -m keras_gemma_ft.train --config=configs/gemma2_2b_qlora.py \
    --data.train=mine.jsonl

Hardware: a GPU with 8 GB. By `plan --backend=torch`, not run on such a
card yet: 3.7 GiB, 2.1 of them weights (NF4 kernels, 16-bit embedding); 830
token/s on an RTX 3060, scaled from an H200.
"""

from keras_gemma_ft import config


def get_config():
    return config.Config(
        preset="gemma2_2b_en",
        run_dir="runs/gemma2_2b_qlora",
        data=config.Data(
            sequence_length=1024, batch_size=16, micro_batch_size=1
        ),
        lora=config.Lora(rank=16, alpha=16.0, style="standard"),
        model=config.Model(quantize="nf4", remat="block"),
    )
