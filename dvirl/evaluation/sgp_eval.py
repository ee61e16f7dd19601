"""One checkpoint in a few figures, or a run before and after training: `dvirl sgp-eval --ckpt_dir FOLDER`."""

import operator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dvirl.config import DVIConfig
from dvirl.data.sources import chatterbot_prompts
from dvirl.evaluation.inference_kangaroo import measure_acceptance
from dvirl.evaluation.measure import judge_replies
from dvirl.evaluation.report import write_out
from dvirl.models.drafters import DrafterOptions, load_drafter
from dvirl.runs.checkpoint import newest
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import provenance, run_settings
from dvirl.runs.settings import command_line, from_mapping, number, required
from dvirl.train_dvi import make_trainer
from kangaroo.decoding.blocks import DecodeConfig


@dataclass(frozen=True)
class SGPEvalConfig(DrafterOptions):
    """Settings of `dvirl sgp-eval`."""

    ckpt_dir: str = required()
    """Folder of a checkpoint, of a run (its newest checkpoint), of a drafter, or of a published Kangaroo adapter."""
    held_out: bool = False
    """Instead decode held-out prompts of the run in ckpt_dir, before and after training, with the run's settings."""
    n_samples: int = number(32, 1)
    """Number of prompts, the first ones: openings and replies of chatterbot-corpus, or held-out prompts."""
    max_new_tokens: int = number(64, 1)
    """Most tokens of an answer."""
    draft_len: int = number(4, 0)
    """Most tokens drafted before a verification."""
    threshold: float = number(0.0, 0, 1)
    """Confidence below which drafting stops."""
    dtype: str = "auto"
    """Of the weights: auto, float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = number(2, 1, 1024)
    """CPU threads of torch."""
    out: str = ""
    """Also write the figures to this JSON file."""


parse_args = command_line(
    SGPEvalConfig,
    "dvirl sgp-eval",
    "Measure acceptance rate, throughput and perplexity.",
)
"""Settings from flags; see `settings.parse_args`."""


def _compare_run(asked: SGPEvalConfig) -> dict[str, Any]:
    """Print and return what a run's held-out prompts show: without drafts, and before and after training.

    Raises:
        DvirlError: if the folder holds no run, or nothing was held out.
    """
    run_dir = asked.ckpt_dir
    checkpoint = newest(run_dir)
    trainer = make_trainer(from_mapping(DVIConfig, run_settings(run_dir), f"{run_dir}/config.yaml"))
    config = trainer.config
    prompts = trainer.split.held_out[: asked.n_samples]
    if not prompts:
        raise DvirlError(f"{run_dir}: the run held out no prompts; expected held_out of at least 1")
    measure = partial(
        measure_acceptance,
        trainer.model,
        prompts,
        config.max_new_tokens,
        eos_ids=trainer.loaded.eos_ids,
    )
    # 1) The draft before its first step, 2) the newest checkpoint, with drafts and without.
    untrained = measure(config.decode)
    trainer.load_checkpoint(checkpoint)
    plain = measure(replace(config.decode, draft_len=0))
    trained = measure(config.decode)
    table = pd.DataFrame([plain, untrained, trained], ["plain", "untrained", "trained"])
    print(table.drop(columns="responses").to_string(float_format="{:.3f}".format))
    equal = sum(map(operator.eq, plain.responses, trained.responses))
    print(f"{equal} of {len(prompts)} responses equal those of the same verifier without drafts")
    return {"figures": table.assign(responses=None).to_dict("index"), "equal_responses": equal}


def _judge_checkpoint(config: SGPEvalConfig) -> dict[str, Any]:
    """Print and return the figures of one checkpoint.

    The draft decodes openings of chatterbot-corpus. The verifier scores their human replies with lora_S on, as
    shallow-gradient training leaves the model.
    """
    folder = Path(config.ckpt_dir)
    if (folder / "checkpoints").is_dir():
        folder = newest(folder)
    drafter = load_drafter(folder, None, config.dtype, config.device, config.model_name, config.exit_layer)
    loaded = drafter.loaded
    how = DecodeConfig(config.draft_len, config.threshold)
    samples = chatterbot_prompts()[: config.n_samples]
    prompts = [loaded.chat.encode(sample.turns) for sample in samples]
    speed = measure_acceptance(drafter.model, prompts, config.max_new_tokens, how, loaded.eos_ids)
    figures = {
        "accept_rate": speed.accept_rate,
        "mat": speed.mat,
        "tok_per_s": speed.tok_per_s,
        **judge_replies(loaded, samples, "adapted"),
    }
    for name, value in figures.items():
        print(f"{name:14} {value:.4g}")
    return {**provenance(loaded), "figures": figures}


def main(config: SGPEvalConfig) -> dict[str, Any]:
    """Measure, print, and write the figures if asked to.

    Returns:
        For a checkpoint: `accept_rate`, `mat`, `tok_per_s` over the openings, and `ppl`, `ppl_untouched`, `drift_kl`,
        `drift_tokens` on the replies. For a run's held-out prompts: the figures of each draft.

    Raises:
        DvirlError: for bad input.
    """
    torch.set_num_threads(config.threads)
    content = _compare_run(config) if config.held_out else _judge_checkpoint(config)
    write_out(config, **content)
    figures: dict[str, Any] = content["figures"]
    return figures
