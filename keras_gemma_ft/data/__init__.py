"""Text to numpy: sources, layouts, templates, tokens, packing, pipeline.

Nothing here imports keras, so a question about data never needs a backend.
"""
