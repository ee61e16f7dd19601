"""A peer answers in a process of its own that lives long and sleeps between questions: both ends of its pipe.

Standard library only: a peer's environment has none of our packages. One JSON object a line goes each way.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress


class Peer:
    """The asking end; what the peer prints otherwise goes to its log."""

    def __init__(self, command, log, environment):
        self.log = log
        with log.open("w") as printed:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                env=environment,
            )
        self.ready = self.receive()

    def receive(self):
        """What the peer says next; if it has ended, the last line that it printed, as the reason of a failure."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        printed = self.log.read_text(errors="replace").strip().splitlines()
        return {"failed": (printed or ["it ended and gave no reason"])[-1]}

    def ask(self, **question):
        """The peer's reply to a question."""
        with suppress(OSError):  # it has ended, and `receive` says why
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        return self.receive()

    def close(self):
        """Let it end: it reads until nobody can ask any more."""
        with suppress(OSError):  # a question that nobody read
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def attempt(function, *arguments):
    """A function's result, and None or what went wrong in one line."""
    try:
        return function(*arguments), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def serve(prepare):
    """The answering end: make the ways of decoding, then answer by the way that each question names.

    Args:
        prepare: functions by the name of a way. Each makes its way, a function from token ids and a limit to new token
            ids and the number of passes of the whole model.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    ways, missing = {}, {}
    for name, make in prepare.items():
        way, wrong = attempt(make)
        if wrong:  # the others go on
            missing[name] = wrong
        else:
            ways[name] = way
    print(json.dumps({"ways": list(ways), "missing": missing}), file=replies, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        started = time.perf_counter()
        answer, wrong = attempt(ways[question["way"]], question["prompt"], question["limit"])
        seconds = time.perf_counter() - started
        reply = {"failed": wrong} if wrong else {"seconds": seconds, "tokens": answer[0], "passes": answer[1]}
        print(json.dumps(reply), file=replies, flush=True)
