"""Answers prompts with llama.cpp's server (xllamacpp), plainly and with a draft model; in an environment of its own.

`python with_llama.py JOB.json RESULT.json`; `check.py` writes the job and reads the result.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import xllamacpp

job = json.loads(Path(sys.argv[1]).read_text())


def serve(draft):
    """A server in this process; its draft model drafts `draft_len` tokens whatever its confidence."""
    params = xllamacpp.CommonParams()
    params.model.path = job["target"]
    params.n_ctx = job["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.verbosity = 0
    if job["exact"]:  # by default keys and values, and attention itself, are rounded to 16 bits
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    threads = [params.cpuparams, params.cpuparams_batch]
    if draft:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        drafting = params.speculative.draft
        drafting.mparams.path = draft
        drafting.n_max = job["draft_len"]
        drafting.n_min = 0
        drafting.p_min = 0.0
        drafting.cache_type_k = drafting.cache_type_v = params.cache_type_k
        threads += [drafting.cpuparams, drafting.cpuparams_batch]
    for pool in threads:
        pool.n_threads = job["threads"]
    return xllamacpp.Server(params)


def answer(server, prompt):
    started = time.perf_counter()
    request = {"prompt": prompt, "n_predict": job["new_tokens"], "temperature": 0, "cache_prompt": False}
    made = server.handle_completions(request)
    made = made if isinstance(made, dict) else json.loads(made)
    seconds = time.perf_counter() - started
    counts = {name: made["timings"].get(name, 0) for name in ("draft_n", "draft_n_accepted")}
    text = made["choices"][0]["text"]
    return {"text": text, "count": made["usage"]["completion_tokens"], "seconds": seconds, **counts}


plainly, with_draft = serve(None), serve(job["draft"])
for server in (plainly, with_draft):  # warm-up
    answer(server, job["prompts"][0][:8])
plain, assisted = [], []
for prompt in job["prompts"]:
    plain.append(answer(plainly, prompt))
    assisted.append(answer(with_draft, prompt))
result = {
    "engine": f"llama.cpp (xllamacpp {version('xllamacpp')})",
    "plain": plain,
    "assisted": assisted,
    "drafted": sum(one["draft_n"] for one in assisted),
    "accepted": sum(one["draft_n_accepted"] for one in assisted),
}
Path(sys.argv[2]).write_text(json.dumps(result))
