"""Notebooks under papermill: other parameters work, unknown and bad ones stop them with our message."""

from __future__ import annotations

import json
from pathlib import Path

import papermill
import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks/03_train.ipynb"
QUICK = dict(num_prompts=8, rollout_batch=8, max_new_tokens=16, eval_prompts=2, min_accept_rate=0.0, min_gain=0.0,
             min_reward_gain=0.0, held_out=4, threads=1, fast_batch=1)  # fmt: skip


def execute(tmp_path, **parameters):
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(NOTEBOOK, out, parameters, kernel_name="python3", progress_bar=False, cwd=tmp_path)
    return json.loads(out.read_text())


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # jupyter's own
@pytest.mark.parametrize(
    "settings", [dict(exit_layer=4, schedule="kl", seed=1), dict(exit_layer=8, schedule="ce", slow_every=0)]
)
def test_other_parameters_run(tmp_path, settings):
    execute(tmp_path, run_dir="run", **QUICK, **settings)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines and lines[0]["phase"] == settings["schedule"]
    assert (tmp_path / "run/learning_curve.png").stat().st_size > 5000
    assert list((tmp_path / "run/checkpoints").glob("step-*/lora_S/adapter_model.safetensors"))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"exit_layr": 6}, "unknown notebook parameter exit_layr; known are"),
     ({"exit_layer": 30}, "exit_layer is 30; this model of 30 layers takes 1 to 29")],
)  # fmt: skip
def test_bad_parameters_stop_it(tmp_path, parameters, message):
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        execute(tmp_path, **parameters)
