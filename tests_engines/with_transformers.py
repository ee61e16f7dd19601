"""Answers prompts with the newest transformers, plainly and assisted by a draft; run in an environment of its own.

`python with_transformers.py JOB.json RESULT.json`; `check.py` writes the job and reads the result.
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.candidate_generator import AssistedCandidateGenerator

job = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(job["threads"])
counted = {"drafted": 0, "accepted": 0}
update = AssistedCandidateGenerator.update_candidate_strategy


def count(generator, input_ids, scores, num_matches):
    """Take in what the engine tells its own schedule of each verification."""
    counted["drafted"] += scores.shape[1] - 1
    counted["accepted"] += int(num_matches)
    return update(generator, input_ids, scores, num_matches)


AssistedCandidateGenerator.update_candidate_strategy = count
target, draft = (
    AutoModelForCausalLM.from_pretrained(job[name], dtype=torch.float32).eval()
    for name in ("target", "draft")
)
how = draft.generation_config
how.num_assistant_tokens = job["draft_len"]
how.num_assistant_tokens_schedule = "constant"
how.assistant_confidence_threshold = 0.0


def answer(prompt, **options):
    started = time.perf_counter()
    ids = torch.tensor([prompt])
    made = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job["new_tokens"],
        do_sample=False,
        eos_token_id=job["ends"],
        pad_token_id=job["ends"][0],
        **options,
    )
    return {"tokens": made[0, len(prompt) :].tolist(), "seconds": time.perf_counter() - started}


for options in ({}, {"assistant_model": draft}):  # warm-up
    answer(job["prompts"][0][:8], **options)
counted.update(drafted=0, accepted=0)
plain, assisted = [], []
for prompt in job["prompts"]:
    plain.append(answer(prompt))
    assisted.append(answer(prompt, assistant_model=draft))
result = {
    "engine": f"transformers {transformers.__version__}",
    "plain": plain,
    "assisted": assisted,
    **counted,
}
Path(sys.argv[2]).write_text(json.dumps(result))
