"""The early-exit Llama: `layers[:k]` draft, `layers[k:]` verify.

`exit_layer = k` is the number of layers that draft; the exit state is `hidden_states[k]` in Hugging Face's counting.
How it decodes is in `kangaroo.decoding`; start at `decoding/speculate.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from kangaroo.adapter import (
    DecoderLayer,
    LlamaRotaryEmbedding,
    check_exit_layer,
    plan_uncached,
    rotary_for,
    unpadded_positions,
)
from kangaroo.decoding.blocks import PASS_ROWS, DecodeConfig, Verification
from kangaroo.decoding.cache import KVCache
from kangaroo.decoding.feedback import Feedback
from kangaroo.decoding.generate import Turns
from kangaroo.decoding.layers import (
    CachedLayer,
    MadeFromWeights,
    Weights,
    on_own_cpu_kernels,
    product,
    rms_norm,
    states_dtype,
)
from kangaroo.decoding.passes import OWN_PROMPT, OWN_PROMPT_WORK, CudaGraphs, Passes, view
from kangaroo.decoding.speculate import Text, spec_decode_step
from kangaroo.decoding.stages import DrafterParts, Stage, Stages, StageWeights
from kangaroo.sgp_lora import AdapterSwitch

KEPT_STAGES = 16
"""Decodings of different shape whose caches and captured passes a model on CUDA keeps, at most."""
KEPT_BYTES = 1 << 32
"""Bytes of their caches, at most; the last one is always kept."""


class _Decoder(nn.Module):
    """Embedding, decoder layers, final norm: the names of Hugging Face's checkpoints."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class EarlyExitLlamaForCausalLM(LlamaPreTrainedModel):  # type: ignore[misc]  # transformers is untyped here
    """Llama split at an exit layer.

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
        self.adapter_switch = AdapterSwitch(self)  # of no adapters yet
        self.turns = Turns()
        self.past_key_values: Stages | None = None
        self._weights: MadeFromWeights[StageWeights] = MadeFromWeights()
        self._used: dict[str, Weights] = {}  # what the weights of a stage are made from
        self._kept_stages: list[Stages] = []
        self._capture_seconds: list[float] = []
        # A model of one layer cannot be split, but it can draft.
        self.exit_layer = max(1, config.num_hidden_layers // 2)
        if EARLY_STOP_LAYER is not None:
            self.set_exit_layer(EARLY_STOP_LAYER)
        self.post_init()

    def set_exit_layer(self, exit_layer: int) -> None:
        """Split the model after `exit_layer` layers.

        Raises:
            ValueError: unless 1 <= exit_layer < number of layers.
        """
        check_exit_layer(exit_layer, self.config.num_hidden_layers)
        self.exit_layer = exit_layer

    @property
    def capture_s(self) -> float:
        """Seconds spent on capturing passes so far; 0 except on CUDA."""
        return sum(self._capture_seconds)

    def layer_devices(self) -> set[torch.device]:
        """Where the decoder layers lie: one device, or several if they are spread; all else lies with `lm_head`."""
        layers: list[Any] = list(self.model.layers)
        return {self.lm_head.weight.device, *(layer.input_layernorm.weight.device for layer in layers)}

    @property
    def can_be_captured(self) -> bool:
        """Whether passes can be captured as CUDA graphs: those over several cards cannot."""
        return self.lm_head.weight.is_cuda and len(self.layer_devices()) == 1

    # Embedding and head have Hugging Face's names, and so its methods to get and to replace them fit.
    get_input_embeddings = LlamaForCausalLM.get_input_embeddings
    set_input_embeddings = LlamaForCausalLM.set_input_embeddings
    get_output_embeddings = LlamaForCausalLM.get_output_embeddings
    set_output_embeddings = LlamaForCausalLM.set_output_embeddings

    # Passes without a cache

    def without_adapters(self, *names: str) -> AbstractContextManager[None]:
        """Leave the named adapters ("lora_S", "lora_D") out inside this context."""
        return self.adapter_switch.without(*names)

    def merged(self) -> AbstractContextManager[None]:
        """Compute with the adapters merged into plain weights inside this context: for inference."""
        return self.adapter_switch.merged()

    def forward_shallow(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """layers[:k]: tokens `[B, T]` to exit states `[B, T, D]`.

        Args:
            input_ids: `[B, T]`.
            position_ids: `[B, T]`, negative at padding; None for 0…T-1.
        """
        hidden: Tensor = self.model.embed_tokens(input_ids)
        plan = plan_uncached(self.rotary, hidden, position_ids)
        for layer in self.model.layers[: self.exit_layer]:
            hidden = layer(hidden, plan)
        return hidden.to(plan.cos.device)

    def forward_deep(
        self, exit_hidden: Tensor, position_ids: Tensor | None = None, middle_layer: int = 0
    ) -> Tensor:
        """layers[k:] and the final norm: exit states `[B, T, D]` to what `lm_head` reads, `[B, T, D]`.

        With a middle layer the state after it, normed without a weight, stands beside that: `[B, T, 2 D]`.
        """
        plan = plan_uncached(self.rotary, exit_hidden, position_ids)
        hidden = exit_hidden
        found = []
        for index, layer in enumerate(self.model.layers[self.exit_layer :], start=self.exit_layer + 1):
            hidden = layer(hidden, plan)
            if index == middle_layer:
                found = [F.rms_norm(hidden.to(plan.cos.device), hidden.shape[-1:], eps=self.model.norm.eps)]
        normed: Tensor = self.model.norm(hidden.to(plan.cos.device))
        return torch.cat([normed, *found], dim=-1) if found else normed

    def forward_draft_or_large_model(
        self,
        in_tokens_small: Tensor | None = None,
        in_features_large: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """One half of the model, over the caches if a decoding is under way, else without a cache.

        Args:
            in_tokens_small: `[B, T]`, tokens for the shallow layers; or
            in_features_large: `[B, T, D]`, exit states for the deep layers.
            position_ids: `[B, T]`; over a cache the first one says where the pass starts, which rolls it back.

        Returns:
            `[B, T, D]`: exit states, or the deep layers' normed states.

        Raises:
            ValueError: unless exactly one input is given, or when positions would leave a gap in the cache.
        """
        if (in_tokens_small is None) == (in_features_large is None):
            raise ValueError("give exactly one of in_tokens_small and in_features_large")
        stages = self.past_key_values
        if in_tokens_small is not None:
            if stages is None:
                return self.forward_shallow(in_tokens_small, position_ids)
            return _continue(stages.shallow, in_tokens_small, position_ids).to(stages.dtype)
        assert in_features_large is not None
        if stages is None:
            return self.forward_deep(in_features_large, position_ids)
        return _continue(stages.deep, in_features_large, position_ids).to(stages.dtype)

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
            position_ids = unpadded_positions(attention_mask)
        hidden = self.model.embed_tokens(input_ids)
        plan = plan_uncached(self.rotary, hidden, position_ids)
        states = [hidden]  # hidden_states[0] is the embedding, hidden_states[k] the exit state
        for layer in self.model.layers:
            states.append(layer(states[-1], plan))
        states = [state.to(hidden.device) for state in states]
        states[-1] = self.model.norm(states[-1])
        return CausalLMOutputWithPast(
            logits=self.lm_head(states[-1]), hidden_states=tuple(states) if output_hidden_states else None
        )

    # Decoding

    @contextmanager
    def decoding(
        self,
        capacity: int,
        drafter: DrafterParts | None,
        target: str = "base",
        batch_size: int = 1,
        deterministic: bool = False,
        chains: int = 1,
    ) -> Iterator[Stages]:
        """Stages with empty caches for one decoding; inside this context they are `past_key_values`.

        On CUDA they are those of an earlier decoding if they fit, with the passes captured over them.

        Args:
            capacity: positions of a text.
            drafter: what drafts; None for the exit states alone.
            target: "base" or "adapted", as in `DecodeConfig`.
            batch_size: texts B.
            deterministic: as in `DecodeConfig`.
            chains: of drafts that a block may have, at most.
        """
        # Captured, capacities are powers of two, so that passes fit later texts; padding needs room of its own.
        if self.can_be_captured:
            capacity = view(capacity + PASS_ROWS, 1 << 62)
        elif deterministic or batch_size > 1 or chains > 1:
            capacity += PASS_ROWS  # room for padding
        with self.merged():
            stages = self.new_stages(capacity, drafter, target, batch_size, chains)
            if self.can_be_captured:
                stages = self._reused(stages)
            stages.passes.positions = PASS_ROWS if deterministic else 0
            self.past_key_values = stages
            try:
                yield stages
            finally:
                self.past_key_values = None

    def new_stages(
        self,
        capacity: int,
        drafter: DrafterParts | None = None,
        target: str = "base",
        batch_size: int = 1,
        chains: int = 1,
        few_rows: bool = True,
    ) -> Stages:
        """Stages with empty caches, their adapters as they are now; arguments as in `decoding`.

        Args:
            few_rows: as in `CachedLayer`; the stages are kept for texts to come while the weights stay the same.
        """
        where = (self.lm_head.weight.device, self.lm_head.weight.dtype)
        passes = Passes(where[0])
        like = self.model.norm.weight.to(states_dtype(*where, few_rows))
        k = self.exit_layer
        parts = drafter or DrafterParts(StageWeights([]), self.rotary, self.config)

        def stage(
            weights: StageWeights,
            of: EarlyExitLlamaForCausalLM | DrafterParts = self,
            window: int | None = None,
        ) -> Stage:
            devices = [layer.device for layer in weights.layers]
            cache = KVCache(of.config, devices, batch_size, capacity, like, window, chains)
            return Stage(weights, of.rotary, cache, passes)

        # What drafts in the shallow layers (lora_S) is no part of the verifier, unless the target is the adapted model.
        without = ("lora_S",) if target == "base" else ()
        base = stage(self._stage_weights(0, k, few_rows, without))
        deep = stage(self._stage_weights(k, self.config.num_hidden_layers, few_rows))
        shallow = base
        if drafter and target == "base":
            shallow = stage(drafter.shallow or self._stage_weights(0, k, few_rows))
        drafting = stage(parts.weights, parts, parts.window)
        feedback = Feedback(batch_size, like) if parts.weights.fuse else None
        four = (shallow, drafting, base, deep)
        used = [stage.weights for stage in four if stage.weights.layers]
        static = not (self.rotary.dynamic or parts.rotary.dynamic)
        passes.own_kernels = static and all(weights.fused for weights in used)
        passes.own_on_cpu = few_rows and on_own_cpu_kernels(*where)
        passes.own_prompt = self._own_prompt()
        return Stages(*four, passes, self.config.hidden_size, parts.draft_ids, feedback)

    def _own_prompt(self) -> int:
        """Tokens of a prompt that our own kernels on CUDA read, at most."""
        in_a_layer = sum(weight.numel() for weight in Weights([self.model.layers[-1]]).weights)
        return min(OWN_PROMPT, OWN_PROMPT_WORK // in_a_layer)

    def _stage_weights(
        self, first: int, stop: int, few_rows: bool, without: tuple[str, ...] = ()
    ) -> StageWeights:
        """layers[first:stop] without some adapters, with the embedding or with final norm and head.

        For few rows they are kept while the weights last.
        """
        head_weight = self.lm_head.weight
        dtype = head_weight.dtype
        all_layers: list[Any] = list(self.model.layers)
        layers = all_layers[first:stop]  # to slice a list of modules takes a tenth of a millisecond

        def make() -> StageWeights:
            with self.without_adapters(*without):
                cached = [CachedLayer(layer, dtype, few_rows) for layer in layers]
            if first == 0:
                return StageWeights(cached, embed=self.model.embed_tokens)
            head = product(head_weight) if few_rows else self.lm_head
            norm = rms_norm(self.model.norm, states_dtype(head_weight.device, dtype, few_rows))
            return StageWeights(cached, norm=norm, head=head, head_weight=head_weight)

        if not few_rows:
            return make()
        name = f"{'deep' if first else 'shallow'} layers without {without}"
        adapters = self.adapter_switch.modules
        if name not in self._used or not self._used[name].are_in(layers, adapters):
            with self.without_adapters(*without):
                self._used[name] = Weights(layers, adapters)
        used = self._used[name]
        outside = [self.model.embed_tokens.weight, self.model.norm.weight, head_weight]
        beside = [used.names, *(norm.eps for norm in (*used.norms, self.model.norm))]
        return self._weights.get(name, [*used.weights, *outside], make, beside)

    def forget_weights(self) -> None:
        """Let decoding prepare all weights again. It notices changes itself, but for those in place through `.data`."""
        self._weights = MadeFromWeights()
        self._kept_stages.clear()

    def _reused(self, fresh: Stages) -> Stages:
        """The stages of an earlier decoding, emptied, if what was captured over them fits; else the fresh ones."""
        used = next((kept for kept in self._kept_stages if _shape(kept) == _shape(fresh)), fresh)
        if used is fresh:
            used.passes.graphs = CudaGraphs(self._capture_seconds)
        else:
            used.reset()
        # The last ones used, as many as there is room for.
        kept = [used, *(stages for stages in self._kept_stages if stages is not used)]
        within = sum(total <= KEPT_BYTES for total in accumulate(map(_cache_bytes, kept)))
        self._kept_stages[:] = kept[: max(1, min(within, KEPT_STAGES))]
        return used

    def spec_decode_step(self, texts: Sequence[Text], config: DecodeConfig) -> list[Verification | None]:
        """One step of `kangaroo.decoding.speculate.spec_decode_step` on the caches of the decoding under way.

        Raises:
            RuntimeError: outside `decoding()`.
        """
        if self.past_key_values is None:
            raise RuntimeError("decoding needs caches: call this inside `with model.decoding(...)`")
        return spec_decode_step(self.past_key_values, texts, config)


def _continue(stage: Stage, inputs: Tensor, position_ids: Tensor | None) -> Tensor:
    """Run a stage from the first position on, which rolls its cache back, or from where the cache ends.

    Raises:
        ValueError: when positions would leave a gap in the cache.
    """
    if position_ids is not None:
        start = int(position_ids[0, 0])
        filled = stage.cache.length
        if start > filled:
            raise ValueError(f"position {start} would leave a gap after the {filled} cached positions")
        stage.cache.truncate([start] * len(inputs))
    with torch.autocast(inputs.device.type, enabled=False):  # as in `Passes.run`
        return stage(inputs)


def _cache_bytes(stages: Stages) -> int:
    """Bytes of the keys and values of some stages."""
    caches = [*stages.caches(), *stages.one_row.values()]
    return sum(part.nbytes for cache in caches for part in cache.keys + cache.values)


def _shape(stages: Stages) -> list[tuple[int, int, int | None, int, int]]:
    """What captured passes depend on: the weights, and the shapes of the caches."""
    return [
        (id(one.weights), one.cache.capacity, one.cache.window, one.cache.batch_size, one.cache.chains)
        for one in (stages.shallow, stages.drafter, stages.base, stages.deep)
    ]
