"""KangarooModel: the early-exit model together with what drafts, and decoding with both."""

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kangaroo.adapter import AdapterModel, KVCache
from kangaroo.decoding.blocks import DecodeConfig, Verification
from kangaroo.decoding.costs import StepCosts, growing
from kangaroo.decoding.drafting import Chooser, Governor, LookupIndex, Scripted, Shared, Sharer
from kangaroo.decoding.fused import Stack, Stacks, can_stack
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM, Row
from kangaroo.published import read_published

HEADS = ("frozen", "full", "lora")


@dataclass(frozen=True)
class DualLogits:
    """What `KangarooModel.forward` computes.

    Attributes:
        exit_logits: `[B, T, V']`, the draft's, float32.
        final_logits: `[B, T, V]`, the deep layers'.
        exit_hidden: `[B, T, D]`, with gradient.
    """

    exit_logits: Tensor
    final_logits: Tensor
    exit_hidden: Tensor


@dataclass(frozen=True)
class Decoded:
    """One decoded response.

    Attributes:
        tokens: the response, its end-of-sequence token included if it came.
        blocks: one verification a block; the first is the prefill's, without drafts.
    """

    tokens: list[int]
    blocks: list[Verification]


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
        args: `drafter` ("none", "adapter", "layer"), `drafter_layers`, `adapter_window`, `head` ("frozen", "full",
            "lora"), `head_rank` and `draft_vocab` (vocabulary ids that the exit head covers, or None for all); what
            is missing takes its default.
        EARLY_STOP_LAYER: k.
    """

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
        self._stacks = Stacks()
        self._costs: dict[int, StepCosts] = {}
        self._governors: dict[tuple[DecodeConfig, int], Governor | Shared] = {}
        drafter = getattr(args, "drafter", "none")
        window, layers = getattr(args, "adapter_window", 64), getattr(args, "drafter_layers", 1)
        self.adapter_model = AdapterModel(base.config, drafter, window, layers)
        draft_vocab: Sequence[int] | None = getattr(args, "draft_vocab", None)
        self.head = getattr(args, "head", "frozen")
        if self.head not in HEADS:
            raise ValueError(f"head is {self.head!r}; expected one of {', '.join(HEADS)}")
        ids = None if draft_vocab is None else torch.as_tensor(list(draft_vocab), dtype=torch.long)
        self.draft_ids: Tensor | None
        self.register_buffer("draft_ids", ids)
        weight = self.head_model.weight.detach()
        self.head_rows: Tensor
        self.register_buffer("head_rows", weight if ids is None else weight[ids.to(weight.device)], persistent=False)
        self.exit_proj: nn.Linear = self._new_exit_proj()
        if self.head == "lora":
            rows, width = self.head_rows.shape
            rank = getattr(args, "head_rank", 64)
            self.head_down = nn.Parameter(torch.randn(rank, width, device=weight.device) / width**0.5)
            self.head_up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self._start_from_base()
        if adapter_model_path is not None:
            self.load_drafter(adapter_model_path)

    @property
    def head_model(self) -> nn.Linear:
        """The verifier's head, `lm_head`."""
        return self.base_model.lm_head

    @property
    def exit_norm(self) -> nn.RMSNorm:
        """The norm between drafter and exit head."""
        return self.adapter_model.norm

    def _new_exit_proj(self) -> nn.Linear:
        exit_proj = nn.Linear(self.head_rows.shape[1], self.head_rows.shape[0], bias=False, device="meta")
        if self.head == "full":
            exit_proj.weight = nn.Parameter(self.head_rows.detach().clone().float())
        else:
            exit_proj.weight = nn.Parameter(self.head_rows, requires_grad=False)
        return exit_proj

    def _start_from_base(self) -> None:
        base = self.base_model
        device = base.model.norm.weight.device
        self.adapter_model.norm.load_state_dict(base.model.norm.state_dict())
        for index, layer in enumerate(self.adapter_model.layers, start=base.exit_layer):
            source = base.model.layers[min(index, base.config.num_hidden_layers - 1)].state_dict()
            plain = {name.replace(".base_layer", ""): value for name, value in source.items()}  # LoRA may sit there
            layer.load_state_dict({name: plain[name] for name in layer.state_dict()})
        self.adapter_model.to(device=device, dtype=torch.float32)
        if self.draft_ids is not None:
            self.draft_ids = self.draft_ids.to(device)
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
        state = {f"adapter_model.{k}": v for k, v in self.adapter_model.state_dict().items()}
        if self.head == "full":
            state["exit_proj.weight"] = self.exit_proj.weight
        if self.head == "lora":
            state["head_down"], state["head_up"] = self.head_down, self.head_up
        if self.draft_ids is not None:
            state["draft_ids"] = self.draft_ids
        return {key: value.detach().contiguous() for key, value in state.items()}

    def load_drafter(self, folder: str | Path) -> None:
        """Load `drafter.safetensors` of `folder`, or where it has none the published Kangaroo adapter there.

        A published adapter replaces `adapter_model`, so load it before an optimizer holds the drafter's parameters.

        Raises:
            ValueError: if it does not fit this model.
        """
        path = Path(folder) / "drafter.safetensors"
        if not path.exists():
            adapter = read_published(path.parent, self.base_model.config.hidden_size)
            self.adapter_model = adapter.to(self.head_model.weight.device)
            return
        state = load_file(path)
        own = self.drafter_state()
        if set(state) != set(own):
            raise ValueError(f"{folder}: the drafter holds {sorted(state)}, this model expects {sorted(own)}")
        for key, value in own.items():
            if state[key].shape != value.shape or state[key].is_complex():
                raise ValueError(f"{folder}: {key} is {list(state[key].shape)}, expected {list(value.shape)}, real")
            value.copy_(state[key])
        if self.draft_ids is not None:
            self.head_rows.copy_(self.head_model.weight[self.draft_ids])
            self._set_draft_index()

    # The draft policy

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache of the drafter."""
        cache = self.adapter_model.new_cache(batch_size, capacity, self.head_rows)
        if can_stack(self.head_rows):
            parts = [*self.adapter_model.parameters(), self.exit_proj.weight, self.head_rows]
            parts += [self.head_down, self.head_up] if self.head == "lora" else []
            cache.stack = self._stacks.get("drafter", parts, self._stack)
        return cache

    def _stack(self) -> Stack:
        """Drafter and exit head for decoding, a low-rank change of the head added in."""
        head = self.exit_proj.weight.float()
        if self.head == "lora":
            head = head + self.head_up @ self.head_down
        return Stack(self.adapter_model.layers, self.head_rows.dtype, self.exit_norm, head)

    def drafter_states(self, exit_hidden: Tensor, cache: KVCache | None = None) -> Tensor:
        """Exit states `[B, T, D]` to what the exit head reads, `[B, T, D]`."""
        dtype = exit_hidden.dtype
        if cache is not None and cache.stack is not None:
            return self.adapter_model.forward_early_stop(exit_hidden, past_key_values=cache)
        if not len(self.adapter_model.layers):
            return F.rms_norm(
                exit_hidden, (exit_hidden.shape[-1],), self.exit_norm.weight.to(dtype), self.adapter_model.norm.eps
            )
        with torch.autocast(exit_hidden.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            own = exit_hidden.to(self.exit_norm.weight.dtype)
            return self.adapter_model.forward_early_stop(own, past_key_values=cache).to(dtype)

    def head_logits(self, states: Tensor, cache: KVCache | None = None) -> Tensor:
        """`[…, D]` to the draft's float32 logits `[…, V']`, by the cache's packed head if it has one."""
        if cache is not None and cache.stack is not None and cache.stack.head is not None:
            return cache.stack.head(states).float()
        logits = F.linear(states, self.exit_proj.weight.to(states.dtype))
        if self.head == "lora":
            logits = logits + F.linear(F.linear(states, self.head_down.to(states.dtype)), self.head_up.to(states.dtype))
        return logits.float()

    def token_ids(self, draft_index: Tensor) -> Tensor:
        """Vocabulary ids of rows of the exit head."""
        return draft_index if self.draft_ids is None else self.draft_ids[draft_index]

    def draft_index(self, token_ids: Tensor) -> Tensor:
        """Rows of the exit head for vocabulary ids; -1 for ids that it does not cover."""
        if self.draft_ids is None:
            return token_ids
        return self._draft_index[token_ids]

    def verifier_logits(self, verifier_hidden: Tensor) -> Tensor:
        """The verifier's float32 logits over the draft's tokens, `[…, D]` to `[…, V']`."""
        return F.linear(verifier_hidden, self.head_rows).float()

    def forward(self, input_ids: Tensor, detach_exit: bool = False) -> DualLogits:
        """Both heads over a whole sequence, for training.

        Args:
            input_ids: `[B, T]`, padded on the right if at all.
            detach_exit: cut the deep layers' gradient off the shallow ones (shallow-gradient training).
        """
        exit_hidden = self.base_model.forward_shallow(input_ids)
        exit_logits = self.head_logits(self.drafter_states(exit_hidden))
        final = self.base_model.forward_deep(exit_hidden.detach() if detach_exit else exit_hidden)
        return DualLogits(exit_logits, self.head_model(final), exit_hidden)

    # Decoding

    def chooser(self, settings: DecodeConfig, rows: int = 1) -> Chooser:
        """What decides on the blocks of one of so many texts: fixed, or by what earlier texts have shown."""
        if not settings.adaptive:
            return Chooser(settings)
        if (settings, rows) not in self._governors:
            costs = self.step_costs(settings.draft_len, rows)
            self._governors[settings, rows] = Governor(settings, costs) if rows == 1 else Shared(settings, costs)
        found = self._governors[settings, rows]
        return Sharer(settings, found) if isinstance(found, Shared) else found

    def step_costs(self, longest: int = 8, rows: int = 1) -> StepCosts:
        """What steps of so many rows cost here; measured once for blocks up to this length, in a second or two."""
        if rows not in self._costs or len(self._costs[rows].verify) <= longest:
            self._costs[rows] = self.measure_costs(longest, rows=rows)
        return self._costs[rows]

    def measure_costs(self, longest: int = 8, repeats: int = 9, context: int = 128, rows: int = 1) -> StepCosts:
        """Time blocks behind `context` tokens, all lengths in turn.

        The costs are medians, and the nearest to them that grow: noise must not make a longer block look cheaper.

        Args:
            longest: drafts of a block.
            repeats: rounds; two more go before them uncounted.
            context: tokens in the caches.
            rows: texts at once.
        """
        base, how = self.base_model, DecodeConfig(longest)
        verify: list[list[float]] = [[] for _ in range(longest + 1)]
        drafted: list[float] = []
        text = LookupIndex([token % 7 for token in range(context + 1)])

        def timed(learned: int, looked_up: int) -> float:
            caches.roll_back(context)
            script = Scripted(learned, text.tokens[:looked_up])
            began = self.now()
            base.spec_decode_step([Row(text, context + longest + 2, script)] * rows, self, how)
            return 1e3 * (self.now() - began)

        with base.decoding(context + longest + 2, self, "base", rows) as caches:
            prompt = LookupIndex(text.tokens[:-1])
            base.spec_decode_step([Row(prompt, context + 1, Scripted(0))] * rows, self, how)
            for turn in range(repeats + 2):
                times = [timed(0, count) for count in range(longest + 1)]
                timed(1, 0)  # brings the draft's caches up to the context
                drafting = (timed(longest, 0) - times[-1]) / longest
                if turn > 1:
                    drafted.append(drafting)
                    for kept, time_ in zip(verify, times, strict=True):
                        kept.append(time_)
        return StepCosts(growing([median(times) for times in verify]), max(0.0, median(drafted)))

    def now(self) -> float:
        """Seconds on the clock once the device has done what it was given."""
        if self.head_model.weight.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def decode_rows(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        settings: DecodeConfig,
        eos_ids: Sequence[int] = (),
        noise: Tensor | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Iterator[dict[int, Verification]]:
        """Decode prompts together, each row going on as far as its own drafts are accepted.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: length limit of a response, at least 1.
            settings: how to draft and verify.
            eos_ids: tokens that end a response.
            noise: uniform `[max_new_tokens]`, one number a response position, for sampled drafts; drawn if the answer
                is sampled, too, and none is given.
            seed: of what sampling draws, for all prompts or one each; what stands beside a prompt changes nothing.

        Yields:
            After each pass, what every row that is not over commits, by the prompt's index. The first ones are the
            prefill's.

        Raises:
            ValueError: for an empty prompt, a limit below 1, or logits that are not finite.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("the prompt is empty; expected at least one token")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        rows = {}
        for at, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seeds[at]) if settings.temperature else None
            own = torch.rand(max_new_tokens, generator=generator) if generator and settings.draft_temperature else None
            chooser, text = self.chooser(settings, len(prompts)), LookupIndex(prompt)
            rows[at] = Row(text, len(prompt) + max_new_tokens, chooser, own if noise is None else noise, generator)
        capacity = max(row.stop for row in rows.values())
        with self.base_model.decoding(capacity, self, settings.target, len(rows), settings.deterministic) as caches:
            while any(row.room for row in rows.values()):
                found = zip(rows, self.base_model.spec_decode_step(list(rows.values()), self, settings), strict=True)
                verdicts = {at: verdict.end_at(eos_ids) for at, verdict in found if verdict}
                yield verdicts
                for at, verdict in verdicts.items():
                    if verdict.start > rows[at].start:
                        rows[at].chooser.learn(verdict)
                    rows[at].text.extend(verdict.committed)
                    if verdict.committed[-1] in eos_ids:
                        rows[at].stop = 0
                over = [not row.room for row in rows.values()]
                if any(over) and not all(over) and not caches.replays:
                    caches.keep([place for place, gone in enumerate(over) if not gone])
                    rows = {at: row for at, row in rows.items() if row.room}

    def decode_blocks(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        settings: DecodeConfig,
        eos_ids: Sequence[int] = (),
        noise: Tensor | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Iterator[Verification]:
        """Decode one prompt, yielding each verification as it is committed; the first one is the prefill's.

        Arguments and errors as in `decode_rows`.
        """
        for verdicts in self.decode_rows([prompt], max_new_tokens, settings, eos_ids, noise, seed):
            yield verdicts[0]

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        settings: DecodeConfig,
        eos_ids: Sequence[int] = (),
        noise: Tensor | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Decoded:
        """Decode one prompt; arguments as in `decode_rows`."""
        return self.generate_batch([prompt], max_new_tokens, settings, eos_ids, noise, seed)[0]

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        settings: DecodeConfig,
        eos_ids: Sequence[int] = (),
        noise: Tensor | None = None,
        seed: int | Sequence[int] = 0,
    ) -> list[Decoded]:
        """Decode prompts together; arguments as in `decode_rows`."""
        decoded = [Decoded([], []) for _ in prompts]
        for verdicts in self.decode_rows(prompts, max_new_tokens, settings, eos_ids, noise, seed):
            for at, verdict in verdicts.items():
                decoded[at].tokens.extend(verdict.committed)
                decoded[at].blocks.append(verdict)
        return decoded
