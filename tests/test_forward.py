"""The forward pass: transformers and stock KerasHub as witnesses.

Packing, padding, recomputation, the key/value cache, generation and the 16-bit
dtypes are held against the plain float32 pass or against transformers.
"""

import types

import keras
import numpy as np
import pytest
import tiny
import torch
from keras import ops

from keras_gemma_ft import config
from keras_gemma_ft.formats import names
from keras_gemma_ft.inference import sampling
from keras_gemma_ft.model import (
    attention,
    decoder_block,
    forward,
    lora,
    presets,
    scan,
)

ONE_SEGMENT = tiny.layout(tiny.T)


@pytest.fixture(scope="module")
def backbone(folder):
    return presets.load(str(folder)).causal_lm.backbone


@pytest.fixture(scope="module")
def witness(folder):
    return tiny.witness(folder)


def hidden_and_logits(backbone):
    def function(token_ids, segment_ids, positions):
        hidden = forward.hidden_states(
            backbone, token_ids, segment_ids, positions
        )
        return hidden, forward.logits(backbone, hidden)

    return function


def ours(backbone, token_ids, segment_ids=None, positions=None):
    """(hidden, logits) of rows; one segment a row unless told."""
    if segment_ids is None:
        shape = (len(token_ids), 1)
        segment_ids, positions = (np.tile(a, shape) for a in ONE_SEGMENT)
    return tiny.compute(
        hidden_and_logits(backbone), token_ids, segment_ids, positions
    )


def theirs(witness, token_ids):
    """(hidden, logits) of transformers."""
    with torch.no_grad():
        found = witness(
            torch.tensor(token_ids).long(), output_hidden_states=True
        )
    return tuple(
        x.float().numpy() for x in (found.hidden_states[-1], found.logits)
    )


def test_agrees_with_transformers(backbone, witness):
    token_ids = tiny.ids(2, tiny.T)
    for what, got, want in zip(
        ("hidden", "logits"),
        ours(backbone, token_ids),
        theirs(witness, token_ids),
    ):
        tiny.close(what, got, want, atol=2e-4)


# 10 is hidden // heads, as 27B has it; 23 is neither of KerasHub's two.
@pytest.mark.parametrize("scalar", [10, 23])
def test_query_scale_is_the_folders(tmp_path, scalar):
    folder = tiny.save(tmp_path, query_pre_attn_scalar=scalar)
    backbone = presets.load(str(folder)).causal_lm.backbone
    token_ids = tiny.ids(2, tiny.T)
    _, got = ours(backbone, token_ids)
    _, want = theirs(tiny.witness(folder), token_ids)
    tiny.close(f"logits, scale 1/sqrt({scalar})", got, want, atol=2e-4)
    # A Keras preset knows hidden // heads as well, by its own name.
    if scalar == 10:
        backbone.query_pre_attn_scalar = None
        assert decoder_block.query_scale(backbone) == pytest.approx(10**-0.5)


def test_soft_caps_bite(backbone, witness, monkeypatch):
    token_ids = tiny.ids(2, tiny.T)
    capped, tanh = [], torch.tanh
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tanh", lambda x: (capped.append(x), tanh(x))[1])
        theirs(witness, token_ids)
    *scores, logits = capped
    assert len(scores) == backbone.num_layers
    assert min(torch.tril(s).abs().max() * 50 for s in scores) > 30
    assert logits.abs().max() * 30 > 10
    want, want_logits = ours(backbone, token_ids)
    for name, index in (
        ("attention_logit_soft_cap", 0),
        ("final_logit_soft_cap", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(backbone, name, None)
            without = ours(backbone, token_ids)
        change = np.abs(without[index] - (want, want_logits)[index]).max()
        print(f"without {name}: {change:.2g}")
        assert change > 1e-2


def test_agrees_with_the_stock_forward(backbone):
    token_ids = tiny.ids(2, tiny.T)
    segment_ids, positions = (np.tile(a, (2, 1)) for a in tiny.layout(19))

    def stock(token_ids, padding_mask):
        return backbone({"token_ids": token_ids, "padding_mask": padding_mask})

    want = tiny.compute(stock, token_ids, segment_ids)
    got, _ = ours(backbone, token_ids, segment_ids, positions)
    tiny.close("KerasHub", got[:, :19], want[:, :19], atol=1e-4)


def test_packed_and_padded_rows_are_separate_sequences(backbone, witness):
    lengths = (11, 9, 3)
    packed = tiny.ids(1, tiny.T)
    rows, ends = [packed], np.cumsum((0, *lengths))
    places = [tiny.layout(*lengths)]
    for start, length in zip(ends, lengths):
        row = np.full((1, tiny.T), 5, "int32")
        row[:, :length] = packed[:, start : start + length]
        rows.append(row)
        places.append(tiny.layout(length))
    segment_ids, positions = map(np.concatenate, zip(*places))
    got, _ = ours(backbone, np.concatenate(rows), segment_ids, positions)
    assert np.isfinite(got).all()
    for row, (start, length) in enumerate(zip(ends, lengths), 1):
        alone = got[row, :length]
        together = got[0, start : start + length]
        tiny.close("packed against padded", together, alone, atol=1e-5)
        want, _ = theirs(witness, packed[:, start : start + length])
        tiny.close("padded against unpadded", alone, want[0], atol=1e-4)


def gradients(backbone, token_ids, weights, recompute):
    segment_ids, positions = (
        np.tile(a, (len(token_ids), 1)) for a in ONE_SEGMENT
    )

    def function():
        hidden = forward.hidden_states(
            backbone,
            *map(ops.convert_to_tensor, (token_ids, segment_ids, positions)),
            recompute=recompute,
        )
        return ops.sum(hidden * ops.convert_to_tensor(weights))

    return tiny.differentiate(function, backbone.trainable_variables)()


def test_gradients_and_recomputation(backbone, witness, monkeypatch):
    """Of every weight, against torch's autograd through transformers."""
    remat, blocks = keras.remat, []
    monkeypatch.setattr(
        keras, "remat", lambda block: (blocks.append(block), remat(block))[1]
    )
    token_ids = tiny.ids(2, tiny.T)
    shape = (*token_ids.shape, backbone.hidden_dim)
    weights = np.random.default_rng(1).normal(size=shape).astype("float32")
    found = witness.model(torch.tensor(token_ids).long()).last_hidden_state
    wanted = (found * torch.tensor(weights)).sum()
    wanted.backward()
    parameters = dict(witness.named_parameters())
    value, plain = gradients(backbone, token_ids, weights, False)
    assert not blocks
    again, recomputed = gradients(backbone, token_ids, weights, True)
    assert len(blocks) == backbone.num_layers
    tiny.close("value", value, wanted.item(), atol=1e-3)
    # Compiled apart, sums differ in their last bits: 4e-5 seen on one CPU.
    tiny.close("value, recomputed", again, value, atol=1e-4)
    assert len(plain) == len(parameters) == 2 + 3 * 11
    for variable, got, twice in zip(
        backbone.trainable_variables, plain, recomputed
    ):
        scale = np.abs(got).max()
        assert scale > 1e-3
        tiny.close(
            f"{variable.path}, recomputed",
            twice / scale,
            got / scale,
            atol=5e-5,
        )
        name, got = names.to_huggingface(variable.path, got)
        want = parameters[name].grad.numpy()
        tiny.close(name, got / scale, want / scale, atol=1e-4)
    witness.zero_grad()


def test_cache_gives_the_full_pass(backbone):
    """A prompt of 5 at once, then one by one, far beyond the window of 8."""
    token_ids = tiny.ids(2, tiny.T)
    segment_ids, positions = (np.tile(a, (2, 1)) for a in ONE_SEGMENT)
    want, _ = ours(backbone, token_ids)

    def step(token_ids, segment_ids, positions, cache):
        return forward.hidden_states(
            backbone, token_ids, segment_ids, positions, cache=cache
        )

    cache, found = forward.new_cache(backbone, 2, tiny.T + 3), []
    for start, stop in [(0, 5), *((t, t + 1) for t in range(5, tiny.T))]:
        part = (slice(None), slice(start, stop))
        hidden, cache = tiny.compute(
            step, token_ids[part], segment_ids[part], positions[part], cache
        )
        found.append(hidden)
    got = np.concatenate(found, axis=1)
    # Compiled apart, sums differ in their last bits: 3e-5 seen on one CPU.
    tiny.close("key/value cache", got, want, atol=1e-4)


def test_generation_is_transformers_greedy(backbone, witness):
    """Left-padded prompts, token for token, to either end token."""
    prompts = [list(map(int, tiny.ids(n, seed=n))) for n in (3, 17, 9)]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    )

    # A table may have more rows than the tokenizer has pieces, as here.
    words = 250

    def greedy(stops, suppressed=range(words, tiny.V)):
        found = witness.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=0,
            suppress_tokens=list(suppressed) or None,
        )
        return found[:, width:].tolist()

    free = greedy(None)
    assert free != greedy(None, ())
    # Words that rows 0 and 1 will choose stand for <eos> and <end_of_turn>.
    stops = [free[0][7], free[1][5]]
    want = []
    for row in greedy(stops):
        ends = [i for i, token in enumerate(row) if token in stops]
        want.append(row[: ends[0]] if ends else row)
    assert [len(row) for row in want] == [7, 5, 20]
    tokenizer = types.SimpleNamespace(
        stops=frozenset(stops), vocabulary_size=words
    )
    generator = sampling.Generator(
        types.SimpleNamespace(backbone=backbone), tokenizer, config.Generate()
    )
    assert generator.complete(prompts, limit=20) == want
    generator.stops = set()
    order, streamed = [0, 2, 1], {i: [] for i in range(3)}
    generator.complete(
        [prompts[i] for i in order],
        limit=20,
        on_token=lambda row, token: streamed[row].append(token),
    )
    assert [streamed[i] for i in range(3)] == [free[i] for i in order]


def test_bfloat16(folder, backbone, witness):
    """As near to float32 as transformers' own bfloat16, or nearer."""
    token_ids = tiny.ids(2, tiny.T)
    want, _ = ours(backbone, token_ids)
    half = presets.load(str(folder), dtype="bfloat16").causal_lm.backbone
    assert {v.dtype for v in half.variables} == {"bfloat16"}
    got, logits = ours(half, token_ids)
    assert str(got.dtype) == "bfloat16" and logits.dtype == np.float32
    assert np.isfinite(logits).all()
    their, _ = theirs(tiny.witness(folder, "bfloat16"), token_ids)
    off, off_by = (
        np.linalg.norm(x.astype("float32") - want) / np.linalg.norm(want)
        for x in (got, their)
    )
    print(f"bfloat16: {off:.3f} off, transformers {off_by:.3f}")
    assert off < min(0.1, 1.25 * off_by)


def test_float16_outgrows_65504(tmp_path):
    """The residual stays float32; all in float16 it would be infinite."""
    folder = tiny.save(tmp_path, gain=30_000.0)
    token_ids = tiny.ids(2, tiny.T)
    with torch.no_grad():
        found = tiny.witness(folder)(
            torch.tensor(token_ids).long(), output_hidden_states=True
        )
    *stream, want = (h.numpy() for h in found.hidden_states)
    assert max(np.abs(h).max() for h in stream) > 2 * 65504
    broken, _ = theirs(tiny.witness(folder, "float16"), token_ids)
    assert not np.isfinite(broken).all()
    half = presets.load(str(folder), dtype="float16").causal_lm.backbone
    assert decoder_block.residual_dtype(half) == "float32"
    got, logits = ours(half, token_ids)
    assert got.dtype == np.float16 and np.isfinite(logits).all()
    off = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"float16: {off:.4f} off")
    assert off < 2e-2


def test_long_rows_go_in_blocks(backbone, monkeypatch):
    segments, positions = tiny.layout(7, 12, 3)
    token_ids = tiny.ids(1, tiny.T)
    whole, _ = ours(backbone, token_ids, segments, positions)
    called = []
    in_blocks = attention.blocks.attend

    def spy(*args):
        called.append(args[-1])
        return in_blocks(*args)

    monkeypatch.setattr(attention.blocks, "BLOCK", 5)
    monkeypatch.setattr(attention.blocks, "attend", spy)
    blocks, _ = ours(backbone, token_ids, segments, positions)
    assert called == [8, None, 8]  # window, global, window
    tiny.close("blocks", blocks, whole, atol=2e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_feed_forward_in_parts(folder, backbone, monkeypatch, rank):
    """Where blocks are recomputed; values, gradients, a part left over."""
    if rank:
        backbone = presets.load(str(folder)).causal_lm.backbone
        lora.enable(backbone, config.Lora(rank=rank))
        tiny.fill(backbone)
    token_ids = tiny.ids(2, tiny.T)
    shape = (*token_ids.shape, backbone.hidden_dim)
    weights = np.random.default_rng(2).normal(size=shape).astype("float32")
    value, plain = gradients(backbone, token_ids, weights, True)
    parts, called = scan.parts, []
    monkeypatch.setattr(decoder_block, "part_size", lambda width: 2 * 5)
    monkeypatch.setattr(
        scan, "parts", lambda *args: (called.append(args[2]), parts(*args))[1]
    )
    assert tiny.T % 5
    again, inparts = gradients(backbone, token_ids, weights, True)
    assert called and set(called) == {5}
    tiny.close("value", again, value, rtol=1e-5)
    for variable, got, want in zip(
        backbone.trainable_variables, inparts, plain
    ):
        top = np.abs(want).max()
        tiny.close(variable.path, got / top, want / top, atol=1e-5)


def test_parts_draw_their_own_dropout(monkeypatch):
    monkeypatch.setattr(decoder_block, "part_size", lambda width: 2 * 5)
    seed = keras.random.SeedGenerator(3).next()

    def run(x, seed):
        # Torch seeds with the sum of the words.
        return x + ops.cast(ops.sum(seed) % 1_000_003, x.dtype)

    def whole(x):
        return decoder_block.in_parts(run, x, seed, 4)

    found = tiny.compute(whole, np.zeros((2, 13, 3), "float32"))
    assert [len(np.unique(found[:, a:b])) for a, b in ((0, 5), (5, 10))] == [
        1,
        1,
    ]
    assert len(np.unique(found)) == 3


def test_parts_are_powers_of_two():
    assert [decoder_block.part_size(f) for f in (9216, 14336, 36864)] == [
        2048, 2048, 512,
    ]  # fmt: skip


# --- one loop over the blocks --------------------------------------------------


@pytest.mark.skipif(
    keras.config.backend() != "jax", reason="the loop is JAX's own"
)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", "value,ffw_linear"])
def test_a_loop_over_the_blocks_is_the_blocks(folder, recompute, targets):
    """Values and gradients; three blocks are a pair and one more."""
    backbone = presets.load(str(folder)).causal_lm.backbone
    settings = config.Lora(rank=3, targets=targets, dropout=0.2)
    lora.enable(backbone, settings)
    tiny.fill(backbone)
    batch = (tiny.ids(2, tiny.T), *(np.tile(a, (2, 1)) for a in ONE_SEGMENT))
    seed = keras.random.SeedGenerator(3).next()

    def total(scan):
        def run(*batch):
            hidden = forward.hidden_states(
                backbone, *batch, recompute=recompute, scan=scan, seed=seed
            )
            return ops.mean(ops.square(ops.cast(hidden, "float32")))

        return tiny.differentiate(run, backbone.trainable_variables)(*batch)

    (value, gots), (wanted, wants) = total(True), total(False)
    tiny.close("value", value, wanted, rtol=1e-5)
    for variable, got, want in zip(backbone.trainable_variables, gots, wants):
        top = np.abs(want).max()
        # Compiled apart, sums differ in their last bits: 3e-5 seen on one CPU.
        tiny.close(variable.path, got / top, want / top, atol=1e-4)


@pytest.mark.skipif(
    keras.config.backend() != "jax", reason="the loop is JAX's own"
)
def test_a_loop_keeps_no_weights(tmp_path):
    """What a loop without recomputation keeps is activations, by name."""
    import jax

    folder = tiny.save(tmp_path, num_hidden_layers=4)
    backbone = presets.load(str(folder)).causal_lm.backbone
    lora.enable(backbone, config.Lora(rank=3))
    batch = (tiny.ids(2, tiny.T), *(np.tile(a, (2, 1)) for a in ONE_SEGMENT))
    trained = backbone.trainable_variables

    def run(values):
        with keras.StatelessScope(state_mapping=list(zip(trained, values))):
            hidden = forward.hidden_states(backbone, *batch, scan=True)
        return ops.mean(ops.square(hidden))

    _, back = jax.vjp(run, [v.value for v in trained])
    # Of two turns, each a pair of blocks, ahead of the other axes.
    kept = {x.shape[1:] for x in jax.tree.leaves(back) if x.shape[:1] == (2,)}
    kernels = {tuple(v.shape) for v in backbone.non_trainable_variables}
    assert (2, tiny.T, 56) in kept
    assert not kept & {shape for shape in kernels if len(shape) > 1}
