"""Settings: one frozen dataclass, checked when it is made, readable from flags, YAML and notebooks."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dvirl.errors import DvirlError
from kangaroo.adapter import DRAFTERS
from kangaroo.earlyexit import TARGETS, DecodeConfig
from kangaroo.kangaroo_model import HEADS
from kangaroo.sgp_lora import LORA_TARGETS

SOURCES = ("chatterbot", "magpie", "sharegpt", "dolly", "jsonl", "spec_bench")
SCHEDULES = ("reinforce", "kl", "ce", "kl_to_rl")
ACTIONS = ("sampled", "argmax")
BAD_ROWS = ("refuse", "skip")
LR_SCHEDULES = ("constant", "cosine")

Config = TypeVar("Config")


@dataclass(frozen=True)
class DVIConfig:
    """Everything that a training run depends on.

    Raises:
        DvirlError: when made with a value out of range; the message names field, value and range.
    """

    model_name: str = "smollm2-135m"
    """Embedded name, local folder or hub id of a Llama-architecture model."""
    chat_format: str = "auto"
    """auto, chatml, vicuna, llama-2 or none."""
    dtype: str = "auto"
    """Of the base weights: auto (bfloat16 where the hardware is fast at it), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = 2
    """CPU threads of torch; more than the free cores starve one another."""
    seed: int = 0
    """Of prompts, initial weights, and sampled drafts."""
    run_dir: str = "runs/train"
    """Folder of this run: config.yaml, metrics.jsonl, checkpoints/."""

    prompts_source: str = "chatterbot"
    """chatterbot, magpie, sharegpt, dolly, jsonl or spec_bench."""
    prompts_path: str = ""
    """File (JSON or JSONL) or hub id for the sources that need one."""
    on_bad_row: str = "refuse"
    """A malformed row is an error (refuse) or is reported and left out (skip)."""
    num_prompts: int = 256
    """Prompts to train on; the stream starts over, shuffled anew, if it has fewer."""
    held_out: int = 64
    """Prompts kept out of the stream, for evaluation."""
    max_prompt_tokens: int = 512
    """Longer prompts are left out."""
    max_new_tokens: int = 64
    """Length limit of a response."""

    exit_layer: int = 6
    """k: layers[:k] draft, layers[k:] verify."""
    drafter: str = "none"
    """Between exit state and exit head: none, adapter (Kangaroo's attention and norms), layer (a decoder layer)."""
    adapter_window: int = 64
    """Positions back that the drafter's own attention sees."""
    head: str = "full"
    """Exit head: full (a float32 copy of lm_head's rows, trained) or frozen (lm_head's own rows)."""
    draft_vocab: int = 8192
    """Tokens that the exit head covers, the most frequent of the first rollout's responses; 0 for all."""
    lora_rank: int = 16
    """Rank of lora_S and lora_D."""
    lora_alpha: float = 32.0
    """The LoRA update is scaled by lora_alpha / lora_rank."""
    lora_targets: str = ",".join(LORA_TARGETS)
    """Linear layers that get LoRA, separated by commas."""

    draft_len: int = 2
    """Tokens drafted before a verification, at most."""
    threshold: float = 0.0
    """Confidence below which a draft is the last of its block, 0 to 1; 0 never stops early."""
    target: str = "base"
    """What the deep layers read: base (lora_S off, lossless) or adapted."""
    actions: str = "sampled"
    """Draft tokens that are learned from: sampled from the policy (the true policy gradient) or its argmax."""
    action_temperature: float = 1.0
    """Temperature of sampled actions."""

    schedule: str = "kl_to_rl"
    """Fast objective: reinforce, kl, ce, or kl_to_rl (distil first, then ramp to reward)."""
    ramp_start: float = 0.5
    """kl_to_rl: share of the run after which the reward's weight begins to grow."""
    ramp_end: float = 1.0
    """kl_to_rl: share of the run at which the reward has its full weight."""
    kl_floor: float = 0.5
    """kl_to_rl: weight that the KL keeps; without any, drafts lose their calibration."""
    rollout_batch: int = 64
    """Prompts answered by the verifier in one batch."""
    judge_batch: int = 2
    """Responses drafted on at once, by the draft as it is then."""
    fast_batch: int = 8
    """Accepted tokens that trigger a fast update."""
    replay: int = 1
    """kl and kl_to_rl: further steps after each fast update, each on as many older responses, by distillation."""
    slow_every: int = 16
    """Fast updates between slow updates; 0 turns the slow update off."""
    slow_batch: int = 2
    """Most recent responses that a slow update looks at."""
    beta_kl: float = 0.1
    """Weight of the slow update's KL to the frozen verifier."""
    baseline_momentum: float = 0.9
    """Of the moving average of the reward that REINFORCE subtracts; 0 to below 1."""
    buffer_size: int = 16384
    """Records kept, first in, first out."""
    lr_shallow: float = 4e-3
    """AdamW rate of lora_S, drafter and exit head."""
    lr_deep: float = 5e-6
    """AdamW rate of lora_D."""
    lr_schedule: str = "cosine"
    """Of lr_shallow over the run: constant, or cosine down to a tenth."""
    warmup_steps: int = 10
    """Fast updates over which lr_shallow grows from 0."""
    grad_clip: float = 1.0
    """Norm to which gradients are clipped."""
    checkpoint_every: int = 100
    """Fast updates between checkpoints, which fall between two rollouts; one is always written at the end."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise DvirlError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        for name, (lowest, highest) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
                raise DvirlError(f"{name} is {value!r}; expected a number from {lowest:g} to {highest:g}")
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.type in ("int", "str") and type(value).__name__ != spec.type:
                raise DvirlError(f"{spec.name} is {value!r}; expected {spec.type}")
        if self.ramp_end < self.ramp_start:
            raise DvirlError(f"ramp_end is {self.ramp_end}; expected at least ramp_start, {self.ramp_start}")
        unknown = set(self.lora_targets.split(",")) - set(LORA_TARGETS)
        if unknown:
            raise DvirlError(
                f"lora_targets has {', '.join(sorted(unknown))}; expected some of {', '.join(LORA_TARGETS)}"
            )

    @property
    def decode(self) -> DecodeConfig:
        """How the served decoder drafts: by argmax."""
        return DecodeConfig(self.draft_len, self.threshold, self.target)

    @property
    def learn(self) -> DecodeConfig:
        """How the drafts are made that are learned from."""
        temperature = self.action_temperature if self.actions == "sampled" else 0.0
        return dataclasses.replace(self.decode, draft_temperature=temperature)


_MANY = 1e9
_CHOICES: dict[str, tuple[str, ...]] = {
    "prompts_source": SOURCES,
    "on_bad_row": BAD_ROWS,
    "drafter": DRAFTERS,
    "head": HEADS,
    "target": TARGETS,
    "actions": ACTIONS,
    "schedule": SCHEDULES,
    "lr_schedule": LR_SCHEDULES,
}
_RANGES: dict[str, tuple[float, float]] = {
    "threads": (1, 1024),
    "seed": (0, 2**63 - 1),
    "num_prompts": (1, _MANY),
    "held_out": (0, _MANY),
    "max_prompt_tokens": (1, _MANY),
    "max_new_tokens": (2, _MANY),
    "exit_layer": (1, 1000),
    "adapter_window": (1, _MANY),
    "draft_vocab": (0, _MANY),
    "lora_rank": (1, 4096),
    "lora_alpha": (1e-9, 1e6),
    "draft_len": (1, 64),
    "threshold": (0, 1),
    "action_temperature": (1e-3, 100),
    "ramp_start": (0, 1),
    "ramp_end": (0, 1),
    "kl_floor": (0, 1),
    "rollout_batch": (1, 65536),
    "judge_batch": (1, 65536),
    "fast_batch": (1, _MANY),
    "replay": (0, 1000),
    "slow_every": (0, _MANY),
    "slow_batch": (1, 65536),
    "beta_kl": (0, 1e6),
    "baseline_momentum": (0, 0.999999),
    "buffer_size": (1, _MANY),
    "lr_shallow": (0, 10),
    "lr_deep": (0, 10),
    "warmup_steps": (0, _MANY),
    "grad_clip": (1e-9, 1e9),
    "checkpoint_every": (1, _MANY),
}


def from_mapping(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """A settings object from names and values.

    Args:
        kind: a settings dataclass.
        values: field names and values; what is missing takes its default.
        where: what the values came from, for messages.

    Raises:
        DvirlError: for an unknown name or a value out of range.
    """
    known = [spec.name for spec in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise DvirlError(f"{where}: unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return kind(**values)


def from_namespace(kind: type[Config], args: Namespace | Config) -> Config:
    """A settings object from argparse's namespace; a settings object passes through."""
    return from_mapping(kind, vars(args), "arguments") if isinstance(args, Namespace) else args


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The names and values of a YAML settings file.

    Raises:
        DvirlError: if it cannot be read or is no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise DvirlError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DvirlError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise DvirlError(f"{path}: expected a mapping of settings to values")
    return {str(name): value for name, value in values.items()}


def with_help(kind: type[Config]) -> type[Config]:
    """The same settings class with each field's docstring as its `help` metadata, which HfArgumentParser shows."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name) and isinstance(following.value, ast.Constant)
            texts[statement.target.id] = str(following.value.value).replace("%", "%%")
    specs = [
        (spec.name, spec.type, field(default=spec.default, metadata={"help": texts[spec.name]}))
        for spec in dataclasses.fields(kind)  # type: ignore[arg-type]
    ]
    return dataclasses.make_dataclass(kind.__name__, specs)
