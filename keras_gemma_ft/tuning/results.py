"""What a run leaves behind: before and after, adapters, summary."""

import time

import keras

from keras_gemma_ft import runtime
from keras_gemma_ft.formats import adapters, atomic, usage
from keras_gemma_ft.model import hosts, lora, presets
from keras_gemma_ft.tuning import room


def summary(cfg, tuner, clock, backend, began):
    """The facts of a run whose training has ended, for summary.json.

    It also says what the training step was compiled for.
    """
    facts = {
        "status": "done",
        "backend": backend,
        "device": device(backend),
        "preset": cfg.preset,
        "run_dir": cfg.run_dir,
        "steps": tuner.step,
        "tokens": clock.tokens(tuner.step)[1],
        "seconds": round(time.monotonic() - began, 2),
        "peak_memory_bytes": runtime.peak_memory_bytes(),
        "trainable_parameters": tuner.trainable_count(),
    }
    if peak := device_peak_bytes(backend):
        facts["peak_device_memory_bytes"] = peak
    if hosts.many():
        facts["hosts"] = hosts.count()
    if clock.losses:
        facts["train_loss"] = clock.losses[-1]
        facts["tokens_per_s"] = round(clock.row_tokens / clock.seconds, 1)
        facts["train_seconds"] = round(clock.seconds, 2)
        facts["input_wait"] = round(clock.waited / clock.seconds, 5)
        compiled = tuner.meter.compilations("train")
        facts["compiled_shapes"] = sum(compiled.values())
        _say_batches(facts, tuner.meter)
    return facts


def _say_batches(facts, meter):
    """Says how often the step was compiled, and how long batches were late."""
    shapes = meter.compilations("train")
    listed = ", ".join(f"{rows}x{tokens}" for rows, tokens in shapes)
    count = facts["compiled_shapes"]
    compiled = f"{count} compilation{'s' * (count > 1)}, "
    if keras.config.backend() == "torch" and not meter.blocks:
        compiled = ""
    runtime.say(
        f"training step: {compiled}batches of {listed} (rows x tokens); "
        f"{facts['input_wait']:.2%} of the time went by waiting for them"
    )


def device(backend):
    """The accelerator's name as the backend says it, or 'cpu'."""
    if backend == "jax":
        import jax

        found = jax.devices()
        return f"{len(found)} x {found[0].device_kind}"
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return f"{hosts.count()} x {torch.cuda.get_device_name(0)}"
        return "cpu"
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    return f"{len(found)} x GPU" if found else "cpu"


def device_peak_bytes(backend):
    """The most bytes that this process had on its device; 0 on a CPU."""
    if backend == "jax":
        import jax

        told = jax.local_devices()[0].memory_stats() or {}
        return told.get("peak_bytes_in_use", 0)
    if backend == "torch":
        import torch

        # 0 where CUDA was never started.
        return torch.cuda.max_memory_allocated()
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        return 0
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def finish(cfg, folder, tuner, job, before, after, facts):
    """Writes samples, adapters (or the model) and summary.json."""
    for name in ("eval_loss", "exact_match"):
        if name in after:
            facts[f"{name}_before"] = before.get(name)
            facts[name] = after[name]
    samples = [
        {
            "prompt": job.tokenizer.decode(prompt.prompt_ids),
            "reference": prompt.reference,
            "before": first,
            "after": second,
        }
        for prompt, first, second in zip(
            (job.held_out or job.rows).prompts,
            before["answers"],
            after["answers"],
        )
    ]
    folder.write_lines("samples.jsonl", samples)
    show(samples)
    if cfg.lora.rank:
        if hosts.first():
            write_adapters(folder.path, tuner.backbone, job.usage)
    else:
        hosts.fetch(tuner.backbone.variables)
        if hosts.first():
            wanted = room.size(tuner.backbone.variables)
            with atomic.replacing(folder.path / "model", wanted) as partial:
                presets.save(partial, tuner.backbone, job.tokenizer)
                usage.write(partial, job.usage)
    folder.write("summary.json", facts)
    runtime.say(f"all of it is in {folder.path}")


def write_adapters(path, backbone, travels=None):
    """adapter/ (PEFT) and adapter.lora.h5 (stock KerasHub).

    Args:
        path: the folder for both.
        backbone: with LoRA.
        travels: `usage.Usage` that is written beside the PEFT files.
    """
    adapter = lora.read(backbone)
    adapters.write_peft(path / "adapter", adapter, usage=travels)
    index = adapters.layer_index(backbone.num_layers)
    adapters.write_keras(path / "adapter.lora.h5", adapter, index)


def show(samples):
    """Shows the answers from before and after to the person who watches."""
    for sample in samples:
        runtime.say(
            f"prompt  {sample['prompt'].strip()!r}\n"
            f"          wanted  {sample['reference']!r}\n"
            f"          before  {sample['before'][:160]!r}\n"
            f"          after   {sample['after'][:160]!r}"
        )
