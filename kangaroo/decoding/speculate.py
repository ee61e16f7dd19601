"""Speculative decoding with one model: the shallow layers draft, the deep layers verify. The algorithm.

Greedy output never depends on what drafts, since every committed token is the verifier's own. When sampling, the
distribution of the output never depends on it (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv
2302.01318). Early exit as in Kangaroo (arXiv 2404.18911).

Shapes: B texts, T new tokens, n drafts of a block, V vocabulary, V' draft vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kangaroo.decoding.blocks import DecodeConfig, DraftBlock, Verification, refuse_not_finite
from kangaroo.decoding.drafting import BlockPolicy, LookupIndex
from kangaroo.decoding.sampling import (
    count_accepted,
    distribution,
    speculative_sampling,
    speculative_sampling_of_chains,
)
from kangaroo.decoding.stages import Drafted, Stage, Stages, Verified


@torch.no_grad()
def spec_decode_step(
    stages: Stages, texts: Sequence[Text], config: DecodeConfig
) -> list[Verification | None]:
    """Draft a block for each text, verify all blocks in one pass, and say what is committed. Lossless.

    The first step on empty caches lets the verifier read the prompts. It drafts nothing, so that every draft follows a
    token that the verifier chose; what drafts reads a prompt at its first draft. Each text commits as many tokens as it
    has accepted.

    Args:
        stages: the model; their caches hold what earlier steps read.
        texts: prompts and responses so far; each text's policy says what it drafts.
        config: how drafts are drawn and verified.

    Returns:
        One verification a text, None for texts that are over. The caller appends `committed` to the texts.

    Raises:
        ValueError: if a logit of the verifier is not finite.
    """
    # 1. Draft: up to draft_len tokens for each text, by the shallow layers, by lookup, or by both side by side.
    drafts = [Draft(text) for text in texts]
    if stages.passes.begun:
        for draft in drafts:
            draft.begin()
        while any(draft.wants_more for draft in drafts):
            draft_tokens(stages, drafts, config)
        for draft in drafts:
            draft.look_up()

    # 2. Verify: the last committed token and all drafts, in one pass of the deep layers.
    if not stages.is_verifying:
        begin_verifying(stages, drafts, config)
    verified = stages.verified()

    # 3. Accept: of each text the longest chain that the verifier agrees with, then one token of its own.
    verifications = [accept(draft, verified, row, stages, config) for row, draft in enumerate(drafts)]

    # 4. Roll back: forget the keys and values of what was rejected.
    stages.roll_back(verifications)
    return verifications


def draft_tokens(stages: Stages, drafts: Sequence[Draft], config: DecodeConfig) -> None:
    """Let the shallow layers draft the next token of every block that wants one, or the next few at once."""
    unread = unread_tokens(drafts, stages.shallow)
    for row, draft in enumerate(drafts):
        if not draft.wants_more:
            unread[row] = []
    count = stages.drafts_at_once(max(draft.wanted() for draft in drafts))
    sampled = config.draft_temperature > 0
    noise = [draft.noise(count) if sampled and draft.wants_more else [0.0] * count for draft in drafts]
    drafted = stages.draft(unread, config, noise)
    # Where nothing follows these drafts, whatever they are, the verifier reads them before the host does.
    if count > 1 and config.target == "base" and all(draft.ends_after(count) for draft in drafts):
        begin_verifying(stages, drafts, config, drafted)
    taken = [draft.take(drafted, row, len(unread[row])) for row, draft in enumerate(drafts)]
    stages.count_drafts(taken)


def begin_verifying(
    stages: Stages, drafts: Sequence[Draft], config: DecodeConfig, drafted: Drafted | None = None
) -> None:
    """Let the verifier read the last committed token and the drafts of every text, `drafted` still on the device."""
    sampled = config.temperature > 0
    if config.target == "adapted":
        stages.begin_verifying_states(adapted_states(stages, drafts), sampled)
        return
    lengths = stages.deep.cache.lengths
    second = [draft.second_after(length) for draft, length in zip(drafts, lengths, strict=True)]
    stages.begin_verifying(unread_tokens(drafts, stages.deep), second, sampled, drafted)


def unread_tokens(drafts: Sequence[Draft], stage: Stage) -> list[list[int]]:
    """The tokens of every text and its drafts that a stage has not read; none for texts that are over."""
    return [draft.tokens_after(length) for draft, length in zip(drafts, stage.cache.lengths, strict=True)]


def adapted_states(stages: Stages, drafts: Sequence[Draft]) -> list[Tensor]:
    """What the deep layers read with target "adapted": the exit states from drafting, and those of the other tokens."""
    unread = unread_tokens(drafts, stages.shallow)
    states = stages.read(unread)  # [B, T, D]
    return [
        torch.cat([*draft.read_states, states[row, : len(unread[row])]]) for row, draft in enumerate(drafts)
    ]


def accept(
    draft: Draft, verified: Verified, row: int, stages: Stages, config: DecodeConfig
) -> Verification | None:
    """What one text commits: of its chains of drafts the one that goes furthest, and a token of the verifier's own.

    Greedy: accept drafts while they are the verifier's argmax. Sampling: accept draft x with probability
    min(1, p(x) / q(x)), see `speculative_sampling`.
    """
    if not draft.text.room:
        return None
    start = len(draft.text.tokens)
    chains = draft.chains()
    rows = verified.rows_of(row)[: len(chains)]
    confidence = [verified.confidence[at][: len(chain) + 1] for at, chain in zip(rows, chains, strict=True)]
    for chances in confidence:
        refuse_not_finite(chances, start)
    if config.temperature == 0:
        counts, next_token = greedily_accepted(chains, [verified.tokens[at] for at in rows])
    else:
        counts, next_token = sample_accepted(draft, [verified.logits[at] for at in rows], stages, config)
    best = counts.index(max(counts))
    results = [
        Verification(
            start=start,
            committed=(*chain[: counts[best]], next_token) if place == best else (),
            num_drafted=min(len(chain), counts[place] + 1),
            num_accepted=counts[place],
            draft=draft.block(place, stages),
            verifier_confidence=torch.tensor(confidence[place]),
            # A copy: the next pass writes over the states of a captured one.
            verifier_hidden=verified.states[rows[place], : len(chain) + 1].clone(),
        )
        for place, chain in enumerate(chains)
    ]
    winner = results.pop(best)
    return replace(winner, beside=results[0]) if results else winner


def greedily_accepted(chains: Sequence[Sequence[int]], own: Sequence[Sequence[int]]) -> tuple[list[int], int]:
    """Accepted drafts of each chain, and the token after the longest, by the verifier's own tokens beside each."""
    counts = [count_accepted(chain, tokens) for chain, tokens in zip(chains, own, strict=True)]
    best = counts.index(max(counts))
    return counts, own[best][counts[best]]


def sample_accepted(
    draft: Draft, logits: Sequence[Tensor], stages: Stages, config: DecodeConfig
) -> tuple[list[int], int]:
    """Accepted drafts of each chain, and the token after them, by logits `[n + 1, V]` of each chain."""
    targets, proposed, drafted = [], [], []
    for place, chain in enumerate(draft.chains()):
        rows = logits[place][: len(chain) + 1]
        targets.append(distribution(rows, config.temperature, config.top_k, config.top_p))  # p, [n + 1, V]
        proposed.append(draft.proposed(place, targets[-1], stages))  # q, [n, V]
        drafted.append(torch.tensor(chain, dtype=torch.long, device=rows.device))
    count = max(map(len, drafted)) + 1
    if len(drafted) > 1:
        uniform = draft.text.uniform(2 * count)
        return speculative_sampling_of_chains(targets, proposed, drafted, uniform.tolist())
    accepted, token = speculative_sampling(
        targets[0], proposed[0], drafted[0], draft.text.uniform(count).to(targets[0].device)
    )
    return [accepted], token


@dataclass
class Text:
    """One text while it is decoded.

    Attributes:
        index: prompt and response so far.
        stop: the length at which the text ends, whatever it says.
        policy: says what its blocks draft.
        noise: uniform in [0, 1), one number for each position of the response, for sampled drafts; None for argmax
            drafts. A position that is drafted again takes the same number again: nothing committed depended on it.
        generator: what the verifier's samples are drawn from; None if it is greedy.
        prompt_len: the prompt's length.
    """

    index: LookupIndex
    stop: int
    policy: BlockPolicy
    noise: Tensor | None = None
    generator: torch.Generator | None = None
    prompt_len: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    def seed(self, seed: int, num_drafts: int) -> None:
        """Let the answer be sampled: draw noise for `num_drafts` sampled drafts, unless given, then the rest."""
        self.generator = torch.Generator().manual_seed(seed)
        if num_drafts:
            drawn = torch.rand(num_drafts, generator=self.generator)
            self.noise = drawn if self.noise is None else self.noise

    @property
    def tokens(self) -> list[int]:
        """Prompt and response so far."""
        return self.index.tokens

    @property
    def room(self) -> int:
        """The number of tokens that may still be committed; 0 for a text that is over."""
        return max(0, self.stop - len(self.tokens))

    def uniform(self, count: int) -> Tensor:
        """New numbers in [0, 1), `[count]`."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64)


class Draft:
    """One text's block while it is drafted.

    Attributes:
        text: the text.
        tokens: the drafts so far.
        second: another chain of drafts after the text, verified beside the first; none for most blocks.
        wants_more: whether the shallow layers draft another token.
        read_states: the exit states of every token that they read for this block, `[T, D]` a draft; only for target
            "adapted".
    """

    def __init__(self, text: Text) -> None:
        self.text = text
        self.tokens: list[int] = []
        self.second: list[int] = []
        self.wants_more = False
        self.read_states: list[Tensor] = []
        self._limit = 0
        self._confidence: list[float] = []
        self._exit_hidden: list[Tensor] = []
        self._probabilities: list[Tensor] = []

    def begin(self) -> None:
        """Ask the policy how many tokens to draft; one token of the text's room is left to the verifier."""
        if self.text.room:
            self._limit = self.text.policy.begin(self.text.index, self.text.room - 1)
            self.second = self.text.policy.beside()
        self.wants_more = self._limit > 0

    def chains(self) -> list[list[int]]:
        """The chains of drafts that are verified."""
        return [self.tokens, self.second] if self.second else [self.tokens]

    def wanted(self) -> int:
        """Tokens to draft before the policy looks at them."""
        if not self.wants_more:
            return 0
        return min(self._limit - len(self.tokens), self.text.policy.at_once())

    def ends_after(self, count: int) -> bool:
        """Whether the first `count` drafts of the block are all of it, whatever they are."""
        return not self.tokens and count >= self._limit and not self.text.policy.extends

    def noise(self, count: int) -> list[float]:
        """The numbers in [0, 1) by which the next `count` tokens are sampled.

        Raises:
            ValueError: if the text has none.
        """
        if self.text.noise is None:
            raise ValueError("sampled drafts need noise")
        position = len(self.text.tokens) - self.text.prompt_len + len(self.tokens)
        last = len(self.text.noise) - 1
        return [float(self.text.noise[min(position + step, last)]) for step in range(count)]

    def take(self, drafted: Drafted, row: int, num_read: int) -> int:
        """Take the tokens drafted for this text up to where its policy stops; the first was made by reading `num_read`.

        Returns:
            How many.
        """
        before = len(self.tokens)
        tokens = drafted.by_text[row]
        for step, (token, confidence) in enumerate(tokens):
            if not self.wants_more:
                break
            self.tokens.append(token)
            self._confidence.append(confidence)
            keeps_drafting = self.text.policy.keep_drafting(token, confidence, len(tokens) - step - 1)
            self.wants_more = keeps_drafting and len(self.tokens) < self._limit
        count = len(self.tokens) - before
        self._exit_hidden.append(drafted.exit_hidden[row, :count])
        for step, states in enumerate(drafted.states[:count]):
            self.read_states.append(states[row, : num_read if step == 0 else 1])
        if drafted.probabilities is not None:
            self._probabilities.append(drafted.probabilities[row, :count])
        return count

    def look_up(self) -> None:
        """Add what the policy takes from a lookup, as far as there is room."""
        if self.text.room:
            free = self.text.room - 1 - len(self.tokens)
            self.tokens += self.text.policy.look_up()[:free]

    def tokens_after(self, length: int) -> list[int]:
        """Text and drafts from position `length` on; nothing if the text is over."""
        if not self.text.room:
            return []
        drafts = self.tokens[max(0, length - len(self.text.tokens)) :]
        return [*self.text.tokens[length:], *drafts]

    def second_after(self, length: int) -> list[int]:
        """The same with the second chain; nothing if there is none."""
        return [*self.text.tokens[length:], *self.second] if self.second else []

    def proposed(self, place: int, target: Tensor, stages: Stages) -> Tensor:
        """q, `[n, V]`: the distribution that each draft of a chain was drawn from, one-hot where it was not drawn.

        Args:
            place: of the chain.
            target: p, `[n + 1, V]`, for shape, dtype and device.
            stages: map rows of the exit head to token ids.
        """
        drafted = torch.tensor(self.chains()[place], dtype=torch.long, device=target.device)
        proposed = torch.nn.functional.one_hot(drafted, target.shape[-1]).to(target.dtype)
        if self._probabilities and place == 0:
            drawn = torch.cat(self._probabilities)  # [m, V']
            covered = stages.token_ids(torch.arange(drawn.shape[1], device=target.device))
            proposed[: len(drawn)] = 0.0
            proposed[: len(drawn), covered] = drawn
        return proposed

    def block(self, place: int, stages: Stages) -> DraftBlock:
        """A chain as records and policies see it."""
        if place == 1:
            return DraftBlock(
                torch.tensor(self.second), torch.full((len(self.second),), float("nan")), is_second=True
            )
        num_looked_up = len(self.tokens) - len(self._confidence)
        exit_hidden = torch.empty(0, stages.hidden_size)
        return DraftBlock(
            tokens=torch.tensor(self.tokens, dtype=torch.long),
            confidence=torch.tensor([*self._confidence, *[float("nan")] * num_looked_up]),
            exit_hidden=torch.cat(self._exit_hidden) if self._exit_hidden else exit_hidden,
            probabilities=torch.cat(self._probabilities) if self._probabilities else None,
        )
