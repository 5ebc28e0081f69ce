"""Completions and scores of a model, tuned or not."""
