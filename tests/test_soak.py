"""Long runs: memory, file handles and step time stay flat, and what a bigger buffer, prompt or batch costs.

`make soak` runs 2,000 updates and writes its figures; the same checks run shorter everywhere. Every run is a process of
its own, this file as a script, so that its memory is its own, and its times are those of its one thread.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import record, tiny_loaded, tiny_pair, tiny_split
from test_trainer import tiny_settings

from dvirl import plots
from dvirl.data.stream import PromptSplit, PromptStream
from dvirl.trainer import DVITrainer

UPDATES = int(os.environ.get("DVIRL_SOAK", "100"))
"""Fast updates of the soak; `make soak` takes more, and makes the figures of all points."""
WARM_UP = UPDATES // 5
"""Updates before which nothing is held against a run: the buffer fills, the allocator finds its size."""
CAPACITY, KEPT = 256, 2
GROWTH = 1.0 if UPDATES >= 2000 else 4.0
"""MiB a hundred updates that memory may grow; a short run's slope is little more than noise."""
SLOWER = 1.5
"""Times as long as those of the first quarter that steps of the last quarter may take, by their medians."""
AXES = {
    "buffer_size": (1024, 4096, 16384, 65536),
    "prompt_tokens": (8, 32, 128, 512),
    "rollout_batch": (4, 16, 64, 256),
    "judge_batch": (1, 4, 16, 64),
    "fast_batch": (16, 64, 256, 1024),
}
"""What a run's memory and time may depend on; one is changed at a time."""
STEPS = 10
"""Updates a point."""
USUAL = dict(buffer_size=4096, prompt_tokens=32, rollout_batch=64, judge_batch=4, fast_batch=64)
MIB = 2**20


def resident() -> float:
    """Memory of this process, in MiB, without pages of files, which the system takes back and gives as it likes."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE") / MIB


def peak() -> float:
    """The most memory that this process has had, in MiB; `ru_maxrss` would count that of the process that started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


class Watched(DVITrainer):
    """A trainer that notes what every update leaves in memory, and holds its buffer against a plain queue."""

    def __init__(self, updates: int, *args):
        super().__init__(*args)
        self.updates, self.began = updates, time.perf_counter()
        self.queue, self.total = deque(maxlen=self.config.buffer_size), 0
        self.notes = {"memory_mib": [], "handles": [], "step_ms": [], "checkpoints": []}

    @property
    def finished(self) -> bool:
        return self.counters.step >= self.updates

    def judge(self, group):
        first, before = self.buffer._next_response, self.buffer.add

        def add(records, rollout, num_accepted):
            before(records, rollout, num_accepted)
            self.total += len(records)
            rows = zip(records.row.tolist(), records.position.tolist(), records.token.tolist(), strict=True)
            self.queue.extend((first + row, position, token) for row, position, token in rows)

        self.buffer.add = add
        super().judge(group)
        del self.buffer.add

    def step(self):
        metrics = super().step()
        fields = (self.buffer.field(name).tolist() for name in ("response_id", "position", "token"))
        assert list(zip(*fields, strict=True)) == list(self.queue), "the oldest were not dropped first"
        assert set(self.buffer._responses) == {row for row, *_ in self.queue}, (
            "responses that no record points to"
        )
        self.notes["memory_mib"].append(resident())
        self.notes["handles"].append(len(os.listdir("/proc/self/fd")))
        self.notes["step_ms"].append(1000 * (time.perf_counter() - self.began))
        self.notes["checkpoints"].append(len([*Path(self.config.run_dir).glob("checkpoints/*")]))
        self.began = time.perf_counter()
        return metrics


def soak(run_dir: str, updates: int) -> dict:
    """Train for so many updates; what each left in memory, and how the buffer ended."""
    config = tiny_settings(
        run_dir=run_dir,
        num_prompts=8 * updates,
        buffer_size=CAPACITY,
        keep_checkpoints=KEPT,
        checkpoint_every=20,
        ramp_start=0.1,
    )
    trainer = Watched(updates, config, tiny_loaded(deep_scale=0.1), tiny_split(400))
    trainer.train(show_progress=False)
    return {**trainer.notes, "records": trainer.total, "held": len(trainer.buffer)}


def point(run_dir: str, prompt_tokens: int, **changes) -> dict:
    """Memory and time of a few updates once the buffer is full, of a wider model with more words."""
    model = tiny_pair(hidden_size=128, intermediate_size=256, vocab_size=2048, max_position_embeddings=1024)[
        1
    ]
    for layer in model.model.layers[2:]:  # so that drafts are often right
        layer.mlp.down_proj.weight.data *= 0.1
        layer.self_attn.o_proj.weight.data *= 0.1
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 2048) for _ in range(prompt_tokens)] for _ in range(256)]
    config = tiny_settings(run_dir=run_dir, num_prompts=10**6, max_new_tokens=32, draft_vocab=0, **changes)
    loaded = dataclasses.replace(tiny_loaded(), model=model)
    before = peak()
    trainer = DVITrainer(config, loaded, PromptSplit(PromptStream(prompts, 0), []))
    buffer, added = trainer.buffer, []
    buffer.add = lambda *given: added.append(given)
    trainer.judge(trainer.collect()[0])
    del buffer.add
    while len(buffer) < config.buffer_size:
        buffer.add(*added[0])
    buffer.num_fresh = buffer.accepted_since_update = 0
    start, fast_s = dataclasses.replace(trainer.counters), []
    while len(fast_s) <= STEPS:
        trainer.report = lambda line: fast_s.append(line["fast_s"])
        trainer.advance()
    done = trainer.counters
    return {
        "memory_mib": peak() - before,
        "update_ms": 1000 * float(np.median(np.diff(fast_s))),
        "answer_ms": 1000 * (done.rollout_s - start.rollout_s) / (done.prompts - start.prompts),
    }


def child(name: str, **how) -> dict:
    """What a function of this file returns, run in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            name,
            json.dumps({"run_dir": f"{folder}/run", **how}),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def slope(values) -> float:
    """Growth over a hundred updates, by linear regression."""
    return 100 * float(np.polyfit(range(len(values)), values, 1)[0])


def draw(points, save) -> None:
    """Memory above, times below, one column a setting."""
    rows = (["memory_mib"], ["update_ms", "answer_ms"])
    names = {
        "memory_mib": "memory",
        "update_ms": "fast update,\ndrafting\nincluded",
        "answer_ms": "answering\na prompt",
    }
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(
            2, len(AXES), figsize=(11, 5), sharex="col", sharey="row", layout="constrained"
        )
        for lines, line in zip(rows, axes, strict=True):
            for (setting, values), where in zip(AXES.items(), line, strict=True):
                for name, colour in zip(names, plots.PALETTE, strict=False):
                    if name in lines:
                        found = [points[f"{setting}={value}"][name] for value in values]
                        where.plot(values, found, "o-", color=colour)
                where.set(xscale="log")
                where.set_xticks(values, labels=map(str, values))
                where.minorticks_off()
            for name, drawn in zip(lines, where.lines, strict=True):
                end = (values[-1], drawn.get_ydata()[-1])
                where.annotate(
                    names[name], end, (8, 0), textcoords="offset points", color=drawn.get_color(), va="center"
                )
        axes[0][0].set(ylabel="memory of the run (MiB)", ylim=(0, None))
        axes[1][0].set(ylabel="milliseconds", yscale="log")
        axes[1][0].yaxis.set_major_formatter("{x:g}")
        for setting, where in zip(AXES, axes[1], strict=True):
            where.set_xlabel(setting)
        figure.suptitle("What a run takes, one setting changed at a time (a tiny model, one CPU thread)")
        figure.savefig(save, bbox_inches="tight")
        plt.close(figure)


@pytest.fixture(scope="module")
def soaked() -> dict:
    return child("soak", updates=UPDATES)


def test_a_long_run_grows_in_nothing(soaked):
    memory, handles, times = (soaked[name][WARM_UP:] for name in ("memory_mib", "handles", "step_ms"))
    quarter = len(times) // 4
    ratio = median(times[-quarter:]) / median(times[:quarter])
    figures = dict(
        updates=len(soaked["step_ms"]),
        warm_up=WARM_UP,
        memory_mib_first=memory[0],
        memory_mib_last=memory[-1],
        memory_mib_a_hundred_updates=slope(memory),
        handles=sorted(set(handles)),
        step_ms_median=median(times),
        step_ms_last_quarter_to_first=ratio,
        buffer_size=CAPACITY,
        records=soaked["records"],
        held=soaked["held"],
        checkpoints_at_most=max(soaked["checkpoints"]),
    )
    record("soak-cpu", soak=figures)
    assert figures["updates"] == UPDATES and slope(memory) < GROWTH and ratio < SLOWER, figures
    assert len(set(handles)) == 1 and soaked["held"] == CAPACITY < soaked["records"] / 5, figures
    assert KEPT <= figures["checkpoints_at_most"] <= KEPT + 1, figures  # and the best one


def test_memory_and_time_by_setting():
    """Where figures are asked for all points, else the usual one in small; a run takes little beside what it holds."""
    folder = os.environ.get("DVIRL_RESULTS")
    axes = AXES if folder else {"buffer_size": AXES["buffer_size"][:1]}
    points = {
        f"{name}={at}": child("point", **{**USUAL, name: at})
        for name, values in axes.items()
        for at in values
    }
    record("soak-cpu", usual=USUAL, points=points)
    if folder:
        draw(points, Path(folder).parent / "figures/memory-and-time-cpu.png")
    for at in axes["buffer_size"]:
        kept = at * 2 * 128 * 4 / MIB  # an exit state and the verifier's hidden state a record
        assert kept < points[f"buffer_size={at}"]["memory_mib"] < 300 + 5 * kept  # with Triton and Numba
    assert all(one["update_ms"] > 0 and one["answer_ms"] > 0 for one in points.values())


if __name__ == "__main__":
    time.perf_counter = time.process_time  # other work on the machine does not stretch it
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
