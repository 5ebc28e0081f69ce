"""Who trains: `ours`, `stock` and `peft`, each in its own `worker`.

`ours` and `stock` run inside one long Keras `fit`, held at the beginning of
every epoch of `burst` steps: what is timed is the loop that users run. A step
is timed up to where its loss is on the host, in a callback that, like Keras's
own progress bar, does not hold up `fit`.
"""

import math
import time

import numpy as np

from keras_gemma_ft import config, runtime
from keras_gemma_ft.formats import adapters, names
from tests.benchmarks import memory, model

# Few enough that adapters can learn them by heart: the loss must move.
DISTINCT = 4


def lora_settings(spec):
    """`config.Lora` of a spec; alpha = rank, so that the scale is 1."""
    return config.Lora(
        rank=spec["rank"], targets=spec["targets"], style=spec["style"]
    )


def settings(spec):
    """`config.Config` of a spec: what a user would have to type."""
    return config.Config(
        preset=spec["folder"],
        backend=spec["backend"],
        seed=spec["seed"],
        data=config.Data(
            sequence_length=spec["tokens"], batch_size=spec["rows"]
        ),
        lora=lora_settings(spec),
        train=config.Train(
            steps=spec["total"],
            learning_rate=spec["learning_rate"],
            schedule="constant",
            weight_decay=0.0,
            clip_norm=0.0,
        ),
        model=config.Model(dtype=spec["dtype"], remat=spec["remat"]),
    )


def batches(spec):
    """(token_ids, y), int32 [DISTINCT, rows, tokens]."""
    shape = (DISTINCT, spec["rows"], spec["tokens"])
    words = spec["sizes"]["words"]
    ids = model.rows(words, math.prod(shape[:2]), shape[2], seed=spec["seed"])
    return ids[:, :-1].reshape(shape), ids[:, 1:].reshape(shape)


def clocks():
    """Seconds on the wall, and of the process on all cores: [2]."""
    return np.array([time.perf_counter(), time.process_time()])


# --- Keras -------------------------------------------------------------------


def hold(spec, channel):
    """The callback that lets `fit` go on when the parent says so."""
    import keras

    class Hold(keras.callbacks.Callback):
        # Called from a thread once the logs are on the host: `fit` is not
        # made to wait for the device, as it is not in a user's run.
        async_safe = True

        def on_epoch_begin(self, epoch, logs=None):
            channel.wait("step")
            self.begin = clocks()

        def on_train_batch_end(self, batch, logs=None):
            self.end = clocks()

        def on_epoch_end(self, epoch, logs=None):
            turn = (self.end - self.begin) / spec["burst"]
            channel.done(turn, float(logs["loss"]))

    return Hold()


def compiled(trained, batch):
    """The bytes that JAX's compiler plans for a train step."""
    from keras_gemma_ft.planning import program

    used = program.lower(trained, batch).compile().memory_analysis()
    total = used.argument_size_in_bytes + used.temp_size_in_bytes
    return {"compiled_bytes": total}


def fit(spec, channel, trained, *, batch=None, facts=(), **data):
    """Answers `build`; then the one `fit` in which everything happens.

    Args:
        spec: of the worker.
        channel: `worker.Channel`.
        trained: a compiled model.
        batch: function that gives one batch, for the command `compiled`.
        facts: what the answer to `build` says besides.
        data: of `fit`.
    """
    channel.device = memory.device(spec["backend"])
    channel.commands["matmul"] = lambda request: keras_matmul(spec, request)
    channel.commands["compiled"] = lambda r: compiled(trained, batch())
    count = sum(math.prod(v.shape) for v in trained.trainable_variables)
    channel.built(trained=count, **dict(facts))
    trained.fit(
        **data,
        epochs=spec["total"] // spec["burst"],
        steps_per_epoch=spec["burst"],
        callbacks=[hold(spec, channel)],
        shuffle=False,
        verbose=0,
    )
    # The last epoch is answered: `memory` may follow, and `quit`.
    channel.wait("step")


def keras_matmul(spec, request):
    """FLOP/s of a product of the request's shapes."""
    from keras import ops

    a, b = (ops.ones(shape, spec["dtype"]) for shape in request["shapes"])

    def one():
        return ops.convert_to_numpy(ops.matmul(a, b)[:1, :1])

    return rate(one, a, b)


def rate(run, a, b):
    """FLOP/s of `run`, which multiplies a by b; the best of half a second."""
    run()
    best, stop = math.inf, time.perf_counter() + 0.5
    while time.perf_counter() < stop:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    (m, k), n = a.shape, b.shape[1]
    return {"flops_per_s": 2 * m * k * n / best}


def ours(spec, channel):
    """`FineTuner`, made and fitted as `trainer.run` does it."""
    runtime.start(settings(spec))
    from keras_gemma_ft.model import lora, presets
    from keras_gemma_ft.tuning import trainer

    cfg = settings(spec)
    loaded = presets.open(cfg)
    tuner = trainer.build(cfg, loaded, steps=spec["total"], warmup=0)
    if spec["adapter"]:
        # Each backend writes the same.
        adapters.write_peft(spec["adapter"], lora.read(tuner.backbone))
    fit_ours(spec, channel, tuner)


def fit_ours(spec, channel, tuner):
    """`fit` of a `FineTuner`, on batches that are ready."""
    import grain

    from keras_gemma_ft.tuning import feed

    token_ids, y = batches(spec)
    shape = token_ids.shape[1:]
    positions = np.broadcast_to(np.arange(shape[1], dtype="int32"), shape)
    weight = np.full(shape, 1 / math.prod(shape), "float32")

    def batch(i):
        x = {
            "token_ids": token_ids[i % DISTINCT],
            "segment_ids": np.ones(shape, "int32"),
            "positions": positions.copy(),
        }
        return x, y[i % DISTINCT], weight

    data = grain.MapDataset.range(spec["total"]).map(batch)
    # As `pipeline` reads ahead.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    fed = feed.Feed(data.to_iter_dataset(ahead), tuner.meter)
    used = getattr(tuner.blocks, "attention", None)
    facts = {"attention": type(used).__name__} if used else {}
    fit(spec, channel, tuner, batch=lambda: batch(0), facts=facts, x=fed)


def stock_model(spec, start):
    """KerasHub's own `GemmaCausalLM` with LoRA on, compiled.

    Args:
        spec: of the worker.
        start: begin with the numbers that ours of style "keras" begins with.
    """
    from keras_gemma_ft.model import presets

    loaded = presets.load(spec["folder"], dtype=spec["dtype"])
    return with_lora(spec, loaded.causal_lm, start=start)


def with_lora(spec, causal_lm, *, start=False):
    """A stock `GemmaCausalLM` as `stock_model` gives it."""
    import keras

    from keras_gemma_ft.model import lora

    chosen = lora_settings(spec)
    causal_lm.backbone.enable_lora(
        chosen.rank, target_layer_names=list(config.targets(chosen))
    )
    if start:
        causal_lm.backbone.lora = chosen
        first = lora.initial(causal_lm.backbone, seed=spec["seed"])
        lora.write(causal_lm.backbone, first)
    optimizer = keras.optimizers.AdamW(spec["learning_rate"], weight_decay=0.0)
    if spec["dtype"] == "float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    # Its default metric, the accuracy, is work that ours does not do.
    metrics = "auto" if spec.get("accuracy") else None
    causal_lm.compile(optimizer=optimizer, weighted_metrics=metrics)
    return causal_lm


def stock(spec, channel):
    """KerasHub's own `GemmaCausalLM.fit`, from the same arrays."""
    # Ours keeps TensorFlow out where it is not the backend: so here too.
    runtime.start(settings(spec))
    causal_lm = stock_model(spec, start=spec["style"] == "keras")
    fit_stock(spec, channel, causal_lm)


def fit_stock(spec, channel, causal_lm):
    """`fit` of a compiled `GemmaCausalLM`, on batches that are ready."""
    order = np.arange(spec["total"]) % DISTINCT
    token_ids, y = (
        part[order].reshape(-1, spec["tokens"]) for part in batches(spec)
    )
    x = {
        "token_ids": token_ids,
        "padding_mask": np.ones(token_ids.shape, bool),
    }
    whole = x, y, np.ones(y.shape, "float32")

    def batch():
        import keras

        return keras.tree.map_structure(lambda a: a[: spec["rows"]], whole)

    fit(
        spec,
        channel,
        causal_lm,
        batch=batch,
        x=x,
        y=y,
        sample_weight=whole[2],
        batch_size=spec["rows"],
    )


# --- transformers + PEFT -----------------------------------------------------


def peft_model(spec, device):
    """A `PeftModel` in training mode; see `step` for where it starts."""
    import torch
    import transformers

    base = transformers.Gemma2ForCausalLM.from_pretrained(
        spec["folder"],
        dtype=getattr(torch, spec["dtype"]),
        attn_implementation=spec["attention"],
    ).to(device)
    return with_peft(spec, base)


def with_peft(spec, base):
    """A `PeftModel` of a transformers model: see `peft_model`."""
    import peft
    import torch

    # Keys and values of the past are of no use in training.
    base.config.use_cache = False
    if spec["remat"] == "block":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if spec["adapter"]:
        tuned = peft.PeftModel.from_pretrained(
            base, spec["adapter"], is_trainable=True
        )
        return tuned.train()
    torch.manual_seed(spec["seed"])
    modules = [
        names.MODULES[target].rpartition(".")[2]
        for target in config.targets(lora_settings(spec))
    ]
    chosen = peft.LoraConfig(
        r=spec["rank"],
        lora_alpha=spec["rank"],
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, chosen).train()


def torch_matmul(spec, device, request):
    """FLOP/s of a product of the request's shapes."""
    import torch

    kind = getattr(torch, spec["dtype"])
    a, b = (
        torch.ones(*shape, dtype=kind, device=device)
        for shape in request["shapes"]
    )
    return rate(lambda: (a @ b)[0, 0].item(), a, b)


def peft(spec, channel):
    """A plain PyTorch loop, the parts as transformers' Trainer picks them."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fit_peft(spec, channel, peft_model(spec, device), device)


def fit_peft(spec, channel, tuned, device, autocast=False):
    """The loop; with `autocast` products are in 16 bits, as under Trainer."""
    import torch

    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, spec["learning_rate"], weight_decay=0.0, fused=True
    )
    scaler = torch.amp.GradScaler(
        device.type, enabled=spec["dtype"] == "float16"
    )
    channel.device = memory.device("torch")
    channel.commands["matmul"] = lambda r: torch_matmul(spec, device, r)
    channel.built(trained=sum(p.numel() for p in trained))
    data, step = list(zip(*map(torch.tensor, batches(spec)))), 0
    while True:
        channel.wait("step")
        begin, total = clocks(), 0.0
        for _ in range(spec["burst"]):
            ids, y = (part.to(device).long() for part in data[step % DISTINCT])
            # As they are: by itself it would drop a row's last token.
            with torch.autocast(
                device.type, getattr(torch, spec["dtype"]), enabled=autocast
            ):
                loss = tuned(input_ids=ids, labels=y, shift_labels=y).loss
            scaler.scale(loss).backward()
            # Keras adds its epsilon before v is corrected, torch after.
            eps = 1e-7 / (1 - 0.999 ** (step + 1)) ** 0.5
            optimizer.param_groups[0]["eps"] = eps
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            total, step = total + loss.detach(), step + 1
        mean = total.item() / spec["burst"]
        channel.done((clocks() - begin) / spec["burst"], mean)
