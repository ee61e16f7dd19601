"""Studies of kinds `adaptation` (a stream that changes domain) and `federated` (clients with streams of their own)."""

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from dvirl.config import DVIConfig
from dvirl.data.stream import load_prompts
from dvirl.evaluation.agreement import measure_agreement
from dvirl.experiments.study import Prompts, Task, Values, VariantRows, free_memory, load_model, trainer_on
from dvirl.experiments.summary import Row
from dvirl.rollout import Responses
from dvirl.runs import checkpoint
from dvirl.runs.errors import DvirlError
from dvirl.scale.averaging import average_adapters
from dvirl.scale.corpus import answer
from dvirl.trainer import DVITrainer

Probes = dict[str, Responses]
"""The untouched model's answers to held-out prompts, by domain."""
Curve = dict[str, list[float]]
"""What was measured during training, by name."""


def adaptation(task: Task, folder: Path) -> VariantRows:
    """A stream that changes domain midway: what is learned, what is forgotten, and what a share of old prompts saves.

    `extra`: `first` and `then` (prompt settings), `prompts` of each, `probes` a half. Variants: `replay_share`, the
    share of prompts after the switch that are drawn from before it.
    """
    extra = task.study.extra
    count = extra["prompts"]
    every = count // extra["probes"]
    sources = {name: extra[name] for name in ("first", "then")}
    (old, new), probes = _domains(task, sources, count)
    # Drawn for all variants, also those that are done, so that a study that goes on draws the same.
    rng = random.Random(task.seed)
    mixed = {}
    for name, variant in task.study.variants.items():
        share = variant["replay_share"]
        mixed[name] = [rng.choice(old) if rng.random() < share else prompt for prompt in new]
    for name, variant in task.due():
        changes = {**variant, "num_prompts": 2 * count}
        del changes["replay_share"]
        config = task.config(folder / name, changes)
        curve = _probed(config, old + mixed[name], probes, every)
        yield name, [{"figures": adaptation_figures(curve, count), "curve": curve}]


def _domains(task: Task, sources: dict[str, Values], count: int) -> tuple[list[Prompts], Probes]:
    """`count` training prompts of every source, and the untouched model's answers to its held-out ones, by name."""
    loaded = load_model(task.config(task.shared))
    prompts = []
    probes = {}
    for name, settings in sources.items():
        config = task.config(task.shared, settings, {"num_prompts": count})
        split = load_prompts(config, loaded)
        prompts.append(split.stream.take(count))
        held_out = split.held_out
        probes[name] = answer(loaded, held_out, config.max_new_tokens, len(held_out))
        free_memory()
    return prompts, probes


def _advance(trainer: DVITrainer, goal: float) -> None:
    """Train until this many prompts are done."""
    while trainer.counters.prompts < goal:
        trainer.advance()


def _probed(config: DVIConfig, prompts: Prompts, probes: Probes, every: int) -> Curve:
    """Train, and measure the agreement on all probes before the first prompt and after every `every` prompts."""
    trainer = trainer_on(config, prompts)
    curve: Curve = defaultdict(list)
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
    switched = bisect_left(curve["prompts"], switch)  # the first measurement at or after the switch
    figures = {}
    for domain in ("first", "then"):
        figures[f"{domain}_switch"] = curve[domain][switched]
        figures[f"{domain}_end"] = curve[domain][-1]
    return {**figures, "forgotten": figures["first_switch"] - figures["first_end"]}


def federated(task: Task, folder: Path) -> VariantRows:
    """Clients with prompts of their own train apart and are averaged by tokens every round; or never; or are one.

    `extra`: `clients` (prompt settings by name), `rounds`, `prompts` a client and round. Variants: `mode`, averaged,
    apart or pooled. All start from the same untrained draft; averaging keeps each client's optimizer.
    """
    extra = task.study.extra
    together = task.config(folder).rollout_batch
    if together > extra["prompts"]:
        raise DvirlError(
            f"rollout_batch is {together}; expected at most the {extra['prompts']} prompts of a round"
        )
    streams, probes = _domains(task, extra["clients"], extra["rounds"] * extra["prompts"])
    # Pooled prompts alternate between the clients, as if they came in together.
    pooled = [prompt for together in zip(*streams, strict=True) for prompt in together]
    start = trainer_on(task.config(folder / "start"), pooled).save_checkpoint()
    for name, variant in task.due():
        mode = variant["mode"]
        clients = {"pooled": pooled} if mode == "pooled" else dict(zip(probes, streams, strict=True))
        yield name, [_in_rounds(task, folder / name, start, clients, probes, mode == "averaged")]


def _in_rounds(
    task: Task, folder: Path, start: Path, clients: dict[str, Prompts], probes: Probes, average: bool
) -> Row:
    """Train a client on each of these prompts; after every round, measure all of them on all probes."""
    trainers = {}
    for client, prompts in clients.items():
        changes = {"start_from": str(start), "num_prompts": len(prompts)}
        trainers[client] = trainer_on(task.config(folder / client, changes), prompts)
    rounds = task.study.extra["rounds"]
    curve: Curve = defaultdict(list)
    for number in range(1, rounds + 1):
        _train_round(list(trainers.values()), number / rounds, average)
        rates = {}
        for client, trainer in trainers.items():
            for domain, responses in probes.items():
                rates[client, domain] = measure_agreement(trainer.model, responses).rate
        # A client's own domain bears its name; pooled clients have all domains for their own.
        own = [rates[domain if domain in trainers else "pooled", domain] for domain in probes]
        curve["round"].append(number)
        curve["own"].append(fmean(own))
        curve["all"].append(fmean(rates.values()))
    figures = {"own": curve["own"][-1], "all": curve["all"][-1]}
    for (client, domain), rate in rates.items():
        figures[f"{client}_on_{domain}"] = rate
    return {"figures": figures, "curve": curve}


def _train_round(trainers: Sequence[DVITrainer], share: float, average: bool) -> None:
    """Train every client up to a share of its prompts, then give all of them the mean of their drafts if asked to."""
    tokens = []
    for trainer in trainers:
        before = trainer.counters.tokens
        _advance(trainer, share * trainer.config.num_prompts - 1e-6)  # the share may be rounded up
        tokens.append(trainer.counters.tokens - before)
    if not average:
        return
    folders = [trainer.save_checkpoint() for trainer in trainers]
    mean = average_adapters(folders, tokens, folders[0].with_name(f"mean-{share:.3f}"))
    for trainer in trainers:
        checkpoint.load_weights(mean, trainer.peft_model, trainer.model, ["lora_S"])
