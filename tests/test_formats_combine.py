"""Sums of adapters and lower ranks, against full matrices and PEFT."""

import dataclasses
import itertools

import numpy as np
import pytest
from test_formats_adapters import (
    KERNELS,
    TARGETS,
    as_linear,
    delta,
    make,
    torch_model,  # noqa: F401
)

from keras_gemma_ft.config import UserError
from keras_gemma_ft.formats import adapters, combine, low_rank, names

KEYS = [*itertools.product(range(3), TARGETS)]


def without(adapter, *layers):
    """The adapter without some layers, as foreign files may be."""
    kept = {k: v for k, v in adapter.weights.items() if k[0] not in layers}
    return dataclasses.replace(adapter, weights=kept)


def parts(*styles):
    """Three adapters of other ranks, scales, targets and layers."""
    first, second, third = styles
    return [
        (make(first, rank=2, alpha=5.0), 0.75),
        (
            make(second, 3, 7.0, True, ("query", "ffw_linear"), seed=1),
            -1.5,
        ),
        (without(make(third, rank=1, alpha=2.0, seed=2), 1), 2.0),
    ]


def whole(pairs, key):
    """The sum of weight * s A B as one full matrix, float64."""
    total = np.zeros(KERNELS[key[1]])
    for adapter, weight in pairs:
        if key in adapter.weights:
            total = total + weight * delta(adapter, key)
    return total


@pytest.mark.parametrize(
    "styles, style, rank",
    [
        (("standard",) * 3, "standard", 6),
        (("keras",) * 3, "keras", 6),
        # Four heads of rank 2, of rank 3, and a standard 1.
        (("keras", "keras", "standard"), "standard", 8 + 12 + 1),
    ],
)
def test_a_sum_is_the_sum_of_the_full_matrices(styles, style, rank):
    pairs = parts(*styles)
    found = combine.weighted_sum(pairs)
    assert (found.style, found.rank, found.targets) == (style, rank, TARGETS)
    assert (found.alpha, found.base) == (rank, "tiny")
    assert sorted(found.weights) == sorted(KEYS)
    for key in KEYS:
        a, b = found.weights[key]
        shapes = low_rank.pair_shapes(style, key[1], KERNELS[key[1]], rank)
        assert (a.shape, b.shape) == shapes
        assert a.dtype == b.dtype == np.float32
        want = whole(pairs, key)
        np.testing.assert_allclose(delta(found, key), want, atol=2e-6)
        assert np.abs(want).max() > 0.5
    # A layer of one part alone needs that part's rank, the rest is zero.
    a, b = found.weights[1, "key"]
    assert not a[..., rank // 2 :].any() and not b[rank // 2 :].any()


def test_a_sum_is_pefts_and_is_read_by_peft(tmp_path, torch_model):  # noqa: F811
    import peft

    pairs = [
        (make("standard", rank=2, alpha=5.0), 0.75),
        (make("standard", rank=3, alpha=7.0, seed=1), -1.5),
    ]
    found = combine.weighted_sum(pairs)
    less, lost = combine.truncated(found, 2)
    told = {"a": pairs[0][0], "b": pairs[1][0], "sum": found, "less": less}
    for name, adapter in told.items():
        adapters.write_peft(tmp_path / name, adapter)
    tuned = peft.PeftModel.from_pretrained(
        torch_model(), tmp_path / "a", adapter_name="a"
    )
    for name in ("b", "sum", "less"):
        tuned.load_adapter(tmp_path / name, adapter_name=name)
    weights = [weight for _, weight in pairs]
    for kind, rank in (("cat", None), ("svd", 2)):
        tuned.add_weighted_adapter(
            ["a", "b"], weights, kind, combination_type=kind, svd_rank=rank
        )
    targets = {module: target for target, module in names.MODULES.items()}
    seen, gone, norm = 0, 0.0, 0.0
    for name, module in tuned.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        matrix = {
            kind: module.get_delta_weight(kind).detach().numpy()
            for kind in ("cat", "svd", "sum", "less")
        }
        np.testing.assert_allclose(matrix["sum"], matrix["cat"], atol=2e-6)
        np.testing.assert_allclose(matrix["less"], matrix["svd"], atol=2e-5)
        _, _, layer, *module = name.split(".")
        key = int(layer), targets[".".join(module)]
        want = as_linear(key[1], whole(pairs, key))
        np.testing.assert_allclose(matrix["sum"], want, atol=2e-6)
        gone += np.sum((matrix["cat"] - matrix["svd"]) ** 2.0)
        norm += np.sum(matrix["cat"] ** 2.0)
        seen += 1
    assert seen == len(KEYS)
    assert lost.whole == pytest.approx((gone / norm) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("style", ["standard", "keras"])
@pytest.mark.parametrize("rank", [1, 4, 6, 24])
def test_a_lower_rank_is_the_nearest_and_tells_what_is_lost(style, rank):
    adapter = make(style, rank=6, alpha=9.0, rslora=True)
    # As adapters are: some directions matter more, some layers are simpler.
    for (layer, _), (a, _) in adapter.weights.items():
        a *= np.float32(0.5 + 0.5 * layer) ** np.arange(6, dtype="float32")
    found, lost = combine.truncated(adapter, rank)
    assert (found.style, found.rank, found.alpha) == (style, rank, rank)
    gone, norm, shares = 0.0, 0.0, {}
    for key in KEYS:
        full = delta(adapter, key)
        flat = low_rank.matrix(style, key[1], full)
        left, values, right = np.linalg.svd(flat, full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        got = low_rank.matrix(style, key[1], delta(found, key))
        np.testing.assert_allclose(got, best, atol=1e-5)
        a, b = found.weights[key]
        assert (a.shape, b.shape) == low_rank.pair_shapes(
            style, key[1], KERNELS[key[1]], rank
        )
        shares[key] = np.linalg.norm(flat - best) / np.linalg.norm(flat)
        gone += np.sum((flat - best) ** 2)
        norm += np.sum(flat**2)
    assert lost.whole == pytest.approx((gone / norm) ** 0.5, abs=1e-9)
    assert lost.worst == pytest.approx(max(shares.values()), abs=1e-9)
    if rank < 6:
        assert lost.layer == max(shares, key=shares.get)
        assert 0 < lost.whole < lost.worst
    else:
        assert lost == (0.0, 0.0, None)


def test_an_adapter_of_zeros_loses_nothing():
    empty = make("keras")
    for _, b in empty.weights.values():
        b[:] = 0
    found, lost = combine.truncated(empty, 1)
    assert lost == (0.0, 0.0, None)
    assert not any(b.any() for _, b in found.weights.values())


def test_the_memory_of_a_sum_and_of_a_lower_rank_is_that_of_the_factors():
    import tracemalloc

    rng = np.random.default_rng(0)
    # A feed-forward kernel of the 9B; whole it takes 196 MiB in float32.
    pair = rng.normal(size=(3584, 8)), rng.normal(size=(8, 14336))
    pair = tuple(part.astype("float32") for part in pair)
    adapter = adapters.Adapter(
        "standard", 8, 8.0, False, 0.0, ("ffw_gating",),
        {(0, "ffw_gating"): pair}
    )  # fmt: skip
    tracemalloc.start()
    both = combine.weighted_sum([(adapter, 0.5), (adapter, 0.5)])
    found, lost = combine.truncated(both, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The same adapter twice is itself, of half the rank.
    assert lost.whole < 1e-7
    got, want = (
        x.weights[0, "ffw_gating"][0][:20] @ x.weights[0, "ffw_gating"][1]
        for x in (found, adapter)
    )
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert peak < 3584 * 14336 * 4 / 8


@pytest.mark.parametrize("style", ["standard", "keras"])
def test_another_form_is_the_same_function(style):
    adapter = make("keras", rank=3, alpha=5.0)
    rank = combine.rank_in(adapter, style)
    assert rank == (3 if style == "keras" else 12)
    weights = combine.padded(adapter, style=style, rank=rank + 2, factor=0.5)
    form = dataclasses.replace(
        adapter,
        style=style,
        rank=rank + 2,
        alpha=0.5 * (rank + 2),
        weights=weights,
    )
    for key in KEYS:
        np.testing.assert_allclose(
            delta(form, key), delta(adapter, key), atol=1e-6
        )
    own = combine.padded(adapter, style="keras", rank=3, factor=5 / 3)
    for key, pair in own.items():
        for x, y in zip(pair, adapter.weights[key]):
            np.testing.assert_array_equal(x, y)


def test_what_cannot_be_added_up_is_refused_whole():
    other = make("standard", targets=("key", "ffw_linear"))
    a, b = other.weights[2, "key"]
    other.weights[2, "key"] = a, b[:, :1]
    a, b = other.weights[0, "ffw_linear"]
    other.weights[0, "ffw_linear"] = a[:7], b
    with pytest.raises(UserError) as caught:
        combine.weighted_sum([(make("standard"), 1.0), (other, float("nan"))])
    told = str(caught.value)
    for words in (
        "weight nan of adapter 2: expected a finite number",
        "layer 0 ffw_linear: the kernel is (56, 40) in adapter 1, (7, 40) in "
        "adapter 2",
        "layer 2 key: the kernel is (2, 40, 16) in adapter 1, (1, 40, 16) in "
        "adapter 2",
    ):
        assert words in told, told
    with pytest.raises(UserError, match="at least one"):
        combine.weighted_sum([])
    with pytest.raises(UserError, match="1 or more, got 0"):
        combine.truncated(make("keras"), 0)


def test_the_base_of_a_sum_is_the_one_that_all_name():
    named, other = make("keras"), make("keras", seed=1)
    for base, want in (("tiny", "tiny"), ("", "tiny"), ("else", "")):
        other = dataclasses.replace(other, base=base)
        assert combine.weighted_sum([(named, 1), (other, 1)]).base == want
