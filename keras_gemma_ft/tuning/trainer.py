"""The one trainer: a run, from its settings to what it leaves behind.

`build` puts together the model and what trains it; `run` is the whole run.
"""

import math
import signal
import time

from keras_gemma_ft import config, runtime
from keras_gemma_ft.data import examples, pipeline, sources
from keras_gemma_ft.inference import evaluation, taught
from keras_gemma_ft.model import (
    base_template,
    compiled,
    decoder_block,
    hosts,
    kernels,
    lora,
    lora_init,
    presets,
    quantize,
)
from keras_gemma_ft.tuning import (
    callbacks,
    checkpoint,
    feed,
    fine_tuner,
    identity,
    optimizer,
    parent,
    results,
    room,
    run_folder,
    trackers,
)
from keras_gemma_ft.tuning.job import Job


def build(cfg, loaded, *, steps, warmup, start=None, adapter=None):
    """Adapters, optimizer and `FineTuner` for `cfg`, compiled.

    Args:
        cfg: `config.Config`.
        loaded: `presets.Loaded`.
        steps, warmup: optimizer steps of the schedule.
        start: the file that keeps where the adapters started, if they start
            from the kernels.
        adapter: `formats.adapters.Adapter` whose values they start with.
    """
    backbone = loaded.causal_lm.backbone
    if cfg.lora.rank:
        lora.enable(backbone, cfg.lora, seed=cfg.seed)
        if adapter:
            lora.write(backbone, adapter)
        lora_init.apply(backbone, cfg.model.quantize, seed=cfg.seed, kept=start)
    # Of a model that `presets.open` has not loaded, such as the planner's.
    quantize.apply(
        backbone,
        lora.layers(backbone),
        cfg.model.quantize,
        cfg.model.quantize_embedding,
    )
    _, accumulation = pipeline.micro_batches(
        cfg.data.batch_size, cfg.data.micro_batch_size
    )
    tuner = fine_tuner.FineTuner(
        loaded.causal_lm,
        accumulation=accumulation,
        recompute=recompute(cfg, backbone),
        scan=scan(cfg, backbone),
        blocks=blocks(cfg, backbone),
        chunk=cfg.train.loss_chunk,
        seed=cfg.seed,
    )
    tuner.compile(
        optimizer=optimizer.build(
            cfg.train,
            tuner.trainable_variables,
            steps=steps,
            warmup=warmup,
            accumulation=accumulation,
            float16=backbone.compute_dtype == "float16",
            layers=tuner.layers_named,
        )
    )
    return tuner


def recompute(cfg, backbone):
    """`--model.remat`: auto recomputes from 500 M parameters on."""
    if cfg.model.remat == "auto":
        return backbone.count_params() > 5e8
    return cfg.model.remat == "block"


def scan(cfg, backbone):
    """`--model.scan`: auto is a loop from 16 blocks on (2B has 26).

    On a GPU only of recomputed blocks: XLA's program of 2B at 4 x 1024 moves
    251 GB with a loop, which copies weights and what it keeps, else 180.
    """
    if cfg.model.scan == "auto":
        loop = recompute(cfg, backbone) or not kernels.on_gpu()
        return loop and backbone.num_layers >= 16
    return cfg.model.scan == "on"


def blocks(cfg, backbone):
    """`--model.compile`: `compiled.Blocks` of a decoder; None without."""
    yes, why = compiled.wanted(cfg.model.compile)
    if not yes:
        return None
    runtime.say(f"decoder blocks: compiled ({why})")
    return compiled.Blocks(
        backbone,
        query_scale=decoder_block.query_scale(backbone),
        residual=decoder_block.residual_dtype(backbone),
        recompute=recompute(cfg, backbone),
    )


def run(cfg, backend):
    """A whole run: what `python -m keras_gemma_ft.train` does.

    Args:
        cfg: `config.Config`.
        backend: the backend's name, for the record.

    Returns:
        The result: what summary.json holds.

    Raises:
        config.UserError: see the message.
        runtime.Stopped: time was up, SIGTERM came, or the disk is full; run
            again to go on.
    """
    began = time.monotonic()
    hosts.start(cfg)
    # A mistyped path should not wait for 18 GB of weights.
    with hosts.agreed():
        trackers.named(cfg.train.trackers)
        for split in ("train", "eval"):
            if spec := examples.spec(cfg.data, split):
                sources.names(spec)
    folder = run_folder.RunFolder(cfg.run_dir)
    with room.needed(folder.path), folder.locked():
        cfg, loaded, origin, job = _load(cfg)
        description = identity.describe(
            cfg, backend, loaded, job, origin.sha256
        )
        resumed = folder.open(description, resume=cfg.resume)
        summary = folder.read("summary.json")
        if resumed and summary and summary["status"] == "done":
            runtime.say(f"{folder.path} is a finished run; --noresume repeats")
            return summary
        job.show_proof()
        tuner = build(
            cfg,
            loaded,
            steps=job.steps,
            warmup=job.warmup,
            start=folder.path / "start.safetensors",
            adapter=origin.adapter,
        )
        runtime.say(
            f"training {tuner.trainable_count():,} parameters "
            f"for {job.steps} steps"
        )
        with trackers.following(cfg, folder):
            return _train(cfg, folder, job, tuner, began, backend)


def _load(cfg):
    """(`cfg` with the base's template, `Loaded`, `Parent`, `Job`)."""
    with hosts.agreed():
        loaded = presets.open(cfg, full=not cfg.lora.rank)
        cfg = base_template.settle(cfg, loaded.tokenizer)
        taught.say_doubt(cfg, loaded)
        origin = parent.read(cfg, loaded.causal_lm.backbone.get_config())
        return cfg, loaded, origin, Job.prepare(cfg, loaded, origin.chain)


def _train(cfg, folder, job, tuner, began, backend):
    """Before, fit, after, exports, summary."""
    judge = evaluation.Judge(cfg, tuner, job.tokenizer, job.held_out, job.rows)
    found = checkpoint.newest(folder.path) if cfg.resume else None
    facts = {}
    if found:
        path, facts = found
        # Also over an adapter that the run has gone on from.
        checkpoint.restore(path, tuner)
        tuner.step = facts["step"]
        runtime.say(f"continuing at step {tuner.step} of {job.steps}")
    if tuner.step < job.steps:
        room.check(folder.path, tuner)
    folder.rewind(tuner.step)
    before = folder.read("before.json")
    if before is None or not found:
        before = judge.judge("before")
        folder.write("before.json", before)
    clock, evaluate = _fit(cfg, folder, job, tuner, judge, facts, began)
    summary = results.summary(cfg, tuner, clock, backend, began)
    folder.draw()
    if tuner.stopped:
        _stop(folder, tuner, summary)
    if evaluate and math.isfinite(evaluate.best["eval_loss"]):
        if evaluate.best["step"] != tuner.step:
            callbacks.load_best(folder, tuner)
        summary["best_step"] = evaluate.best["step"]
    after = judge.judge("after")
    results.finish(cfg, folder, tuner, job, before, after, summary)
    # Also waits for process 0 to have written all.
    return hosts.gather(summary)[0]


def _stop(folder, tuner, summary):
    """Ends a run early: resumable, or refused where the loss is NaN."""
    if not math.isfinite(tuner.last_loss):
        raise config.UserError(
            f"{tuner.stopped} near step {tuner.step}; not finite at first: "
            f"{tuner.overflows().first() or 'the loss, behind all blocks'}. "
            f"Try a lower --train.learning_rate, or --model.dtype=float32. "
            f"The last good checkpoint stays in {folder.path}."
        )
    summary["status"] = "stopped"
    folder.write("summary.json", summary)
    summary = hosts.gather(summary)[0]
    raise runtime.Stopped(
        f"{tuner.stopped} at step {tuner.step}. The same command goes on.",
        summary,
    )


def _fit(cfg, folder, job, tuner, judge, facts, began):
    """Runs `fit` from `tuner.step` to the end; returns (clock, evaluate)."""
    train = cfg.train
    window = min(max(1, job.duration(train.log_every)), job.steps)
    clock = callbacks.Clock(
        folder, job.token_counter(), steps=job.steps, start=tuner.step
    )
    evaluate = None
    if job.held_out is not None and job.duration(train.eval_every):
        evaluate = callbacks.Evaluate(
            folder,
            *judge.batches(),
            every=job.duration(train.eval_every),
            steps=job.steps,
            patience=train.patience,
            best=facts.get("best"),
        )
    limit = config.seconds(train.time_budget)
    keeper = callbacks.Checkpoint(
        folder,
        every=job.duration(train.checkpoint_every),
        steps=job.steps,
        keep=train.keep_checkpoints,
        deadline=None if limit is None else began + limit,
        facts=lambda: {"best": evaluate.best} if evaluate else {},
    )
    calls = [clock, callbacks.StopOnNaN(), evaluate, keeper]
    calls = [call for call in calls if call is not None]

    def terminate(number, frame):
        keeper.terminated = signal.Signals(number).name
        runtime.say(f"{keeper.terminated}: stopping within {window} steps")
        # A second Ctrl-C stops at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {
        number: signal.signal(number, terminate)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        whole, rest = divmod(job.steps - tuner.step, window)
        for count, size in ((whole, window), (1, rest)):
            if count * size and not tuner.stop_training:
                tuner.fit(
                    feed.Feed(
                        job.batches(tuner.step, count * size), tuner.meter
                    ),
                    epochs=count,
                    steps_per_epoch=size * tuner.accumulation,
                    callbacks=calls,
                    shuffle=False,
                    verbose=0,
                )
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        clock.bar.close()
    return clock, evaluate
