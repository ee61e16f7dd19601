"""Rollouts: the verifier's greedy text for a batch of prompts, and the draft's decisions on it in one pass.

In greedy decoding every scored draft stands behind verified text. So the drafts of a whole response follow from
one parallel shallow pass over that text, and replaying the block rule over them gives exactly the records that
`spec_decode_step` gives one block at a time (`tests/test_rollout.py` holds the two equal).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dvirl.runs.errors import DvirlError
from kangaroo.adapter import KVCache
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.sampling import choose_tokens
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel

Sampler = Callable[[Tensor], Tensor]
"""Picks tokens `[B]` from float32 logits `[B, V]`."""


Answer = Callable[[list[list[int]]], "Rollout"]
"""Responses for a batch of prompts."""


Drafts = tuple[Tensor, Tensor]
"""The draft policy at N positions, before anything is chosen: logits `[N, V']`, float32, and exit states `[N, D]`."""


COMPACT_BELOW = 0.75
"""Share of unfinished rows under which finished ones are dropped from a batch."""


LOOK_EVERY = 16
"""Tokens between looks at which rows are finished, on a device that a look would make wait."""


@dataclass(frozen=True)
class Responses:
    """Responses behind their prompts.

    Attributes:
        tokens: `[B, P + R]`, prompt and response without a gap, padded on the right with zeros.
        prompt_lens, response_lens: `[B]` int64; an end-of-sequence token counts.
    """

    tokens: Tensor
    prompt_lens: Tensor
    response_lens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """Response tokens, all rows together."""
        return int(self.response_lens.sum())

    def response_tokens(self) -> Tensor:
        """All response tokens, `[num_tokens]`."""
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        starts, ends = self.prompt_lens[:, None], (self.prompt_lens + self.response_lens)[:, None]
        return self.tokens[(steps >= starts) & (steps < ends)]

    def take(self, rows: Tensor) -> "Responses":
        """Some rows, cut to their longest."""
        prompt_lens, response_lens = self.prompt_lens[rows], self.response_lens[rows]
        width = int((prompt_lens + response_lens).max()) if len(rows) else 0
        return Responses(self.tokens[rows, :width], prompt_lens, response_lens)

    def stored(self) -> "Responses":
        """These alone, on the CPU, tokens as int32."""
        return Responses(self.tokens.int().cpu(), self.prompt_lens.cpu(), self.response_lens.cpu())


@dataclass(frozen=True)
class Rollout(Responses):
    """The verifier's responses to a batch of prompts, and its states.

    Attributes:
        verifier_hidden: `[B, R, D]`, the normed states from which the verifier chose each response token; `[B, R, 0]`
            if they were not kept.
        verifier_confidence: `[B, R]`, its probability of the token that it chose.
        max_new_tokens: the length limit, which the block rule needs.
    """

    verifier_hidden: Tensor
    verifier_confidence: Tensor
    max_new_tokens: int

    def groups(self, size: int) -> Iterator["Rollout"]:
        """So many rows at a time, cut to their longest."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            width = int((self.prompt_lens + self.response_lens)[rows].max())
            reach = int(self.response_lens[rows].max())
            hidden, confidence = self.verifier_hidden[rows, :reach], self.verifier_confidence[rows, :reach]
            lengths = self.prompt_lens[rows], self.response_lens[rows]
            yield Rollout(self.tokens[rows, :width], *lengths, hidden, confidence, self.max_new_tokens)

    def prompts(self) -> list[list[int]]:
        """The prompts' tokens."""
        return [self.tokens[row, : int(length)].tolist() for row, length in enumerate(self.prompt_lens)]

    def responses(self) -> list[list[int]]:
        """All responses' tokens, without padding."""
        spans = zip(self.tokens.tolist(), self.prompt_lens.tolist(), self.response_lens.tolist(), strict=True)
        return [tokens[start : start + length] for tokens, start, length in spans]


@dataclass(frozen=True)
class Block:
    """One verification, without its tensors: the first token's response index and what became of the drafts."""

    start: int
    num_drafted: int
    num_accepted: int
    block_len: int


@dataclass(frozen=True)
class Records:
    """Scored drafts, one a row: every drafted position up to and including the first reject.

    Attributes:
        hidden: `[N, D]`, exit states, detached.
        token: `[N]`, drafted vocabulary ids.
        reward: `[N]`, 1.0 accepted, 0.0 rejected.
        verifier_confidence: `[N]`.
        verifier_token: `[N]`, what the verifier committed there.
        row: `[N]`, row of the rollout.
        position: `[N]`, response index.
    """

    hidden: Tensor
    token: Tensor
    reward: Tensor
    verifier_confidence: Tensor
    verifier_token: Tensor
    row: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.token)

    @property
    def num_accepted(self) -> int:
        """Accepted drafts."""
        return int(self.reward.sum())

    def accepted(self) -> "Records":
        """The accepted ones alone."""
        return Records(**{spec.name: getattr(self, spec.name)[self.reward > 0] for spec in fields(Records)})


@dataclass(frozen=True)
class Judgement:
    """What drafting does on a rollout: the records, and each row's blocks."""

    records: Records
    blocks: list[list[Block]]


class _Batch:
    """Rows under generation: caches, and where each row stands."""

    def __init__(
        self, model: EarlyExitLlamaForCausalLM, tokens: Tensor, lengths: Tensor, capacity: int, target: str
    ) -> None:
        self.model, self.target = model, target
        layers, split = model.config.num_hidden_layers, model.exit_layer
        like = model.model.norm.weight
        self.shallow = KVCache(model.config, split, len(tokens), capacity, like)
        self.deep = KVCache(model.config, layers - split, len(tokens), capacity, like)
        shared = common_prefix(tokens, lengths)
        if shared:  # what all rows begin with is computed once, and its keys and values are copied
            prefix = _Batch(model, tokens[:1, :shared], lengths.new_tensor([shared]), shared, target)
            for own, source in ((self.shallow, prefix.shallow), (self.deep, prefix.deep)):
                for wide, one in zip(own.keys + own.values, source.keys + source.values, strict=True):
                    wide[:, :, :shared] = one
                own.length = shared
        hidden = self._forward(tokens[:, shared:])
        self.rows = torch.arange(len(tokens), device=tokens.device)
        self.shallow.length = self.deep.length = lengths
        self.last = hidden[self.rows, lengths - shared - 1]

    def _forward(self, tokens: Tensor) -> Tensor:
        with self.model.without_adapters(*(("lora_S",) if self.target == "base" else ())):
            exit_hidden = self.model.forward_shallow(tokens, cache=self.shallow)
        return self.model.forward_deep(exit_hidden, cache=self.deep)

    def append(self, tokens: Tensor) -> None:
        self.last = self._forward(tokens[:, None])[:, -1]

    def keep(self, alive: Tensor) -> None:
        self.rows = self.rows[alive]
        for cache in (self.shallow, self.deep):
            cache.keep(alive.nonzero().flatten().tolist())


def common_prefix(tokens: Tensor, lengths: Tensor) -> int:
    """Length of the prefix that all rows of `tokens [B, P]` share, short of every row's last token."""
    if len(tokens) == 1:
        return 0
    reach = int(lengths.min()) - 1
    differs = (tokens[:, :reach] != tokens[:1, :reach]).any(dim=0).nonzero()
    return int(differs[0]) if len(differs) else reach


@torch.no_grad()
def generate(
    model: EarlyExitLlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    target: str = "base",
    sampler: Sampler | None = None,
    keep_states: bool = True,
) -> Rollout:
    """The verifier's own responses, all prompts in one batch.

    Args:
        model: lora_S is left out if `target` is "base"; lora_D counts.
        prompts: token ids, none empty.
        max_new_tokens: length limit, at least 1.
        eos_ids: tokens that end a response.
        target: "base" or "adapted".
        sampler: None for greedy.
        keep_states: keep `verifier_hidden` and `verifier_confidence`; without, they are empty and zero.

    Raises:
        ValueError: for an empty prompt or a limit below 1.
        DvirlError: if the model's logits are not finite.
    """
    if max_new_tokens < 1 or not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(f"expected prompts of at least one token and max_new_tokens >= 1, got {max_new_tokens}")
    device = model.lm_head.weight.device
    tokens = pad_sequence([torch.tensor(list(prompt)) for prompt in prompts], batch_first=True).to(device)
    prompt_lens = torch.tensor([len(prompt) for prompt in prompts], device=device)
    with model.folded():
        batch = _Batch(model, tokens, prompt_lens, tokens.shape[1] + max_new_tokens, target)
        ends = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
        chosen, hidden, confidence = _answer(batch, max_new_tokens, ends, sampler, keep_states)
    ended = torch.isin(chosen, ends)
    response_lens = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, max_new_tokens)
    reach = int(response_lens.max())
    inside = torch.arange(reach, device=device) < response_lens[:, None]  # what stands behind an end is cleared
    if len(broken := (inside & ~confidence[:, :reach].isfinite()).nonzero()):
        row, at = broken[0].tolist()
        raise DvirlError(f"the verifier's logits for token {at} of its answer to prompt {row} are not finite")
    tokens = F.pad(tokens, (0, int((prompt_lens + response_lens).max()) - tokens.shape[1]))
    rows, positions = inside.nonzero(as_tuple=True)
    tokens[rows, prompt_lens[rows] + positions] = chosen[rows, positions]
    hidden, confidence = hidden[:, :reach] * inside[:, :, None], confidence[:, :reach] * (inside & keep_states)
    return Rollout(tokens, prompt_lens, response_lens, hidden, confidence, max_new_tokens)


def _answer(
    batch: _Batch, max_new_tokens: int, ends: Tensor, sampler: Sampler | None, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, states and confidences `[B, max_new_tokens, …]`, whatever stands behind a row's end included.

    Without states, logits stand for the confidences: these too show whether numbers are finite.
    """
    count, width = batch.last.shape[0], batch.last.shape[1] if keep_states else 0
    tokens = batch.rows.new_zeros(count, max_new_tokens)
    hidden = batch.last.new_zeros(count, max_new_tokens, width)
    confidence = torch.zeros(count, max_new_tokens, device=tokens.device)
    alive = torch.ones(count, dtype=torch.bool, device=tokens.device)
    look_every = 1 if tokens.device.type == "cpu" else LOOK_EVERY
    for step in range(max_new_tokens):
        logits = batch.model.lm_head(batch.last)
        weights = logits.float().softmax(dim=-1) if keep_states else logits
        chosen = weights.argmax(dim=-1) if sampler is None else sampler(logits.float())
        if keep_states:
            hidden[batch.rows, step] = batch.last
        confidence[batch.rows, step] = weights.gather(1, chosen[:, None])[:, 0].float()
        tokens[batch.rows, step] = chosen
        alive = alive & ~torch.isin(chosen, ends)
        if step + 1 == max_new_tokens:
            break
        if step % look_every == 0:
            share = float(alive.float().mean())
            if share == 0.0:
                break
            if share < COMPACT_BELOW:
                batch.keep(alive)
                chosen, alive = chosen[alive], alive[alive]
        batch.append(chosen)
    return tokens, hidden, confidence


def replay_blocks(
    accepted: Sequence[bool], confidence: Sequence[float], settings: DecodeConfig, max_new_tokens: int
) -> list[Block]:
    """Walk the block rule over one response.

    Args:
        accepted: for each response index but the first (the prefill's), whether the draft there is the text's token.
        confidence: the draft's, aligned with `accepted`.
        settings: draft_len and threshold.
        max_new_tokens: the length limit under which the response came about.

    Returns:
        The blocks behind the prefill, as the step-by-step decoder commits them.
    """
    length, start = len(accepted) + 1, 1
    blocks: list[Block] = []
    while start < length:
        count = min(settings.draft_len, max_new_tokens - start - 1, length - start)
        drafted = taken = 0
        while drafted < count:
            at = start + drafted - 1
            drafted += 1
            taken += accepted[at]
            if not accepted[at] or confidence[at] < settings.threshold:
                break
        block_len = min(taken + 1, length - start)
        blocks.append(Block(start, drafted, taken, block_len))
        start += block_len
    return blocks


@torch.no_grad()
def verifier_states(base: EarlyExitLlamaForCausalLM, tokens: Tensor, without: Sequence[str]) -> Tensor:
    """The deep layers' normed states `[B, T, D]` on tokens `[B, T]`, some adapters left out, in one pass."""
    with base.without_adapters(*without):
        return base.forward_deep(base.forward_shallow(tokens))


def response_index(prompt_lens: Tensor, response_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and response indices of all draftable positions, `[M]` each: every response token but the first."""
    counts = (response_lens - 1).clamp(min=0)
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    starts = torch.cumsum(counts, 0) - counts
    positions = torch.arange(len(rows), device=counts.device) - starts[rows] + 1
    return rows, positions


def draft_logits_at(
    model: KangarooModel, tokens: Tensor, prompt_lens: Tensor, rows: Tensor, positions: Tensor
) -> Drafts:
    """One parallel shallow pass: the draft's logits for chosen response tokens, with gradients if enabled.

    Args:
        model: drafts.
        tokens: `[B, T]`, prompts and responses.
        prompt_lens: `[B]`.
        rows, positions: `[N]`, which response tokens to draft.

    Returns:
        Logits `[N, V']`, float32, and exit states `[N, D]`.
    """
    exit_hidden = model.base_model.forward_shallow(tokens)
    states = model.drafter_states(exit_hidden)
    before = prompt_lens[rows] + positions - 1
    return model.head_logits(states[rows, before]), exit_hidden[rows, before]


@torch.no_grad()
def draft_rollout(model: KangarooModel, rollout: Rollout) -> Drafts:
    """The draft behind the verified text, for all response tokens but the first, in one pass."""
    rows, positions = response_index(rollout.prompt_lens, rollout.response_lens)
    return draft_logits_at(model, rollout.tokens, rollout.prompt_lens, rows, positions)


@torch.no_grad()
def score_drafts(
    model: KangarooModel, rollout: Rollout, drafts: Drafts, settings: DecodeConfig, noise: Tensor | None = None
) -> Judgement:
    """Choose a draft at each position, and score the drafts by the block rule.

    Args:
        model: maps the exit head's rows to token ids.
        rollout: the verifier's greedy responses.
        drafts: what `draft_rollout` made of them.
        settings: draft_len, threshold and the draft's temperature.
        noise: uniform `[B, R]`, one number a response position, for sampled drafts.
    """
    rows, positions = response_index(rollout.prompt_lens, rollout.response_lens)
    logits, exit_hidden = drafts
    drawn = None if noise is None else noise[rows, positions]
    index, confidence = choose_tokens(logits, settings.draft_temperature, drawn)
    drafted = model.token_ids(index)
    own = rollout.tokens[rows, rollout.prompt_lens[rows] + positions]
    agrees, sure = (drafted == own).tolist(), confidence.tolist()
    blocks: list[list[Block]] = []
    scored: list[int] = []
    offset = 0
    for length in rollout.response_lens.tolist():
        stop = offset + max(length - 1, 0)
        row_blocks = replay_blocks(agrees[offset:stop], sure[offset:stop], settings, rollout.max_new_tokens)
        scored += [offset + block.start - 1 + i for block in row_blocks for i in range(block.num_drafted)]
        blocks.append(row_blocks)
        offset = stop
    keep = torch.tensor(scored, dtype=torch.long, device=rows.device)
    records = Records(
        hidden=exit_hidden[keep],
        token=drafted[keep],
        reward=(drafted == own)[keep].float(),
        verifier_confidence=rollout.verifier_confidence[rows[keep], positions[keep]],
        verifier_token=own[keep],
        row=rows[keep],
        position=positions[keep],
    )
    return Judgement(records, blocks)


def judge(model: KangarooModel, rollout: Rollout, settings: DecodeConfig, noise: Tensor | None = None) -> Judgement:
    """What drafting by these settings does on a rollout; arguments as in `score_drafts`."""
    return score_drafts(model, rollout, draft_rollout(model, rollout), settings, noise)
