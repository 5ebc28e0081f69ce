"""Which backend the suite runs on, and which tests need only one of them.

The suite runs three times: KERAS_BACKEND=jax (the default), tensorflow, torch.
What never touches a backend is marked `once` and runs under jax alone.
"""

import fnmatch
import os
import sys

import pytest

from keras_gemma_ft.runtime import backend

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models are tiny: a second thread costs more than it computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Half of the suite's time under JAX is LLVM polishing code that runs once.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
)
BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND != "tensorflow":
    # As runtime.start does, so that the tests see the process users have.
    sys.modules.setdefault("tensorflow", None)
    sys.modules.setdefault("tensorflow_text", None)
for name, value in backend.jax_platforms().items():
    os.environ.setdefault(name, value)

# Files whose tests need no backend ...
ONCE = (
    "test_architecture.py",
    "test_config.py",
    "test_data_*.py",
    "test_embedded_demo.py",
    "test_formats_*.py",
    "test_pages.py",
    "test_runtime.py",
    "test_workers.py",
)
# ... but for these, which call KerasHub.
EVERYWHERE = {
    "test_keras_hub_imports_the_same_arrays",
    "test_layer_index_is_keras_hubs",
    "test_stock_keras_loads_our_file",
    "test_we_read_what_stock_keras_saves",
}


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """The suite's own cache: yours is neither read nor written.

    Processes that a test starts inherit it.
    """
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tiny model of `tiny.py` as a Hugging Face folder."""
    # Not above: data tests should not wait for keras.
    import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny"))


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "once: needs no backend; runs under KERAS_BACKEND=jax only"
    )
    # Keras 3.15's conversions to numpy, thousands of times.
    config.addinivalue_line(
        "filterwarnings",
        "ignore:__array__ implementation doesn't accept:DeprecationWarning",
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        name = getattr(item, "originalname", item.name)
        listed = any(fnmatch.fnmatch(item.path.name, glob) for glob in ONCE)
        if listed and name not in EVERYWHERE:
            item.add_marker(pytest.mark.once)
    if BACKEND == "jax":
        return
    surplus = [item for item in items if item.get_closest_marker("once")]
    config.hook.pytest_deselected(items=surplus)
    items[:] = [i for i in items if not i.get_closest_marker("once")]
