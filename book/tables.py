"""Write the tables and numbers of the book's pages and of the README from the recorded results; a test compares them.

`python book/tables.py` writes them anew. A table stands between `<!-- table NAME -->` and `<!-- end -->`, with NAME
in `TABLES`. A number in a sentence has its source after it: `1.46<!-- = cost-h200:checked:0:predicted -->` is that
entry of `results/cost-h200.json`, with as many decimals as the page shows. An entry of a list is named by its place or
by what it holds (`figures:method=dvi&task=overall:speedup`). ` over `, ` minus ` or ` plus ` joins two entries.
A name without a colon is one of `DERIVED`. A number before a percent sign is in hundredths. In a Markdown file such a
comment must not begin a line.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

BOOK = Path(__file__).parent
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"([+\u2212]?)(\d[\d,]*(?:\.\d+)?)( ?%)?(\**<!-- = ([^>\n]+?) -->)")
PLANNED = {"learned": "learned", "branches": "branch", "looked_up": "looked up"}
SETS = {"mini": "packaged questions", "alpaca": "alpaca", "gsm8k": "gsm8k", "humaneval": "humaneval"}
EVALUATIONS = {
    "cpu": ("", "cpu"),
    "h200": ("", "h200"),
    "cpu, second drafter": ("-tiles", "cpu"),
    "cpu, bfloat16": ("-bfloat16", "cpu"),
    "h200, second drafter": ("-prompts", "h200"),
}
"""Evaluations on all question sets, of the first drafter and the newest of the second: what stands in the names of
their records after the set, and the machine."""
SAMPLED = {
    "packaged, H200, rejection": ("mini-rejection", "h200"),
    "packaged, H200, one noise by torch": ("mini-sampled-torch", "h200"),
    "packaged, H200, in the kernel": ("mini-sampled", "h200"),
    "alpaca": ("alpaca-sampled", "h200"),
    "gsm8k": ("gsm8k-sampled", "h200"),
    "humaneval": ("humaneval-sampled", "h200"),
    "packaged, two CPU cores": ("mini-sampled", "cpu"),
}
"""Evaluations with sampled answers."""
METHODS = {
    "generate": "`generate` of transformers 4.33.3",
    "pld": "prompt lookup (`pld`)",
    "kangaroo": "early exit, threshold 0.6 (`kangaroo`)",
    "fixed": "learned, always four (`fixed`)",
    "dvi": "learned draft, adaptive (`dvi`)",
    "hybrid": "learned and looked up (`hybrid`)",
}


def read(name: str) -> Any:
    """A recorded result."""
    return json.loads((BOOK / f"results/{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(entry: dict[str, float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{entry['mean']:.{digits}f}\u00a0±\u00a0{entry['std']:.{digits}f}"


def overall(name: str, machine: str) -> dict[str, Any]:
    """The rows of an evaluation over all tasks, by method."""
    rows = read(f"evaluate-{name}-{machine}")["figures"]
    return {row["method"]: row for row in rows if row["task"] == rows[-1]["task"]}


def recorded_by(machine: str) -> dict[str, dict[str, Any]]:
    """One of `EVALUATIONS`: the rows over all tasks, by question set and method."""
    end, place = EVALUATIONS[machine]
    return {name: overall(name + end, place) for name in SETS}


def default_run() -> str:
    """The default run before and after, step by step."""
    found = read("acceptance-default-cpu")["figures"]
    rows = [
        [
            name,
            *(f"{one[key]:.3f}" for key in ("accept_rate", "mat")),
            f"{one['tok_per_s']:.1f}",
            f"{one['num_drafted']:,}",
        ]
        for name, one in found.items()
        if one["num_drafted"]
    ]
    plain = f"plain decoding: {found['plain']['tok_per_s']:.1f} tokens a second"
    head = ["draft", "acceptance rate", "block efficiency (`mat`)", "tokens a second", "scored drafts"]
    return table(head, rows) + f"\n\n{plain}."


def objectives() -> str:
    """Acceptance rate and calibration error by objective, from nothing and from a distilled start."""
    found = read("study-objectives")["summary"]
    names = [name.removeprefix("untrained/") for name in found if name.startswith("untrained/")]
    names.sort(key=lambda name: -found[f"untrained/{name}"]["accept_rate"]["mean"])
    rows = [
        [name, *(spread(found[f"{start}/{name}"][key], digits) for start in ("untrained", "distilled")
                 for key, digits in (("accept_rate", 3), ("ece", 2)))]
        for name in names
    ]  # fmt: skip
    before = (
        f"{found[f'{start}/{names[0]}']['accept_rate_before']['mean']:.3f}"
        for start in ("untrained", "distilled")
    )
    none, distilled = (
        f"from {text} ({rate})" for text, rate in zip(("nothing", "a KL start"), before, strict=True)
    )
    return table(["objective", none, "calibration error", distilled, "calibration error"], rows)


def exit_layers() -> str:
    """Acceptance rate by exit layer and drafter."""
    found = {
        name.removeprefix("untrained/"): one for name, one in read("study-exit-layers")["summary"].items()
    }
    layers = list(dict.fromkeys(name.split(", ")[0] for name in found))
    kinds = list(dict.fromkeys(name.split(", ")[1] for name in found))
    rows = []
    for k in layers:
        cells = [found.get(f"{k}, {kind}") for kind in kinds]
        costs = [f"{cell['draft_cost']['mean']:.2f}" for cell in cells if cell]
        rows.append([k, *(spread(cell["accept_rate"]) if cell else "" for cell in cells), ", ".join(costs)])
    texts = [{"none": "no drafter", "layer": "one layer"}.get(kind, kind) for kind in kinds]
    return table(["k", *texts, f"cost of a draft: {', '.join(texts)}"], rows)


def evaluation(machine: str) -> str:
    """Speed-ups over the plain loop with their intervals, and mean accepted tokens, by method and question set."""
    found = recorded_by(machine)
    rows = []
    for method, text in METHODS.items():
        cells = [found[name].get(method) for name in SETS]
        if not any(cells):
            continue
        speeds = [
            f"{one['speedup']:.2f} ({one['low']:.2f} to {one['high']:.2f})" if one else "" for one in cells
        ]
        mats = ", ".join(f"{one['mat']:.2f}" for one in cells if one)
        rows.append([text, *speeds, mats])
    counts = [f"{text}, {found[name]['plain']['questions']}" for name, text in SETS.items()]
    return table(["method", *counts, "block efficiency (`mat`), in this order"], rows)


def tasks(machine: str) -> str:
    """Speed-ups over the plain loop task by task on the packaged questions, and mean accepted tokens."""
    rows = read(f"evaluate-mini-{machine}")["figures"]
    names = dict.fromkeys(row["task"] for row in rows if row["task"] != "overall")
    speed = {(row["method"], row["task"]): f"{row['speedup']:.2f}" for row in rows}
    lines = []
    for method, text in METHODS.items():
        whole = overall("mini", machine).get(method)
        if not whole:
            continue
        last = [f"{whole['speedup']:.2f} ({whole['low']:.2f} to {whole['high']:.2f})", f"{whole['mat']:.2f}"]
        lines.append([text, *(speed[method, task] for task in names), *last])
    return table(["method", *(name.replace("_", " ") for name in names), "overall", "MAT"], lines)


def recurrent() -> str:
    """Both shipped drafters: speed over plain decoding, and tokens a verification."""
    rows = []
    files = {
        "four layers a draft": ("evaluate-{}-h200", "k2"),
        "the same, in the same run": ("evaluate-{}-beside-recurrent-h200", ""),
        "later drafts without the shallow layers, first training": ("evaluate-{}-recurrent-first-h200", ""),
        "the same, trained on": ("evaluate-{}-recurrent-h200", "recurrent"),
    }
    for text, (file, on_cpu) in files.items():
        for method in ("dvi", "hybrid"):
            cells = []
            names = [*(file.format(name) for name in SETS), f"evaluate-short-{on_cpu}-cpu"]
            for name in names:
                if not (BOOK / f"results/{name}.json").exists():
                    cells.append("")
                    continue
                found = read(name)["figures"]
                one = [row for row in found if row["method"] == method][-1]  # the last one is over all tasks
                cells.append(f"{one['speedup']:.2f} ({one['mat']:.2f})")
            rows.append([f"{'learned' if method == 'dvi' else 'learned and looked up'}, {text}", *cells])
    return table(["speed over plain decoding (mat)", *SETS.values(), "packaged, two CPU cores"], rows)


def head_in_8_bits() -> str:
    """Both ways of choosing drafts on a CPU, one run after the other."""
    rows = []
    for text, name in (("exact head", "short-exact-head"), ("head in 8 bits", "short-int8-head")):
        found = overall(name, "cpu")
        cells = [
            f"{found[method]['speedup']:.2f} ({found[method]['mat']:.2f})" for method in ("dvi", "hybrid")
        ]
        rows.append(
            [text, *cells, f"{found['hybrid']['tok_per_s']:.1f}", f"{found['plain']['tok_per_s']:.1f}"]
        )
    head = ["speed over plain decoding (mat)", "learned", "learned and looked up"]
    return table([*head, "its tokens a second", "plain decoding's"], rows)


def drafts_in_8_bits() -> str:
    """Only the exit head in 8 bits, or all that drafts, each twice."""
    names = {"plain": "plain", "fixed": "always four", "dvi": "learned", "hybrid": "together"}
    rows = []
    for text, kind in (("exit head in 8 bits", "head"), ("all drafting in 8 bits", "drafts")):
        for run in (1, 2):
            found = overall(f"short-8-bit-{kind}-{run}", "cpu")
            cells = [f"{found['plain']['tok_per_s']:.1f}"]
            for name in list(names)[1:]:
                cells.append(f"{found[name]['speedup']:.2f} ({found[name]['mat']:.2f})")
            rows.append([text, *cells])
    head = ["", "tokens a second, plain", *(f"{text}, over plain (mat)" for text in list(names.values())[1:])]
    return table(head, rows)


def more_text() -> str:
    """The second drafter before its third training, and after it by KL alone and with a reward at the end."""
    drafter = "agreement-smollm2-135m-k2-recurrent"
    files = {
        "before": (f"{drafter}-second-cpu", "steps"),
        "KL": ("agreement-text-kl-cpu", "text-kl"),
        "KL, then the reward": (f"{drafter}-cpu", "text"),
    }
    rows = []
    for text, (held_out, name) in files.items():
        (found,) = read(held_out)["figures"].values()
        cells = [f"{found['rate']:.3f}"]
        for key in ("tokens_a_block", "expected_tokens"):  # earlier records lack them
            cells.append(f"{found[key]:.2f}" if key in found else "")
        for one in SETS:
            row = overall(f"{one}-{name}", "h200")["dvi"]
            cells.append(f"{row['speedup']:.2f} ({row['mat']:.2f})")
        rows.append([text, *cells])
    head = ["training", "first draft right", "tokens a block of four", "at temperature 1"]
    return table([*head, *SETS.values()], rows)


def drafts_and_lookups() -> str:
    """How often a lookup and a first draft are right, where both say the same and where they do not."""
    rows = []
    for row in read("what-to-draft-simulated-cpu")["agreement"]:
        if row["draft"] != "none":
            says = "the same" if row["draft"] == "same" else "another token"
            cells = [says, str(row["places"]), f"{row['lookup_right']:.2f}", f"{row['draft_right']:.2f}"]
            rows.append([str(row["matched"]), *cells])
    return table(["tokens that match", "the draft says", "places", "lookup right", "draft right"], rows)


def what_to_draft() -> str:
    """The adaptive policy before and after, on given answers with given step costs."""
    found = read("what-to-draft-simulated-cpu")["speeds"]
    names = {"magpie": "own prompts, 64", "mini": "packaged questions, 24"}
    names |= {name: f"{name}, 6" for name in ("alpaca", "gsm8k", "humaneval")}
    rows = []
    for source, text in (("learned", "learned"), ("hybrid", "learned and looked up")):
        for when in ("before", "after"):
            row = [found[when][name][source] for name in names]
            rows.append([f"{text}, {when}", *(f"{each['speedup']:.2f} ({each['mat']:.2f})" for each in row)])
    return table(["speed over plain decoding (mat)", *names.values()], rows)


def trusted_lookups() -> str:
    """Evaluations on a CPU before and after drafts told the policy which lookups to trust."""
    names = {"mini": "packaged questions, 24", "gsm8k": "gsm8k, 6", "humaneval": "humaneval, 6"}
    rows = []
    for method, text in (("pld", "prompt lookup"), ("dvi", "learned"), ("hybrid", "learned and looked up")):
        for when, ending in (("before", "text"), ("after", "trusted")):
            found = [overall(f"{name}-{ending}", "cpu")[method] for name in names]
            cells = [f"{row['speedup']:.2f} ({row['mat']:.2f})" for row in found]
            rows.append([f"{text}, {when}", *cells])
    return table(["speed over plain decoding (mat)", *names.values()], rows)


def middle() -> str:
    """The default drafter, and drafters that were trained on from it with and without a state from the middle."""
    files = {
        "the default drafter": "smollm2-135m-k2-recurrent",
        "trained on for 9.2 minutes, KL and the reward": "further-text",
        "trained on for 3.5 minutes, KL": "without-middle",
        "trained on for 3.5 minutes, KL, with a state after layer 20": "middle",
    }
    rows = []
    for text, name in files.items():
        found = read(f"agreement-{name}-h200")["figures"]
        cells = []
        for one in SETS:
            figures = found.get(f"questions/{one}.jsonl")
            if figures:  # no drafts are judged on the packaged questions
                cells.append(f"{figures['rate']:.3f} ({figures['tokens_a_block']:.2f})")
        held_out = read("agreement-smollm2-135m-k2-recurrent-cpu")["figures"] | found
        figures = held_out["weights/smollm2-135m-k2-recurrent/held-out.jsonl"]
        rows.append([text, f"{figures['rate']:.3f} ({figures['tokens_a_block']:.2f})", *cells])
    return table(["", "held-out prompts", *list(SETS.values())[1:]], rows)


def sampled(files: Mapping[str, tuple[str, str]]) -> str:
    """Sampling at temperature 1, by what each row says; `files` are names and machines of evaluations."""
    names = {"pld": "prompt lookup", "fixed": "always four", "dvi": "learned", "hybrid": "together"}
    rows = []
    for text, file in files.items():
        found = overall(*file)
        speeds = [f"{found[name]['speedup']:.2f} ({found[name]['mat']:.2f})" for name in names]
        equal = sum(found[name]["identical"] for name in names)
        asked = sum(found[name]["questions"] for name in names)
        cells = [f"{found[name]['tok_per_s']:,.0f}" for name in ("plain", "dvi")]
        rows.append([text, *cells, *speeds, f"{equal} of {asked}"])
    head = ["", "tokens a second, plain", "learned"]
    over = [f"{name}, over plain (mat)" for name in names.values()]
    return table([*head, *over, "equal answers"], rows)


def block_reward() -> str:
    """A drafter that goes on by each objective, the longest blocks first; and its blocks on public sets."""
    found = read("study-block-reward")["summary"]
    keys = {"depth_1": 3, "tokens_a_block": 2, "expected_tokens": 2}
    head = ["objective", "first draft right", "tokens a block", "at temperature 1"]
    names = sorted(found, key=lambda name: -found[name]["tokens_a_block"]["mean"])
    for name, text in SETS.items():
        if f"{name}_tokens_a_block" in found[names[0]]:
            keys[f"{name}_tokens_a_block"] = 2
            head.append(text)
    start = [f"{found[names[0]][f'{key}_before']['mean']:.{digits}f}" for key, digits in keys.items()]
    rows = [["before", *start]]
    for name in names:
        cells = [spread(found[name][key], digits) for key, digits in keys.items()]
        rows.append([name, *cells])
    return table(head, rows)


def fixed_blocks(record: str) -> str:
    """Blocks of fixed plans before and after a change."""
    found = read(record)
    rows = []
    for old, new in zip(found["before"], found["after"], strict=True):
        plan = ", ".join(f"{new[key]} {text}" for key, text in PLANNED.items() if new[key])
        times = [f"{one['ms_a_block']:.2f}" for one in (old, new)]
        rates = [f"{one['tok_per_s']:,.0f}" for one in (old, new)]
        rows.append([plan or "plain decoding", *times, f"{new['tokens_a_block']:.2f}", *rates])
    head = ["a block", "ms before", "ms after", "tokens a block, after", "tokens a second before", "after"]
    return table(head, rows)


def tail_blocks() -> str:
    """Blocks of fixed plans, with a lookup after the learned drafts, and with one in a chain beside them."""
    found = read("blocks-tail-h200")
    ways = {"after": "looked up after them", "before": "looked up beside them"}
    rows = []
    for key, way in ways.items():
        for row in found[key]:
            together = row["learned"] and row["looked_up"]
            if key == "before" and not together:
                continue
            names = PLANNED | ({"looked_up": way} if together else {})
            plan = ", ".join(f"{row[part]} {text}" for part, text in names.items() if row[part])
            cells = [f"{row['ms_a_block']:.2f}", f"{row['tokens_a_block']:.2f}", f"{row['tok_per_s']:,.0f}"]
            rows.append([plan or "plain decoding", *cells])
    return table(["a block", "ms", "tokens a block", "tokens a second"], rows)


def own_prompts() -> str:
    """Answers after prompts that a library reads, and after prompts that our own kernels read."""
    rows = []
    answers = read("prompts-own-h200")["answers"]
    ways = {
        "plain": "plain decoding",
        "fixed": "four learned drafts always",
        "hybrid": "learned and looked up",
    }
    for name, title in SETS.items():
        for way, words in ways.items():
            (row,) = [row for row in answers if (row["set"], row["way"]) == (name, way)]
            speeds = f"{row['library_tok_per_s']:,} → {row['own_tok_per_s']:,}"
            firsts = f"{row['library_first_token_ms']:.2f} → {row['own_first_token_ms']:.2f}"
            gain = f"{100 * (row['own_tok_per_s'] / row['library_tok_per_s'] - 1):+.1f} %"
            rows.append([f"{title}, {words}", firsts, speeds, gain.replace("-", "\u2212")])
    return table(["", "ms to the first token", "tokens a second", "gain"], rows)


def prompts() -> str:
    """Milliseconds to the first token by the length of the prompt, read by our kernels or by a library."""
    found = read("blocks-steps-h200")["prompts"]
    ways = ("plain decoding", "four learned drafts")
    times = {
        (row["prompt_tokens"], row["way"], part): f"{row['first_token_ms']:.1f}"
        for part in ("before", "after")
        for row in found[part]
    }
    rows = []
    for length in sorted({length for length, _, _ in times}):
        cells = [times.get((length, way, part), "") for way in ways for part in ("before", "after")]
        rows.append([str(length), *cells])
    head = ["tokens of the prompt", "plain, before", "after", "four learned drafts, before", "after"]
    return table(head, rows)


def before_and_after(*kinds: str) -> str:
    """The second drafter before and after a change: speed over plain decoding of the same run."""
    methods = {"pld": "prompt lookup", "fixed": "four learned drafts always"}
    methods |= {"dvi": "learned", "hybrid": "learned and looked up"}
    rows = []
    for name, text in SETS.items():
        both = [overall(f"{name}-{kind}", "h200") for kind in kinds]
        rates = [f"{one['plain']['tok_per_s']:,.0f}" for one in both]
        cells = [" → ".join(f"{one[method]['speedup']:.2f}" for one in both) for method in methods]
        rows.append([text, " → ".join(rates), *cells])
    return table(["speed over plain decoding", "plain, tokens a second", *methods.values()], rows)


def by_set(before: str, after: str) -> str:
    """The second drafter before and after a change: tokens a second, and speed over plain decoding."""
    rows = []
    for name, text in SETS.items():
        old, new = (overall(f"{name}-{kind}", "h200") for kind in (before, after))
        cells = []
        for method in ("plain", "pld", "dvi", "hybrid"):
            speed = "" if method == "plain" else f" ({new[method]['speedup']:.2f})"
            cells.append(f"{old[method]['tok_per_s']:,.0f} → {new[method]['tok_per_s']:,.0f}{speed}")
        rows.append([text, *cells])
    return table(["tokens a second", "plain", "prompt lookup", "learned", "learned and looked up"], rows)


def agreement() -> str:
    """Agreement of the first shipped drafter."""
    found = read("agreement-smollm2-135m-k2-h200")["figures"]
    rows = [
        [
            Path(name).stem,
            f"{one['rate']:.3f}",
            f"{one['confidence']:.3f}",
            f"{one['ece']:.3f}",
            f"{one['positions']:,}",
        ]
        for name, one in found.items()
    ]
    return table(["questions", "agreement", "mean confidence", "calibration error", "positions"], rows)


def costs() -> str:
    """What steps cost, in milliseconds, and from which acceptance on drafting pays, at exit layer 2."""
    rows = []
    for text, name in (("two CPU cores", "cost-contexts-cpu"), ("one H200", "cost-h200"),
                       ("one H200, Llama-7B's shapes", "cost-llama-7b-h200")):  # fmt: skip
        one = next(row for row in read(name)["costs"] if row["exit_layer"] == 2 and row["context"] == 128)
        verify, draft = one["steps"]["verify"], one["steps"]["draft"]
        row = [
            f"{text} (`{name}.json`)",
            f"{verify[0]:.2f}",
            f"{draft / verify[0]:.2f}",
            f"{verify[-1] / verify[0]:.2f}",
        ]
        rows.append([*row, *(f"{one['break_even'][count]:.2f}" for count in ("2", "4", "8"))])
    head = ["where", "plain step, ms", "a draft / plain", "verify 8 / plain"]
    return table([*head, *(f"break-even of {count}" for count in (2, 4, 8))], rows)


FLOAT32_STEPS = {
    "torch's operators": "cost-float32-torch-cpu",
    "own kernels at first": "cost-float32-cpu",
    "own kernels": "cost-float32-attention-cpu",
}
BFLOAT16_STEPS = {
    "bfloat16, oneDNN": "cost-bfloat16-packed-cpu",
    "bfloat16, own kernels": "cost-bfloat16-pairs-cpu",
    "float32, before": "cost-float32-panels-cpu",
    "float32": "cost-float32-tiles-cpu",
}


def cpu_steps(names: Mapping[str, str]) -> str:
    """What blocks cost on a CPU by the number of drafts; what the rows are called, and their records."""
    rows = []
    shown = (0, 1, 2, 4, 6, 8, 11, 15)
    for context in (128, 1024):
        for text, name in names.items():
            one = next(row for row in read(name)["costs"] if row["context"] == context)
            verify, draft = one["steps"]["verify"], one["steps"]["draft"]
            cells = [f"{verify[count]:.1f}" for count in shown]
            rows.append([f"{text}, after {context:,} tokens", *cells, f"{draft:.1f}"])
    return table(
        [
            "",
            "plain step",
            *("1 draft" if count == 1 else f"{count} drafts" for count in shown[1:]),
            "making a draft",
        ],
        rows,
    )


def cpu_kernels(old: str, new: str) -> str:
    """Tokens a second on a CPU before and after other kernels, from the evaluations with these names."""
    rows = []
    for name, text in SETS.items():
        before, after = overall(f"{name}-{old}", "cpu"), overall(f"{name}-{new}", "cpu")
        cells = []
        for method in ("plain", "pld", "dvi", "hybrid"):
            pair = [found[method]["tok_per_s"] for found in (before, after)]
            cells.append(f"{pair[0]:.0f} → {pair[1]:.0f}")
        for method in ("dvi", "hybrid"):
            cells.append(f"{before[method]['speedup']:.2f} → {after[method]['speedup']:.2f}")
        rows.append([text, *cells])
    head = ["tokens a second", "plain", "prompt lookup", "learned", "together"]
    return table([*head, "learned over plain", "together over plain"], rows)


def bench(machine: str) -> str:
    """Speed over the plain loop on the same question, by way of decoding and set."""
    found = read(f"bench-{machine}")["figures"]
    names = {
        "generate": METHODS["generate"],
        "lookup": "prompt lookup, adaptive",
        "learned, 4": "learned, always 4",
        "learned": "learned, adaptive",
        "hybrid": "both together, adaptive",
    }
    sets = {Path(name).stem.replace("held-out", "own prompts"): one for name, one in found.items()}
    rows = []
    for name, text in names.items():
        ones = [one[name] for one in sets.values()]
        mats = f"{fmean(one['mat'] for one in ones):.2f}" if ones[0]["mat"] else ""
        same = sum(one["equal"] for one in ones), sum(one["questions"] for one in ones)
        rows.append([text, *(f"{one['over_plain']:.2f}" for one in ones), mats, "{} of {}".format(*same)])
    head = ["", *sets, "mean block efficiency (`mat`)", "answers equal to plain decoding's"]
    return table(head, rows)


def default_seeds() -> str:
    """What the default settings teach, by the number of prompts."""
    found = {name.removeprefix("untrained/"): one for name, one in read("study-default")["summary"].items()}
    keys = {"accept_rate_before": 3, "accept_rate": 3, "mat": 2, "agreement": 3}
    rows = [[name, f"{one['tokens']['mean']:,.0f}", *(spread(one[key], digits) for key, digits in keys.items())]
            for name, one in found.items()]  # fmt: skip
    head = ["", "response tokens", "acceptance rate before", "after", "block efficiency (`mat`) after"]
    return table([*head, "agreement after"], rows)


def traps() -> str:
    """What a draft learns in each trap."""
    found = {name.removeprefix("untrained/"): one for name, one in read("study-traps")["summary"].items()}
    rows = [
        [name, *(spread(one[key]) for key in ("accept_rate_before", "accept_rate"))]
        for name, one in found.items()
    ]
    return table(["", "acceptance rate before", "after"], rows)


def slow_update() -> str:
    """The slow update: acceptance, and what it costs the verifier."""
    found, rows = read("study-slow-update")["summary"], []
    untouched = next(one["ppl_untouched"]["mean"] for one in found.values() if "ppl_untouched" in one)
    for name, one in found.items():
        ppl = one["ppl"]["mean"] if "ppl" in one else untouched
        drift = [spread(one["drift_kl"]) if "drift_kl" in one else "0", f"{ppl:,.1f}"]
        rows.append([name.removeprefix("untrained/"), spread(one["accept_rate"]), *drift])
    return table(
        ["target, slow_every, beta_kl", "acceptance rate", "drift, nats a token", "perplexity of replies"],
        rows,
    )


def warm_start() -> str:
    """Starts, and what the same prompts make of them."""
    found = read("study-warm-start")["summary"]
    starts = dict.fromkeys(name.split("/")[0] for name in found)
    variants = dict.fromkeys(name.split("/")[1] for name in found)
    rows = []
    for start in starts:
        ones = [found[f"{start}/{variant}"] for variant in variants]
        before = [f"{ones[0]['start_tokens']['mean']:,.0f}", spread(ones[0]["accept_rate_before"])]
        rows.append([start, *before, *(spread(one["accept_rate"]) for one in ones)])
    return table(
        ["start", "its tokens", "acceptance rate there", *(f"after {name}" for name in variants)], rows
    )


def adaptation() -> str:
    """A stream that changes its domain: agreement on the new and the old one."""
    keys = ("then_switch", "then_end", "first_switch", "first_end")
    rows = [
        [name, *(spread(one[key]) for key in keys)]
        for name, one in read("study-adaptation")["summary"].items()
    ]
    return table(["after the change", *(f"{domain}, {when}" for domain in ("new", "old") for when in
                                        ("at the change", "at the end"))], rows)  # fmt: skip


def federated() -> str:
    """Clients with prompts of their own: agreement."""
    rows = [
        [name, spread(one["own"]), spread(one["all"])]
        for name, one in read("study-federated")["summary"].items()
    ]
    return table(["three clients", "each on its own prompts", "each on everybody's"], rows)


def staleness() -> str:
    """The gradient that records of an age give, against the exact one."""
    found = read("study-staleness")["summary"]
    kinds = dict.fromkeys(name.split(",")[0] for name in found)
    ages = list(dict.fromkeys(name.split("age ")[1] for name in found))[::-1]
    rows = []
    for age in ages:
        ones = [found[f"{kind}, age {age}"] for kind in kinds]
        rows.append([age, *(spread(one[key], 2) for one in ones for key in ("cos_stale", "cos_redrawn"))])
    return table(
        [
            "age of the records",
            *(f"{kind}: {what}" for kind in kinds for what in ("stored", "sampled again")),
        ],
        rows,
    )


def robustness() -> str:
    """What was broken on purpose, and what came of it."""
    faults, soak, resume = read("faults-cpu"), read("soak-cpu")["soak"], read("resume-h200")["comparisons"]
    rows = [[what, f"{faults[what]['count']}", f"{faults[what]['equal']} end as the run that was not disturbed"]
            for what in ("kills of dvirl train", "kills of dvirl sgp", "full disks")]  # fmt: skip
    same = sum(resume[name]["lines_equal"] for name in ("whole-killed", "whole32-killed32"))
    rows.append(
        ["killed and resumed on an H200, bfloat16 and float32", "2", f"{same} of 244 log lines equal"]
    )
    for one in read("processes-h200")["throughput"]:
        times = ", ".join(f"{ratio:.2f}" for ratio in one["ratios"])
        rows.append(
            [
                f"two H200s over one, {one['settings']} settings",
                f"{len(one['ratios'])}",
                f"{times} times the tokens a second",
            ]
        )
    grown = f"{soak['memory_mib_a_hundred_updates']:.2f} MiB more a hundred updates"
    rows.append(["updates in one process", f"{soak['updates']:,}", grown])
    return table(["", "number of trials", "result"], rows)


def agreed(drafter: str) -> float:
    """The mean agreement of a shipped drafter on the public question sets."""
    figures = read(f"agreement-{drafter}-h200")["figures"]
    return fmean(one["rate"] for name, one in figures.items() if Path(name).stem in SETS)


def headline() -> str:
    """The README's table."""
    seeds = read("study-default")["summary"]["untrained/256 prompts"]
    ours = read("acceptance-default-cpu")["figures"]
    rates = [f"{ours[name]['accept_rate']:.3f}" for name in ("untrained", "trained")]
    counted = f"({seeds['accept_rate']['n']} seeds)"
    learned = f"{spread(seeds['accept_rate_before'])} → **{spread(seeds['accept_rate'])}** {counted}"
    rows = [
        [
            "acceptance rate on unseen prompts: untrained → after 256 prompts of `dvirl train`",
            f"{rates[0]} → **{rates[1]}** (one seed)",
            learned,
        ],
        [
            "agreement of the default drafter: how often a block's first draft is the model's own token",
            "",
            f"**{agreed('smollm2-135m-k2-recurrent'):.3f}** on three public sets",
        ],
    ]
    names = {
        "dvi": "learned draft",
        "pld": "prompt lookup",
        "hybrid": "both",
        "generate": METHODS["generate"],
    }
    found = [recorded_by(f"{machine}, second drafter")["mini"] for machine in ("cpu", "h200")]
    for method, text in names.items():
        ones = [one.get(method) for one in found]
        cells = [
            f"{one['speedup']:.2f} ({one['low']:.2f} to {one['high']:.2f})" if one else "" for one in ones
        ]
        rows.append([f"speed over our own plain loop: {text}", *cells])
    return table(["", "2 cores of an AMD EPYC", "one H200"], rows)


def engines() -> str:
    """Acceptance, equal answers and speed of the exported draft in other engines, ours first."""
    rows = []
    for row in read("engines-cpu")["figures"]:
        cells = [f"{row['engine']}, {row['weights']}", f"{row['accepted_share']:.3f}"]
        cells += [f"{row['accepted']:,} of {row['drafted']:,}", f"{row['equal']} of {row['answers']}"]
        cells += [f"{row['plain_tok_per_s']:.1f}", f"{row['tok_per_s']:.1f}", f"{row['speedup']:.2f}"]
        rows.append(cells)
    head = ["engine and weights", "accepted share", "accepted", "equal answers"]
    return table([*head, "tokens a second without", "with the draft", "speed-up"], rows)


def installed_peers() -> str:
    """Our ways of decoding beside those of installed libraries, and what did not run with its reason."""
    recorded = read("peers-cpu")
    rows = []
    for row in recorded["figures"]:
        speeds = [f"{row['tok_per_s']:.1f}", f"{row['over_plain']:.2f}", f"{row['typical']:.2f}"]
        counts = [f"{row['mat']:.2f}", f"{row['equal']} of {row['answers']}"]
        rows.append([f"{row['library']}: {row['way']}", *speeds, *counts])
    for row in recorded["missing"]:
        rows.append([f"{row['library']}: {row['way']}. Not run: {row['reason']}", "", "", "", "", ""])
    head = ["library and way", "tokens a second", "over our plain loop", "on the median question", "mat"]
    return table([*head, "answers equal to the plain loop's"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "default_run": default_run,
    "objectives": objectives,
    "exit_layers": exit_layers,
    "evaluation_cpu": lambda: evaluation("cpu"),
    "evaluation_h200": lambda: evaluation("h200"),
    "evaluation_cpu_second": lambda: evaluation("cpu, second drafter"),
    "evaluation_bfloat16": lambda: evaluation("cpu, bfloat16"),
    "evaluation_h200_second": lambda: evaluation("h200, second drafter"),
    "tasks_cpu": lambda: tasks("cpu"),
    "tasks_h200": lambda: tasks("h200"),
    "agreement": agreement,
    "recurrent": recurrent,
    "block_reward": block_reward,
    "more_text": more_text,
    "drafts_and_lookups": drafts_and_lookups,
    "drafts_in_8_bits": drafts_in_8_bits,
    "middle": middle,
    "sampled": lambda: sampled(SAMPLED),
    "trusted_lookups": trusted_lookups,
    "what_to_draft": what_to_draft,
    "head_in_8_bits": head_in_8_bits,
    "early_blocks": lambda: fixed_blocks("blocks-early-h200"),
    "early": lambda: by_set("recurrent", "early"),
    "steps_blocks": lambda: fixed_blocks("blocks-steps-h200"),
    "steps": lambda: before_and_after("early", "steps"),
    "tail": lambda: before_and_after("second-chain", "tail"),
    "tail_blocks": tail_blocks,
    "tail_sampled": lambda: sampled(
        {text: (f"{name}-prompts-sampled", "h200") for name, text in SETS.items()}
    ),
    "prompts": prompts,
    "own_prompts": own_prompts,
    "fewer_plans": lambda: before_and_after("many-plans", "prompts"),
    "costs": costs,
    "cpu_kernels": lambda: cpu_kernels("tail", "own"),
    "cpu_kernels_steps": lambda: cpu_steps(FLOAT32_STEPS),
    "bfloat16_cpu": lambda: cpu_kernels("packed", "bfloat16"),
    "bfloat16_cpu_steps": lambda: cpu_steps(BFLOAT16_STEPS),
    "bench_cpu": lambda: bench("cpu"),
    "bench_h200": lambda: bench("h200"),
    "default_seeds": default_seeds,
    "traps": traps,
    "slow_update": slow_update,
    "warm_start": warm_start,
    "adaptation": adaptation,
    "federated": federated,
    "staleness": staleness,
    "robustness": robustness,
    "headline": headline,
    "engines": engines,
    "installed_peers": installed_peers,
}


# Numbers in sentences


def speedups(method: str, machine: str) -> list[float]:
    """The speed-up of a method on each question set that it was asked."""
    asked = (rows.get(method) for rows in recorded_by(machine).values())
    return [row["speedup"] for row in asked if row]


def gains(variant: str, over: str) -> list[float]:
    """How much more than after another objective is accepted, for every start and seed of the study of objectives."""
    rates = {(row["start"], row["seed"], row["variant"]): row["figures"]["accept_rate"]
             for row in read("study-objectives")["rows"]}  # fmt: skip
    return [rate - rates[start, seed, over] for (start, seed, name), rate in rates.items() if name == variant]


def answers(machine: str, key: str) -> int:
    """Answers of our own ways with drafts, or how many of them are plain decoding's."""
    drafting = set(METHODS) - {"generate"}
    by_set = recorded_by(machine).values()
    return sum(found[method][key] for found in by_set for method in drafting & set(found))


def lost_to_lookup(machine: str) -> int:
    """The number of the six tasks on which prompt lookup is faster than the learned draft."""
    end, place = EVALUATIONS.get(machine, ("", machine))
    rows = read(f"evaluate-mini{end}-{place}")["figures"]
    speed = {(row["task"], row["method"]): row["speedup"] for row in rows if row["task"] != "overall"}
    return sum(speed[task, "pld"] > speed[task, "dvi"] for task in {task for task, _ in speed})


def derived() -> dict[str, Callable[[], float]]:
    """Numbers that are no single entry of a file, by name."""
    picks: dict[str, Callable[[Iterable[float]], float]] = {"least": min, "most": max, "mean": fmean}
    numbers: dict[str, Callable[[], float]] = {
        "answers-h200": lambda: answers("h200", "questions"),
        "equal-h200": lambda: answers("h200", "identical"),
        "answers-cpu-second": lambda: answers("cpu, second drafter", "questions"),
        "equal-cpu-second": lambda: answers("cpu, second drafter", "identical"),
        "equal-bfloat16": lambda: answers("cpu, bfloat16", "identical"),
    }
    for word, pick in picks.items():
        for variant in ("kl_to_rl", "kl, js", "exact_pg + kl"):
            numbers[f"gain of {variant}, {word}"] = lambda pick=pick, variant=variant: pick(
                gains(variant, "kl")
            )
        for machine in EVALUATIONS:
            for method in ("pld", "dvi", "hybrid"):
                numbers[f"{method} {machine}, {word}"] = lambda *, pick=pick, method=method, machine=machine: (
                    pick(speedups(method, machine))
                )
    for machine in ("h100", *EVALUATIONS):
        numbers[f"tasks lost to lookup, {machine}"] = lambda machine=machine: lost_to_lookup(machine)
    return numbers


DERIVED = derived()


def entry(path: str) -> float:
    """One operand: an entry of a result, a name of `DERIVED`, or a number itself."""
    if ":" not in path:
        return DERIVED[path]() if path in DERIVED else float(path)
    name, *parts = path.split(":")
    value = read(name)
    for part in parts:
        if isinstance(value, dict):
            value = value[part]
        elif "=" in part:
            wanted = [pair.split("=") for pair in part.split("&")]
            value = next(row for row in value if all(str(row[key]) == said for key, said in wanted))
        else:
            value = value[int(part)]
    return float(value)


def calculated(expression: str) -> float:
    """Entries with `over`, `minus` or `plus` between them, from left to right."""
    first, *rest = re.split(r" (over|minus|plus) ", expression)
    total = entry(first)
    for word, path in zip(rest[::2], rest[1::2], strict=True):
        value = entry(path)
        total = {"over": total / value, "minus": total - value, "plus": total + value}[word]
    return total


def number(place: re.Match[str]) -> str:
    """A number as its source has it, in the form in which the page shows it."""
    sign, shown, percent, tail, expression = place.groups()
    value = calculated(expression) * (100 if percent else 1)
    digits = len(shown.partition(".")[2])
    written = f"{abs(value):,.{digits}f}"
    minus = "\u2212" if value < 0 and float(written.replace(",", "")) else ""
    return f"{minus or ('+' if sign == '+' else '')}{written}{percent or ''}{tail}"


PAGES = (BOOK.parent / "README.md", *sorted(BOOK.rglob("*.md")))
"""Pages that may have tables and numbers."""


def filled(page: str) -> str:
    """The page with every marked table and number made anew."""
    page = PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}\n{place[3]}", page)
    return NUMBER.sub(number, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
