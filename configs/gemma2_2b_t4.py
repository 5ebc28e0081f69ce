"""Gemma 2 2B with LoRA on one 16 GB T4, Torch or TensorFlow.

python -m keras_gemma_ft.train --config=configs/gemma2_2b_t4.py \
    --backend=torch --data.train=mine.jsonl
(or --backend=tensorflow)

Hardware: NVIDIA T4 (16 GB), which has no bfloat16. By `plan
--backend=torch`, not run on a T4 yet: 6.5 GiB, 4.9 of them weights in float16;
780 token/s, scaled from an H200.
"""

from keras_gemma_ft import config


def get_config():
    return config.Config(
        preset="gemma2_2b_en",
        run_dir="runs/gemma2_2b_t4",
        data=config.Data(
            sequence_length=512, batch_size=16, micro_batch_size=2
        ),
        lora=config.Lora(rank=8, alpha=16.0),
        model=config.Model(dtype="float16", remat="block"),
    )
