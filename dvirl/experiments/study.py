"""What a study is: one question, the variants and seeds that answer it, and the names of its rows."""

import gc
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dvirl.config import DVIConfig
from dvirl.data.stream import PromptSplit, PromptStream
from dvirl.experiments.summary import Row, row_name
from dvirl.models.loading import LoadedModel, load_for
from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import ModelSettings, Settings, from_mapping
from dvirl.train_dvi import make_trainer
from dvirl.trainer import DVITrainer

KINDS = ("grid", "staleness", "adaptation", "federated", "distill")
OF_PROMPTS = ("prompts_source", "prompts_path", "max_prompt_tokens", "held_out", "on_bad_row")
"""Settings that all of a grid has in common: its prompts are read once."""
OF_ANSWERS = ("max_new_tokens", "model_name", "dtype")
"""Settings that all variants of a grid have in common: they learn from the very same answers."""
NEEDED = {
    "staleness": ("ages", "records", "draws"),
    "adaptation": ("first", "then", "prompts", "probes"),
    "federated": ("clients", "rounds", "prompts"),
}
"""What a kind needs in `extra`: settings of prompts, and numbers."""
OF_STREAMS = ("first", "then", "clients")
"""Those that are settings of prompts."""
MOST = 100_000
"""Of any number in `extra`: more would be hours of text, or rows that fill the memory."""
QUICK = {"seeds", "variants", "base", "starts", "extra"}
"""What the laptop-size version may have of its own."""
Prompts = list[list[int]]
Values = dict[str, Any]
"""Settings by name."""
VariantRows = Iterator[tuple[str, list[Row]]]
"""What running a task yields: the name of each due variant, and its rows."""


@dataclass(frozen=True)
class Study(Settings):
    """One question and the runs that answer it.

    Raises:
        DvirlError: when made with a kind that does not exist or without seeds or variants.
    """

    question: str
    """What it asks, in one sentence."""
    kind: str = field(metadata={"allowed": KINDS})
    """grid, staleness, adaptation, federated or distill."""
    seeds: list[int]
    """One repetition each."""
    variants: dict[str, Values]
    """Settings by name, on top of `base`; what they mean beyond DVIConfig's fields depends on the kind."""
    base: Values = field(default_factory=dict)
    """DVIConfig settings of all runs; those of `distillation.Objectives` for distill."""
    starts: dict[str, Values | None] = field(default_factory=lambda: {"untrained": None})
    """grid: what the variants start from, by name: nothing, a run with these settings on top of `base`, or, under
    `sgp`, a shallow-gradient fine-tuning with these."""
    extra: Values = field(default_factory=dict)
    """What the kind needs besides."""
    quick: Values = field(default_factory=dict)
    """seeds, variants (names), base, starts, extra of the laptop-size version."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.seeds and self.variants and self.starts):
            raise DvirlError("a study needs at least one seed, one variant and one start")
        if len({*self.seeds}) < len(self.seeds):
            raise DvirlError(f"seeds are {self.seeds!r:.80}; expected different ones")
        if taken := sorted({*self.base} & {"seed", "run_dir"}):
            raise DvirlError(
                f"base or --set has {', '.join(taken)}; expected what the study does not set itself"
            )
        if unknown := sorted({*self.quick} - QUICK):
            raise DvirlError(
                f"quick has {', '.join(unknown):.80}; expected some of {', '.join(sorted(QUICK))}"
            )
        # Anything may stand in quick and extra; whatever does not fit there fails here, before hours of training.
        try:
            for name in NEEDED.get(self.kind, ()):
                value = self.extra[name]
                if name in OF_STREAMS and not isinstance(value, dict):
                    raise DvirlError(f"extra has {name}: {value!r:.80}; expected settings of prompts")
                if name not in OF_STREAMS and not 0 < operator.index(value) <= MOST:
                    raise DvirlError(f"extra has {name}: {value!r:.80}; expected 1 to {MOST:,}")
            if self.kind == "grid":
                self._refuse_own(self.starts, OF_PROMPTS)
                self._refuse_own(self.variants, OF_PROMPTS + OF_ANSWERS)
            if self.quick:
                self.small()
            self.row_names()
        except (KeyError, TypeError, AttributeError) as error:
            raise DvirlError(f"quick or extra does not fit the study ({error!r})") from error

    @staticmethod
    def _refuse_own(runs: Mapping[str, Values | None], names: Sequence[str]) -> None:
        for run, values in runs.items():
            own = sorted({*(values or {})} & {*names})
            if own:
                raise DvirlError(f"{run} has its own {', '.join(own)}; expected in base, for all alike")

    def small(self) -> "Study":
        """The laptop-size version."""
        quick = self.quick
        starts = {}
        for name, settings in self.starts.items():
            changes = quick.get("starts", {}).get(name, {})
            starts[name] = None if settings is None else settings | changes
        return replace(
            self,
            seeds=quick.get("seeds", self.seeds[:1]),
            variants={name: self.variants[name] for name in quick.get("variants", self.variants)},
            base=self.base | quick.get("base", {}),
            starts=starts,
            extra=self.extra | quick.get("extra", {}),
            quick={},
        )

    def config(self, seed: int, run_dir: Path, *changes: Mapping[str, Any]) -> DVIConfig:
        """The settings of one run: `base`, then the changes in order."""
        values: Values = {**self.base, "seed": seed, "run_dir": str(run_dir)}
        for change in changes:
            values |= change
        values.pop("sgp", None)  # a start's own, and no setting of DVI
        return from_mapping(DVIConfig, values, "study")

    def blank_rows(self, seed: int, start: str, variant: str) -> list[Row]:
        """The rows that a variant gives, without figures yet: one, or of `staleness` one for each age."""
        if self.kind == "grid":
            return [{"start": start, "variant": variant, "seed": seed}]
        names = [variant]
        if self.kind == "staleness":
            ages = self.extra["ages"]
            names = [f"{variant}, age {age} of {ages}" for age in range(1, ages + 1)]
        return [{"variant": name, "seed": seed} for name in names]

    def row_names(self) -> list[str]:
        """The names of all rows, in order."""
        names = []
        for seed, start, variant in product(self.seeds, self.starts, self.variants):
            names += [row_name(row) for row in self.blank_rows(seed, start, variant)]
        return names


@dataclass(frozen=True)
class Task:
    """What one process does at a time: the missing rows of one seed and one start.

    Attributes:
        study, seed, start: of these.
        done: the names of rows that need not be run.
        kept: the file that rows are appended to.
        deadline: when no further row is begun, in `time.time()`'s seconds.
        shared: a folder of all tasks, for the time of the command.
    """

    study: Study
    seed: int
    start: str
    done: set[str]
    kept: Path
    deadline: float
    shared: Path

    def config(self, run_dir: Path, *changes: Mapping[str, Any]) -> DVIConfig:
        """`Study.config` with the task's seed."""
        return self.study.config(self.seed, run_dir, *changes)

    def due(self) -> Iterator[tuple[str, Values]]:
        """The variants with missing rows and their settings, as long as there is time to begin them."""
        for name, variant in self.study.variants.items():
            rows = {row_name(row) for row in self.study.blank_rows(self.seed, self.start, name)}
            # The clock is asked before every variant, since each may take hours.
            if rows - self.done and time.time() < self.deadline:
                yield name, variant


def load_model(config: ModelSettings) -> LoadedModel:
    """The model of a run, on the study's threads: whichever task comes first, its prompts are written alike."""
    torch.set_num_threads(config.threads)
    return load_for(config)


def trainer_on(config: DVIConfig, prompts: Prompts) -> DVITrainer:
    """A trainer on these prompts, in this order."""
    return make_trainer(config, split=PromptSplit(PromptStream(prompts, None), []))


def free_memory() -> None:
    """Give back the accelerator's memory that nobody uses, a trainer's too, which refers to itself."""
    gc.collect()
    torch.cuda.empty_cache()
