"""Studies: a question as a YAML file, several seeds, one JSON of results: `dvirl study CONFIG`.

Rows are kept in OUT.rows.jsonl as they come, and the same command goes on where it stopped.
"""

import argparse
import gc
import json
import math
import multiprocessing
import random
import shlex
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from filelock import FileLock
from torch import Tensor

from dvirl.buffer import TrainingBatch
from dvirl.config import DraftSettings, DVIConfig, SGPConfig
from dvirl.data.examples import make_example
from dvirl.data.sources import chatterbot_prompts, read_rows
from dvirl.data.stream import PromptSplit, PromptStream, load_prompts
from dvirl.evaluation.agreement import measure_agreement
from dvirl.experiments.tape import Tape
from dvirl.lora import train_only
from dvirl.losses import exact_pg_loss, reinforce_loss
from dvirl.metrics import STEP_COLUMNS, Served, verifier_figures, verifier_sums
from dvirl.models.loading import LoadedModel, load
from dvirl.rollout import Responses, Rollout, draft_logits_at, judge
from dvirl.runs import checkpoint
from dvirl.runs import folder as run_folder
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import read_metrics, to_plain, write_json, write_text
from dvirl.runs.settings import Settings, from_mapping, read_yaml
from dvirl.scale.averaging import average_adapters
from dvirl.scale.corpus import answer
from dvirl.sgp import SGPTrainer
from dvirl.train_dvi import make_trainer
from dvirl.trainer import DVITrainer
from kangaroo.kangaroo_model import KangarooModel

CURVE_POINTS = 40
"""Points that a recorded curve is thinned to, each the mean of the steps around it."""


REPLIES = 64
"""Human replies on which the verifier's perplexity is measured."""


SHOWN = ("accept_rate", "agreement", "ece", "ppl", "drift_kl", "first_end", "then_end", "forgotten", "own", "all",
         "cos_stale", "cos_redrawn", "hidden_error")  # fmt: skip
"""Figures that the printed table shows, where a study has them."""


Row = dict[str, Any]


Prompts = list[list[int]]


Probes = dict[str, Responses]


@dataclass(frozen=True)
class Study(Settings):
    """One question and the runs that answer it.

    Raises:
        DvirlError: when made with a kind that does not exist or without seeds or variants.
    """

    question: str
    """What it asks, in one sentence."""
    kind: str
    """grid, staleness, adaptation or federated."""
    seeds: list[int]
    """One repetition each."""
    variants: dict[str, dict[str, Any]]
    """Settings by name, on top of `base`; what they mean beyond DVIConfig's fields depends on the kind."""
    base: dict[str, Any] = field(default_factory=dict)
    """DVIConfig settings of all runs."""
    starts: dict[str, dict[str, Any] | None] = field(default_factory=lambda: {"untrained": None})
    """grid: what the variants start from, by name: nothing, a run with these settings on top of `base`, or, under
    `sgp`, a shallow-gradient fine-tuning with these."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the kind needs besides."""
    quick: dict[str, Any] = field(default_factory=dict)
    """seeds, variants (names), base, starts, extra of the laptop-size version."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise DvirlError(f"kind is {self.kind!r:.80}; expected one of {', '.join(KINDS)}")
        if not self.seeds or not self.variants:
            raise DvirlError("a study needs at least one seed and one variant")
        try:
            if self.kind == "staleness" and not 0 < self.extra["ages"] <= 1000:
                raise DvirlError(f"extra is {self.extra!r:.80}; expected 'ages' from 1 to 1000")
            self.small() if self.quick else self.row_names()
        except (KeyError, TypeError, AttributeError) as error:
            raise DvirlError(f"quick or extra does not fit the study ({error!r})") from error

    def small(self) -> "Study":
        """The laptop-size version."""
        quick = self.quick
        changes = quick.get("starts", {})
        return replace(
            self,
            seeds=quick.get("seeds", self.seeds[:1]),
            variants={name: self.variants[name] for name in quick.get("variants", self.variants)},
            base=self.base | quick.get("base", {}),
            starts={name: None if one is None else one | changes.get(name, {}) for name, one in self.starts.items()},
            extra=self.extra | quick.get("extra", {}),
            quick={},
        )

    def config(self, seed: int, run_dir: Path, *changes: Mapping[str, Any]) -> DVIConfig:
        """The settings of one run, later changes first."""
        changed = {name: value for change in changes for name, value in change.items() if name != "sgp"}
        return from_mapping(DVIConfig, {**self.base, "seed": seed, "run_dir": str(run_dir), **changed}, "study")

    def blank_rows(self, seed: int, start: str, variant: str) -> list[Row]:
        """The rows that a variant gives, as yet without figures: one, or of `staleness` one an age."""
        if self.kind == "staleness":
            groups = self.extra["ages"]
            return [{"variant": f"{variant}, age {age + 1} of {groups}", "seed": seed} for age in range(groups)]
        return [{**({"start": start} if self.kind == "grid" else {}), "variant": variant, "seed": seed}]

    def row_names(self) -> list[str]:
        """The names of all rows, in order."""
        runs = [(seed, start, variant) for seed in self.seeds for start in self.starts for variant in self.variants]
        return [row_name(row) for run in runs for row in self.blank_rows(*run)]


def row_name(row: Row, *, keys: Sequence[str] = ("start", "variant", "seed")) -> str:
    """Start (of a grid), variant and seed."""
    return "/".join(str(row[key]) for key in keys if key in row)


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

    def due(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The variants with missing rows and their settings, as long as there is time to begin them."""
        for name, variant in self.study.variants.items():
            rows = {row_name(row) for row in self.study.blank_rows(self.seed, self.start, name)}
            if rows - self.done and time.time() < self.deadline:
                yield name, variant


def draft_cost(model: KangarooModel) -> float:
    """Weights that one drafted token reads, as a share of those of one token of the whole model."""
    base = model.base_model

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for m in modules for name, p in m.named_parameters() if "lora_" not in name)

    draft = count(*base.model.layers[: base.exit_layer], model.adapter_model) + model.exit_proj.weight.numel()
    return draft / (count(*base.model.layers, base.model.norm) + base.lm_head.weight.numel())


def judge_answers(trainer: DVITrainer, rollout: Rollout) -> dict[str, float]:
    """The draft as it is now, on the verifier's answers."""
    served = Served()
    served.add(rollout, judge(trainer.model, rollout, trainer.config.decode))
    agreement = asdict(measure_agreement(trainer.model, rollout.stored()))
    return {
        "accept_rate": served.accepted / served.drafted if served.drafted else math.nan,
        "mat": served.committed / served.blocks if served.blocks else math.nan,
        "agreement": agreement["rate"],
        **{name: agreement[name] for name in ("confidence", "ece", "covered")},
    }


def judge_verifier(trainer: DVITrainer, batch: int = 16, replies: int = REPLIES) -> dict[str, float]:
    """Perplexity of human replies under the verifier, and its drift from the untouched model on them.

    Returns:
        `drift.verifier_figures`, on the replies of the first conversations of chatterbot-corpus, so many of them, in
        the model's chat format.
    """
    chat, prompts = trainer.loaded.chat, chatterbot_prompts()[:replies]
    examples = [make_example(chat.encode(one.turns), chat.encode_response(one.response)) for one in prompts]
    groups = (examples[start : start + batch] for start in range(0, len(examples), batch))
    sums = [verifier_sums(trainer.loaded.model, group, trainer.config.target) for group in groups]
    return verifier_figures(torch.stack(sums).sum(dim=0))


def thinned(run_dir: Path) -> dict[str, list[float | None]]:
    """A run's curve: accept rate, reward, KL and drift over response tokens, in a few dozen means."""
    metrics = read_metrics(run_dir / "metrics.jsonl", STEP_COLUMNS)
    bins = metrics.index * CURVE_POINTS // max(1, len(metrics))
    columns = ["tokens", "accept_rate", "reward", "loss_kl", "drift_kl"]
    means = metrics[columns].astype(float).groupby(bins).mean()
    return {name: [None if value != value else round(value, 5) for value in means[name]] for name in columns}


def learn(config: DVIConfig, split: PromptSplit, tape: Tape) -> Row:
    """Train, and judge before and after; where the verifier does not change, on the responses that the tape holds.

    Returns:
        `figures` and `curve`. An empty tape is recorded.
    """
    trainer = make_trainer(config, split=split)
    changes = config.slow_every > 0 or config.target == "adapted"
    answers = trainer.answer(split.held_out)
    before = judge_answers(trainer, answers)
    if not changes:
        trainer.answer = tape.playing() if tape.rollouts else tape.recording(trainer.answer)
    trainer.train(show_progress=False)
    counters = trainer.counters
    figures: dict[str, Any] = {f"{name}_before": before[name] for name in ("accept_rate", "agreement")}
    figures |= judge_answers(trainer, trainer.answer(split.held_out) if changes else answers)
    figures |= judge_verifier(trainer) if changes else {}
    figures |= {"draft_cost": draft_cost(trainer.model), "tokens": counters.tokens, "steps": counters.step}
    figures |= {"wall_s": counters.wall_s, "drift_flag": counters.drift_flag, "skipped": counters.skipped}
    return {"figures": figures, "curve": thinned(Path(config.run_dir))}


def grid(task: Task, folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """Every variant from a start, on the very same responses where the verifier does not change.

    Starts learn from prompts of their own, before those of the variants; nobody learns from the held-out ones.
    """
    study, seed, settings = task.study, task.seed, task.study.starts[task.start]
    early, late, held_out = _prompts(task)
    tape, begun = Tape(), None
    for name, variant in task.due():
        if begun is None:
            own = PromptSplit(PromptStream(early or late, seed), held_out)
            begun = _begin(study.config(seed, folder / "start", settings or {}), settings, own)
        config = study.config(seed, folder / "variants" / name, begun[0], variant)
        row = learn(config, PromptSplit(PromptStream(late, seed), held_out), tape)
        row["figures"]["start_tokens"] = begun[1]
        yield name, [row]


def _prompts(task: Task) -> list[Prompts]:
    """Prompts for the starts, for the variants, and held out. The first task of a seed reads or writes them for all."""
    study, kept = task.study, task.shared / f"prompts-{task.seed}.json"
    learned = [{**study.base, **one}["num_prompts"] for one in study.starts.values() if one and "sgp" not in one]
    reserved = max(learned, default=0)
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            config = study.config(task.seed, kept)
            split = load_prompts(replace(config, num_prompts=config.num_prompts + reserved), _load(config))
            kept.write_text(json.dumps([split.stream.prompts, split.held_out]))
    _free()
    prompts, held_out = json.loads(kept.read_text())
    if len(prompts) <= reserved:
        raise DvirlError(f"the source has {len(prompts)} prompts, and the starts take {reserved}; none is left")
    return [prompts[:reserved], prompts[reserved:], held_out]


def _begin(config: DVIConfig, settings: Mapping[str, Any] | None, split: PromptSplit) -> tuple[dict[str, Any], int]:
    """Train what the variants start from; the setting that says where it is, and the response tokens it learned from.

    Settings under `sgp` make it a shallow-gradient fine-tuning on chatterbot-corpus' human replies.
    """
    if settings is None:
        return {}, 0
    if not settings.get("sgp"):
        first = make_trainer(config, split=split)
        first.train(show_progress=False)
        return {"start_from": str(checkpoint.newest(config.run_dir))}, first.counters.tokens
    shared = {spec.name: getattr(config, spec.name) for spec in fields(DraftSettings)}
    loaded = _load(config)
    records = [one for one in chatterbot_prompts() if loaded.chat.encode(one.turns) not in split.held_out]
    tuned = SGPTrainer(from_mapping(SGPConfig, {**shared, **settings["sgp"]}, "study"), loaded, records)
    share = tuned.num_steps * tuned.config.batch_size / len(tuned.train_set)
    tokens = round(share * sum(int((one[:, 1] >= 0).sum()) for one in tuned.train_set))
    return {"start_from": tuned.train(show_progress=False).checkpoint}, tokens


def _load(config: DVIConfig) -> LoadedModel:
    torch.set_num_threads(config.threads)  # whichever task comes first, its prompts are written in the same way
    return load(config.model_name, config.dtype, config.device, config.chat_format)


def _free() -> None:
    """Give back the accelerator's memory that nobody uses, a trainer's too, which refers to itself."""
    gc.collect()
    torch.cuda.empty_cache()


def staleness(task: Task, folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """How wrong a gradient is that old records give: by age, against the exact gradient at the same positions.

    One run keeps every record. At its end, records of each age give the REINFORCE gradient with the tokens that the
    old policy drew, the same with tokens drawn anew (once, and many times), and the exact gradient of the expected
    reward.
    `extra`: `ages`, `records` of each, `draws` a position.
    """
    for name, variant in task.due():
        config = task.study.config(task.seed, folder / name, variant)
        yield name, list(_by_age(config, **task.study.extra))


def _by_age(config: DVIConfig, ages: int, records: int, draws: int) -> Iterator[Row]:
    trainer = make_trainer(config)
    trainer.train(show_progress=False)
    ids = trainer.buffer.field("response_id")
    last = int(ids.max()) + 1
    for age in range(ages):
        low, high = (last * (ages - age - step) // ages for step in (1, 0))
        chosen = ((ids >= low) & (ids < high)).nonzero().squeeze(1)[:records]
        figures = stale_gradients(trainer, trainer.buffer.batch(chosen), draws)
        yield {"figures": {**figures, "age_responses": last - 1 - float(ids[chosen].float().mean())}}


def stale_gradients(trainer: DVITrainer, batch: TrainingBatch, draws: int) -> dict[str, float]:
    """The figures of `staleness` for one batch of records; `draws` fresh samples a position stand for many.

    `cos_…` is the cosine of a gradient to the exact one, and `along_…` how much of the exact one it holds: 1 for an
    unbiased estimate, in the mean.
    """
    train_only(trainer.model, trainer.shallow)
    on = trainer.decisions(batch)
    baseline = float(batch.reward.mean())
    policy = (on.logits.detach() / trainer.config.policy_temperature).softmax(dim=-1)
    fresh = torch.multinomial(policy.cpu(), draws, replacement=True, generator=trainer.generator).to(policy.device)
    anew = ((replace(on, drafted=drawn).on_drafted(), (drawn == on.verified).float()) for drawn in fresh.T)
    redrawn = [reinforce_loss(log_probs, rewards, baseline) for log_probs, rewards in anew]
    exact = _gradient(trainer, exact_pg_loss(*on.on_verified()))
    gradients = {
        "stale": _gradient(trainer, reinforce_loss(on.on_drafted(), batch.reward, baseline)),
        "redrawn": _gradient(trainer, redrawn[0]),
        "many": _gradient(trainer, torch.stack(redrawn).mean()),
    }
    with torch.no_grad():
        _, hidden = draft_logits_at(trainer.model, batch.tokens, batch.prompt_lens, batch.row, batch.position)
    return {
        **{f"cos_{name}": float(F.cosine_similarity(one, exact, dim=0)) for name, one in gradients.items()},
        **{f"along_{name}": float(gradients[name] @ exact / exact.square().sum()) for name in ("stale", "redrawn")},
        "hidden_error": float((batch.hidden - hidden).float().norm() / hidden.float().norm()),
        "reward_stored": float(batch.reward.mean()),
        "reward_now": float((fresh == on.verified[:, None]).float().mean()),
    }


def _gradient(trainer: DVITrainer, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss.mean(), trainer.shallow, retain_graph=True, allow_unused=True)
    return torch.cat([part.flatten().float() for part in found if part is not None])


def _on(config: DVIConfig, prompts: Prompts) -> DVITrainer:
    """A trainer on these prompts, in this order."""
    return make_trainer(config, split=PromptSplit(PromptStream(prompts, None), []))


def _advance(trainer: DVITrainer, goal: float) -> None:
    """Train until so many prompts are done."""
    while trainer.counters.prompts < goal:
        trainer.advance()


def _domains(task: Task, sources: Mapping[str, Mapping[str, Any]], count: int) -> tuple[list[Prompts], Probes]:
    """`count` training prompts of every source, and the untouched model's answers to its held-out ones, by name."""
    loaded = _load(task.study.config(task.seed, task.shared))
    prompts, probes = [], {}
    for name, settings in sources.items():
        config = task.study.config(task.seed, task.shared, {**settings, "num_prompts": count})
        split = load_prompts(config, loaded)
        prompts.append(split.stream.take(count))
        probes[name] = answer(loaded, split.held_out, config.max_new_tokens, len(split.held_out))
        _free()
    return prompts, probes


def adaptation(task: Task, folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """A stream that changes domain midway: what is learned, what is forgotten, and what a share of old prompts saves.

    `extra`: `first` and `then` (prompt settings), `prompts` of each, `probes` a half. Variants: `replay_share`, the
    share of prompts after the switch that are drawn from before it.
    """
    study, seed, extra = task.study, task.seed, task.study.extra
    count, rng = extra["prompts"], random.Random(seed)
    (old, new), probes = _domains(task, {key: extra[key] for key in ("first", "then")}, count)
    mixed = {  # of all variants, those that are done too, so that a study that goes on draws the same
        name: [rng.choice(old) if rng.random() < variant["replay_share"] else prompt for prompt in new]
        for name, variant in study.variants.items()
    }
    for name, variant in task.due():
        changes = {k: v for k, v in variant.items() if k != "replay_share"}
        config = study.config(seed, folder / name, changes, {"num_prompts": 2 * count})
        curve = _probed(config, old + mixed[name], probes, count // extra["probes"])
        yield name, [{"figures": adaptation_figures(curve, count), "curve": curve}]


def _probed(config: DVIConfig, prompts: Prompts, probes: Probes, every: int) -> dict[str, list[float]]:
    """Train, and measure the agreement on all probes before the first prompt and after every so many."""
    trainer = _on(config, prompts)
    curve: dict[str, list[float]] = {"prompts": [], **{key: [] for key in probes}}
    while True:
        done = trainer.counters.prompts
        curve["prompts"].append(done)
        for key, responses in probes.items():
            curve[key].append(measure_agreement(trainer.model, responses).rate)
        if done >= config.num_prompts:
            return curve
        _advance(trainer, min(config.num_prompts, done + every))


def adaptation_figures(curve: Mapping[str, Sequence[float]], switch: int) -> dict[str, float]:
    """Agreement on both domains at the switch and at the end, and what of the first was forgotten."""
    at = next(index for index, prompts in enumerate(curve["prompts"]) if prompts >= switch)
    figures = {f"{key}_{when}": curve[key][i] for key in ("first", "then") for when, i in (("switch", at), ("end", -1))}
    return {**figures, "forgotten": figures["first_switch"] - figures["first_end"]}


def federated(task: Task, folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """Clients with prompts of their own train apart and are averaged by tokens every round; or never; or are one.

    `extra`: `clients` (prompt settings by name), `rounds`, `prompts` a client and round. Variants: `mode`, averaged,
    apart or pooled. All start from the same untrained draft; averaging keeps each client's optimizer.
    """
    study, seed, extra = task.study, task.seed, task.study.extra
    own, probes = _domains(task, extra["clients"], extra["rounds"] * extra["prompts"])
    pooled = [prompt for together in zip(*own, strict=True) for prompt in together]
    start = {"start_from": str(_saved(_on(study.config(seed, folder / "start"), pooled)))}
    for name, variant in task.due():
        streams = {"pooled": pooled} if variant["mode"] == "pooled" else dict(zip(probes, own, strict=True))
        clients = {
            client: (study.config(seed, folder / name / client, start, {"num_prompts": len(stream)}), stream)
            for client, stream in streams.items()
        }
        yield name, [_in_rounds(clients, probes, extra["rounds"], variant["mode"] == "averaged")]


def _saved(trainer: DVITrainer) -> Path:
    return checkpoint.save(Path(trainer.config.run_dir), trainer.counters.step, trainer.peft_model, trainer.model)


def _in_rounds(clients: dict[str, tuple[DVIConfig, Prompts]], probes: Probes, rounds: int, average: bool) -> Row:
    """Train clients, by name their settings and prompts; after every round, measure each of them on all probes."""
    trainers = {client: _on(*one) for client, one in clients.items()}
    curve: dict[str, list[float]] = {"round": [], "own": [], "all": []}
    for round_ in range(1, rounds + 1):
        _train_round(list(trainers.values()), round_ / rounds, average)
        rates = {c: {p: measure_agreement(t.model, probes[p]).rate for p in probes} for c, t in trainers.items()}
        curve["round"].append(round_)
        curve["own"].append(fmean(rates[c if c in rates else "pooled"][c] for c in probes))
        curve["all"].append(fmean(rate for client in rates.values() for rate in client.values()))
    figures = {"own": curve["own"][-1], "all": curve["all"][-1]}
    figures |= {f"{c}_on_{p}": rate for c, found in rates.items() for p, rate in found.items()}
    return {"figures": figures, "curve": curve}


def _train_round(trainers: Sequence[DVITrainer], share: float, average: bool) -> None:
    """Train every client up to a share of its prompts, then give all the mean of their drafts if asked to."""
    before = [trainer.counters.tokens for trainer in trainers]
    for trainer in trainers:
        _advance(trainer, share * trainer.config.num_prompts - 1e-6)
    if average:
        tokens = [trainer.counters.tokens - past for trainer, past in zip(trainers, before, strict=True)]
        folders = [_saved(trainer) for trainer in trainers]
        mean = average_adapters(folders, tokens, folders[0].with_name(f"mean-{share:.3f}"))
        for trainer in trainers:
            checkpoint.load(mean, trainer.peft_model, trainer.model, draft_only=True)


KINDS = {kind.__name__: kind for kind in (grid, staleness, adaptation, federated)}


def summary(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over seeds of every figure, by start and variant."""
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for key, value in row["figures"].items():
            groups[row_name(row, keys=("start", "variant"))][key].append(float(value))
    return {name: {key: _spread(values) for key, values in group.items()} for name, group in groups.items()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Over the seeds that have a value: one whose verifier says nothing any more has no agreement."""
    there = [value for value in values if not math.isnan(value)]
    return {
        "mean": fmean(there) if there else math.nan,
        "std": stdev(there) if len(there) > 1 else 0.0,
        "n": len(there),
    }


def resume(study: Study, kept: Path) -> dict[str, Row]:
    """Begin a file of rows, or go on with it: the study's settings in the first line, then a row a line.

    A torn line is dropped. A study goes on with fewer seeds and variants than it has now, if all else is the same.

    Returns:
        The rows that are there, by name.

    Raises:
        DvirlError: if the file holds rows of other settings.
    """
    now = to_plain(asdict(study))
    lines = [line for _, line in (read_rows(str(kept)) if kept.exists() else ()) if isinstance(line, dict)]
    before, *rows = lines or [now]
    theirs = before.get("variants", {})
    differ = [name for name in ("kind", "base", "starts", "extra") if before.get(name) != now[name]]
    differ += [f"variant {name}" for name in theirs if theirs[name] != now["variants"].get(name)]
    differ += [f"seed {seed}" for seed in before.get("seeds", []) if seed not in now["seeds"]]
    if rows and differ:
        raise DvirlError(f"{kept} is of another study ({', '.join(differ)}); remove it, or give another --out")
    write_text(kept, "".join(json.dumps(line) + "\n" for line in [now, *rows]))
    return {row_name(row): row for row in rows}


def _work(task: Task, turn: int) -> Exception | None:
    """Run a task on the accelerator of its turn, each row on disk at once; what went wrong, if anything did."""
    if torch.cuda.is_available():
        torch.cuda.set_device(turn % torch.cuda.device_count())
    try:
        with tempfile.TemporaryDirectory(dir=task.shared) as folder:
            for variant, contents in KINDS[task.study.kind](task, Path(folder)) if any(task.due()) else ():
                blank = task.study.blank_rows(task.seed, task.start, variant)
                _keep(task.kept, [{**row, **content} for row, content in zip(blank, contents, strict=True)])
    except Exception as error:
        if not isinstance(error, DvirlError):
            traceback.print_exc()
        return error.with_traceback(None)  # whose frames would hold the model
    finally:
        _free()
    return None


def _keep(kept: Path, rows: Sequence[Row]) -> None:
    """Append rows in a single write, which those of other processes do not come into, and say them."""
    with kept.open("ab", buffering=0) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    _free()
    for row in rows:
        shown = [f"{name} {value:.3f}" for name, value in row["figures"].items() if isinstance(value, float)]
        print(f"{row_name(row)}: {', '.join(shown[:9])}", file=sys.stderr, flush=True)


def run(study: Study, kept: Path, workers: int = 1, minutes: float = math.inf) -> dict[str, Row]:
    """All rows by name, in order; or those that there are when the time is over.

    Args:
        study: what to run.
        kept: the file that rows are appended to as they come; what it holds already is not run again.
        workers: processes at once, which share seeds and starts; with several accelerators they take turns.
        minutes: after which no further row is begun.

    Raises:
        DvirlError: for a bad setting, or rows of other settings in the file.
        Exception: what went wrong first, after all other tasks are done.
    """
    done, deadline = set(resume(study, kept)), time.time() + 60 * minutes
    runs = [(seed, start) for seed in study.seeds for start in study.starts]
    with tempfile.TemporaryDirectory(prefix="dvirl-study-") as shared:
        tasks = [Task(study, *run, done, kept, deadline, Path(shared)) for run in runs]
        tasks = [task for task in tasks if any(task.due())]
        turns = range(len(tasks))
        if workers == 1:
            ended = list(map(_work, tasks, turns))
        else:
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
                ended = list(pool.map(_work, tasks, turns))
    if errors := [error for error in ended if error]:
        errors[0].add_note(f"the rows of before are kept in {kept}; the same command goes on")
        raise errors[0]
    found = resume(study, kept)
    return {name: found[name] for name in study.row_names() if name in found}


def main(argv: Sequence[str]) -> Path:
    """Run a study, print its table, and write its JSON.

    Raises:
        DvirlError: for a bad file or bad settings.
    """
    args = _parser().parse_args(list(argv))
    study = from_mapping(Study, read_yaml(args.config), args.config)
    study = study.small() if args.quick else study
    if any("=" not in pair for pair in args.set):
        raise DvirlError(f"--set has {' '.join(args.set)}; expected NAME=VALUE")
    changes = {name: yaml.safe_load(value) for name, value in (pair.split("=", 1) for pair in args.set)}
    study = replace(study, seeds=args.seeds or study.seeds, base=study.base | changes)
    out = Path(args.out or f"results/{Path(args.config).stem}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    kept, began = out.with_suffix(".rows.jsonl"), time.time()
    rows = run(study, kept, args.workers, args.minutes)
    missing = [name for name in study.row_names() if name not in rows]
    content = {
        "question": study.question,
        "command": shlex.join(["dvirl", "study", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.time() - began),
        **run_folder.environment(),
        "settings": asdict(study),
        "complete": not missing,
        "missing": missing,
        "summary": summary(list(rows.values())),
        "rows": list(rows.values()),
    }
    write_json(out, content)
    print_table(content["summary"])
    print(f"written: {out}")
    if missing:
        print(f"{len(missing)} rows are missing, {'; '.join(missing)}; the same command goes on with them")
    else:
        kept.unlink()
    return out


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dvirl study", description=__doc__)
    parser.add_argument("config", help="YAML file of a study, see configs/study-*.yaml")
    parser.add_argument("--quick", action="store_true", help="the laptop-size version")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--workers", type=int, default=1, help="processes at once; each takes a seed and a start")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row later; write what is there")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of all runs")
    parser.add_argument("--out", default="", help="JSON file; results/STUDY.json by default")
    return parser


def print_table(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """The first figures of every variant, mean and standard deviation over seeds."""
    names = [name for name in SHOWN if any(name in figures for figures in table.values())]
    print(f"{'':34}" + "".join(f"{name:>19}" for name in names))
    for variant, figures in table.items():
        cells = (figures.get(name) for name in names)
        print(f"{variant:34}" + "".join(f"{c['mean']:11.3f} ± {c['std']:.3f}" if c else f"{'':19}" for c in cells))
