"""Live learning: a draft that goes on learning from the answers that it serves.

A session answers prompts, and between two answers it spends a bounded share of the time on the draft::

    for block in session.stream(prompt):    # draft and verify; the verifier's states are kept
        ...
    session.learn()                         # an update or a look of the guard, if the budget allows it

What verification has computed for an answer becomes the records: the drafts that it scored, its own tokens, and its
states, so that no update runs the deep layers. Updates, buffer and log are the trainer's (`dvirl.trainer`). A guard
keeps the draft of the beginning and the last good one, and goes back to the better of them when the live one is worse.

The user's text stays in memory unless `keep_text` is set.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from dvirl.buffer import ReplayBuffer
from dvirl.config import DraftSettings, DVIConfig
from dvirl.data.stream import PromptSplit, PromptStream
from dvirl.metrics import Tally
from dvirl.models.drafters import LoadedDrafter, load_drafter
from dvirl.models.loading import LoadedModel
from dvirl.rollout import Judgement, Rollout, decoded_records, decoded_rollout, join, judge
from dvirl.runs import checkpoint
from dvirl.runs import folder as run_folder
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import cut_log, keep_lines, log_line
from dvirl.runs.settings import MANY, Settings, choice, number, read_yaml
from dvirl.trainer import DVITrainer
from kangaroo.decoding.blocks import SOURCES, DecodeConfig, Verification
from kangaroo.decoding.generate import Decoded
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.published import is_published

TEXT = "text.jsonl"
"""Prompts and answers of a session that keeps its text."""
EVENTS = "live.jsonl"
"""Answers, updates, looks of the guard and checkpoints of a session, in numbers."""
GUARDED_DRAFTS = 4
"""Drafts of a block by which the guard compares two drafts."""


@dataclass(frozen=True)
class LiveConfig(Settings):
    """How a session answers, and how it learns."""

    run_dir: str = ""
    """Folder in which the session keeps what it learned, and from which the next one goes on; none keeps nothing."""
    keep_text: bool = False
    """Also keep prompts, answers and the buffer on the disk; off, they are in memory alone."""
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
    """Share of the time that learning may take, of answering and learning together; 0 never learns."""
    lr: float = number(3e-4, 0, 1)
    """AdamW's rate. Ten times as much forgets what the draft knew."""
    schedule: str = choice("kl", ("kl", "tv", "ce", "exact_pg"))
    """Objective of an update, as in `dvirl train`: one that asks the verifier alone. Served drafts are argmax drafts,
    from which a reward has a biased gradient."""
    fast_batch: int = number(16, 1)
    """Number of accepted drafts after which an update is due."""
    fresh: int = number(1, 1, 1024)
    """Number of recent answers that an update learns from; others that came since the last one are left to replay."""
    replays: int = number(1, 0, 100)
    """Number of steps that follow on older answers, each on as many, so that what came before is not lost."""
    buffer_size: int = number(32768, 1)
    """Number of records that replay draws from; the oldest leave first."""
    hold_every: int = number(4, 2)
    """One answer of so many is not learned from: the guard compares drafts on it."""
    guard_answers: int = number(8, 1, 1024)
    """Number of such answers that the guard keeps."""
    guard_every: int = number(8, 1)
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
    draft = {spec.name: getattr(drafter.settings, spec.name) for spec in fields(DraftSettings)}
    given = {
        "model_name": drafter.loaded.name,
        "device": str(drafter.loaded.model.device),
        "run_dir": config.run_dir or "memory",
        "seed": config.seed,
        "threads": config.threads,
    }
    return DVIConfig(
        **{**draft, **given},
        start_from=name,
        num_prompts=int(MANY),  # a session has no end that is known
        held_out=0,
        max_new_tokens=config.max_new_tokens,
        draft_len=config.draft_len,
        actions="argmax",
        schedule=config.schedule,
        fast_batch=config.fast_batch,
        replay=config.replays,
        buffer_size=config.buffer_size,
        slow_every=0,
        lr_shallow=config.lr,
        lr_schedule="constant",
        warmup_steps=0,
        tracker="none",
    )


# The guard


@dataclass
class Held:
    """An answer that is not learned from.

    Attributes:
        rollout: the answer, without the verifier's states.
        tallies: what each kept draft does on it, by the draft's name.
    """

    rollout: Rollout
    tallies: dict[str, Tally] = field(default_factory=dict)


def mean_block(tallies: Sequence[Tally]) -> float:
    """Tokens a block over several answers."""
    return sum(tally.committed for tally in tallies) / max(1, sum(tally.blocks for tally in tallies))


class Guard:
    """Two drafts to go back to, and recent answers on which they are compared with the live one.

    Args:
        model: drafts.
        parameters: those that learn.
        size: number of answers that are kept.
        margin: share of its tokens a block by which the live draft may be worse.

    Attributes:
        held: the answers.
        kept: weights by name: "start", those of the beginning, and "floor", the last good ones.
    """

    def __init__(
        self, model: KangarooModel, parameters: Sequence[nn.Parameter], size: int, margin: float
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._size = size
        self._margin = margin
        self.held: list[Held] = []
        start = self._weights()
        self.kept = {"start": start, "floor": start}

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def _put(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.copy_(weight)

    def hold(self, rollout: Rollout) -> None:
        """Keep an answer, and drop the oldest one beyond the number."""
        states = rollout.verifier_hidden[..., :0]
        self.held = [*self.held, Held(replace(rollout, verifier_hidden=states))][-self._size :]

    def _tallies(self, held: Sequence[Held]) -> list[Tally]:
        """What the model's draft does on some answers, in one parallel pass."""
        blocks = judge(self._model, join([one.rollout for one in held]), DecodeConfig(GUARDED_DRAFTS)).blocks
        tallies = []
        for row in blocks:
            tally = Tally()
            tally.count(row)
            tallies.append(tally)
        return tallies

    def look(self) -> dict[str, Any]:
        """Compare the live draft with those that are kept, and go back if it is clearly worse than one of them.

        Returns:
            `verdict` ("back", "floor" for a new floor, or "" for neither), and the tokens a block of "live", "floor"
            and "start". After "back" the optimizer's moments are those of a draft that is gone.
        """
        live = self._tallies(self.held)
        self._judge_kept()
        means = {name: mean_block([one.tallies[name] for one in self.held]) for name in self.kept}
        best = max(means, key=lambda name: means[name])
        means["live"] = mean_block(live)
        verdict = ""
        if means["live"] < (1 - self._margin) * means[best]:
            verdict = "back"
            self._put(self.kept[best])
            self._set_floor(self.kept[best], [one.tallies[best] for one in self.held])
        elif means["live"] > means["floor"]:
            verdict = "floor"
            self._set_floor(self._weights(), live)
        return {"verdict": verdict, **means}

    def _judge_kept(self) -> None:
        """Let the kept drafts draft on the answers on which they have not yet."""
        weights = self._weights()
        for name, kept in self.kept.items():
            fresh = [one for one in self.held if name not in one.tallies]
            if not fresh:
                continue
            self._put(kept)
            for one, tally in zip(fresh, self._tallies(fresh), strict=True):
                one.tallies[name] = tally
                if self.kept["floor"] is self.kept["start"]:  # one draft by two names
                    one.tallies["floor"] = tally
        self._put(weights)

    def _set_floor(self, weights: list[Tensor], tallies: Sequence[Tally]) -> None:
        self.kept["floor"] = weights
        for one, tally in zip(self.held, tallies, strict=True):
            one.tallies["floor"] = tally

    def state_dict(self, keep_text: bool) -> dict[str, Any]:
        """Tensors and numbers of the floor and, with `keep_text`, of the answers."""
        tensors = {}
        if self.kept["floor"] is not self.kept["start"]:
            tensors = {f"guard.floor.{index}": weight for index, weight in enumerate(self.kept["floor"])}
        held = []
        for index, one in enumerate(self.held if keep_text else []):
            for name, value in vars(one.rollout).items():
                if isinstance(value, Tensor):
                    tensors[f"guard.held.{index}.{name}"] = value
            tallies = {name: asdict(tally) for name, tally in one.tallies.items()}
            held.append({"max_new_tokens": one.rollout.max_new_tokens, "tallies": tallies})
        return {"tensors": tensors, "numbers": held}

    def load_state_dict(self, tensors: Mapping[str, Tensor], held: Sequence[Mapping[str, Any]]) -> None:
        """Restore what `state_dict` gave; the draft of the beginning stays as it is."""
        floor = [tensors.get(f"guard.floor.{index}") for index in range(len(self._parameters))]
        weights = [weight for weight in floor if weight is not None]
        self.kept["floor"] = weights or self.kept["start"]
        self.held = []
        for index, one in enumerate(held):
            prefix = f"guard.held.{index}."
            parts = {
                name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
            }
            tallies = {name: Tally(**tally) for name, tally in one["tallies"].items()}
            self.held.append(Held(Rollout(**parts, max_new_tokens=one["max_new_tokens"]), tallies))


# The session


@dataclass
class LiveCounters:
    """How far a session is; in every checkpoint.

    Attributes:
        answers: answers so far.
        answer_s, learn_s: seconds of answering and of learning so far, by the session's clock.
        unguarded, unsaved: updates since the guard looked, and since the last checkpoint.
        saves: checkpoints so far.
        costs: seconds that an update, a look of the guard and a checkpoint took last, by these names.
    """

    answers: int = 0
    answer_s: float = 0.0
    learn_s: float = 0.0
    unguarded: int = 0
    unsaved: int = 0
    saves: int = 0
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
        clock: seconds from some moment on; what is learned when depends on nothing else that differs between two runs
            with fixed blocks (`adaptive` off). Adaptive blocks follow from measured times.

    Attributes:
        model: the model with its draft.
        trainer: makes the updates; holds buffer, baseline and optimizer.
        guard: what the session goes back to.
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
        found = load_drafter(drafter, model)
        if found.model.feedback or is_published(found.folder):
            kind = "reads the verifier's states" if found.model.feedback else "is a published adapter"
            raise DvirlError(
                f"{drafter}: it {kind}; expected a drafter of dvirl without feedback, to learn live"
            )
        self.model = found.model
        settings = training_settings(self.config, found, str(drafter))
        no_prompts = PromptSplit(PromptStream([[0]], None), [])  # they come from people
        self.trainer = DVITrainer(settings, model, no_prompts, seeded=True, draft=found)
        self.guard = Guard(
            self.model, self.trainer.shallow, self.config.guard_answers, self.config.guard_margin
        )
        self.counters = LiveCounters()
        self._clock = clock
        self._open = ExitStack()
        self._merged = ExitStack()

    @property
    def learns(self) -> bool:
        """Whether it learns at all."""
        return self.config.budget > 0

    @property
    def _folder(self) -> Path | None:
        """Where it keeps what it learns, if it does."""
        return Path(self.config.run_dir) if self.config.run_dir and self.learns else None

    def __enter__(self) -> Self:
        folder = self._folder
        if folder is not None:
            self._open.enter_context(run_folder.run_lock(folder))
            with ExitStack() as on_error:
                on_error.push(self._open)
                self._start(folder)
                on_error.pop_all()
        self._merge()
        self.model.block_policy(self.config.decode)  # adaptive blocks need the costs of steps, measured once
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._merged.close()
        with self._open:
            # What an error has left half-done is no state to go on from.
            whole = error is None or isinstance(error, KeyboardInterrupt | DvirlError)
            if self._folder is not None and self.counters.answers and whole:
                self._do("checkpoint")

    def _start(self, folder: Path) -> None:
        """Begin the log of a new folder, or go on from the newest checkpoint of one."""
        path = folder / "config.yaml"
        settings = self.trainer.config
        if path.exists():
            before = run_folder.run_settings(folder)
            names = {"start_from": settings.start_from}
            run_folder.refuse_other_settings(path, before, names, "choose another run_dir")
            fingerprint = read_yaml(path).get("model", {}).get("fingerprint")
            if not self.loaded.is_made_of(fingerprint):
                raise DvirlError(f"{path}: learned with the model {fingerprint}; choose another run_dir")
            if any(folder.glob("checkpoints/step-*")):
                self._load(checkpoint.newest(folder))
        run_folder.write_config(folder, settings, self.loaded, live=asdict(self.config))
        # A session that goes on writes the lines after its checkpoint again.
        (folder / "metrics.jsonl").touch()
        cut_log(folder / "metrics.jsonl", self.trainer.counters.step)
        for name in (EVENTS, TEXT):
            keep_lines(folder / name, self._is_before)

    def _is_before(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of the log was written before this session goes on; its checkpoint's own time counts too."""
        counters = self.counters
        if line.get("event") == "checkpoint" and line["saves"] == counters.saves:
            counters.learn_s += line["seconds"]
            counters.costs["checkpoint"] = line["seconds"]
        return bool(line["answer"] <= counters.answers)

    # Answers

    def answer(self, prompt: Sequence[int]) -> Decoded:
        """Answer a prompt, then learn if something is due and affordable; arguments and errors as in `stream`."""
        blocks = list(self.stream(prompt))
        self.learn()
        return Decoded([token for block in blocks for token in block.committed], blocks)

    def stream(self, prompt: Sequence[int]) -> Iterator[Verification]:
        """Answer a prompt, yielding each block as it is committed; what an ended answer has shown is kept.

        Args:
            prompt: token ids.

        Raises:
            ValueError: for a prompt that `check_prompt` refuses, or logits that are not finite.
        """
        config = self.config
        seed = config.seed + self.counters.answers
        decoding = self.model.decode_blocks(
            prompt, config.max_new_tokens, config.decode, self.loaded.eos_ids, seed=seed
        )
        blocks: list[Verification] = []
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
            if blocks:
                self._take(list(prompt), blocks)

    def _take(self, prompt: list[int], blocks: list[Verification]) -> None:
        """Take in what the verification of one answer has shown."""
        self.counters.answers += 1
        tally = Tally()
        tally.count(blocks[1:])  # the first one is the prefill's
        if self.learns:
            with self._timed("learn_s"):
                rollout = decoded_rollout(prompt, blocks, self.config.max_new_tokens)
                records = decoded_records(rollout, blocks)
                self.trainer.count(rollout, Judgement(records, [blocks[1:]]))
                if self.counters.answers % self.config.hold_every == 0:
                    self.guard.hold(rollout)
                else:
                    self.trainer.buffer.add(records, rollout)
        self._log("answer", tokens=tally.committed + blocks[0].block_len, mat=tally.mat)
        if self.config.keep_text and self._folder is not None:
            answer = [token for block in blocks for token in block.committed]
            decode = self.loaded.tokenizer.decode
            line = {"answer": self.counters.answers, "prompt": decode(prompt), "response": decode(answer)}
            log_line(self._folder / TEXT, line)

    # Learning

    def learn(self) -> str:
        """Do what is due if the budget allows it: an update, a look of the guard, or a checkpoint.

        Returns:
            What was done: "update", "guard", "back" (the guard went back), "checkpoint", or "" for nothing.
        """
        kind = self._due()
        if not kind or not self._affordable(kind):
            return ""
        self._merged.close()
        figures = self._do(kind)
        return "back" if figures.get("verdict") == "back" else kind

    def _do(self, kind: str) -> Mapping[str, Any]:
        """Do it, on the account of learning, and note it in the log; return its figures."""
        before = self.counters.learn_s
        figures: Mapping[str, Any] = {}
        with self._timed("learn_s"):
            if kind == "update":
                figures = self._update()
            elif kind == "guard":
                figures = self._look()
            else:
                self.save_checkpoint()
            self._merge()  # here and not in the next answer, so that it counts as learning
        self.counters.costs[kind] = self.counters.learn_s - before
        self._log(kind, seconds=self.counters.costs[kind], saves=self.counters.saves, **figures)
        return figures

    def _due(self) -> str:
        """What is to be done next; the guard comes before the update that would follow."""
        counters = self.counters
        config = self.config
        if counters.unguarded >= config.guard_every and self.guard.held:
            return "guard"
        if self._folder is not None and counters.unsaved >= config.checkpoint_every:
            return "checkpoint"
        return "update" if self.learns and self.trainer.buffer.due(config.fast_batch) else ""

    def _affordable(self, kind: str) -> bool:
        """Whether the budget holds if this takes as long as it did last time."""
        learning = self.counters.learn_s + self.counters.costs.get(kind, 0.0)
        return learning <= self.config.budget * (self.counters.answer_s + learning)

    def _update(self) -> dict[str, Any]:
        """One update of the trainer; its line of the log goes where the trainer's do."""
        self.trainer.buffer.skip_fresh(self.config.fresh)
        metrics = asdict(self.trainer.step())
        self.counters.unguarded += 1
        self.counters.unsaved += 1
        if self._folder is not None:
            log_line(self._folder / "metrics.jsonl", metrics)
        return {"loss": metrics["loss"]}

    def _look(self) -> dict[str, Any]:
        """Let the guard compare; moments of a draft that is gone are forgotten."""
        self.counters.unguarded = 0
        figures = self.guard.look()
        if figures["verdict"] == "back":
            self.trainer.fast_optimizer.state.clear()
        return figures

    def _merge(self) -> None:
        """Merge the adapters and pack the weights for the answers to come."""
        self._merged.enter_context(self.model.base_model.merged())
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

    def _log(self, event: str, **figures: Any) -> None:
        """A line of the session's own log, without any text."""
        if self._folder is not None:
            counters = self.counters
            line = {"answer": counters.answers, "event": event, "step": self.trainer.counters.step, **figures}
            log_line(self._folder / EVENTS, {**line, "learning_share": counters.learning_share})

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Write a checkpoint: all of the state, but without `keep_text` nothing that the text could be read from."""
        assert self._folder is not None
        self.counters.unsaved = 0
        self.counters.saves += 1
        trainer = self.trainer
        state = trainer.state_dict()
        # The global random generators are the program's, and draw nothing here.
        del state["numbers"]["random"]
        tensors = {name: value for name, value in state["tensors"].items() if not name.startswith("rng.")}
        if not self.config.keep_text:
            # Tokens are text, and so are the verifier's states: its head turns them into tokens.
            tensors = {name: value for name, value in tensors.items() if not name.startswith("buffer.")}
            state["numbers"]["buffer"] = ReplayBuffer(1).state_dict()["numbers"]
        guard = self.guard.state_dict(self.config.keep_text)
        numbers = {**state["numbers"], "live": asdict(self.counters), "held": guard["numbers"]}
        whole = {"tensors": {**tensors, **guard["tensors"]}, "numbers": numbers}
        checkpoint.save(self._folder, trainer.counters.step, trainer.peft_model, trainer.model, whole)
        checkpoint.prune(self._folder, 2)

    def _load(self, folder: Path) -> None:
        """Go on from a checkpoint; without its text the buffer and the guard's answers begin empty."""
        state = checkpoint.load(folder, self.trainer.peft_model, self.model)
        random = checkpoint.random_state()
        state["tensors"].update(random["tensors"])
        state["numbers"]["random"] = random["numbers"]
        self.trainer.load_state_dict(state)
        self.guard.load_state_dict(state["tensors"], state["numbers"]["held"])
        self.counters = LiveCounters(**state["numbers"]["live"])
