"""The embedded model on the embedded task: a request -> one JSON command.

python -m keras_gemma_ft.train --config=configs/demo.py
(the same as `python -m keras_gemma_ft.train` without any flag)

Hardware: any CPU with 2 cores, each backend.
"""

from keras_gemma_ft.embedded.recipe import get_config  # noqa: F401
