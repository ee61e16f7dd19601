"""Studies of kinds `adaptation` (a stream that changes domain) and `federated` (clients with streams of their own)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dvirl.config import DVIConfig
from dvirl.data.stream import load_prompts
from dvirl.evaluation.agreement import measure_agreement
from dvirl.experiments.study import Prompts, Task, free_memory, load_model, trainer_on
from dvirl.experiments.summary import Row
from dvirl.rollout import Responses
from dvirl.runs import checkpoint
from dvirl.scale.averaging import average_adapters
from dvirl.scale.corpus import answer
from dvirl.trainer import DVITrainer

Probes = dict[str, Responses]
"""The untouched model's answers to held-out prompts, by domain."""


def adaptation(task: Task, folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """A stream that changes domain midway: what is learned, what is forgotten, and what a share of old prompts saves.

    `extra`: `first` and `then` (prompt settings), `prompts` of each, `probes` a half. Variants: `replay_share`, the
    share of prompts after the switch that are drawn from before it.
    """
    study = task.study
    count = study.extra["prompts"]
    every = count // study.extra["probes"]
    sources = {name: study.extra[name] for name in ("first", "then")}
    (old, new), probes = _domains(task, sources, count)
    # Drawn for all variants, also those that are done, so that a study that goes on draws the same.
    rng = random.Random(task.seed)
    mixed = {name: _mix(old, new, variant["replay_share"], rng) for name, variant in study.variants.items()}
    for name, variant in task.due():
        changes = {key: value for key, value in variant.items() if key != "replay_share"}
        config = study.config(task.seed, folder / name, changes, {"num_prompts": 2 * count})
        curve = _probed(config, old + mixed[name], probes, every)
        yield name, [{"figures": adaptation_figures(curve, count), "curve": curve}]


def _mix(old: Prompts, new: Prompts, replay_share: float, rng: random.Random) -> Prompts:
    """The new prompts, a share of them replaced by old ones."""
    return [rng.choice(old) if rng.random() < replay_share else prompt for prompt in new]


def _domains(
    task: Task, sources: Mapping[str, Mapping[str, Any]], count: int
) -> tuple[list[Prompts], Probes]:
    """`count` training prompts of every source, and the untouched model's answers to its held-out ones, by name."""
    loaded = load_model(task.study.config(task.seed, task.shared))
    prompts = []
    probes = {}
    for name, settings in sources.items():
        config = task.study.config(task.seed, task.shared, {**settings, "num_prompts": count})
        split = load_prompts(config, loaded)
        prompts.append(split.stream.take(count))
        probes[name] = answer(loaded, split.held_out, config.max_new_tokens, len(split.held_out))
        free_memory()
    return prompts, probes


def _advance(trainer: DVITrainer, goal: float) -> None:
    """Train until this many prompts are done."""
    while trainer.counters.prompts < goal:
        trainer.advance()


def _probed(config: DVIConfig, prompts: Prompts, probes: Probes, every: int) -> dict[str, list[float]]:
    """Train, and measure the agreement on all probes before the first prompt and after every `every` prompts."""
    trainer = trainer_on(config, prompts)
    curve: dict[str, list[float]] = {"prompts": [], **{name: [] for name in probes}}
    while True:
        done = trainer.counters.prompts
        curve["prompts"].append(done)
        for name, responses in probes.items():
            curve[name].append(measure_agreement(trainer.model, responses).rate)
        if done >= config.num_prompts:
            return curve
        _advance(trainer, min(config.num_prompts, done + every))


def adaptation_figures(curve: Mapping[str, Sequence[float]], switch: int) -> dict[str, float]:
    """Agreement on both domains at the switch and at the end, and what of the first was forgotten."""
    switched = next(index for index, prompts in enumerate(curve["prompts"]) if prompts >= switch)
    figures = {}
    for domain in ("first", "then"):
        figures[f"{domain}_switch"] = curve[domain][switched]
        figures[f"{domain}_end"] = curve[domain][-1]
    return {**figures, "forgotten": figures["first_switch"] - figures["first_end"]}


def federated(task: Task, folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """Clients with prompts of their own train apart and are averaged by tokens every round; or never; or are one.

    `extra`: `clients` (prompt settings by name), `rounds`, `prompts` a client and round. Variants: `mode`, averaged,
    apart or pooled. All start from the same untrained draft; averaging keeps each client's optimizer.
    """
    study = task.study
    rounds = study.extra["rounds"]
    streams, probes = _domains(task, study.extra["clients"], rounds * study.extra["prompts"])
    pooled = [prompt for together in zip(*streams, strict=True) for prompt in together]
    untrained = _save(trainer_on(study.config(task.seed, folder / "start"), pooled))
    for name, variant in task.due():
        by_client = dict(zip(probes, streams, strict=True))
        if variant["mode"] == "pooled":
            by_client = {"pooled": pooled}
        clients = {}
        for client, prompts in by_client.items():
            changes = {"start_from": str(untrained), "num_prompts": len(prompts)}
            clients[client] = (study.config(task.seed, folder / name / client, changes), prompts)
        yield name, [_in_rounds(clients, probes, rounds, variant["mode"] == "averaged")]


def _save(trainer: DVITrainer) -> Path:
    return checkpoint.save(
        Path(trainer.config.run_dir), trainer.counters.step, trainer.peft_model, trainer.model
    )


def _in_rounds(
    clients: Mapping[str, tuple[DVIConfig, Prompts]], probes: Probes, rounds: int, average: bool
) -> Row:
    """Train clients, by name their settings and prompts; after every round, measure each of them on all probes."""
    trainers = {client: trainer_on(config, prompts) for client, (config, prompts) in clients.items()}
    curve: dict[str, list[float]] = {"round": [], "own": [], "all": []}
    for number in range(1, rounds + 1):
        _train_round(list(trainers.values()), number / rounds, average)
        rates = {}
        for client, trainer in trainers.items():
            for domain, responses in probes.items():
                rates[client, domain] = measure_agreement(trainer.model, responses).rate
        # A client's own domain bears its name; pooled clients have all domains for their own.
        own = [rates.get((domain, domain), rates.get(("pooled", domain), 0.0)) for domain in probes]
        curve["round"].append(number)
        curve["own"].append(fmean(own))
        curve["all"].append(fmean(rates.values()))
    figures = {"own": curve["own"][-1], "all": curve["all"][-1]}
    figures |= {f"{client}_on_{domain}": rate for (client, domain), rate in rates.items()}
    return {"figures": figures, "curve": curve}


def _train_round(trainers: Sequence[DVITrainer], share: float, average: bool) -> None:
    """Train every client up to a share of its prompts, then give all of them the mean of their drafts if asked to."""
    before = [trainer.counters.tokens for trainer in trainers]
    for trainer in trainers:
        _advance(trainer, share * trainer.config.num_prompts - 1e-6)
    if not average:
        return
    tokens = [trainer.counters.tokens - past for trainer, past in zip(trainers, before, strict=True)]
    folders = [_save(trainer) for trainer in trainers]
    mean = average_adapters(folders, tokens, folders[0].with_name(f"mean-{share:.3f}"))
    for trainer in trainers:
        checkpoint.load(mean, trainer.peft_model, trainer.model, draft_only=True)
