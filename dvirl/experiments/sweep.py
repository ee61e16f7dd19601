"""Sweeps: every cell of a grid as a process of its own, some at once, one table at the end: `dvirl sweep FILE`.

A cell is a notebook under papermill or a dvirl command. The same command again runs only the cells that are missing.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice, product
from pathlib import Path
from subprocess import DEVNULL, Popen
from threading import Event
from urllib.parse import urlencode

import pandas as pd
from tqdm import tqdm

from dvirl import config
from dvirl.runs import folder as run_folder
from dvirl.runs import log as run_log
from dvirl.runs import settings
from dvirl.runs.errors import DvirlError

RUNS = {"train": config.DVIConfig, "sgp": config.SGPConfig, "experiment": None, "sgp-experiment": None}
"""Commands that can be swept, and what checks all cells before any of them runs; the last two check their own."""


@dataclass(frozen=True)
class Sweep:
    """What to run, and the grid of its settings.

    Raises:
        DvirlError: when made with a notebook or command that does not exist, or with a bad grid or setting.
    """

    run: str = ""
    """Path of a notebook (.ipynb), or train, sgp, experiment or sgp-experiment."""
    grid: dict[str, list[object]] = field(default_factory=dict)
    """Values by setting; every combination is a cell."""
    base: dict[str, object] = field(default_factory=dict)
    """Settings of all cells."""
    name: str = ""
    """What the progress bar calls it."""

    def __post_init__(self) -> None:
        if [*map(type, (self.run, self.name, self.grid, self.base))] != [str, str, dict, dict] or not self.grid:
            raise DvirlError(f"a sweep needs run (text) and grid (settings); base is settings, name text: {self!s:.99}")
        if self.run not in RUNS and not (self.run.endswith(".ipynb") and os.path.isfile(self.run)):
            raise DvirlError(f"run is {self.run!r:.80}; expected a notebook that exists or one of {', '.join(RUNS)}")
        if bad := [k for k, v in self.grid.items() if not isinstance(v, list) or not 0 < len(v) == len({*map(str, v)})]:
            raise DvirlError(f"grid has {bad[0]!s:.80}: {self.grid[bad[0]]!r:.80}; expected a list of different values")
        if any(islice(product(*self.grid.values()), 10_000, None)):
            raise DvirlError("grid makes more than 10,000 cells")
        if taken := ({"run_dir", "threads", "results"} | {*self.base} & {*self.grid}) & {*self.base, *self.grid}:
            raise DvirlError(f"{', '.join(sorted(taken))}: set by base and grid both, or for each cell by the sweep")
        for cell in self.cells("", 1):
            if kind := RUNS.get(self.run):
                settings.from_mapping(kind, cell, self.run)

    def cells(self, out: str, threads: int) -> list[dict[str, object]]:
        """All cells in the grid's order, with folders in `out`, which ends in a slash."""
        points = (dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values()))
        return [{**self.base, **p, "threads": threads, "run_dir": out + urlencode(p).replace("&", ",")} for p in points]

    def command(self, cell: dict[str, object]) -> list[str]:
        """What runs a cell, for a shell too."""
        given = {**cell, **({"results": cell["run_dir"]} if self.run.endswith("experiment") else {})}
        flags = ((f"--{k}={v}",) if self.run in RUNS else ("-p", k, str(v)) for k, v in given.items())
        notebook = ["papermill", self.run, f"{cell['run_dir']}/{Path(self.run).name}", "--kernel", "python3"]
        program = ["dvirl.cli", self.run] if self.run in RUNS else notebook
        return ["env", f"OMP_NUM_THREADS={cell['threads']}", sys.executable, "-m", *program, *chain(*flags)]


def run_cell(sweep: Sweep, cell: dict[str, object], stop: Event) -> None:
    """Run a cell in an emptied folder until it ends or is told to stop; `cell.json` appears, whole, if it succeeds."""
    folder, command, began = Path(str(cell["run_dir"])), sweep.command(cell), pd.Timestamp.now()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("wb") as log, Popen(command, stdin=DEVNULL, stdout=log, stderr=log) as process:
        while process.poll() is None and not stop.wait(0.1):
            pass
        process.terminate()  # which does nothing to one that has ended
    if process.returncode == 0:
        made = {"command": shlex.join(command), "seconds": (pd.Timestamp.now() - began).total_seconds()}
        run_log.write_json(folder / "cell.json", {"settings": cell, **made, "figures": read_figures(folder)})


def read_figures(folder: Path) -> dict[str, float]:
    """`figures` of an experiment's results; or of a run's log, means over the last tenth of its steps, and totals."""
    if (results := folder / f"{folder.name}.json").exists():
        return {k: v for k, v in json.loads(results.read_text())["figures"].items() if type(v) in (int, float)}
    metrics = run_log.read_metrics(log) if (log := folder / "metrics.jsonl").exists() else pd.DataFrame()
    last = metrics.tail(max(1, len(metrics) // 10)).filter(["accept_rate", "mat", "agreement"]).astype(float)
    return {**pd.concat([last.mean(), metrics.filter(["tokens", "wall_s"]).max()]).dropna()}


def kept(cell: dict[str, object]) -> dict[str, float] | None:
    """The figures of a cell that is done, with the same settings, as `main` has seen to."""
    return dict(json.loads(p.read_text())["figures"]) if (p := Path(f"{cell['run_dir']}/cell.json")).exists() else None


def run_cells(sweep: Sweep, cells: list[dict[str, object]], at_once: int) -> None:
    """Run the cells that are missing. Whatever ends this early, like Ctrl-C and SIGTERM, ends them too."""
    missing, pool, stop = [cell for cell in cells if kept(cell) is None], ThreadPoolExecutor(at_once), Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        list(tqdm(pool.map(lambda cell: run_cell(sweep, cell, stop), missing), sweep.name, len(missing), unit="cell"))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


def make_table(sweep: Sweep, cells: list[dict[str, object]]) -> pd.DataFrame:
    """A row a cell, what the grid sets and its figures; printed, and with means ± deviations over seeds."""
    table = pd.DataFrame([{**{name: cell[name] for name in sweep.grid}, **(kept(cell) or {})} for cell in cells])
    print(table.to_string(index=False, float_format="{:.6g}".format, na_rep="-"))
    if "seed" in sweep.grid:
        others = [urlencode({name: cell[name] for name in sweep.grid if name != "seed"}) for cell in cells]
        by = table.drop(columns=[*sweep.grid]).groupby(others, sort=False)
        print("\nover seeds:\n" + (by.mean().map("{:.6g}".format) + by.std().map(" ± {:.2g}".format)).to_string())
    return table


def main(argv: list[str]) -> None:
    """Run a sweep, print its table, and write it into `table.csv` and `table.json`.

    Raises:
        DvirlError: for a bad file, a folder of another sweep or in use, or, at the end, cells that failed.
    """
    parser = argparse.ArgumentParser(prog="dvirl sweep", description=__doc__)
    parser.add_argument("file", help="YAML file of a sweep, see configs/sweep-exit-layers.yaml")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="cores to use; by default all there are")
    parser.add_argument("--threads", type=int, default=1, help="of each process; cores // threads run at once")
    parser.add_argument("--out", default="", help="folder of the sweep; runs/FILE by default")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that are missing, and run nothing")
    args = parser.parse_args(argv)
    sweep = settings.from_mapping(Sweep, settings.read_yaml(args.file), args.file)
    if not 1 <= args.threads <= args.cores:
        raise DvirlError(f"threads is {args.threads}; expected 1 to the {args.cores} cores")
    out = Path(args.out or f"runs/{Path(args.file).stem}")
    cells = sweep.cells(f"{out}/cells/", args.threads)
    now = {"run": sweep.run, "base": sweep.base, "grid": sorted(sweep.grid), "threads": args.threads}
    if (path := out / "sweep.json").exists():
        run_folder.refuse_other_settings(path, json.loads(path.read_text()), run_log.to_plain(now))
    if args.dry_run:
        print("\n".join(shlex.join(sweep.command(cell)) for cell in cells if kept(cell) is None))
        return
    with run_folder.run_lock(out):
        run_log.write_json(path, now)
        run_cells(sweep, cells, args.cores // args.threads)
    table = make_table(sweep, cells)
    table.to_csv(out / "table.csv", index=False)
    logs = [Path(f"{cell['run_dir']}/log.txt") for cell in cells if kept(cell) is None]
    failed = [f"{log} ends with: {''.join(log.read_text(errors='replace').strip().splitlines()[-1:])}" for log in logs]
    about = {"command": shlex.join(["dvirl", "sweep", *argv]), "date": str(pd.Timestamp.now().date()), "failed": failed}
    run_log.write_json(out / "table.json", {**about, **run_folder.environment(), "rows": table.to_dict("records")})
    print(f"written: {out}/table.csv, {out}/table.json")
    if failed:
        raise DvirlError("\n".join([f"{len(failed)} of {len(cells)} cells failed; the same command goes on", *failed]))
