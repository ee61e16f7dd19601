"""Training at scale: distil the verifier into the draft over cached greedy responses to prompts it wrote itself.

Every position of a greedy response has a verified prefix, so the verifier's logits there and the draft's follow from
two parallel passes; nothing is decoded twice, and one cached response serves any number of passes.
"""

import math
import random
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from dvirl.config import DraftSettings
from dvirl.data.sources import read_prompts
from dvirl.lora import attach_draft, shallow_parameters, train_only
from dvirl.losses import distillation_loss
from dvirl.models.drafters import export
from dvirl.models.loading import LoadedModel, load
from dvirl.rollout import Responses, response_index, verifier_states
from dvirl.runs import checkpoint, settings
from dvirl.runs import folder as run_folder
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import cut_log, log_line, read_metrics
from dvirl.runs.optim import Optimizers, cosine_rate
from dvirl.runs.settings import choice, number
from dvirl.scale.corpus import join, overlapping, read_shard, without_repeats, write_conversations, write_shard
from kangaroo.adapter import DRAFTERS
from kangaroo.kangaroo_model import HEADS, KangarooModel

SHARD = 16384
"""Conversations begun a shard."""


SORTED_TOGETHER = 16
"""Updates whose responses are drawn together and sorted by length, so that batches hold little padding."""


TEACHER_BATCHES = 8
"""Updates for which the verifier reads the responses in one pass."""


WIDTH_STEP = 64
"""On CUDA sequences are padded to a multiple of this, each width one captured graph."""


@dataclass(frozen=True)
class DistillConfig(DraftSettings):
    """Everything that a distillation depends on."""

    run_dir: str = "runs/distill"
    """Folder of this run: config.yaml, responses/, metrics.jsonl, checkpoints/, drafter/; if unfinished, it goes on."""
    exit_layer: int = number(2, 1, 1000)
    """k: layers[:k] draft, layers[k:] verify."""
    lora_rank: int = number(64, 1, 4096)
    """Rank of lora_S."""
    lora_alpha: float = number(64.0, 1e-9, 1e6)
    """The LoRA update is scaled by lora_alpha / lora_rank."""
    drafter: str = choice("layer", DRAFTERS)
    """Between exit state and exit head: none, adapter (Kangaroo's attention and norms), layer (a decoder layer)."""
    drafter_layers: int = number(2, 1, 64)
    """How many such layers, the first started from a copy of base layer k, the next from k + 1, and so on."""
    adapter_window: int = number(4096, 1)
    """Positions back that the drafter's own attention sees."""
    head: str = choice("lora", HEADS)
    """Exit head: full (a float32 copy of lm_head's rows, trained), lora (a low-rank change of them) or frozen."""

    responses_from: str = ""
    """Folder with another run's shards of responses; they are read there and none are written."""
    num_tokens: int = number(10_000_000, 1, 1e12)
    """Response tokens to write, before repeats and overlaps are dropped."""
    answer_tokens: int = number(128, 2)
    """Length limit of a response."""
    follow_up: float = number(0.25, 0, 1)
    """Share of answers that get a second turn and another answer."""
    write_batch: int = number(4096, 1, 65536)
    """Responses generated at once."""
    exclude: str = ""
    """Question files in Spec-Bench's schema, by commas: what shares a run of 13 tokens with a question is dropped."""
    passes: int = number(1, 1, 10_000)
    """Times that each response is learned from."""
    max_minutes: float = number(0.0, 0, 1e6)
    """Training stops by the clock, its schedules stretched over this time; 0 for no limit."""
    batch: int = number(16, 1, 65536)
    """Responses an update."""
    lr: float = number(4e-3, 0, 10)
    """AdamW rate at its highest; it grows over the warm-up and falls along a cosine to zero."""
    muon: float = number(2.0, 0, 100)
    """Rate of the drafter's matrices under Muon (Jordan et al. 2024) as a multiple of lr, matched to AdamW's update
    size; 0 trains them by AdamW like all else."""
    warmup_steps: int = number(200, 0)
    """Updates over which the rate grows from 0."""
    grad_clip: float = number(1.0, 1e-9)
    """Norm to which gradients are clipped."""
    ce_weight: float = number(0.0, 0, 1)
    """Share of cross-entropy to the verifier's token in the loss; the rest is KL to the verifier."""
    temperature: float = number(1.0, 1e-2, 100)
    """Of the verifier's distribution in the KL; below 1 sharpens it towards its argmax."""
    log_every: int = number(50, 1)
    """Updates between log lines."""
    checkpoint_every: int = number(2000, 1)
    """Updates between checkpoints, which fall on log lines; one is always written at the end."""


@dataclass(frozen=True)
class DistillResult:
    """What a finished run did, over all its starts.

    Attributes:
        written, write_s: response tokens generated, and the seconds that took; 0 if they are another run's.
        learned, train_s: response tokens learned from, and the seconds that took.
        steps: updates.
        agreement: the last log line's.
        memory_gb: highest memory use, of the accelerator if there is one.
        checkpoint, drafter: folders of the last checkpoint and of the drafter to ship.
    """

    written: int
    write_s: float
    learned: int
    train_s: float
    steps: int
    agreement: float
    memory_gb: float
    checkpoint: str
    drafter: str


class _Objective(nn.Module):
    """Loss and agreement as a function of tensors alone, in fixed shapes."""

    def __init__(self, model: KangarooModel, config: DistillConfig) -> None:
        super().__init__()
        self.model, self.temperature, self.ce_weight = model, config.temperature, config.ce_weight

    def forward(
        self, tokens: Tensor, at: Tensor, index: Tensor, verifier_hidden: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draft behind the chosen positions.

        Args:
            tokens: `[B, T]`.
            at: `[N]`, positions to draft behind, counted through all rows.
            index: `[N]`, the verifier's tokens there, as rows of the exit head.
            verifier_hidden: `[N, D]`, the states that it chose them from.
            weight: `[N]`, 0 at padding.
        """
        half = verifier_hidden.dtype == torch.bfloat16
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            states = self.model.drafter_states(self.model.base_model.forward_shallow(tokens))
            logits = self.model.head_logits(states.flatten(0, 1)[at])
        target = self.model.verifier_logits(verifier_hidden) / self.temperature
        agrees = (logits.detach().argmax(dim=-1) == index) * weight
        return distillation_loss(logits, target, index, weight, self.ce_weight), agrees.sum() / weight.sum()


class Distiller:
    """One distillation: its responses, its draft, its optimizer.

    Args:
        config: all settings.
        loaded: a freshly loaded model, which is changed in place; loaded by `config` if not given.

    Attributes:
        responses: what is learned from.
        left_out: rows that are not, by reason.
        model, peft_model: the model with its draft, and PEFT's view of it, which holds lora_S.
        step, tokens, skipped, wall_s: how far the run is; all of it is in every checkpoint.

    Raises:
        DvirlError: for settings that do not fit the model, or a run folder with other settings.
    """

    def __init__(self, config: DistillConfig, loaded: LoadedModel | None = None) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.loaded = loaded or load(config.model_name, config.dtype, config.device, config.chat_format)
        self.run_dir = Path(config.run_dir)
        self.log = self.run_dir / "metrics.jsonl"
        run_folder.claim(self.run_dir, config, self.loaded)
        self.responses, self.left_out = self._chosen(self._ready_responses())
        torch.manual_seed(config.seed)
        self.longest = int(self.responses.response_lens.max())
        self.peft_model, self.model = attach_draft(self.loaded.model, config, self.responses.response_tokens())
        self.parameters = shallow_parameters(self.model, config.lora_shallow)
        matrices = [parameter for parameter in self.model.adapter_model.parameters() if parameter.ndim == 2]
        self.optimizers = Optimizers(self.parameters, matrices if config.muon else [], config.muon)
        self.step, self.tokens, self.skipped, self.wall_s = 0, 0, 0, 0.0
        self._captured: dict[int, Any] = {}
        if (self.run_dir / "checkpoints").is_dir():
            self.load_checkpoint(checkpoint.newest(self.run_dir))

    def _ready_responses(self) -> Responses:
        """The run's responses, written as far as they are not on disk yet."""
        config = self.config
        if config.responses_from:
            paths = sorted(Path(config.responses_from).glob("shard-*.safetensors"))
            if not paths:
                given = config.responses_from
                raise DvirlError(f"responses_from is {given!r}; expected a folder of shard-*.safetensors")
            return join([read_shard(path) for path in paths])
        parts: list[Responses] = []
        with tqdm(total=config.num_tokens, desc="responses", unit="token", unit_scale=True) as bar:
            while (done := sum(part.num_tokens for part in parts)) < config.num_tokens:
                path = self.run_dir / "responses" / f"shard-{len(parts):05d}.safetensors"
                if not path.exists():
                    self._write_shard(path, len(parts), config.num_tokens - done)
                parts.append(read_shard(path))
                bar.update(parts[-1].num_tokens)
        return join(parts)

    def _write_shard(self, path: Path, index: int, wanted: int) -> None:
        """Write shard `index`: fewer conversations than usual where `wanted` tokens are few."""
        config, began = self.config, time.perf_counter()
        count = min(SHARD, max(8, 2 * wanted // config.answer_tokens))
        how = config.answer_tokens, config.follow_up, config.write_batch
        shard = write_conversations(self.loaded, count, config.seed * 1_000_003 + index, *how)
        write_shard(path, shard)
        figures = {"tokens": shard.num_tokens, "memory_gb": self._memory_gb(), "wall_s": time.perf_counter() - began}
        log_line(self.log, {"phase": "write", "shard": index, **figures})

    def _chosen(self, responses: Responses) -> tuple[Responses, dict[str, int]]:
        """The responses to learn from, and how many others there are: repeats, too short ones, excluded ones."""
        chosen = without_repeats(responses)
        left_out = {"repeats": len(responses) - len(chosen)}
        files = [path for path in self.config.exclude.split(",") if path]
        turns = [turn for path in files for prompt in read_prompts("spec_bench_turns", path) for turn in prompt.turns]
        questions = [self.loaded.chat.plain(turn) for turn in turns]
        overlaps = overlapping(chosen, questions, device=self.loaded.model.device)
        short = ~overlaps & (chosen.response_lens < 2)
        left_out |= {"too_short": int(short.sum()), "excluded": int(overlaps.sum())}
        if files:
            tqdm.write(f"left out {left_out['excluded']} responses that overlap {', '.join(files)}", file=sys.stderr)
        chosen = chosen.take((~overlaps & ~short).nonzero()[:, 0])
        if not len(chosen):
            raise DvirlError(f"none of {len(responses)} responses is left to learn from ({left_out})")
        return chosen, left_out

    # The loop

    def train(self) -> DistillResult:
        """Learn from all responses `passes` times or until `max_minutes` are over; log, and write what was learned.

        An update whose loss or gradient is not finite is left out, said with its step, and counted.
        """
        config, saved = self.config, self.step
        train_only(self.model, self.parameters)
        cut_log(self.log, self.step)
        counts = {"rows": len(self.responses), "tokens": self.responses.num_tokens, **self.left_out}
        log_line(self.log, {"phase": "start", "step": self.step, **counts})
        began, mark = time.perf_counter() - self.wall_s, (self.tokens, self.wall_s)
        window: list[tuple[Tensor, Tensor, Tensor]] = []
        batches = self.batches()
        with tqdm(total=self.num_steps, initial=self.step, unit="update") as bar:
            while self.progress < 1.0:
                window.append(self.update(*next(batches)))
                self.wall_s = time.perf_counter() - began
                bar.update()
                if self.step % config.log_every and self.progress < 1.0:
                    continue
                metrics = self._metrics(window, mark, began)
                log_line(self.log, metrics)
                bar.set_postfix_str(f"agreement {metrics['agreement']:.3f}, {metrics['tok_per_s']:,.0f} tok/s")
                window, mark = [], (self.tokens, self.wall_s)
                if self.step - saved >= config.checkpoint_every:
                    self.save_checkpoint()
                    saved = self.step
        return self._finish()

    def _finish(self) -> DistillResult:
        """Write the last checkpoint and the drafter; sum up the log."""
        folder, drafter = self.save_checkpoint(), self.run_dir / "drafter"
        table = read_metrics(self.log)
        written = table[table.phase == "write"]
        result = DistillResult(
            written=int(written.tokens.sum()),
            write_s=float(written.wall_s.sum()) if len(written) else 0.0,
            learned=self.tokens,
            train_s=self.wall_s,
            steps=self.step,
            agreement=float(table[table.phase == "train"].agreement.iloc[-1]),
            memory_gb=float(table.memory_gb.max()),
            checkpoint=str(folder),
            drafter=str(drafter),
        )
        made = {**asdict(result), **self.left_out}
        export(drafter, self.peft_model, self.model, self.config, self.loaded, **made)
        return result

    def _memory_gb(self) -> float:
        """Highest memory use so far, of the accelerator if there is one."""
        cuda = self.loaded.model.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e9

    @property
    def num_steps(self) -> int:
        """Updates of the whole run, if the clock does not end it before."""
        return self.config.passes * math.ceil(len(self.responses) / self.config.batch)

    @property
    def progress(self) -> float:
        """Share of the run that is done, by updates or by the clock."""
        by_clock = self.wall_s / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0
        return min(1.0, max(self.step / self.num_steps, by_clock))

    def batches(self) -> Iterator[tuple[Responses, Tensor]]:
        """From the next update on: responses, tokens on the device, and the verifier's states `[B, T, D]` on them."""
        config, size = self.config, self.config.batch
        per_pass = math.ceil(len(self.responses) / size)
        for number_ in range(self.step // per_pass, config.passes):
            groups = torch.split(self._order(number_), TEACHER_BATCHES * size)
            passed, begun = divmod(self.step - number_ * per_pass, TEACHER_BATCHES)
            for rows in groups[passed:]:
                group = self.responses.take(rows)
                tokens = group.tokens.to(self.loaded.model.device)
                states = verifier_states(self.loaded.model, tokens, ["lora_S"])
                for start in range(begun * size, len(rows), size):
                    part = slice(start, start + size)
                    yield Responses(tokens[part], group.prompt_lens[part], group.response_lens[part]), states[part]
                begun = 0

    def _order(self, number_: int) -> Tensor:
        """All rows in the random order of a pass, sorted by length within every few updates."""
        seed = random.Random(f"{self.config.seed}/{number_}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.responses), generator=generator)
        lengths = self.responses.prompt_lens + self.responses.response_lens
        parts = [part[lengths[part].argsort()] for part in torch.split(order, SORTED_TOGETHER * self.config.batch)]
        groups = [group for part in parts[:-1] for group in torch.split(part, TEACHER_BATCHES * self.config.batch)]
        shuffle = torch.randperm(len(groups), generator=generator).tolist()
        return torch.cat([*(groups[i] for i in shuffle), *parts[-1:]])

    def update(self, batch: Responses, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One update on some responses, left out if it is not finite; its loss, agreement and gradient norm."""
        loss, agreement = self.objective(*self._positions(batch, states, states.is_cuda))
        self.optimizers.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_grad_norm_(self.parameters, self.config.grad_clip)
        if bool((loss + norm).isfinite()):
            self.optimizers.step(self.lr)
        else:
            self.skipped += 1
            tqdm.write(f"step {self.step + 1}: loss or gradient is not finite; the update is left out", file=sys.stderr)
        self.step += 1
        self.tokens += int((batch.response_lens - 1).sum())
        return loss.detach(), agreement, norm

    def _positions(self, batch: Responses, states: Tensor, padded: bool) -> tuple[Tensor, ...]:
        """What the objective asks for; for CUDA padded to one of a few shapes, so that each is captured once."""
        rows, positions = response_index(batch.prompt_lens, batch.response_lens)
        before = batch.prompt_lens[rows] + positions - 1
        tokens, count = batch.tokens, len(rows)
        if padded:
            count = self.config.batch * (self.longest - 1)
            missing, ragged = self.config.batch - len(tokens), -tokens.shape[1] % WIDTH_STEP
            tokens, states = F.pad(tokens, (0, ragged, 0, missing)), F.pad(states, (0, 0, 0, ragged, 0, missing))
        at, weight = torch.zeros(count, dtype=torch.long), torch.zeros(count)
        at[: len(rows)], weight[: len(rows)] = rows * tokens.shape[1] + before, 1.0
        at, weight = at.to(tokens.device), weight.to(tokens.device)
        index = self.model.draft_index(tokens.flatten()[at + 1].long())
        return tokens, at, index, states.flatten(0, 1)[at], weight

    def objective(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """`_Objective` of these inputs, replayed from a CUDA graph of their shape where there is CUDA."""
        width = inputs[0].shape[1]
        if width not in self._captured:
            objective: Any = _Objective(self.model, self.config)
            if inputs[0].is_cuda:
                objective = torch.cuda.make_graphed_callables(objective, inputs, allow_unused_input=True)
            self._captured[width] = objective
        loss, agreement = self._captured[width](*inputs)
        return loss, agreement

    @property
    def lr(self) -> float:
        """The rate of the next update."""
        return cosine_rate(self.config.lr, self.step + 1, self.config.warmup_steps, self.progress, floor=0.0)

    def _metrics(
        self, window: list[tuple[Tensor, Tensor, Tensor]], mark: tuple[int, float], began: float
    ) -> dict[str, Any]:
        """The log line of the updates in `window`, since the tokens and seconds in `mark`; the device is waited for.

        Other lines of the log have the phases "write" (one a shard: its tokens, and the wall_s it took) and "start"
        (one a start of training: the step it goes on from, the rows and tokens learned from, and the rows left out).

        Returns:
            phase: "train".
            step: updates so far.
            tokens: response tokens learned from so far.
            loss: what was minimised, nats a token, mean over the window, of updates that were not left out.
            agreement: share of positions where the draft's argmax was the verifier's token, before the update, mean.
            lr, grad_norm: of the last update, the norm before clipping.
            skipped: updates left out so far because a loss or gradient was not finite.
            tok_per_s: response tokens learned from over wall seconds, in the window.
            memory_gb: highest memory use so far, of the accelerator if there is one.
            wall_s: seconds of training so far.
        """
        loss, agreement, norm = (torch.stack(values) for values in zip(*window, strict=True))
        self.wall_s = time.perf_counter() - began
        return {
            "phase": "train",
            "step": self.step,
            "tokens": self.tokens,
            "loss": float(loss[(loss + norm).isfinite()].mean()),
            "agreement": float(agreement.mean()),
            "lr": self.optimizers.lr,
            "grad_norm": float(norm[-1]),
            "skipped": self.skipped,
            "tok_per_s": (self.tokens - mark[0]) / (self.wall_s - mark[1]),
            "memory_gb": self._memory_gb(),
            "wall_s": self.wall_s,
        }

    # State

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of the run as it stands; return its folder."""
        numbers: dict[str, Any] = {name: getattr(self, name) for name in ("step", "tokens", "skipped", "wall_s")}
        state = {"tensors": self.optimizers.tensors(), "numbers": numbers}
        return checkpoint.save(self.run_dir, self.step, self.peft_model, self.model, state)

    def load_checkpoint(self, folder: Path) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            DvirlError: if it is incomplete or belongs to another model or settings.
        """
        state = checkpoint.load(folder, self.peft_model, self.model)
        self.optimizers.load(state["tensors"])
        for name, value in state["numbers"].items():
            setattr(self, name, value)


parse_args = partial(
    settings.parse_args, DistillConfig, "dvirl distill", "Train a draft at scale, on self-written text."
)
"""Settings from flags; see `settings.parse_args`."""


def main(args: Namespace | DistillConfig) -> DistillResult:
    """Train or go on training; print what it took and where the results are.

    Raises:
        DvirlError: as `Distiller` does.
    """
    config = settings.from_namespace(DistillConfig, args)
    result = Distiller(config).train()
    done = {"written": (result.written, result.write_s), "learned from": (result.learned, result.train_s)}
    for verb, (tokens, seconds) in done.items():
        if tokens:
            print(f"{verb}: {tokens:,} tokens in {seconds:,.1f} s, {tokens / seconds:,.0f} tokens/s")
    print(f"agreement: {result.agreement:.3f} over the last {config.log_every} of {result.steps} updates")
    print(f"memory: {result.memory_gb:.2f} GB at most\nlog: {config.run_dir}/metrics.jsonl")
    print(f"checkpoint: {result.checkpoint}\ndrafter: {result.drafter}")
    return result
