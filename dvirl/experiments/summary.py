"""What studies and sweeps share: rows, and their statistics over seeds."""

from collections.abc import Container, Sequence
from typing import Any

import pandas as pd

Row = dict[str, Any]
"""One run: `variant`, `seed`, of a grid also `start`, and `figures`, numbers by name. Some have a `curve`."""
Summary = dict[str, dict[str, dict[str, float]]]
"""`mean`, `std` and `n`, the number of seeds, by start and variant, and by figure."""


def row_name(row: Row, *, keys: Sequence[str] = ("start", "variant", "seed")) -> str:
    """Start (of a grid), variant and seed."""
    return "/".join(str(row[key]) for key in keys if key in row)


def summary(rows: Sequence[Row]) -> Summary:
    """Mean and standard deviation over seeds of every figure, by start and variant.

    Seeds whose figure is NaN are left out: a verifier that has gone silent has no agreement. The deviation of a single
    seed is 0.
    """
    points = []
    for row in rows:
        name = row_name(row, keys=("start", "variant"))
        points += [(name, figure, float(value)) for figure, value in row["figures"].items()]
    values = pd.DataFrame(points, columns=["name", "figure", "value"])
    statistics = values.groupby(["name", "figure"], sort=False)["value"].agg(["mean", "std", "count"])
    table: Summary = {}
    for (name, figure), mean, std, count in statistics.fillna({"std": 0.0}).itertuples():
        table.setdefault(name, {})[figure] = {"mean": mean, "std": std, "n": count}
    return table


def summary_table(table: Summary, shown: Container[str]) -> str:
    """The figures to be shown as text, mean ± standard deviation, one line a variant."""
    lines = {}
    for name, figures in table.items():
        lines[name] = {
            figure: f"{value['mean']:.4g} ± {value['std']:.2g}"
            for figure, value in figures.items()
            if figure in shown
        }
    return pd.DataFrame(lines).T.to_string(na_rep="")
