"""A finished run, judged by the step-by-step decoder on its held-out prompts: `dvirl acceptance RUN_DIR`."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dvirl.config import DVIConfig
from dvirl.evaluation.inference_kangaroo import Acceptance, measure_acceptance
from dvirl.models.drafters import Draft as Draft
from dvirl.models.drafters import open_draft as open_draft
from dvirl.runs.checkpoint import newest
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import run_settings
from dvirl.runs.log import write_json
from dvirl.runs.settings import from_mapping
from dvirl.trainer import DVITrainer
from kangaroo.decoding.blocks import DecodeConfig


def open_run(run_dir: str | Path, **changes: object) -> tuple[DVITrainer, Path]:
    """The trainer of a run as it was before its first step, and the folder of its newest checkpoint.

    Args:
        run_dir: a run's folder, with `config.yaml` and at least one checkpoint.
        changes: settings of the run to replace, such as dtype and device.

    Raises:
        DvirlError: if the folder holds no run.
    """
    checkpoint, settings = newest(run_dir), {**run_settings(run_dir), **changes}
    return DVITrainer(from_mapping(DVIConfig, settings, f"{run_dir}/config.yaml")), checkpoint


def evaluate_run(run_dir: str | Path, num_prompts: int = 0) -> dict[str, Acceptance]:
    """Decode held-out prompts with the untrained draft, the trained one, and without any.

    Args:
        run_dir: as in `open_run`.
        num_prompts: how many of the held-out prompts; 0 for all.

    Returns:
        "plain" (trained verifier, no drafts), "untrained" and "trained".

    Raises:
        DvirlError: if the folder holds no run, or nothing was held out.
    """
    trainer, checkpoint = open_run(run_dir)
    config, prompts = trainer.config, trainer.split.held_out[: num_prompts or None]
    if not prompts:
        raise DvirlError(f"{run_dir}: the run held out no prompts; expected held_out of at least 1")

    def measure(decode: DecodeConfig) -> Acceptance:
        return measure_acceptance(trainer.model, prompts, config.max_new_tokens, decode, trainer.loaded.eos_ids)

    untrained = measure(config.decode)
    trainer.load_checkpoint(checkpoint)
    plain = measure(dataclasses.replace(config.decode, draft_len=0))
    return {"plain": plain, "untrained": untrained, "trained": measure(config.decode)}


def main(argv: Sequence[str]) -> None:
    """Measure a run, print a table, and write the result if asked to."""
    parser = argparse.ArgumentParser(prog="dvirl acceptance", description=__doc__)
    parser.add_argument("run_dir", help="folder of a run")
    parser.add_argument("--num_prompts", type=int, default=0, help="held-out prompts to decode; 0 for all")
    parser.add_argument("--out", default="", help="also write the figures to this JSON file")
    args = parser.parse_args(list(argv))
    found = evaluate_run(args.run_dir, args.num_prompts)
    print(f"{'':10} {'accept_rate':>11} {'mat':>6} {'tok_per_s':>9} {'drafted':>8} {'tokens':>7}")
    for name, one in found.items():
        rate = f"{one.accept_rate:11.3f} {one.mat:6.3f} {one.tok_per_s:9.1f}"
        print(f"{name:10} {rate} {one.num_drafted:8d} {one.num_tokens:7d}")
    same = sum(a == b for a, b in zip(found["plain"].responses, found["trained"].responses, strict=True))
    print(f"{same} of {len(found['plain'].responses)} responses equal those of the same verifier without drafts")
    if args.out:
        figures = {name: {**dataclasses.asdict(one), "responses": None} for name, one in found.items()}
        write_json(args.out, {"run_dir": str(args.run_dir), "figures": figures, "equal_responses": same})
