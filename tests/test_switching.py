"""Adapters that take turns on one base answer as each does alone."""

import dataclasses
import io
import json
import re

import keras
import numpy as np
import pytest
from test_run import settings, workshop  # noqa: F401

from keras_gemma_ft import config, evaluate, generate, runtime
from keras_gemma_ft.formats import adapters, names, usage
from keras_gemma_ft.inference import chat, switching
from keras_gemma_ft.model import lora, presets

PROMPTS = ["Set a timer for ten minutes", "Lights off, and the radio too"]
WAY = {"data.system": "Answer in verse.", "data.sequence_length": 96}


def adapter(kernels, style, rank, alpha, targets, seed, rslora=False, layers=2):
    rng = np.random.default_rng(seed)
    weights = {
        (layer, target): tuple(
            rng.normal(0, 0.3, shape).astype("float32")
            for shape in adapters.pair_shapes(
                style, target, kernels[target], rank
            )
        )
        for layer in range(layers)
        for target in targets
    }
    return adapters.Adapter(
        style, rank, alpha, rslora, 0.0, targets, weights, "tiny"
    )


def export(folder, made, preset, **values):
    """Writes an adapter with what travels; `values` are of its own way."""
    own = {"data.sequence_length": 96, "preset": str(preset), **values}
    told = usage.describe(
        config.replace(config.Config(), own),
        base={"preset": str(preset), "dtype": "float32"},
        trained=dict.fromkeys(("layout", "quantize", "quantize_embedding")),
        when="",
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    adapters.write_peft(folder, made, usage=told)
    return str(folder)


@pytest.fixture(scope="module")
def held(workshop, tmp_path_factory):  # noqa: F811
    """{name: path} of a run, a PEFT folder and one that lacks layers."""
    backbone = presets.load(str(workshop / "preset")).causal_lm.backbone
    kernels = names.kernel_shapes(backbone.get_config())
    folder, preset = tmp_path_factory.mktemp("held"), workshop / "preset"
    first = adapter(kernels, "keras", 2, 3.0, ("query", "value"), 1, True)
    every = adapter(kernels, "standard", 3, 6.0, config.TARGETS, 2)
    part = adapter(kernels, "standard", 1, 0.5, ("key", "ffw_linear"), 3)
    del part.weights[0, "key"], part.weights[0, "ffw_linear"]
    return {
        "mine": export(folder / "mine/adapter", first, preset),
        "verse": export(folder / "verse", every, preset, **WAY),
        "part": export(folder / "part", part, preset),
    }


@pytest.fixture
def cfg(workshop, held, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runtime, "start", lambda cfg: keras.config.backend())
    cfg = settings(workshop, "unused", generate__max_new_tokens=8)
    values = {
        "adapter": ",".join(held.values()),
        "data.eval": str(workshop / "eval.jsonl"),
        "train.exact_match": 6,
    }
    cfg = config.replace(cfg, values)
    typed = {"preset", "data.eval", "train.exact_match"}
    return dataclasses.replace(cfg, given=frozenset(typed))


def test_each_answers_as_it_does_alone(cfg, held, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    cfg = config.replace(cfg, {"generate.prompt_file": str(file)})
    found = generate.generate(cfg)
    answers = found["completions"]
    assert 0 < found["switch_ms"] < 5000
    alone = []
    for name, path in held.items():
        own = generate.generate(config.replace(cfg, {"adapter": path}))
        assert list(own) == ["completions"]
        alone += [{**answer, "adapter": name} for answer in own["completions"]]
    assert answers == alone
    said = {(a["prompt"], a["completion"]) for a in answers}
    assert len(said) == len(answers), "each has words of its own"


def test_each_scores_as_it_does_alone(cfg, held, capfd):
    found = evaluate.evaluate(cfg)
    assert list(found) == ["preset", "base", "adapters", "switch_ms"]
    assert list(found["adapters"]) == list(held)
    told = capfd.readouterr().err
    for name in held:
        assert re.search(rf"adapter: {name}, switched to in [\d.]+ ms", told)
    losses = set()
    for name, path in held.items():
        own = evaluate.evaluate(config.replace(cfg, {"adapter": path}))
        assert list(own) == ["preset", "base", "adapter"]
        assert own["adapter"].keys() == found["adapters"][name].keys()
        for key, value in own["adapter"].items():
            got = found["adapters"][name][key]
            assert got == pytest.approx(value, rel=1e-6), (name, key)
        losses.add(round(own["adapter"]["eval_loss"], 4))
        if name == "mine":
            assert found["base"] == pytest.approx(own["base"], rel=1e-6)
            losses.add(round(own["base"]["eval_loss"], 4))
    assert len(losses) == 4


@pytest.fixture
def session(cfg):
    return chat.load(cfg)


def logits(session, ids):
    session.generator.choose = lambda scores, best: kept.append(scores) or best
    kept = []
    session.generator.complete([ids], limit=1)
    return keras.ops.convert_to_numpy(kept[0])


def test_a_turn_changes_the_numbers_and_compiles_nothing(session, cfg, held):
    ids = session.ids(PROMPTS[0])
    turns = session.several.adapters
    assert turns.names == list(held) and turns.base == "preset"
    compiled = []
    if keras.config.backend() == "jax":
        import jax

        def note(name, seconds, **more):
            if "backend_compile" in name:
                compiled.append(name)

        jax.monitoring.register_event_duration_secs_listener(note)
    first, counts = {}, []
    for name in [*held, "preset"] * 2:
        session.use(name)
        found = logits(session, ids)
        assert np.array_equal(first.setdefault(name, found), found), name
        counts.append(len(compiled))
    # JAX converts and compiles at first; from the second turn on, nothing.
    assert counts[-1] == counts[1]
    assert counts[-1] or keras.config.backend() != "jax"
    for name, path in {**held, "preset": None}.items():
        alone = presets.load(cfg.preset)
        if path:
            lora.load(alone.causal_lm.backbone, path)
        want = logits(chat.Session(alone, cfg), ids)
        np.testing.assert_allclose(first[name], want, rtol=1e-5, atol=1e-5)
    spread = np.ptp([*first.values()], 0).max(-1)
    assert (spread > 1e-2).all()


def test_one_form_of_equal_styles_and_scales_keeps_both(held, workshop):  # noqa: F811
    backbone = presets.load(str(workshop / "preset")).causal_lm.backbone
    kernels = names.kernel_shapes(backbone.get_config())
    made = {
        "a": adapter(kernels, "keras", 2, 3.0, ("query",), 1),
        "b": adapter(kernels, "keras", 4, 6.0, ("key", "query"), 2),
    }
    turns = switching.Adapters(backbone, made, base="base")
    assert backbone.lora == config.Lora(
        rank=4, alpha=6.0, targets="query,key", style="keras", dropout=0.0
    )
    for name in ("b", "a"):
        turns.use(name)
        for key, pair in lora.variables(backbone).items():
            want = made[name].weights.get(key)
            for variable, value in zip(pair, want or (0.0, 0.0)):
                got = keras.ops.convert_to_numpy(variable.value)
                if want:
                    cut = [slice(0, n) for n in value.shape]
                    np.testing.assert_array_equal(got[tuple(cut)], value)
                    got = got.copy()
                    got[tuple(cut)] = 0
                assert not got.any()
    turns.use("base")
    assert not any(
        keras.ops.convert_to_numpy(v.value).any()
        for pair in lora.variables(backbone).values()
        for v in pair
    )


def test_a_chat_switches_and_asks_each_in_its_way(session, capfd):
    asked = []
    complete = session.generator.complete

    def note(prompts, **more):
        asked.append(session.tokenizer.decode(prompts[0]))
        return complete(prompts, **more)

    session.generator.complete = note
    lines = "Hi\n/adapter verse\nGo on\n/adapter none\n/adapters\n"
    said = session.talk(io.StringIO(lines))
    assert [answer["adapter"] for answer in said] == ["mine", "verse", "verse"]
    # No command but a word that begins like one.
    assert [answer["prompt"] for answer in said] == ["Hi", "Go on", "/adapters"]
    assert ["Answer in verse." in text for text in asked] == [False, True, True]
    assert "Hi" in asked[1] and said[0]["completion"].strip() in asked[1]
    told = capfd.readouterr().err
    line = "/adapter NAME asks another of mine, verse, part, preset"
    assert told.count(line) == 2 and "verse, switched to in" in told


def test_a_comma_splits_where_no_such_path_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    assert switching.paths("a,b") == ["a,b"]
    assert switching.paths("a,c , a,") == ["a", "c"]
    assert switching.paths("") == [] and not switching.several("a,b")
    assert switching.several("a,c")
    found = ["runs/x", "runs/x/adapter", "other/x.lora.h5", "./base", "y"]
    assert list(switching.named(found, "base")) == [
        "x", "x-2", "x-3", "base-2", "y",
    ]  # fmt: skip
    assert switching.base_name("hf://google/gemma-2-2b") == (
        "hf://google/gemma-2-2b"
    )
    assert switching.base_name("some/where/mine/") == "mine"


def test_bases_that_differ_are_refused_and_named(cfg, held, tmp_path):
    made = adapters.read(
        held["verse"], presets.load(cfg.preset).causal_lm.backbone.get_config()
    )
    other = export(
        tmp_path / "other", made, "gemma2_2b_en", **{"model.quantize": "nf4"}
    )
    free = dataclasses.replace(cfg, given=frozenset())
    free = config.replace(free, {"adapter": f"{held['mine']},{other}"})
    with pytest.raises(config.UserError) as caught:
        switching.load(free)
    told = str(caught.value)
    for words in (
        f"{held['mine']}: --preset={cfg.preset}\n",
        f"{other}: --preset=gemma2_2b_en --model.quantize=nf4\n",
        "are for different bases",
    ):
        assert words in told, told
    # What is typed is for all of them.
    typed = frozenset({"preset", "model.quantize"})
    ways, _, turns = switching.load(dataclasses.replace(free, given=typed))
    assert turns.names == ["mine", "other"]
    assert {own.preset for own in ways.values()} == {cfg.preset}


def test_the_same_name_with_other_weights_is_another_base(cfg, held, tmp_path):
    paths = []
    for sha in ("a" * 64, "b" * 64):
        made = adapters.read_peft(held["verse"])
        folder = tmp_path / sha[0]
        paths.append(export(folder, made, cfg.preset))
        told = json.loads((folder / usage.FILE).read_text())
        told["base"].update(sha256=sha, dtype="float32")
        (folder / usage.FILE).write_text(json.dumps(told))
    free = dataclasses.replace(cfg, given=frozenset())
    with pytest.raises(config.UserError, match="weights aaaaaaaaaaaa\\)"):
        switching.load(config.replace(free, {"adapter": ",".join(paths)}))
    paths[1] = held["part"]
    switching.load(config.replace(free, {"adapter": ",".join(paths)}))


def test_every_path_without_an_adapter_is_told(cfg, tmp_path):
    free = config.replace(cfg, {"adapter": f"{tmp_path}/x,{tmp_path}/y"})
    with pytest.raises(config.UserError) as caught:
        switching.load(free)
    for name in "xy":
        assert f"There is no adapter at {tmp_path}/{name}" in str(caught.value)


def test_one_set_of_records_is_scored_on(cfg, held, tmp_path):
    """Runs name their records in config.json, as a run folder has it."""
    made = adapters.read_peft(held["verse"])

    def run(name, **values):
        folder = tmp_path / name
        export(folder / "adapter", made, cfg.preset)
        values = {"data.train": "demo:train", "data.eval": "5%", **values}
        (folder / "config.json").write_text(json.dumps({"settings": values}))
        return str(folder)

    free = dataclasses.replace(cfg, given=frozenset())
    free = config.replace(free, {"data.eval": "auto"})

    def load(*paths):
        found = config.replace(free, {"adapter": ",".join(paths)})
        return switching.load(found, records=True).ways

    one, two = run("one", seed=1), run("two", seed=2)
    with pytest.raises(config.UserError) as caught:
        load(one, two)
    told = str(caught.value)
    assert f"{one}: --data.train=demo:train --data.eval=5% --seed=1" in told
    assert "--data.eval=FILE" in told
    # An adapter that names no records is scored on the run's.
    ways = load(held["mine"], one)
    assert {own.data.eval for own in ways.values()} == {"5%"}
    assert {own.seed for own in ways.values()} == {1}
    three, four = (run(n, **{"data.eval": "x", "seed": 3}) for n in "34")
    assert {own.data.eval for own in load(three, four).values()} == {"x"}
