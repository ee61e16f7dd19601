"""The settings of every run: the model, the draft, and how DVI trains it."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import MANY, ModelSettings, Settings, choice, number
from dvirl.runs.trackers import TRACKERS
from kangaroo.adapter import DRAFTERS
from kangaroo.decoding.blocks import TARGETS, DecodeConfig
from kangaroo.kangaroo_model import HEADS
from kangaroo.sgp_lora import LORA_TARGETS

SOURCES = ("chatterbot", "docstrings", "magpie", "sharegpt", "dolly", "jsonl", "spec_bench")
SCHEDULES = ("reinforce", "exact_pg", "ce", "masked_ce", "kl", "tv", "kl_to_rl")


@dataclass(frozen=True)
class DraftSettings(ModelSettings):
    """Where the model is split, and what drafts: lora_S, the drafter between exit state and exit head, and the head."""

    exit_layer: int = number(6, 1, 1000)
    """k: layers[:k] draft, layers[k:] verify."""
    lora_rank: int = number(16, 1, 4096)
    """Rank of lora_S and lora_D."""
    lora_alpha: float = number(32.0, 1e-9, 1e6)
    """The LoRA update is scaled by lora_alpha / lora_rank."""
    lora_targets: str = ",".join(LORA_TARGETS)
    """Linear layers that get LoRA, separated by commas."""
    lora_shallow: bool = True
    """Train lora_S; off leaves it at zero, and the shallow layers are the untouched model's."""
    drafter: str = choice("none", DRAFTERS)
    """Between exit state and exit head: none, adapter (Kangaroo's attention and norms), layer (a decoder layer)."""
    drafter_layers: int = number(1, 1, 64)
    """Number of such layers; the first starts as a copy of base layer k, the next of k + 1, and so on."""
    adapter_window: int = number(64, 1)
    """Number of recent positions that the drafter's attention sees."""
    feedback: bool = False
    """The drafter also reads the verifier's last state of the position before, and within a block its own."""
    recurrent: bool = False
    """With feedback: later drafts of a block skip the shallow layers and read the token's embedding in their place."""
    middle_layer: int = number(0, 0, 1000)
    """With feedback: the drafter also reads the verifier's state after this layer (as EAGLE-3 does); 0 for none."""
    head: str = choice("full", HEADS)
    """Exit head: full (a float32 copy of lm_head's rows, trained), lora (a low-rank change of them) or frozen."""
    head_rank: int = number(64, 1, 4096)
    """head lora: its rank."""
    draft_vocab: int = number(8192, 0)
    """Number of tokens that the exit head covers, the most frequent of some responses of the model; 0 for all."""

    def drafter_args(self, draft_vocab: Sequence[int] | None) -> Namespace:
        """The arguments from which `KangarooModel` makes the drafter."""
        return Namespace(**{**vars(self), "draft_vocab": draft_vocab})

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = set(self.lora_targets.split(",")) - set(LORA_TARGETS)
        if unknown:
            names = ", ".join(sorted(unknown))
            raise DvirlError(f"lora_targets has {names}; expected some of {', '.join(LORA_TARGETS)}")
        if self.middle_layer and not self.feedback:
            raise DvirlError(f"middle_layer is {self.middle_layer}; expected feedback with it")
        if self.recurrent and not self.feedback:
            raise DvirlError(
                "recurrent is true; expected feedback with it: later drafts read the earlier ones' states"
            )


@dataclass(frozen=True)
class TrainSettings(DraftSettings):
    """Settings that every training has."""

    on_bad_row: str = choice("refuse", ("refuse", "skip"))
    """A row that is malformed, or that the chat format cannot spell, is an error (refuse), or is reported and left out
    (skip)."""
    warmup_steps: int = number(10, 0)
    """Steps (fast updates) over which the rate (lr_shallow) grows from 0."""
    grad_clip: float = number(1.0, 1e-9, MANY)
    """Norm to which gradients are clipped."""
    checkpoint_every: int = number(100, 1)
    """Steps (fast updates) between checkpoints, which fall between two rollouts; one is always written at the end."""
    keep_checkpoints: int = number(3, 1)
    """Newest checkpoints that are kept; so is the one with the best acceptance rate of the steps before it."""


@dataclass(frozen=True)
class DVIConfig(TrainSettings):
    """Everything that a training run depends on."""

    # Where it starts, and the prompts

    start_from: str = ""
    """Checkpoint or drafter folder whose lora_S and drafter the run starts from, with the same drafter settings; or a
    published Kangaroo adapter, from which drafter, drafter_layers and adapter_window follow (exit_layer does not)."""
    prompts_source: str = choice("chatterbot", SOURCES)
    """chatterbot, docstrings, magpie, sharegpt, dolly, jsonl or spec_bench."""
    prompts_path: str = ""
    """File (JSON, JSONL, either with .gz, or parquet) or hub data set (NAME, NAME:CONFIG or NAME:CONFIG:SPLIT) for the
    sources that need one; magpie: kinds of prompts, by commas, or all."""
    num_prompts: int = number(256, 1)
    """Number of prompts to train on; if there are fewer, the stream starts over in another order."""
    held_out: int = number(64, 0)
    """Number of prompts that are kept for evaluation and not trained on."""
    max_prompt_tokens: int = number(512, 1)
    """Longer prompts are left out, and those that leave no room for a response in the model's context."""
    max_new_tokens: int = number(64, 2)
    """Length limit of a response."""

    # How drafts are made, and which of them are learned from

    draft_len: int = number(2, 1, 64)
    """Number of tokens drafted before a verification, at most."""
    threshold: float = number(0.0, 0, 1)
    """Confidence below which a draft is the last of its block, 0 to 1; 0 never stops early."""
    target: str = choice("base", TARGETS)
    """What the deep layers read: base (lora_S off, lossless) or adapted."""
    actions: str = choice("sampled", ("sampled", "argmax"))
    """Draft tokens that are learned from: sampled from the policy (the true policy gradient) or its argmax."""
    action_temperature: float = number(1.0, 1e-3, 100)
    """Temperature of sampled actions."""
    records: str = choice("all", ("all", "accepted"))
    """Drafts that are learned from: all that were scored, or accepted ones alone. The latter is kept as an experiment:
    their reward is 1 everywhere, so the baseline is 1 as well, and REINFORCE learns nothing."""
    exit_states: str = choice("recomputed", ("recomputed", "stored"))
    """What a fast update reads: exit states recomputed with gradients, or, as an experiment, those in the records. A
    stored state is detached, so exit norm and head learn and lora_S does not; only without a drafter."""

    # The objective of the fast update

    schedule: str = choice("kl_to_rl", SCHEDULES)
    """Fast objective, see `dvirl.losses`: by reward (reinforce, exact_pg, masked_ce), by imitation (ce, kl, tv), or
    kl_to_rl (distil first, then ramp to reward)."""
    kl_kind: str = choice("forward", ("forward", "reverse", "js"))
    """Divergence of kl, kl_to_rl and kl_weight: forward, from verifier to draft, reverse, or js (Jensen-Shannon)."""
    kl_top_k: int = number(0, 0)
    """That divergence takes the verifier's K likeliest tokens, and all others as one; 0 for all tokens of the draft."""
    kl_weight: float = number(0.0, 0, 1e6)
    """Weight of that divergence when added to any schedule; 0.2 keeps drafts trained by reward alone calibrated."""
    entropy_weight: float = number(0.0, 0, 1e6)
    """Weight of the policy's entropy in nats, a bonus in any schedule."""
    ramp_start: float = number(0.5, 0, 1)
    """kl_to_rl: share of the run after which the reward's weight begins to grow."""
    ramp_end: float = number(1.0, 0, 1)
    """kl_to_rl: share of the run at which the reward has its full weight."""
    kl_floor: float = number(0.5, 0, 1)
    """kl_to_rl: weight that the KL keeps; without any, drafts lose their calibration."""

    # When updates happen, and on how much

    rollout_batch: int = number(64, 1, 65536)
    """Number of prompts that the verifier answers in one batch, in each process; in several if the memory is short."""
    judge_batch: int = number(2, 1, 65536)
    """Number of responses that the current draft is judged on at once, in each process."""
    fast_batch: int = number(8, 1)
    """Accepted tokens that trigger a fast update, of all processes together."""
    replay: int = number(1, 0, 1000)
    """Number of replay steps after each fast update, each on as many older responses and with the same loss (kl_to_rl:
    KL). There are none with reinforce and masked_ce, which need fresh drafts."""
    slow_every: int = number(0, 0)
    """Fast updates between slow updates, which change the verifier; 0 leaves the model as it is."""
    slow_batch: int = number(2, 1, 65536)
    """Number of most recent responses that a slow update uses, in each process."""
    beta_kl: float = number(0.1, 0, 1e6)
    """Weight of the slow update's KL to the frozen verifier."""
    drift_bound: float = number(0.05, 0, 1e6)
    """Drift of the verifier, in nats a token, above which a rising acceptance rate is called suspect; 0 never warns."""
    # Rewards and rates

    baseline: str = choice("ema", ("ema", "mean", "none"))
    """What REINFORCE subtracts from the reward: its moving average (ema), the mean of all before, or nothing."""
    baseline_momentum: float = number(0.9, 0, 0.999999)
    """Of the ema baseline; 0 to below 1."""
    buffer_size: int = number(16384, 1)
    """Number of records in the buffer; the oldest leave first."""
    lr_shallow: float = number(4e-3, 0, 10)
    """AdamW rate of lora_S, drafter and exit head."""
    lr_deep: float = number(5e-6, 0, 10)
    """AdamW rate of lora_D."""
    lr_schedule: str = choice("cosine", ("constant", "cosine"))
    """Of lr_shallow over the run: constant, or cosine down to a tenth."""

    tracker: str = choice("auto", TRACKERS)
    """Where figures go besides metrics.jsonl, by Accelerate: auto (TensorBoard if installed), none, all, or one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # What no field can say of itself.
        if self.ramp_end < self.ramp_start:
            raise DvirlError(f"ramp_end is {self.ramp_end}; expected at least ramp_start, {self.ramp_start}")
        if self.exit_states == "stored" and self.drafter != "none":
            raise DvirlError(f"exit_states is stored; expected drafter none with it, not {self.drafter}")
        if self.feedback and (self.exit_states == "stored" or self.target == "adapted"):
            raise DvirlError(
                "feedback reads the verifier's states; expected target base and exit_states recomputed with it"
            )

    @property
    def decode(self) -> DecodeConfig:
        """How the decoder drafts when it serves: by argmax."""
        return DecodeConfig(self.draft_len, self.threshold, self.target)

    @property
    def learn(self) -> DecodeConfig:
        """How the drafts to learn from are made."""
        # A temperature of 0 is the argmax. Only sampled drafts give an unbiased policy gradient.
        temperature = self.action_temperature if self.actions == "sampled" else 0.0
        return replace(self.decode, draft_temperature=temperature)

    @property
    def policy_temperature(self) -> float:
        """The temperature of the policy in the objectives: that of sampled actions, 1 for argmax."""
        return self.action_temperature if self.actions == "sampled" else 1.0


@dataclass(frozen=True)
class Resumable(Settings):
    """What a command that trains takes besides the settings of its run."""

    resume: str = ""
    """Folder of a run to go on with, from its newest checkpoint and with its settings."""
    accept_changes: bool = False
    """Let a run go on with settings that other flags change, or with other prompts under the same name."""


@dataclass(frozen=True)
class SGPConfig(TrainSettings):
    """Everything that shallow-gradient fine-tuning depends on; AdamW, warm-up, then a cosine down to a tenth."""

    run_dir: str = "runs/sgp"
    """Folder of this run: config.yaml, metrics.jsonl, checkpoints/."""
    records_path: str = ""
    """File or hub data set, as in `dvirl train`, of supervised records: in Dolly's, Alpaca's or self-instruct's schema,
    or conversations, of which the first question and its answer are taken."""
    held_out_share: float = number(0.1, 0, 0.9)
    """Share of the records kept out of training, for evaluation before and after; 0 evaluates nothing."""
    max_tokens: int = number(256, 2)
    """Longer records are cut at their end; those whose prompt alone is this long are left out."""
    detach_exit: bool = True
    """Cut loss_main off the shallow layers. As no deep layer is trained, it then trains nothing and is a figure to
    watch, which moves as lora_S changes what the deep layers read; off, it trains lora_S through the frozen layers."""
    beta_exit: float = number(0.7, 0, 1e6)
    """Weight of loss_exit next to loss_main."""
    epochs: int = number(1, 1)
    """Passes over the training records."""
    max_steps: int = number(0, 0)
    """Steps at most; 0 for no limit but the epochs'."""
    batch_size: int = number(8, 1, 65536)
    """Records a step."""
    lr: float = number(2e-4, 0, 10)
    """AdamW's highest rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedback:
            raise DvirlError(
                "feedback is true; expected false: both heads learn here from the text, not from drafts"
            )
