"""The early-exit Llama: layers[:k] draft, layers[k:] verify, one block at a time.

`exit_layer = k` is the number of layers that draft; the exit state is `hidden_states[k]` in Hugging Face's
counting. Greedy output never depends on what drafts, since every committed token is the verifier's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
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
from kangaroo.drafting import Chooser
from kangaroo.fused import Stack, Stacks, can_pack
from kangaroo.sgp_lora import AdapterSwitch

TARGETS = ("base", "adapted")
SOURCES = ("learned", "lookup", "hybrid")


@dataclass(frozen=True)
class DecodeConfig:
    """How to decode."""

    draft_len: int = 4
    """Tokens drafted before a verification, at most; 0 is plain decoding."""
    threshold: float = 0.0
    """A draft whose confidence is below this is the last of its block (Kangaroo's second exit); 0 to 1."""
    target: str = "base"
    """What the deep layers read: "base", the exit state with lora_S off, or "adapted", with it on."""
    draft_temperature: float = 0.0
    """0 drafts by argmax; above 0 drafts are sampled from the policy at this temperature, given noise."""
    source: str = "learned"
    """What drafts: "learned", the shallow layers; "lookup", what followed the last tokens earlier in the text;
    "hybrid", block by block one of them."""
    adaptive: bool = False
    """Choose source and length of each block by acceptance and step costs, `draft_len` at most; False drafts always."""

    def __post_init__(self) -> None:
        if self.draft_len < 0:
            raise ValueError(f"draft_len is {self.draft_len}; expected 0 or more")
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold is {self.threshold}; expected 0 to 1")
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; expected one of {', '.join(TARGETS)}")
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}; expected one of {', '.join(SOURCES)}")
        if self.draft_temperature < 0:
            raise ValueError(f"draft_temperature is {self.draft_temperature}; expected 0 or more")


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


@dataclass(frozen=True)
class DraftBlock:
    """What the draft proposes before one verification: n tokens.

    Attributes:
        tokens: `[n]`, vocabulary ids.
        confidence: `[n]`, the policy's largest probability at each; NaN for those that were looked up.
        exit_hidden: `[m, D]`, the exit states that the first m were drafted from, lora_S on; the rest were looked up.
    """

    tokens: Tensor
    confidence: Tensor
    exit_hidden: Tensor

    def followed_by(self, looked_up: Sequence[int]) -> DraftBlock:
        """The same block with tokens behind it that no shallow layer drafted."""
        if not looked_up:
            return self
        tail = self.tokens.new_tensor(list(looked_up))
        unknown = self.confidence.new_full(tail.shape, float("nan"))
        return replace(self, tokens=torch.cat((self.tokens, tail)), confidence=torch.cat((self.confidence, unknown)))

    @property
    def num_learned(self) -> int:
        """How many of the tokens the shallow layers drafted."""
        return len(self.exit_hidden)


@dataclass(frozen=True)
class Verification:
    """What one verification makes of a block.

    Attributes:
        start: absolute position of the block's first token, the prompt counted.
        committed: the tokens that join the response, the verifier's own last.
        num_drafted: scored drafts, up to and including the first reject.
        num_accepted: accepted drafts.
        draft: the block; its first `num_drafted` entries are scored.
        verifier_confidence: `[n + 1]`, the verifier's probability of its own token at each position.
    """

    start: int
    committed: tuple[int, ...]
    num_drafted: int
    num_accepted: int
    draft: DraftBlock
    verifier_confidence: Tensor

    @property
    def block_len(self) -> int:
        """Tokens committed by this verification."""
        return len(self.committed)

    def end_at(self, eos_ids: Sequence[int]) -> Verification:
        """The same block cut behind its first end-of-sequence token: what lies beyond was never part of the answer."""
        for count, token in enumerate(self.committed, start=1):
            if token in eos_ids:
                scored, accepted = min(self.num_drafted, count), min(self.num_accepted, count)
                return replace(self, committed=self.committed[:count], num_drafted=scored, num_accepted=accepted)
        return self


@dataclass
class DecodeCaches:
    """The caches of one decoding.

    Attributes:
        draft: the shallow layers as the draft runs them.
        verify: the shallow layers as the verifier runs them; the same object as `draft` if target="adapted".
        deep: the deep layers.
        drafter: the drafter's own.
    """

    draft: KVCache
    verify: KVCache
    deep: KVCache
    drafter: KVCache

    def roll_back(self, length: int) -> None:
        """Forget everything at positions `length` and later."""
        for cache in (self.draft, self.verify, self.deep, self.drafter):
            assert isinstance(cache.length, int)
            cache.length = min(cache.length, length)


class _Decoder(nn.Module):
    """Embedding, decoder layers, final norm: the names of Hugging Face's checkpoints."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def choose_tokens(logits: Tensor, temperature: float = 0.0, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pick a token from each row of draft logits, by argmax or by inverse-CDF sampling.

    Args:
        logits: `[N, V]`, float32.
        temperature: 0 for argmax.
        noise: `[N]`, uniform in [0, 1): the same noise and logits give the same tokens. Needed above temperature 0.

    Returns:
        Tokens `[N]` and the policy's largest probability `[N]`, at temperature 1 for argmax.
    """
    if temperature == 0.0:
        probabilities = logits.softmax(dim=-1)
        confidence, tokens = probabilities.max(dim=-1)
        return tokens, confidence
    if noise is None:
        raise ValueError("sampled drafts need noise")
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    cut = noise.double()[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, cut, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return tokens, probabilities.amax(dim=-1).float()


def count_accepted(draft_tokens: list[int], verifier_tokens: list[int]) -> int:
    """Length of the prefix on which draft and verifier agree (greedy verification)."""
    for count, (drafted, own) in enumerate(zip(draft_tokens, verifier_tokens, strict=False)):
        if drafted != own:
            return count
    return min(len(draft_tokens), len(verifier_tokens))


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
        return DecodeCaches(shallow, verify, cache(self.config.num_hidden_layers - self.exit_layer), drafter)

    @contextmanager
    def decoding(self, capacity: int, policy: DraftPolicy | None, target: str) -> Iterator[DecodeCaches]:
        """Hold fresh caches in `past_key_values`, and the adapters folded, for the time of one decoding."""
        self.past_key_values = caches = self.new_caches(capacity, policy, target)
        try:
            with self.folded():
                if can_pack(self.lm_head.weight):
                    layers, k = list(self.model.layers), self.exit_layer
                    caches.draft.stack = self._stack("draft", layers[:k])
                    caches.deep.stack = self._stack("deep", layers[k:], self.lm_head.weight)
                    if caches.verify is not caches.draft:
                        with self.without_adapters("lora_S"):
                            caches.verify.stack = self._stack("verify", layers[:k])
                yield caches
        finally:
            self.past_key_values = None

    def _stack(self, name: str, layers: list[nn.Module], head: Tensor | None = None) -> Stack:
        """What runs these layers while decoding, their adapters as they are now."""
        weights: list[Tensor] = [weight for layer in layers for weight in layer.parameters()]
        weights += [self.model.norm.weight, *([] if head is None else [head])]
        dtype = self.lm_head.weight.dtype
        return self._stacks.get(name, weights, lambda: Stack(layers, dtype, self.model.norm, head))

    def _draft(
        self, tokens: Tensor, policy: DraftPolicy, settings: DecodeConfig, noise: Tensor | None, chooser: Chooser
    ) -> tuple[DraftBlock, list[Tensor]]:
        """Draft up to `settings.draft_len` tokens behind `tokens [1, n]`; also return the exit states of every pass."""
        caches = self._caches()
        pending = tokens[:, int(caches.draft.length) :]
        drafted: list[Tensor] = []
        confidences: list[Tensor] = []
        passes: list[Tensor] = []
        more = settings.draft_len > 0
        while more:
            passes.append(self.forward_shallow(pending, cache=caches.draft))
            logits = policy.head_logits(policy.drafter_states(passes[-1], caches.drafter)[:, -1], caches.drafter)
            at = None if noise is None else noise[len(drafted)].view(1)
            index, confidence = choose_tokens(logits, settings.draft_temperature, at)
            drafted.append(policy.token_ids(index))
            confidences.append(confidence)
            pending = drafted[-1][None]
            more = chooser.goes_on(int(drafted[-1]), float(confidence)) and len(drafted) < settings.draft_len
        none = torch.empty(0, device=tokens.device)
        states = [states[:, -1] for states in passes] or [none.new_empty(0, self.config.hidden_size)]
        block = DraftBlock(torch.cat([none.long(), *drafted]), torch.cat([none, *confidences]), torch.cat(states))
        return block, passes

    def _exit_states(self, tokens: Tensor, policy: DraftPolicy, target: str, passes: list[Tensor]) -> Tensor:
        """What the deep layers read next: the exit states of all tokens that they have not seen."""
        caches = self._caches()
        if target == "base":
            with nullcontext() if caches.verify.stack else self.without_adapters("lora_S"):
                return self.forward_shallow(tokens[:, int(caches.verify.length) :], cache=caches.verify)
        rest = self.forward_shallow(tokens[:, int(caches.draft.length) :], cache=caches.draft)
        policy.drafter_states(rest, caches.drafter)
        return torch.cat((*passes, rest), dim=1)

    def _caches(self) -> DecodeCaches:
        if self.past_key_values is None:
            raise RuntimeError("decoding needs caches: call this inside `with model.decoding(...)`")
        return self.past_key_values

    @torch.no_grad()
    def spec_decode_step(
        self,
        tokens: Tensor,
        policy: DraftPolicy,
        settings: DecodeConfig,
        room: int,
        noise: Tensor | None = None,
        chooser: Chooser | None = None,
    ) -> Verification:
        """Draft a block, verify it in one pass, and say what is committed. Greedy and lossless.

        The first call on fresh caches takes in the prompt and, so that every draft stands behind a token that the
        verifier chose, drafts nothing.

        Args:
            tokens: `[1, n]`, prompt and response so far.
            policy: drafts.
            settings: how.
            room: how many tokens may still be committed, at least 1.
            noise: uniform `[>= draft_len]`, for sampled drafts.
            chooser: how far to draft, and what to verify behind the drafts; if not given, up to the first confidence
                below `threshold`, and nothing.

        Returns:
            The verdict; the caller appends `committed` to `tokens`.

        Raises:
            RuntimeError: outside `decoding()`.
            ValueError: if a logit is not finite.
        """
        caches = self._caches()
        settings = replace(settings, draft_len=min(settings.draft_len, room - 1) if int(caches.deep.length) else 0)
        chooser = chooser or Chooser(settings)
        draft, passes = self._draft(tokens, policy, settings, noise, chooser)
        if int(caches.deep.length):
            draft = draft.followed_by(chooser.tail()[: room - 1 - len(draft.tokens)])
        extended = torch.cat((tokens, draft.tokens[None]), dim=1)
        exit_states = self._exit_states(extended, policy, settings.target, passes)
        hidden = self.forward_deep(exit_states, cache=caches.deep)[0, -len(draft.tokens) - 1 :]
        logits = self.head_logits(hidden, caches.deep)
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(f"the verifier's logits at position {tokens.shape[1]} are not finite")
        confidence, own = logits.softmax(dim=-1).max(dim=-1)
        own_tokens = own.tolist()
        accepted = count_accepted(draft.tokens.tolist(), own_tokens)
        caches.roll_back(tokens.shape[1] + accepted)
        return Verification(
            start=tokens.shape[1],
            committed=tuple(own_tokens[: accepted + 1]),
            num_drafted=min(len(draft.tokens), accepted + 1),
            num_accepted=accepted,
            draft=draft,
            verifier_confidence=confidence,
        )
