"""Speculative decoding with one model: the shallow layers draft, the deep layers verify. The algorithm.

The output never depends on what drafts, since every committed token is the verifier's own: its argmax or, in sampling,
what it draws by the noise of that place. Drafts are drawn by the same noise (Daliri et al. 2024, arXiv 2408.07978), in
place of the rejection rule of speculative sampling (Leviathan et al. 2023, arXiv 2211.17192). Early exit as in Kangaroo
(arXiv 2404.18911).

Shapes: B texts, T new tokens, n drafts of a block, V vocabulary, V' draft vocabulary, D hidden.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kangaroo.decoding.blocks import DecodeConfig, DraftBlock, Verification, refuse_not_finite, settled
from kangaroo.decoding.drafting import BlockPolicy, LookupIndex
from kangaroo.decoding.sampling import Drawn, count_accepted
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
    # 1. Draft: up to draft_len tokens for each text, by the shallow layers, by lookup, or by one after the other.
    drafts = [Draft(text) for text in texts]
    if stages.passes.begun:
        for draft in drafts:
            draft.begin()
        chains = 1 + max(draft.branches for draft in drafts)
        for draft in drafts:
            draft.fork(chains)
        stages.begin_drafting(chains)
        while any(draft.wants_more for draft in drafts):
            draft_tokens(stages, drafts, config)
        for draft in drafts:
            draft.look_up()

    # 2. Verify: the last committed token and all drafts, in one pass of the deep layers.
    if not stages.is_verifying:
        begin_verifying(stages, drafts, config)
    verified = stages.verified()

    # 3. Accept: of each text the longest chain that the verifier agrees with, then one token of its own.
    verifications = [accept(draft, verified, row, stages) for row, draft in enumerate(drafts)]

    # 4. Roll back: forget the keys and values of what was rejected.
    stages.roll_back(verifications)
    return verifications


def draft_tokens(stages: Stages, drafts: Sequence[Draft], config: DecodeConfig) -> None:
    """Let the shallow layers draft the next token of every chain that wants one, or the next few at once."""
    texts = len(drafts)
    chains = len(drafts[0].learned)
    depth = max(len(draft.tokens) for draft in drafts)
    first_stage = stages.drafting_stages(depth)[0]
    unread = unread_tokens(drafts, first_stage, chains)
    for row in range(len(unread)):
        if not drafts[row % texts].wants_more:
            unread[row] = []
    wanted = max(draft.wanted() for draft in drafts)
    count = stages.drafts_at_once(wanted)
    noise = [[0.0] * count] * texts
    if config.temperature or config.draft_temperature:
        for row, draft in enumerate(drafts):
            if draft.wants_more:
                noise[row] = draft.noise(count)
    drafted = stages.draft(unread, config, noise, depth)
    # Where nothing follows these drafts, whatever they are, the verifier reads them before the host does.
    whole_block = all(draft.ends_after(count) for draft in drafts)
    if whole_block and count > 1 and config.target == "base":
        begin_verifying(stages, drafts, config, drafted)
    taken = []
    for row, draft in enumerate(drafts):
        taken.append(draft.take(drafted, row, texts, len(unread[row])))
    stages.count_drafts(taken * chains)


def begin_verifying(
    stages: Stages, drafts: Sequence[Draft], config: DecodeConfig, drafted: Drafted | None = None
) -> None:
    """Let the verifier read the last committed token and the drafts of every chain.

    Args:
        stages: the model.
        drafts: the block of each text, as far as the host knows it.
        config: how drafts are verified.
        drafted: drafts after these that are still on the device.
    """
    if config.target == "adapted":
        states = adapted_states(stages, drafts)
        drawn = how_drawn(stages, drafts, list(map(len, states)), config)
        stages.begin_verifying_states(states, drawn)
        return
    chains = len(drafts[0].learned)
    rows = unread_tokens(drafts, stages.deep, chains)
    if drafted is not None:
        count = drafted.chosen.shape[2]
        for row in rows:
            if row:  # the pass itself puts the drafts in these places
                row.extend([0] * count)
    drawn = how_drawn(stages, drafts, list(map(len, rows)), config)
    stages.begin_verifying(rows, chains, drawn, drafted)


def how_drawn(
    stages: Stages, drafts: Sequence[Draft], counts: Sequence[int], config: DecodeConfig
) -> Drawn | None:
    """How the verifier draws its token after each of the last `counts` tokens of every row; None for greedy answers.

    Of a prompt only the token after it is drawn.
    """
    if config.sampling is None:
        return None
    lengths = stages.deep.cache.lengths
    keys = []
    for row, count in enumerate(counts):
        place = row % len(drafts)
        text = drafts[place].text
        if stages.passes.begun:
            keys.append(text.noise_after(lengths[place], count))
        else:
            keys.append(text.noise_after(text.prompt_len - 1, 1))
    longest = max(map(len, keys))
    padded = [row + [0] * (longest - len(row)) for row in keys]
    return Drawn(config.sampling, torch.tensor(padded, dtype=torch.int64))


def unread_tokens(drafts: Sequence[Draft], stage: Stage, chains: int = 1) -> list[list[int]]:
    """The tokens of every text and its drafts that a stage has not read, by chain; none for texts that are over."""
    lengths = stage.cache.lengths
    unread = []
    for chain in range(chains):
        for length, draft in zip(lengths, drafts, strict=False):  # further rows are those of further chains
            unread.append(draft.tokens_after(length, chain))
    return unread


def adapted_states(stages: Stages, drafts: Sequence[Draft]) -> list[Tensor]:
    """What the deep layers read with target "adapted": the exit states from drafting, and those of the other tokens."""
    unread = unread_tokens(drafts, stages.shallow)
    states = stages.read(unread)  # [B, T, D]
    whole = []
    for row, draft in enumerate(drafts):
        rest = states[row, : len(unread[row])]
        whole.append(torch.cat([*draft.read_states, rest]))
    return whole


def accept(draft: Draft, verified: Verified, row: int, stages: Stages) -> Verification | None:
    """What one text commits: of its chains of drafts the one that goes furthest, and a token of the verifier's own.

    Drafts are accepted while they are the verifier's own tokens.
    """
    if not draft.text.room:
        return None
    start = len(draft.text.tokens)
    chains = draft.chains()
    chain_rows = [row + place * verified.texts for place in range(len(chains))]
    confidence = []
    for chain_row, chain in zip(chain_rows, chains, strict=True):
        chances = verified.confidence[chain_row][: len(chain) + 1]
        refuse_not_finite(chances, start)
        confidence.append(chances)
    own = [verified.tokens[chain_row] for chain_row in chain_rows]
    counts, next_token = accepted(chains, own)
    blocks = [draft.block(place, stages) for place in range(len(chains))]
    outcome = settled(start, blocks, counts, confidence, next_token)
    winning_row = row + outcome.draft.chain * verified.texts
    states = verified.states[winning_row, : len(outcome.draft.tokens) + 1]
    # A copy: the next pass writes over the states of a captured one.
    return replace(outcome, verifier_hidden=states.clone())


def accepted(chains: Sequence[Sequence[int]], own: Sequence[Sequence[int]]) -> tuple[list[int], int]:
    """Number of accepted drafts of each chain, and the verifier's token after the chain that goes furthest.

    Args:
        chains: the drafts of each chain, n tokens.
        own: the verifier's own tokens along each chain, n + 1 tokens.
    """
    counts = [count_accepted(chain, tokens) for chain, tokens in zip(chains, own, strict=True)]
    best = counts.index(max(counts))
    return counts, own[best][counts[best]]


@dataclass
class Text:
    """One text while it is decoded.

    Attributes:
        index: prompt and response so far.
        stop: the length at which the text ends, whatever it says.
        policy: says what its blocks draft.
        noise: one number for each position of the response, by which a token is drawn there: of a sampled answer a key,
            see `gumbel_noise`; else uniform in [0, 1), for sampled drafts, or None.
        prompt_len: the prompt's length.
    """

    index: LookupIndex
    stop: int
    policy: BlockPolicy
    noise: Tensor | None = None
    prompt_len: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    def seed(self, seed: int, max_new_tokens: int) -> None:
        """Let the answer be sampled: the same seed gives the same answer.

        Raises:
            ValueError: if the text has noise already.
        """
        if self.noise is not None:
            raise ValueError("noise is for drafts of greedy answers; expected a seed for a sampled one")
        rng = random.Random(str(seed))  # of all its bits; a number would lose its sign
        self.noise = torch.tensor([rng.getrandbits(63) for _ in range(max_new_tokens)])

    @property
    def tokens(self) -> list[int]:
        """Prompt and response so far."""
        return self.index.tokens

    @property
    def room(self) -> int:
        """The number of tokens that may still be committed; 0 for a text that is over."""
        return max(0, self.stop - len(self.tokens))

    def noise_after(self, position: int, count: int) -> list[float]:
        """The numbers by which the `count` tokens after a position of the text are drawn.

        A position that is drafted again takes the same number again.

        Raises:
            ValueError: if the text has none.
        """
        if self.noise is None:
            raise ValueError("sampled drafts need noise")
        first = position + 1 - self.prompt_len
        numbers = self.noise[first : first + count].tolist()
        # What is drafted beyond the text's limit has no room.
        beyond = [0] * (count - len(numbers))
        return [*numbers, *beyond]


class Draft:
    """One text's block while it is drafted.

    Attributes:
        text: the text.
        learned: chains of drafts by the shallow layers: the main one and its branches. The main one may go on with
            tokens that were looked up.
        branches: branches that the policy wants.
        wants_more: whether the shallow layers draft another token.
        read_states: the exit states of every token that they read for this block, `[T, D]` a draft; only for target
            "adapted".
    """

    def __init__(self, text: Text) -> None:
        self.text = text
        self.branches = 0
        self.wants_more = False
        self.read_states: list[Tensor] = []
        self._limit = 0
        self._exit_hidden: list[Tensor] = []  # [chains, n, D] each
        self._drafter_hidden: list[Tensor] = []  # likewise
        self.fork(1)

    @property
    def tokens(self) -> list[int]:
        """The main chain."""
        return self.learned[0]

    def begin(self) -> None:
        """Ask the policy how many tokens to draft; one token of the text's room is left to the verifier."""
        policy = self.text.policy
        if self.text.room:
            self._limit = policy.begin(self.text.index, self.text.room - 1)
        self.wants_more = self._limit > 0
        self.branches = min(policy.branches, self._limit)

    def fork(self, chains: int) -> None:
        """Begin as many learned chains as the texts' blocks have."""
        self.learned: list[list[int]] = [[] for _ in range(chains)]
        self._confidence: list[list[float]] = [[] for _ in range(chains)]

    def chains(self) -> list[list[int]]:
        """The chains of drafts that are verified.

        Branch b leaves the main chain at its token b; if the main chain is shorter, there is no such branch.
        """
        num_drafted = len(self._confidence[0])
        return self.learned[: num_drafted + 1]

    def wanted(self) -> int:
        """Tokens to draft before the policy looks at them."""
        if not self.wants_more:
            return 0
        left = self._limit - len(self.tokens)
        return min(left, self.text.policy.at_once())

    def ends_after(self, count: int) -> bool:
        """Whether the first `count` drafts of the block are all of it, whatever they are."""
        return not self.tokens and count >= self._limit and not self.text.policy.extends

    def noise(self, count: int) -> list[float]:
        """The numbers by which the next `count` tokens are drawn."""
        return self.text.noise_after(len(self.text.tokens) + len(self.tokens) - 1, count)

    def take(self, drafted: Drafted, row: int, texts: int, num_read: int) -> int:
        """Take the tokens drafted for this text up to where its policy stops.

        Args:
            drafted: tokens of all texts.
            row: of the text's main chain.
            texts: rows from one chain to the next.
            num_read: tokens that were read for the first of them.

        Returns:
            How many were taken.
        """
        count = 0
        made = len(drafted.by_row[row])
        while self.wants_more and count < made:
            for chain in range(len(self.learned)):
                token, confidence = drafted.by_row[row + chain * texts][count]
                self.learned[chain].append(token)
                self._confidence[chain].append(confidence)
            count += 1
            main_confidence = self._confidence[0][-1]
            goes_on = self.text.policy.keep_drafting(self.tokens[-1], main_confidence, made - count)
            self.wants_more = goes_on and len(self.tokens) < self._limit
        self._exit_hidden.append(drafted.exit_hidden[row::texts, :count])
        self._drafter_hidden.append(drafted.drafter_hidden[row::texts, :count])
        for states in drafted.states[:count]:
            self.read_states.append(states[row, :num_read])
            num_read = 1  # a later draft is made from the one before it alone
        return count

    def look_up(self) -> None:
        """Add what the policy takes from a lookup, as far as there is room."""
        if self.text.room:
            free = self.text.room - 1 - len(self.tokens)
            self.tokens.extend(self.text.policy.look_up()[:free])

    def tokens_after(self, length: int, chain: int) -> list[int]:
        """Text and drafts of a chain from position `length` on; nothing if the text is over."""
        if not self.text.room:
            return []
        num_read = max(0, length - len(self.text.tokens))  # of the drafts
        return [*self.text.tokens[length:], *self.learned[chain][num_read:]]

    def block(self, place: int, stages: Stages) -> DraftBlock:
        """A chain as records and policies see it."""
        tokens = self.chains()[place]
        confidence: list[float] = []
        exit_hidden = torch.empty(0, stages.hidden_size)
        drafter_hidden = exit_hidden
        if self._confidence[place]:
            confidence = self._confidence[place]
            exit_hidden = torch.cat([states[place] for states in self._exit_hidden])
            drafter_hidden = torch.cat([states[place] for states in self._drafter_hidden])
        num_looked_up = len(tokens) - len(confidence)
        unknown = [math.nan] * num_looked_up
        return DraftBlock(
            tokens=torch.tensor(tokens, dtype=torch.long),
            confidence=torch.tensor([*confidence, *unknown]),
            exit_hidden=exit_hidden,
            chain=place,
            drafter_hidden=drafter_hidden,
        )
