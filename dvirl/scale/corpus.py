"""Cached greedy responses at scale: conversations that the model holds with itself, in shards on disk."""

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvirl.data.selfwritten import Openers, sample_turns
from dvirl.models.loading import LoadedModel
from dvirl.rollout import Responses, generate
from dvirl.runs.errors import DvirlError

NGRAM = 13
"""Tokens in a row that training data may not share with a question (GPT-3's decontamination counts 13 words)."""


SCANNED = 16384
"""Rows hashed at once."""


def join(parts: Sequence[Responses]) -> Responses:
    """All parts' rows, in order."""
    width = max(part.tokens.shape[1] for part in parts)
    tokens = [torch.nn.functional.pad(part.tokens, (0, width - part.tokens.shape[1])) for part in parts]
    lengths = zip(*((part.prompt_lens, part.response_lens) for part in parts), strict=True)
    return Responses(torch.cat(tokens), *map(torch.cat, lengths))


def answer(loaded: LoadedModel, prompts: Sequence[list[int]], max_new_tokens: int, batch: int) -> Responses:
    """The untouched model's greedy answers, prompts of like length answered together."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    parts = []
    for start in range(0, len(order), batch):
        together = [prompts[row] for row in order[start : start + batch]]
        rollout = generate(loaded.model, together, max_new_tokens, loaded.eos_ids, keep_states=False)
        parts.append(rollout.stored())
    return join(parts).take(torch.tensor(order).argsort())


def write_conversations(
    loaded: LoadedModel, count: int, seed: int, max_new_tokens: int, follow_up: float, batch: int
) -> Responses:
    """Conversations that the model holds with itself: a turn, its answer, for some a second turn and its answer.

    Args:
        loaded: writes turns by sampling and answers greedily.
        count: first turns begun; those that do not end are left out.
        seed: of openers and samples.
        max_new_tokens: length limit of an answer.
        follow_up: share of answers that get a second turn.
        batch: rows generated at once.

    Raises:
        DvirlError: if the model's chat format has no user turns, or no turn ends.
    """
    start, _, again = loaded.chat.frame()
    openers, rng = Openers(), random.Random(f"{seed}/conversations")
    contexts = [start + loaded.chat.plain(openers.draw(rng)) for _ in range(count)]

    def turns(contexts: list[list[int]]) -> list[list[int]]:
        prompts: dict[tuple[int, ...], None] = {}
        for at in range(0, len(contexts), batch):
            prompts |= dict.fromkeys(sample_turns(loaded, contexts[at : at + batch], rng.getrandbits(63)))
        return [list(prompt) for prompt in prompts]

    opening = turns(contexts)
    if not opening:
        raise DvirlError(f"the model wrote no usable turn of {count}; another model or chat_format may")
    first = answer(loaded, opening, max_new_tokens, batch)
    longer = []
    for row in range(len(first)):
        stop = int(first.prompt_lens[row] + first.response_lens[row])
        if rng.random() < follow_up and int(first.tokens[row, stop - 1]) in loaded.eos_ids:
            longer.append([*first.tokens[row, : stop - 1].tolist(), *again])
    second = turns(longer)
    return join([first, answer(loaded, second, max_new_tokens, batch)]) if second else first


def without_repeats(responses: Responses) -> Responses:
    """The first row of every prompt."""
    seen: dict[bytes, int] = {}
    tokens = responses.tokens.numpy()
    for row, length in enumerate(responses.prompt_lens.tolist()):
        seen.setdefault(tokens[row, :length].tobytes(), row)
    return responses.take(torch.tensor(list(seen.values())))


def write_shard(path: Path, responses: Responses) -> None:
    """Write one shard, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(vars(responses), scratch)
    os.replace(scratch, path)


def read_shard(path: Path) -> Responses:
    """Read one shard.

    Raises:
        DvirlError: if it is unreadable or not one.
    """
    try:
        found = Responses(**load_file(path))
        (_, width), lens = found.tokens.shape, torch.stack([found.prompt_lens, found.response_lens])  # [2, N]
        whole = (found.tokens.dtype, lens.dtype, lens.shape[1:]) == (torch.int32, torch.int64, found.tokens.shape[:1])
        if not whole or (lens < 0).any() or (lens[0] > width - lens[1]).any() or (found.tokens < 0).any():
            raise TypeError("its tensors do not fit together")
        return found
    except (SafetensorError, TypeError, ValueError, RuntimeError, OSError) as error:
        said = f"not a readable shard of responses ({error})"
        raise DvirlError(f"{path}: {said}; remove it to have it made anew") from error


def _hashes(tokens: Tensor, longest: int) -> Iterator[tuple[int, Tensor]]:
    """For each n up to `longest`: n, and a 64-bit hash of every run of n tokens, `[…, W]` to `[…, W - n + 1]`."""
    tokens = tokens.long() + 1
    total = torch.zeros_like(tokens)
    for n in range(1, min(longest, tokens.shape[-1]) + 1):
        total = total[..., : tokens.shape[-1] - n + 1]
        total = (total * 6364136223846793005 + tokens[..., n - 1 :]) ^ (total >> 29)
        yield n, total


def overlapping(
    responses: Responses, questions: Sequence[Sequence[int]], n: int = NGRAM, device: torch.device | None = None
) -> Tensor:
    """Which rows share a run of `n` tokens with a question; shorter questions are compared whole.

    Args:
        responses: N rows; what stands behind their ends is zero.
        questions: token ids of the questions' texts, without chat template.
        n: length of the runs.
        device: where to compare; the CPU if not given.

    Returns:
        Boolean `[N]`.
    """
    wanted: dict[int, list[Tensor]] = {}
    for question in questions:
        for length, hashes in _hashes(torch.tensor(list(question)), n):
            if length == min(n, len(question)):
                wanted.setdefault(length, []).append(hashes)
    sought = {length: torch.cat(parts).sort().values.to(device) for length, parts in wanted.items()}
    found = torch.zeros(len(responses), dtype=torch.bool)
    for start in range(0, len(responses), SCANNED):
        rows = slice(start, start + SCANNED)
        for length, own in _hashes(responses.tokens[rows].to(device), n):
            if length in sought:
                at = torch.searchsorted(sought[length], own).clamp(max=len(sought[length]) - 1)
                found[rows] |= (sought[length][at] == own).any(dim=1).cpu()
    return found
