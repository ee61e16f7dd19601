"""Runs studies, several tasks at once: `dvirl study FILE`.

Rows are kept in OUT.rows.jsonl as they come, and the same command goes on where it stopped.
"""

import json
import math
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dvirl.data.sources import read_rows
from dvirl.evaluation.report import command_record
from dvirl.experiments.distillation import distill
from dvirl.experiments.grid import grid
from dvirl.experiments.staleness import staleness
from dvirl.experiments.streams import adaptation, federated
from dvirl.experiments.study import Study, Task, VariantRows, free_memory
from dvirl.experiments.summary import Row, row_name, summary, summary_table
from dvirl.runs import settings
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import refuse_other_settings
from dvirl.runs.log import to_plain, write_json, write_text
from dvirl.runs.settings import Settings, from_mapping, number, parse_yaml, positional, read_yaml, several

RUNNERS: dict[str, Callable[[Task, Path], VariantRows]] = {
    "grid": grid,
    "staleness": staleness,
    "adaptation": adaptation,
    "federated": federated,
    "distill": distill,
}
"""What runs the due variants of a task, by the study's kind: yields each variant's name and rows."""
SHOWN = ("accept_rate", "agreement", "tokens_a_block", "expected_tokens", "ece", "ppl", "drift_kl",
         "first_end", "then_end", "forgotten", "own", "all", "cos_stale", "cos_redrawn", "hidden_error")  # fmt: skip
"""Figures that the printed table shows, where a study has them."""
SAME = ("kind", "base", "starts", "extra")
"""Settings that must not change while a file of rows grows; seeds and variants may be added."""


def run(study: Study, kept: Path, workers: int = 1, minutes: float = math.inf) -> dict[str, Row]:
    """All rows by name, in order; or those that exist when the time is over.

    Args:
        study: what to run.
        kept: the file that rows are appended to as they come; what it holds already is not run again.
        workers: processes at once, which share seeds and starts; with several accelerators they take turns.
        minutes: after which no further row is begun.

    Raises:
        DvirlError: for a bad setting, or rows of other settings in the file.
        Exception: what went wrong first, after all other tasks are done.
    """
    done = set(resume(study, kept))
    deadline = time.time() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="dvirl-study-") as shared:
        tasks = []
        for seed, start in product(study.seeds, study.starts):
            task = Task(study, seed, start, done, kept, deadline, Path(shared))
            if any(task.due()):
                tasks.append(task)
        errors = [error for error in _run_all(tasks, workers) if error]
    if errors:
        errors[0].add_note(f"the rows so far are kept in {kept}; the same command goes on")
        raise errors[0]
    rows = resume(study, kept)
    return {name: rows[name] for name in study.row_names() if name in rows}


def resume(study: Study, kept: Path) -> dict[str, Row]:
    """Begin a file of rows, or go on with it: the study's settings in the first line, then one row a line.

    A torn line is dropped. Seeds and variants may have been added since, if all else is the same.

    Returns:
        The rows that exist, by name.

    Raises:
        DvirlError: if the file holds rows of other settings.
    """
    now = to_plain(asdict(study))
    lines: list[dict[str, Any]] = []
    if kept.exists():
        lines = [line for _, line in read_rows(str(kept)) if isinstance(line, dict)]
    before, *rows = lines or [now]
    if rows:
        # Of the seeds and variants, those that the file has must be here unchanged.
        common = {name: now[name] for name in SAME}
        common["variants"] = {name: now["variants"].get(name) for name in before.get("variants", {})}
        common["seeds"] = [seed for seed in before.get("seeds", []) if seed in now["seeds"]]
        refuse_other_settings(kept, before, common, "remove it, or give another --out")
    write_text(kept, "".join(json.dumps(line) + "\n" for line in [now, *rows]))
    return {row_name(row): row for row in rows}


def _run_all(tasks: Sequence[Task], workers: int) -> list[Exception | None]:
    """Run tasks, some at once; what went wrong in each, if anything did."""
    turns = range(len(tasks))
    if workers == 1:
        return list(map(_run_task, tasks, turns))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_run_task, tasks, turns))


def _run_task(task: Task, turn: int) -> Exception | None:
    """Run a task on the accelerator of its turn, each row on disk at once; what went wrong, if anything did."""
    if torch.cuda.is_available():
        torch.cuda.set_device(turn % torch.cuda.device_count())
    try:
        with tempfile.TemporaryDirectory(dir=task.shared) as folder:
            # By now the time may be over, and then even preparing would take long.
            for variant, contents in RUNNERS[task.study.kind](task, Path(folder)) if any(task.due()) else ():
                blank = task.study.blank_rows(task.seed, task.start, variant)
                keep(task.kept, [{**row, **content} for row, content in zip(blank, contents, strict=True)])
    except Exception as error:
        if not isinstance(error, DvirlError):
            traceback.print_exc()
        return error.with_traceback(None)  # its frames would hold the model
    finally:
        free_memory()
    return None


def keep(kept: Path, rows: Sequence[Row]) -> None:
    """Append rows in a single write, which no other process can interrupt, and print them."""
    with kept.open("ab", buffering=0) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    free_memory()
    for row in rows:
        figures = [
            f"{name} {value:.3f}" for name, value in row["figures"].items() if isinstance(value, float)
        ]
        print(f"{row_name(row)}: {', '.join(figures[:9])}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class StudyCommand(Settings):
    """Settings of `dvirl study`."""

    file: str = positional()
    """YAML file of a study, such as configs/study-objectives.yaml."""
    quick: bool = False
    """Run the laptop-size version."""
    seeds: list[int] = several(limits=(0, 2**63 - 1))
    """Seeds to use instead of the file's."""
    workers: int = number(1, 1, 1024)
    """Processes at once; each takes a seed and a start."""
    minutes: float = number(math.inf, 0, math.inf)
    """Begin no row later than this, and write what exists."""
    set: list[str] = several(count="*")
    """Settings of all runs, as NAME=VALUE."""
    out: str = ""
    """JSON file to write; results/STUDY.json by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any("=" not in pair for pair in self.set):
            raise DvirlError(f"--set has {' '.join(self.set)}; expected NAME=VALUE")

    def study(self) -> Study:
        """The study of the file, in the size and with the changes asked for."""
        study = from_mapping(Study, read_yaml(self.file), self.file)
        if self.quick:
            study = study.small()
        changes = {}
        for pair in self.set:
            name, value = pair.split("=", 1)
            changes[name] = parse_yaml(f"--set {name}", value)
        return replace(study, seeds=self.seeds or study.seeds, base=study.base | changes)


def main(argv: Sequence[str]) -> Path:
    """Run a study, print its table, and write its JSON.

    Raises:
        DvirlError: for a bad file or bad settings.
    """
    command = settings.parse_args(
        StudyCommand, "dvirl study", "Run a study: variants and seeds that answer one question.", argv
    )
    study = command.study()
    out = Path(command.out or f"results/{Path(command.file).stem}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = out.with_suffix(".rows.jsonl")
    began = time.time()
    rows = run(study, kept, command.workers, command.minutes)
    missing = [name for name in study.row_names() if name not in rows]
    found = list(rows.values())
    table = summary(found)
    content = {
        "question": study.question,
        **command_record("study", argv),
        "seconds": round(time.time() - began),
        "settings": asdict(study),
        "complete": not missing,
        "missing": missing,
        "summary": table,
        "rows": found,
    }
    write_json(out, content)
    if rows:
        print(summary_table(table, SHOWN))
    print(f"written: {out}")
    if missing:
        print(f"{len(missing)} rows are missing, {'; '.join(missing)}; the same command goes on with them")
    else:
        kept.unlink()
    return out
