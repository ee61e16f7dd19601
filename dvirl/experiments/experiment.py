"""One experiment end to end: inject and evaluate, train, evaluate again, and a report of what changed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from dvirl.config import DVIConfig, SGPConfig
from dvirl.evaluation.report import describe, markdown_table, write_report
from dvirl.evaluation.runner import EvalConfig, EvalSettings, evaluate
from dvirl.models.drafters import Draft
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import provenance
from dvirl.runs.log import read_metrics, write_json
from dvirl.runs.settings import narrowed

COMPARED = {
    "accept_rate": "fixed",
    "mat": "fixed",
    "speedup": "dvi",
    "tok_per_s": "dvi",
    "ppl": "dvi",
    "drift_kl": "dvi",
}
"""Figures that are compared before and after training, over all questions, and the method that each is taken from."""


@dataclass(frozen=True)
class ExperimentSettings(EvalSettings):
    """How an experiment evaluates, and where its results go."""

    methods: str = "plain,pld,fixed,dvi"
    """Separated by commas, with fixed and dvi among them; see `dvirl evaluate --help`."""
    results: str = "results"
    """Folder of <name of run_dir>.json, of the report with that name, and of a folder with all answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not {"fixed", "dvi"} <= set(self.methods.split(",")):
            raise DvirlError(f"methods is {self.methods!r}; expected fixed and dvi among them")


@dataclass(frozen=True)
class DVIExperiment(ExperimentSettings, DVIConfig):
    """Settings of `dvirl experiment`: those of training, and those of evaluation."""


@dataclass(frozen=True)
class SGPExperiment(ExperimentSettings, SGPConfig):
    """Settings of `dvirl sgp-experiment`: those of fine-tuning, and those of evaluation."""

    run_dir: str = "runs/sgp"
    """Folder of this run: config.yaml, metrics.jsonl, checkpoints/."""


AnyExperiment = DVIExperiment | SGPExperiment


def run_experiment(
    config: AnyExperiment, kind: type[Any], make_trainer: Callable[[Any], Any], draw: Callable[..., None]
) -> Path:
    """Evaluate a fresh draft, train it, evaluate it again; write results and report.

    Args:
        config: settings of the experiment.
        kind: the class of its settings for training.
        make_trainer: makes a trainer by these.
        draw: draws the run's log, as `read_metrics` gives it, into the file `save`.

    Returns:
        `results/<name>.json`.

    Raises:
        DvirlError: if there are results of this name already, or a run; nothing is overwritten.
    """
    folder = _folder(config)
    if folder.exists() or (Path(config.run_dir) / "metrics.jsonl").exists():
        raise DvirlError(f"{folder} or {config.run_dir} already holds a run; choose another run_dir")
    trainer = make_trainer(narrowed(kind, config))
    draft = Draft(trainer.model, trainer.loaded, getattr(config, "target", "base"))
    before = _evaluate(config, draft, "before")
    result = trainer.train()
    trained = {"held_out": asdict(result)} if result else {"counters": vars(trainer.counters)}
    after = _evaluate(config, draft, "after")
    compared = pd.DataFrame({"before": _overall(before), "after": _overall(after)})
    content = {
        "settings": asdict(config),
        **provenance(draft.loaded),
        "figures": {f"{name}_{when}": compared[when][name] for name in compared.index for when in compared},
        "before": before.to_dict("records"),
        "after": after.to_dict("records"),
        **trained,
    }
    draw(read_metrics(Path(config.run_dir) / "metrics.jsonl"), save=folder / "training.png")
    path = Path(f"{folder}.json")
    write_json(path, content)
    _write_report(config, content, compared, {"Before:": before, "After:": after})
    print(f"results: {path}\nreport: {folder}.html")
    return path


def _write_report(
    config: AnyExperiment, content: dict[str, Any], compared: pd.DataFrame, found: dict[str, pd.DataFrame]
) -> None:
    """Print the comparison, and write the report: the comparison first, then both evaluations in full."""
    folder = _folder(config)
    changed = (
        f"What the draft does on {config.questions}, before and after training:\n\n{markdown_table(compared)}"
    )
    parts = [describe(content), changed]
    parts += [
        f"![]({folder.name}/{image})" for image in ("training.png", "before/speedup.png", "after/speedup.png")
    ]
    for title, figures in found.items():
        parts += [title, markdown_table(figures.set_index("task"))]
    write_report(folder, f"Experiment {folder.name}", parts)
    print(changed)


def _folder(config: AnyExperiment) -> Path:
    """Where both evaluations go; the results and the report have its name."""
    return Path(config.results) / Path(config.run_dir).name


def _evaluate(config: AnyExperiment, draft: Draft, when: str) -> pd.DataFrame:
    """`evaluate` with the experiment's settings, into a folder of its own."""
    values: dict[str, Any] = {spec.name: getattr(config, spec.name, "") for spec in fields(EvalConfig)}
    values |= {"draft": config.run_dir, "run_dir": str(_folder(config) / when)}
    return evaluate(draft, EvalConfig(**values))


def _overall(figures: pd.DataFrame) -> pd.Series:
    """The compared figures on all questions, each of its method."""
    # The last task is "overall", or the only one.
    overall = figures[figures.task == figures.task.iloc[-1]].set_index("method")
    return pd.Series({name: float(overall[name][method]) for name, method in COMPARED.items()})
