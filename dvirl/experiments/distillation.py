"""Studies of kind `distill`: objectives of `dvirl distill`, from one drafter, on the same self-written text."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from dvirl.evaluation.agreement import measure_agreement, measure_blocks
from dvirl.evaluation.questions import question_sets
from dvirl.experiments.study import Study, Task, Values, VariantRows, load_model
from dvirl.models.drafters import drafter_folder
from dvirl.models.loading import LoadedModel
from dvirl.rollout import Responses, join
from dvirl.runs.settings import from_mapping, number
from dvirl.scale.corpus import answer, read_shard, without_repeats, write_conversations, write_shard
from dvirl.scale.distill import DistillConfig, Distiller

TEXT_SEED = 4242
"""Of the conversations to learn from; those to judge on have the next one."""
Figures = dict[str, float]
Workbench = tuple[Distiller, dict[str, Responses], Figures]
"""A trainer, whose model and responses serve every run in turn; answers to judge on, by name; and the figures of the
drafter that all runs start from."""


@dataclass(frozen=True)
class Objectives(DistillConfig):
    """Settings of such a study's runs. `start_from` has to be given; `responses_from` and `exclude` are its own."""

    num_prompts: int = number(256, 1)
    """Conversations that are begun, for all runs to learn from."""
    held_out: int = number(64, 1)
    """Conversations that are begun, to judge on; nobody learns from them."""
    max_new_tokens: int = number(128, 2)
    """Length limit of an answer."""
    text: str = ""
    """Folder in which they are kept; without one they are gone when the command ends."""
    questions: str = ""
    """Question files in Spec-Bench's schema, by commas, to judge on, too; text that overlaps them is left out."""


def settings_of(study: Study, seed: int, run_dir: Path, variant: Values) -> Objectives:
    """The settings of one run: `extra`, `base`, then the variant's."""
    values = {**study.extra, **study.base, **variant, "seed": seed, "run_dir": str(run_dir)}
    config = from_mapping(Objectives, values, "study")
    return replace(config, answer_tokens=config.max_new_tokens)


def distill(task: Task, folder: Path) -> VariantRows:
    """Go on with a drafter by each objective, in the order of the seed, over the same text.

    A row has the figures of the drafter on answers that nobody learned from, at the end and, as `…_before`, at the
    start. Base and variants: settings of `Objectives`.
    """
    study = task.study
    config = settings_of(study, study.seeds[0], task.shared / "bench", {})
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    for name, variant in task.due():
        trainer, sets, before = _workbench(task.shared, config, device)
        with tempfile.TemporaryDirectory(dir=folder) as run_dir:
            trainer.begin_again(settings_of(study, task.seed, Path(run_dir), variant))
            trainer.train(show_progress=False)
            yield name, [{"figures": _judged(trainer, sets) | before | asdict(trainer.counters)}]


@lru_cache(maxsize=1)
def _workbench(shared: Path, config: Objectives, device: int) -> Workbench:
    """Model, text and answers; the first task of a process on a device makes them for the others."""
    drafter_folder(config.start_from)  # a missing one is said now, and not when the text is written
    loaded = load_model(config)
    files = config.questions.split(",") if config.questions else []
    asked = question_sets(loaded, files, 0, config.seed) if files else {}
    text = Path(config.text or shared / "text")
    learned = _written(loaded, config, text / "learned", config.num_prompts, TEXT_SEED)
    held_out = _written(loaded, config, text / "held-out", config.held_out, TEXT_SEED + 1)
    # Of prompts that are in both, the first counts.
    distinct = without_repeats(join([learned, held_out]))
    sets = {"": distinct.take(slice(len(without_repeats(learned)), None))}
    for path, prompts in asked.items():
        sets[f"{Path(path).stem}_"] = answer(loaded, prompts, config.max_new_tokens, config.write_batch)
    trainer = Distiller(replace(config, responses_from=f"{text}/learned", exclude=config.questions), loaded)
    before = {f"{name}_before": value for name, value in _judged(trainer, sets).items()}
    return trainer, sets, before


def _written(loaded: LoadedModel, config: Objectives, folder: Path, count: int, seed: int) -> Responses:
    """Conversations that the model holds with itself, from their folder or, the first time, written."""
    path = folder / "shard-00000.safetensors"
    if not path.exists():
        conversations = write_conversations(
            loaded,
            count,
            seed,
            config.max_new_tokens,
            config.follow_up,
            config.write_batch,
            config.about_text,
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_shard(path, conversations)
    return read_shard(path)


def _judged(trainer: Distiller, sets: Mapping[str, Responses]) -> Figures:
    """The drafter as it is now, on every set, whose name begins that of its figures."""
    figures: Figures = {}
    for name, responses in sets.items():
        agreement = measure_agreement(trainer.model, responses)
        blocks = measure_blocks(trainer.model, responses, trainer.config.depths)
        for figure in ("tokens_a_block", "expected_tokens"):
            figures[name + figure] = getattr(blocks, figure)
        for figure in ("ece", "confidence"):
            figures[name + figure] = getattr(agreement, figure)
        for depth, rate in enumerate(blocks.by_depth, start=1):
            figures[f"{name}depth_{depth}"] = rate
        figures[f"{name}agreement"] = agreement.rate
    return figures
