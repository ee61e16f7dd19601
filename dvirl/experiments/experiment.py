"""One experiment end to end: inject and evaluate, train, evaluate again, and a report of what changed."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dvirl.config import DVIConfig, SGPConfig
from dvirl.evaluation.report import describe, markdown_table, write_report
from dvirl.evaluation.runner import EvalConfig, EvalSettings, evaluate
from dvirl.models.drafters import Draft
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import provenance
from dvirl.runs.log import write_json
from dvirl.runs.settings import ModelSettings, narrowed

COMPARED = {
    "accept_rate": "fixed",
    "mat": "fixed",
    "speedup": "dvi",
    "tok_per_s": "dvi",
    "ppl": "dvi",
    "drift_kl": "dvi",
}
"""Figures on all questions that a result names before and after, and the method whose they are."""


@dataclass(frozen=True)
class ExperimentSettings(EvalSettings):
    """How an experiment evaluates, and where its results go."""

    methods: str = "plain,pld,fixed,dvi"
    """By commas, with fixed and dvi among them; see `dvirl evaluate --help`."""
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


class Experiment:
    """Evaluates a draft before and after training.

    Args:
        config: settings of an experiment.

    Raises:
        DvirlError: if there are results of this name already, or a run.
    """

    def __init__(self, config: Any) -> None:
        assert isinstance(config, ExperimentSettings) and isinstance(config, ModelSettings)
        self.config: Any = config
        self.name = Path(config.run_dir).name
        self.folder = Path(config.results) / self.name
        if self.folder.exists() or (Path(config.run_dir) / "metrics.jsonl").exists():
            raise DvirlError(f"{self.folder} or {config.run_dir} already holds a run; choose another run_dir")

    def run(self, draft: Draft, train: Callable[[], Mapping[str, Any]], draw: Callable[[Path], None]) -> Path:
        """Evaluate, train, evaluate; write results and report.

        Args:
            draft: freshly injected; trained in place.
            train: trains it, and returns what else is worth keeping.
            draw: draws how training went into a file.

        Returns:
            `results/<name>.json`.
        """
        before = self._evaluate(draft, "before")
        trained = train()
        after = self._evaluate(draft, "after")
        compared = pd.DataFrame({"before": _overall(before), "after": _overall(after)})
        content = {
            "settings": asdict(self.config),
            **provenance(draft.loaded),
            "date": time.strftime("%Y-%m-%d"),
            "figures": {
                f"{name}_{when}": value for name, row in compared.iterrows() for when, value in row.items()
            },
            "before": before.to_dict("records"),
            "after": after.to_dict("records"),
            **trained,
        }
        path = Path(f"{self.folder}.json")
        draw(self.folder / "training.png")
        write_json(path, content)
        tables = [f"{when}:\n\n{markdown_table(found.set_index('task'))}" for when, found in
                  (("Before", before), ("After", after))]  # fmt: skip
        figures = [
            f"![]({self.name}/{name})" for name in ("training.png", "before/speedup.png", "after/speedup.png")
        ]
        changed = f"What the draft does on {self.config.questions}, before and after training:"
        parts = [describe(content), changed, markdown_table(compared), *figures, *tables]
        write_report(self.folder, f"Experiment {self.name}", parts)
        print(f"{changed}\n{markdown_table(compared)}\nresults: {path}\nreport: {self.folder}.html")
        return path

    def _evaluate(self, draft: Draft, when: str) -> pd.DataFrame:
        config = self.config
        own = {name: getattr(config, name) for name in ("dtype", "device", "threads", "seed")}
        own |= {"draft": config.run_dir, "run_dir": str(self.folder / when)}
        return evaluate(draft, EvalConfig(**vars(narrowed(EvalSettings, config)), **own))


def _overall(found: pd.DataFrame) -> pd.Series:
    """The figures that are compared."""
    rows = found[found.task == found.task.iloc[-1]].set_index("method")
    return pd.Series({name: float(rows.loc[method, name]) for name, method in COMPARED.items()})
