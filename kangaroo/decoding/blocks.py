"""What decoding passes around: how to decode, what a block drafts, and what its verification commits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor

from kangaroo.decoding.sampling import Sampling

TARGETS = ("base", "adapted")
SOURCES = ("learned", "lookup", "hybrid")
PASS_ROWS = 16
"""Positions of every pass after the prefill where `deterministic` asks for passes of one size."""
# What a block without drafts holds.
NO_TOKENS = torch.empty(0, dtype=torch.long)
NO_CHANCES = torch.empty(0)
NO_STATES = torch.empty(0, 0)


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode."""

    draft_len: int = 4
    """Tokens drafted before a verification, at most; 0 is plain decoding."""
    threshold: float = 0.0
    """A draft whose confidence is below this is the last of its block (Kangaroo's second exit); 0 to 1. With `adaptive`
    the costs decide instead."""
    target: str = "base"
    """What the deep layers read: "base", the exit state with lora_S off, or "adapted", with it on."""
    draft_temperature: float = 0.0
    """Of drafts of a greedy answer: 0 takes the argmax, above 0 they are sampled by noise that is given. Drafts of a
    sampled answer are drawn with the verifier's noise, cut as its tokens, at its temperature unless this is above 0."""
    source: str = "learned"
    """What drafts: "learned", the shallow layers; "lookup", what followed the last tokens earlier in the text;
    "hybrid", a lookup after learned drafts, which then are part of what it looks for; without `adaptive` half of the
    block each."""
    branches: int = 0
    """Chains beside the learned one, at most: the first takes the draft's second choice at the first token and goes on
    from there, the next one at the second token, and so on. With `adaptive` where that pays, if blocks run ahead;
    none in a greedy hybrid."""
    adaptive: bool = False
    """Choose source and length of each block by acceptance and step costs, up to `draft_len`; False drafts always.
    Several texts at once share each pass; their blocks are not adapted."""
    temperature: float = 0.0
    """Of the verifier: 0 answers greedily, above 0 the answer is sampled from it. The same seed gives the same answer
    whatever drafts."""
    top_k: int = 0
    """Sample only among this many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Sample only among the fewest tokens that hold this probability; above 0, up to 1."""
    deterministic: bool = False
    """Run every pass after the prefill with the same number of positions and cache slots, so that rounding does not
    depend on what is drafted: then bfloat16 gives plain decoding's tokens, too. A pass costs what its longest would."""
    keep_states: bool = False
    """Give the verifier's states with every verification, to learn from; such blocks do not run ahead of the host."""

    def __post_init__(self) -> None:
        for name in ("draft_len", "draft_temperature", "temperature", "top_k", "branches"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("draft_len", "top_k", "branches"):
            if not isinstance(getattr(self, name), Integral):
                raise ValueError(f"{name} is {getattr(self, name)}; expected an integer")
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold is {self.threshold}; expected 0 to 1")
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; expected one of {', '.join(TARGETS)}")
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}; expected one of {', '.join(SOURCES)}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; expected above 0, to 1")
        if self.temperature == 0.0 and (self.top_k or self.top_p < 1.0):
            raise ValueError("top_k and top_p are for sampling; expected a temperature above 0 beside them")
        if self.deterministic and self.draft_len >= PASS_ROWS:
            raise ValueError(f"draft_len is {self.draft_len}; expected below {PASS_ROWS} with deterministic")

    @property
    def sampling(self) -> Sampling | None:
        """How the verifier's tokens are drawn; None for greedy answers."""
        return Sampling(self.temperature, self.top_k, self.top_p) if self.temperature else None

    @property
    def draft_sampling(self) -> Sampling | None:
        """How the drafts of a sampled answer are drawn; None for greedy answers."""
        if not self.temperature:
            return None
        return Sampling(self.draft_temperature or self.temperature, self.top_k, self.top_p)

    @property
    def num_looked_up(self) -> int:
        """Tokens of a lookup in a block that is not adapted, at most."""
        shares = {"learned": 0, "lookup": self.draft_len, "hybrid": self.draft_len // 2}
        return shares[self.source]

    @property
    def num_learned(self) -> int:
        """Learned drafts of a block that is not adapted, at most."""
        return self.draft_len - self.num_looked_up

    @property
    def chains(self) -> int:
        """Chains of drafts, at most: the main one and its branches, which need a second choice."""
        drawn_by_noise = self.draft_temperature > 0 and not self.temperature
        # Passes of one size have one row a text.
        if self.deterministic or self.target != "base" or self.source == "lookup" or drawn_by_noise:
            return 1
        return 1 + min(self.branches, self.draft_len)


@dataclass(frozen=True)
class DraftBlock:
    """A chain of drafts for one verification: n tokens, the first m of them by the shallow layers.

    Attributes:
        tokens: `[n]` int64, vocabulary ids.
        confidence: `[n]`, the policy's largest probability at each position; NaN for tokens that were looked up.
        exit_hidden: `[m, D]`, the exit states that the first m were drafted from, lora_S on.
        drafter_hidden: `[m, D]`, the drafter's normed states, from which the exit head chose them; empty where blocks
            run ahead of the host.
        chain: its place among the chains of its block; 0 is the main one.
    """

    tokens: Tensor = NO_TOKENS
    confidence: Tensor = NO_CHANCES
    exit_hidden: Tensor = NO_STATES
    chain: int = 0
    drafter_hidden: Tensor = NO_STATES

    @property
    def num_learned(self) -> int:
        """Number of tokens that the shallow layers drafted."""
        return len(self.exit_hidden)


@dataclass(frozen=True)
class Verification:
    """One block after its verification.

    Attributes:
        start: absolute position of the block's first token, the prompt counted.
        committed: the tokens that join the response, the verifier's own token last.
        num_drafted: scored drafts, up to and including the first reject.
        num_accepted: accepted drafts.
        draft: the block; its first `num_drafted` entries are scored. Empty where a rollout replays blocks.
        verifier_confidence: `[n + 1]`, the verifier's probability of its own token at each position; likewise.
        beside: what became of the block's other chains; they commit nothing.
        verifier_hidden: `[n + 1, D]`, the normed states from which the verifier chose its tokens; empty if they are not
            kept.
    """

    start: int
    committed: tuple[int, ...]
    num_drafted: int
    num_accepted: int
    draft: DraftBlock = DraftBlock()
    verifier_confidence: Tensor = NO_CHANCES
    beside: tuple[Verification, ...] = ()
    verifier_hidden: Tensor = NO_STATES

    @property
    def main_chain(self) -> Verification:
        """The outcome of the main chain."""
        return next(chain for chain in (self, *self.beside) if chain.draft.chain == 0)

    @property
    def block_len(self) -> int:
        """Number of tokens that this verification commits."""
        return len(self.committed)

    def cut_at_end(self, eos_ids: Sequence[int]) -> Verification:
        """The same block up to its first end-of-sequence token: what follows was never part of the answer."""
        for length, token in enumerate(self.committed, start=1):
            if token in eos_ids:
                return replace(
                    self,
                    committed=self.committed[:length],
                    num_drafted=min(self.num_drafted, length),
                    num_accepted=min(self.num_accepted, length),
                )
        return self


def settled(
    start: int,
    drafts: Sequence[DraftBlock],
    accepted: Sequence[int],
    confidence: Sequence[Sequence[float]],
    next_token: int,
) -> Verification:
    """The outcome of a block: the chain that goes furthest commits, the first one among equals.

    Args:
        start: position of the block's first token.
        drafts: its chains.
        accepted: number of accepted drafts of each.
        confidence: the verifier's in its own tokens along each.
        next_token: the verifier's own, after the drafts that are committed.
    """
    outcomes = []
    for draft, count, chances in zip(drafts, accepted, confidence, strict=True):
        num_scored = min(len(draft.tokens), count + 1)
        outcomes.append(Verification(start, (), num_scored, count, draft, torch.tensor(chances)))
    winner = outcomes.pop(accepted.index(max(accepted)))
    drafted = winner.draft.tokens[: winner.num_accepted].tolist()
    return replace(winner, committed=(*drafted, next_token), beside=tuple(outcomes))


def refuse_not_finite(confidence: Sequence[float], start: int) -> None:
    """Refuse the verifier's probabilities at the positions from `start` on if one is not finite.

    Raises:
        ValueError: naming the position.
    """
    if not all(map(math.isfinite, confidence)):
        raise ValueError(f"the verifier's logits at position {start} are not finite")
