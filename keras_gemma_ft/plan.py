"""Will it fit, and how fast can it be at most? Needs no weights.

python -m keras_gemma_ft.plan --preset=gemma2_9b_en --device=tpu_v3_8 --compile
    compiles the very train step for a TPU that is not here (pip install
    'keras_gemma_ft[plan]') and reports the compiler's bytes.
python -m keras_gemma_ft.plan --preset=gemma2_2b_en --device=t4 --search
    tries meshes, recomputation, batches and lengths by arithmetic.
"""

import dataclasses
import math
import os

from keras_gemma_ft import config, runtime


def plan(cfg):
    """Returns the plan as a dict; a step that does not fit is a result."""
    from keras_gemma_ft.formats import usage
    from keras_gemma_ft.planning import devices

    cfg = usage.settle(cfg, runtime.say)
    if cfg.compile:
        cfg = _for_compiling(cfg)
    # An unknown name is refused before Keras takes its seconds.
    device = None if cfg.device == "auto" else devices.device(cfg.device)
    backend = runtime.start(cfg)
    # After start: keras reads its backend when it is imported.
    from keras_gemma_ft.planning import report, settling, shapes
    from keras_gemma_ft.tuning import parent

    if device is None:
        device = settling.here(backend)
    elif device.kind == "tpu":
        backend = "jax"
    if cfg.device == "cpu" and cfg.mesh != "auto":
        device = devices.cpu(math.prod(config.mesh(cfg.mesh)))
    settings = shapes.of_preset(cfg.preset)
    cfg = parent.settle(cfg, settings)
    return report.report(cfg, settings, device, backend)


def _for_compiling(cfg):
    """JAX on the CPU, told of no TPU, before anything imports it."""
    from keras_gemma_ft.planning import devices

    if cfg.backend not in ("auto", "jax"):
        raise config.UserError(
            f"--compile asks JAX's compiler; --backend={cfg.backend} has "
            f"none. Drop one of the two."
        )
    os.environ.update(devices.ENVIRONMENT)
    if cfg.device == "cpu" and cfg.mesh != "auto":
        count = math.prod(config.mesh(cfg.mesh))
        flag = f"--xla_force_host_platform_device_count={count}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        os.environ["XLA_FLAGS"] = flags.strip()
    return dataclasses.replace(cfg, backend="jax")


if __name__ == "__main__":
    runtime.main(plan, __doc__)
