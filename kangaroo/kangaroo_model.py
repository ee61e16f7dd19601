"""KangarooModel: the early-exit model together with its draft, and decoding with both."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kangaroo.adapter import AdapterModel, before
from kangaroo.decoding.blocks import DecodeConfig, Verification
from kangaroo.decoding.costs import StepCosts
from kangaroo.decoding.drafting import AdaptivePolicy, BlockPolicy, LookupIndex, Memory
from kangaroo.decoding.generate import Decoded, decode_texts, in_turns
from kangaroo.decoding.inputs import Ends, Ids, check_prompt, check_seeds, end_ids
from kangaroo.decoding.layers import (
    CachedLayer,
    Fuse,
    MadeFromWeights,
    Middle,
    Weights,
    product,
    rms_norm,
    states_dtype,
)
from kangaroo.decoding.speculate import Text
from kangaroo.decoding.stages import DrafterParts, Stages, StageWeights
from kangaroo.decoding.timing import measure_costs, now
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.published import read_published

HEADS = ("frozen", "full", "lora")
MIDDLE_MAP = "adapter_model.fuse_middle.weight"


@dataclass(frozen=True)
class DualLogits:
    """What `KangarooModel.forward` computes.

    Attributes:
        exit_logits: `[B, T, V']`, the draft's, float32.
        final_logits: `[B, T, V]`, the deep layers'.
    """

    exit_logits: Tensor
    final_logits: Tensor


class KangarooModel(nn.Module):
    """One Llama whose shallow layers draft: `softmax(exit_proj(exit_norm(drafter(h))))`.

    Trainable parts are float32 and compute in the base model's dtype. Fresh parts start from the base model:
    the drafter's layers are copies of base layers k, k + 1, …, `exit_norm` of the final norm, `exit_proj` of
    `lm_head`'s rows; with head "lora" these stay, and `head_down`, `head_up` add a low-rank change to them.

    Args:
        base_model_name_or_path: a loaded `EarlyExitLlamaForCausalLM`, or a folder or hub id of one.
        adapter_model_path: a folder with `drafter.safetensors`; or a published Kangaroo adapter's (`config.json`
            and weights, see `read_published`), which is the drafter whatever `args` say of one, while the exit head
            stays as they say; or None for a fresh drafter.
        args: `drafter` ("none", "adapter", "layer"), `drafter_layers`, `adapter_window`, `feedback`, `recurrent`,
            `head` ("frozen", "full", "lora"), `head_rank` and `draft_vocab` (vocabulary ids that the exit head covers,
            or None for all); what is missing takes its default.
        EARLY_STOP_LAYER: k.
    """

    int8_draft = False
    """Whether on a CPU the exit head drafts in 8 bits, which is faster; see `with_int8_draft`."""

    def __init__(
        self,
        base_model_name_or_path: EarlyExitLlamaForCausalLM | str | Path,
        adapter_model_path: str | Path | None = None,
        args: Namespace | None = None,
        EARLY_STOP_LAYER: int = 2,  # noqa: N803
    ) -> None:
        super().__init__()
        base = base_model_name_or_path
        if not isinstance(base, EarlyExitLlamaForCausalLM):
            base = EarlyExitLlamaForCausalLM.from_pretrained(str(base))
        base.set_exit_layer(EARLY_STOP_LAYER)
        base.requires_grad_(False).eval()
        self.base_model = base
        self._weights: MadeFromWeights[StageWeights] = MadeFromWeights()
        self._costs: StepCosts | None = None
        self._policies: dict[DecodeConfig, AdaptivePolicy] = {}
        self.adapter_model = self._new_adapter(args)
        draft_vocab: Sequence[int] | None = getattr(args, "draft_vocab", None)
        self.head = getattr(args, "head", "frozen")
        if self.head not in HEADS:
            raise ValueError(f"head is {self.head!r}; expected one of {', '.join(HEADS)}")
        weight = self.head_model.weight.detach()
        ids = None
        if draft_vocab is not None:
            ids = torch.as_tensor(list(draft_vocab), dtype=torch.long, device=weight.device)
        self.draft_ids: Tensor | None
        self.register_buffer("draft_ids", ids)
        rows = weight if ids is None else weight[ids]
        self.head_rows: Tensor
        self.register_buffer("head_rows", rows, persistent=False)
        # The weight is set below; on "meta" no memory is spent on one that is thrown away.
        self.exit_proj = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        is_trained = self.head == "full"
        head_weight = rows.clone().float() if is_trained else rows
        self.exit_proj.weight = nn.Parameter(head_weight, requires_grad=is_trained)
        if self.head == "lora":
            rank = getattr(args, "head_rank", 64)
            width = rows.shape[1]
            self.head_down = nn.Parameter(torch.randn(rank, width, device=weight.device) / width**0.5)
            self.head_up = nn.Parameter(torch.zeros(len(rows), rank, device=weight.device))
        self._start_from_base()
        if adapter_model_path is not None:
            self.load_drafter(adapter_model_path)

    @property
    def head_model(self) -> nn.Linear:
        """The verifier's head, `lm_head`."""
        return self.base_model.lm_head

    @property
    def feedback(self) -> bool:
        """Whether drafts read the verifier's last state of the position before; then they depend on their depth."""
        return self.adapter_model.fuse is not None

    @property
    def recurrent(self) -> bool:
        """Whether later drafts of a block read embeddings in place of exit states."""
        return self.adapter_model.fuse_later is not None

    @property
    def middle_layer(self) -> int:
        """The layer of the verifier whose state drafts also read; 0 for none."""
        return self.adapter_model.middle_layer

    @property
    def exit_norm(self) -> nn.RMSNorm:
        """The norm between drafter and exit head."""
        return self.adapter_model.norm

    def _new_adapter(self, args: Namespace | None) -> AdapterModel:
        """A fresh drafter."""
        base = self.base_model
        middle_layer = getattr(args, "middle_layer", 0)
        count = base.config.num_hidden_layers
        if middle_layer and not base.exit_layer < middle_layer < count:
            expected = f"expected 0, or above exit_layer {base.exit_layer} and below {count}"
            raise ValueError(f"middle_layer is {middle_layer}; {expected}")
        return AdapterModel(
            base.config,
            getattr(args, "drafter", "none"),
            getattr(args, "adapter_window", 64),
            getattr(args, "drafter_layers", 1),
            getattr(args, "feedback", False),
            getattr(args, "recurrent", False),
            middle_layer,
        )

    def _start_from_base(self) -> None:
        """Copy norm and layers of the base model into the drafter, in float32 on its device."""
        base = self.base_model
        self.adapter_model.norm.load_state_dict(base.model.norm.state_dict())
        for index, layer in enumerate(self.adapter_model.layers, start=base.exit_layer):
            source = base.model.layers[min(index, base.config.num_hidden_layers - 1)].state_dict()
            # A linear layer that carries LoRA keeps its own weight under another name.
            plain = {name.replace(".base_layer", ""): value for name, value in source.items()}
            layer.load_state_dict(plain, strict=False)  # what the drafter's layer lacks is left out
        self.adapter_model.to(device=base.model.norm.weight.device, dtype=torch.float32)
        if self.draft_ids is not None:
            self._set_draft_index()

    def _set_draft_index(self) -> None:
        """The exit head's row of each vocabulary id, -1 where it has none."""
        assert self.draft_ids is not None
        index = self.draft_ids.new_full((self.head_model.weight.shape[0],), -1)
        index[self.draft_ids] = torch.arange(len(self.draft_ids), device=index.device)
        self._draft_index: Tensor
        self.register_buffer("_draft_index", index, persistent=False)

    def drafter_state(self) -> dict[str, Tensor]:
        """What `drafter.safetensors` holds: drafter, exit norm, exit head and draft vocabulary where they are ours."""
        state: dict[str, Tensor] = self.adapter_model.state_dict(prefix="adapter_model.")
        if self.head == "full":
            state["exit_proj.weight"] = self.exit_proj.weight
        if self.head == "lora":
            state["head_down"] = self.head_down
            state["head_up"] = self.head_up
        if self.draft_ids is not None:
            state["draft_ids"] = self.draft_ids
        return {key: value.detach().contiguous() for key, value in state.items()}

    def load_drafter(self, folder: str | Path, to_start: bool = False) -> None:
        """Load `drafter.safetensors` of `folder`, or where it has none the published Kangaroo adapter there.

        A published adapter replaces `adapter_model`, so load it before an optimizer holds the drafter's parameters.

        Args:
            folder: the folder.
            to_start: for a training to go on from; a drafter that reads no middle state can begin to.

        Raises:
            ValueError: if it does not fit this model.
        """
        path = Path(folder) / "drafter.safetensors"
        if not path.exists():  # the published layout has other names
            adapter = read_published(path.parent, self.base_model.config.hidden_size)
            self.adapter_model = adapter.to(self.head_model.weight.device)
            return
        state = load_file(path)
        own = self.drafter_state()
        if to_start and MIDDLE_MAP in own:
            state.setdefault(MIDDLE_MAP, own[MIDDLE_MAP])
        if set(state) != set(own):
            raise ValueError(f"{folder}: the drafter holds {sorted(state)}, this model expects {sorted(own)}")
        for key, value in own.items():
            loaded = state[key]
            if loaded.shape != value.shape or loaded.is_complex():
                raise ValueError(
                    f"{folder}: {key} is {list(loaded.shape)}, expected {list(value.shape)}, real"
                )
            value.copy_(loaded)
        if self.draft_ids is not None:  # another draft vocabulary reads other rows of the head
            self.head_rows.copy_(self.head_model.weight[self.draft_ids])
            self._set_draft_index()

    def draft_with(self, other: EarlyExitLlamaForCausalLM) -> None:
        """Let a whole model draft, from the tokens alone; it becomes the drafter, and its head the exit head.

        Args:
            other: of any shape, changed in place. Its tokens are this model's. Rows that only its vocabulary has are
                cut off, so that they are never drafted; its embedding of tokens that it lacks is 0.
        """
        weight = self.head_model.weight
        rows = len(weight)
        embedding = other.model.embed_tokens
        missing = rows - len(embedding.weight)
        if missing:
            other.lm_head.weight = nn.Parameter(other.lm_head.weight[:rows])
            embedding.weight = nn.Parameter(F.pad(embedding.weight, (0, 0, 0, missing)))
        other.requires_grad_(False).eval()
        drafter = AdapterModel(other.config, "none", None)
        drafter.layers = other.model.layers
        drafter.norm = other.model.norm
        drafter.embed_tokens = embedding
        self.adapter_model = drafter
        self.head = "frozen"
        self.exit_proj = other.lm_head
        covered = len(other.lm_head.weight)
        self.head_rows = weight.detach()[:covered]
        self.draft_ids = None
        if covered < rows:
            self.draft_ids = torch.arange(covered, device=weight.device)
            self._set_draft_index()

    # The draft policy

    def drafter_parts(self) -> DrafterParts:
        """What decoding drafts with: the weights as they are now, in the base model's dtype."""
        head = [self.exit_proj.weight, self.head_rows]
        if self.head == "lora":
            head += [self.head_down, self.head_up]
        adapter = self.adapter_model
        layers = [*Weights([adapter]).weights, self._embeddings()]
        how = [float(self.int8_draft)]
        kept = self._weights.get

        def make() -> StageWeights:
            # An update may have changed one of the two alone.
            drafter = kept("drafter layers", layers, self._fused_drafter)
            exit_head = kept("exit head", head, self._merged_head, how)
            return replace(drafter, head=exit_head.head, head_weight=exit_head.head_weight)

        weights = kept("drafter", [*layers, *head], make, how)
        shallow = None
        if adapter.embed_tokens is not None:
            embed = adapter.embed_tokens
            shallow = kept("embedding", [embed.weight], lambda: StageWeights([], embed=embed))
        return DrafterParts(weights, adapter.rotary, adapter.config, adapter.window, self.draft_ids, shallow)

    def _fused_drafter(self) -> StageWeights:
        """Drafter and exit norm for decoding."""
        dtype = self.head_rows.dtype
        adapter = self.adapter_model
        layers = [CachedLayer(layer, dtype) for layer in adapter.layers]  # type: ignore[arg-type]
        weights = StageWeights(
            layers, norm=rms_norm(self.exit_norm, states_dtype(self.head_rows.device, dtype))
        )
        if adapter.fuse:
            weights.fuse = Fuse(adapter.fuse.weight.detach().to(dtype))
        if adapter.fuse_later:
            weights.fuse_later = Fuse(adapter.fuse_later.weight.detach().to(dtype), self._embeddings())
        if adapter.fuse_middle:
            from_middle = product(adapter.fuse_middle.weight.detach().to(dtype))
            weights.middle = Middle(self.middle_layer, from_middle, self.base_model.model.norm.eps)
        return weights

    @contextmanager
    def with_int8_draft(self, wanted: bool) -> Iterator[None]:
        """Decode with `int8_draft` as wanted, with step costs and policies of its own."""
        before = (self.int8_draft, self._costs, self._policies)
        if wanted != self.int8_draft:
            self.int8_draft, self._costs, self._policies = wanted, None, {}
        try:
            yield
        finally:
            self.int8_draft, self._costs, self._policies = before

    def _embeddings(self) -> Tensor:
        """`[V, D]`."""
        weight: Tensor = self.base_model.model.embed_tokens.weight
        return weight.detach()

    def _merged_head(self) -> StageWeights:
        """The exit head for decoding, a low-rank change merged."""
        head = self.exit_proj.weight.float()
        if self.head == "lora":
            head = torch.addmm(head, self.head_up, self.head_down)
        head = head.to(self.head_rows.dtype)
        return StageWeights([], head=product(head, int8=self.int8_draft), head_weight=head)

    def drafter_depths(
        self,
        tokens: Tensor,
        exit_hidden: Tensor,
        verifier_hidden: Tensor,
        depths: int,
        later: Tensor | None = None,
    ) -> list[Tensor]:
        """What the exit head reads for the first, second, … draft of a block at every position of a verified text.

        Args:
            tokens: `[B, T]`.
            exit_hidden: `[B, T, D]`.
            verifier_hidden: `[B, T, D]`, the verifier's normed states, lora_S off; only read with feedback. With a
                middle layer `[B, T, 2 D]`, see `EarlyExitLlamaForCausalLM.forward_deep`.
            depths: drafts of a block.
            later: `[B, R]`, where later drafts are made, see `AdapterModel.forward_unrolled`.

        Returns:
            `[B, T, D]` for each depth, with gradients, `[B, R, D]` for later ones if `later` is given; without feedback
            all depths are the same, and there is one.
        """
        if self.adapter_model.embed_tokens is not None:
            exit_hidden = self.adapter_model.embed_tokens(tokens)
        if not self.feedback:
            return [self.drafter_states(exit_hidden)]
        dtype = exit_hidden.dtype
        with torch.autocast(exit_hidden.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            weight = self.exit_norm.weight
            feedback = before(self.adapter_model.fed_back(verifier_hidden.to(weight.dtype)))
            exits = exit_hidden.to(weight.dtype)
            embeddings = None
            if self.recurrent:
                embeddings = self.base_model.model.embed_tokens(tokens).to(weight.dtype)
            states = self.adapter_model.forward_unrolled(exits, feedback, depths, embeddings, later)
        return [state.to(dtype) for state in states]

    def drafter_states(self, exit_hidden: Tensor) -> Tensor:
        """Exit states `[B, T, D]` to what the exit head reads, `[B, T, D]`, with gradients; without feedback."""
        dtype = exit_hidden.dtype
        if not len(self.adapter_model.layers):
            # Without drafter layers the norm is all there is; it computes in the base model's dtype.
            weight = self.exit_norm.weight.to(dtype)
            return F.rms_norm(exit_hidden, (exit_hidden.shape[-1],), weight, self.exit_norm.eps)
        # Drafter weights are float32 and compute in the base model's dtype.
        with torch.autocast(exit_hidden.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            inputs = exit_hidden.to(self.exit_norm.weight.dtype)
            return self.adapter_model.forward_early_stop(inputs).to(dtype)

    def head_logits(self, states: Tensor, exact: bool = True) -> Tensor:
        """`[…, D]` to the draft's logits `[…, V']`, with gradients; in float32, or as they were computed."""
        logits = F.linear(states, self.exit_proj.weight.to(states.dtype))
        if self.head == "lora":  # (W + U D) x, without building W + U D at every step
            logits = logits + F.linear(
                F.linear(states, self.head_down.to(states.dtype)), self.head_up.to(states.dtype)
            )
        return logits.float() if exact else logits

    def token_ids(self, draft_index: Tensor) -> Tensor:
        """Vocabulary ids of rows of the exit head."""
        return draft_index if self.draft_ids is None else self.draft_ids[draft_index]

    def draft_index(self, token_ids: Tensor) -> Tensor:
        """Rows of the exit head for vocabulary ids; -1 for ids that it does not cover."""
        return token_ids if self.draft_ids is None else self._draft_index[token_ids]

    def verifier_logits(self, verifier_hidden: Tensor) -> Tensor:
        """The verifier's float32 logits over the draft's tokens, `[…, D]` to `[…, V']`."""
        return F.linear(verifier_hidden, self.head_rows).float()

    @torch.no_grad()
    def verifier_normalizer(self, verifier_hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-sum-exp `[N]` of the verifier's logits over all tokens at a temperature, from its states `[N, D]`."""
        parts = torch.split(verifier_hidden, 1024)  # all logits at once would take gigabytes
        return torch.cat([(self.head_model(part).float() / temperature).logsumexp(dim=-1) for part in parts])

    def forward(self, input_ids: Tensor, detach_exit: bool = False) -> DualLogits:
        """Both heads over a whole sequence, for training.

        Args:
            input_ids: `[B, T]`, padded on the right if at all.
            detach_exit: cut the deep layers' gradient off the shallow ones (shallow-gradient training).
        """
        exit_hidden = self.base_model.forward_shallow(input_ids)
        exits = exit_hidden.detach() if detach_exit else exit_hidden
        found = self.base_model.forward_deep(exits, middle_layer=self.middle_layer)
        final = found[..., : exits.shape[-1]]
        states = self.drafter_depths(input_ids, exit_hidden, found.detach(), 1)[0]
        return DualLogits(self.head_logits(states), self.head_model(final))

    # Decoding

    def decoding(
        self,
        capacity: int,
        target: str = "base",
        batch_size: int = 1,
        deterministic: bool = False,
        chains: int = 1,
    ) -> AbstractContextManager[Stages]:
        """Stages with empty caches, this draft's among them; arguments as in `EarlyExitLlamaForCausalLM.decoding`.

        Raises:
            ValueError: for a target that this drafter cannot draft for.
        """
        if (self.feedback or self.adapter_model.embed_tokens) and target != "base":
            raise ValueError(f'target is {target!r}; a whole model or a drafter with feedback needs "base"')
        parts = self.drafter_parts()
        return self.base_model.decoding(capacity, parts, target, batch_size, deterministic, chains)

    def block_policy(self, config: DecodeConfig, batch_size: int = 1) -> BlockPolicy:
        """What decides on the blocks of a text: fixed, or by what earlier texts have shown.

        Several texts share each pass, so that a long block of one text is paid for by all: their blocks are fixed.
        """
        if not config.adaptive or not config.draft_len:  # nothing to choose from
            return BlockPolicy(config)
        if batch_size > 1:
            return BlockPolicy(replace(config, branches=0))
        if config not in self._policies:
            self._policies[config] = AdaptivePolicy(config, self.step_costs(config.draft_len))
        return self._policies[config]

    def step_costs(self, longest: int = 8) -> StepCosts:
        """What steps of one text cost here; measured once for blocks up to this length, in a second or two."""
        if self._costs is None or len(self._costs.verify) <= longest:
            self._costs = self.measure_costs(longest)
        return self._costs

    def share_costs(self, other: "KangarooModel") -> None:
        """Take what steps cost from another of the same model and draft, measured once for both."""
        self._costs = other._costs

    def measure_costs(
        self, longest: int = 8, repeats: int = 9, context: int = 128, rows: int = 1
    ) -> StepCosts:
        """Time blocks of all lengths after `context` tokens, in turn.

        Args:
            longest: drafts of a block, at most.
            repeats: rounds that count.
            context: tokens in the caches.
            rows: texts at once.
        """
        with self.decoding(context + longest + 2, batch_size=rows) as stages:
            return measure_costs(stages, longest, repeats, context)

    def now(self) -> float:
        """Seconds on the clock once the device has done its work."""
        return now(self.head_model.weight.device)

    @in_turns
    @torch.inference_mode(False)  # what is kept for later answers must outlive a caller's inference mode
    def decode_rows(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        settings: DecodeConfig,
        eos_ids: Ends = (),
        noise: Tensor | None = None,
        seed: int | Sequence[int] = 0,
        memory: Memory | None = None,
    ) -> Iterator[dict[int, Verification]]:
        """Decode prompts together, each advancing as far as its own drafts are accepted.

        Args:
            prompts: token ids, at least one each; lists or tensors, `[T]` or `[1, T]`.
            max_new_tokens: length limit of a response.
            settings: how to draft and verify.
            eos_ids: tokens that end a response, or one such token, or None.
            noise: uniform `[max_new_tokens]`, one number a position, for sampled drafts of greedy answers.
            seed: of what sampling draws, for all prompts or one each; a response does not depend on other prompts.
            memory: earlier texts to look up drafts in, for blocks that do not run ahead of the host.

        Yields:
            After each step what texts commit, by the prompt's index; nothing once they are over. First the prefill's.

        Raises:
            ValueError: as `check_prompt`, `check_seeds` and `decoding` do; for a limit that is no integer above 0, or
                logits that are not finite.
        """
        if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected an integer above 0")
        rows = [check_prompt(prompt, self.base_model) for prompt in prompts]
        if not rows:
            raise ValueError("there is no prompt; expected at least one")
        seeds = check_seeds(seed, len(rows))
        texts = []
        for prompt, text_seed in zip(rows, seeds, strict=True):
            policy = self.block_policy(settings, len(rows))
            text = Text(LookupIndex(prompt, memory), len(prompt) + max_new_tokens, policy, noise)
            if settings.temperature:
                text.seed(text_seed, max_new_tokens)
            texts.append(text)
        capacity = max(text.stop for text in texts)
        how = (settings.target, len(texts), settings.deterministic, settings.chains)
        with self.decoding(capacity, *how) as stages:
            yield from decode_texts(stages, texts, settings, end_ids(eos_ids))

    def decode_blocks(
        self,
        prompt: Ids,
        max_new_tokens: int,
        settings: DecodeConfig,
        eos_ids: Ends = (),
        noise: Tensor | None = None,
        seed: int | Sequence[int] = 0,
        memory: Memory | None = None,
    ) -> Iterator[Verification]:
        """Decode one prompt, yielding each verification as it is committed; the first one is the prefill's.

        Arguments and errors as in `decode_rows`.
        """
        decoding = self.decode_rows([prompt], max_new_tokens, settings, eos_ids, noise, seed, memory)
        with closing(decoding) as rows:
            for committed in rows:
                yield committed[0]

    def generate(
        self,
        prompt: Ids,
        max_new_tokens: int,
        settings: DecodeConfig,
        eos_ids: Ends = (),
        noise: Tensor | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Decoded:
        """Decode one prompt; arguments and errors as in `decode_rows`."""
        return self.generate_batch([prompt], max_new_tokens, settings, eos_ids, noise, seed)[0]

    def generate_batch(
        self,
        prompts: Sequence[Ids],
        max_new_tokens: int,
        settings: DecodeConfig,
        eos_ids: Ends = (),
        noise: Tensor | None = None,
        seed: int | Sequence[int] = 0,
    ) -> list[Decoded]:
        """Decode prompts together; arguments and errors as in `decode_rows`."""
        decoded = [Decoded([], []) for _ in prompts]
        for committed in self.decode_rows(prompts, max_new_tokens, settings, eos_ids, noise, seed):
            for index, verification in committed.items():
                decoded[index].tokens.extend(verification.committed)
                decoded[index].blocks.append(verification)
        return decoded
