"""The early-exit Llama: layers[:k] draft, layers[k:] verify, one block at a time.

`exit_layer = k` is the number of layers that draft; the exit state is `hidden_states[k]` in Hugging Face's
counting. Greedy output never depends on what drafts, since every committed token is the verifier's own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from kangaroo.adapter import (
    AttentionPlan,
    DecoderLayer,
    KVCache,
    LlamaRotaryEmbedding,
    plan_cached,
    plan_uncached,
    rotary_for,
)
from kangaroo.decoding.blocks import PASS_ROWS, DecodeConfig, DraftBlock, Verification
from kangaroo.decoding.drafting import Chooser, LookupIndex
from kangaroo.decoding.fused import Stack, Stacks, can_stack
from kangaroo.decoding.replay import Pass, Replays, view
from kangaroo.decoding.sampling import choose_tokens, count_accepted, distribution, inverse_cdf, speculative_sampling
from kangaroo.sgp_lora import AdapterSwitch

AHEAD = 2
"""Drafts of one captured pass: a look at each of them before the next would cost half as much again."""


HELD = 4
"""Sets of caches, with what was captured over them, that a model on CUDA keeps."""


class DraftPolicy(Protocol):
    """What turns exit states into draft logits: drafter, exit norm and exit head."""

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache of the drafter."""

    def drafter_states(self, exit_hidden: Tensor, cache: KVCache | None = None) -> Tensor:
        """Exit states `[B, T, D]` to what the exit head reads, `[B, T, D]`; appended to the drafter's cache."""

    def head_logits(self, states: Tensor, cache: KVCache | None = None) -> Tensor:
        """`[…, D]` to float32 logits `[…, V']`, by the head that goes with the drafter's cache if it has one."""

    def token_ids(self, draft_index: Tensor) -> Tensor:
        """Vocabulary ids of rows of the exit head."""


@dataclass
class Row:
    """One text under decoding.

    Attributes:
        text: prompt and response so far.
        stop: the length at which it ends, whatever it says.
        chooser: says what its blocks draft.
        noise: uniform in [0, 1), one number a position of the response, for sampled drafts; None if they are not. A
            position that is drafted anew takes the same number again, which nothing committed has depended on.
        generator: what the verifier's samples are drawn from; None if it is greedy.
        start: the prompt's length.
    """

    text: LookupIndex
    stop: int
    chooser: Chooser
    noise: Tensor | None = None
    generator: torch.Generator | None = None
    start: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = len(self.text.tokens)

    @property
    def room(self) -> int:
        """How many tokens may still be committed; 0 for a text that is over."""
        return max(0, self.stop - len(self.text.tokens))

    def uniform(self, count: int) -> Tensor:
        """Fresh numbers in [0, 1), `[count]`."""
        return torch.rand(count, generator=self.generator, dtype=torch.float64)

    def draft_noise(self, depth: int) -> float:
        """The number by which the draft so deep in the next block is drawn.

        Raises:
            ValueError: if there is none.
        """
        if self.noise is None:
            raise ValueError("sampled drafts need noise")
        return float(self.noise[min(len(self.text.tokens) - self.start + depth, len(self.noise) - 1)])


@dataclass
class _Proposal:
    """A row's block while it is drafted, and the exit states of every pass for it."""

    tokens: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    chances: list[Tensor] = field(default_factory=list)
    passes: list[Tensor] = field(default_factory=list)
    over: bool = False

    def add(self, token: int, confidence: float, state: Tensor, chances: Tensor) -> None:
        self.tokens.append(token)
        self.confidence.append(confidence)
        self.states.append(state)
        self.chances.append(chances)

    def block(self, tail: list[int], width: int) -> DraftBlock:
        return DraftBlock(
            tokens=torch.tensor(self.tokens + tail, dtype=torch.long),
            confidence=torch.tensor(self.confidence + [float("nan")] * len(tail)),
            exit_hidden=torch.stack(self.states) if self.states else torch.empty(0, width),
            chances=torch.stack(self.chances) if self.chances and len(self.chances[0]) else None,
        )


@dataclass
class DecodeCaches:
    """The caches of one decoding.

    Attributes:
        draft: the shallow layers as the draft runs them.
        verify: the shallow layers as the verifier runs them; the same object as `draft` if target="adapted".
        deep: the deep layers.
        drafter: the drafter's own.
        policy: what drafts.
        replays: captured passes over these caches, or None where passes are simply run.
        rows: rows of every pass behind the prefill, or 0 for as many as there are tokens.
    """

    draft: KVCache
    verify: KVCache
    deep: KVCache
    drafter: KVCache
    policy: DraftPolicy | None = None
    replays: Replays | None = None
    rows: int = 0

    def all(self) -> tuple[KVCache, ...]:
        """Every cache once."""
        return (self.draft, self.deep, self.drafter, *(() if self.verify is self.draft else (self.verify,)))

    def roll_back(self, lengths: int | Sequence[int]) -> None:
        """Forget everything at positions `lengths` and later, in all rows or row by row."""
        for cache in self.all():
            limits = [lengths] * len(cache.lengths) if isinstance(lengths, int) else lengths
            cache.lengths = [min(pair) for pair in zip(cache.lengths, limits, strict=True)]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        for cache in self.all():
            cache.keep(rows)


class _Decoder(nn.Module):
    """Embedding, decoder layers, final norm: the names of Hugging Face's checkpoints."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class EarlyExitLlamaForCausalLM(LlamaPreTrainedModel):  # type: ignore[misc]  # transformers is untyped here
    """Llama split at an exit layer, with static caches.

    Loads and saves like any Hugging Face Llama (`from_pretrained`, `save_pretrained`, same parameter names).

    Args:
        config: a Llama configuration; grouped queries, tied embeddings and `rope_theta` are honoured.
        EARLY_STOP_LAYER: k, the number of layers that draft; half of them if not given.
    """

    _tied_weights_keys = ["lm_head.weight"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    _no_split_modules = ["DecoderLayer"]

    def __init__(self, config: LlamaConfig, EARLY_STOP_LAYER: int | None = None) -> None:  # noqa: N803
        super().__init__(config)
        self.model = _Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary: LlamaRotaryEmbedding = rotary_for(config)
        self.adapter_switch: AdapterSwitch | None = None
        self.past_key_values: DecodeCaches | None = None
        self._stacks = Stacks()
        self._held: list[DecodeCaches] = []
        self._captures: list[float] = []
        self.set_exit_layer(config.num_hidden_layers // 2 if EARLY_STOP_LAYER is None else EARLY_STOP_LAYER)
        self.post_init()

    def set_exit_layer(self, exit_layer: int) -> None:
        """Split the model behind `exit_layer` layers.

        Raises:
            ValueError: unless 1 <= exit_layer < number of layers.
        """
        layers = self.config.num_hidden_layers
        if not 1 <= exit_layer < layers:
            raise ValueError(f"exit_layer is {exit_layer}; this model of {layers} layers takes 1 to {layers - 1}")
        self.exit_layer = exit_layer

    @property
    def capture_s(self) -> float:
        """Seconds spent on capturing passes so far; 0 but on CUDA."""
        return sum(self._captures)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, for weight tying."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The language-model head, for weight tying."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the language-model head."""
        self.lm_head = new_embeddings

    # Passes

    def without_adapters(self, *names: str) -> AbstractContextManager[None]:
        """Run with the named adapters ("lora_S", "lora_D") left out inside this context."""
        return nullcontext() if self.adapter_switch is None else self.adapter_switch.without(*names)

    def folded(self) -> AbstractContextManager[None]:
        """Run inference with the adapters added into plain weights inside this context."""
        return nullcontext() if self.adapter_switch is None else self.adapter_switch.folded()

    def _run(self, hidden: Tensor, first: int, stop: int, plan: AttentionPlan, cache: KVCache | None) -> Tensor:
        """layers[first:stop]; the cache's layer 0 is `first`."""
        if cache is None or cache.stack is None:
            for index in range(first, stop):
                hidden = self.model.layers[index](hidden, plan, cache, index - first)
        else:
            for index, layer in enumerate(cache.stack.layers):
                hidden = layer(hidden, plan, cache, index)
        if cache is not None:
            cache.advance(hidden.shape[1])
        return hidden

    def _plan(self, states: Tensor, position_ids: Tensor | None, cache: KVCache | None) -> AttentionPlan:
        if cache is None:
            return plan_uncached(self.rotary, states, position_ids)
        return plan_cached(self.rotary, cache, states.shape[1], states.dtype)

    def forward_shallow(
        self, input_ids: Tensor, position_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """layers[:k]: tokens `[B, T]` to exit states `[B, T, D]`.

        Args:
            input_ids: `[B, T]`.
            position_ids: for passes without a cache, `[B, T]`, negative at padding; None for 0…T-1.
            cache: a cache of k layers; the tokens are appended to it.
        """
        hidden = self.model.embed_tokens(input_ids)
        return self._run(hidden, 0, self.exit_layer, self._plan(hidden, position_ids, cache), cache)

    def forward_deep(
        self, exit_hidden: Tensor, position_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """layers[k:] and the final norm: exit states `[B, T, D]` to what `lm_head` reads, `[B, T, D]`."""
        plan = self._plan(exit_hidden, position_ids, cache)
        hidden = self._run(exit_hidden, self.exit_layer, self.config.num_hidden_layers, plan, cache)
        normed: Tensor = self.model.norm(hidden)
        return normed

    def head_logits(self, states: Tensor, cache: KVCache | None = None) -> Tensor:
        """The verifier's float32 logits `[…, V]` from the deep layers' states `[…, D]`."""
        packed = None if cache is None or cache.stack is None else cache.stack.head
        return (self.lm_head(states) if packed is None else packed(states)).float()

    def forward_draft_or_large_model(
        self,
        in_tokens_small: Tensor | None = None,
        in_features_large: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """One half of the model, with `past_key_values` if a decoding is under way, else without a cache.

        Args:
            in_tokens_small: `[B, T]`, tokens for the shallow layers; or
            in_features_large: `[B, T, D]`, exit states for the deep layers.
            position_ids: `[B, T]`; under a cache the first one says where the pass starts, which rolls it back.

        Returns:
            `[B, T, D]`: exit states, or the deep layers' normed states.

        Raises:
            ValueError: unless exactly one input is given, or when positions would leave a gap in the cache.
        """
        if (in_tokens_small is None) == (in_features_large is None):
            raise ValueError("give exactly one of in_tokens_small and in_features_large")
        caches = self.past_key_values
        cache = None if caches is None else (caches.draft if in_tokens_small is not None else caches.deep)
        if cache is not None and position_ids is not None:
            start = int(position_ids[0, 0])
            if start > int(cache.length):
                raise ValueError(f"position {start} would leave a gap behind the {int(cache.length)} cached positions")
            cache.length = start
        if in_tokens_small is not None:
            return self.forward_shallow(in_tokens_small, position_ids, cache)
        assert in_features_large is not None
        return self.forward_deep(in_features_large, position_ids, cache)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """The whole model without a cache, as Hugging Face's Llama computes it.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 0 at padding on either side.
            position_ids: `[B, T]`; by default counted over the unpadded tokens.
            output_hidden_states: also return `hidden_states`, L + 1 tensors `[B, T, D]`, the last one normed.

        Returns:
            `logits [B, T, V]` and, if asked for, `hidden_states`.
        """
        if attention_mask is not None and position_ids is None:
            position_ids = (attention_mask.cumsum(dim=1) - 1).masked_fill(attention_mask == 0, -1)
        hidden = self.model.embed_tokens(input_ids)
        plan = plan_uncached(self.rotary, hidden, position_ids)
        states = [hidden]
        for layer in self.model.layers:
            states.append(layer(states[-1], plan))
        states[-1] = self.model.norm(states[-1])
        return CausalLMOutputWithPast(
            logits=self.lm_head(states[-1]), hidden_states=tuple(states) if output_hidden_states else None
        )

    # Decoding

    def new_caches(
        self, capacity: int, policy: DraftPolicy | None, target: str = "base", batch_size: int = 1
    ) -> DecodeCaches:
        """Empty caches for `capacity` positions."""

        def cache(layers: int) -> KVCache:
            return KVCache(self.config, layers, batch_size, capacity, self.model.norm.weight)

        shallow = cache(self.exit_layer)
        verify = shallow if target == "adapted" or policy is None else cache(self.exit_layer)
        drafter = cache(0) if policy is None else policy.new_cache(batch_size, capacity)
        return DecodeCaches(shallow, verify, cache(self.config.num_hidden_layers - self.exit_layer), drafter, policy)

    @contextmanager
    def decoding(
        self,
        capacity: int,
        policy: DraftPolicy | None,
        target: str,
        batch_size: int = 1,
        deterministic: bool = False,
    ) -> Iterator[DecodeCaches]:
        """Hold empty caches in `past_key_values`, and the adapters folded, for the time of one decoding.

        On CUDA the caches and the passes captured over them are those of the last decoding if they fit it.
        """
        on_cuda = self.lm_head.weight.is_cuda
        if on_cuda:
            capacity = view(capacity + PASS_ROWS, 1 << 62)
        elif deterministic or batch_size > 1:
            capacity += PASS_ROWS
        caches = self.new_caches(capacity, policy, target, batch_size)
        try:
            with self.folded():
                if can_stack(self.lm_head.weight):
                    self._use_stacks(caches)
                caches.rows = PASS_ROWS if deterministic else 0
                if on_cuda:
                    caches = _reused(self._held, caches, self._captures)
                self.past_key_values = caches
                yield caches
        finally:
            self.past_key_values = None

    def _use_stacks(self, caches: DecodeCaches) -> None:
        """Let stacks of the layers as they are now run on the caches."""
        layers, k = list(self.model.layers), self.exit_layer
        caches.draft.stack = self._stack("draft", layers[:k])
        caches.deep.stack = self._stack("deep", layers[k:], self.lm_head.weight)
        if caches.verify is not caches.draft:
            with self.without_adapters("lora_S"):
                caches.verify.stack = self._stack("verify", layers[:k])

    def _stack(self, name: str, layers: list[nn.Module], head: Tensor | None = None) -> Stack:
        """What runs these layers while decoding, their adapters as they are now."""
        weights: list[Tensor] = [weight for layer in layers for weight in layer.parameters()]
        weights += [self.model.norm.weight, *([] if head is None else [head])]
        dtype = self.lm_head.weight.dtype
        return self._stacks.get(name, weights, lambda: Stack(layers, dtype, self.model.norm, head))

    def _caches(self) -> DecodeCaches:
        if self.past_key_values is None:
            raise RuntimeError("decoding needs caches: call this inside `with model.decoding(...)`")
        return self.past_key_values

    def _pass(
        self, name: Hashable, run: Pass, over: Sequence[KVCache], counts: Sequence[int], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Run a pass whose rows add `counts` positions each to the caches `over`, which are equally long.

        The first input is `[B, T, …]`, padded on the right: what padding writes is written over by what comes next.
        """
        caches, before, length = self._caches(), over[0].lengths, inputs[0].shape[1]
        device = self.lm_head.weight.device
        if not over[0].length or not (caches.replays or caches.rows):
            outputs = run(*(one.to(device) for one in inputs))
        else:
            needed = max(before) + length
            slots = over[0].capacity if caches.rows else view(needed, over[0].capacity)

            def fixed(starts: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
                for cache in over:
                    cache.lengths, cache.fixed = before, (starts, slots)
                try:
                    return run(*given)
                finally:
                    for cache in over:
                        cache.fixed = None

            starts = torch.tensor(before)
            if caches.replays:
                outputs = caches.replays((name, slots), fixed, starts, *inputs)
            else:
                outputs = fixed(starts.to(device), *(one.to(device) for one in inputs))
        for cache in over:
            cache.lengths = [start + count for start, count in zip(before, counts, strict=True)]
        return outputs

    def _width(self, longest: int) -> int:
        """Positions of a pass whose longest row has so many: more of them where that spares passes of other sizes."""
        caches = self._caches()
        if not caches.deep.length or not (caches.replays or caches.rows):
            return longest
        return max(caches.rows, longest if longest <= 2 else 8 * math.ceil((longest - 1) / 8) + 1)

    def _padded(self, feeds: Sequence[Sequence[int]]) -> Tensor:
        """`[B, T]` on the host, zeros behind each row's tokens."""
        width = self._width(max(1, *map(len, feeds)))
        return torch.tensor([[*feed, *[0] * (width - len(feed))] for feed in feeds])

    def _draft(
        self, rows: Sequence[Row], policy: DraftPolicy, settings: DecodeConfig
    ) -> tuple[list[DraftBlock], list[list[Tensor]]]:
        """Draft a block for every row; also return the exit states of every pass, `[n, D]` each, row by row."""
        caches = self._caches()
        counts = [row.chooser.begin(row.text, row.room - 1) if row.room else 0 for row in rows]
        made = [_Proposal() for _ in rows]
        going = [at for at, count in enumerate(counts) if count]
        feeds = [row.text.tokens[caches.draft.lengths[at] :] if counts[at] else [] for at, row in enumerate(rows)]
        while going:
            drafts, states, chances, *whole = self._propose(feeds, rows, made, policy, settings)
            for step, (tokens, confidence) in enumerate(drafts.tolist()):
                for at in going:
                    if whole:
                        made[at].passes.append(states[step, at][None] if step else whole[0][at, : len(feeds[at])])
                    if not made[at].over:
                        made[at].add(int(tokens[at]), confidence[at], states[step, at], chances[step, at])
                        goes_on = rows[at].chooser.goes_on(int(tokens[at]), confidence[at])
                        made[at].over = not goes_on or len(made[at].tokens) == counts[at]
            going = [at for at in going if not made[at].over]
            feeds = [made[at].tokens[-1:] if at in going else [] for at in range(len(rows))]
        tails = [
            row.chooser.tail()[: row.room - 1 - len(one.tokens)] if row.room else []
            for row, one in zip(rows, made, strict=True)
        ]
        blocks = [one.block(tail, self.config.hidden_size) for one, tail in zip(made, tails, strict=True)]
        return blocks, [one.passes for one in made]

    def _propose(
        self,
        feeds: Sequence[Sequence[int]],
        rows: Sequence[Row],
        made: Sequence[_Proposal],
        policy: DraftPolicy,
        settings: DecodeConfig,
    ) -> tuple[Tensor, ...]:
        """The next drafts behind each row's tokens: n of them, one but where passes are captured.

        Returns:
            Ids and confidences `[n, 2, B]`; the exit states they come from `[n, B, D]`; what sampled drafts were drawn
            from, `[n, B, V']`, or none; and with target="adapted" the exit states of all tokens fed, `[B, T, D]`.
        """
        caches, sampled, adapted = self._caches(), settings.draft_temperature > 0, settings.target == "adapted"
        top_k, top_p = (settings.top_k, settings.top_p) if settings.temperature else (0, 1.0)
        ahead, over = AHEAD if caches.replays and caches.draft.length else 1, (caches.draft, caches.drafter)

        def run(ids: Tensor, last: Tensor, *uniform: Tensor) -> tuple[Tensor, ...]:
            found, whole, at = [], [], torch.arange(len(ids), device=ids.device)
            for step in range(ahead):
                states = self.forward_shallow(ids, cache=caches.draft)
                logits = policy.head_logits(policy.drafter_states(states, caches.drafter)[at, last], caches.drafter)
                if sampled:
                    chances = distribution(logits, settings.draft_temperature, top_k, top_p)
                    index, confidence = inverse_cdf(chances, uniform[0][:, step]), chances.amax(dim=-1)
                else:
                    chances, (index, confidence) = logits[:, :0], choose_tokens(logits)
                ids = policy.token_ids(index)[:, None]
                found.append((torch.stack((ids[:, 0].double(), confidence.double())), states[at, last], chances))
                whole.append(states)
                if ahead > 1:
                    for cache in over:
                        cache.move(last + 1)
                last = torch.zeros_like(last)
            return (*(torch.stack(one) for one in zip(*found, strict=True)), *(whole[:1] if adapted else []))

        last = torch.tensor([max(0, len(feed) - 1) for feed in feeds])
        given = [self._padded(feeds), last]
        if sampled:
            noise = [[row.draft_noise(len(one.tokens) + step) if feed else 0.0 for step in range(ahead)]
                     for row, one, feed in zip(rows, made, feeds, strict=True)]  # fmt: skip
            given.append(torch.tensor(noise, dtype=torch.float64))
        counts = [len(feed) + ahead - 1 if feed else 0 for feed in feeds]
        out = self._pass(("draft", settings.draft_temperature, top_k, top_p), run, over, counts, *given)
        if caches.replays is None:
            return out
        return (out[0], *(one.clone() for one in out[1:]))  # the next replay writes over them

    def _verify(
        self, rows: Sequence[Row], drafts: Sequence[DraftBlock], passes: list[list[Tensor]], policy: DraftPolicy,
        settings: DecodeConfig,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The verifier's choices behind each row's last token and its drafts.

        Returns:
            Its tokens and its probabilities of them, `[2, B, n + 1]`, and its logits `[B, n + 1, V]` if it samples. n
            is 0 right behind the prompt.
        """
        caches = self._caches()
        begun, sampled, base = caches.deep.length > 0, settings.temperature > 0, settings.target == "base"
        extended = [
            row.text.tokens[caches.deep.lengths[at] :] + draft.tokens.tolist() if row.room else []
            for at, (row, draft) in enumerate(zip(rows, drafts, strict=True))
        ]
        counts = [len(tokens) for tokens in extended]

        def run(given: Tensor, *last: Tensor) -> tuple[Tensor, ...]:
            if base:
                with nullcontext() if caches.verify.stack else self.without_adapters("lora_S"):
                    given = self.forward_shallow(given, cache=caches.verify)
            hidden = self.forward_deep(given, cache=caches.deep)
            if last:
                hidden = hidden[torch.arange(len(given), device=given.device), last[0]][:, None]
            logits = self.head_logits(hidden, caches.deep)
            confidence, own = logits.softmax(dim=-1).max(dim=-1)
            seen = torch.stack((own.double(), confidence.double()))  # not a number if any logit is none
            return (seen, logits) if sampled else (seen,)

        given = self._padded(extended) if base else self._adapted_states(extended, passes, policy)
        over = (caches.verify, caches.deep) if base else (caches.deep,)
        last = [] if begun else [torch.tensor([count - 1 for count in counts])]
        return self._pass(f"verify {base} {sampled}", run, over, counts, given, *last)

    def _adapted_states(
        self, extended: Sequence[Sequence[int]], passes: list[list[Tensor]], policy: DraftPolicy
    ) -> Tensor:
        """What the deep layers read with target="adapted", `[B, T, D]`: the draft's own exit states, and the rest."""
        caches = self._caches()

        def run(ids: Tensor) -> tuple[Tensor, ...]:
            states = self.forward_shallow(ids, cache=caches.draft)
            policy.drafter_states(states, caches.drafter)
            return (states,)

        known = [sum(len(one) for one in row) for row in passes]
        rest = [tokens[count:] for tokens, count in zip(extended, known, strict=True)]
        (states,) = self._pass(
            "rest", run, (caches.draft, caches.drafter), [len(one) for one in rest], self._padded(rest)
        )
        whole = [torch.cat([*row, states[at, : len(rest[at])]]) for at, row in enumerate(passes)]
        padded = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        return nn.functional.pad(padded, (0, 0, 0, self._width(padded.shape[1]) - padded.shape[1]))

    @torch.no_grad()
    def spec_decode_step(
        self, rows: Sequence[Row], policy: DraftPolicy, settings: DecodeConfig
    ) -> list[Verification | None]:
        """Draft a block for every row, verify all in one pass, and say what is committed. Lossless.

        The first call on fresh caches takes in the prompts and, so that every draft stands behind a token that the
        verifier chose, drafts nothing. Rows commit as many tokens as each has accepted.

        Args:
            rows: prompts and responses so far; what a row's chooser says is drafted.
            policy: drafts.
            settings: how to verify, and how drafts are drawn.

        Returns:
            One verdict a row, None for rows without room; the caller appends `committed` to the texts.

        Raises:
            RuntimeError: outside `decoding()`.
            ValueError: if a logit is not finite.
        """
        caches = self._caches()
        if caches.deep.length:
            drafts, passes = self._draft(rows, policy, settings)
        else:
            drafts, passes = [_Proposal().block([], self.config.hidden_size) for _ in rows], [[] for _ in rows]
        seen, *logits = self._verify(rows, drafts, passes, policy, settings)
        verdicts: list[Verification | None] = []
        for at, (row, draft, own, confidence) in enumerate(zip(rows, drafts, *seen.tolist(), strict=True)):
            chosen = None
            if row.room and logits:
                chosen = self._sampled(row, draft, logits[0][at, : len(draft.tokens) + 1], policy, settings)
            verdicts.append(_verdict(row, draft, own, confidence, chosen) if row.room else None)
        caches.roll_back([0 if one is None else one.start + one.num_accepted for one in verdicts])
        return verdicts

    def _sampled(
        self, row: Row, draft: DraftBlock, logits: Tensor, policy: DraftPolicy, settings: DecodeConfig
    ) -> tuple[int, int]:
        """Accepted drafts and the verifier's own token, both by speculative sampling from its logits `[n + 1, V]`."""
        target = distribution(logits, settings.temperature, settings.top_k, settings.top_p)
        drafted = draft.tokens.to(target.device)
        proposed = nn.functional.one_hot(drafted, target.shape[-1]).to(target.dtype)
        if draft.chances is not None:
            learned, covered = draft.chances.shape
            proposed[:learned] = 0.0
            proposed[:learned, policy.token_ids(torch.arange(covered, device=target.device))] = draft.chances
        return speculative_sampling(target, proposed, drafted, row.uniform(len(drafted) + 1).to(target.device))


def _verdict(
    row: Row, draft: DraftBlock, own: list[float], confidence: list[float], sampled: tuple[int, int] | None
) -> Verification:
    """What a row commits: what was sampled, or else what the verifier's own tokens accept.

    Raises:
        ValueError: if a logit was not finite.
    """
    count, start, drafted = len(draft.tokens), len(row.text.tokens), draft.tokens.tolist()
    if not all(map(math.isfinite, confidence[: count + 1])):
        raise ValueError(f"the verifier's logits at position {start} are not finite")
    accepted, token = sampled or (count_accepted(drafted, [int(one) for one in own]), None)
    return Verification(
        start=start,
        committed=(*drafted[:accepted], int(own[accepted]) if token is None else token),
        num_drafted=min(count, accepted + 1),
        num_accepted=accepted,
        draft=draft,
        verifier_confidence=torch.tensor(confidence[: count + 1]),
    )


def _reused(held: list[DecodeCaches], fresh: DecodeCaches, captures: list[float]) -> DecodeCaches:
    """The caches of an earlier decoding, emptied, if what was captured over them fits; else the fresh ones."""

    def kinds(caches: DecodeCaches) -> list[tuple[object, ...]]:
        return [(one.stack, one.capacity, one.window, len(one.lengths)) for one in caches.all()]

    for caches in held:
        if caches.policy is fresh.policy and kinds(caches) == kinds(fresh):
            caches.roll_back(0)
            caches.rows = fresh.rows
            return caches
    fresh.replays = Replays(captures)
    held[:] = [fresh, *held[: HELD - 1]]
    return fresh
