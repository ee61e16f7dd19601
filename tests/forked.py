"""Kernels for notebooks, forked from a process that has imported torch and ours; alone each takes five seconds more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

IMPORTED = [
    "dvirl.evaluation.runner",
    "dvirl.experiments.live",
    "dvirl.experiments.notebook",
    "dvirl.train_dvi",
    "dvirl.train_sgp",
    "ipykernel.kernelapp",
    "matplotlib_inline",
    "pandas",
    "torch._dynamo",
]
"""What most of the time goes into; the rest a notebook imports itself. Loading a model imports the last."""


class Kernel:
    """A kernel's process, with what Jupyter asks of a `Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 0
        return None

    wait = poll

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def server() -> subprocess.Popen:
    """The process that forks; it ends with the one that started it, and its kernels with it."""
    inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # as in every kernel
    return subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, **inline},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def launch_kernel(command: list[str], env: dict[str, str], cwd: str | None = None, **_) -> Kernel:
    """Stands in for Jupyter's, which starts a process of its own."""
    asked = {"arguments": command[command.index("-f") :], "env": env, "cwd": str(Path(cwd or ".").absolute())}
    forking = server()
    forking.stdin.write(json.dumps(asked) + "\n")
    forking.stdin.flush()
    return Kernel(int(forking.stdout.readline()))


def serve() -> None:
    """Fork a kernel for every line that comes in, and answer with its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what imports say, once and for all
        for name in IMPORTED:
            __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # kernels that have ended are not waited for
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while line := sys.stdin.readline():
        if not (pid := os.fork()):
            return run_kernel(**json.loads(line))
        os.setpgid(pid, pid)  # Jupyter sends signals to the group
        print(pid, file=answers, flush=True)


def run_kernel(arguments: list[str], env: dict[str, str], cwd: str) -> None:
    """Be a kernel, as `python -m ipykernel_launcher` is."""
    from ipykernel.kernelapp import IPKernelApp

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    IPKernelApp.launch_instance(arguments)


if __name__ == "__main__":
    serve()
