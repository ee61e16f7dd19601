"""Prompts that the model writes itself: user turns sampled after the chat template's header (arXiv 2406.08464)."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from dvirl.models.loading import DEFAULT_MODEL, LoadedModel, load
from dvirl.rollout import generate
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import JsonObject, write_text
from dvirl.runs.settings import Settings, command_line, number, positional, several
from kangaroo.decoding.sampling import inverse_cdf

TEMPERATURE = 1.0
TOP_P = 0.95
CANDIDATES = 512
"""Number of likeliest tokens in which the nucleus is looked for, so that not all logits of a large batch are sorted."""
TURN_TOKENS = 96
"""Length limit of a turn after its opener; turns that reach it are left out."""
SHORTEST = 4
"""Tokens that a turn must have."""


def top_p_sampler(generator: torch.Generator, temperature: float, top_p: float) -> Callable[[Tensor], Tensor]:
    """Nucleus sampling (Holtzman et al. 2020) of tokens `[B]` from logits `[B, V]`, on the generator's device."""

    def sample(logits: Tensor) -> Tensor:
        probabilities = (logits / temperature).softmax(dim=-1)
        candidates = min(CANDIDATES, logits.shape[-1])
        likeliest, tokens = probabilities.topk(candidates, dim=-1)
        # The nucleus: a token is in it if the likelier ones together have no more than top_p.
        likelier = likeliest.cumsum(dim=-1) - likeliest
        nucleus = likeliest * (likelier <= top_p)
        uniform = torch.rand(len(logits), generator=generator, device=generator.device)
        index = inverse_cdf(nucleus, uniform.to(logits.device))
        return tokens.gather(1, index[:, None]).squeeze(1)

    return sample


class Openers:
    """How first turns begin, by kind and share: the packaged `openers.yaml`, filled in at random.

    Args:
        kinds: restrict to these, or None for all.

    Raises:
        DvirlError: for an unknown kind.
    """

    def __init__(self, kinds: Sequence[str] | None = None) -> None:
        text = (resources.files("dvirl.data") / "openers.yaml").read_text("utf-8")
        table: JsonObject = yaml.safe_load(text)
        self._words: dict[str, list[str]] = {
            name: table.pop(name) for name in ("names", "topics", "tasks", "languages")
        }
        unknown = set(kinds or ()) - set(table)
        if unknown:
            raise DvirlError(
                f"unknown kind of prompt {', '.join(sorted(unknown))}; known are {', '.join(table)}"
            )
        self.table = {kind: table[kind] for kind in kinds or table}

    def draw(self, rng: random.Random) -> str:
        """One beginning."""
        kinds = list(self.table.values())
        (kind,) = rng.choices(kinds, [kind["share"] for kind in kinds])
        opener: str = rng.choice(kind["openers"])
        name, other = rng.sample(self._words["names"], 2)
        filled = opener.format(
            name=name, other=other, n=rng.randint(2, 60), topic=rng.choice(self._words["topics"])
        )
        return filled.rstrip(" ")

    def task_about(self, text: str, question: str, rng: random.Random) -> str:
        """A whole turn: something to do with a text, which answers the question among others."""
        task = rng.choice(self._words["tasks"])
        return task.format(text=text, question=question, language=rng.choice(self._words["languages"]))


def sample_turns(loaded: LoadedModel, contexts: Sequence[list[int]], seed: int) -> list[tuple[int, ...]]:
    """Let the model sample the rest of a user's turn after each context.

    Returns:
        Each context with its turn and the header of the answer. A turn that does not end, is shorter than `SHORTEST`
        or holds a control token is left out.
    """
    _, answer, _ = loaded.chat.frame()
    generator = torch.Generator(loaded.model.device).manual_seed(seed)
    sampler = top_p_sampler(generator, TEMPERATURE, TOP_P)
    rollout = generate(
        loaded.model, contexts, TURN_TOKENS, loaded.eos_ids, sampler=sampler, keep_states=False
    )
    special = set(loaded.tokenizer.all_special_ids)
    turns = []
    for context, tokens in zip(contexts, rollout.responses(), strict=True):
        *turn, last = tokens
        if last in loaded.eos_ids and len(turn) >= SHORTEST and special.isdisjoint(turn):
            turns.append((*context, *turn, *answer))
    return turns


def write_prompts(
    loaded: LoadedModel,
    count: int,
    seed: int,
    openers: Openers | None = None,
    batch: int = 0,
) -> list[list[int]]:
    """Prompts of one user turn each, as token ids, without repeats.

    Args:
        loaded: the model that writes them.
        count: number of prompts.
        seed: of openers and samples.
        openers: how the prompts begin; all packaged openers if not given.
        batch: number of turns sampled at once; 0 for 64 on a CPU and up to 1024 elsewhere.

    Raises:
        DvirlError: if the model's chat format has no user turns, or if too few turns are usable.
    """
    start, _, _ = loaded.chat.frame()
    if not batch:
        on_cpu = loaded.model.device.type == "cpu"
        batch = 64 if on_cpu else min(1024, count + 64)
    openers = openers or Openers()
    rng = random.Random(f"{seed}/openers")
    prompts: dict[tuple[int, ...], None] = {}
    with tqdm(total=count, desc="writing prompts", unit="prompt", leave=False) as bar:
        for attempt in range(4 + 8 * count // batch):
            contexts = [start + loaded.chat.plain(openers.draw(rng)) for _ in range(batch)]
            for prompt in sample_turns(loaded, contexts, seed + attempt):
                if len(prompts) < count:
                    prompts.setdefault(prompt)
            bar.update(len(prompts) - bar.n)
            if len(prompts) == count:
                return [list(prompt) for prompt in prompts]
    raise DvirlError(
        f"the model wrote only {len(prompts)} usable prompts of {count}; ask for fewer or another source"
    )


@dataclass(frozen=True)
class PromptsConfig(Settings):
    """What prompts to write, and by which model."""

    out: str = positional()
    """JSONL file to write."""
    each: int = number(16, 1)
    """Prompts of each kind."""
    kinds: list[str] = several()
    """Kinds of prompts, see `dvirl/data/openers.yaml`; all by default."""
    model_name: str = DEFAULT_MODEL
    """Model, folder or hub id that writes them."""
    seed: int = number(0, 0, 2**63 - 1)
    """Of openers and samples."""
    dtype: str = "float32"
    """Of the model's weights; float32 repeats best."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


parse_args = command_line(
    PromptsConfig,
    "dvirl prompts",
    "Let a model write prompts of every kind into a question file in Spec-Bench's schema, kinds in turn.",
)
"""Settings from the command line; see `settings.parse_args`."""


def main(config: PromptsConfig) -> Path:
    """Write the question file, print where it is, and return its path.

    Raises:
        DvirlError: for a bad number or model, or if too few turns pass.
    """
    kinds = list(Openers(config.kinds).table)
    loaded = load(config.model_name, config.dtype, config.device)
    start, answer, _ = loaded.chat.frame()
    batch = min(64, 4 * config.each)
    written = [write_prompts(loaded, config.each, config.seed, Openers([kind]), batch) for kind in kinds]
    rows: list[str] = []
    for in_turn in zip(*written, strict=True):
        for kind, prompt in zip(kinds, in_turn, strict=True):
            text = loaded.tokenizer.decode(prompt[len(start) : -len(answer)])
            row = {"question_id": len(rows), "category": kind, "turns": [text]}
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(config.out, "".join(rows))
    print(f"written: {config.out}, {len(rows)} prompts")
    return Path(config.out)
