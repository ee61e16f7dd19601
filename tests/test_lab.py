"""JupyterLab, as `make lab` starts it: notebooks run through its server, bars move in them, cells stop and go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import requests
import websocket
from conftest import timeless
from nbclient import NotebookClient
from test_models import save_tiny

from dvirl.config import DVIConfig
from dvirl.runs.checkpoint import newest, verify
from dvirl.runs.folder import run_settings
from dvirl.runs.settings import from_mapping
from dvirl.train_dvi import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # jupyter's own
ROOT = Path(__file__).parents[1]
TOKEN = "a-token-of-the-tests"
TINY = dict(exit_layer=2, num_prompts=40, max_new_tokens=12, rollout_batch=8, judge_batch=2, fast_batch=3, slow_every=3,
            lora_rank=4, draft_vocab=120, held_out=4, timed=1, threads=1, dtype="float32", device="cpu",
            tracker="none")  # fmt: skip


class Lab:
    """A running JupyterLab.

    Attributes:
        folder: what it shows, copies of the notebooks.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{port}"
        self.headers = {"Authorization": f"token {TOKEN}"}

    def ask(self, method: str, path: str, /, **body):
        """What the server answers, which must not be an error."""
        given = {"json": body} if body else {}
        answer = requests.request(
            method, f"http://{self.address}{path}", headers=self.headers, timeout=120, **given
        )
        answer.raise_for_status()
        return answer

    def wait(self, process: subprocess.Popen, seconds: float = 60) -> None:
        """Until it answers."""
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            try:
                return self.ask("GET", "/api/status")
            except requests.ConnectionError:
                time.sleep(0.1)
        raise AssertionError(f"JupyterLab did not answer: {process.poll()}")


class OpenNotebook:
    """A notebook opened in JupyterLab with a kernel of its own, which runs its cells as a browser would.

    Attributes:
        cells: its code cells; the second is for parameters, and is not saved.
    """

    def __init__(self, lab: Lab, path: str) -> None:
        self.lab, self.path = lab, path
        self.notebook = nbformat.from_dict(lab.ask("GET", f"/api/contents/{path}").json()["content"])
        self.cells = [cell for cell in self.notebook.cells if cell.cell_type == "code"]
        self.parameters = nbformat.v4.new_code_cell()
        self.cells.insert(1, self.parameters)
        about = dict(path=path, name=path, type="notebook", kernel={"name": "python3"})
        session = lab.ask("POST", "/api/sessions", **about).json()
        self.session, self.kernel = (
            f"/api/sessions/{session['id']}",
            f"/api/kernels/{session['kernel']['id']}",
        )
        channels = f"ws://{lab.address}{self.kernel}/channels"
        self.socket = websocket.create_connection(channels, header=lab.headers, timeout=120)

    def set_parameters(self, **values) -> None:
        """Fill the cell after the one that declares them, as papermill does."""
        self.parameters.source = "\n".join(
            ["# Parameters", *(f"{name} = {value!r}" for name, value in values.items())]
        )

    def run(self, cell, watch=lambda message: None):
        """Run a cell until the kernel is idle again; every message goes to `watch` as it comes.

        Returns:
            The kernel's reply, and the messages. The cell's outputs are what a front end would save.
        """
        client = NotebookClient(self.notebook, record_timing=False)
        cell.outputs, reply, messages, idle = [], None, [], False
        client.clear_before_next_output = False
        request = self.send(cell.source)
        while not (reply and idle):
            message = json.loads(self.socket.recv())
            if message["parent_header"].get("msg_id") != request:
                continue
            messages.append(message)
            watch(message)
            if message["msg_type"] == "execute_reply":
                reply = message["content"]
            elif message["msg_type"] == "status":
                idle = message["content"]["execution_state"] == "idle"
            else:
                client.process_message(message, cell, 0)
        return reply, messages

    def send(self, code: str) -> str:
        """Ask the kernel to run code; the request's id."""
        header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "session": "tests", "username": "",
                  "version": "5.3"}  # fmt: skip
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "allow_stdin": False,
            "stop_on_error": True,
        }
        message = dict(
            header=header, parent_header={}, metadata={}, content=content, channel="shell", buffers=[]
        )
        self.socket.send(json.dumps(message))
        return header["msg_id"]

    def run_to(self, word: str):
        """Run the cells before the one that has the word, without an error; that cell."""
        for cell in self.cells:
            if word in cell.source:
                return cell
            reply, _ = self.run(cell)
            assert reply["status"] == "ok", (cell.source, reply)
        raise AssertionError(f"no cell has {word}")

    def save(self):
        """Save it under another name, as a browser does; what the file then holds."""
        self.lab.ask("PUT", f"/api/contents/saved-{self.path}", type="notebook", content=self.notebook)
        return nbformat.read(self.lab.folder / f"saved-{self.path}", as_version=4)

    def __enter__(self) -> OpenNotebook:
        return self

    def __exit__(self, *failed) -> None:
        self.socket.close()
        self.lab.ask("DELETE", self.session)


def bar_at(messages) -> list[int]:
    """Prompts done, by each state of the progress bar in the messages."""
    text = [one["content"]["text"] for one in messages if one["content"].get("name") == "stderr"]
    return [int(done) for done in re.findall(r"\| (\d+)/\d+ \[", "".join(text))]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """`make lab` beside copies of the notebooks, in this environment, which is made already; no browser opens."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("runs", ".*"))
    lab = Lab(folder / "notebooks", port := free_port())
    own = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    wishes = f"--no-browser --allow-root --ServerApp.port={port} --IdentityProvider.token={TOKEN}"
    command = [
        "make",
        "-f",
        str(ROOT / "Makefile"),
        "lab",
        f"VENV={sys.prefix}",
        "-o",
        f"{sys.prefix}/.ready",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"LAB_ARGS={wishes}"], cwd=folder, start_new_session=True, stdout=log, stderr=log,
                                   env={**os.environ, **own, "IPYTHONDIR": str(folder / "ipython")})  # fmt: skip
    try:
        lab.wait(process)
        yield lab
        lab.ask("POST", "/api/shutdown")
        assert process.wait(timeout=30) == 0, (folder / "log").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.real
def test_a_notebook_is_opened_run_and_saved(lab):
    assert "JupyterLab" in lab.ask("GET", "/lab/tree/01_early_exit.ipynb").text
    with OpenNotebook(lab, "01_early_exit.ipynb") as notebook:
        notebook.set_parameters(num_prompts=1, max_new_tokens=8, shipped="", threads=1)
        for cell in notebook.cells:
            reply, _ = notebook.run(cell)
            assert reply["status"] == "ok", (cell.source, reply)
        outputs = [output for cell in notebook.save().cells for output in cell.get("outputs", [])]
    assert "every answer is the 8 tokens of plain decoding\n" in [output.get("text") for output in outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.fixture(scope="module")
def notebook(lab):
    with OpenNotebook(lab, "03_train.ipynb") as notebook:
        yield notebook


@pytest.fixture
def training(notebook, tmp_path):
    """Notebook 03 on a tiny model, run up to the cell that trains; that cell, and the run's folder."""
    notebook.set_parameters(
        **TINY, model_name=str(save_tiny(tmp_path / "tiny")), run_dir=str(tmp_path / "run")
    )
    return notebook.run_to("trainer.train()"), tmp_path / "run"


def test_the_bar_moves_and_is_not_saved(notebook, training):
    cell, _ = training
    reply, messages = notebook.run(cell)
    assert reply["status"] == "ok", reply
    with_bar = [one for one in messages if bar_at([one])]
    assert len(with_bar) >= 3
    assert bar_at(messages) == sorted(bar_at(messages)) and {0, 40} < set(bar_at(messages))
    kinds = [one["msg_type"] for one in messages]
    assert "clear_output" in kinds[messages.index(with_bar[-1]) :]
    saved = next(one for one in notebook.save().cells if one.source == cell.source)
    assert [output.output_type for output in saved.outputs] == ["display_data"]


def run_interrupted(notebook, cell) -> None:
    """Run a training cell, interrupt it when its bar has moved, and see that it ends soon and says what it does."""
    asked = []

    def interrupt(message) -> None:
        if not asked and any(bar_at([message])):
            notebook.lab.ask("POST", f"{notebook.kernel}/interrupt")
            asked.append(time.monotonic())

    reply, messages = notebook.run(cell, interrupt)
    assert reply["status"] == "error" and reply["ename"] == "KeyboardInterrupt"
    assert time.monotonic() - asked[0] < 10 and 0 < max(bar_at(messages)) < 40
    assert any("stopping after these prompts, with a checkpoint" in str(one["content"]) for one in messages)


def run_again(notebook, cell) -> None:
    """Run it as it stands, to its end; nothing of a bar is left."""
    reply, _ = notebook.run(cell)
    assert reply["status"] == "ok", reply
    assert {output.output_type for output in cell.outputs} <= {"display_data"}


def logged(folder):
    """A run's log without times."""
    return [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.no_cover
def test_a_cell_is_interrupted_and_run_again(notebook, training, tmp_path):
    cell, run_dir = training
    run_interrupted(notebook, cell)
    verify(newest(run_dir))
    run_again(notebook, cell)
    settings = from_mapping(DVIConfig, run_settings(run_dir), "the run")
    make_trainer(replace(settings, run_dir=str(tmp_path / "whole"))).train(show_progress=False)
    assert logged(run_dir) == logged(tmp_path / "whole")
    traps = next(
        one for one in notebook.cells if "tape.playing()" in one.source
    )  # these learn from the answers so far
    reply, _ = notebook.run(next(one for one in notebook.cells if one.source.startswith("few = ")))
    assert reply["status"] == "ok"
    run_interrupted(notebook, traps)
    run_again(notebook, traps)
    folders = [path.parent for path in run_dir.glob("*/metrics.jsonl")]
    ends = [json.loads((newest(folder) / "trainer.json").read_text())["counters"] for folder in folders]
    assert [end["prompts"] for end in ends] == [40] * 6
    for folder, end in zip(folders, ends, strict=True):
        assert [line["step"] for line in logged(folder)] == list(range(1, end["step"] + 1))
