"""Live learning: a draft that goes on learning from the answers that it serves.

A session answers prompts, and between two answers it spends a bounded share of the time on the draft::

    for block in session.stream(prompt):    # draft and verify; the verifier's states are kept
        ...
    session.learn()                         # an update or a look of the guard, if the budget allows it

What decoding has computed for an answer becomes the records: the drafts that were scored, the states that the exit head
chose them from, and the verifier's tokens and states. An update moves the exit head alone, so that it runs no layer.
Buffer, losses and log are the trainer's (`dvirl.trainer`). A guard keeps the head of the beginning and the last good
one, and goes back to the better of them when the live one is worse. Beside that a session remembers its answers, and
looks up drafts in them.

The user's text stays in memory unless `keep_text` is set.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor, nn

from dvirl import lora
from dvirl.buffer import ReplayBuffer, TrainingBatch
from dvirl.config import DVIConfig
from dvirl.data.stream import PromptSplit, PromptStream
from dvirl.metrics import Tally
from dvirl.models.drafters import LoadedDrafter, load_drafter
from dvirl.models.loading import LoadedModel
from dvirl.rollout import Judgement, Records, decoded_records, decoded_rollout
from dvirl.runs import checkpoint, optim
from dvirl.runs import folder as run_folder
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import cut_log, keep_lines, log_line
from dvirl.runs.settings import MANY, Settings, choice, number, read_yaml
from dvirl.trainer import DVITrainer
from kangaroo.decoding.blocks import SOURCES, DecodeConfig, Verification
from kangaroo.decoding.costs import expected_tokens
from kangaroo.decoding.drafting import Memory
from kangaroo.decoding.generate import Decoded
from kangaroo.decoding.inputs import Ids, check_prompt
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.published import is_published

EVENTS = "live.jsonl"
"""The session's log: answers, updates, looks of the guard and checkpoints, in numbers."""
GUARDED_DRAFTS = 4
"""Drafts of a block for which the guard says how many tokens to expect."""
FRESH_ANSWERS = 4
"""Answers that an update learns from at most, the newest."""
KEPT_CHECKPOINTS = 2
SAVED = 0.5
"""Share of a gain in tokens a block that is taken for time saved; prompts and drafts take the rest."""
RECENT_ANSWERS = 10
"""Answers whose time for learning can be saved up, about, and over which the share of learned blocks is averaged."""


@dataclass(frozen=True)
class LiveConfig(Settings):
    """How a session answers, and how it learns."""

    run_dir: str = ""
    """Folder that keeps what was learned, from which the next session goes on; without one nothing is kept."""
    keep_text: bool = False
    """Also keep prompts, answers and the buffer on the disk; off, they are in memory alone."""
    remember: int = number(50_000, 0)
    """Number of tokens of earlier prompts and answers in which drafts are looked up; 0 for none."""
    max_new_tokens: int = number(256, 2)
    """Length limit of an answer."""
    draft_len: int = number(8, 1, 64)
    """Number of tokens drafted before a verification, at most."""
    source: str = choice("hybrid", SOURCES)
    """What drafts: learned, lookup or hybrid; only learned drafts can be learned from."""
    adaptive: bool = True
    """Choose source and length of each block by what pays; off, blocks are as long as they can be."""
    temperature: float = number(0.0, 0, 100)
    """0 answers greedily; above 0 answers are sampled."""
    budget: float = number(0.1, 0, 0.9)
    """Share of the time that learning may take, of answering and learning together; 0 never learns. What is not used
    is kept for ten answers."""
    stake: float = number(0.03, 0, 0.9)
    """Once the guard has looked: share of the time by which learning may exceed what it is seen to save."""
    lr: float = number(3e-4, 0, 1)
    """AdamW's rate. A few times as much forgets what the draft knew."""
    schedule: str = choice("kl", ("kl", "tv", "ce", "exact_pg"))
    """Objective of an update, as in `dvirl train`: one that asks the verifier alone. Drafts of greedy answers are
    argmax drafts, from which a reward has a biased gradient."""
    fast_batch: int = number(16, 1)
    """Number of accepted drafts after which an update on the newest answer is due."""
    replay_every: int = number(8, 0)
    """Number of updates after which an older answer is learned from again, so that it is not forgotten; 0 for never."""
    hold_every: int = number(5, 2)
    """One answer of so many is not learned from: the guard compares drafts on it."""
    guard_answers: int = number(12, 1, 1024)
    """Number of such answers that the guard keeps, the newest."""
    guard_every: int = number(24, 1)
    """Number of updates after which the guard looks."""
    guard_margin: float = number(0.02, 0, 1)
    """Share of its tokens a block by which the live draft may be worse before the session goes back."""
    checkpoint_every: int = number(50, 1)
    """Number of updates between checkpoints; one is always written at the end."""
    seed: int = number(0, 0, 2**62)
    """Of sampled answers, and of what is replayed."""
    threads: int = number(2, 1, 1024)
    """Number of torch's CPU threads."""

    @property
    def decode(self) -> DecodeConfig:
        """How answers are decoded."""
        return DecodeConfig(
            self.draft_len,
            source=self.source,
            adaptive=self.adaptive,
            temperature=self.temperature,
            keep_states=self.budget > 0,
        )


def training_settings(config: LiveConfig, drafter: LoadedDrafter, name: str) -> DVIConfig:
    """The trainer's settings for a session; `name` is the drafter's, as it was given."""
    draft = dict(vars(drafter.settings))
    draft["model_name"] = drafter.loaded.name
    draft["device"] = str(drafter.loaded.model.device)
    draft["run_dir"] = config.run_dir or "memory"
    for shared in ("seed", "threads", "max_new_tokens", "draft_len", "schedule", "fast_batch"):
        draft[shared] = getattr(config, shared)
    return DVIConfig(
        **draft,
        start_from=name,
        num_prompts=int(MANY),  # nobody knows when a session ends
        actions="argmax",
        replay=0,
        slow_every=0,
        lr_shallow=config.lr,
        lr_schedule="constant",
        warmup_steps=0,
        tracker="none",
    )


class HeadTrainer(DVITrainer):
    """Updates the exit head alone, on the states that it read when it drafted: no layer runs again.

    Args:
        config: all settings.
        draft: what drafts.
    """

    def __init__(self, config: DVIConfig, draft: LoadedDrafter) -> None:
        no_prompts = PromptSplit(PromptStream([[0]], None), [])  # they come from people
        super().__init__(config, draft.loaded, no_prompts, draft)
        # The trainer steps all of the draft; here the rest stays, and so do the states in the records.
        self.shallow = lora.head_parameters(self.model)
        self.fast_optimizer = optim.make_optimizer(self.shallow, config.lr_shallow)
        self.optimizers = [self.fast_optimizer, self.slow_optimizer]

    def _refuse_too_large(self) -> None:
        """An update here computes the logits of a few answers' drafts alone."""

    def draft_logits(self, share: TrainingBatch) -> Tensor:
        """As in the trainer; records here keep what the exit head read."""
        return self.model.head_logits(share.hidden)

    def state_dict(self) -> dict[str, Any]:
        """As in the trainer, and the states."""
        state = super().state_dict()
        if len(self.buffer):
            state["tensors"]["buffer.field.hidden"] = self.buffer.field("hidden")
        return state


@dataclass(eq=False)
class KeptDraft:
    """A head to go back to, and the share of right drafts on the guard's answers, the first ones first."""

    weights: list[Tensor]
    rates: list[float] = field(default_factory=list)

    @property
    def mat(self) -> float:
        """Expected tokens a block."""
        return expected_tokens(fmean(self.rates), GUARDED_DRAFTS) if self.rates else 0.0


@dataclass(eq=False)
class Guard:
    """Heads to go back to, and recent answers on which they are compared with the live one.

    A head is judged by the share of its drafts that are right, from the states in the records: they do not change.

    Args:
        model: drafts.
        parameters: those that learn.
        size: number of answers that are kept.
        margin: share of its expected tokens a block by which the live draft may be worse.

    Attributes:
        held: of each answer, which nobody learns from, what the exit head read `[N, D]` and the verifier's tokens
            `[N]`.
        start, floor: the draft of the beginning, and the last good one.
    """

    model: KangarooModel
    parameters: Sequence[nn.Parameter]
    size: int
    margin: float
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self._live()
        self.floor = self.start

    def _live(self) -> KeptDraft:
        """A copy of the draft as it is now."""
        return KeptDraft([parameter.detach().clone() for parameter in self.parameters])

    @torch.no_grad()
    def put(self, draft: KeptDraft) -> None:
        """Make it the live draft."""
        for parameter, weight in zip(self.parameters, draft.weights, strict=True):
            parameter.copy_(weight)

    def hold(self, records: Records) -> None:
        """Keep an answer's records; beyond the number the oldest goes."""
        if not len(records):
            return
        self.held.append((records.hidden, records.verifier_token))
        if len(self.held) > self.size:
            self.held.pop(0)
            for draft in {self.start, self.floor}:  # they may be one
                draft.rates = draft.rates[1:]

    @torch.no_grad()
    def _measure(self, draft: KeptDraft) -> float:
        """Expected tokens a block of a draft, which becomes the live one; it is judged on each answer once."""
        self.put(draft)
        # An answer that this draft was judged on before has its rate already.
        for hidden, token in self.held[len(draft.rates) :]:
            drafted = self.model.token_ids(self.model.head_logits(hidden).argmax(dim=-1))
            draft.rates.append(float((drafted == token).float().mean()))
        return draft.mat

    def look(self) -> dict[str, Any]:
        """Compare the live draft with those that are kept, and go back if it is clearly worse than one of them.

        Returns:
            `verdict` ("back", "floor" for a new floor, or "" for neither), and the expected tokens a block of "live",
            "floor" and "start" on the answers that are held, before it.
        """
        live = self._live()
        best = self.floor
        try:
            means = {name: self._measure(getattr(self, name)) for name in ("start", "floor")}
            means["live"] = self._measure(live)
        except BaseException:  # Ctrl-C, too
            self.put(live)
            raise
        if means["start"] > means["floor"]:
            best = self.start  # as after a change of what is asked
        verdict = ""
        if live.mat < (1 - self.margin) * best.mat:
            verdict = "back"
            self.put(best)
            self.floor = best
        elif live.mat > self.floor.mat:
            verdict = "floor"
            self.floor = live
        return {"verdict": verdict, **means}

    def tensors(self, keep_text: bool) -> dict[str, Tensor]:
        """The floor's weights and, with `keep_text`, the answers."""
        tensors = {}
        if self.floor is not self.start:
            tensors = {f"guard.floor.{index}": weight for index, weight in enumerate(self.floor.weights)}
        for index, (hidden, token) in enumerate(self.held if keep_text else []):
            tensors |= {f"guard.hidden.{index}": hidden, f"guard.token.{index}": token}
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave; what was measured is measured again when it is needed."""
        if "guard.floor.0" in tensors:
            count = len(self.parameters)
            self.floor = KeptDraft([tensors[f"guard.floor.{index}"] for index in range(count)])
        self.held = []
        while f"guard.token.{len(self.held)}" in tensors:
            index = len(self.held)
            self.held.append((tensors[f"guard.hidden.{index}"], tensors[f"guard.token.{index}"]))


@dataclass
class LiveCounters:
    """How far a session is; in every checkpoint.

    Attributes:
        answers: answers so far.
        answer_s, learn_s: seconds of answering and of learning so far, by the session's clock.
        allowance: seconds that learning may take now; answers add to it, learning takes from it.
        learned: share of blocks that the draft model drafted, a moving average over answers: a memory or a lookup
            drafts the rest.
        gain: the live draft's expected tokens a block over those of the beginning's, less 1, as the guard saw it;
            None before.
        lines: lines of the session's log so far.
        unreplayed, unguarded, unsaved: updates since an older answer was replayed, since the guard looked, and since
            the last checkpoint.
        costs: seconds that an update, a replay and a look of the guard took last, by these names.
    """

    answers: int = 0
    answer_s: float = 0.0
    learn_s: float = 0.0
    allowance: float = 0.0
    learned: float = 1.0
    gain: float | None = None
    lines: int = 0
    unreplayed: int = 0
    unguarded: int = 0
    unsaved: int = 0
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def learning_share(self) -> float:
        """Share of the time that went into learning."""
        return self.learn_s / max(1e-9, self.answer_s + self.learn_s)


class LiveSession:
    """Answers prompts with drafts, and lets the draft learn from its own verifications. A context manager.

    Args:
        model: freshly loaded; it is changed in place.
        drafter: name or folder of what drafts, as in `load_drafter`.
        config: all settings.
        clock: seconds from some moment on. With blocks that are not adaptive, what is learned depends on nothing else
            that differs between two runs.

    Attributes:
        model: the model with its draft.
        trainer: makes the updates; holds buffer, baseline and optimizer.
        guard: what the session goes back to.
        memory: earlier prompts and answers, to look up drafts in; None if nothing is remembered.
        counters: how far it is.

    Raises:
        DvirlError: for a drafter that cannot learn here. Entering the context: if `run_dir` is in use, or holds a run
            of another model or drafter.
    """

    def __init__(
        self,
        model: LoadedModel,
        drafter: str | Path,
        config: LiveConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config or LiveConfig()
        self.loaded = model
        draft = load_drafter(drafter, model)
        if is_published(draft.folder) or not lora.head_parameters(draft.model):
            raise DvirlError(
                f"{drafter}: expected a drafter of dvirl with a trained exit head, to learn live"
            )
        self.model = draft.model
        config = self.config
        self.trainer = HeadTrainer(training_settings(config, draft, str(drafter)), draft)
        self.memory = Memory(config.remember) if config.remember and config.source != "learned" else None
        self.guard = Guard(self.model, self.trainer.shallow, config.guard_answers, config.guard_margin)
        self.counters = LiveCounters()
        self._clock = clock
        self._folder = Path(config.run_dir) if config.run_dir and config.budget else None
        self._inputs = {"drafter": draft.fingerprint()}
        self._open = ExitStack()
        self._merged = ExitStack()
        self._closed = False
        self._half_done = False

    def __enter__(self) -> Self:
        self._closed = False
        with ExitStack() as on_error:
            if self._folder is not None:
                on_error.enter_context(run_folder.run_lock(self._folder))
                self._start(self._folder)
            on_error.callback(self._merged.close)
            self._merge()
            # Adaptive blocks need the costs of steps, measured once.
            self.model.block_policy(self.config.decode)
            self._open = on_error.pop_all()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._closed = True
        self._merged.close()
        with self._open:
            # What an error or Ctrl-C has left half-done is no state to go on from.
            if self.counters.answers and not self._half_done:
                self.save_checkpoint()

    def _start(self, folder: Path) -> None:
        """Begin the log of a new folder, or go on from the newest checkpoint of one."""
        path = folder / "config.yaml"
        settings = self.trainer.config
        saved = any(folder.glob("checkpoints/step-*"))
        if path.exists() or saved:
            if "live" not in read_yaml(path):
                raise DvirlError(f"{path}: the run there is no live session; choose another run_dir")
            before = run_folder.run_settings(folder)
            same = {"start_from": settings.start_from}
            run_folder.refuse_other_settings(path, before, same, "choose another run_dir")
            now = {"model": self.loaded.fingerprint, **self._inputs}
            run_folder.refuse_other_inputs(path, now, "choose another run_dir")
        if saved:
            self._load(checkpoint.newest(folder))
        run_folder.write_config(folder, settings, self.loaded, live=asdict(self.config), inputs=self._inputs)
        # Lines after the checkpoint are written again.
        self.trainer.log.touch()
        cut_log(self.trainer.log, self.trainer.counters.step)
        places = count(1)
        keep_lines(folder / EVENTS, lambda line: next(places) <= self.counters.lines)
        self.counters.lines = min(self.counters.lines, next(places) - 1)

    # Answers

    def answer(self, prompt: Ids) -> Decoded:
        """Answer a prompt, then learn if something is due and affordable; arguments and errors as in `stream`."""
        blocks = list(self.stream(prompt))
        self.learn()
        return Decoded([token for block in blocks for token in block.committed], blocks)

    def stream(self, prompt: Ids) -> Iterator[Verification]:
        """Answer a prompt, yielding each block as it is committed; an answer that is broken off counts so far.

        Args:
            prompt: token ids.

        Raises:
            ValueError: for a prompt that `check_prompt` refuses, or logits that are not finite.
        """
        config = self.config
        seed = config.seed + self.counters.answers
        limit = config.max_new_tokens
        ends = self.loaded.eos_ids
        prompt = check_prompt(prompt, self.loaded.model, limit)
        decoding = self.model.decode_blocks(prompt, limit, config.decode, ends, seed=seed, memory=self.memory)
        blocks: list[Verification] = []
        before = replace(self.counters)
        try:
            while True:
                with self._timed("answer_s"):
                    block = next(decoding, None)
                if block is None:
                    break
                blocks.append(block)
                yield block
        finally:
            decoding.close()  # type: ignore[attr-defined]  # it is a generator
            if blocks and not self._closed:
                with self._all_or_nothing():
                    self._take(prompt, blocks)
                    self._allow(before, blocks[1:])

    def _take(self, prompt: list[int], blocks: list[Verification]) -> None:
        """Take in what the verification of one answer has shown."""
        counters = self.counters
        counters.answers += 1
        if self.memory is not None:
            with self._timed("learn_s"):
                self.memory.add([*prompt, *(token for block in blocks for token in block.committed)])
        if not self.config.budget:
            return
        rest = blocks[1:]  # the first one is the prefill's
        tally = Tally()
        tally.count(rest)
        with self._timed("learn_s"):
            rollout = decoded_rollout(prompt, blocks, self.config.max_new_tokens)
            records = decoded_records(rollout, blocks, head_states=True)
            self.trainer.count(rollout, Judgement(records, [rest]))
            # What the guard judges by must not have been learned from.
            if counters.answers % self.config.hold_every == 0:
                self.guard.hold(records)
            else:
                self.trainer.buffer.add(records, rollout)
        text = {}
        if self.config.keep_text:
            decode = self.loaded.tokenizer.decode
            text = {"prompt": decode(prompt), "response": decode(rollout.responses()[0])}
        self._log("answer", tokens=rollout.num_tokens, mat=tally.mat, **text)

    # Learning

    def _allow(self, before: LiveCounters, blocks: Sequence[Verification]) -> None:
        """Add what learning may take for an answer to what it may take now.

        Args:
            before: the counters before the answer.
            blocks: its blocks, without the first, which has no drafts.
        """
        counters = self.counters
        if blocks:
            learned = fmean(block.main_chain.draft.num_learned > 0 for block in blocks)
            counters.learned += (learned - counters.learned) / RECENT_ANSWERS
        share = self._share()
        rate = share / (1 - share)  # the share is of answering and learning together
        most = max(
            rate * RECENT_ANSWERS * counters.answer_s / counters.answers, *counters.costs.values(), 0.0
        )
        earned = rate * (counters.answer_s - before.answer_s) - (counters.learn_s - before.learn_s)
        counters.allowance = min(counters.allowance + earned, most)

    def learn(self) -> str:
        """Do what is due if the budget allows it: an update, a replay, a look of the guard, or a checkpoint.

        Returns:
            What was done: "update", "replay", "guard", "back" (the guard went back), "checkpoint", or "" for nothing.
        """
        kind = self._due()
        counters = self.counters
        if kind == "checkpoint":
            self._checkpoint()
            return kind
        # The budget must hold if it takes as long as it did last time.
        if not kind or counters.costs.get(kind, 0.0) > counters.allowance:
            return ""
        began = self._clock()
        with self._all_or_nothing(), torch.inference_mode(False), torch.enable_grad():
            figures = self._do(kind)
        self._pack()  # here and not in the next answer, so that it counts as learning
        seconds = self._clock() - began
        counters.learn_s += seconds
        counters.allowance -= seconds
        counters.costs[kind] = seconds
        self._log(kind, seconds=seconds, **figures)
        return "back" if figures.get("verdict") == "back" else kind

    def _share(self) -> float:
        """Share of the time that learning may take now."""
        config = self.config
        gain = self.counters.gain
        # Until the guard has looked nobody knows what learning is worth.
        if gain is None:
            return config.budget
        return min(config.budget, config.stake + SAVED * self.counters.learned * gain)

    def _due(self) -> str:
        """What is to be done next; the guard looks before the draft changes any further."""
        counters = self.counters
        config = self.config
        if counters.unguarded >= config.guard_every and self.guard.held:
            return "guard"
        if self._folder is not None and counters.unsaved >= config.checkpoint_every:
            return "checkpoint"
        if config.replay_every and counters.unreplayed >= config.replay_every and len(self.trainer.buffer):
            return "replay"
        return "update" if self.trainer.buffer.due(config.fast_batch) else ""

    def _do(self, kind: str) -> dict[str, Any]:
        """Do one of these things; its figures."""
        trainer = self.trainer
        counters = self.counters
        if kind == "replay":
            counters.unreplayed = 0
            trainer.replay_update(trainer.buffer.sample_responses(1, trainer.generator))
            return {}
        if kind == "guard":
            counters.unguarded = 0
            figures = self.guard.look()
            now = figures["live"]
            if figures["verdict"] == "back":
                now = max(figures["floor"], figures["start"])
                trainer.fast_optimizer.state.clear()  # moments of a draft that is gone
            counters.gain = max(0.0, now / figures["start"] - 1)
            return figures
        # Many small updates learn more than few large ones in the same time; what is passed over can be replayed.
        trainer.buffer.skip_fresh(FRESH_ANSWERS)
        metrics = asdict(trainer.step())
        counters.unreplayed += 1
        counters.unguarded += 1
        counters.unsaved += 1
        if self._folder is not None:
            log_line(trainer.log, metrics)
        return {"loss": metrics["loss"]}

    def _checkpoint(self) -> None:
        """Write a checkpoint that is due; its time cannot stand in it, and is none of learning's."""
        counters = self.counters
        began = self._clock()
        unsaved = counters.unsaved
        counters.unsaved = 0
        counters.lines += 1  # its own line, which comes after it
        self._merged.close()
        try:
            self.save_checkpoint()
        except BaseException:
            counters.unsaved = unsaved
            raise
        finally:
            counters.lines -= 1
            self._merge()
        self._log("checkpoint", seconds=self._clock() - began)

    def _merge(self) -> None:
        """Merge lora_S, which does not change, once for all answers to come."""
        self._merged.enter_context(self.model.base_model.merged())
        self._pack()

    def _pack(self) -> None:
        """Pack the weights that have changed."""
        with self.model.decoding(1):
            pass

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add the time spent inside to one of the counters."""
        began = self._clock()
        try:
            yield
        finally:
            setattr(self.counters, name, getattr(self.counters, name) + self._clock() - began)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What stops in the middle is no state to save."""
        self._half_done = True
        yield
        self._half_done = False

    def _log(self, event: str, **figures: Any) -> None:
        """A line of the session's log."""
        if self._folder is None:
            return
        counters = self.counters
        counters.lines += 1
        line = {"answer": counters.answers, "event": event, "step": self.trainer.counters.step, **figures}
        for name in ("answer_s", "learn_s", "learning_share"):
            line[name] = getattr(counters, name)
        log_line(self._folder / EVENTS, line)

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Write a checkpoint: all of the state, but without `keep_text` nothing that the text could be read from."""
        if self._folder is None:
            return
        trainer = self.trainer
        keep_text = self.config.keep_text
        state = trainer.state_dict()
        # The program's global random generators are not ours; nothing draws from them here.
        left_out = ["rng."]
        if not keep_text:
            # Tokens are text, and so are the verifier's states: its head turns them into tokens.
            left_out.append("buffer.")
            state["numbers"]["buffer"] = ReplayBuffer(1).state_dict()["numbers"]
        tensors = self.guard.tensors(keep_text)
        if self.memory is not None and keep_text:
            texts = enumerate(self.memory.texts)
            tensors |= {f"memory.{index}": torch.tensor(text) for index, text in texts}
        for name, value in state["tensors"].items():
            if not name.startswith(tuple(left_out)):
                tensors[name] = value
        numbers = {**state["numbers"], "random": None, "live": asdict(self.counters)}
        whole = {"tensors": tensors, "numbers": numbers}
        checkpoint.save(self._folder, trainer.counters.step, trainer.peft_model, trainer.model, whole)
        checkpoint.prune(self._folder, KEPT_CHECKPOINTS)

    def _load(self, folder: Path) -> None:
        """Go on from a checkpoint; without its text buffer, guard's answers and memory begin empty."""
        state = checkpoint.load(folder, self.trainer.peft_model, self.model)
        random = checkpoint.random_state()
        tensors = state["tensors"]
        tensors |= random["tensors"]
        state["numbers"]["random"] = random["numbers"]
        self.trainer.load_state_dict(state)
        self.guard.load(tensors)
        index = 0
        while self.memory is not None and f"memory.{index}" in tensors:
            self.memory.add(tensors[f"memory.{index}"].tolist())
            index += 1
        # Of older versions all lines are kept.
        self.counters = LiveCounters(**{"lines": int(MANY), **state["numbers"]["live"]})
