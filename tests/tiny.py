"""The awkward tiny Gemma 2 of the tests, and gradients on every backend.

Awkward: heads * head_dim is not hidden, words are a prime, rows are three
windows long, and the weights are so large that both soft caps bite.
"""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
from keras import ops
from test_data_tokens import train_vocabulary

from keras_gemma_ft.model import lora

# Rows of T tokens, V words (the tokenizer has 340), as transformers names it.
T, V = 24, 347
SIZES = {
    "vocab_size": V,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 40,
    "intermediate_size": 56,
    "sliding_window": 8,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 16,
}
# Standard deviation of each kind of weight; attention scores then reach 35.
DEVIATIONS = {
    "embed_tokens": 0.5,
    "q_proj": 0.45,
    "k_proj": 0.45,
    "v_proj": 0.2,
    "o_proj": 0.2,
    "_proj": 0.15,
    "norm": 0.3,
}


def save(folder, *, gain=3.5, **changes):
    """Writes a Hugging Face model folder, weights by transformers.

    Args:
        folder: where to.
        gain: mean of the post-norms' weights: how much blocks matter beside
            the embedding.
        changes: of `SIZES`.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**{**SIZES, **changes})
    )
    for name, value in model.named_parameters():
        kind = next(k for k in DEVIATIONS if k in name)
        torch.nn.init.normal_(value, 0.0, DEVIATIONS[kind])
        if "post_" in name:
            value.data += gain
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(train_vocabulary())
    return folder


def witness(folder, dtype="float32"):
    """The folder's model as transformers computes it."""
    import torch
    import transformers

    return transformers.Gemma2ForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


def close(what, got, want, *, atol=0.0, rtol=0.0):
    """assert_allclose that also tells how far apart they are (pytest -rP)."""
    got, want = np.asarray(got, "float64"), np.asarray(want, "float64")
    apart = np.max(np.abs(got - want), initial=0.0)
    print(f"{what}: {apart:.2g} of {np.max(np.abs(want), initial=0.0):.3g}")
    np.testing.assert_allclose(got, want, atol=atol, rtol=rtol, err_msg=what)


def ids(*shape, seed=0):
    """Random words, none of them special: int32."""
    return np.random.default_rng(seed).integers(8, V, shape).astype("int32")


def layout(*lengths, size=T):
    """(segment_ids, positions), int32 [1, T], of a row packed so."""
    segments, positions = np.zeros((2, 1, size), "int32")
    at = 0
    for number, length in enumerate(lengths, 1):
        segments[0, at : at + length] = number
        positions[0, at : at + length] = np.arange(length)
        at += length
    return segments, positions


def compute(function, *arrays):
    """function(*tensors) in numpy.

    On JAX as one program: op by op, each op would be compiled by itself.
    """
    if keras.config.backend() == "jax":
        import jax

        function = jax.jit(function)
    found = function(*keras.tree.map_structure(ops.convert_to_tensor, arrays))
    return keras.tree.map_structure(ops.convert_to_numpy, found)


def differentiate(function, variables):
    """A function's value and gradients, by the backend's own machinery.

    Args:
        function: of tensors; gives a scalar; reads the variables.
        variables: Keras variables.

    Returns:
        A function of numpy arrays: (float, a gradient of each variable).
    """
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        def pure(values, arguments):
            pairs = list(zip(variables, values))
            with keras.StatelessScope(state_mapping=pairs):
                return function(*arguments)

        compiled = jax.jit(jax.value_and_grad(pure))

    def run(arguments):
        values = [v.value for v in variables]
        if backend == "jax":
            return compiled(values, arguments)
        if backend == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                value = function(*arguments)
            return value, tape.gradient(value, values)
        import torch

        value = function(*arguments)
        return value, torch.autograd.grad(value, values)

    def numbers(*arrays):
        value, found = run([ops.convert_to_tensor(a) for a in arrays])
        found = [ops.convert_to_numpy(ops.convert_to_tensor(g)) for g in found]
        return float(ops.convert_to_numpy(value)), found

    return numbers


def on_devices(file, count):
    """The line of JSON that a file prints, run on so many virtual devices."""
    flag = f"--xla_force_host_platform_device_count={count}"
    here = pathlib.Path(file)
    done = subprocess.run(
        [sys.executable, str(here)],
        env={
            **os.environ,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
            "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def fill(backbone, seed=0, deviation=0.15):
    """Puts random numbers into a backbone's adapter; B too is not zero."""
    rng = np.random.default_rng(seed)
    for pair in lora.variables(backbone).values():
        for variable in pair:
            variable.assign(rng.normal(0, deviation, variable.shape))
