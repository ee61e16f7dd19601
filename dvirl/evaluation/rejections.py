"""Where drafts are rejected, by the trace of an evaluation: `dvirl trace FILE`."""

import argparse
from collections.abc import Sequence
from typing import Any

from dvirl import plots
from dvirl.errors import DvirlError
from dvirl.trace import FACETS, accept_rates, read_trace, write_json


def main(argv: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Print where each method's drafts are rejected, by position in the block, token class and category.

    Intervals are of 95 %, by bootstrap over questions; `rejects` is the share of all rejects.

    Raises:
        DvirlError: for bad input.
    """
    parser = argparse.ArgumentParser(prog="dvirl trace", description=__doc__)
    parser.add_argument("trace", help="JSONL file of accept events, an answer a line")
    parser.add_argument("--method", nargs="+", help="only these; all by default")
    parser.add_argument("--figure", default="", help="also draw them into this file (PNG or SVG)")
    parser.add_argument("--out", default="", help="also write them to this JSON file")
    args = parser.parse_args(list(argv))
    events = read_trace(args.trace)
    known = list(events.method.unique())
    if not known or set(args.method or known) - set(known):
        raise DvirlError(f"{args.trace}: expected drafts of {args.method or 'a method'}; it has {known or 'none'}")
    events = events[events.method.isin(args.method or known)]
    figures: dict[str, dict[str, Any]] = {}
    for name, own in events.groupby("method", sort=False):
        print(f"{name!s}: {own.accepted.mean():.3f} of {len(own)} scored drafts accepted")
        tables = {by: accept_rates(own, by) for by in FACETS}
        print(*(table.to_string(float_format="{:.3f}".format) for table in tables.values()), sep="\n")
        figures[str(name)] = {by: table.reset_index().to_dict("records") for by, table in tables.items()}
    if args.out:
        write_json(args.out, {"arguments": vars(args), "figures": figures})
    if args.figure:
        plots.rejections(events, args.figure)
    return figures
