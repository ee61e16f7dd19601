"""Training at scale: distil the verifier into the draft over cached greedy responses to prompts it wrote itself.

Every position of a greedy response has a verified prefix, so the verifier's logits there and the draft's follow from
two parallel passes; nothing is decoded twice, and one cached response serves any number of passes.
"""

import math
import random
import resource
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dvirl.config import DraftSettings
from dvirl.data.selfwritten import TURN_TOKENS
from dvirl.data.sources import read_prompts
from dvirl.lora import attach_draft, shallow_parameters, train_only
from dvirl.losses import (
    BY_DEPTH,
    FOR_BLOCKS,
    OVER_ALL_TOKENS,
    DraftsAtDepth,
    Teacher,
    along_blocks,
    expected_accepted,
    reinforce_block_loss,
    within_text,
)
from dvirl.models.drafters import drafter_folder, export
from dvirl.models.loading import LoadedModel, load_for
from dvirl.models.placement import fitting, free_memory
from dvirl.rollout import Responses, join, refuse_stretched, verifier_states
from dvirl.runs import checkpoint, settings
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import claim
from dvirl.runs.log import Line, keep_lines, read_metrics
from dvirl.runs.loop import Counters, TrainingLoop
from dvirl.runs.optim import Optimizers, cosine_rate
from dvirl.runs.settings import choice, number
from dvirl.scale.corpus import (
    MOST_PASSAGES,
    overlapping,
    read_shard,
    without_repeats,
    write_conversations,
    write_shard,
)
from kangaroo.adapter import DRAFTERS
from kangaroo.kangaroo_model import HEADS, KangarooModel

SHARD = 16384
"""Conversations begun a shard."""
SORTED_TOGETHER = 16
"""Updates whose responses are drawn together and sorted by length, so that batches hold little padding."""
TEACHER_BATCHES = 8
"""Updates for which the verifier reads the responses in one pass."""
KEPT_SHARE = 0.5
"""Share of the free memory that the verifier's states may take."""
SWEPT = 384
"""Responses that the verifier reads at once to keep its states."""
WIDTH_STEP = 64
"""On CUDA sequences are padded to a multiple of this, each width one captured graph."""
MOMENTUM = 0.9
"""Of the baselines, moving averages of the returns."""
CAPTURED_BY = attrgetter(
    "objective", "kl_weight", "ce_weight", "temperature", "depths", "depth_decay", "batch"
)
"""The values of those settings on which captured graphs depend."""


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

    start_from: str = ""
    """Name or folder of a drafter with the same settings, to go on from."""
    responses_from: str = ""
    """Folder with another run's shards of responses; they are read there and none are written."""
    num_tokens: int = number(10_000_000, 1, 1e12)
    """Response tokens to write, before repeats and overlaps are dropped."""
    answer_tokens: int = number(128, 2)
    """Length limit of a response."""
    follow_up: float = number(0.25, 0, 1)
    """Share of answers that get a second turn and another answer."""
    about_text: float = number(0.15, 0, 10)
    """Tasks about longer texts, which are put together from answers, as a share of the answers."""
    write_batch: int = number(4096, 1, 65536)
    """Responses generated at once, at most; fewer where fewer fit into the memory."""
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
    objective: str = choice("kl", (*BY_DEPTH, *FOR_BLOCKS))
    """What is minimised, see `dvirl.losses`: kl, js, tv, alpha, lk or expected at each depth, a mean over depths; or
    for whole blocks minus the expected number of accepted drafts, of sampled drafts and a greedy verifier (block) or of
    both at temperature 1 (block_alpha), or REINFORCE with that number as its return (reinforce_block)."""
    kl_weight: float = number(0.0, 0, 1e6)
    """Weight of the KL when added to another objective."""
    reward_from: float = number(0.0, 0, 1)
    """Share of the run after which the objective begins; before, it is kl."""
    ce_weight: float = number(0.0, 0, 1)
    """Share of cross-entropy to the verifier's token in the KL."""
    temperature: float = number(1.0, 1e-2, 100)
    """Of the verifier's distribution; below 1 sharpens it towards its argmax."""
    depths: int = number(4, 1, 16)
    """With feedback: drafts of a block that learn, each from the state of the one before."""
    depth_decay: float = number(0.8, 0, 1)
    """Weight of each draft in the loss, over that of the draft before."""
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


@dataclass(kw_only=True)
class DistillCounters(Counters):
    """How far a distillation is; `tokens` are response tokens learned from."""

    tokens: int = 0


class _Objective(nn.Module):
    """Loss and agreement as a function of tensors alone, in fixed shapes.

    It is called with:
        tokens: `[B, T]`.
        positions: `[N]`, where to draft the next token, counted through all rows.
        later: `[B, R]`, the positions of each row at which later drafts of blocks are made.
        index: `[N]`, the verifier's tokens after `positions`, as rows of the exit head.
        verifier_hidden: `[B, T, D]`, the states that it chose its tokens from; with a middle layer `[B, T, 2 D]`.
        weight: `[N]`, 1, and 0 at padding.
        actions: with reinforce_block noise `[N, K]`, uniform in [0, 1), by which it acts, and its baselines `[K]`.

    It returns the mean loss, over the first drafts of blocks and with feedback over later ones, too; the share of
    positions where the argmax of a first draft is the verifier's token; both 0-d. With reinforce_block also the mean
    returns by depth, `[K]`.
    """

    def __init__(self, model: KangarooModel, config: DistillConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        later: Tensor,
        index: Tensor,
        verifier_hidden: Tensor,
        weight: Tensor,
        *actions: Tensor,
    ) -> tuple[Tensor, ...]:
        """Draft after the chosen positions; arguments and results as the class says."""
        config = self.config
        model = self.model
        half = verifier_hidden.dtype == torch.bfloat16
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            # 1) What the verifier says there.
            last = verifier_hidden[..., : model.head_rows.shape[1]]
            chosen = last.flatten(0, 1).index_select(0, positions)
            normalizer = None
            if config.objective in OVER_ALL_TOKENS:
                normalizer = model.verifier_normalizer(chosen, config.temperature)
            teacher = Teacher.of(model.verifier_logits(chosen) / config.temperature, normalizer)
            # 2) The drafts of every depth; without feedback they are the same, and there is one.
            exit_hidden = model.base_model.forward_shallow(tokens)
            states = model.drafter_depths(tokens, exit_hidden, verifier_hidden, config.depths, later)
            depths = []
            for depth, state in enumerate(states):
                where = positions if depth == 0 else self._among(later, positions, tokens.shape[1])
                logits = model.head_logits(state.flatten(0, 1).index_select(0, where), exact=False)
                depths.append(DraftsAtDepth(logits, teacher, index, weight, config.ce_weight))
            # 3) The loss.
            if config.objective in BY_DEPTH:
                loss, *returns = [self._by_depth(config.objective, depths)]
            else:
                loss, *returns = self._of_blocks(depths, positions, actions)
            if config.objective != "kl" and config.kl_weight:
                loss = loss + config.kl_weight * self._by_depth("kl", depths)
        return loss, depths[0].mean(depths[0].logits.argmax(dim=-1) == index), *returns

    def _by_depth(self, objective: str, depths: list[DraftsAtDepth]) -> Tensor:
        """The weighted mean over depths of an objective that judges each draft by itself."""
        loss = torch.zeros((), device=depths[0].weight.device)
        shares = 0.0
        for depth, drafts in enumerate(depths):
            share = self.config.depth_decay**depth
            loss = loss + drafts.mean(BY_DEPTH[objective](drafts), share)
            shares += share
        return loss / shares

    def _of_blocks(
        self, depths: list[DraftsAtDepth], positions: Tensor, actions: tuple[Tensor, ...]
    ) -> list[Tensor]:
        """The mean of an objective for whole blocks, one from each position; and reinforce_block's mean returns."""
        first = depths[0]
        inside = within_text(positions, first.weight, self.config.depths)
        # Without feedback a draft does not depend on its depth.
        depths = depths + depths[-1:] * (len(inside) - len(depths))
        if not actions:
            greedy = self.config.objective == "block"
            chances = [drafts.chance() if greedy else drafts.acceptance() for drafts in depths]
            return [-first.mean(expected_accepted(along_blocks(chances, inside)))]
        noise, baselines = actions
        acts = [drafts.act(uniform) for drafts, uniform in zip(depths, noise.T, strict=True)]
        log_probs, accepted = (along_blocks(values, inside) for values in zip(*acts, strict=True))
        losses, means = reinforce_block_loss(log_probs, accepted, inside, baselines)
        return [first.mean(losses), means]

    @staticmethod
    def _among(later: Tensor, positions: Tensor, width: int) -> Tensor:
        """Where positions, counted through all rows of a width, are among the consecutive ones of `later`."""
        rows = positions // width
        offsets = (positions % width - later[rows, 0]).clamp(0, later.shape[1] - 1)  # padding can be anywhere
        return rows * later.shape[1] + offsets


def conversations(loaded: LoadedModel, config: DistillConfig, path: Path, count: int, seed: int) -> Responses:
    """Conversations that the model holds with itself, from their file or, the first time, written.

    Args:
        loaded, count, seed: as in `write_conversations`.
        config: lengths and shares.
        path: of the shard.
    """
    if not path.exists():
        shard = write_conversations(
            loaded,
            count,
            seed,
            config.answer_tokens,
            config.follow_up,
            config.write_batch,
            config.about_text,
        )
        write_shard(path, shard)
    return read_shard(path)


class Distiller(TrainingLoop):
    """One distillation: its responses, its draft, its optimizer. A run folder that is not finished goes on.

    Args:
        config: all settings.
        loaded: a freshly loaded model, which is changed in place.

    Attributes:
        responses: what is learned from.
        left_out: number of rows that are not, by reason.
        length: updates of the whole run, if the clock does not end it before.

    Raises:
        DvirlError: for settings that do not fit the model, or a run folder with other settings.
    """

    config: DistillConfig
    counters: DistillCounters
    optimizers: Optimizers
    unit = "update"

    def __init__(self, config: DistillConfig, loaded: LoadedModel) -> None:
        super().__init__(config, loaded, config.checkpoint_every)
        base = loaded.model
        # Said now, and not when the responses are written: a batch that will not fit.
        layers = base.model.layers[: config.exit_layer + config.drafter_layers]
        positions = 2 * (TURN_TOKENS + config.answer_tokens)
        if config.about_text:
            positions = max(positions, TURN_TOKENS + (MOST_PASSAGES + 1) * config.answer_tokens)
        logits = config.answer_tokens * (config.draft_vocab or base.config.vocab_size)
        logits *= config.depths if config.feedback else 1
        drafter = list(layers[config.exit_layer :].parameters())
        fitting("batch", config.batch, base, layers, positions, logits, drafter)
        claim(self.run_dir, config, loaded)
        self.responses, self.left_out = self._chosen(self._ready_responses())
        refuse_stretched(base.rotary, int(self.responses.lengths.max()))
        torch.manual_seed(config.seed)
        self.peft_model, self.model = attach_draft(loaded.model, config, self.responses.response_tokens())
        self.parameters = shallow_parameters(self.model, config.lora_shallow)
        # Updates of one shape are replayed from a CUDA graph.
        self._use_cuda_graphs = base.can_be_captured
        self._captured: dict[tuple[int, str], Any] = {}
        # States that are read once are not kept.
        self._kept = self._kept_states() if config.passes > 1 else {}
        self._begin()

    def begin_again(self, config: DistillConfig) -> None:
        """Begin another run from the drafter that this one started from, on the same responses.

        What is costly stays: the model and the verifier's states on the responses; captured graphs stay if all
        settings in them do, and are dropped otherwise.

        Args:
            config: with another `run_dir`; it may differ in the objective and its weights, rates, seed and passes, too.

        Raises:
            DvirlError: if there is a run with other settings in its folder.
        """
        claim(Path(config.run_dir), config, self.loaded)
        if CAPTURED_BY(config) != CAPTURED_BY(self.config):
            self._captured.clear()  # the graphs of one objective take gigabytes
        self.config = config
        self._kept = self._kept or self._kept_states()
        self._begin()

    def _begin(self) -> None:
        """Start from the drafter that was asked for, or go on from the newest checkpoint in the run's folder."""
        config = self.config
        self.length = config.passes * math.ceil(len(self.responses) / config.batch)
        if config.start_from:
            folder = drafter_folder(config.start_from)
            checkpoint.load_weights(folder, self.peft_model, self.model, ["lora_S"], to_start=True)
        drafting = self.model.adapter_model.parameters() if config.muon else []
        matrices = [parameter for parameter in drafting if parameter.ndim == 2]
        self.optimizers = Optimizers(self.parameters, matrices, config.muon)
        self.counters = DistillCounters()
        self.baselines = torch.zeros(config.depths, device=self.model.head_model.weight.device)
        self.load_newest()

    # Responses

    def _ready_responses(self) -> Responses:
        """The run's responses; those that are not on disk yet are written."""
        config = self.config
        if config.responses_from:
            paths = sorted(Path(config.responses_from).glob("shard-*.safetensors"))
            if not paths:
                raise DvirlError(
                    f"responses_from is {config.responses_from!r}; expected a folder of shard-*.safetensors"
                )
            return join([read_shard(path) for path in paths])
        keep_lines(self.log, lambda _: True)  # a torn line would join the next one
        parts: list[Responses] = []
        num_tokens = 0
        with tqdm(total=config.num_tokens, desc="responses", unit="token", unit_scale=True) as bar:
            while num_tokens < config.num_tokens:
                path = self.run_dir / "responses" / f"shard-{len(parts):05d}.safetensors"
                is_new = not path.exists()
                began = time.perf_counter()
                # Fewer conversations than usual if few tokens are missing.
                count = min(SHARD, max(8, 2 * (config.num_tokens - num_tokens) // config.answer_tokens))
                shard = conversations(self.loaded, config, path, count, config.seed * 1_000_003 + len(parts))
                if is_new:
                    self._log_line(
                        {
                            "phase": "write",
                            "shard": len(parts),
                            "tokens": shard.num_tokens,
                            "memory_gb": self._memory_gb(),
                            "wall_s": time.perf_counter() - began,
                        }
                    )
                parts.append(shard)
                num_tokens += shard.num_tokens
                bar.update(shard.num_tokens)
        return join(parts)

    def _chosen(self, responses: Responses) -> tuple[Responses, dict[str, int]]:
        """The responses to learn from, and how many others there are: repeats, too short ones, excluded ones."""
        distinct = without_repeats(responses)
        files = [path for path in self.config.exclude.split(",") if path]
        questions = []
        for path in files:
            for prompt in read_prompts("spec_bench_turns", path):
                questions += [self.loaded.chat.plain(turn) for turn in prompt.turns]
        overlaps = overlapping(distinct, questions, device=self.loaded.model.device)
        short = ~overlaps & (distinct.response_lens < 2)
        left_out = {
            "repeats": len(responses) - len(distinct),
            "too_short": int(short.sum()),
            "excluded": int(overlaps.sum()),
        }
        if files:
            self.say(f"left out {left_out['excluded']} responses that overlap {', '.join(files)}")
        chosen = distinct.take((~overlaps & ~short).nonzero()[:, 0])
        if not len(chosen):
            raise DvirlError(f"none of {len(responses)} responses is left to learn from ({left_out})")
        return chosen, left_out

    def _kept_states(self) -> dict[int, Tensor]:
        """The verifier's states on every response, `[T, D]` or with a middle layer `[T, 2 D]`, by row.

        None if they would take too much of the memory.
        """
        kept: dict[int, Tensor] = {}
        base = self.loaded.model
        middle_layer = self.config.middle_layer
        lengths = self.responses.lengths
        numbers = base.config.hidden_size * (2 if middle_layer else 1)
        needed = int(lengths.sum()) * numbers * base.dtype.itemsize
        if needed > KEPT_SHARE * free_memory(base.device):
            return kept
        parts = torch.split(lengths.argsort(), SWEPT)
        for rows in tqdm(parts, desc="verifier's states", unit="batch", leave=False):
            tokens = self.responses.take(rows).tokens.to(base.device)
            states = verifier_states(base, tokens, ["lora_S"], middle_layer)
            for row, state in zip(rows.tolist(), states, strict=True):
                # A copy, so that padding is not kept with it.
                kept[row] = state[: lengths[row]].clone()
        return kept

    # The loop

    def train(self, show_progress: bool = True) -> DistillResult:
        """Learn from all responses `passes` times or until `max_minutes` are over; write the drafter.

        See `TrainingLoop.train`.
        """
        super().train(show_progress)
        table = read_metrics(self.log)
        written = table[table.phase == "write"]
        drafter = self.run_dir / "drafter"
        result = DistillResult(
            written=int(written.tokens.sum()),
            write_s=float(written.wall_s.sum()),
            learned=self.counters.tokens,
            train_s=self.counters.wall_s,
            steps=self.counters.step,
            agreement=float(table[table.phase == "train"].agreement.iloc[-1]),
            memory_gb=float(table.memory_gb.max()),
            checkpoint=str(checkpoint.newest(self.run_dir)),
            drafter=str(drafter),
        )
        export(
            drafter, self.peft_model, self.model, self.config, self.loaded, **asdict(result), **self.left_out
        )
        return result

    def start(self) -> list[dict[str, Any]]:
        """Begin with the next batch; say what is learned from."""
        train_only(self.model, self.parameters)
        self._batches = self.batches()
        figures = {
            "step": self.counters.step,
            "rows": len(self.responses),
            "tokens": self.responses.num_tokens,
        }
        return [{"phase": "start", **figures, **self.left_out}]

    @property
    def progress(self) -> float:
        """Share of the run that is done, by updates or by the clock."""
        minutes = self.config.max_minutes
        by_clock = self.counters.wall_s / (60 * minutes) if minutes else 0.0
        return min(1.0, max(self.counters.step / self.length, by_clock))

    @property
    def finished(self) -> bool:
        """Whether all responses have been learned from or the time is over."""
        return self.progress >= 1.0

    def advance(self) -> None:
        """The updates up to the next line of the log.

        The line has:
            phase: "train".
            step: updates so far.
            tokens: response tokens learned from so far.
            loss: what was minimised, for KL nats a token, mean over the line's updates that were not left out.
            agreement: share of positions where the draft's argmax was the verifier's token, before the update, mean.
            lr, grad_norm: of the last update, the norm before clipping.
            skipped: updates left out so far because a loss or gradient was not finite.
            tok_per_s: response tokens learned from over wall seconds, since the line before.
            memory_gb: highest memory use so far, of the accelerator if there is one.
            wall_s: seconds of training so far.

        Other lines have the phases "write" (one a shard: its tokens, and the wall_s it took) and "start" (one a start
        of training: the step it goes on from, the rows and tokens learned from, and the rows left out).
        """
        counters = self.counters
        tokens_before = counters.tokens
        wall_before = counters.wall_s
        updates = []
        while not self.finished:
            updates.append(self.update(*next(self._batches)))
            self.clock()
            if counters.step % self.config.log_every == 0:
                break
        loss, agreement, norm = (torch.stack(values) for values in zip(*updates, strict=True))
        kept = self._report_skipped(loss + norm)
        mean_loss = float(loss[kept].mean())  # waits for the device, so that the time is that of all updates
        self.clock()
        line = {
            "phase": "train",
            **asdict(counters),
            "loss": mean_loss,
            "agreement": float(agreement.mean()),
            "lr": self.optimizers.lr,
            "grad_norm": float(norm[-1]),
            "tok_per_s": (counters.tokens - tokens_before) / (counters.wall_s - wall_before),
            "memory_gb": self._memory_gb(),
        }
        self.report(line)

    def _report_skipped(self, numbers: Tensor) -> Tensor:
        """Which of the last updates were made, `[N]`; those whose numbers are not finite were left out."""
        kept = numbers.isfinite()
        for place in (~kept).nonzero()[:, 0].tolist():
            self.skip_update(self.counters.step - len(numbers) + 1 + place)
        return kept

    def describe(self, line: Line) -> str:
        """What the progress bar says of an update."""
        return f"agreement {line['agreement']:.3f}, {line['tok_per_s']:,.0f} tok/s"

    def _memory_gb(self) -> float:
        """Highest memory use so far, of all accelerators together if there is one."""
        if self.loaded.model.device.type == "cuda":
            return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) / 1e9
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9

    # Batches

    def batches(self) -> Iterator[tuple[Responses, Tensor]]:
        """From the next update on: responses, tokens on the device, and the verifier's states `[B, T, D]` on them."""
        size = self.config.batch
        per_pass = math.ceil(len(self.responses) / size)
        # Passes that are done, and updates of the next one that are.
        first_pass, done = divmod(self.counters.step, per_pass)
        for pass_index in range(first_pass, self.config.passes):
            groups = torch.split(self._order(pass_index), TEACHER_BATCHES * size)
            for rows in groups[done // TEACHER_BATCHES :]:
                group = self.responses.take(rows)
                tokens = group.tokens.to(self.loaded.model.device)
                if self._kept:
                    states = pad_sequence([self._kept[row] for row in rows.tolist()], batch_first=True)
                else:
                    middle = self.config.middle_layer
                    states = verifier_states(self.loaded.model, tokens, ["lora_S"], middle)
                for start in range(done % TEACHER_BATCHES * size, len(group), size):
                    part = slice(start, start + size)
                    yield (
                        Responses(tokens[part], group.prompt_lens[part], group.response_lens[part]),
                        states[part],
                    )
                done = 0

    def _order(self, pass_index: int) -> Tensor:
        """All rows in the random order of a pass, sorted by length within every few updates."""
        seed = random.Random(f"{self.config.seed}/{pass_index}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.responses), generator=generator)
        lengths = self.responses.lengths
        parts = [
            part[lengths[part].argsort()] for part in torch.split(order, SORTED_TOGETHER * self.config.batch)
        ]
        groups: list[Tensor] = []
        for part in parts[:-1]:
            groups += torch.split(part, TEACHER_BATCHES * self.config.batch)
        shuffle = torch.randperm(len(groups), generator=generator).tolist()
        # The last part may be short, and stays last, so that only the last update is.
        return torch.cat([*(groups[i] for i in shuffle), *parts[-1:]])

    # Updates

    def update(self, batch: Responses, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One update on some responses, left out if it is not finite; its loss, agreement and gradient norm."""
        inputs = self._positions(batch, states, self._use_cuda_graphs)
        loss, agreement, *returns = self.objective(*inputs, *self._for_actions(len(inputs[1])))
        self.optimizers.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_grad_norm_(self.parameters, self.config.grad_clip).to(loss.device)
        step = self.counters.step + 1
        lr = cosine_rate(self.config.lr, step, self.config.warmup_steps, self.progress, floor=0.0)
        self.counters.step = step
        self.counters.tokens += int((batch.response_lens - 1).sum())
        self.optimizers.step(lr, (loss + norm).detach().isfinite())
        for means in returns:
            self.baselines = MOMENTUM * self.baselines + (1 - MOMENTUM) * means
        return loss.detach(), agreement, norm

    @property
    def _now(self) -> DistillConfig:
        """The settings with the objective of the next update."""
        if self.progress >= self.config.reward_from:
            return self.config
        return replace(self.config, objective="kl")

    def _for_actions(self, count: int) -> list[Tensor]:
        """What reinforce_block reads besides: noise `[count, K]`, which follows from the step, and the baselines."""
        if self._now.objective != "reinforce_block":
            return []
        seed = random.Random(f"{self.config.seed}/actions/{self.counters.step}").getrandbits(63)
        noise = torch.rand(count, self.config.depths, generator=torch.Generator().manual_seed(seed))
        return [noise.to(self.baselines.device), self.baselines]

    def _positions(self, batch: Responses, states: Tensor, padded: bool) -> tuple[Tensor, ...]:
        """The inputs of `_Objective`; for CUDA padded to one of a few shapes, so that each is captured once."""
        rows, before = batch.draft_places()
        tokens = batch.tokens
        count = len(rows)
        longest = int((self.responses if padded else batch).response_lens.max())
        if padded:
            count = self.config.batch * (longest - 1)
            missing = self.config.batch - len(tokens)
            ragged = -tokens.shape[1] % WIDTH_STEP
            tokens = F.pad(tokens, (0, ragged, 0, missing))
            states = F.pad(states, (0, 0, 0, ragged, 0, missing))
        # Padding is spread: many gradients of one place would be added one by one.
        chosen = torch.arange(count)
        chosen[: len(rows)] = rows * tokens.shape[1] + before
        chosen = chosen.to(tokens.device)
        weight = (torch.arange(count) < len(rows)).float()
        # Later drafts at the response's positions and the few before, where their blocks can begin.
        lead = max(0, self.config.depths - 2)
        starts = F.pad((batch.prompt_lens - lead).clamp(min=0), (0, len(tokens) - len(batch.prompt_lens)))
        later = starts[:, None] + torch.arange(longest - 1 + lead)
        later = later.clamp(max=tokens.shape[1] - 1).to(tokens.device)
        index = self.model.draft_index(tokens.flatten()[chosen + 1].long())
        return tokens, chosen, later, index, states, weight.to(tokens.device)

    def objective(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`_Objective` of these inputs; with CUDA, but for reinforce_block, replayed from a graph of their shape."""
        config = self._now
        key = (inputs[0].shape[1], config.objective)
        if key not in self._captured:
            objective: Any = _Objective(self.model, config)
            # Captured, reinforce_block read a draft outside the vocabulary on an H200; why was not found.
            if self._use_cuda_graphs and config.objective != "reinforce_block":
                objective = torch.cuda.make_graphed_callables(objective, inputs, allow_unused_input=True)
            self._captured[key] = objective
        # Copies: the next replay writes over its outputs.
        return tuple(output.clone() for output in self._captured[key](*inputs))

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights; the order of the responses follows from the step."""
        tensors = {**self.optimizers.tensors(), "baselines": self.baselines}
        return {"tensors": tensors, "numbers": asdict(self.counters)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.optimizers.load(state["tensors"])
        # Checkpoints from before there were any lack them.
        self.baselines = state["tensors"].get("baselines", self.baselines)
        self.counters = DistillCounters(**state["numbers"])


parse_args = settings.command_line(
    DistillConfig, "dvirl distill", "Train a draft at scale, on self-written text."
)
"""Settings from flags; see `settings.parse_args`."""


def main(args: Namespace | DistillConfig) -> DistillResult:
    """Train or go on training; print what it took and where the results are.

    Raises:
        DvirlError: as `Distiller` does.
    """
    config = settings.from_namespace(DistillConfig, args)
    result = Distiller(config, load_for(config)).train()
    work = [("written", result.written, result.write_s), ("learned from", result.learned, result.train_s)]
    for verb, tokens, seconds in work:
        if tokens:
            print(f"{verb}: {tokens:,} tokens in {seconds:,.1f} s, {tokens / seconds:,.0f} tokens/s")
    print(f"agreement: {result.agreement:.3f} over the last {config.log_every} of {result.steps} updates")
    print(f"memory: {result.memory_gb:.2f} GB at most\nlog: {config.run_dir}/metrics.jsonl")
    print(f"checkpoint: {result.checkpoint}\ndrafter: {result.drafter}")
    return result
