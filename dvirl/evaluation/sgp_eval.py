"""One checkpoint in three figures, accept rate, throughput and perplexity: `dvirl sgp-eval --ckpt_dir FOLDER`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dvirl.data.examples import make_example
from dvirl.data.sources import chatterbot_prompts
from dvirl.evaluation.inference_kangaroo import measure_acceptance
from dvirl.metrics import verifier_figures, verifier_sums
from dvirl.models.drafters import load_drafter
from dvirl.models.loading import load
from dvirl.runs import errors
from dvirl.runs.checkpoint import newest
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import provenance
from dvirl.runs.log import write_json
from kangaroo.decoding.blocks import DecodeConfig


def main(argv: Sequence[str]) -> dict[str, float]:
    """Decode openings of chatterbot-corpus with a checkpoint's draft, and score their human replies by its verifier.

    Returns:
        `accept_rate`, `mat`, `tok_per_s` over the openings, and `ppl`, `ppl_untouched`, `drift_kl`, `drift_tokens` on
        the replies with lora_S on, as shallow-gradient training leaves the model.

    Raises:
        DvirlError: for bad input.
    """
    parser = argparse.ArgumentParser(prog="dvirl sgp-eval", description=__doc__)
    parser.add_argument("--ckpt_dir", required=True, help="a checkpoint, a run's folder (its newest), or a drafter")
    parser.add_argument("--model_name", default="", help="model to load it into; its own by default")
    parser.add_argument("--exit_layer", type=int, default=0, help="refuse a checkpoint of another exit layer")
    parser.add_argument("--n_samples", type=int, default=32, help="openings and replies, the first of the corpus")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length limit of an answer")
    parser.add_argument("--draft_len", type=int, default=4, help="tokens drafted before a verification, at most")
    parser.add_argument("--threshold", type=float, default=0.0, help="confidence below which drafting stops")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="torch threads; 2 by default")
    parser.add_argument("--out", default="", help="also write the figures to this JSON file")
    args = parser.parse_args(list(argv))
    for name in ("n_samples", "max_new_tokens", "threads"):
        if getattr(args, name) < 1:
            raise DvirlError(f"{name} is {getattr(args, name)}; expected at least 1")
    torch.set_num_threads(args.threads)
    folder = newest(args.ckpt_dir) if (Path(args.ckpt_dir) / "checkpoints").is_dir() else args.ckpt_dir
    given = load(args.model_name, args.dtype, args.device) if args.model_name else None
    drafter = load_drafter(folder, given, args.dtype, args.device)
    model, loaded = drafter.model, drafter.loaded
    if args.exit_layer not in (0, loaded.model.exit_layer):
        raise DvirlError(f"exit_layer is {args.exit_layer}; {folder} was made for {loaded.model.exit_layer}")
    try:
        settings = DecodeConfig(args.draft_len, args.threshold)
    except ValueError as error:
        raise DvirlError(str(error)) from error
    samples = chatterbot_prompts()[: args.n_samples]
    prompts = [loaded.chat.encode(one.turns) for one in samples]
    speed = measure_acceptance(model, prompts, args.max_new_tokens, settings, loaded.eos_ids)
    replies = [loaded.chat.encode_response(one.response) for one in samples]
    examples = [make_example(*pair) for pair in zip(prompts, replies, strict=True)]
    said = verifier_figures(torch.stack([verifier_sums(loaded.model, [one], "adapted") for one in examples]).sum(dim=0))
    found = {"accept_rate": speed.accept_rate, "mat": speed.mat, "tok_per_s": speed.tok_per_s, **said}
    print("\n".join(f"{name:14} {value:.4g}" for name, value in found.items()))
    if args.out:
        write_json(args.out, {"arguments": vars(args), **provenance(loaded), "figures": found})
    return found


if __name__ == "__main__":
    sys.exit(errors.guarded(main, sys.argv[1:]))
