"""The embedded model before training: sizes, and an untrained preset folder.

All features of Gemma 2 are on, small: grouped key/value heads, a sliding
window on even layers, both soft caps, post-norms, a tied embedding. How the
weights in `gemma2_tiny_en/` were made (BOOKS is a folder of plain text files):

    python -m keras_gemma_ft.embedded.tokenizer --books=BOOKS --output=FILE
    python -m keras_gemma_ft.embedded.practice --output=runs/practice.jsonl
    python -m keras_gemma_ft.embedded.practice --turns --output=runs/turns.jsonl
    python -m keras_gemma_ft.embedded.model --output=runs/untrained
    python -m keras_gemma_ft.train --config=configs/tiny_pretrain.py \
        --data.train='BOOKS/*.txt,runs/practice.jsonl' --data.eval=ONE_BOOK.txt
    python -m keras_gemma_ft.train --config=configs/tiny_turns.py
    python -m keras_gemma_ft.embedded.model --from=runs/tiny_turns/model \
        --output=keras_gemma_ft/embedded/gemma2_tiny_en
"""

import argparse
import pathlib

from keras_gemma_ft import config, embedded, runtime

# 3.19 M parameters: 6.4 MB in bfloat16.
SIZES = {
    "vocabulary_size": 4096,
    "num_layers": 5,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 192,
    "intermediate_dim": 2 * 640,
    "head_dim": 48,
    "query_head_dim_normalize": True,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 64,
}


def write(output, *, source=None, seed=0):
    """Writes a preset folder: untrained, or `source` in bfloat16.

    Args:
        output: the folder; an existing one is replaced.
        source: a preset folder whose weights are taken over.
        seed: of the untrained weights.
    """
    import keras
    import keras_hub

    from keras_gemma_ft.formats import atomic
    from keras_gemma_ft.model import presets

    keras.utils.set_random_seed(seed)
    if source:
        loaded = presets.load(source, dtype="bfloat16")
        backbone, tokenizer = loaded.causal_lm.backbone, loaded.tokenizer
    else:
        backbone = keras_hub.models.GemmaBackbone(**SIZES, dtype="float32")
        vocabulary = embedded.preset_folder() / "assets/tokenizer"
        proto = (vocabulary / "vocabulary.spm").read_bytes()
        tokenizer = presets.tokens.Tokenizer(proto)
    with atomic.replacing(pathlib.Path(output)) as partial:
        presets.save(partial, backbone, tokenizer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--from", dest="source")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    runtime.start(config.Config())
    write(args.output, source=args.source, seed=args.seed)


if __name__ == "__main__":
    main()
