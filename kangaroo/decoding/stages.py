"""The four stages of self-speculative decoding. Each owns its layers, its norm, its head and its cache.

    shallow   layers[:k], lora_S on        tokens      -> exit states
    drafter   drafter, exit norm and head  exit states -> draft logits
    base      layers[:k], lora_S off       tokens      -> exit states  (is `shallow` with target "adapted")
    deep      layers[k:], norm and head    exit states -> verifier logits

Where a whole model drafts, its embedding stands for `shallow`, and its layers, norm and head for `drafter`.

Shapes: B texts, T new tokens, V vocabulary, V' draft vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig

from kangaroo.adapter import LlamaRotaryEmbedding
from kangaroo.decoding.blocks import NO_STATES, DecodeConfig, Verification
from kangaroo.decoding.cache import FixedShape, KVCache, plan_cached, steps
from kangaroo.decoding.feedback import Feedback
from kangaroo.decoding.layers import CachedLayer, Fuse, Middle, Norm, Product
from kangaroo.decoding.passes import Outputs, Passes
from kangaroo.decoding.sampling import Drawn, choose_tokens

Result = TypeVar("Result")


@dataclass
class StageWeights:
    """What a stage computes with; kept between decodings for as long as the weights are the same.

    Attributes:
        layers: its decoder layers.
        embed: token ids to states, for stages that begin with tokens.
        norm: after the layers.
        head: from normed states to logits.
        head_weight: `[V, D]`, its weight, in the dtype of the model's weights.
        fuse: from exit states and the verifier's states of the positions before to what the first layer reads; None for
            a stage without feedback.
        fuse_later: the same for later drafts of a block, from tokens; None where these read exit states, too.
        middle: what it reads of the verifier besides the last states; None for nothing.
    """

    layers: list[CachedLayer]
    embed: Callable[[Tensor], Tensor] | None = None
    norm: Norm | None = None
    head: Product | None = None
    head_weight: Tensor | None = None
    fuse: Fuse | None = None
    fuse_later: Fuse | None = None
    middle: Middle | None = None

    @property
    def fused(self) -> bool:
        """Whether our own kernels on CUDA compute it."""
        return bool(self.layers) and all(layer.kernels for layer in self.layers)


@dataclass(frozen=True)
class DrafterParts:
    """What a draft model gives for the stage that drafts.

    Attributes:
        weights: drafter layers, exit norm and exit head.
        rotary: the drafter's positions.
        config: for the shape of its cache.
        window: how many positions back its attention sees; None for all.
        draft_ids: `[V']`, vocabulary ids of the exit head's rows; None if it has them all.
        shallow: what reads the tokens first where a whole model drafts: its embedding; None for the shallow layers.
    """

    weights: StageWeights
    rotary: LlamaRotaryEmbedding
    config: LlamaConfig
    window: int | None = None
    draft_ids: Tensor | None = None
    shallow: StageWeights | None = None


class Stage:
    """Some layers with the keys and values that they have seen.

    Args:
        weights: what it computes with.
        rotary: its positions.
        cache: its keys and values.
        passes: how passes run.

    Attributes:
        kept_after: number of its layers after which the last pass leaves its states in `kept [B, T, D]`; 0 for none.
    """

    kept_after = 0
    kept: Tensor

    def __init__(
        self, weights: StageWeights, rotary: LlamaRotaryEmbedding, cache: KVCache, passes: Passes
    ) -> None:
        self.weights = weights
        self.rotary = rotary
        self.cache = cache
        self.passes = passes
        self._table: tuple[Tensor, Tensor] | None = None
        # Tables that captured passes by a library read: a longer text replaces them.
        self._angles: list[Tensor] = []

    def __call__(self, inputs: Tensor, feedback: Tensor | None = None, later: bool = False) -> Tensor:
        """Run the layers on new tokens `[B, T]` or states `[B, T, D]`, and append these to the cache.

        Args:
            inputs: the tokens or states.
            feedback: `[B, T, D]`, states of the positions before, for a stage that reads them.
            later: whether the inputs are drafts of this block, see `fuse_later`.

        Returns:
            States `[B, T, D]`, normed if the stage has a norm.
        """
        states = inputs if self.weights.embed is None else self.weights.embed(inputs)
        fuse = self.weights.fuse_later if later else self.weights.fuse
        if fuse is not None and feedback is not None:
            states = self._mapped(fuse, inputs, feedback)
        states = states.to(self.cache.dtype)
        length = states.shape[1]
        if self.passes.fixed and self._by_own_kernels:
            states = self._run_fused(states, self.passes.fixed)
        elif self.weights.layers:
            passes = self.passes
            plan = plan_cached(
                self.rotary, self.cache, length, states.dtype, passes.fixed, passes.prompt_lens
            )
            if self.passes.graphs and id(self.rotary.cos_cached) not in map(id, self._angles):
                self._angles += [self.rotary.cos_cached, self.rotary.sin_cached]
            for index, layer in enumerate(self.weights.layers):
                plan = plan.on(layer.device)
                states = layer(states.to(layer.device), plan, self.cache, index)
                if index + 1 == self.kept_after:
                    self.kept = states.to(self.passes.device)
            states = states.to(self.passes.device)
        self.cache.advance(length)
        return self._normed(states)

    @property
    def _by_own_kernels(self) -> bool:
        """Whether our own kernels on CUDA compute the pass that is running."""
        return self.passes.fixed is not None and self.weights.fused

    def _mapped(self, fuse: Fuse, inputs: Tensor, feedback: Tensor) -> Tensor:
        """Tokens `[B, T]` or states `[B, T, D]` and the states beside them, as one."""
        if not self._by_own_kernels or fuse.maps is None:
            return fuse(inputs, feedback)
        from kangaroo.decoding.kernels import two_maps

        tokens = None
        states = fuse.embeddings
        if states is None:
            states = inputs.flatten(0, 1)
        else:  # the kernel looks the embeddings up
            tokens = inputs.flatten()
        mapped = two_maps(states, tokens, feedback.flatten(0, 1), fuse.maps)
        return mapped.view(feedback.shape)

    def _normed(self, states: Tensor) -> Tensor:
        norm = self.weights.norm
        if norm is None:
            return states
        if not (self._by_own_kernels and norm.eps):
            return norm(states)
        from kangaroo.decoding.kernels import normed

        return normed(states, norm.weight, norm.eps)

    def _run_fused(self, states: Tensor, fixed: FixedShape) -> Tensor:
        """The same by our own kernels, for a pass of fixed shape."""
        from kangaroo.decoding.kernels import plan_fused

        layers = [layer.kernels for layer in self.weights.layers if layer.kernels]
        if self._table is None:  # kept, since captured passes read it
            self._table = self.rotary.table(self.cache.capacity, states.device)
        plan = plan_fused(self._table, self.cache, states, fixed, layers[0].heads)
        hidden = states.flatten(0, 1)
        for index, layer in enumerate(layers):
            hidden = layer(hidden, plan, self.cache.keys[index], self.cache.values[index])
            if index + 1 == self.kept_after:
                self.kept = hidden.view(states.shape)
        return hidden.view(states.shape)

    def best(
        self, states: Tensor, two: bool = False, ids: Tensor | None = None, drawn: Drawn | None = None
    ) -> tuple[Tensor, Tensor]:
        """The token that is chosen after each normed state `[…, D]`, and a probability in float32.

        Args:
            states: normed states.
            two: find the runners-up, too.
            ids: `[V']`, what the head's rows stand for; None for 0, 1, …
            drawn: how tokens are sampled; None for the likeliest.

        Returns:
            Tokens `[1, …]`, or `[2, …]` with the runners-up; probabilities `[…]` at temperature 1: a drafter's largest,
            the verifier's of its token.
        """
        weight = self.weights.head_weight
        is_cut = drawn is not None and drawn.how.is_cut
        if self._by_own_kernels and weight is not None and not is_cut:
            from kangaroo.decoding.kernels import best_tokens

            rows = states.flatten(0, -2).contiguous()
            tokens, confidence = best_tokens(rows, weight, two, ids, drawn)
            shape = states.shape[:-1]
            return tokens.view(-1, *shape), confidence.view(shape)
        logits = self.logits(states).float()
        probabilities = logits.softmax(dim=-1)
        scores = probabilities if drawn is None else drawn.how.perturbed(logits, drawn.keys, ids)
        first = scores.argmax(dim=-1)
        confidence = probabilities.gather(-1, first[..., None]).squeeze(-1)
        if drawn and drawn.is_draft:
            confidence = probabilities.amax(dim=-1)
        tokens = first[None]
        if two:
            left, others = (each.scatter(-1, first[..., None], -math.inf) for each in (scores, probabilities))
            # Where a cut leaves one token, the runner-up is the likeliest of the others.
            is_left = left.amax(dim=-1) > -math.inf
            second = torch.where(is_left, left.argmax(dim=-1), others.argmax(dim=-1))
            tokens = torch.stack([first, second])
        if ids is not None:
            tokens = ids[tokens]
        return tokens, confidence

    def logits(self, states: Tensor) -> Tensor:
        """Logits of normed states `[…, D]`: `[…, V']` for the drafter, `[…, V]` for the deep layers."""
        weight = self.weights.head_weight
        if self._by_own_kernels and weight is not None:
            from kangaroo.decoding.kernels import head_logits

            return head_logits(states.flatten(0, -2).contiguous(), weight).view(*states.shape[:-1], -1)
        assert self.weights.head is not None
        return self.weights.head(states)


@dataclass(frozen=True)
class Drafted:
    """The next n tokens of each chain, drafted in one go; the host waits for them when it first looks at them.

    The rows are those of the caches: the main chains of all texts, then their first branches, and so on.

    Attributes:
        chosen: their ids and confidences, `packed`, `[2, rows, n]`.
        exit_hidden: `[rows, n, D]`, the exit state that each draft was made from.
        drafter_hidden: `[rows, n, D]`, the drafter's normed state that each draft was chosen from.
        states: `[rows, T, D]` for each draft, the exit states of every token read for it; only for target "adapted".
    """

    chosen: Tensor
    exit_hidden: Tensor
    drafter_hidden: Tensor
    states: list[Tensor]

    @cached_property
    def by_row(self) -> list[list[tuple[int, float]]]:
        """`rows x n` vocabulary ids, each with its confidence."""
        rows = []
        for tokens, confidence in zip(*unpacked(self.chosen), strict=True):
            rows.append(list(zip(tokens, confidence, strict=True)))
        return rows


Choose = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From states `[rows, D]` and the place of a draft among those in one go to each row's draft and its confidence."""


@dataclass(frozen=True)
class DraftedToken:
    """The next draft of each row, on the device.

    Attributes:
        ids: `[rows]`.
        confidence: `[rows]`, see `DraftBlock`.
        made_from: `[rows, D]`, the exit state; or `[rows]`, the token before, where a recurrent drafter reads that.
        drafter_hidden: `[rows, D]`, the drafter's normed state.
        read: `[rows, T, D]`, the exit states of all tokens read for it.
    """

    ids: Tensor
    confidence: Tensor
    made_from: Tensor
    drafter_hidden: Tensor
    read: Tensor


class Chain:
    """The next n drafts of each row, on the device.

    Args:
        embed: tokens to states.

    Attributes:
        drafts: the first, the second and so on, of every row.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor]) -> None:
        self._embed = embed
        self.drafts: list[DraftedToken] = []

    @property
    def tokens(self) -> Tensor:
        """Ids `[rows, n]`."""
        return torch.stack([draft.ids for draft in self.drafts], dim=1)

    @property
    def confidence(self) -> Tensor:
        """The drafts' confidence, `[rows, n]`."""
        return torch.stack([draft.confidence for draft in self.drafts], dim=1)

    @property
    def exit_states(self) -> Tensor:
        """What the drafts were made from, `[rows, n, D]`; a token stands for its embedding."""
        inputs = [draft.made_from for draft in self.drafts]
        states = [each[:, None] for each in inputs if each.dim() > 1]
        tokens = [each for each in inputs if each.dim() == 1]
        if tokens:  # all later drafts of the block
            later = torch.stack(tokens, dim=1)
            states.append(self._embed(later))
        return torch.cat(states, dim=1)


@dataclass(frozen=True)
class Verified:
    """What the verifier says after the last committed token and after each draft.

    The rows are those of the caches: the B texts' main chains, then the next chain of each, and so on.

    Attributes:
        tokens: `rows x (n + 1)` vocabulary ids, its own.
        confidence: `rows x (n + 1)`, its probability of them, at temperature 1.
        states: `[rows, n + 1, D]`, the normed states; `[rows, n + 1, 0]` if they are not kept.
        texts: B.
    """

    tokens: list[list[int]]
    confidence: list[list[float]]
    states: Tensor
    texts: int


def packed(tokens: Tensor, confidence: Tensor) -> Tensor:
    """Token ids and their probabilities as one tensor, `[2, …]` float64: one transfer to the host instead of two."""
    return torch.stack([tokens.double(), confidence.double()])


def unpacked(chosen: Tensor) -> tuple[Any, Any]:
    """Token ids and their probabilities on the host, as nested lists."""
    tokens, confidence = chosen.cpu()
    return tokens.long().tolist(), confidence.tolist()


@dataclass
class Stages:
    """The stages of one decoding of B texts.

    Attributes:
        shallow, drafter, base, deep: see the module.
        passes: how their passes run.
        hidden_size: D.
        draft_ids: `[V']`, vocabulary ids of the exit head's rows; None if it has them all.
        feedback: what the drafter reads of the verifier's states, if it does.
        keep_states: whether verifications give the verifier's states.
    """

    shallow: Stage
    drafter: Stage
    base: Stage
    deep: Stage
    passes: Passes
    hidden_size: int
    draft_ids: Tensor | None = None
    feedback: Feedback | None = None
    keep_states: bool = False
    # What blocks that run ahead of the host read and write.
    ahead: dict[Hashable, Any] = field(default_factory=dict)
    # The outputs of a verification that the host has not looked at.
    _under_way: tuple[Tensor, ...] | None = None
    # Of each text, the tokens that the verifier had read before its last pass.
    _read_before: list[int] = field(default_factory=list)
    # By stage, for prompts of a batch that are read one by one.
    one_row: dict[Stage, KVCache] = field(default_factory=dict)
    # For a drafter with feedback: the states of the last verification, and the drafter's of the last drafts.
    _verifier_hidden: Tensor = NO_STATES
    _drafter_hidden: Tensor = NO_STATES

    def __post_init__(self) -> None:
        middle = self.drafter.weights.middle
        if middle is not None:
            self.deep.kept_after = middle.layer - len(self.base.weights.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights, and so of the states that others than stages see."""
        assert self.deep.weights.head_weight is not None
        return self.deep.weights.head_weight.dtype

    def caches(self) -> list[KVCache]:
        """Every cache once."""
        stages = [self.shallow, self.drafter, self.deep]
        if self.base is not self.shallow:
            stages.append(self.base)
        return [stage.cache for stage in stages]

    @property
    def recurrent(self) -> bool:
        """Whether the shallow layers run for the first draft of a block only."""
        return self.drafter.weights.fuse_later is not None

    def drafting_stages(self, depth: int) -> list[Stage]:
        """What makes a draft after `depth` others of its block, the first stage first."""
        if depth and self.recurrent:
            return [self.drafter]
        return [self.shallow, self.drafter]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the keys and values of every token from `lengths` on, text by text."""
        for cache in self.caches():
            cache.truncate(lengths)

    def roll_back(self, results: Sequence[Verification | None]) -> None:
        """Forget the keys and values of all rejected drafts, and everything of texts that are over."""
        # What the verifier goes on with: of each text the winning chain, up to its last accepted draft.
        verified = [result.start + result.num_accepted if result else 0 for result in results]
        winners = [result.draft.chain if result else 0 for result in results]
        for stage in (self.base, self.deep):
            stage.cache.join(verified, winners)
        read = verified
        if self.feedback:  # it reads once more what it has read without the verifier's states
            read = [result.start if result else 0 for result in results]
            rows = [row + len(results) * chain for row, chain in enumerate(winners)]
            counts = []
            for length, before in zip(verified, self._read_before, strict=True):
                counts.append(max(0, length - before))
            self.feedback.verified(self._verifier_hidden, rows, counts)
        if self.shallow is self.base:
            self.drafter.cache.truncate(read)
            return
        for stage in (self.shallow, self.drafter):
            stage.cache.join(read, winners)

    def keep(self, rows: list[int]) -> None:
        """Drop all texts but these."""
        for cache in self.caches():
            cache.keep(rows)
        if self.feedback:
            self.feedback.keep(rows)

    def reset(self) -> None:
        """Forget everything."""
        for cache in self.caches():
            cache.clear()
        if self.feedback:
            self.feedback.clear(self.deep.cache.batch_size)
        self._under_way = None
        self.passes.begun = False

    def token_ids(self, rows: Tensor) -> Tensor:
        """Vocabulary ids of rows of the exit head."""
        if self.draft_ids is None:
            return rows
        return self.draft_ids[rows]

    def fed_back(self, hidden: Tensor) -> Tensor:
        """What the drafter reads of the verifier's pass that ended with normed states `[rows, T, D]`."""
        if not self.feedback:
            return hidden[..., :0]
        middle = self.drafter.weights.middle
        return hidden if middle is None else middle(self.deep.kept, hidden)

    def drafts_at_once(self, wanted: int) -> int:
        """Drafts to make in one go: one, after which the host looks; where passes are captured, all that are wanted."""
        if self.passes.graphs is None or not self.shallow.cache.length:
            return 1
        # What the verifier reads of the shallow layers comes from passes of one size if that is asked for.
        return 1 if self.passes.positions and self.shallow is self.base else wanted

    def begin_drafting(self, chains: int) -> None:
        """Begin blocks of some learned chains."""
        for stage in (self.shallow, self.drafter):
            stage.cache.fork(chains)

    def draft(
        self,
        unread: Sequence[Sequence[int]],
        config: DecodeConfig,
        noise: Sequence[Sequence[float]],
        depth: int,
    ) -> Drafted:
        """Let shallow layers and drafter read tokens, and draft the next n tokens of every chain.

        Of the drafts they read all but the last. The caches do not count these drafts before `count_drafts`.

        Args:
            unread: tokens of each row; none for a row that drafts nothing.
            config: how drafts are drawn.
            noise: `B x n`, for sampled drafts: of a sampled answer keys of their places, else numbers in [0, 1).
            depth: drafts of the block before these.
        """
        count = len(noise[0])
        texts = len(noise)
        adapted = config.target == "adapted"

        def run(tokens: Tensor, last: Tensor, noise: Tensor, *fed_back: Tensor) -> Outputs:
            feedback = fed_back[0] if fed_back else None
            choose = self.chooser(config, noise, depth)
            chain = self.chain(tokens, last, feedback, count, texts, depth, choose)
            chosen = packed(chain.tokens, chain.confidence)
            hidden = torch.stack([draft.drafter_hidden for draft in chain.drafts], dim=1)
            read = [draft.read for draft in chain.drafts] if adapted else []
            return chosen, chain.exit_states, hidden, *read

        counts = list(map(len, unread))
        tokens = self.passes.pad(unread)
        last = torch.tensor([max(0, count - 1) for count in counts])
        is_key = config.draft_sampling is not None
        numbers = torch.tensor(noise, dtype=torch.int64 if is_key else torch.float64)
        inputs = [tokens, last, numbers]
        if self.feedback:
            inputs.append(self.feedback.take(counts, tokens.shape[1]))
        caches = [stage.cache for stage in self.drafting_stages(depth)]
        sampled = (config.draft_temperature, config.temperature, config.top_k, config.top_p)
        name = ("draft", sampled, adapted, texts, depth)
        outputs = self.passes.run(name, run, caches, counts, *inputs, ahead=count - 1)
        # Copies: the verification, which may run before the host looks, can write over a captured pass's outputs.
        chosen, exit_hidden, self._drafter_hidden, *read = [each.clone() for each in outputs]
        return Drafted(chosen, exit_hidden.to(self.dtype), self._drafter_hidden.to(self.dtype), read)

    def chain(
        self,
        tokens: Tensor,
        last: Tensor,
        feedback: Tensor | None,
        count: int,
        texts: int,
        depth: int = 0,
        choose: Choose | None = None,
    ) -> Chain:
        """Within a pass: read tokens and draft the next ones, all on the device.

        Args:
            tokens: `[rows, T]`; where there are more rows than texts, those after the main chains are branches.
            last: `[rows]`, the place of each row's last token.
            feedback: `[rows, T, D]`, for a drafter that reads it.
            count: drafts n.
            texts: B.
            depth: drafts of the block before these.
            choose: from the drafter's states to drafts; by default their argmax.
        """
        assert self.shallow.weights.embed is not None
        chain = Chain(self.shallow.weights.embed)
        # Computed before the first draft: our kernels read these starts before they wait.
        following = []
        if self.passes.fixed and count > 1:
            following = self.passes.fixed.after(last + 1, count - 1)
        for step in range(count):
            later = self.recurrent and depth + step > 0
            states = tokens if later else self.shallow(tokens)  # [rows, T, D]
            hidden = self.drafter(states, feedback, later)
            place = (steps(len(tokens), tokens.device), last) if step == 0 else (slice(None), 0)
            own = hidden[place]  # [rows, D]
            if choose:
                ids, confidence = choose(own, step)
            else:
                ids, confidence = self._best(own, texts, depth + step)
            chain.drafts.append(DraftedToken(ids, confidence, states[place], own, states))
            if step + 1 < count:  # the next draft is made after this one
                self.passes.fixed = following[step] if following else None
                tokens = ids[:, None]
                feedback = own[:, None]
        return chain

    def _best(
        self, hidden: Tensor, texts: int, depth: int, drawn: Drawn | None = None
    ) -> tuple[Tensor, Tensor]:
        """The chosen token of each row; at this depth one branch leaves the main chain with the runner-up."""
        start = (depth + 1) * texts  # of the rows of that branch
        leaves = start < len(hidden)
        tokens, confidence = self.drafter.best(hidden, leaves, self.draft_ids, drawn)
        first = tokens[0]
        if not leaves:
            return first, confidence
        stop = start + texts
        second = tokens[1, start:stop]
        return torch.cat([first[:start], second, first[stop:]]), confidence

    def chooser(self, config: DecodeConfig, noise: Tensor, depth: int = 0) -> Choose | None:
        """What draws drafts by `noise [B, n]`, see `draft`; None for argmax drafts."""
        how = config.draft_sampling
        texts = len(noise)
        if how is None and not config.draft_temperature:
            return None
        by_step = noise.T.contiguous()

        def draw(hidden: Tensor, step: int) -> tuple[Tensor, Tensor]:
            if how is None:
                logits = self.drafter.logits(hidden).float()  # [B, V']
                rows, confidence = choose_tokens(logits, config.draft_temperature, by_step[step])
                return self.token_ids(rows), confidence
            # All chains of a text draw with the same noise. A single chain's is no copy: a kernel less before the head.
            keys = by_step[step].expand(len(hidden) // texts, -1).flatten()
            return self._best(hidden, texts, depth + step, Drawn(how, keys, is_draft=True))

        return draw

    def count_drafts(self, counts: Sequence[int]) -> None:
        """Go on after the first `counts` drafts of each text that were just made; the last of them was not read."""
        read = [max(0, count - 1) for count in counts]
        for stage in self.drafting_stages(1):
            lengths = zip(stage.cache.lengths, read, strict=True)
            stage.cache.lengths = [before + more for before, more in lengths]
        if self.feedback:
            self.feedback.go_on(self._drafter_hidden, counts)

    def begin_verifying(
        self,
        rows: Sequence[Sequence[int]],
        chains: int,
        drawn: Drawn | None = None,
        drafted: Drafted | None = None,
    ) -> None:
        """Start a pass over the tokens that the verifier has not read; `verified` waits for it (target "base").

        Args:
            rows: the tokens of each row; none for a text without this chain.
            chains: of each text.
            drawn: how the tokens of a sampled answer are drawn, keys `[rows, n + 1]`, of prompts `[rows, 1]`.
            drafted: drafts that follow the first rows and that the host may not have seen yet.
        """
        for stage in (self.base, self.deep):
            stage.cache.fork(chains)
        counts = list(map(len, rows))
        self._read_before = self.deep.cache.lengths[: len(rows) // chains]
        if self._read_alone(counts):
            inputs = [self.passes.pad([row]) for row in rows]
            self._under_way = self._verify_one_by_one(inputs, counts, True, drawn)
            return
        tokens = self.passes.pad(rows)
        self._under_way = self._verify(tokens, counts, True, drawn, drafted)

    def begin_verifying_states(self, states: Sequence[Tensor], drawn: Drawn | None = None) -> None:
        """The same from exit states `[T, D]` of each text, computed with lora_S on (target "adapted")."""
        counts = list(map(len, states))
        self._read_before = list(self.deep.cache.lengths)
        if self._read_alone(counts):
            inputs = [self._padded([row]) for row in states]
            self._under_way = self._verify_one_by_one(inputs, counts, False, drawn)
            return
        self._under_way = self._verify(self._padded(states), counts, False, drawn)

    def _padded(self, states: Sequence[Tensor]) -> Tensor:
        """Exit states `[T, D]` of each text as the deep layers read them."""
        padded = pad_sequence(list(states), batch_first=True)
        width = self.passes.width(max(1, padded.shape[1]), len(states))
        return F.pad(padded, (0, 0, 0, width - padded.shape[1]))

    def _read_alone(self, counts: Sequence[int]) -> bool:
        """Whether these are prompts of so many tokens that are read one by one."""
        return not self.passes.begun and len(counts) > 1 and self.passes.read_alone(max(counts))

    def _one_by_one(self, stages: Sequence[Stage], count: int, read: Callable[[int], Result]) -> list[Result]:
        """What `read` gives for each prompt, which some stages read as if alone: over caches of one row."""
        caches = [stage.cache for stage in stages]
        results = []
        try:
            for stage, cache in zip(stages, caches, strict=True):
                # They are kept, since captured passes write to them.
                stage.cache = self.one_row.setdefault(stage, cache.like(1, cache.capacity))
            for row in range(count):
                for stage in stages:
                    stage.cache.clear()
                results.append(read(row))
                for stage, cache in zip(stages, caches, strict=True):
                    cache.copy_prefix(stage.cache, [row])
                self.passes.begun = False  # so that the next one is read as a prompt, too
        finally:
            for stage, cache in zip(stages, caches, strict=True):
                stage.cache = cache
        return results

    def _verify_one_by_one(
        self, inputs: Sequence[Tensor], counts: Sequence[int], from_tokens: bool, drawn: Drawn | None
    ) -> Outputs:
        """Let the verifier read each prompt as if alone; `inputs` are `_verify`'s for each of them."""

        def read(row: int) -> list[Tensor]:
            own = drawn and Drawn(drawn.how, drawn.keys[row : row + 1])
            results = self._verify(inputs[row], [counts[row]], from_tokens, own, alone=True)
            return [result.clone() for result in results]

        stages = [self.base, self.deep] if from_tokens else [self.deep]
        outputs = self._one_by_one(stages, len(inputs), read)
        self.passes.begun = True
        chosen, kept, hidden = zip(*outputs, strict=True)
        padded = pad_sequence([states[0] for states in hidden], batch_first=True)
        return torch.cat(chosen, dim=1), torch.cat(kept), padded

    @property
    def is_verifying(self) -> bool:
        """Whether a verification has been started that the host has not looked at."""
        return self._under_way is not None

    def verified(self) -> Verified:
        """What the verification that was started says."""
        assert self._under_way is not None
        chosen, kept, self._verifier_hidden = self._under_way
        self._under_way = None
        tokens, confidence = unpacked(chosen)
        return Verified(tokens, confidence, kept, len(self._read_before))

    def _verify(
        self,
        inputs: Tensor,
        counts: list[int],
        from_tokens: bool,
        drawn: Drawn | None,
        drafted: Drafted | None = None,
        alone: bool = False,
    ) -> Outputs:
        """Run the deep layers on tokens `[rows, T]` or exit states `[rows, T, D]`; what `verified` unpacks.

        The caches are those of one row if a prompt is read `alone`; other arguments as in `begin_verifying`.
        """
        num_drafts = 0 if drafted is None else drafted.chosen.shape[2]
        are_prompts = not self.passes.begun

        def run(inputs: Tensor, *extra: Tensor) -> Outputs:
            if num_drafts:  # they stand after the last committed token
                inputs[:, 1 : 1 + num_drafts] = extra[0][0]  # [rows, n]
            states = self.base(inputs) if from_tokens else inputs
            hidden = self.deep(states)
            fed_back = self.fed_back(hidden)
            if are_prompts:  # only what follows their last token matters
                rows = torch.arange(len(hidden), device=hidden.device)
                hidden = hidden[rows, extra[0]][:, None]
            own, confidence = self.deep.best(hidden, drawn=drawn and Drawn(drawn.how, extra[-1]))
            kept = (hidden if self.keep_states else hidden[..., :0]).to(self.dtype)
            return packed(own[0], confidence), kept, fed_back

        extra = []
        if are_prompts:
            extra = [torch.tensor(counts) - 1]
        elif drafted is not None:
            extra = [drafted.chosen]
        if drawn:
            width = 1 if are_prompts else inputs.shape[1]
            extra.append(F.pad(drawn.keys, (0, width - drawn.keys.shape[1])))
        caches = [self.deep.cache]
        if from_tokens:
            caches.insert(0, self.base.cache)
        name = ("verify", from_tokens, drawn and drawn.how, num_drafts, are_prompts, alone, self.keep_states)
        results = self.passes.run(name, run, caches, counts, inputs, *extra)
        self.passes.begun = True
        return results

    def read(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Let shallow layers and drafter read tokens without drafting; their exit states `[B, T, D]`."""
        if not self._read_alone(list(map(len, tokens))):
            return self._read(tokens)

        def read(row: int) -> Tensor:
            return self._read([tokens[row]], alone=True)[0].clone()

        states = self._one_by_one([self.shallow, self.drafter], len(tokens), read)
        return pad_sequence(states, batch_first=True)

    def _read(self, tokens: Sequence[Sequence[int]], alone: bool = False) -> Tensor:
        """The same in one pass; if a prompt is read `alone`, over caches of one row."""

        def run(ids: Tensor, *fed_back: Tensor) -> Outputs:
            states = self.shallow(ids)
            self.drafter(states, fed_back[0] if fed_back else None)
            return (states,)

        counts = list(map(len, tokens))
        inputs = [self.passes.pad(tokens)]
        if self.feedback:
            inputs.append(self.feedback.take(counts, inputs[0].shape[1]))
        caches = [self.shallow.cache, self.drafter.cache]
        (states,) = self.passes.run(("read", alone), run, caches, counts, *inputs)
        return states
