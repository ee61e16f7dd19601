"""Times our ways of decoding beside those of libraries that a user can install: `make bench-peers`.

The libraries come from the package registry into an environment of their own under `.peers/`. Each answers in a process
of its own. They take turns question by question, so that other load on the machine hits all of them alike. All get
the same token ids and decode greedily in float32. What does not install or run is named in the result with its reason.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from statistics import median

from peer_process import Peer
from setting_up import HERE, commit, export_draft, installed
from tqdm import tqdm

from dvirl.evaluation.measure import in_turn
from dvirl.evaluation.questions import MINI, from_here, prompts_of, read_questions, spread
from dvirl.models.loading import DEFAULT_MODEL, load, source
from dvirl.runs.errors import DvirlError, guarded
from dvirl.runs.folder import provenance
from dvirl.runs.log import write_json

ROOT = HERE.parent / ".peers"
BASE = ("torch==2.13.0", "transformers==5.24.0")
"""Without these there is no peer; torch is named, since a looser requirement brings gigabytes for GPUs."""
ADDED = ("economize==0.3.2", "flashspec==0.3.1")
OURS, PLAIN = "dvirl", "plain"
WITH_OURS = "our draft"
"""In the name of a peer's way that has our exported draft as its draft model."""
UNTRAINED = {
    "library": "economize 0.3.2",
    "way": "drafters that it trains",
    "reason": "two cores of an AMD EPYC train its jump drafter on 155 tokens a second and its EAGLE-3 on 63, so ten "
    "minutes are 0.1 million tokens; its authors train on 64 million",
}
"""What was tried by hand, and is no part of a run."""
WARM_UP = 16
"""New tokens of the answer that every way gives before the clock counts."""

# Figures


def parting(ours: list[int], theirs: list[int], ends: list[int]) -> int | None:
    """The place at which two answers part, None where they do not; a token that ends an answer is left out."""
    ours, theirs = (
        tokens[:-1] if tokens[-1:] and tokens[-1] in ends else tokens for tokens in (ours, theirs)
    )
    if ours == theirs:
        return None
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
        shared += 1
    return shared


def speed(answers: list[dict]) -> float:
    """Tokens a second, prompts included: all tokens over the sum of the fastest seconds of each question.

    Other work on the machine only makes an answer slower, by ten times at worst, and seldom meets the same one in every
    round.
    """
    tokens = sum(len(answer["tokens"]) for answer in answers)
    return tokens / sum(min(answer["seconds"]) for answer in answers)


def figures(answers: list[dict], plain: list[dict], ends: list[int]) -> dict:
    """The row of one way of decoding.

    Args:
        answers: one a question: its tokens, and of every round the seconds and the passes of the whole model.
        plain: those of our plain loop.
        ends: tokens that end an answer.

    Returns:
        `over_plain` is the ratio of the speeds, and `typical` the median of the ratios on the same question. `mat` is
        what a pass commits, the verifier's own token included, without the pass over the prompt. `parted` are the places
        at which answers leave our plain loop's, by the index of the question.
    """
    decoded = sum(len(answer["tokens"]) - 1 for answer in answers)
    passes = sum(median(answer["passes"]) - 1 for answer in answers)
    parted = {}
    ratios = []
    for index, (answer, base) in enumerate(zip(answers, plain, strict=True)):
        ratios.append(speed([answer]) / speed([base]))
        place = parting(base["tokens"], answer["tokens"], ends)
        if place is not None:
            parted[index] = place
    return {
        "tok_per_s": speed(answers),
        "over_plain": speed(answers) / speed(plain),
        "typical": median(ratios),
        "mat": decoded / passes if passes else None,
        "answers": len(answers),
        "equal": len(answers) - len(parted),
        "parted": parted,
    }


def over_best(rows: list[dict]) -> dict:
    """How fast our ways together are over the fastest peer, and over the fastest one without our draft, if there is one."""
    result = {}
    peers = [row for row in rows if row["library"] != OURS]
    for name, kept in (
        ("any", peers),
        ("none of ours", [row for row in peers if WITH_OURS not in row["way"]]),
    ):
        if not kept:
            continue
        best = max(kept, key=lambda row: row["tok_per_s"])
        result[name] = {"library": best["library"], "way": best["way"]}
        for row in rows:
            if row["library"] == OURS and row["way"].startswith("together"):
                result[name][f"ours {row['way']}"] = row["tok_per_s"] / best["tok_per_s"]
    return result


# The run


def start_peers(threads: int, ends: list[int], missing: list[dict]) -> dict[str, Peer]:
    """A process for each library, started one after the other; what does not install goes to `missing`.

    Raises:
        DvirlError: if the newest transformers do not install.
    """
    python = installed(ROOT / "environment", *BASE)
    draft = export_draft("smollm2-135m-k2", ROOT / "draft", "hf", "float32")
    ours = [sys.executable, HERE / "peers_ours.py"]
    commands = {OURS: [*ours, "dvirl", threads], "transformers 4.33.3": [*ours, "pinned", threads]}
    for requirement in (BASE[-1], *ADDED):
        library = requirement.replace("==", " ")
        try:
            installed(ROOT / "environment", requirement)
        except DvirlError as error:
            missing.append({"library": library, "way": "all", "reason": str(error)})
            continue
        theirs = [python, HERE / "peers_others.py", library.split()[0], threads]
        commands[library] = [*theirs, source(DEFAULT_MODEL), draft, *ends]
    peers = {}
    for library, command in commands.items():
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if command[0] == python:  # it must not find our packages
            environment.pop("PYTHONPATH", None)
        log = ROOT / f"{library.replace(' ', '-')}.log"
        peers[library] = Peer([str(word) for word in command], log, environment)
    return peers


def take_turns(
    peers: dict[str, Peer], prompts: list[list[int]], asked: argparse.Namespace
) -> tuple[dict, dict]:
    """Every way answers every question in every round, one at a time; the order changes with question and round.

    Returns:
        The answers of each way, a library and a name, in the order of the prompts, and the reasons of those that failed.
    """
    ways = [(library, name) for library, peer in peers.items() for name in peer.ready.get("ways", ())]
    answers: dict[tuple[str, str], list[dict]] = {way: [] for way in ways}
    failed: dict[tuple[str, str], str] = {}

    def ask(way: tuple[str, str], prompt: list[int], limit: int) -> dict:
        reply = (
            {"failed": failed[way]}
            if way in failed
            else peers[way[0]].ask(way=way[1], prompt=prompt, limit=limit)
        )
        if "failed" in reply:
            failed[way] = reply["failed"]
        return reply

    for way in tqdm(ways, "warm-up"):
        ask(way, prompts[0], WARM_UP)
    bar = tqdm(total=asked.rounds * len(prompts) * len(ways), unit="answer")
    for turn in range(asked.rounds * len(prompts)):
        repeated, index = divmod(turn, len(prompts))
        for way in in_turn(ways[::-1] if repeated % 2 else ways, index):
            bar.set_postfix_str(", ".join(way))
            reply = ask(way, prompts[index], asked.new_tokens)
            if "failed" not in reply:
                if not repeated:
                    answers[way].append({"tokens": reply["tokens"], "seconds": [], "passes": []})
                answers[way][index]["seconds"].append(reply["seconds"])
                answers[way][index]["passes"].append(reply["passes"])
            bar.update()
    bar.close()
    return {way: given for way, given in answers.items() if way not in failed}, failed


def processor() -> str:
    """The processor's name; Linux says it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return found[1] if found else "unknown"


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Settings from flags.

    Raises:
        DvirlError: for a number that is too small.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", nargs="+", default=[str(MINI)], help="files in Spec-Bench's schema")
    parser.add_argument(
        "--num_questions", type=int, default=12, help="of each file, spread over it; 0 is all"
    )
    parser.add_argument("--new_tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=2, help="times that every way answers every question")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--out", default="runs/peers.json", help="file to write")
    asked = parser.parse_args(argv)
    for name, least in {"num_questions": 0, "new_tokens": 2, "rounds": 1, "threads": 1}.items():
        if getattr(asked, name) < least:
            raise DvirlError(f"--{name} is {getattr(asked, name)}; expected at least {least}")
    return asked


def written(answers: dict[tuple[str, str], list[dict]]) -> dict:
    """The answers as the file has them: the number of tokens instead of the tokens."""
    short = {}
    for way, given in answers.items():
        seconds = [[round(each, 4) for each in answer["seconds"]] for answer in given]
        tokens = [len(answer["tokens"]) for answer in given]
        short[", ".join(way)] = {"tokens": tokens, "seconds": seconds}
    return short


def main(argv: list[str]) -> None:
    """Set the peers up, let them answer in turn, print the figures and write them.

    Raises:
        DvirlError: for bad settings or questions, or if the newest transformers do not install.
    """
    asked = parse_args(argv)
    loaded = load(DEFAULT_MODEL, "float32", "cpu")
    ends = list(loaded.eos_ids)
    questions = []
    for file in asked.questions:
        questions += spread(read_questions(file, any_category=True), asked.num_questions)
    prompts = [prompts_of(question, [], loaded, asked.new_tokens)[0] for question in questions]
    missing = [UNTRAINED]
    peers = start_peers(asked.threads, ends, missing)
    answers, failed = take_turns(peers, prompts, asked)
    for library, peer in peers.items():
        peer.close()
        absent = peer.ready.get("missing", {"all": peer.ready.get("failed")})
        failed |= {(library, way): reason for way, reason in absent.items()}
    missing += [{"library": way[0], "way": way[1], "reason": reason} for way, reason in failed.items()]
    if (OURS, PLAIN) not in answers:
        raise DvirlError(f"our own plain loop gave no answer: {missing[-1]['reason']}")
    rows = []
    for way, given in answers.items():
        row = figures(given, answers[OURS, PLAIN], ends)
        rows.append({"library": way[0], "way": way[1], **row})
        print(
            f"{row['tok_per_s']:6.1f} tokens a second, {row['over_plain']:.2f} of our plain loop: {', '.join(way)}"
        )
    content = {
        "command": "make bench-peers",
        "commit": commit(),
        "date": time.strftime("%F"),
        "arguments": {**vars(asked), "questions": [from_here(Path(file)) for file in asked.questions]},
        "packages": [*BASE, *ADDED],
        **provenance(loaded),
        "processor": processor(),
        "figures": rows,
        "over_best": over_best(rows),
        "missing": missing,
        "questions": [question.question_id for question in questions],
        "answers": written(answers),
    }
    write_json(asked.out, content)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
