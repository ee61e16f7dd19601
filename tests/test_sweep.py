"""Sweeps: every cell once, no more than the cores at a time, whatever fails or is cut off; one table of what they found."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from test_cli import TINY
from test_models import save_tiny

from dvirl.cli import main as cli
from dvirl.experiments.sweep import Sweep, read_figures, run_cells
from dvirl.runs.settings import from_mapping, read_yaml

FILES = sorted((Path(__file__).parents[1] / "configs").glob("sweep-*.yaml"))
GRID = {"exit_layer": [1, 2], "seed": [0, 1]}
NAMES = ["exit_layer=1,seed=0", "exit_layer=1,seed=1", "exit_layer=2,seed=0", "exit_layer=2,seed=1"]
FAKE = """
    import json, os, sys, time
    given = dict(flag[2:].split("=", 1) for flag in sys.argv[2:])
    layer, begun = int(given["exit_layer"]), time.time()
    print("loading", flush=True)
    open(given["run_dir"] + "/begun", "w").write(str(os.getpid()))
    while os.path.exists("wait"):
        time.sleep(0.02)
    time.sleep(0.1)
    if os.path.exists(f"fail-{layer}"):
        sys.exit("50 %\\r100 %\\rdvirl: no memory\\n")
    rate = round(layer / 10 + int(given["seed"]) / 100, 2)
    figures = {"accept_rate_after": rate, "drift_kl": None, "task": "all", "tokens": 5}
    if "results" in given:
        name = os.path.basename(given["run_dir"])
        json.dump({"figures": figures}, open(f"{given['results']}/{name}.json", "w"))
    else:
        lines = [{"accept_rate": 0.0 if n < 18 else rate, "mat": 1.5, "tokens": n, "wall_s": n / 4} for n in range(20)]
        open(given["run_dir"] + "/metrics.jsonl", "w").write("\\n".join(map(json.dumps, lines)))
    with open("calls", "a") as file:
        call = dict(command=sys.argv[1], given=given, omp=os.environ["OMP_NUM_THREADS"], begun=begun, ended=time.time())
        file.write(json.dumps(call) + "\\n")
"""


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder where `python -m dvirl.cli` is a quick stand-in that notes how it was called."""
    (tmp_path / "dvirl").mkdir()
    (tmp_path / "dvirl/__init__.py").touch()
    (tmp_path / "dvirl/cli.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(*flags, **changes) -> int:
    Path("s.yaml").write_text(json.dumps({"run": "train", "grid": GRID, "base": {"draft_len": 3}, **changes}))
    return cli(["sweep", "s.yaml", "--cores", "4", *flags])


def calls() -> list[dict]:
    """The cells that were run to their end since the last time, in the grid's order."""
    lines = Path("calls").read_text().splitlines() if Path("calls").exists() else []
    Path("calls").write_text("")
    return sorted(map(json.loads, lines), key=lambda call: call["given"]["run_dir"])


def names(called) -> list[str]:
    return [Path(call["given"]["run_dir"]).name for call in called]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_committed_sweep_is_valid(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    assert len(from_mapping(Sweep, read_yaml(path), str(path)).cells("", 1)) > 1


def test_a_grid_becomes_a_table(there, capsys):
    assert sweep("--threads", "2") == 0
    called = calls()
    assert names(called) == NAMES and {call["command"] for call in called} == {"train"}
    for call, (layer, seed) in zip(called, [(1, 0), (1, 1), (2, 0), (2, 1)], strict=True):
        folder = f"runs/s/cells/exit_layer={layer},seed={seed}"
        assert call["given"] == {"draft_len": "3", "exit_layer": str(layer), "seed": str(seed), "threads": "2",
                                 "run_dir": folder}  # fmt: skip
        assert call["omp"] == "2"
        kept = json.loads(Path(folder, "cell.json").read_text())
        assert kept["figures"] == {
            "accept_rate": round(layer / 10 + seed / 100, 2),
            "mat": 1.5,
            "tokens": 19,
            "wall_s": 4.75,
        }
        assert kept["settings"] == {
            "draft_len": 3,
            "exit_layer": layer,
            "seed": seed,
            "threads": 2,
            "run_dir": folder,
        }
        assert "-m dvirl.cli train --draft_len=3" in kept["command"] and 0.1 < kept["seconds"] < 60
        assert Path(folder, "log.txt").read_text() == "loading\n"
    table = pd.read_csv("runs/s/table.csv")
    assert list(table) == ["exit_layer", "seed", "accept_rate", "mat", "tokens", "wall_s"]
    assert table.accept_rate.tolist() == [0.1, 0.11, 0.2, 0.21] and table.exit_layer.tolist() == [1, 1, 2, 2]
    content = json.loads(Path("runs/s/table.json").read_text())
    assert content["rows"] == table.to_dict("records") and content["failed"] == []
    assert (
        content["command"] == "dvirl sweep s.yaml --cores 4 --threads 2"
        and content["date"]
        and content["versions"]
    )
    out = capsys.readouterr().out
    spread = {
        line.split()[0]: " ".join(line.split()[1:4]) for line in out.split("over seeds:")[1].splitlines()[2:4]
    }
    assert spread == {"exit_layer=1": "0.105 ± 0.0071", "exit_layer=2": "0.205 ± 0.0071"}


@pytest.mark.parametrize(("flags", "most"), [(["--cores", "2"], 2), (["--threads", "3"], 1), ([], 4)])
def test_no_more_processes_at_once_than_the_cores_allow(there, flags, most):
    assert sweep(*flags) == 0
    spans = [(call["begun"], call["ended"]) for call in calls()]
    together = [sum(begun <= moment < ended for begun, ended in spans) for moment, _ in spans]
    assert max(together) <= most and len(spans) == 4


def test_the_same_command_runs_only_what_is_missing(there, capsys):
    assert sweep() == 0 and names(calls()) == NAMES
    before = Path("runs/s/table.csv").read_text()
    assert sweep() == 0 and calls() == [] and Path("runs/s/table.csv").read_text() == before
    cut_off = Path("runs/s/cells") / NAMES[2]
    (cut_off / "cell.json").rename(cut_off / ".cell.json")
    (cut_off / "checkpoints").mkdir()
    capsys.readouterr()
    assert sweep("--dry_run") == 0 and calls() == [] and (cut_off / "checkpoints").exists()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("env OMP_NUM_THREADS=1 ") and NAMES[2] in said[0]
    assert sweep() == 0 and names(calls()) == [NAMES[2]] and not (cut_off / "checkpoints").exists()
    assert Path("runs/s/table.csv").read_text() == before
    assert sweep(grid={**GRID, "seed": [0, 1, 2]}) == 0
    assert names(calls()) == ["exit_layer=1,seed=2", "exit_layer=2,seed=2"]
    assert pd.read_csv("runs/s/table.csv").seed.tolist() == [0, 1, 2] * 2


def test_a_dry_run_writes_nothing(there, capsys):
    assert sweep("--dry_run", "--out", "elsewhere") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert sorted(path.name for path in there.iterdir()) == ["dvirl", "s.yaml"]


def test_a_failing_cell_does_not_stop_the_others(there, capsys):
    Path("fail-1").touch()
    assert sweep("--cores", "1") == 2
    assert names(calls()) == NAMES[2:]
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if line and "%|" not in line]
    assert said == [
        "dvirl: 2 of 4 cells failed; the same command goes on",
        *(f"runs/s/cells/{name}/log.txt ends with: dvirl: no memory" for name in NAMES[:2]),
    ]
    assert [line.split()[2] for line in captured.out.splitlines()[1:5]] == ["-", "-", "0.2", "0.21"]
    table = pd.read_csv("runs/s/table.csv")
    assert table.accept_rate.isna().tolist() == [True, True, False, False]
    assert len(json.loads(Path("runs/s/table.json").read_text())["failed"]) == 2
    Path("fail-2").touch()
    Path("fail-1").unlink()
    assert sweep() == 0 and names(calls()) == NAMES[:2]
    assert pd.read_csv("runs/s/table.csv").accept_rate.notna().all()


def test_there_is_a_table_though_every_cell_failed(there, capsys):
    Path("fail-1").touch()
    assert sweep(grid={"exit_layer": [1], "seed": [0]}) == 2
    assert pd.read_csv("runs/s/table.csv").to_dict("list") == {"exit_layer": [1], "seed": [0]}
    assert "1 of 1 cells failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        ([], {"run": "sgp", "base": {"batch_size": 3}}, "run ('train', now 'sgp')"),
        ([], {"base": {"draft_len": 4}}, "base ({'draft_len': 3}, now {'draft_len': 4})"),
        ([], {"grid": {"exit_layer": [1]}}, "grid (['exit_layer', 'seed'], now ['exit_layer'])"),
        (["--threads", "2"], {}, "threads (1, now 2)"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(there, capsys, flags, changes, message):
    folder = Path("runs/s")
    folder.mkdir(parents=True)
    now = {"run": "train", "base": {"draft_len": 3}, "grid": ["exit_layer", "seed"], "threads": 1}
    (folder / "sweep.json").write_text(json.dumps(now))
    assert sweep(*flags, **changes) == 2 and calls() == []
    said = capsys.readouterr().err
    assert (
        f"runs/s/sweep.json: the run there has other settings: {message}" in said
        and len(said.splitlines()) == 1
    )


@pytest.mark.parametrize("name", ["sweep.json", "cells/exit_layer=1,seed=0/cell.json"])
def test_a_damaged_file_of_a_sweep_is_named(there, capsys, name):
    path = Path("runs/s", name)
    assert sweep("--cores", "1") == 0
    path.write_text('{"run": "tra')
    capsys.readouterr()
    assert sweep() == 2
    assert f"dvirl: {path}: not valid JSON (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grd": {}}, "s.yaml: unknown setting grd; known are base, grid, name, run"),
        ({"grid": {}}, "grid is empty; expected values by setting"),
        ({"grid": None}, "grid is None; expected dict[str, list[object]]"),
        ({"grid": [1, 2]}, "grid is [1, 2]; expected dict[str, list[object]]"),
        ({"base": None}, "base is None; expected dict[str, object]"),
        ({"name": 5}, "name is 5; expected str"),
        ({"grid": {"seed": 3}}, "grid is {'seed': 3}; expected dict[str, list[object]]"),
        ({"grid": {"seed": []}}, "grid has seed: []; expected a list of different values"),
        ({"grid": {"seed": [1, 1]}}, "grid has seed: [1, 1]; expected a list of different values"),
        ({"grid": {"draft_len": [1]}}, "draft_len: set by base and grid both"),
        (
            {"base": {"run_dir": "x", "threads": 2}},
            "run_dir, threads: set by base and grid both, or for each cell by",
        ),
        ({"grid": {"threads": [1, 2]}}, "threads: set by base and grid both, or for each cell by the sweep"),
        (
            {"run": "none.ipynb"},
            "run is 'none.ipynb'; expected a notebook that exists or one of train, sgp, experiment",
        ),
        ({"run": "bench"}, "run is 'bench'; expected a notebook that exists or one of train"),
        ({"run": ["train"]}, "run is ['train']; expected str"),
        ({"grid": {"exit_layr": [1]}}, "train: unknown setting exit_layr"),
        ({"grid": {"exit_layer": [4, 0]}}, "exit_layer is 0; expected a number"),
        ({"run": "sgp"}, "sgp: unknown setting draft_len"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_runs(there, capsys, changes, message):
    assert sweep(**changes) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]
    assert calls() == [] and not Path("runs").exists()


def test_yaml_names_that_are_no_text_and_bad_cores_are_one_sentence_too(there, capsys):
    Path("s.yaml").write_text("run: train\ngrid: {4: [1]}\n")
    assert (
        cli(["sweep", "s.yaml"]) == 2
        and "grid is {4: [1]}; expected dict[str, list[object]]" in capsys.readouterr().err
    )
    assert (
        sweep("--threads", "5") == 2 and "threads is 5; expected 1 to the 4 cores" in capsys.readouterr().err
    )
    assert sweep("--threads", "0") == 2 and "threads is 0" in capsys.readouterr().err
    assert cli(["sweep", "none.yaml"]) == 2 and "none.yaml: No such file" in capsys.readouterr().err


def test_experiments_write_their_results_into_the_cell(there):
    assert sweep(run="sgp-experiment", base={}, grid={"exit_layer": [1], "seed": [0], "lr": [1e-3]}) == 0
    (call,) = calls()
    folder = "runs/s/cells/exit_layer=1,seed=0,lr=0.001"
    assert (
        call["given"]["results"] == call["given"]["run_dir"] == folder and call["command"] == "sgp-experiment"
    )
    assert json.loads(Path(folder, "cell.json").read_text())["figures"] == {
        "accept_rate_after": 0.1,
        "tokens": 5,
    }


def test_folders_have_safe_names_and_values_arrive_whole(there):
    odd = {"exit_layer": [1], "seed": [0], "start_from": ["../a b,c=d", ""], "lora_shallow": [False]}
    assert sweep(grid=odd) == 0
    found = sorted(path.name for path in Path("runs/s/cells").iterdir())
    assert found == [
        f"exit_layer=1,seed=0,start_from={name},lora_shallow=False" for name in ("", "..%2Fa+b%2Cc%3Dd")
    ]
    assert {(call["given"]["start_from"], call["given"]["lora_shallow"]) for call in calls()} == {
        ("../a b,c=d", "False"), ("", "False")}  # fmt: skip


def test_figures_are_of_the_last_tenth_and_what_there_is(tmp_path):
    assert read_figures(tmp_path) == {}
    log = tmp_path / "metrics.jsonl"
    log.touch()
    assert read_figures(tmp_path) == {}
    log.write_text('{"accept_rate": 0.5, "tokens": 10}\n{"accept_rate": null, "tokens": 20}\n')
    assert read_figures(tmp_path) == {"tokens": 20}
    lines = [{"agreement": n / 100, "loss": 1.0, "wall_s": n} for n in range(37)]
    log.write_text("\n".join(map(json.dumps, lines)))
    assert read_figures(tmp_path) == {"agreement": pytest.approx((0.34 + 0.35 + 0.36) / 3), "wall_s": 36}


@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_the_cells(there, number, ends):
    Path("wait").touch()
    cells, before = Sweep("train", GRID).cells("cells/", 1), signal.getsignal(signal.SIGTERM)
    begun = [Path(cell["run_dir"], "begun") for cell in cells]

    def interrupt():
        deadline = time.time() + 30
        while not all(path.exists() and path.read_text() for path in begun[:2]) and time.time() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(ends):
        run_cells(Sweep("train", GRID), cells, 2)
    thread.join()
    assert [path.exists() for path in begun] == [True, True, False, False] and calls() == []
    for path in begun[:2]:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_sweep_that_is_terminated_says_so_by_its_exit_code_and_goes_on_later(there, capsys):
    Path("wait").touch()
    Path("s.yaml").write_text(json.dumps({"run": "train", "grid": GRID}))
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=lambda: sys.exit(cli(["sweep", "s.yaml", "--cores", "1"])))
    process.start()
    begun = Path("runs/s/cells", NAMES[0], "begun")
    while not (begun.exists() and begun.read_text()):
        time.sleep(0.02)
    Path("other.yaml").write_text(json.dumps({"run": "train", "grid": GRID}))
    assert cli(["sweep", "other.yaml", "--out", "runs/s"]) == 2
    assert f"runs/s is in use by process {process.pid} on " in capsys.readouterr().err
    process.terminate()
    process.join(30)
    assert process.exitcode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)
    Path("wait").unlink()
    assert cli(["sweep", "s.yaml", "--cores", "4"]) == 0 and names(calls()) == NAMES


def test_a_notebook_gets_parameters_and_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    given = nbformat.v4.new_code_cell(
        "rate, fine, run_dir, threads = 0.0, False, '', 0", metadata={"tags": ["parameters"]}
    )
    body = "import os\nassert fine and os.environ['OMP_NUM_THREADS'] == str(threads), 'not fine'\n"
    body += "open(run_dir + '/metrics.jsonl', 'w').write('{\"accept_rate\": %f}' % (rate / 2))"
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "x"}}
    notebook = nbformat.v4.new_notebook(cells=[given, nbformat.v4.new_code_cell(body)], metadata=metadata)
    nbformat.write(notebook, "ask.ipynb")
    assert sweep("--cores", "2", run="./ask.ipynb", base={"rate": 0.5}, grid={"fine": [True, False]}) == 2
    assert "cells/fine=False/log.txt ends with: AssertionError: not fine" in capsys.readouterr().err
    found = json.loads(Path("runs/s/cells/fine=True/cell.json").read_text())
    assert found["figures"] == {"accept_rate": 0.25} and found["command"].startswith("env OMP_NUM_THREADS=1")
    assert sys.executable in found["command"] and "-m papermill ./ask.ipynb" in found["command"]
    executed = nbformat.read("runs/s/cells/fine=True/ask.ipynb", 4)
    assert "rate = 0.5" in executed.cells[1].source and "fine = True" in executed.cells[1].source


def test_a_cells_command_trains_with_its_settings(tmp_path, monkeypatch):
    base = {name[2:]: yaml.safe_load(value) for name, value in zip(TINY[::2], TINY[1::2], strict=True)}
    base = {**base, "model_name": str(save_tiny(tmp_path / "model")), "warmup_steps": 3}
    del base["exit_layer"], base["threads"]
    grid = {"exit_layer": [2], "lr_shallow": [1e-5], "start_from": [""], "lora_shallow": [False]}
    swept = Sweep("train", grid, base)
    (cell,) = swept.cells(f"{tmp_path}/cells/", 1)
    assert cli(swept.command(cell)[swept.command(cell).index("dvirl.cli") + 1 :]) == 0
    kept = read_yaml(Path(cell["run_dir"]) / "config.yaml")["config"]
    assert {name: kept[name] for name in cell} == cell and kept["lora_shallow"] is False
    figures = read_figures(Path(cell["run_dir"]))
    assert (
        0 <= figures["accept_rate"] <= 1 <= figures["mat"] and figures["tokens"] > 8 and figures["wall_s"] > 0
    )
