"""An epoch of gsm8k: ours packed, ours in length buckets, stock padded.

    python -m tests.benchmarks.end_to_end --backend=jax --data=FILE.jsonl

Real lengths under the embedded tokenizer, a model of random weights. All three
have the same rows a step and the same row length, that of the data's longest
example, to which stock pads every row. The first --rows records are trained on
twice, the contenders in turn, each in a process of its own; the second time is
what counts, and `epoch_s` is extrapolated from it to all records. Prints a
table to stderr, and one line of JSON:

    ratio_packed_stock      time of an epoch, stock's over ours
    ratio_bucketed_stock
    packed, bucketed, stock   seconds of the rows trained on, epoch_s,
        learned_tokens_per_s, places (rows x tokens computed), input_wait
        (share of the time for which the loop waited for data), first_s (the
        time before, compiling included), shapes ({rows x tokens: compilations})

A value is a number, or {backend: number} if several backends were named.
Without the data it says so, and ends well.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np

from keras_gemma_ft import config, embedded, runtime
from keras_gemma_ft.data import pipeline, tokens
from tests.benchmarks import contenders, model
from tests.benchmarks.processes import ROOT, Worker, say, table, tidy

KINDS = ("packed", "bucketed", "stock")
EPOCHS = 2


def flags():
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model.add_flags(parser, model.SMALL)
    add = parser.add_argument
    add("--data", help="records; else shared/data/gsm8k/train.jsonl beside us")
    add("--rows", type=int, default=128, help="records trained on; 0 is all")
    add("--contenders", default=",".join(KINDS))
    add("--batch_size", type=int, default=4)
    add("--tokens", type=int, default=0, help="of a row; 0 is the longest")
    add("--buckets", type=int, default=6)
    return parser


def main():
    """Measures; prints the table and the line."""
    args = flags().parse_args()
    tidy()
    beside = ROOT.parent / "shared/data/gsm8k/train.jsonl"
    path = pathlib.Path(args.data or beside)
    if not path.is_file():
        say(f"nothing measured: no data at {path}; name it with --data")
        print(json.dumps({"skipped": "no data"}))
        return
    lines = path.read_text("utf-8").splitlines(keepends=True)
    # Whole batches only: a last, shorter one would compile again.
    rows = args.rows or len(lines)
    rows = min(rows, len(lines)) // args.batch_size * args.batch_size
    sizes = model.Sizes.of(args)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model.write(folder / "model", sizes, dtype=args.dtype, seed=args.seed)
        some = folder / "some.jsonl"
        some.write_text("".join(lines[:rows]), "utf-8")
        spec = spec_of(args, sizes, folder, longest(args, path))
        found = {
            backend: measure(args, spec | {"backend": backend})
            for backend in args.backend.split(",")
        }
    report(args, found, share=rows / len(lines), tokens=spec["tokens"])


def longest(args, path):
    """Tokens of the longest example, in a multiple of 32."""
    proto = embedded.preset_folder() / "assets/tokenizer/vocabulary.spm"
    data = config.Data(
        train=str(path), eval="none", sequence_length=8192, pack=False,
        cache="none",
    )  # fmt: skip
    tokenizer = tokens.Tokenizer(proto.read_bytes())
    rows = pipeline.prepare(data, tokenizer, "train", 0)
    say(f"{path.name}: {rows.report['records']} records, "
        f"{rows.report['tokens']:,} tokens, the longest {max(rows.lengths)}, "
        f"the mean {rows.lengths.mean():.0f}")  # fmt: skip
    return args.tokens or -(-int(max(rows.lengths)) // 32) * 32


def spec_of(args, sizes, folder, tokens):
    """What all contenders have in common."""
    return vars(args) | {
        "module": "end_to_end",
        "folder": str(folder / "model"),
        "data": str(folder / "some.jsonl"),
        "sizes": vars(sizes),
        "rows": args.batch_size,
        "tokens": tokens,
        "style": "keras",
        "remat": "none",
        "learning_rate": 1e-3,
        "total": 0,
    }


def measure(args, spec):
    """{kind: what was measured}, an epoch of each in turn."""
    workers = {
        kind: Worker(f"{kind} {spec['backend']}", spec | {"kind": kind})
        for kind in args.contenders.split(",")
    }
    found = {kind: {"seconds": [], "notes": []} for kind in workers}
    try:
        for worker in workers.values():
            worker.build()
        for _ in range(EPOCHS):
            for kind, worker in workers.items():
                if answer := worker.attempt("step"):
                    seconds = answer["seconds"] * worker.built["steps"]
                    found[kind]["seconds"].append(seconds)
                    found[kind]["notes"].append(worker.attempt("notes"))
                    say(f"{worker.name}: {seconds:.1f} s")
        for kind, worker in workers.items():
            found[kind] |= {"built": worker.built, "error": worker.error}
    finally:
        for worker in workers.values():
            worker.close()
    return found


def summary(found, share):
    """One contender's numbers."""
    if found["error"]:
        return {"error": found["error"]}
    built, (before, after) = found["built"], found["notes"]
    # The last step of an epoch takes some rows of the next.
    seconds = found["seconds"][-1] * built["epochs_of_steps"]
    waited = None
    if after["waited"] is not None:
        waited = (after["waited"] - before["waited"]) / found["seconds"][-1]
    return {
        "seconds": round(seconds, 3),
        "epoch_s": round(seconds / share, 1),
        "learned_tokens_per_s": round(built["learned"] / seconds, 1),
        "places": built["places"],
        "steps": built["steps"],
        "input_wait": waited,
        "first_s": round(found["seconds"][0], 2),
        "shapes": after["shapes"],
    }


def report(args, found, *, share, tokens):
    """The table on stderr, the line on stdout."""
    keys = ("seconds", "epoch_s", "learned_tokens_per_s", "places", "steps",
            "first_s")  # fmt: skip
    rows, line = [], {}
    for backend, kinds in found.items():
        kinds = {kind: summary(f, share) for kind, f in kinds.items()}
        values = dict(kinds)
        for kind, numbers in kinds.items():
            cells = [numbers.get(key, "") for key in keys]
            cells += [_percent(numbers), len(numbers.get("shapes", ()))]
            rows.append([f"{kind} {backend}", *cells])
            theirs = kinds.get("stock", {})
            if kind != "stock" and "seconds" in numbers and "seconds" in theirs:
                ratio = theirs["seconds"] / numbers["seconds"]
                values[f"ratio_{kind}_stock"] = round(ratio, 3)
        for key, value in values.items():
            line.setdefault(key, {})[backend] = value
    if len(found) == 1:
        line = {key: value.get(*found) for key, value in line.items()}
    table(["", *keys, "waiting", "shapes"], rows)
    line |= {"share_of_epoch": share, "row_tokens": tokens}
    print(json.dumps(line | {"settings": vars(args)}), flush=True)


def _percent(numbers):
    waited = numbers.get("input_wait")
    return "-" if waited is None else f"{waited:.2%}"


# --- in the worker -----------------------------------------------------------


def settings(spec, *, pack):
    """`config.Config` of a spec."""
    import dataclasses

    data = config.Data(
        train=spec["data"],
        eval="none",
        sequence_length=spec["tokens"],
        batch_size=spec["rows"],
        pack=pack,
        buckets=spec["buckets"],
        cache="none",
    )
    return dataclasses.replace(contenders.settings(spec), data=data)


def packed(spec, channel):
    """Ours as it comes."""
    _ours(spec, channel, pack=True)


def bucketed(spec, channel):
    """Ours with --nodata.pack."""
    _ours(spec, channel, pack=False)


def _ours(spec, channel, *, pack):
    cfg = settings(spec, pack=pack)
    runtime.start(cfg)
    from keras_gemma_ft.model import presets
    from keras_gemma_ft.tuning import feed, job, trainer

    loaded = presets.open(cfg)
    work = job.Job.prepare(cfg, loaded)
    steps = work.steps_per_epoch
    tuner = trainer.build(cfg, loaded, steps=EPOCHS * steps, warmup=0)
    batches = feed.Feed(work.batches(0, EPOCHS * steps), tuner.meter)
    widths = [y.shape[1] for _, y, _ in work.batches(0, steps)]
    _serve(spec, channel, tuner, tuner.meter, work.rows, widths, x=batches)


def stock(spec, channel):
    """KerasHub's own `fit`, every row padded to the longest."""
    cfg = settings(spec, pack=False)
    runtime.start(cfg)
    from keras_gemma_ft.data.tokens import Tokenizer
    from keras_gemma_ft.tuning import feed

    causal_lm = contenders.stock_model(spec, start=True)
    meter, train_step = feed.Meter(), causal_lm.train_step

    def noted(*arguments):
        meter.note("train", arguments[-1])
        return train_step(*arguments)

    causal_lm.train_step = noted
    # It does not say how long it waits.
    meter.seconds = None
    proto = pathlib.Path(spec["folder"], "tokenizer.model").read_bytes()
    rows = pipeline.prepare(cfg.data, Tokenizer(proto), "train", spec["seed"])
    count = len(rows.lengths)
    x, y, weight = rows.batch(np.arange(count), spec["tokens"])
    mask = x["segment_ids"] > 0
    twice = np.tile(np.arange(count), EPOCHS)
    _serve(
        spec,
        channel,
        causal_lm,
        meter,
        rows,
        [spec["tokens"]] * (count // spec["rows"]),
        x={"token_ids": x["token_ids"][twice], "padding_mask": mask[twice]},
        y=y[twice],
        sample_weight=weight[twice],
        batch_size=spec["rows"],
    )


def _serve(spec, channel, trained, meter, rows, widths, **data):
    """`contenders.fit`, an epoch a turn, and what the rows are."""
    steps, count = len(widths), len(rows.lengths)
    spec = spec | {"burst": steps, "total": EPOCHS * steps}

    def notes(request):
        found = meter.compilations("train")
        shapes = {"x".join(map(str, key)): n for key, n in found.items()}
        return {"waited": meter.seconds, "shapes": shapes}

    channel.commands["notes"] = notes
    contenders.fit(
        spec,
        channel,
        trained,
        facts={
            "steps": steps,
            "epochs_of_steps": count / (steps * spec["rows"]),
            "learned": int(rows.learned.sum()),
            "places": int(sum(widths)) * spec["rows"],
        },
        **data,
    )


if __name__ == "__main__":
    main()
