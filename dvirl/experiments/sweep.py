"""Sweeps: every cell of a grid as a process of its own, some at once, one table at the end: `dvirl sweep FILE`.

A cell is a notebook under papermill or a dvirl command. The same command again runs only the cells that are missing.
"""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from subprocess import DEVNULL, Popen
from threading import Event
from typing import Any
from urllib.parse import urlencode

import pandas as pd
from tqdm import tqdm

from dvirl.config import DVIConfig, SGPConfig
from dvirl.evaluation.report import command_record
from dvirl.experiments.summary import summary, summary_table
from dvirl.runs import settings
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import refuse_other_settings, run_lock
from dvirl.runs.interrupt import handled
from dvirl.runs.log import parse_line, read_metrics, read_text, to_plain, write_json
from dvirl.runs.settings import Settings, from_mapping, number, positional, read_yaml

COMMANDS: dict[str, type[Settings] | None] = {
    "train": DVIConfig,
    "sgp": SGPConfig,
    "experiment": None,
    "sgp-experiment": None,
}
"""Commands that can be swept, and what checks all cells before any of them runs; the last two check their own."""
MOST_CELLS = 10_000
SET_BY_SWEEP = {"run_dir", "threads", "results"}
"""Settings that the sweep gives every cell."""

Cell = dict[str, Any]
"""The settings of one run."""


@dataclass(frozen=True)
class Sweep(Settings):
    """What to run, and the grid of its settings.

    Raises:
        DvirlError: when made with a notebook or command that does not exist, or with a bad grid or setting.
    """

    run: str
    """Path of a notebook (.ipynb), or train, sgp, experiment or sgp-experiment."""
    grid: dict[str, list[object]]
    """Values by setting; every combination is a cell."""
    base: dict[str, object] = field(default_factory=dict)
    """Settings of all cells."""
    name: str = ""
    """What the progress bar calls it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_notebook = self.run.endswith(".ipynb") and os.path.isfile(self.run)
        if self.run not in COMMANDS and not is_notebook:
            raise DvirlError(
                f"run is {self.run!r:.80}; expected a notebook that exists or one of {', '.join(COMMANDS)}"
            )
        if not self.grid:
            raise DvirlError("grid is empty; expected values by setting")
        for name, values in self.grid.items():
            if not values or len(set(map(str, values))) < len(values):
                raise DvirlError(
                    f"grid has {name!s:.80}: {values!r:.80}; expected a list of different values"
                )
        if math.prod(map(len, self.grid.values())) > MOST_CELLS:
            raise DvirlError(f"grid makes more than {MOST_CELLS:,} cells")
        taken = {*self.base, *self.grid} & SET_BY_SWEEP | {*self.base} & {*self.grid}
        if taken:
            raise DvirlError(
                f"{', '.join(sorted(taken))}: set by base and grid both, or for each cell by the sweep"
            )
        kind = COMMANDS.get(self.run)
        if kind is not None:
            for cell in self.cells("", 1):
                from_mapping(kind, cell, self.run)

    def cells(self, out: str, threads: int) -> list[Cell]:
        """All cells in the grid's order, with folders in `out`, which ends in a slash."""
        cells = []
        for values in product(*self.grid.values()):
            point = dict(zip(self.grid, values, strict=True))
            folder = out + urlencode(point).replace("&", ",")
            cells.append({**self.base, **point, "threads": threads, "run_dir": folder})
        return cells

    def command(self, cell: Cell) -> list[str]:
        """What runs a cell, for a shell too."""
        program = ["env", f"OMP_NUM_THREADS={cell['threads']}", sys.executable, "-m"]
        if self.run not in COMMANDS:
            executed = f"{cell['run_dir']}/{Path(self.run).name}"
            program += ["papermill", self.run, executed, "--kernel", "python3"]
            for name, value in cell.items():
                program += ["-p", name, str(value)]
            return program
        arguments = dict(cell)
        if self.run.endswith("experiment"):
            arguments["results"] = cell["run_dir"]
        return [*program, "dvirl.cli", self.run, *(f"--{name}={value}" for name, value in arguments.items())]


def run_cell(sweep: Sweep, cell: Cell, stop: Event) -> None:
    """Run a cell in an emptied folder until it ends or is told to stop; `cell.json` appears, whole, if it succeeds."""
    folder = Path(cell["run_dir"])
    command = sweep.command(cell)
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (
        (folder / "log.txt").open("wb") as log,
        Popen(command, stdin=DEVNULL, stdout=log, stderr=log) as process,
    ):
        while process.poll() is None and not stop.wait(0.1):
            pass
        process.terminate()  # does nothing to a process that has ended
    if process.returncode == 0:
        record = {
            "settings": cell,
            "command": shlex.join(command),
            "seconds": time.monotonic() - began,
            "figures": read_figures(folder),
        }
        write_json(folder / "cell.json", record)


def read_figures(folder: Path) -> dict[str, float]:
    """`figures` of an experiment's results; or of a run's log, means over the last tenth of its steps, and totals."""
    results = folder / f"{folder.name}.json"
    if results.exists():
        figures = json.loads(results.read_text())["figures"]
        return {name: value for name, value in figures.items() if type(value) in (int, float)}
    log = folder / "metrics.jsonl"
    if not log.exists():
        return {}
    metrics = read_metrics(log)
    last = metrics.tail(max(1, len(metrics) // 10)).filter(["accept_rate", "mat", "agreement"]).astype(float)
    totals = metrics.filter(["tokens", "wall_s"]).max()
    return dict(pd.concat([last.mean(), totals]).dropna())


def _read(path: Path) -> Any:
    """A JSON file that a sweep wrote; a DvirlError names it if it is damaged."""
    return parse_line(str(path), read_text(path), dict)


def missing_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that are not done; `main` has checked that the others have the same settings."""
    return [cell for cell in cells if not Path(cell["run_dir"], "cell.json").exists()]


def run_cells(sweep: Sweep, cells: Sequence[Cell], at_once: int) -> None:
    """Run the cells that are missing. Whatever ends this early, such as Ctrl-C or SIGTERM, ends their processes."""
    missing = missing_cells(cells)
    stop = Event()
    pool = ThreadPoolExecutor(at_once)
    # By default SIGTERM would end this process at once, and leave the cells' processes running.
    with handled(lambda number, frame: sys.exit(128 + number), signal.SIGTERM):
        try:
            results = pool.map(lambda cell: run_cell(sweep, cell, stop), missing)
            list(tqdm(results, sweep.name, len(missing), unit="cell"))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def make_table(sweep: Sweep, cells: Sequence[Cell]) -> pd.DataFrame:
    """A row for each cell: what the grid sets and its figures; printed, also with means ± deviations over seeds."""
    lines = []
    rows = []
    for cell in cells:
        point = {name: cell[name] for name in sweep.grid}
        kept = Path(cell["run_dir"], "cell.json")
        figures = _read(kept).get("figures", {}) if kept.exists() else {}
        lines.append({**point, **figures})
        point.pop("seed", None)
        rows.append({"variant": urlencode(point), "figures": figures})
    table = pd.DataFrame(lines)
    print(table.to_string(index=False, float_format="{:.6g}".format, na_rep="-"))
    if "seed" in sweep.grid:
        print("\nover seeds:\n" + summary_table(summary(rows), table.columns))
    return table


def last_line(cell: Cell) -> str:
    """The last line in the log of a failed cell, and where the rest is."""
    log = Path(cell["run_dir"], "log.txt")
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"{log} ends with: {lines[-1] if lines else ''}"


@dataclass(frozen=True)
class SweepCommand(Settings):
    """Settings of `dvirl sweep`."""

    file: str = positional()
    """YAML file of a sweep, see configs/sweep-exit-layers.yaml."""
    cores: int = number(os.cpu_count() or 1, 1, 4096)
    """Cores to use."""
    threads: int = number(1, 1, 4096)
    """Threads of each process; cores // threads run at once."""
    out: str = ""
    """Folder of the sweep; runs/FILE by default."""
    dry_run: bool = False
    """Print the commands that are missing, and run nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads > self.cores:
            raise DvirlError(f"threads is {self.threads}; expected 1 to the {self.cores} cores")


def main(argv: Sequence[str]) -> None:
    """Run a sweep, print its table, and write it into `table.csv` and `table.json`.

    Raises:
        DvirlError: for a bad file, a folder of another sweep or in use, or, at the end, cells that failed.
    """
    command = settings.parse_args(
        SweepCommand, "dvirl sweep", "Run every cell of a grid, some at once.", argv
    )
    sweep = from_mapping(Sweep, read_yaml(command.file), command.file)
    out = Path(command.out or f"runs/{Path(command.file).stem}")
    cells = sweep.cells(f"{out}/cells/", command.threads)
    now = {"run": sweep.run, "base": sweep.base, "grid": sorted(sweep.grid), "threads": command.threads}
    path = out / "sweep.json"
    if path.exists():
        refuse_other_settings(path, _read(path), to_plain(now))
    if command.dry_run:
        print("\n".join(shlex.join(sweep.command(cell)) for cell in missing_cells(cells)))
        return
    with run_lock(out):
        write_json(path, now)
        run_cells(sweep, cells, command.cores // command.threads)
    table = make_table(sweep, cells)
    table.to_csv(out / "table.csv", index=False)
    failed = [last_line(cell) for cell in missing_cells(cells)]
    content = {**command_record("sweep", argv), "failed": failed, "rows": table.to_dict("records")}
    write_json(out / "table.json", content)
    print(f"written: {out}/table.csv, {out}/table.json")
    if failed:
        raise DvirlError(
            "\n".join([f"{len(failed)} of {len(cells)} cells failed; the same command goes on", *failed])
        )
