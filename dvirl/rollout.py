"""Rollouts: the verifier's greedy text for a batch of prompts, and the draft's decisions on it in one pass.

In greedy decoding every scored draft follows verified text. So the drafts of a whole response come out of one parallel
shallow pass over that text, and replaying the block rule over them gives exactly the records that `spec_decode_step`
gives one block at a time (`tests/test_rollout.py` holds the two equal).

Letters in shapes: B prompts, P prompt positions, R response positions, N records, V' draft vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dvirl.models.placement import fitting
from dvirl.runs.errors import DvirlError
from kangaroo.adapter import LlamaRotaryEmbedding
from kangaroo.decoding.blocks import DecodeConfig, DraftBlock, Verification
from kangaroo.decoding.generate import PlainAnswers, PlainBatch, Sampler, decode_plainly
from kangaroo.decoding.layers import on_own_cpu_kernels
from kangaroo.decoding.passes import CudaGraphs
from kangaroo.decoding.sampling import choose_tokens
from kangaroo.decoding.stages import Stages
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel

MOST_ROWS = 512
"""Texts of a batch up to which our own kernels decode faster than the library's."""
CAPACITY_STEP = 64
"""On a GPU caches have a multiple of so many slots, for which products are fastest."""

Rows = TypeVar("Rows", bound="Responses")
Answer = Callable[[list[list[int]]], "Rollout"]
"""Responses for a batch of prompts."""


@dataclass(frozen=True)
class Responses:
    """Prompts with their responses.

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

    @property
    def lengths(self) -> Tensor:
        """Tokens `[B]` of each row without its padding."""
        return self.prompt_lens + self.response_lens

    def draft_places(self) -> tuple[Tensor, Tensor]:
        """Where drafts are made: rows and columns `[M]` of the token before every response token but the first."""
        rows, positions = response_index(self.response_lens)
        return rows, self.prompt_lens[rows] + positions - 1

    def response_tokens(self) -> Tensor:
        """All response tokens, `[num_tokens]`."""
        # A response is what lies between its prompt and the padding.
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        starts = self.prompt_lens[:, None]
        return self.tokens[(positions >= starts) & (positions < self.lengths[:, None])]

    def take(self, rows: Tensor | slice) -> Responses:
        """Some rows, cut to their longest."""
        prompt_lens = self.prompt_lens[rows]
        response_lens = self.response_lens[rows]
        width = int((prompt_lens + response_lens).max()) if len(prompt_lens) else 0
        return Responses(self.tokens[rows, :width], prompt_lens, response_lens)

    def stored(self) -> Responses:
        """The same without anything else, on the CPU, tokens as int32."""
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

    def groups(self, size: int) -> Iterator[Rollout]:
        """`size` rows at a time, cut to their longest."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            taken = self.take(rows)
            longest = int(taken.response_lens.max())
            yield replace(
                self,
                **vars(taken),
                verifier_hidden=self.verifier_hidden[rows, :longest],
                verifier_confidence=self.verifier_confidence[rows, :longest],
            )

    def prompts(self) -> list[list[int]]:
        """The prompts' tokens."""
        return [self.tokens[row, : int(length)].tolist() for row, length in enumerate(self.prompt_lens)]

    def responses(self) -> list[list[int]]:
        """All responses' tokens, without padding."""
        spans = zip(self.tokens.tolist(), self.prompt_lens.tolist(), self.response_lens.tolist(), strict=True)
        return [tokens[start : start + length] for tokens, start, length in spans]


def join(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in order, padded to the longest."""
    joined: dict[str, Any] = {}
    for name, value in vars(parts[0]).items():
        if isinstance(value, Tensor):
            rows = [row for part in parts for row in getattr(part, name)]
            joined[name] = pad_sequence(rows, batch_first=True) if value.ndim > 1 else torch.stack(rows)
    return replace(parts[0], **joined)


@dataclass(frozen=True)
class Drafts:
    """The draft policy at N positions, before anything is chosen.

    Attributes:
        logits: `[N, V']`, float32, for the first, second, … draft of a block; one for all without feedback.
        exit_hidden: `[N, D]`, exit states.
    """

    logits: list[Tensor]
    exit_hidden: Tensor


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
        depth: `[N]`, the draft's place in its block, from 0.
    """

    hidden: Tensor
    token: Tensor
    reward: Tensor
    verifier_confidence: Tensor
    verifier_token: Tensor
    row: Tensor
    position: Tensor
    depth: Tensor

    def __len__(self) -> int:
        return len(self.token)

    @property
    def num_accepted(self) -> int:
        """Accepted drafts."""
        return int(self.reward.sum())

    def accepted(self) -> Records:
        """The accepted drafts alone."""
        chosen = self.reward > 0
        return Records(**{name: values[chosen] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Judgement:
    """What drafting does on a rollout: the records, and each row's blocks after the prefill's."""

    records: Records
    blocks: list[list[Verification]]


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
    """The verifier's own responses, all prompts in one batch if the free memory holds it, else in several.

    Args:
        model: lora_S is left out if `target` is "base"; lora_D counts.
        prompts: token ids, none empty.
        max_new_tokens: length limit, at least 1.
        eos_ids: tokens that end a response.
        target: "base" or "adapted".
        sampler: picks tokens; None for greedy.
        keep_states: keep `verifier_hidden` and `verifier_confidence`; without, they are empty and zero.

    Raises:
        ValueError: for an empty prompt or a limit below 1.
        DvirlError: if the model's logits are not finite, or not even one prompt fits into the free memory.
    """
    if max_new_tokens < 1 or not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            f"there are {len(prompts)} prompts, and max_new_tokens is {max_new_tokens}; "
            "expected at least one prompt, none empty, and at least one token"
        )
    device = model.lm_head.weight.device
    tokens = pad_sequence([torch.tensor(list(prompt)) for prompt in prompts], batch_first=True).to(device)
    prompt_lens = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ends = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    with model.merged():
        capacity = tokens.shape[1] + max_new_tokens
        layers = model.model.layers
        size = fitting("prompts", len(prompts), model, layers, capacity, model.config.vocab_size)
        if size < len(prompts):
            batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
            settings = (max_new_tokens, eos_ids, target, sampler, keep_states)
            return join([generate(model, batch, *settings) for batch in batches])
        batch = PlainBatch(_stages(model, capacity, target, len(tokens)), tokens, prompt_lens)
        answers = decode_plainly(batch, max_new_tokens, ends, sampler, keep_states)
    return _rollout(tokens, prompt_lens, answers, ends, keep_states)


def _stages(model: EarlyExitLlamaForCausalLM, capacity: int, target: str, rows: int) -> Stages:
    """Stages for a large batch; its steps are captured where they can be."""
    captured = model.can_be_captured
    few_rows = rows <= MOST_ROWS and (captured or on_own_cpu_kernels(model.device, model.dtype))
    if captured:
        capacity = CAPACITY_STEP * math.ceil(capacity / CAPACITY_STEP)
    stages = model.new_stages(capacity, None, target, rows, few_rows=few_rows)
    if captured:
        stages.passes.graphs = CudaGraphs([])
    return stages


def _rollout(
    tokens: Tensor, prompt_lens: Tensor, answers: PlainAnswers, ends: Tensor, keep_states: bool
) -> Rollout:
    """Put answers right after their prompts `tokens [B, P]`, and clear what follows their ends."""
    max_new_tokens = answers.tokens.shape[1]
    ended = torch.isin(answers.tokens, ends)
    response_lens = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, max_new_tokens)
    inside = in_response(response_lens)  # the rest is cleared
    longest = inside.shape[1]
    confidence = answers.confidence[:, :longest]
    broken = (inside & ~confidence.isfinite()).nonzero()
    if len(broken):
        row, position = broken[0].tolist()
        raise DvirlError(
            f"the verifier's logits for token {position} of its answer to prompt {row} are not finite"
        )
    tokens = F.pad(tokens, (0, int((prompt_lens + response_lens).max()) - tokens.shape[1]))
    rows, positions = inside.nonzero(as_tuple=True)
    tokens[rows, prompt_lens[rows] + positions] = answers.tokens[rows, positions]
    hidden = answers.hidden[:, :longest] * inside[:, :, None]
    return Rollout(
        tokens, prompt_lens, response_lens, hidden, confidence * (inside & keep_states), max_new_tokens
    )


def replay_blocks(
    accepted: Sequence[bool], confidence: Sequence[float], settings: DecodeConfig, max_new_tokens: int
) -> list[Verification]:
    """Walk the block rule over one response whose drafts do not depend on their place in a block.

    Args:
        accepted: for each response index but the first (the prefill's), whether the draft there is the text's token.
        confidence: the draft's, aligned with `accepted`.
        settings: draft_len and threshold.
        max_new_tokens: the length limit of the response.

    Returns:
        The blocks after the prefill, as the step-by-step decoder commits them, but without tensors, of tokens 0, and
        with `start` counted from the response's first token.
    """
    response = [0] * (len(accepted) + 1)
    return replay_depths([accepted], [confidence], settings, max_new_tokens, response, 0)


def replay_depths(
    accepted: Sequence[Sequence[bool]],
    confidence: Sequence[Sequence[float]],
    settings: DecodeConfig,
    max_new_tokens: int,
    response: Sequence[int],
    prompt_len: int,
) -> list[Verification]:
    """The same with a table for the first, second, … draft of a block; deeper drafts take the last one.

    The blocks commit the tokens of the response, and `start` counts the prompt.
    """
    length = len(response)
    start = 1
    blocks: list[Verification] = []
    while start < length:
        # One token of the limit is left to the verifier, and nothing after an end of sequence is scored.
        most = min(settings.draft_len, max_new_tokens - start - 1, length - start)
        num_drafted = 0
        num_accepted = 0
        while num_drafted < most:
            index = start + num_drafted - 1
            depth = min(num_drafted, len(accepted) - 1)
            num_drafted += 1
            is_accepted = accepted[depth][index]
            num_accepted += is_accepted
            if not is_accepted or confidence[depth][index] < settings.threshold:
                break
        committed = tuple(response[start : start + num_accepted + 1])
        blocks.append(Verification(prompt_len + start, committed, num_drafted, num_accepted))
        start += len(committed)
    return blocks


@torch.no_grad()
def verifier_states(
    base: EarlyExitLlamaForCausalLM, tokens: Tensor, without: Sequence[str], middle_layer: int = 0
) -> Tensor:
    """The deep layers' normed states on tokens `[B, T]`, some adapters left out, in one pass; see `forward_deep`."""
    with base.without_adapters(*without):
        return base.forward_deep(base.forward_shallow(tokens), middle_layer=middle_layer)


def in_response(response_lens: Tensor) -> Tensor:
    """Which of the positions of the longest response each row has, boolean `[B, R]`."""
    return torch.arange(int(response_lens.max()), device=response_lens.device) < response_lens[:, None]


def response_index(response_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and response indices of all draftable positions, `[M]` each: every response token but the first."""
    rows, columns = in_response(response_lens)[:, 1:].nonzero(as_tuple=True)
    return rows, columns + 1


def draft_logits_at(
    model: KangarooModel,
    tokens: Tensor,
    prompt_lens: Tensor,
    rows: Tensor,
    positions: Tensor,
    depths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One parallel shallow pass: the draft's logits for chosen response tokens, with gradients if enabled.

    Args:
        model: drafts.
        tokens: `[B, T]`, prompts and responses.
        prompt_lens: `[B]`.
        rows, positions: `[N]`, which response tokens to draft.
        depths: `[N]`, each draft's place in its block, from 0, which counts with feedback; by default all are first.

    Returns:
        Logits `[N, V']`, float32, and exit states `[N, D]`.
    """
    count = 1 if depths is None or not len(depths) else int(depths.max()) + 1
    states, exit_hidden = _drafter_states(model, tokens, count)
    # The token at a position is drafted from the state of the position before.
    before = prompt_lens[rows] + positions - 1
    chosen = states[0][rows, before]
    if depths is not None and len(states) > 1:
        chosen = torch.stack(states)[depths, rows, before]
    return model.head_logits(chosen), exit_hidden[rows, before]


def refuse_stretched(rotary: LlamaRotaryEmbedding, length: int) -> None:
    """Refuse texts of so many tokens if one pass over all of a text does not see what decoding saw.

    Raises:
        DvirlError: for dynamic positions beyond the context of training, where a token's angles depend on how long the
            text was when it came.
    """
    if rotary.stretches([length]):
        raise DvirlError(
            f"texts have up to {length} tokens; expected at most {rotary.trained_context}, the context of training: "
            "beyond it dynamic positions differ between decoding and a pass over a whole text"
        )


def _drafter_states(model: KangarooModel, tokens: Tensor, depths: int) -> tuple[list[Tensor], Tensor]:
    """What the exit head reads after every token `[B, T]`, by depth, and the exit states; `[B, T, D]` each.

    One pass gives the draft after every position, since each stands on verified text.
    """
    for rotary in (model.base_model.rotary, model.adapter_model.rotary):
        refuse_stretched(rotary, tokens.shape[1])
    exit_hidden = model.base_model.forward_shallow(tokens)
    verifier_hidden = exit_hidden
    if model.feedback:
        verifier_hidden = verifier_states(model.base_model, tokens, ["lora_S"], model.middle_layer)
    return model.drafter_depths(tokens, exit_hidden, verifier_hidden, depths), exit_hidden


@torch.no_grad()
def draft_rollout(model: KangarooModel, rollout: Responses, draft_len: int) -> Drafts:
    """The draft along the verified text, for all response tokens but the first, in one pass.

    Args:
        model: drafts.
        rollout: the verifier's greedy responses.
        draft_len: drafts of a block, at most.
    """
    rows, before = rollout.draft_places()
    states, exit_hidden = _drafter_states(model, rollout.tokens, max(1, draft_len))
    logits = [model.head_logits(state[rows, before]) for state in states]
    return Drafts(logits, exit_hidden[rows, before])


@torch.no_grad()
def score_drafts(
    model: KangarooModel,
    rollout: Rollout,
    drafts: Drafts,
    settings: DecodeConfig,
    noise: Tensor | None = None,
) -> Judgement:
    """Choose a draft at each position, and score the drafts by the block rule.

    Args:
        model: maps the exit head's rows to token ids.
        rollout: the verifier's greedy responses.
        drafts: what `draft_rollout` made of them.
        settings: draft_len, threshold and the draft's temperature.
        noise: uniform `[B, R]`, one number a response position, for sampled drafts.
    """
    rows, positions = response_index(rollout.response_lens)
    # 1) Choose a draft at each position, for every depth of a block.
    drawn = None if noise is None else noise[rows, positions]
    chosen = [choose_tokens(logits, settings.draft_temperature, drawn) for logits in drafts.logits]
    rows_of_head, confidence = (torch.stack(values) for values in zip(*chosen, strict=True))
    drafted = model.token_ids(rows_of_head)  # [depths, N]
    verified = rollout.tokens[rows, rollout.prompt_lens[rows] + positions]
    # 2) Score them by the block rule, as the step-by-step decoder would.
    agrees = drafted == verified
    blocks, (scored, depth) = _replay_rows(rollout, agrees, confidence, settings)
    table = depth.clamp(max=len(drafted) - 1)
    # 3) Keep the scored ones.
    row = rows[scored]
    position = positions[scored]
    hidden = drafts.exit_hidden[scored]
    if model.recurrent:  # later drafts stand on embeddings
        before = rollout.tokens[row, rollout.prompt_lens[row] + position - 1]
        hidden = torch.where((depth > 0)[:, None], model.base_model.model.embed_tokens(before), hidden)
    records = Records(
        hidden=hidden,
        token=drafted[table, scored],
        reward=agrees[table, scored].float(),
        verifier_confidence=rollout.verifier_confidence[row, position],
        verifier_token=verified[scored],
        row=row,
        position=position,
        depth=depth,
    )
    return Judgement(records, blocks)


def _replay_rows(
    rollout: Rollout, agrees: Tensor, confidence: Tensor, settings: DecodeConfig
) -> tuple[list[list[Verification]], Tensor]:
    """The blocks of every row; and of N scored drafts their indices among all draftable positions and depths, `[2, N]`.

    `agrees` and `confidence`, `[depths, M]`, are those of all draftable positions.
    """
    verdicts = agrees.tolist()
    chances = confidence.tolist()
    blocks: list[list[Verification]] = []
    scored: list[tuple[int, int]] = []
    offset = 0
    for response, prompt_len in zip(rollout.responses(), rollout.prompt_lens.tolist(), strict=True):
        own = slice(offset, offset + len(response) - 1)
        row = ([table[own] for table in verdicts], [table[own] for table in chances])
        blocks.append(replay_depths(*row, settings, rollout.max_new_tokens, response, prompt_len))
        for block in blocks[-1]:
            first = offset + block.start - prompt_len - 1
            scored += [(first + depth, depth) for depth in range(block.num_drafted)]
        offset = own.stop
    return blocks, torch.tensor(scored, dtype=torch.long, device=agrees.device).view(-1, 2).T


def decoded_rollout(prompt: Sequence[int], blocks: Sequence[Verification], max_new_tokens: int) -> Rollout:
    """One response that was decoded step by step, as a batch of one.

    Args:
        prompt: token ids.
        blocks: those of the response, the prefill's first, decoded with `DecodeConfig.keep_states`.
        max_new_tokens: the length limit of the response.
    """
    hidden = torch.cat([block.verifier_hidden[: block.block_len] for block in blocks])
    confidence = torch.cat([block.verifier_confidence[: block.block_len] for block in blocks])
    committed = [token for block in blocks for token in block.committed]
    return Rollout(
        tokens=torch.tensor([[*prompt, *committed]], device=hidden.device),
        prompt_lens=torch.tensor([len(prompt)], device=hidden.device),
        response_lens=torch.tensor([len(committed)], device=hidden.device),
        verifier_hidden=hidden[None],
        verifier_confidence=confidence.to(hidden.device)[None],
        max_new_tokens=max_new_tokens,
    )


def decoded_records(rollout: Rollout, blocks: Sequence[Verification], head_states: bool = False) -> Records:
    """The records of the learned drafts of a response that was decoded step by step, without a pass of any layer.

    They are those of `judge` if all drafts were learned ones; a token that was looked up leaves none.

    Args:
        rollout: see `decoded_rollout`.
        blocks: those that it was made of.
        head_states: keep as `hidden` what the exit head read when it drafted, in place of the exit states.
    """
    device = rollout.tokens.device
    prompt_len = int(rollout.prompt_lens)
    tokens = [DraftBlock().tokens]
    states = [rollout.verifier_hidden[0, :0]]
    places: list[tuple[int, int, bool]] = []
    for block in blocks:
        # Of several chains each follows verified text up to its first reject; the main one may have lost.
        chain = block.main_chain
        draft = chain.draft
        scored = min(chain.num_drafted, draft.num_learned, block.block_len)
        start = block.start - prompt_len
        tokens.append(draft.tokens[:scored])
        hidden = draft.drafter_hidden if head_states else draft.exit_hidden
        states.append(hidden[:scored].to(device))
        places += [(start + depth, depth, depth < chain.num_accepted) for depth in range(scored)]
    position, depth, accepted = torch.tensor(places, dtype=torch.long, device=device).view(-1, 3).T
    return Records(
        hidden=torch.cat(states),
        token=torch.cat(tokens).to(device),
        reward=accepted.float(),
        verifier_confidence=rollout.verifier_confidence[0, position],
        verifier_token=rollout.tokens[0, prompt_len + position],
        row=torch.zeros_like(position),
        position=position,
        depth=depth,
    )


def judge(
    model: KangarooModel, rollout: Rollout, settings: DecodeConfig, noise: Tensor | None = None
) -> Judgement:
    """What drafting by these settings does on a rollout; arguments as in `score_drafts`."""
    drafts = draft_rollout(model, rollout, settings.draft_len)
    return score_drafts(model, rollout, drafts, settings, noise)
