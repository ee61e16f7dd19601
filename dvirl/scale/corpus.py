"""Cached greedy responses at scale: conversations that the model holds with itself, in shards on disk."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvirl.data.selfwritten import Openers, sample_turns
from dvirl.models.loading import LoadedModel
from dvirl.rollout import Responses, generate, join
from dvirl.runs.errors import DvirlError
from dvirl.runs.files import atomic_file

NGRAM = 13
"""Training data may not share so many tokens in a row with a question; GPT-3's decontamination counts 13 words."""
MULTIPLIER = 6364136223846793005
"""Of Knuth's linear congruential generator MMIX."""
SCANNED = 16384
"""Number of rows hashed at once."""
MOST_PASSAGES = 5
"""Answers that a longer text is put together from, at most."""


def answer(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch: int,
) -> Responses:
    """The untouched model's greedy answers, in the prompts' order; prompts of like length are answered together."""
    order = torch.tensor([len(prompt) for prompt in prompts]).argsort(stable=True)
    parts = []
    for rows in torch.split(order, batch):
        together = [prompts[row] for row in rows.tolist()]
        rollout = generate(loaded.model, together, max_new_tokens, loaded.eos_ids, keep_states=False)
        parts.append(rollout.stored())
    return join(parts).take(order.argsort())


def write_conversations(
    loaded: LoadedModel,
    count: int,
    seed: int,
    max_new_tokens: int,
    follow_up: float,
    batch: int,
    about_text: float = 0.0,
) -> Responses:
    """Conversations that the model holds with itself: a turn, its answer, for some a second turn and its answer.

    Some answers, put together, become a longer text, and a task about it the first turn of another conversation.

    Args:
        loaded: writes turns by sampling and answers greedily.
        count: first turns begun; those that do not end are left out.
        seed: of openers and samples.
        max_new_tokens: length limit of an answer.
        follow_up: share of answers that get a second turn.
        batch: rows generated at once.
        about_text: tasks about longer texts, as a share of the first answers.

    Raises:
        DvirlError: if the model's chat format has no user turns, or no turn ends.
    """
    start, _, again = loaded.chat.frame()
    openers = Openers()
    rng = random.Random(f"{seed}/conversations")
    contexts = [start + loaded.chat.plain(openers.draw(rng)) for _ in range(count)]
    opening = _sampled(loaded, contexts, rng, batch)
    if not opening:
        raise DvirlError(f"the model wrote no usable turn of {count}; another model or chat_format may")
    first = answer(loaded, opening, max_new_tokens, batch)
    longer = []
    for tokens, length in zip(first.tokens, first.lengths, strict=True):
        *conversation, last = tokens[:length].tolist()
        if rng.random() < follow_up and last in loaded.eos_ids:
            longer.append([*conversation, *again])
    prompts = _sampled(loaded, longer, rng, batch)
    prompts += _tasks_about(loaded, first, round(about_text * len(first)), rng)
    return join([first, answer(loaded, prompts, max_new_tokens, batch)]) if prompts else first


def _tasks_about(loaded: LoadedModel, first: Responses, count: int, rng: random.Random) -> list[list[int]]:
    """Prompts that set a task about a text of one or more answers among `first`, `count` of them."""
    start, end, _ = loaded.chat.frame()
    openers = Openers()
    decode = loaded.tokenizer.decode
    prompts = []
    for _ in range(count):
        rows = rng.sample(range(len(first)), rng.randint(1, min(MOST_PASSAGES, len(first))))
        passages = []
        questions = []
        for row in rows:
            prompt_len = int(first.prompt_lens[row])
            tokens = first.tokens[row, : prompt_len + first.response_lens[row]].tolist()
            stop = -1 if tokens[-1] in loaded.eos_ids else None
            questions.append(decode(tokens[len(start) : prompt_len - len(end)]))
            passages.append(decode(tokens[prompt_len:stop]).strip())
        if rng.random() < 0.5:
            passages = [f"[{place}] {text}" for place, text in enumerate(passages, start=1)]
        task = openers.task_about("\n\n".join(passages), rng.choice(questions), rng)
        prompts.append([*start, *loaded.chat.plain(task), *end])
    return prompts


def _sampled(
    loaded: LoadedModel,
    contexts: list[list[int]],
    rng: random.Random,
    batch: int,
) -> list[list[int]]:
    """The contexts with a sampled turn after each, without repeats."""
    prompts: dict[tuple[int, ...], None] = {}
    for start in range(0, len(contexts), batch):
        turns = sample_turns(loaded, contexts[start : start + batch], rng.getrandbits(63))
        prompts |= dict.fromkeys(turns)
    return [list(prompt) for prompt in prompts]


def without_repeats(responses: Responses) -> Responses:
    """The first row of each prompt."""
    first_rows: dict[bytes, int] = {}
    tokens = responses.tokens.numpy()
    for row, length in enumerate(responses.prompt_lens.tolist()):
        first_rows.setdefault(tokens[row, :length].tobytes(), row)
    return responses.take(torch.tensor(list(first_rows.values())))


def write_shard(path: Path, responses: Responses) -> None:
    """Write one shard, whole or not at all."""
    with atomic_file(path) as scratch:
        save_file(vars(responses), scratch)


def read_shard(path: Path) -> Responses:
    """Read one shard.

    Raises:
        DvirlError: if it is unreadable or not a shard.
    """
    try:
        responses = Responses(**load_file(path))
        if not _fits_together(responses):
            raise TypeError("its tensors do not fit together")
    except (SafetensorError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise DvirlError(
            f"{path}: not a readable shard of responses ({error}); remove it to have it written again"
        ) from error
    return responses


def _fits_together(responses: Responses) -> bool:
    """Whether tensors from a file can be responses: types, shapes, and lengths within the rows."""
    rows, width = responses.tokens.shape
    lengths = torch.stack([responses.prompt_lens, responses.response_lens])  # [2, N]
    if (responses.tokens.dtype, lengths.dtype) != (torch.int32, torch.int64) or lengths.shape[1] != rows:
        return False
    # A sum of two lengths could overflow; their difference to the width cannot.
    too_long = lengths[0] > width - lengths[1]
    return not bool(too_long.any() or (lengths < 0).any() or (responses.tokens < 0).any())


def _hashes(tokens: Tensor, longest: int) -> Iterator[tuple[int, Tensor]]:
    """For each n up to `longest`: n, and a 64-bit hash of every run of n tokens, `[…, W]` to `[…, W - n + 1]`."""
    tokens = tokens.long() + 1
    hashes = torch.zeros_like(tokens)
    width = tokens.shape[-1]
    for n in range(1, min(longest, width) + 1):
        hashes = hashes[..., : width - n + 1]
        # A polynomial hash modulo 2**64 (Knuth's multiplier); the shift mixes high bits into low ones.
        hashes = (hashes * MULTIPLIER + tokens[..., n - 1 :]) ^ (hashes >> 29)
        yield n, hashes


def overlapping(
    responses: Responses,
    questions: Sequence[Sequence[int]],
    n: int = NGRAM,
    device: torch.device | None = None,
) -> Tensor:
    """Which rows share a run of `n` tokens with a question; shorter questions are compared whole.

    Args:
        responses: N rows; the tokens after their ends are zero.
        questions: token ids of the questions' texts, without chat template.
        n: length of the runs.
        device: where to compare; the CPU if not given.

    Returns:
        Boolean `[N]`.
    """
    hashes_by_length: dict[int, list[Tensor]] = defaultdict(list)
    for question in filter(len, questions):
        *_, (length, hashes) = _hashes(torch.tensor(question), n)  # the longest runs
        hashes_by_length[length].append(hashes)
    sought = {length: torch.cat(parts).to(device) for length, parts in hashes_by_length.items()}
    overlaps = torch.zeros(len(responses), dtype=torch.bool)
    for start in range(0, len(responses), SCANNED):
        rows = slice(start, start + SCANNED)
        for length, hashes in _hashes(responses.tokens[rows].to(device), n):
            if length in sought:
                overlaps[rows] |= torch.isin(hashes, sought[length]).any(dim=1).cpu()
    return overlaps
