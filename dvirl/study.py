"""Studies: a question as a YAML file, several seeds, one JSON of results: `dvirl study CONFIG`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dvirl import checkpoint
from dvirl.buffer import TrainingBatch
from dvirl.config import DraftSettings, DVIConfig, SGPConfig
from dvirl.corpus import Responses, answer
from dvirl.data import PromptSplit, PromptStream, chatterbot_prompts, load_prompts
from dvirl.errors import DvirlError
from dvirl.evaluation.agreement import measure_agreement
from dvirl.federated import average_adapters
from dvirl.lora import train_only
from dvirl.losses import exact_pg_loss, reinforce_loss
from dvirl.models import LoadedModel, load
from dvirl.rollout import Tape, draft_logits_at, generate, judge
from dvirl.settings import from_mapping, read_yaml
from dvirl.sgp import SGPTrainer
from dvirl.trace import plain, read_metrics
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


@dataclass(frozen=True)
class Study:
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
        if self.kind not in KINDS:
            raise DvirlError(f"kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if not self.seeds or not self.variants:
            raise DvirlError("a study needs at least one seed and one variant")

    def small(self) -> Study:
        """The laptop-size version."""
        quick = self.quick
        return replace(
            self,
            seeds=quick.get("seeds", self.seeds[:1]),
            variants={name: self.variants[name] for name in quick.get("variants", self.variants)},
            base={**self.base, **quick.get("base", {})},
            starts={name: _merged(one, quick.get("starts", {}).get(name)) for name, one in self.starts.items()},
            extra={**self.extra, **quick.get("extra", {})},
        )

    def config(self, seed: int, run_dir: Path, *changes: Mapping[str, Any]) -> DVIConfig:
        """The settings of one run, later changes first."""
        values: dict[str, Any] = {**self.base, "seed": seed, "run_dir": str(run_dir)}
        for change in changes:
            values |= {name: value for name, value in change.items() if name != "sgp"}
        return from_mapping(DVIConfig, values, "study")


def _merged(one: Mapping[str, Any] | None, changes: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if one is None else {**one, **(changes or {})}


# What is measured


def draft_cost(model: KangarooModel) -> float:
    """Weights that one drafted token reads, as a share of those of one token of the whole model."""
    base = model.base_model

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for m in modules for name, p in m.named_parameters() if "lora_" not in name)

    draft = count(*base.model.layers[: base.exit_layer], model.adapter_model) + model.exit_proj.weight.numel()
    return draft / (count(*base.model.layers, base.model.norm) + base.lm_head.weight.numel())


def judge_prompts(trainer: DVITrainer, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """The draft on the verifier's own answers, as both are now."""
    config, loaded = trainer.config, trainer.loaded
    rollout = generate(loaded.model, prompts, config.max_new_tokens, loaded.eos_ids, config.target)
    blocks = [block for row in judge(trainer.model, rollout, config.decode).blocks for block in row]
    cpu = Responses(rollout.tokens.cpu(), rollout.prompt_lens.cpu(), rollout.response_lens.cpu())
    agreement = asdict(measure_agreement(trainer.model, cpu))
    return {
        "accept_rate": sum(b.num_accepted for b in blocks) / max(1, sum(b.num_drafted for b in blocks)),
        "mat": sum(b.block_len for b in blocks) / max(1, len(blocks)),
        "agreement": agreement["rate"],
        **{name: agreement[name] for name in ("confidence", "ece", "covered")},
    }


@torch.no_grad()
def judge_verifier(trainer: DVITrainer, batch: int = 16) -> dict[str, float]:
    """Perplexity of human replies under the verifier, and its drift from the untouched model on them.

    Returns:
        `ppl`, `ppl_untouched`, `drift_kl` (nats a token) and `drift_tokens`, on the replies of the first
        conversations of chatterbot-corpus, in the model's chat format.
    """
    chat, base = trainer.loaded.chat, trainer.loaded.model
    pairs = [(chat.encode(p.turns), chat.encode_response(p.response)) for p in chatterbot_prompts()[:REPLIES]]
    served = ("lora_S",) if trainer.config.target == "base" else ()
    sums = torch.zeros(4)
    count = 0
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        tokens = pad_sequence([torch.tensor(a + b) for a, b in part], batch_first=True).to(base.device)
        at = [(row, column) for row, (a, b) in enumerate(part) for column in range(len(a), len(a) + len(b))]
        rows, columns = torch.tensor(at, device=base.device).T
        own, untouched = (_log_probs(trainer, tokens, rows, columns - 1, off) for off in (served, ("lora_S", "lora_D")))
        picked = tokens[rows, columns][:, None]
        changed = (own.argmax(dim=-1) != untouched.argmax(dim=-1)).sum()
        divergence = F.kl_div(own, untouched, log_target=True, reduction="sum")
        parts = (-own.gather(1, picked).sum(), -untouched.gather(1, picked).sum(), divergence, changed)
        sums += torch.stack([part.float().cpu() for part in parts])
        count += len(rows)
    nll, nll_untouched, drift, changed = (sums / count).tolist()
    return {
        "ppl": torch.tensor(nll).exp().item(),
        "ppl_untouched": torch.tensor(nll_untouched).exp().item(),
        "drift_kl": drift,
        "drift_tokens": changed,
    }


def _log_probs(trainer: DVITrainer, tokens: Tensor, rows: Tensor, columns: Tensor, off: Sequence[str]) -> Tensor:
    base = trainer.loaded.model
    with base.without_adapters(*off):
        hidden = base.forward_deep(base.forward_shallow(tokens))
    logits: Tensor = base.lm_head(hidden[rows, columns]).float()
    return logits.log_softmax(dim=-1)


def thinned(run_dir: Path) -> dict[str, list[float | None]]:
    """A run's curve: accept rate, reward, KL and drift over response tokens, in a few dozen means."""
    metrics = read_metrics(run_dir / "metrics.jsonl")
    bins = metrics.index * CURVE_POINTS // max(1, len(metrics))
    columns = ["tokens", "accept_rate", "reward", "loss_kl", "drift_kl"]
    means = metrics[columns].astype(float).groupby(bins).mean()
    return {name: [None if value != value else round(value, 5) for value in means[name]] for name in columns}


def finish(trainer: DVITrainer, before: Mapping[str, float]) -> Row:
    """The row of a run that is done."""
    counters = trainer.counters
    figures: dict[str, Any] = {f"{name}_before": before[name] for name in ("accept_rate", "agreement")}
    figures |= judge_prompts(trainer, trainer.split.held_out)
    if trainer.config.slow_every or trainer.config.target == "adapted":
        figures |= judge_verifier(trainer)
    figures |= {"draft_cost": draft_cost(trainer.model), "tokens": counters.tokens, "steps": counters.step}
    figures |= {"wall_s": counters.wall_s, "drift_flag": counters.drift_flag, "skipped": counters.skipped}
    return {"figures": figures, "curve": thinned(Path(trainer.config.run_dir))}


# Kinds of study: each gives the rows of one seed


def grid(study: Study, seed: int, folder: Path) -> list[Row]:
    """Every variant from every start, on the very same responses where the verifier does not change.

    Starts learn from prompts of their own, before those of the variants; nobody learns from the held-out ones.
    """
    rows: list[Row] = []
    reserved, config = study.extra.get("reserved", 0), study.config(seed, folder)
    split = load_prompts(replace(config, num_prompts=config.num_prompts + reserved), _load(study))
    early, late = split.stream.prompts[:reserved], split.stream.prompts[reserved:]
    if not late:
        raise DvirlError(
            f"the source has {len(early)} prompts, and the starts take {reserved}; none is left to compare on"
        )
    for start, settings in study.starts.items():
        own = PromptSplit(PromptStream(early or late, seed), split.held_out)
        origin, start_tokens = _begin(study.config(seed, folder / f"start-{start}", settings or {}), settings, own)
        tape: Tape | None = None
        for name, variant in study.variants.items():
            config = study.config(seed, folder / start / name, origin, variant)
            trainer = DVITrainer(config, None, PromptSplit(PromptStream(late, seed), split.held_out))
            before = judge_prompts(trainer, split.held_out)
            if config.slow_every == 0 and config.target == "base":
                trainer.answer = tape.playing() if tape else (tape := Tape()).recording(trainer.answer)
            trainer.train(show_progress=False)
            rows.append({"start": start, "variant": name, "seed": seed, **finish(trainer, before)})
            rows[-1]["figures"]["start_tokens"] = start_tokens
            _say(rows[-1])
    return rows


def _begin(config: DVIConfig, settings: Mapping[str, Any] | None, split: PromptSplit) -> tuple[dict[str, Any], int]:
    """Train what the variants start from; the setting that says where it is, and the response tokens it learned from.

    Settings under `sgp` make it a shallow-gradient fine-tuning on chatterbot-corpus' human replies.
    """
    if settings is None:
        return {}, 0
    if not settings.get("sgp"):
        first = DVITrainer(config, None, split)
        first.train(show_progress=False)
        return {"start_from": str(checkpoint.newest(config.run_dir))}, first.counters.tokens
    shared = {spec.name: getattr(config, spec.name) for spec in fields(DraftSettings)}
    loaded = load(config.model_name, config.dtype, config.device, config.chat_format)
    records = [one for one in chatterbot_prompts() if loaded.chat.encode(one.turns) not in split.held_out]
    tuned = SGPTrainer(from_mapping(SGPConfig, {**shared, **settings["sgp"]}, "study"), loaded, records)
    share = tuned.num_steps * tuned.config.batch_size / len(tuned.train_set)
    tokens = round(share * sum(int((one[:, 1] >= 0).sum()) for one in tuned.train_set))
    return {"start_from": tuned.train(show_progress=False).checkpoint}, tokens


def _say(row: Row) -> None:
    shown = {name: round(value, 3) for name, value in row["figures"].items() if isinstance(value, float)}
    where = "/".join(str(row[key]) for key in ("start", "variant", "seed") if key in row)
    print(f"{where}: " + ", ".join(f"{name} {shown[name]}" for name in list(shown)[:9]), file=sys.stderr, flush=True)


def staleness(study: Study, seed: int, folder: Path) -> list[Row]:
    """How wrong a gradient is that old records give: by age, against the exact gradient at the same positions.

    One run keeps every record. At its end, records of each age give the REINFORCE gradient with the tokens that the
    old policy drew, the same with tokens drawn anew (once, and many times), and the exact gradient of the expected
    reward.
    `extra`: `ages`, `records` of each, `draws` a position.
    """
    rows: list[Row] = []
    for name, variant in study.variants.items():
        trainer = DVITrainer(study.config(seed, folder / name, variant))
        trainer.train(show_progress=False)
        ids = trainer.buffer.field("response_id")
        groups, last = study.extra["ages"], int(ids.max()) + 1
        for age in range(groups):
            low, high = (last * (groups - age - step) // groups for step in (1, 0))
            chosen = ((ids >= low) & (ids < high)).nonzero().squeeze(1)[: study.extra["records"]]
            figures = stale_gradients(trainer, trainer.buffer.batch(chosen), study.extra["draws"])
            figures["age_responses"] = last - 1 - float(ids[chosen].float().mean())
            rows.append({"variant": f"{name}, age {age + 1} of {groups}", "seed": seed, "figures": figures})
            _say(rows[-1])
    return rows


def stale_gradients(trainer: DVITrainer, batch: TrainingBatch, draws: int) -> dict[str, float]:
    """The figures of `staleness` for one batch of records; `draws` fresh samples a position stand for many."""
    train_only(trainer.model, trainer.shallow)
    on = trainer.decisions(batch)
    baseline = float(batch.reward.mean())
    policy = (on.logits.detach() / trainer.config.policy_temperature).softmax(dim=-1)
    fresh = torch.multinomial(policy.cpu(), draws, replacement=True, generator=trainer.generator).to(policy.device)
    redrawn = [
        reinforce_loss(replace(on, drafted=drawn).on_drafted(), (drawn == on.verified).float(), baseline)
        for drawn in fresh.T
    ]
    gradients = {
        "exact": _gradient(trainer, exact_pg_loss(*on.on_verified())),
        "stale": _gradient(trainer, reinforce_loss(on.on_drafted(), batch.reward, baseline)),
        "redrawn": _gradient(trainer, redrawn[0]),
        "many": _gradient(trainer, torch.stack(redrawn).mean()),
    }
    with torch.no_grad():
        _, hidden = draft_logits_at(trainer.model, batch.tokens, batch.prompt_lens, batch.rows, batch.positions)
    return {
        "cos_stale": _cosine(gradients["stale"], gradients["exact"]),
        "cos_redrawn": _cosine(gradients["redrawn"], gradients["exact"]),
        "cos_many": _cosine(gradients["many"], gradients["exact"]),
        "along_stale": _along(gradients["stale"], gradients["exact"]),
        "along_redrawn": _along(gradients["redrawn"], gradients["exact"]),
        "hidden_error": float((batch.hidden - hidden).float().norm() / hidden.float().norm()),
        "reward_stored": float(batch.reward.mean()),
        "reward_now": float((fresh == on.verified[:, None]).float().mean()),
    }


def _gradient(trainer: DVITrainer, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, trainer.shallow, retain_graph=True, allow_unused=True)
    return torch.cat([part.flatten().float() for part in found if part is not None])


def _along(one: Tensor, exact: Tensor) -> float:
    """How much of the exact gradient another one holds: 1 for an unbiased estimate, in the mean."""
    return float(one @ exact / exact.square().sum())


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one, other, dim=0))


class InOrder(PromptStream):
    """Prompts in the order given."""

    def _order(self, epoch: int) -> list[int]:
        return list(range(len(self)))


def _domain(study: Study, seed: int, loaded: LoadedModel, settings: Mapping[str, Any], count: int) -> PromptSplit:
    """`count` training prompts of a source, and held-out ones."""
    return load_prompts(study.config(seed, Path("unused"), {**settings, "num_prompts": count}), loaded)


def _load(study: Study) -> LoadedModel:
    config = study.config(0, Path("unused"))
    return load(config.model_name, config.dtype, config.device, config.chat_format)


def _answered(study: Study, loaded: LoadedModel, prompts: Sequence[list[int]]) -> Responses:
    return answer(loaded, prompts, study.config(0, Path("unused")).max_new_tokens, len(prompts))


def adaptation(study: Study, seed: int, folder: Path) -> list[Row]:
    """A stream that changes domain midway: what is learned, what is forgotten, and what a share of old prompts saves.

    `extra`: `first` and `then` (prompt settings), `prompts` of each, `probes` a half. Variants: `replay_share`, the
    share of prompts after the switch that are drawn from before it.
    """
    extra, loaded, rng = study.extra, _load(study), random.Random(seed)
    count = extra["prompts"]
    splits = {key: _domain(study, seed, loaded, extra[key], count) for key in ("first", "then")}
    probes = {key: _answered(study, loaded, split.held_out) for key, split in splits.items()}
    old, new = (split.stream.take(count) for split in splits.values())
    rows: list[Row] = []
    for name, variant in study.variants.items():
        share, changes = variant["replay_share"], {k: v for k, v in variant.items() if k != "replay_share"}
        mixed = [rng.choice(old) if rng.random() < share else prompt for prompt in new]
        config = study.config(seed, folder / name, changes, {"num_prompts": 2 * count})
        trainer = DVITrainer(config, None, PromptSplit(InOrder(old + mixed, seed), []))
        curve: dict[str, list[float]] = {"prompts": [], "first": [], "then": []}
        while True:
            curve["prompts"].append(trainer.counters.prompts)
            for key, responses in probes.items():
                curve[key].append(measure_agreement(trainer.model, responses).rate)
            if trainer.counters.prompts >= 2 * count:
                break
            goal = min(2 * count, trainer.counters.prompts + count // extra["probes"])
            while trainer.counters.prompts < goal:
                for _ in trainer.advance():
                    pass
        rows.append({"variant": name, "seed": seed, "figures": adaptation_figures(curve, count), "curve": curve})
        _say(rows[-1])
    return rows


def adaptation_figures(curve: Mapping[str, Sequence[float]], switch: int) -> dict[str, float]:
    """Agreement on both domains at the switch and at the end, and what of the first was forgotten."""
    at = next(index for index, prompts in enumerate(curve["prompts"]) if prompts >= switch)
    figures = {f"{key}_{when}": curve[key][i] for key in ("first", "then") for when, i in (("switch", at), ("end", -1))}
    return {**figures, "forgotten": figures["first_switch"] - figures["first_end"]}


def federated(study: Study, seed: int, folder: Path) -> list[Row]:
    """Clients with prompts of their own train apart and are averaged by tokens every round; or never; or are one.

    `extra`: `clients` (prompt settings by name), `rounds`, `prompts` a client and round. Variants: `mode`, averaged,
    apart or pooled. All start from the same untrained draft; averaging keeps each client's optimizer.
    """
    extra, loaded = study.extra, _load(study)
    total = extra["rounds"] * extra["prompts"]
    splits = {name: _domain(study, seed, loaded, one, total) for name, one in extra["clients"].items()}
    probes = {name: _answered(study, loaded, split.held_out) for name, split in splits.items()}
    prompts = {name: split.stream.take(total) for name, split in splits.items()}
    everything = [prompt for together in zip(*prompts.values(), strict=True) for prompt in together]
    seedling = DVITrainer(study.config(seed, folder / "start"), None, PromptSplit(InOrder(everything, seed), []))
    start = {"start_from": str(checkpoint.save(folder / "start", 0, seedling.peft_model, seedling.model))}
    rows: list[Row] = []
    for name, variant in study.variants.items():
        streams = {"pooled": everything} if variant["mode"] == "pooled" else prompts
        clients = {
            client: DVITrainer(
                study.config(seed, folder / name / client, start, {"num_prompts": len(stream)}),
                None,
                PromptSplit(InOrder(stream, seed), []),
            )
            for client, stream in streams.items()
        }
        curve: dict[str, list[float]] = {"round": [], "own": [], "all": []}
        for round_ in range(1, extra["rounds"] + 1):
            _train_round(clients, round_ / extra["rounds"], folder / name, variant["mode"] == "averaged")
            rates = {c: {p: measure_agreement(t.model, probes[p]).rate for p in probes} for c, t in clients.items()}
            curve["round"].append(round_)
            curve["own"].append(fmean(rates[c if c in rates else "pooled"][c] for c in probes))
            curve["all"].append(fmean(rate for client in rates.values() for rate in client.values()))
        figures = {"own": curve["own"][-1], "all": curve["all"][-1]}
        figures |= {f"{c}_on_{p}": rate for c, found in rates.items() for p, rate in found.items()}
        rows.append({"variant": name, "seed": seed, "figures": figures, "curve": curve})
        _say(rows[-1])
    return rows


def _train_round(clients: Mapping[str, DVITrainer], share: float, folder: Path, average: bool) -> None:
    """Train every client up to a share of its prompts, then give all the mean of their drafts if asked to."""
    tokens, folders = [], []
    for trainer in clients.values():
        before = trainer.counters.tokens
        while trainer.counters.prompts < share * trainer.config.num_prompts - 1e-6:
            for _ in trainer.advance():
                pass
        tokens.append(trainer.counters.tokens - before)
        run_dir = Path(trainer.config.run_dir)
        if average:
            folders.append(checkpoint.save(run_dir, trainer.counters.step, trainer.peft_model, trainer.model))
    if average:
        mean = average_adapters(folders, tokens, folder / f"mean-{share:.3f}")
        for trainer in clients.values():
            checkpoint.load(mean, trainer.peft_model, trainer.model, draft_only=True)


KINDS: dict[str, Callable[[Study, int, Path], list[Row]]] = {
    "grid": grid,
    "staleness": staleness,
    "adaptation": adaptation,
    "federated": federated,
}


# Running one


def summary(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over seeds of every figure, by start and variant."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault("/".join(row[key] for key in ("start", "variant") if key in row), []).append(row)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, group in groups.items():
        table[name] = {}
        for key in group[0]["figures"]:
            values = [float(row["figures"][key]) for row in group if key in row["figures"]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            table[name][key] = {"mean": fmean(values), "std": spread, "n": len(values)}
    return table


def _task(task: tuple[Study, int, int]) -> list[Row]:
    """One seed and one start, on the accelerator of its turn."""
    study, seed, turn = task
    if torch.cuda.is_available():
        torch.cuda.set_device(turn % torch.cuda.device_count())
    with tempfile.TemporaryDirectory(prefix="dvirl-study-") as folder:
        return KINDS[study.kind](study, seed, Path(folder))


def run(study: Study, workers: int = 1) -> list[Row]:
    """All rows, seeds and starts spread over processes.

    Args:
        study: what to run.
        workers: processes at once; with several accelerators they take turns.
    """
    learned = [{**study.base, **one}["num_prompts"] for one in study.starts.values() if one and "sgp" not in one]
    one_each = [
        replace(study, starts={name: start}, extra={**study.extra, "reserved": max(learned, default=0)})
        for name, start in study.starts.items()
    ]
    pairs = [(one, seed) for seed in study.seeds for one in one_each]
    tasks = [(one, seed, turn) for turn, (one, seed) in enumerate(pairs)]
    if workers == 1:
        return [row for task in tasks for row in _task(task)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(_task, tasks) for row in rows]


def main(argv: Sequence[str]) -> Path:
    """Run a study, print its table, and write its JSON.

    Raises:
        DvirlError: for a bad file or bad settings.
    """
    parser = argparse.ArgumentParser(prog="dvirl study", description=__doc__)
    parser.add_argument("config", help="YAML file of a study, see configs/study-*.yaml")
    parser.add_argument("--quick", action="store_true", help="the laptop-size version")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of all runs")
    parser.add_argument("--out", default="", help="JSON file; results/STUDY.json by default")
    args = parser.parse_args(list(argv))
    study = from_mapping(Study, read_yaml(args.config), args.config)
    study = study.small() if args.quick else study
    study = replace(study, seeds=args.seeds or study.seeds)
    if any("=" not in pair for pair in args.set):
        raise DvirlError(f"--set has {' '.join(args.set)}; expected NAME=VALUE")
    study = replace(
        study, base={**study.base, **{k: yaml.safe_load(v) for k, v in (p.split("=", 1) for p in args.set)}}
    )
    began = time.time()
    rows = run(study, args.workers)
    table = summary(rows)
    content = {
        "question": study.question,
        "command": shlex.join(["dvirl", "study", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.time() - began),
        **checkpoint.environment(),
        "settings": asdict(study),
        "summary": table,
        "rows": rows,
    }
    out = Path(args.out or f"results/{Path(args.config).stem}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(plain(content), indent=1) + "\n")
    print_table(table)
    print(f"written: {out}")
    return out


def print_table(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """The first figures of every variant, mean and standard deviation over seeds."""
    names = [name for name in SHOWN if any(name in figures for figures in table.values())]
    print(f"{'':34}" + "".join(f"{name:>19}" for name in names))
    for variant, figures in table.items():
        cells = (figures.get(name) for name in names)
        print(f"{variant:34}" + "".join(f"{c['mean']:11.3f} ± {c['std']:.3f}" if c else f"{'':19}" for c in cells))
