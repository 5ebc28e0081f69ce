"""Uploads, to servers on loopback that speak as the hubs do."""

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import safetensors.numpy
from test_export import make

from keras_gemma_ft import config
from keras_gemma_ft.config import UserError
from keras_gemma_ft.exporting import push
from keras_gemma_ft.formats import keras_preset
from keras_gemma_ft.model import preset_source

pytestmark = pytest.mark.once
TOKEN = "hf_SECRETSECRETSECRETSECRETSECRETSECR"


class Hub(http.server.BaseHTTPRequestHandler):
    """What both hubs answer; remembers what it was sent."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        server = self.server
        server.seen.append((self.path, self.headers.get("Authorization")))
        if server.refuse:
            return self.answer({"error": "no"}, server.refuse)
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            server.created.append(json.loads(body))
            return self.answer({"url": f"{self.here()}/owner/name"})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular",
                     "shouldIgnore": False} for f in files]  # fmt: skip
            return self.answer({"files": told})
        if "/commit/" in path:
            for line in body.splitlines():
                told = json.loads(line)
                if told["key"] == "file":
                    value = told["value"]
                    content = base64.b64decode(value["content"])
                    server.files[value["path"]] = content
            where = f"{self.here()}/owner/name/commit/{'1' * 40}"
            return self.answer({"commitUrl": where, "commitOid": "1" * 40})
        return self.kaggle(path, body)

    def kaggle(self, path, body):
        server = self.server
        told = json.loads(body) if body[:1] == b"{" else {}
        if path.endswith("StartBlobUpload"):
            name = told["name"]
            url = f"http://localhost:{server.server_port}/blob/{name}"
            return self.answer({"token": name, "createUrl": url})
        if path.endswith("CreateModelInstance"):
            server.created.append(told)
        return self.answer({})

    def do_PUT(self):
        length = int(self.headers["Content-Length"])
        name = self.path.rpartition("/")[2]
        self.server.files[name] = self.rfile.read(length)
        self.answer({})

    def do_GET(self):
        self.answer({}, self.server.refuse or 200)

    def here(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, told, status=200):
        data = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def serving(port=0):
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", port), Hub)
    hub.seen, hub.created, hub.files, hub.refuse = [], [], {}, 0
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    return hub


@pytest.fixture
def hub():
    hub = serving()
    yield hub
    hub.shutdown()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = preset_source.folder(config.EMBEDDED_PRESET)
    backbone = keras_preset.KerasPreset(folder).backbone
    place = tmp_path_factory.mktemp("push") / "mine"
    make(place, backbone, "standard", ("query",), 2, 2.0, False)
    return place


def export(adapter, to, target, environment, *more):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "keras_gemma_ft.export",
            f"--adapter={adapter}",
            "--preset=gemma2_tiny_en",
            "--format=peft",
            f"--to={to}",
            "--noverify",
            f"--push_to={target}",
            *more,
        ],
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert TOKEN not in done.stderr + done.stdout
    return done.returncode, told


def test_to_the_hugging_face_hub(hub, adapter, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    environment = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN}
    status, told = export(adapter, tmp_path, "hf://owner/name", environment)
    assert status == 0, told
    assert told["pushed"] == f"{endpoint}/owner/name"
    assert {kind for _, kind in hub.seen} == {f"Bearer {TOKEN}"}
    [created] = hub.created
    assert created["name"] == "name" and created["visibility"] == "private"
    written = {p.name: p.read_bytes() for p in (tmp_path / "peft").iterdir()}
    assert hub.files == written
    assert "adapter_model.safetensors" in written
    assert all(str(tmp_path).encode() not in v for v in written.values())


def test_several_formats_have_a_folder_each(hub, adapter, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    environment = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN}
    status, _ = export(
        adapter, tmp_path, "hf://o/n", environment, "--format=peft,keras"
    )
    assert status == 0
    assert "peft/adapter_config.json" in hub.files
    assert "keras/adapter.lora.h5" in hub.files


def test_refusals_say_what_to_do(hub, adapter, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    hub.refuse = 401
    environment = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN}
    status, told = export(adapter, tmp_path, "hf://owner/name", environment)
    assert status == 2
    assert "Set HF_TOKEN" in told["error"]
    assert str(tmp_path / "peft") in told["error"]
    assert (tmp_path / "peft/adapter_config.json").is_file()
    # Nobody listens there.
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN}
    status, told = export(adapter, tmp_path, "hf://owner/name", environment)
    assert status == 2
    assert "no network, or the server does not answer" in told["error"]


def test_to_kaggle(adapter, tmp_path):
    try:
        hub = serving(7777)  # What Kaggle's own client calls its test server.
    except OSError:
        pytest.skip("port 7777 is taken")
    environment = {
        "KAGGLE_API_ENVIRONMENT": "TEST",
        "KAGGLE_USERNAME": "me",
        "KAGGLE_KEY": TOKEN,
    }
    try:
        status, told = export(
            adapter, tmp_path, "kaggle://me/model/keras/tuned", environment
        )
    finally:
        hub.shutdown()
        hub.server_close()
    assert status == 0, told
    written = {p.name: p.read_bytes() for p in (tmp_path / "peft").iterdir()}
    assert hub.files == written
    [created] = hub.created
    assert created["body"]["instanceSlug"] == "tuned"


def test_addresses_are_checked_before_anything_is_done():
    for address in ("hf://name", "owner/name", "kaggle://a/b", "s3://x/y"):
        with pytest.raises(UserError, match="expected hf://owner/name"):
            push.check(address)
    push.check("hf://owner/name")
    push.check("kaggle://owner/model/keras/variation")


def test_a_base_on_this_machine_is_told_by_its_name(hub, adapter, tmp_path):
    """Neither PEFT's settings nor a GGUF hold its path."""
    base = tmp_path / "private/base"
    shutil.copytree(preset_source.folder(config.EMBEDDED_PRESET), base)
    made = tmp_path / "private/mine"
    shutil.copytree(adapter, made)
    file = made / "adapter_config.json"
    told = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(told))
    weights = made / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    safetensors.numpy.save_file(tensors, weights, {"format": "pt"})
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    status, told = export(
        made, tmp_path / "out", "hf://owner/name",
        {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN},
        "--format=peft,gguf_adapter", f"--preset={base}",
    )  # fmt: skip
    assert status == 0, told
    settings = json.loads(hub.files["peft/adapter_config.json"])
    assert settings["base_model_name_or_path"] == "base"
    assert len(hub.files) > 5
    for name, data in hub.files.items():
        assert str(tmp_path).encode() not in data, name
