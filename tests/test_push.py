"""An adapter goes to the hub whole, in one commit: the real client, and a hub on this machine that
keeps what it is sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
import yaml

from conftest import Launch
from paw.errors import AdapterError, ConfigError
from paw.models.adapters import BIRTH, CONFIG
from paw.report.card import CARD, write_card
from test_generator import adapter

TOKEN = "hf_a-token"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a commit of small files needs."""

    kept: dict[str, Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._say({"error": "Invalid username or password."}, 401)
        answer: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.kept["visibility"] = asked["visibility"]
            answer = {
                "url": f"http://{self.headers['Host']}/{asked['organization']}/{asked['name']}"
            }
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {
                "files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            }
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.kept["files"] = {
                x["value"]["path"]: base64.b64decode(x["value"]["content"])
                for x in lines
                if x["key"] == "file"
            }
            answer = {"commitUrl": f"http://{self.headers['Host']}/c/1", "commitOid": "1" * 40}
        return self._say(answer)

    def do_GET(self) -> None:
        self._say({"error": "Not found."}, 404)

    def _say(self, answer: Any, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *said: Any) -> None:
        pass


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the hub has been given."""
    Hub.kept = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.ENDPOINT)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield Hub.kept
    server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter in the folder of a run."""
    made = adapter(tmp_path / "run" / "adapters" / "moved")
    about = {"dataset": "facts, split test", "paw": "1", "command": "python -m paw.run"}
    write_card(made, name="moved", about=about, rows=[])
    (tmp_path / "run" / "report.html").write_text("<p>a report</p>")
    return made


def test_adapter_card_and_report_are_pushed(
    launch: Launch, folder: Path, kept: dict[str, Any]
) -> None:
    address = launch("task=push", f"adapter.path={folder}", "push.repo=me/moved")
    assert str(address).endswith("/me/moved")
    assert kept["visibility"] == "private"
    files = kept["files"]
    names = {p.name for p in folder.iterdir()} - {BIRTH}
    assert files.keys() == names | {"report.html"}
    for name in names - {CARD, CONFIG}:
        assert files[name] == (folder / name).read_bytes()
    sent, held = json.loads(files[CONFIG]), json.loads((folder / CONFIG).read_text())
    assert sent == held | {"base_model_name_or_path": None}
    front = yaml.safe_load(files[CARD].decode().split("---")[1])
    assert front["library_name"] == "peft"
    assert "base_model" not in front  # a folder of this machine


def test_what_cannot_be_pushed_is_one_line(
    launch: Launch, folder: Path, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.path=DIR push\.repo=OWNER/NAME"):
        launch("task=push", f"adapter.path={folder}")
    ask = ["task=push", f"adapter.path={folder}", "push.repo=me/moved"]
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ConfigError, match=r"could not be written \(.*401.*sign in"):
        launch(*ask)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"could not be written"):
        launch(*ask)
    (folder / CARD).unlink()
    with pytest.raises(AdapterError, match="has no model card"):
        launch(*ask)
    assert "files" not in kept
