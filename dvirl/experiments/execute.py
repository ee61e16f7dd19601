"""Runs a notebook, its progress shown from inside: `python -m dvirl.experiments.execute NOTEBOOK OUT NAME=VALUE`."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Execute a notebook with parameters, its progress bars on stderr; print its run folder's `summary.txt`.

    Args:
        argv: the notebook, where to write the executed one, and parameters, which are texts.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of papermill's libraries
        import papermill
    notebook, out, *given = argv
    parameters = dict(parameter.split("=", 1) for parameter in given)
    papermill.execute_notebook(
        notebook,
        out,
        parameters,
        kernel_name="python3",
        progress_bar=False,
        stderr_file=sys.stderr,
        # Errors in cells arrive as outputs. What the kernel itself logs is no news to who runs it: that it talks
        # to this process over TCP, or that it was interrupted when its work was done, which is how it is stopped.
        extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
    )
    summary = Path(parameters.get("run_dir", "")) / "summary.txt"
    if summary.exists():
        print(summary.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
