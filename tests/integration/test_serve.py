"""task=serve: the page says what task=predict says, and asks nothing of other machines."""

from __future__ import annotations

import html
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from browser import answered, document
from conftest import PRECISION, QUICK, Launch, Paw
from minislurm import free_ports
from paw.errors import ConfigError

pytestmark = pytest.mark.slow
ASKED = "the color of lupup is"


def test_systems_are_asked_side_by_side(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    from gradio_client import Client

    launch(*QUICK, "train.max_steps=20", "evaluate.limit=20")
    [run] = (tmp_path / "outputs" / "runs").iterdir()
    expected = {}
    for name in ("tiny_llama", "tiny_llama + source", "tiny_qwen2 + target_procrustes"):
        capsys.readouterr()
        model, _, adapter = name.partition(" + ")
        path = [f"adapter.path={run / 'adapters' / adapter}"] if adapter else []
        launch(
            "task=predict", f"model@source={model}", *path, f"predict.text={ASKED}",
            "predict.raw=true", "predict.max_new_tokens=4", "dataset=facts",
        )  # fmt: skip
        expected[name] = json.loads(capsys.readouterr().out)["output"]
    [port] = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "paw.run",
        "task=serve",
        f"run={run}",
        f"port={port}",
        PRECISION,
    ]
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        answered(address, server)
        said = Client(address, verbose=False).predict(
            ASKED, list(expected), 4, True, api_name="/ask"
        )
        cards = re.findall(r"<figcaption>(.*?)</figcaption><p>(.*?)</p>", said)
        assert {html.unescape(k): html.unescape(v) for k, v in cards} == expected
        assert len(set(expected.values())) == 2
        shown = Client(address, verbose=False).predict(f"runs/{run.name}", api_name="/report")
        assert html.escape((run / "report.html").read_text()) in shown
        nowhere = Client(address, verbose=False)
        with pytest.raises(Exception, match="not in the list of choices"):
            nowhere.predict("../..", api_name="/report")
        text, said = document(address, tmp_path / "profile", wait=12)
        assert "tiny_qwen2 + target_procrustes" in text
        assert "error" not in said.lower()
        assert not re.findall(
            r'(?:src|href)="(?!https?://127\.0\.0\.1)https?://[^"]*\.(?:js|css)', text
        )
    finally:
        server.terminate()
        server.wait()


def test_what_cannot_be_served_is_one_line(launch: Launch, paw: Paw, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    with pytest.raises(ConfigError, match="is no run folder"):
        launch("task=serve", f"run={tmp_path}")
    (tmp_path / "config.yaml").write_text("task: merge")  # no data set, no models
    with pytest.raises(ConfigError, match="encoder"):
        launch("task=serve", f"run={tmp_path}", "models=[minilm_l6]")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        done = paw("task=serve", "models=[tiny_llama]", f"port={s.getsockname()[1]}", ok=False)
    assert done.returncode == 2
    assert "the page cannot be opened" in done.stderr
    assert "Traceback" not in done.stderr
