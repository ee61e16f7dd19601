"""Answers prompts with vLLM, plainly and with a draft model; run in an environment of its own.

`python with_vllm.py JOB.json RESULT.json`; `check.py` writes the job and reads the result.
"""

import json
import sys
import time
from pathlib import Path

import vllm


def counters(engine):
    """The engine's own counters of drafts, drafted and accepted."""
    prefix = "vllm:spec_decode_num_"
    values = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    return [values.get(f"{prefix}{name}", 0) for name in ("draft_tokens", "accepted_tokens")]


def answer_all(job, **options):
    engine = vllm.LLM(
        model=job["target"],
        dtype="float32",
        max_model_len=job["context"],
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **options,
    )
    how = vllm.SamplingParams(temperature=0, max_tokens=job["new_tokens"], stop_token_ids=job["ends"])
    answers = []
    for index, prompt in enumerate([job["prompts"][0][:8], *job["prompts"]]):
        started = time.perf_counter()
        (made,) = engine.generate({"prompt_token_ids": prompt}, how, use_tqdm=False)
        seconds = time.perf_counter() - started
        if index == 0:  # warm-up
            before = counters(engine)
        else:
            answers.append({"tokens": list(made.outputs[0].token_ids), "seconds": seconds})
    after = counters(engine)
    return answers, [last - first for first, last in zip(before, after, strict=True)]


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    plain, _ = answer_all(job)
    draft = {
        "model": job["draft"],
        "method": "draft_model",
        "num_speculative_tokens": job["draft_len"],
    }
    assisted, (drafted, accepted) = answer_all(job, speculative_config=draft)
    result = {"engine": f"vLLM {vllm.__version__}", "plain": plain, "assisted": assisted}
    Path(sys.argv[2]).write_text(json.dumps({**result, "drafted": drafted, "accepted": accepted}))


if __name__ == "__main__":  # the engine starts processes that import this file again
    main()
