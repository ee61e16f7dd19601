"""Write the tables of results.md from the recorded results, `python book/tables.py`; a test sees that they are."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

BOOK = Path(__file__).parent
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SETS = {"mini": "packaged questions", "alpaca": "alpaca", "gsm8k": "gsm8k", "humaneval": "humaneval"}
METHODS = {
    "generate": "Hugging Face's `generate`",
    "pld": "prompt lookup (`pld`)",
    "kangaroo": "early exit, threshold 0.6 (`kangaroo`)",
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
    return table(["draft", "accept rate", "mat", "tokens a second", "scored drafts"], rows) + f"\n\n{plain}."


def objectives() -> str:
    """Accept rate and calibration error by objective, from nothing and from a distilled start."""
    found = read("study-objectives")["summary"]
    names = [name.removeprefix("untrained/") for name in found if name.startswith("untrained/")]
    names.sort(key=lambda name: -found[f"untrained/{name}"]["accept_rate"]["mean"])
    rows = [
        [name, *(spread(found[f"{start}/{name}"][key], digits) for start in ("untrained", "distilled")
                 for key, digits in (("accept_rate", 3), ("ece", 2)))]
        for name in names
    ]  # fmt: skip
    before = (
        f"{found[f'{start}/{names[0]}']['accept_rate_before']['mean']:.3f}" for start in ("untrained", "distilled")
    )
    none, distilled = (f"from {text} ({rate})" for text, rate in zip(("nothing", "a KL start"), before, strict=True))
    return table(["objective", none, "calibration error", distilled, "calibration error"], rows)


def exit_layers() -> str:
    """Accept rate by exit layer and drafter."""
    found = {name.removeprefix("untrained/"): one for name, one in read("study-exit-layers")["summary"].items()}
    layers = list(dict.fromkeys(name.split(", ")[0] for name in found))
    kinds = list(dict.fromkeys(name.split(", ")[1] for name in found))
    rows = []
    for k in layers:
        cells = [found.get(f"{k}, {kind}") for kind in kinds]
        costs = [f"{cell['draft_cost']['mean']:.2f}" for cell in cells if cell]
        rows.append([k, *(spread(cell["accept_rate"]) if cell else "" for cell in cells), ", ".join(costs)])
    return table(["k", *kinds, "cost of a draft, in this order"], rows)


def evaluation(machine: str) -> str:
    """Speed-ups over the plain loop with their intervals, and mean accepted tokens, by method and question set."""
    found = {
        name: {row["method"]: row for row in read(f"evaluate-{name}-{machine}")["figures"] if row["task"] == "overall"}
        or {row["method"]: row for row in read(f"evaluate-{name}-{machine}")["figures"]}
        for name in SETS
    }
    rows = []
    for method, text in METHODS.items():
        cells = [found[name][method] for name in SETS]
        rows.append([text, *(f"{one['speedup']:.2f} ({one['low']:.2f} to {one['high']:.2f})" for one in cells)])
        rows[-1].append(", ".join(f"{one['mat']:.2f}" for one in cells))
    counts = [f"{text}, {found[name]['plain']['questions']}" for name, text in SETS.items()]
    return table(["method", *counts, "mat, in this order"], rows)


def agreement() -> str:
    """Agreement of the shipped drafter."""
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


TABLES: dict[str, Callable[[], str]] = {
    "default_run": default_run,
    "objectives": objectives,
    "exit_layers": exit_layers,
    "evaluation_cpu": lambda: evaluation("cpu"),
    "evaluation_h200": lambda: evaluation("h200"),
    "agreement": agreement,
    "costs": costs,
}


def filled(page: str) -> str:
    """The page with every marked table made anew."""
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}\n{place[3]}", page)


if __name__ == "__main__":
    path = BOOK / "results.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
