"""Figures: one style, a palette that colour-blind readers can tell apart, labels at the lines."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
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
"""Between labels at the ends of lines, at least."""

STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


def _label_end(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", color=colour, va="center")


@contextmanager
def _figure(save: str | Path | None, rows: int = 1, **how: Any) -> Iterator[Any]:
    """Axes to draw on; then the figure is saved if asked to, and shown."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, **how)
        yield axes
        if save is not None:
            Path(save).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(save, bbox_inches="tight")
        plt.show()
        plt.close(figure)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the ends of lines, (y, x, name, colour) each, moved up where two would stand on one another."""
    axes.autoscale_view()
    # From the lowest name up, each at least LABEL_PIXELS above the one before.
    lowest = -math.inf
    for y, x, name, colour in sorted(ends):
        place = axes.transData.transform((x, y))
        lowest = max(place[1], lowest + LABEL_PIXELS)
        _label_end(axes, x, axes.transData.inverted().transform((place[0], lowest))[1], name, colour)


def _trend(axes: Axes, x: pd.Series, y: pd.Series, text: str, colour: str) -> tuple[float, float, str, str]:
    """Faint points a step, the centred mean over a tenth of the run as a line; its end, for `_label_ends`."""
    axes.plot(x, y, ".", color=colour, alpha=0.2, markersize=4)
    # A tenth of the run is wide enough to see a trend and narrow enough to see it turn.
    smooth = y.rolling(max(3, len(y) // 10), center=True, min_periods=1).mean()
    axes.plot(x, smooth, color=colour)
    return float(smooth.iloc[-1]), float(x.iloc[-1]), text, colour


def learning_curve(
    metrics: pd.DataFrame, held_out: tuple[float, float] | None = None, save: str | Path | None = None
) -> None:
    """Accept rate, reward and baseline above, the distillation loss below, over response tokens.

    Args:
        metrics: of one run, as `read_metrics` gives it.
        held_out: accept rate on unseen prompts before and after, drawn at both ends.
        save: also write the figure here.

    Raises:
        DvirlError: if there is no step to draw.
    """
    if metrics.empty:
        raise DvirlError("the run made no fast update; give it more prompts, or a smaller fast_batch")
    with _figure(save, 2, sharex=True, figsize=(7.5, 5.2), height_ratios=(3, 2)) as (above, below):
        tokens = metrics.tokens / 1000
        served = _trend(above, tokens, metrics.accept_rate, "served draft", BLUE)
        above.plot(tokens, metrics.baseline, color=ORANGE)
        _label_end(above, tokens.iloc[-1], metrics.baseline.iloc[-1], "baseline\n(sampled draft)", ORANGE)
        if held_out is not None:
            above.plot(
                [0, tokens.iloc[-1]], held_out, "D", color=GREEN, markersize=7, clip_on=False, zorder=3
            )
            above.text(
                0.01, 0.93, "\u25c6 unseen prompts, before and after", color=GREEN, transform=above.transAxes
            )
        above.set(ylabel="accept rate", ylim=(0, None), title="The draft learns while the model generates")
        _label_ends(above, [served])
        divergence = _trend(below, tokens, metrics.loss_kl, "KL", PURPLE)
        _label_ends(below, [divergence])
        below.set(
            xlabel="response tokens (thousands)", ylabel="KL to the verifier\n(nats a token)", ylim=(0, None)
        )


def compare_runs(runs: Mapping[str, pd.DataFrame], title: str, save: str | Path | None = None) -> None:
    """The served draft's accept rate over response tokens, of several runs: metrics by the name at each curve."""
    with _figure(save, figsize=(7.5, 3.8)) as axes:
        ends = []
        for (name, metrics), colour in zip(runs.items(), PALETTE, strict=False):
            ends.append(_trend(axes, metrics.tokens / 1000, metrics.accept_rate, name, colour))
        axes.set(xlabel="response tokens (thousands)", ylabel="accept rate", ylim=(0, None), title=title)
        _label_ends(axes, ends)


def time_shares(seconds: Mapping[str, float], save: str | Path | None = None) -> None:
    """Where the wall time of a run went, `seconds` by part, as one bar."""
    with _figure(save, figsize=(7.5, 1.3)) as axes:
        # One bar of stacked parts, each named above itself.
        left = 0.0
        total = sum(seconds.values())
        for (name, value), colour in zip(seconds.items(), PALETTE, strict=False):
            axes.barh([0], [value], left=left, color=colour)
            axes.text(
                left + value / 2, 0.52, f"{name}\n{value / total:.0%}", ha="center", va="bottom", color=colour
            )
            left += value
        axes.set(yticks=[], xlabel="seconds", ylim=(-0.4, 0.5))
        axes.grid(False)


def steps_by_context(steps: Sequence[tuple[int, int, StepCosts]], save: str | Path | None = None) -> None:
    """What steps cost over the tokens before them: (k, context, costs) each; the first exit layer is drawn."""
    first = sorted((context, costs) for k, context, costs in steps if k == steps[0][0])
    contexts, costs = zip(*first, strict=True)
    longest = len(costs[0].verify) - 1
    lines = {
        "plain step": [one.verify[0] for one in costs],
        f"verifying {longest} drafts": [one.verify[longest] for one in costs],
        "one draft": [one.draft for one in costs],
    }
    with _figure(save, figsize=(7.5, 3.4)) as axes:
        for (name, times), colour in zip(lines.items(), PALETTE, strict=False):
            axes.plot(contexts, times, "o-", color=colour)
            _label_end(axes, contexts[-1], times[-1], name, colour)
        axes.set(xlabel="tokens before the step", ylabel="milliseconds", xscale="log", ylim=(0, None))
        axes.set_xticks(contexts, labels=map(str, contexts))
        axes.minorticks_off()
        axes.set_title(f"What a step costs as the text grows (exit layer {steps[0][0]})")


def speedups(found: pd.DataFrame, reference: str, save: str | Path | None = None) -> None:
    """How much faster than the reference each method is, task by task, with 95 % intervals.

    Args:
        found: as `spec_bench.measures` gives it.
        reference: left out, it is 1 everywhere.
        save: also write the figure here.
    """
    tasks = list(dict.fromkeys(found.task))
    names = [name for name in dict.fromkeys(found.method) if name != reference]
    size = (1.2 + 1.25 * len(tasks), 1.1 + 0.4 * len(names))
    how: Any = dict(
        ncols=len(tasks), sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained"
    )
    with _figure(save, **how) as (row,):
        for axes, task in zip(row, tasks, strict=True):
            own = found[found.task == task].set_index("method").loc[names]
            for place, one in enumerate(own.itertuples()):
                colour = PALETTE[place % len(PALETTE)]
                axes.plot([one.low, one.high], [place, place], color=colour)
                axes.plot([one.speedup], [place], "o", color=colour, zorder=4)
                axes.text(one.speedup, place - 0.24, f"{one.speedup:.2f}", ha="center", fontsize=7.5, color=colour,
                          bbox=dict(facecolor="white", edgecolor="none", pad=0))  # fmt: skip
            axes.axvline(1.0, color="grey", linewidth=1)
            axes.margins(x=0.12)
            axes.set_title(task.replace("_", "\n"), fontsize=9)
            axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.6))
        row[0].figure.supxlabel(f"times as fast as {reference}", fontsize="medium")


def losses(metrics: pd.DataFrame, save: str | Path | None = None) -> None:
    """Both heads' losses over the steps of a shallow-gradient fine-tuning."""
    with _figure(save, figsize=(7.5, 3.4)) as axes:
        exit_head = _trend(axes, metrics.step, metrics.loss_exit, "exit head", BLUE)
        last_layer = _trend(axes, metrics.step, metrics.loss_main, "last layer", ORANGE)
        axes.set(xlabel="step", ylabel="cross-entropy (nats a token)", ylim=(0, None))
        _label_ends(axes, [exit_head, last_layer])
        axes.set_title("What both heads make of human replies")


def rejections(events: pd.DataFrame, save: str | Path | None = None) -> None:
    """Where drafts are rejected: by position in the block, token class and category, one colour a method.

    Left the accept rate of the drafts scored there, with its 95 % interval; right the share of all rejects.

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
    groups = [events.groupby(by).accepted.mean().sort_values(ascending=False).index for by in FACETS]
    groups[0] = groups[0].sort_values()
    sizes = [len(group) + 0.5 for group in groups]
    thick = 0.7 / len(methods)
    how: Any = dict(
        ncols=2, height_ratios=sizes, width_ratios=(3, 2), sharex="col", sharey="row", layout="constrained"
    )
    with _figure(save, 3, figsize=(7.5, 1.8 + 0.23 * sum(sizes)), **how) as axes:
        for (left, right), (by, title), group in zip(axes, FACETS.items(), groups, strict=True):
            for place, (name, colour) in enumerate(zip(methods, PALETTE, strict=False)):
                found = accept_rates(events[events.method == name], by)
                y = group.get_indexer(found.index) + (place - (len(methods) - 1) / 2) * thick
                left.hlines(y, found.low, found.high, color=colour)
                left.plot(found.accept_rate, y, "o", color=colour, markersize=4, label=name)
                right.barh(y, found.rejects, thick, color=colour, zorder=2)
            left.set(yticks=range(len(group)), yticklabels=group, ylim=(len(group) - 0.4, -0.6))
            left.set_title(f"by {title}", loc="left", fontsize=10)
        left.set(xlabel="accept rate, 95 % interval")
        right.set(xlabel="share of all rejects", xlim=(0, None))
        left.figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=len(PALETTE),
                           frameon=False, labelcolor="linecolor", handlelength=0.5)  # fmt: skip


def curves(
    found: pd.DataFrame, text: Mapping[str, str], guide: Sequence[tuple[float, float]] = (), log: bool = False,
    save: str | Path | None = None,
) -> None:  # fmt: skip
    """Lines with their intervals, each named at its end.

    Args:
        found: `name`, `x` and `y`, and `low` and `high` where an interval is known; one point alone is a diamond.
        text: title, xlabel and ylabel.
        guide: ends of a grey line to compare with.
        log: y in powers of ten.
        save: also write the figure here.
    """
    with _figure(save, figsize=(7.5, 3.6)) as axes:
        axes.plot(*zip(*guide, strict=True) if guide else ((), ()), "--", color="grey", linewidth=1)
        ends = []
        for (name, own), colour in zip(found.groupby("name", sort=False), PALETTE, strict=False):
            axes.plot(
                own.x, own.y, "o-" if len(own) > 1 else "D", color=colour, markersize=4 if len(own) > 1 else 7
            )
            if "low" in own:
                axes.vlines(own.x, own.low, own.high, color=colour, alpha=0.6)
            ends.append((float(own.y.iloc[-1]), float(own.x.iloc[-1]), str(name), colour))
        axes.set(**text, yscale="log" if log else "linear")
        _label_ends(axes, ends)


def scatter(
    found: pd.DataFrame, text: Mapping[str, str], guide: Sequence[tuple[float, float]] = (),
    save: str | Path | None = None,
) -> None:  # fmt: skip
    """Points with their intervals, each with its name, in the colour of what stands before the name's comma.

    Args:
        found: `name`, `x` and `y`; `low` and `high` where an interval of y is known, `left` and `right` where of x.
        text: title, xlabel and ylabel; xscale log for a log scale.
        guide: ends of a grey line to compare with.
        save: also write the figure here.
    """
    found = found.assign(colour=[PALETTE[at] for at in pd.factorize(found.name.str.split(",").str[0])[0]])
    with _figure(save, figsize=(7.5, 4.2)) as axes:
        axes.plot(*zip(*guide, strict=True) if guide else ((), ()), "--", color="grey", linewidth=1)
        axes.set(**text)
        for draw, ends in ((axes.vlines, "x low high"), (axes.hlines, "y left right"), (axes.scatter, "x y")):
            if set(ends.split()) <= set(found):
                draw(*(found[end] for end in ends.split()), color=found.colour, alpha=0.7)
        if axes.get_xscale() == "log":
            axes.xaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=""
            )
        # Names go to the side with more room, and up until they overlap no other.
        axes.autoscale_view()
        for name, x, y, colour in found.sort_values("y")[["name", "x", "y", "colour"]].itertuples(
            index=False
        ):
            side = (
                "right"
                if axes.transData.transform((x, y))[0] > axes.bbox.x0 + axes.bbox.width / 2
                else "left"
            )
            label = axes.annotate(f" {name} ", (x, y), (0, 4), "data", "offset points", color=colour, ha=side)
            while any(
                label.get_window_extent().overlaps(other.get_window_extent()) for other in axes.texts[:-1]
            ):
                label.set_position((0, label.get_position()[1] + 1))


def step_shares(found: pd.DataFrame, save: str | Path | None = None) -> None:
    """Where the time of a block goes: a bar a row, its index the name, its columns the parts in milliseconds."""
    with _figure(save, figsize=(7.5, 1.2 + 0.5 * len(found)), layout="constrained") as axes:
        shares = found.div(found.sum(axis=1), axis=0)
        ends = found.cumsum(axis=1)
        for part, colour in zip(found, PALETTE, strict=False):
            bars = axes.barh(
                found.index, found[part], 0.6, ends[part] - found[part], color=colour, label=part
            )
            has_room = found[part] > 0.05 * found.sum(axis=1).max()  # for its label
            labels = shares[part].map("{:.0%}".format).where(has_room, "")
            axes.bar_label(bars, labels.tolist(), label_type="center")
        axes.set(xlabel="milliseconds a block")
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, handlelength=1)
