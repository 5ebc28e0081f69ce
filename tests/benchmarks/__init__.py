"""Measurements, side by side with stock KerasHub and transformers + PEFT.

Not tests: pytest does not collect them. Run from the repository's root, for
example `python -m tests.benchmarks.step --backend=jax`.
"""
