"""The embedded model and its exercises: sizes, features, what they share."""

import json
import re

import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_gemma_ft import embedded
from keras_gemma_ft.embedded import model, practice
from keras_gemma_ft.model import forward, presets


@pytest.fixture(scope="module")
def loaded():
    return presets.load("gemma2_tiny_en")


def test_eight_megabytes():
    files = embedded.preset_folder().rglob("*")
    assert sum(f.stat().st_size for f in files if f.is_file()) < 8e6


def test_every_feature_of_gemma_2_is_on(loaded):
    backbone = loaded.causal_lm.backbone
    for name, value in model.SIZES.items():
        assert getattr(backbone, name) == value
    assert backbone.num_query_heads > backbone.num_key_value_heads
    assert 0 < backbone.sliding_window_size < 256
    names = {v.path.rpartition("/")[0] for v in backbone.variables}
    assert "decoder_block_4/post_ffw_norm" in names


def test_gemmas_special_tokens_at_gemmas_ids(loaded):
    tokenizer = loaded.tokenizer
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos) == (0, 1, 2)
    assert tokenizer.id("<start_of_turn>") == 106
    assert tokenizer.end_of_turn == 107


def test_plain_keras_hub_loads_it_and_agrees(loaded):
    folder = str(embedded.preset_folder())
    stock = keras_hub.models.GemmaBackbone.from_preset(folder, dtype="float32")
    ids = np.array([[2, *loaded.tokenizer.encode("It was a dark night.")]])
    ones, places = np.ones_like(ids), np.arange(ids.shape[1])[None]
    want = stock({"token_ids": ids, "padding_mask": ones})
    got = forward.hidden_states(
        loaded.causal_lm.backbone,
        *(ops.convert_to_tensor(a, "int32") for a in (ids, ones, places)),
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(got), ops.convert_to_numpy(want), atol=2e-4
    )


def _words(text):
    return re.sub(r"\W+", " ", text).lower().strip()


def test_exercises_share_no_request_with_the_demo():
    requests = set()
    for split in ("train", "eval"):
        lines = embedded.demo_file(split).read_text("utf-8").splitlines()
        requests |= {_words(json.loads(line)["prompt"]) for line in lines}
    exercises = [_words(r["prompt"]) for r in practice.turns()]
    exercises += [_words(text) for text in practice.documents()]
    assert len(exercises) == 34_000
    assert requests.isdisjoint(exercises)


def test_exercises_are_the_same_each_time_and_right():
    first, again = list(practice.turns(500)), list(practice.turns(500))
    assert first == again
    for record in first:
        if record["prompt"].startswith("Repeat: "):
            assert record["prompt"] == "Repeat: " + record["response"]
        if record["response"].startswith("{"):
            assert len(json.loads(record["response"])) >= 2
