"""`serve` as OpenAI's own client sees it, on the embedded model."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.request

import keras
import openai
import pytest
from test_switching import adapter, export

from keras_gemma_ft import config, runtime, serve
from keras_gemma_ft.formats import names
from keras_gemma_ft.inference import chat, sampling
from keras_gemma_ft.model import presets
from keras_gemma_ft.runtime import packages
from keras_gemma_ft.serving import listening, requests, text

BACKEND = keras.config.backend()
BASE = config.EMBEDDED_PRESET
KEY = "sk-nobody-may-see-this"
ASKED = "Set a timer for ten minutes"
HARD = "Is <end_of_turn> a word, or 日本🙂?"
LIMIT = 10
FLAGS = {
    "generate.max_new_tokens": 32, "serve.context": 3000, "serve.queue": 2
}  # fmt: skip


def ask(content):
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """{name: path} of two adapters of the embedded model."""
    backbone = presets.load(BASE).causal_lm.backbone
    kernels = names.kernel_shapes(backbone.get_config())
    folder = tmp_path_factory.mktemp("served")

    def make(style, rank, targets, seed):
        return adapter(
            kernels, style, rank, 1.0, targets, seed, layers=backbone.num_layers
        )

    one = make("keras", 2, ("query", "value"), 1)
    two = make("standard", 3, ("key", "ffw_gating", "ffw_linear"), 2)
    return {
        "one": export(folder / "one", one, BASE),
        "two": export(
            folder / "two/adapter", two, BASE, **{"data.system": "In verse."}
        ),
    }


class Server:
    """A started `serve`: its client, and what it has said so far."""

    def __init__(self, process):
        self.process, self.lines = process, []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.url = self.said(r"at (http://127\.0\.0\.1:\d+/v1); Ctrl-C")[1]
        self.client = openai.OpenAI(
            base_url=self.url, api_key=KEY, max_retries=0, timeout=120
        )

    def _read(self):
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def said(self, pattern, seconds=120):
        """The match of a line of stderr, waited for."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.reader.is_alive():
            if match := re.search(pattern, "".join(self.lines)):
                return match
            time.sleep(0.02)
        raise AssertionError(f"not said: {pattern}\n{''.join(self.lines)}")

    def ask(self, content=ASKED, **more):
        more = {"model": "one", "max_tokens": LIMIT, **more}
        return self.client.chat.completions.create(
            messages=ask(content), **more
        )

    def endless(self, **more):
        """A stream that ends by the limit alone, some minutes later."""
        return self.ask(
            temperature=50, seed=1, max_tokens=2800, stream=True, **more
        )


@pytest.fixture(scope="module")
def server(held):
    argv = [f"--{name}={value}" for name, value in FLAGS.items()]
    argv += [f"--adapter={','.join(held.values())}", "--serve.port=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "keras_gemma_ft.serve", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "KERAS_BACKEND": BACKEND},
    )
    try:
        yield Server(process)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def alone(held):
    """Function of a name: a session of it as `generate` makes it."""

    @contextlib.contextmanager
    def quiet():
        runtime.say.quiet = True
        yield
        runtime.say.quiet = False

    def load(name):
        values = {"generate.max_new_tokens": LIMIT}
        if name in held:
            values["adapter"] = held[name]
        with quiet():
            return chat.load(config.replace(config.Config(), values))

    return load


def test_the_models_are_the_adapters_and_their_base(server):
    listed = list(server.client.models.list())
    assert [model.id for model in listed] == ["one", "two", BASE]
    assert [getattr(m, "parent", None) for m in listed] == [BASE, BASE, None]
    assert server.client.models.retrieve("two").owned_by == "keras_gemma_ft"
    with pytest.raises(openai.NotFoundError, match="one, two, gemma2_tiny_en"):
        server.client.models.retrieve("gpt-4")


def test_each_model_answers_as_generate_does(server, alone):
    said = set()
    for name in ("two", BASE, "one", "two"):
        session = alone(name)
        for content in (ASKED, HARD):
            if name == BASE:
                # The base is asked as the first adapter is.
                session.system = ""
            [want] = session.answer([content])
            found = server.ask(content, model=name)
            choice = found.choices[0]
            assert choice.message.content == want["completion"], name
            assert choice.message.role == "assistant"
            usage = found.usage
            ids = session.ids(content)
            words = session.generator.complete([ids])[0]
            assert usage.prompt_tokens == len(ids)
            assert usage.completion_tokens == len(words)
            assert usage.total_tokens == len(ids) + len(words)
            reason = "length" if len(words) == LIMIT else "stop"
            assert choice.finish_reason == reason
            assert found.model == name
            said.add(want["completion"])
    assert len(said) == 6
    # A conversation, with a system text of its own.
    turns = [
        {"role": "developer", "content": "Be brief."},
        *ask([{"type": "text", "text": "Hi"}]),
        {"role": "assistant", "content": "Hello."},
        *ask("Lights off"),
    ]
    found = server.client.chat.completions.create(
        model="two", messages=turns, max_tokens=LIMIT, temperature=0
    )
    ids = session.ids(turns)
    assert found.usage.prompt_tokens == len(ids)
    words = session.generator.complete([ids])[0]
    assert found.choices[0].message.content == session.tokenizer.decode(words)
    session.settings = config.Generate(raw=True, max_new_tokens=LIMIT)
    [want] = session.answer(["Once upon a"])
    raw = server.client.completions.create(
        model="two", prompt="Once upon a", max_tokens=LIMIT
    )
    assert raw.choices[0].text == want["completion"]
    assert raw.object == "text_completion"


def test_a_stream_adds_up_to_the_answer(server):
    whole = server.ask()
    parts = list(
        server.ask(stream=True, stream_options={"include_usage": True})
    )
    *pieces, last, usage = parts
    assert {part.id for part in parts} == {parts[0].id}
    assert {part.object for part in parts} == {"chat.completion.chunk"}
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content for part in pieces)
    assert text == whole.choices[0].message.content and len(pieces) > 1
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.usage == whole.usage and not usage.choices
    raw = server.client.completions.create(
        model="one", prompt="Once", max_tokens=4, stream=True
    )
    parts = list(raw)
    assert parts[-1].choices[0].finish_reason == "length"
    raw = server.client.completions.create(
        model="one", prompt=["Once"], max_tokens=4
    )
    text = "".join(part.choices[0].text for part in parts)
    assert text == raw.choices[0].text != ""


def test_an_answer_ends_before_a_stop_text(server):
    whole = server.ask().choices[0].message.content
    # It begins and ends within words of the answer.
    at = len(whole) // 3
    stop = whole[at : at + 3]
    for stream in (False, True):
        found = server.ask(stop=["never said", stop], stream=stream)
        if stream:
            *pieces, last = found
            text = "".join(p.choices[0].delta.content for p in pieces)
            reason = last.choices[0].finish_reason
        else:
            text = found.choices[0].message.content
            reason = found.choices[0].finish_reason
        assert text == whole[: whole.index(stop)]
        assert reason == "stop"


def test_chance_is_the_requests(server):
    def said(**more):
        return server.ask(**more).choices[0].message.content

    greedy = said()
    assert said(temperature=0, seed=1) == said(top_p=1e-6) == greedy
    once = said(temperature=2.0, seed=7)
    assert said(temperature=2.0, seed=7) == once
    assert len({once, greedy, said(temperature=2.0, seed=8)}) == 3
    # Without a seed each request has one of its own.
    assert len({said(temperature=2.0) for _ in range(3)}) > 1


def post(server, body, *, path="/v1/chat/completions", **headers):
    """(status, what the JSON of the answer holds) of a raw request."""
    place = re.search(r"//(.*?)/", server.url)[1]
    link = http.client.HTTPConnection(place, timeout=60)
    headers = {"Content-Type": "application/json", **headers}
    data = body if isinstance(body, (bytes, str)) else json.dumps(body)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        link.request("POST", path, data, headers)
    answer = link.getresponse()
    return answer.status, json.loads(answer.read())


def health(server):
    url = server.url.replace("/v1", "/health")
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.parametrize(
    "status, change, words",
    [
        (400, {"n": 2}, ["n: 2 is not supported, only 1"]),
        (
            400,
            {"n": True, "mesages": [], "top_p": 2, "stop": [""], "seed": 0.5},
            ["n: True", "mesages: is not supported here. Did you mean: "
             "messages?", "top_p: 2 given", "stop: ['']", "seed: 0.5"],
        ),
        (400, {"messages": []}, ["messages: expected a list"]),
        (400, {"messages": ["Hi"]}, ["turn 1 must be an object"]),
        (400, {"messages": [{"role": "x", "content": "y"}]}, ["role 'x'"]),
        (
            400,
            {"messages": [{"role": "assistant", "content": "Hi"}]},
            ["the last message must be the user's"],
        ),
        (400, {"messages": ask([{"type": "image_url"}])}, ["expected text"]),
        (400, {"temperature": float("nan")}, ["temperature: nan given"]),
        (400, {"max_tokens": 0}, ["max_tokens: 0 given"]),
        (
            400,
            {"max_tokens": 3, "max_completion_tokens": 4},
            ["differs from max_completion_tokens"],
        ),
        (400, {"stream_options": {}}, ["is for stream=true"]),
        (400, {"logprobs": True}, ["logprobs: True", "only False"]),
        (400, {"response_format": {"type": "json_object"}}, ["response_format"]),
        (400, {"max_tokens": 3000}, ["takes 3000 tokens", "3000 more"]),
        (400, {"messages": ask("long " * 9000)}, ["takes 3000 tokens"]),
        (
            400,
            {"messages": ask("long " * 9000), "stream": True},
            ["takes 3000 tokens"],
        ),
        (404, {"model": "gpt-4"}, ["'gpt-4' does not exist", "one, two"]),
    ],
)  # fmt: skip
def test_what_is_refused_says_why(server, status, change, words):
    body = {"model": "one", "messages": ask("Hi"), **change}
    found, told = post(server, body)
    assert found == status
    assert told["error"]["type"] == "invalid_request_error"
    assert {"message", "type", "param", "code"} == told["error"].keys()
    for word in words:
        assert word in told["error"]["message"], told


def test_bodies_that_are_none_are_refused(server):
    for body, status, word in (
        ("{", 400, "no JSON"),
        ("[]", 400, "expected a JSON object"),
        ("[" * 100_000, 400, "no JSON"),
        (b'{"prompt": "\xff"}', 400, "no JSON"),
        ('{"prompt": "\\ud800"}', 400, "no JSON"),
        ("{}", 400, "messages: expected a list"),
        (b" " * (4 * 2**20 + 1), 413, "4194304 bytes"),
    ):
        found, told = post(server, body)
        assert (found, word in told["error"]["message"]) == (status, True), told
    right = {"messages": ask("Hi"), "max_tokens": 2}
    assert post(server, right)[0] == 200
    for headers, status, word in (
        ({"Content-Type": "text/plain"}, 415, "expected application/json"),
        ({"Host": "evil.example:80"}, 403, "expected localhost"),
    ):
        found, told = post(server, right, **headers)
        assert (found, word in told["error"]["message"]) == (status, True), told
    assert post(server, right, Host="localhost:1")[0] == 200
    assert post(server, right, path="/v1/embeddings")[0] == 404
    assert post(server, right, path="/v1/models")[0] == 405
    found, told = post(server, {"prompt": ["a", "b"]}, path="/v1/completions")
    assert found == 400 and "prompt: expected one text" in str(told)


def test_who_goes_away_is_not_answered_any_more(server):
    with server.endless() as stream:
        next(iter(stream))
    server.said(r"one: \d+ \+ (\d{1,3}) tokens in [\d.]+ s, cancelled")
    # Also one who waits for the whole answer, or in the queue.
    hasty = server.client.with_options(timeout=1.0)
    with pytest.raises(openai.APITimeoutError):
        hasty.chat.completions.create(
            model="two", messages=ask("Hi"), max_tokens=2800,
            temperature=50, seed=1,
        )  # fmt: skip
    server.said(r"two: \d+ \+ \d+ tokens in [\d.]+ s, cancelled")
    assert server.ask().choices[0].message.content


def test_many_ask_at_once_and_one_is_answered_at_a_time(server):
    want = {m: server.ask(model=m).choices[0] for m in ("one", "two")}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [
            (m, pool.submit(server.ask, model=m))
            for m in ("one", "two", "two", "one")
        ]
        for name, job in jobs:
            assert job.result().choices[0] == want[name]
        with server.endless() as stream:
            next(iter(stream))
            # Two may wait, a third is sent away.
            jobs = [pool.submit(server.ask) for _ in range(2)]
            end = time.monotonic() + 20
            while health(server)["waiting"] < 3:
                assert time.monotonic() < end
            with pytest.raises(openai.RateLimitError, match="3 requests wait"):
                server.ask()
        for job in jobs:
            assert job.result().choices[0] == want["one"]


def test_it_ends_in_order_while_it_speaks(server):
    """The last test of the process: what is streamed then is told."""
    number = signal.SIGTERM if BACKEND == "jax" else signal.SIGINT
    with server.endless() as stream:
        parts = iter(stream)
        next(parts)
        server.process.send_signal(number)
        with pytest.raises(openai.APIError, match="The server ends"):
            list(parts)
    assert server.process.wait(30) == 0
    *_, line = server.process.stdout.read().splitlines()
    result = json.loads(line)
    assert result["status"] == "done" and result["url"] == server.url
    assert result["models"] == ["one", "two", BASE]
    assert result["requests"] > 25 and result["cancelled"] >= 3
    assert result["failed"] == 0 and result["switch_ms"] > 0
    assert result["prompt_tokens"] > result["requests"] * 4
    server.reader.join(10)
    told = "".join(server.lines)
    assert KEY not in told and ASKED not in told
    assert "Traceback" not in told and "switch" not in told


@pytest.mark.skipif(BACKEND != "jax", reason="counts what JAX compiles")
def test_requests_share_their_programs():
    import jax

    loaded = presets.load(BASE)
    settings = config.Generate(max_new_tokens=32)
    generator = sampling.Generator(
        loaded.causal_lm, loaded.tokenizer, settings, few=True
    )
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **more: compiled.append("backend_compile" in name)
    )

    def run(length, limit, **values):
        own = config.Generate(**values)
        choose = sampling.chooser(own, seed=limit)
        before = sum(compiled)
        generator.complete([[2] + [300] * length], limit=limit, choose=choose)
        return sum(compiled) - before

    assert run(5, 3) > 0
    assert run(60, 32) == run(1, 1) == 0
    # A sampler has a few programs of its own, whatever its numbers.
    assert run(9, 4, sampler="top_p", top_p=0.9, temperature=1.5) > 0
    assert run(8, 5, sampler="top_p", top_p=0.5, temperature=0.7) == 0


def read(body, chat=True, **defaults):
    return requests.read(
        body, chat=chat, models=["a", "b"], defaults=config.Generate(**defaults)
    )


@pytest.mark.once
def test_what_a_request_leaves_out_is_the_servers():
    asked = {"messages": ask("Hi"), "stop": None, "user": "me", "n": 1}
    found = read(asked, sampler="top_k", temperature=0.5)
    assert found.model == "a" and found.limit is None and found.stop == ()
    assert found.settings == config.Generate(sampler="top_k", temperature=0.5)
    for given, want in (
        ({"temperature": 0.7}, ("top_k", 0.7, 0.95)),
        ({"top_p": 0.5}, ("top_p", 0.5, 0.5)),
        ({"temperature": 0}, ("greedy", 0.5, 0.95)),
    ):
        own = read({**asked, **given}, sampler="top_k", temperature=0.5)
        own = own.settings
        sampler, temperature, top_p = want
        assert (own.sampler, own.temperature) == (sampler, temperature)
        assert own.top_p == top_p or sampler != "top_p"
    assert read({**asked, "temperature": 1}).settings.top_p == 1.0
    told = read({**asked, "tools": [{"name": "w"}], "stop": "x"})
    assert told.question == {"messages": ask("Hi"), "tools": [{"name": "w"}]}
    assert told.stop == ("x",)
    none = read({**asked, "tools": [{"name": "w"}], "tool_choice": "none"})
    assert none.question == ask("Hi")


@pytest.mark.once
@pytest.mark.parametrize(
    "stops, want",
    [
        ((), "a🙂b END c"),
        (("END",), "a🙂b "),
        (("c", "b E"), "a🙂"),
        (("ENDING", "c!"), "a🙂b END c"),
        (("a",), ""),
    ],
)
def test_a_stop_text_is_never_shown_in_part(stops, want):
    whole = "a🙂b END c".encode()

    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")

    words, pieces = text.Words(decode, stops), []
    for byte in whole:
        pieces.append(words.add(byte))
        said = "".join(pieces)
        assert want.startswith(said) and "\ufffd" not in said
        if words.stopped:
            break
    pieces.append(words.rest())
    assert "".join(pieces) == want
    assert words.stopped == (want != whole.decode())
    assert len([piece for piece in pieces if piece]) > 2 or len(want) < 3
    # Half a character that never became whole is told at the end.
    half = text.Words(decode)
    assert [half.add(byte) for byte in "a🙂".encode()[:3]] == ["a", "", ""]
    assert half.rest() == "\ufffd"


@pytest.mark.once
def test_what_is_missing_or_taken_is_told_before_a_model_is_loaded(
    monkeypatch, capfd
):
    taken = listening.bind(config.Serve(port=0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(
        config.UserError, match=f"--serve.port={port}: .*in use"
    ):
        listening.bind(config.Serve(port=port))
    taken.close()
    with pytest.raises(config.UserError, match="--serve.host=no.such.host"):
        listening.bind(config.Serve(host="no.such.host.invalid"))
    assert "warning" not in capfd.readouterr().err
    listening.bind(config.Serve(host="0.0.0.0", port=0)).close()
    assert "warning: --serve.host=0.0.0.0 lets other" in capfd.readouterr().err
    for host, own in (
        ("127.0.0.1", True), ("127.3.2.1", True), ("LocalHost", True),
        ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False),
        ("localhost.evil.example", False), ("", False),
    ):  # fmt: skip
        assert listening.is_loopback(host) == own, host
    missing = types.SimpleNamespace(installed=lambda name: name == "starlette")
    monkeypatch.setattr(listening, "packages", missing)
    with pytest.raises(
        config.UserError, match=r"uvicorn.*pip install '.*\[ser"
    ):
        serve.serve(config.Config())
    assert packages.installed("starlette")
