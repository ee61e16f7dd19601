"""Figures: one style, a palette that colour-blind readers can tell apart, labels at the lines."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator

from dvirl.metrics import FACETS, accept_rates
from dvirl.runs.errors import DvirlError
from kangaroo.decoding.costs import StepCosts

BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#E69F00")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
LABEL_PIXELS = 16
"""Least distance between labels at the ends of lines."""
FEW_POINTS = 40
"""A run of no more steps than this has its points drawn more strongly."""
LABEL: Any = {
    "textcoords": "offset points",
    "va": "center",
    "path_effects": [withStroke(linewidth=2, foreground="white")],
}
"""How a name stands beside its point: with a white edge, so that it can be read where it lies on a line."""
ABOVE_LEGEND = 26
"""Points between the axes and a title that stands above a legend."""
OVERALL = "overall"
"""The task that stands for all questions."""

STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}

Item = TypeVar("Item")
SavePath = str | Path | None
"""Where a figure is also written; its suffix is the format."""


@contextmanager
def _figure(save: SavePath, height: float, **layout: Any) -> Iterator[Any]:
    """Axes to draw on, of a figure of this height in inches; then it is saved if asked to, and shown."""
    with plt.rc_context(STYLE):
        # The style holds inside this block only, so that a notebook's own figures keep theirs.
        figure, axes = plt.subplots(figsize=(7.5, height), **layout)
        yield axes
        if save is not None:
            Path(save).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(save, bbox_inches="tight")
        plt.show()
        plt.close(figure)  # pyplot would keep every figure of a long run in memory


def _coloured(items: Iterable[Item]) -> Iterator[tuple[Item, str]]:
    """Each item with a colour of its own; items beyond the last colour are left out."""
    return zip(items, PALETTE, strict=False)


def _label_ends(axes: Any) -> None:
    """Write the labels of lines at their ends, from the lowest up; one moves up where it would cover another."""
    axes.autoscale_view()  # else the limits would change after the pixels are computed
    to_pixels = axes.transData
    lowest = -math.inf
    lines, _ = axes.get_legend_handles_labels()
    lines = [line for line in lines if len(line.get_xydata())]
    for line in sorted(lines, key=lambda line: line.get_xydata()[-1, 1]):
        x, y = to_pixels.transform(line.get_xydata()[-1])
        lowest = max(y, lowest + LABEL_PIXELS)
        # The text stands where these pixels are in data units.
        place = to_pixels.inverted().transform((x, lowest))
        axes.annotate(line.get_label(), place, (8, 0), color=line.get_color(), **LABEL)


def _trend(axes: Axes, x: pd.Series, y: pd.Series, name: str, colour: str) -> None:
    """Draw a faint point for each step, and their centred mean over a tenth of the run as a line of this name."""
    faint = 0.2 if len(y) > FEW_POINTS else 0.6
    axes.plot(x, y, ".", color=colour, alpha=faint, markersize=4)
    window = max(3, len(y) // 10)
    smooth = y.rolling(window, center=True, min_periods=1).mean()
    axes.plot(x, smooth, color=colour, label=name)


def _guide(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Draw a grey line to compare with; nothing without points."""
    x, y = np.reshape(points, (-1, 2)).T
    axes.plot(x, y, "--", color="grey", linewidth=1)


def learning_curve(
    metrics: pd.DataFrame, held_out: tuple[float, float] | None = None, save: SavePath = None
) -> None:
    """Acceptance rate, reward and baseline above, the distillation loss below, over response tokens.

    Args:
        metrics: of one run, as `read_metrics` gives it.
        held_out: acceptance rate on unseen prompts before and after, drawn at both ends.
        save: also write the figure here.

    Raises:
        DvirlError: if there is no step to draw.
    """
    if metrics.empty:
        raise DvirlError("the run made no fast update; give it more prompts, or a smaller fast_batch")
    tokens = metrics.tokens / 1000
    with _figure(save, 5.2, nrows=2, sharex=True, height_ratios=(3, 2)) as (above, below):
        _trend(above, tokens, metrics.accept_rate, "served draft", BLUE)
        above.plot(tokens, metrics.baseline, color=ORANGE, label="baseline\n(sampled draft)")
        if held_out is not None:
            ends = [0, tokens.iloc[-1]]
            above.plot(ends, held_out, "D", color=GREEN, markersize=7, clip_on=False, zorder=3)
            above.text(
                0.01, 0.93, "\u25c6 unseen prompts, before and after", color=GREEN, transform=above.transAxes
            )
        above.set(
            ylabel="acceptance rate",
            ylim=(0, None),
            title="The draft learns while the model generates",
        )
        _trend(below, tokens, metrics.loss_kl, "KL", PURPLE)
        below.set(
            xlabel="response tokens (thousands)",
            ylabel="KL to the verifier\n(nats a token)",
            ylim=(0, None),
        )
        _label_ends(above)
        _label_ends(below)


def compare_runs(runs: Mapping[str, pd.DataFrame], title: str, save: SavePath = None) -> None:
    """The served draft's acceptance rate over response tokens, of several runs: metrics by the name at each curve."""
    rates = {name: (log.tokens / 1000, log.accept_rate) for name, log in runs.items()}
    _trends(rates, "response tokens (thousands)", "acceptance rate", title, save)


def losses(metrics: pd.DataFrame, save: SavePath = None) -> None:
    """Both heads' losses over the steps of a shallow-gradient fine-tuning."""
    heads = {
        "exit head": (metrics.step, metrics.loss_exit),
        "last layer": (metrics.step, metrics.loss_main),
    }
    _trends(heads, "step", "cross-entropy (nats a token)", "What both heads make of human replies", save)


def _trends(
    lines: Mapping[str, tuple[pd.Series, pd.Series]], xlabel: str, ylabel: str, title: str, save: SavePath
) -> None:
    """Trends of `x` and `y`, each named at its end."""
    with _figure(save, 3.6) as axes:
        for (name, (x, y)), colour in _coloured(lines.items()):
            _trend(axes, x, y, name, colour)
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None), title=title)
        _label_ends(axes)


def time_shares(seconds: Mapping[str, float], save: SavePath = None) -> None:
    """Where the wall time of a run went, `seconds` by part, as one bar."""
    total = sum(seconds.values())
    with _figure(save, 1.3) as axes:
        left = 0.0
        for (name, value), colour in _coloured(seconds.items()):
            axes.barh([0], [value], left=left, color=colour)
            label = f"{name}\n{value / total:.0%}"
            axes.text(left + value / 2, 0.52, label, ha="center", va="bottom", color=colour)
            left += value
        axes.set(yticks=[], xlabel="seconds", ylim=(-0.4, 0.5))
        axes.grid(False)  # heights mean nothing here


def steps_by_context(steps: Sequence[tuple[int, int, StepCosts]], save: SavePath = None) -> None:
    """What steps cost over the tokens before them: (k, context, costs) each; the first exit layer is drawn."""
    exit_layer = steps[0][0]
    by_context = {context: costs for k, context, costs in steps if k == exit_layer}
    rows = []
    for context, costs in sorted(by_context.items()):
        longest = len(costs.verify) - 1
        times = {
            "plain step": costs.verify[0],
            f"verifying {longest} drafts": costs.verify[longest],
            "one draft": costs.draft,
        }
        rows += [(name, context, time) for name, time in times.items()]
    text = {
        "xlabel": "tokens before the step",
        "ylabel": "milliseconds",
        "xscale": "log",
        "xticks": list(by_context),
        "xticklabels": list(by_context),
        "ylim": (0, None),
        "title": f"What a step costs as the text grows (exit layer {exit_layer})",
    }
    curves(pd.DataFrame(rows, columns=["name", "x", "y"]), text, save=save)


def speedups(found: pd.DataFrame, reference: str, title: str = "", save: SavePath = None) -> None:
    """How much faster than the reference each method is, with 95 % intervals: a row for each method.

    With a task "overall" that one is drawn large, with its number, and the other tasks are small grey dots around it.
    Without it each task has a colour of its own.

    Args:
        found: as `spec_bench.measures` gives it.
        reference: left out, it is 1 everywhere.
        title: of the figure.
        save: also write the figure here.
    """
    figures = found[found.method != reference]
    names = list(figures.method.unique())
    figures = figures.assign(row=figures.method.map(names.index))
    overall = figures[figures.task == OVERALL]
    tasks = [] if len(overall) else list(figures.task.unique())
    with _figure(save, 1.3 + (0.15 * len(tasks) or 0.42) * (len(names) + 1)) as axes:
        # The reference is as fast as itself.
        axes.axvline(1.0, color="grey", linewidth=1)
        if tasks:
            _draw_tasks(axes, figures, tasks)
        else:
            _draw_overall(axes, figures, overall)
        _legend_above(axes)
        axes.set(
            yticks=range(len(names)),
            yticklabels=names,
            ylim=(len(names) - 0.5, -0.6),
            xlim=(-0.04 * figures.high.max() if names else 0.0, None),
            xlabel=f"times as fast as {reference}",
        )
        axes.set_title(title, pad=ABOVE_LEGEND)
        axes.grid(False, axis="y")


def _draw_overall(axes: Axes, figures: pd.DataFrame, overall: pd.DataFrame) -> None:
    """Draw all questions together as a large dot with its interval and number, each task as a small grey one."""
    tasks = figures[figures.task != OVERALL]
    axes.plot(
        tasks.speedup, tasks.row, "o", color="grey", alpha=0.5, markersize=4, label="one kind of question"
    )
    axes.hlines(overall.row, overall.low, overall.high, color=BLUE, linewidth=2)
    axes.plot(
        overall.speedup, overall.row, "o", color=BLUE, markersize=8, label="all questions, 95 % interval"
    )
    for method in overall.itertuples():
        text = f"{method.speedup:.2f}"
        place = (method.speedup, method.row)
        axes.annotate(text, place, (0, 12), ha="center", color=BLUE, weight="bold", **LABEL)


def _draw_tasks(axes: Axes, figures: pd.DataFrame, tasks: Sequence[str]) -> None:
    """Draw each task's dots and intervals in a colour of its own, side by side within the method's row."""
    for place, (task, colour) in enumerate(_coloured(tasks)):
        # Tasks are centred on the method's row.
        own = figures[figures.task == task]
        rows = own.row + 0.17 * (place - (len(tasks) - 1) / 2)
        axes.hlines(rows, own.low, own.high, color=colour, linewidth=2)
        axes.plot(own.speedup, rows, "o", color=colour, markersize=6, label=task)
    for border in range(1, figures.row.max() + 1):
        axes.axhline(border - 0.5, color="grey", alpha=0.25, linewidth=0.8)


def _legend_above(axes: Axes) -> None:
    """Name what is drawn in one line above the axes, from their left edge."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(PALETTE),
        handlelength=1,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def rejections(events: pd.DataFrame, save: SavePath = None) -> None:
    """Where drafts are rejected: by position in the block, token class and category, one colour a method.

    Left the acceptance rate of the drafts scored there, with its 95 % interval; right the share of all rejects.

    Args:
        events: as `read_trace` gives them.
        save: also write the figure here.

    Raises:
        DvirlError: for no method, or more than there are colours.
    """
    # Methods share a row of bars, so there can be no more of them than colours.
    methods = list(events.method.unique())
    if not 0 < len(methods) <= len(PALETTE):
        raise DvirlError(f"{len(methods)} methods; a figure shows 1 to {len(PALETTE)}, chosen by --method")
    groups = []
    for by in FACETS:
        rates = events.groupby(by).accepted.mean()
        groups.append(rates.sort_values(ascending=False).index)
    groups[0] = groups[0].sort_values()  # positions stay in their order
    heights = [len(group) + 0.5 for group in groups]
    with _figure(
        save,
        1.8 + 0.23 * sum(heights),
        nrows=3,
        ncols=2,
        height_ratios=heights,
        width_ratios=(3, 2),
        sharex="col",
        sharey="row",
        layout="constrained",
    ) as axes:
        for (left, right), by, group in zip(axes, FACETS, groups, strict=True):
            _draw_facet(left, right, events, by, group)
        left.set(xlabel="acceptance rate, 95 % interval")
        right.set(xlabel="share of all rejects", xlim=(0, None))
        left.figure.legend(
            *left.get_legend_handles_labels(),
            loc="outside upper left",
            ncols=len(PALETTE),
            labelcolor="linecolor",
            handlelength=0.5,
        )


def _draw_facet(
    left: Axes,
    right: Axes,
    events: pd.DataFrame,
    by: str,
    groups: pd.Index,
) -> None:
    """Draw one row of `rejections`: the groups from top to bottom, in each of them the methods side by side."""
    methods = events.method.unique()
    thickness = 0.7 / len(methods)
    for place, (name, colour) in enumerate(_coloured(methods)):
        rates = accept_rates(events[events.method == name], by)
        # Methods are centred on the group's height.
        offset = (place - (len(methods) - 1) / 2) * thickness
        y = groups.get_indexer(rates.index) + offset
        left.hlines(y, rates.low, rates.high, color=colour)
        left.plot(rates.accept_rate, y, "o", color=colour, markersize=4, label=name)
        right.barh(y, rates.rejects, thickness, color=colour, zorder=2)
    left.set(
        yticks=range(len(groups)),
        yticklabels=groups,
        ylim=(len(groups) - 0.4, -0.6),
    )
    left.set_title(f"by {FACETS[by]}", loc="left", fontsize=10)


def curves(
    found: pd.DataFrame,
    text: Mapping[str, Any],
    guide: Sequence[tuple[float, float]] = (),
    log: bool = False,
    save: SavePath = None,
) -> None:
    """Lines with their intervals, each named at its end.

    Args:
        found: `name`, `x` and `y`, and `low` and `high` where an interval is known; one point alone is a diamond.
        text: title, xlabel and ylabel, and what else `Axes.set` takes.
        guide: ends of a grey line to compare with.
        log: y in powers of ten.
        save: also write the figure here.
    """
    with _figure(save, 3.6) as axes:
        _guide(axes, guide)
        for (name, line), colour in _coloured(found.groupby("name", sort=False)):
            # A single point would make no line, so it is drawn larger.
            marker, size = ("o-", 4) if len(line) > 1 else ("D", 7)
            axes.plot(line.x, line.y, marker, color=colour, markersize=size, label=name)
            if "low" in line:
                axes.vlines(line.x, line.low, line.high, color=colour, alpha=0.6)
        axes.set(**text, yscale="log" if log else "linear")
        if "xticks" in text:
            axes.minorticks_off()
        _label_ends(axes)


def scatter(
    found: pd.DataFrame,
    text: Mapping[str, str],
    guide: Sequence[tuple[float, float]] = (),
    save: SavePath = None,
) -> None:
    """Points with their intervals and names, in the colour of what stands before a name's comma.

    What stands before the comma is named once, above the axes; a point is named by what stands after it.

    Args:
        found: `name`, `x` and `y`; `low` and `high` where an interval of y is known, `left` and `right` where of x.
        text: title, xlabel and ylabel; xscale log for a log scale.
        guide: ends of a grey line to compare with.
        save: also write the figure here.
    """
    parts = found.name.str.partition(", ")
    has_label = parts[2] != ""
    found = found.assign(group=parts[0], label=parts[2].where(has_label, parts[0]))
    with _figure(save, 4.6) as axes:
        _guide(axes, guide)
        axes.set(**text)
        for (group, points), colour in _coloured(found.groupby("group", sort=False)):
            if "low" in points:
                axes.vlines(points.x, points.low, points.high, color=colour, alpha=0.35)
            if "left" in points:
                axes.hlines(points.y, points.left, points.right, color=colour, alpha=0.35)
            axes.scatter(points.x, points.y, color=colour, label=group, zorder=4)  # over edges of names
            found.loc[points.index, "colour"] = colour
        if axes.get_xscale() == "log":
            # Powers of ten alone would leave most axes with one or two numbers.
            axes.xaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)),
                major_formatter="{x:g}",
                minor_formatter="",
            )
        if has_label.any():
            axes.set_title(axes.get_title(), pad=ABOVE_LEGEND)
            _legend_above(axes)
        axes.autoscale_view()
        # Pixels are known once the limits are.
        points = axes.transData.transform(found[["x", "y"]].to_numpy(dtype=float))
        for point in found.sort_values("y").itertuples():
            _name_point(axes, point, points)


NAME_PLACES = [
    (distance * across, distance * up)
    for distance in (9, 14, 22, 32, 44, 58)
    for across, up in ((0.6, 0.8), (-0.6, 0.8), (0.6, -0.8), (-0.6, -0.8), (1, 0), (-1, 0), (0, 1), (0, -1))
]
"""Where a point's name may stand, in points to the right and up, the best place first."""


def _name_point(axes: Axes, point: Any, points: Any) -> None:
    """Write a point's name at the nearest place where it covers no name and no point; a thin line leads far ones back.

    Args:
        axes: with the names written so far.
        point: `x`, `y`, `label` and `colour`.
        points: `[N, 2]`, all points in pixels.
    """
    frame = axes.get_window_extent()
    earlier = [text.get_window_extent() for text in axes.texts]
    label = axes.annotate(point.label, (point.x, point.y), (0, 0), color=point.colour, **LABEL)

    def is_free() -> bool:
        box = label.get_window_extent()
        inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
        return inside and not box.count_contains(points) and not any(map(box.overlaps, earlier))

    # The last place stays if none is free.
    for across, up in NAME_PLACES:
        label.set_position((across, up))
        label.set(ha="left" if across > 0 else "right" if across < 0 else "center")
        if is_free():
            break
    if math.hypot(across, up) > 15:
        line = {"arrowstyle": "-", "color": point.colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
        axes.annotate("", (point.x, point.y), (across, up), "data", "offset points", arrowprops=line)


def acceptance_and_drift(runs: Mapping[str, pd.DataFrame], bound: float, save: SavePath = None) -> None:
    """The log of each step, over response tokens: the acceptance rate above, the drift below where it was measured.

    Args:
        runs: metrics by the name at each curve.
        bound: `drift_bound`, drawn as a dashed line.
        save: also write the figure here.
    """
    with _figure(save, 5.6, nrows=2, sharex=True) as (above, below):
        for (name, log), colour in _coloured(runs.items()):
            _trend(above, log.tokens, log.accept_rate, name, colour)
            measured = log[log.drift_kl.notna()]
            if len(measured):  # a short run may end before its drift is measured
                below.plot(measured.tokens, measured.drift_kl, "o-", color=colour, markersize=3, label=name)
        below.axhline(bound, color="grey", linestyle="--", linewidth=1)
        below.annotate(
            "drift_bound", (0, bound), (3, 4), ("axes fraction", "data"), "offset points", color="dimgrey"
        )
        above.set(ylabel="acceptance rate", ylim=(0, None))
        below.set(ylabel="drift (nats a token)", xlabel="response tokens")
        _label_ends(above)
        _label_ends(below)


def gradients(norms: pd.DataFrame, exit_layer: int, save: SavePath = None) -> None:
    """What each loss sends to each layer, a panel a loss: with the exit state detached, and without.

    Args:
        norms: `loss`, `detached`, `layer` and `norm`.
        exit_layer: its last shallow layer is shaded with those before it.
        save: also write the figure here.
    """
    losses = list(norms.loss.unique())
    looks = {
        False: {"color": ORANGE, "linewidth": 6, "alpha": 0.45, "label": "not detached"},
        True: {"color": BLUE, "linewidth": 1.5, "marker": ".", "label": "detached"},
    }
    with _figure(save, 3.6, ncols=len(losses), sharey=True, squeeze=False, layout="constrained") as (row,):
        for axes, loss in zip(row, losses, strict=True):
            axes.axvspan(0.5, exit_layer + 0.5, color="grey", alpha=0.12, linewidth=0)
            # The thick line comes first, so that the thin one shows where both are one.
            for detached, lines in norms[norms.loss == loss].groupby("detached"):
                axes.plot(lines.layer, lines.norm, **looks[bool(detached)])
            axes.set(title=loss, xlabel="layer")
        first = row[0]
        first.set(ylabel="norm of the gradient", ylim=(-0.02 * norms.norm.max(), None))
        first.text(exit_layer / 2 + 0.5, 0.98 * first.get_ylim()[1], "shallow", ha="center", va="top")
        first.figure.legend(*first.get_legend_handles_labels(), loc="outside upper left", ncols=2)


def step_shares(found: pd.DataFrame, save: SavePath = None) -> None:
    """Where the time of a block goes: a bar a row, its index the name, its columns the parts in milliseconds."""
    totals = found.sum(axis=1)
    shares = found.div(totals, axis=0)
    ends = found.cumsum(axis=1)
    with _figure(save, 1.2 + 0.5 * len(found), layout="constrained") as axes:
        for part, colour in _coloured(found):
            times = found[part]
            bars = axes.barh(found.index, times, 0.6, ends[part] - times, color=colour, label=part)
            has_room = times > 0.05 * totals.max()  # for its label
            labels = shares[part].map("{:.0%}".format).where(has_room, "")
            axes.bar_label(bars, labels.tolist(), label_type="center")
        axes.set(xlabel="milliseconds a block")
        axes.invert_yaxis()  # the first row comes at the top
        axes.grid(False, axis="y")
        axes.figure.legend(
            loc="outside upper left",
            ncols=3,
            fontsize=9,
            handlelength=1,
        )
