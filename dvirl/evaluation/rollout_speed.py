"""How much faster drafts are scored in batched rollouts than step by step: `python -m dvirl.evaluation.rollout_speed`.

Both ways answer the same prompts with the same verifier and score the same drafts; they alternate, and the medians
of several repeats are compared.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from dvirl.config import DVIConfig
from dvirl.data.stream import load_prompts
from dvirl.evaluation.inference_kangaroo import measure_acceptance
from dvirl.lora import attach_draft
from dvirl.models.loading import load
from dvirl.rollout import generate, judge
from dvirl.runs.folder import provenance
from dvirl.runs.log import write_json


def compare(config: DVIConfig, num_prompts: int, repeats: int) -> dict[str, object]:
    """Scored drafts a second, both ways, on the first `num_prompts` of the configured stream in each repeat."""
    torch.set_num_threads(config.threads)
    loaded = load(config.model_name, config.dtype, config.device, config.chat_format)
    prompts = load_prompts(config, loaded).stream.take(num_prompts)
    _, model = attach_draft(loaded.model, config, deep=True)

    def step_by_step() -> int:
        return measure_acceptance(
            model, prompts, config.max_new_tokens, config.decode, loaded.eos_ids, show_progress=False
        ).num_drafted

    def batched() -> int:
        rollout = generate(loaded.model, prompts, config.max_new_tokens, loaded.eos_ids, config.target)
        return sum(len(judge(model, group, config.decode).records) for group in rollout.groups(config.judge_batch))

    ways: dict[str, Callable[[], int]] = {"batched": batched, "step_by_step": step_by_step}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            rates[name].append(way() / (time.perf_counter() - began))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "drafts_per_s": rates,
        "median_drafts_per_s": medians,
        "ratio": medians["batched"] / medians["step_by_step"],
        "num_prompts": num_prompts,
        "threads": config.threads,
        **provenance(loaded),
    }


def main() -> None:
    """Measure, print, and write the result if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_prompts", type=int, default=16, help="prompts that each repeat answers")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each way; medians are compared")
    parser.add_argument("--out", default="", help="also write the result to this JSON file")
    args = parser.parse_args()
    result = compare(DVIConfig(), args.num_prompts, args.repeats)
    print(json.dumps(result, indent=1))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
