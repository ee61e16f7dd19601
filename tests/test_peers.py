"""`make bench-peers`: turns, pipes and figures, without the libraries that it installs."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from dvirl.runs.errors import DvirlError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests_engines"
WORKER = """
import os
import sys
sys.path.insert(0, {folder!r})
from peer_process import serve

def broken():
    raise ImportError("no such thing\\nand more")

def double(prompt, limit):
    print("chatter")
    return [2 * token for token in prompt][:limit], 3

def picky(prompt, limit):
    raise ValueError("not this prompt")

def dying(prompt, limit):
    print("out of memory", flush=True)
    os._exit(1)

serve({{"double": lambda: double, "broken": broken, "picky": lambda: picky, "dying": lambda: dying}})
"""


@pytest.fixture
def modules(monkeypatch):
    """The scripts' modules, found as the scripts find one another."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import peer_process
    import peers
    import setting_up

    return Namespace(peers=peers, process=peer_process, setting_up=setting_up)


def answer(tokens, seconds, passes):
    return {"tokens": tokens, "seconds": seconds, "passes": passes}


PLAIN = [answer([5, 6, 7, 2], [1.0, 3.0], [4, 4]), answer([8, 9], [1.0, 1.0], [2, 2])]


def test_figures_are_those_of_the_seconds(modules):
    faster = [answer([5, 6, 7, 2], [0.25, 9.0], [2, 2]), answer([8, 1], [0.5, 0.5], [2, 2])]
    row = modules.peers.figures(faster, PLAIN, [2])
    assert row["tok_per_s"] == pytest.approx(
        6 / (0.25 + 0.5)
    )  # all tokens, in the faster round of each question
    assert row["over_plain"] == pytest.approx((1.0 + 1.0) / (0.25 + 0.5))
    assert row["typical"] == pytest.approx((4.0 + 2.0) / 2)
    assert row["mat"] == pytest.approx((3 + 1) / (1 + 1))  # without the pass over the prompt and its token
    assert (row["answers"], row["equal"], row["parted"]) == (2, 1, {1: 1})


@pytest.mark.parametrize(
    ("theirs", "place"),
    [([5, 6, 7, 2], None), ([5, 6, 7], None), ([5, 6], 2), ([5, 0, 7, 2], 1), ([5, 6, 7, 8], 3), ([], 0)],
)
def test_answers_part_where_their_common_beginning_ends(modules, theirs, place):
    assert modules.peers.parting([5, 6, 7, 2], theirs, [2]) == place
    assert modules.peers.parting(theirs, [5, 6, 7, 2], [2]) == place


def test_ours_is_compared_with_the_fastest_peer(modules):
    speeds = {
        ("dvirl", "plain"): 90.0,
        ("dvirl", "together"): 60.0,
        ("dvirl", "together, second drafter"): 30.0,
        ("slow", "lookup"): 10.0,
        ("fast", "lookup"): 20.0,
        ("fast", "assisted by our draft"): 40.0,
    }
    rows = [{"library": way[0], "way": way[1], "tok_per_s": speed} for way, speed in speeds.items()]
    found = modules.peers.over_best(rows)
    assert found["any"] == {
        "library": "fast",
        "way": "assisted by our draft",
        "ours together": 1.5,
        "ours together, second drafter": 0.75,
    }
    assert found["none of ours"] == {
        "library": "fast",
        "way": "lookup",
        "ours together": 3.0,
        "ours together, second drafter": 1.5,
    }


def test_every_way_answers_in_turn_and_one_that_fails_leaves(modules):
    asked = []

    class Fake:
        def __init__(self, library, ways):
            self.library = library
            self.ready = {"ways": ways}

        def ask(self, way, prompt, limit):
            asked.append((self.library, way, prompt[0]))
            if way == "fails later" and len(asked) > 3:
                return {"failed": "it fell over"}
            return {"tokens": prompt[:limit], "seconds": float(len(asked)), "passes": 1}

    peers = {"a": Fake("a", ["one", "two"]), "b": Fake("b", ["fails later"]), "c": Namespace(ready={})}
    answers, failed = modules.peers.take_turns(peers, [[7, 8], [9]], Namespace(rounds=2, new_tokens=1))
    assert failed == {("b", "fails later"): "it fell over"}
    assert list(answers) == [("a", "one"), ("a", "two")]
    assert [given["tokens"] for given in answers["a", "one"]] == [[7], [9]]
    assert all(len(given["seconds"]) == 2 == len(given["passes"]) for given in answers["a", "two"])
    assert asked[3:] == [
        ("a", "one", 7),
        ("a", "two", 7),
        ("b", "fails later", 7),
        ("a", "two", 9),  # the next question begins with the next way
        ("a", "one", 9),
        ("a", "two", 7),  # the second round goes backwards
        ("a", "one", 7),
        ("a", "two", 9),
        ("a", "one", 9),
    ]


def test_a_peer_answers_through_its_pipe(modules, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(FOLDER)))
    peer = modules.process.Peer([sys.executable, script], tmp_path / "log", None)
    assert peer.ready == {
        "ways": ["double", "picky", "dying"],
        "missing": {"broken": "ImportError: no such thing"},
    }
    reply = peer.ask(way="double", prompt=[1, 2, 3], limit=2)
    assert reply.pop("seconds") > 0
    assert reply == {"tokens": [2, 4], "passes": 3}
    assert peer.ask(way="picky", prompt=[1], limit=1) == {"failed": "ValueError: not this prompt"}
    assert peer.ask(way="double", prompt=[4], limit=2)["tokens"] == [8]  # it lives on
    for _ in range(2):
        assert peer.ask(way="dying", prompt=[1], limit=1) == {"failed": "out of memory"}
    peer.close()
    assert "chatter" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("setting", ["--threads=0", "--rounds=0", "--new_tokens=1", "--num_questions=-1"])
def test_a_setting_that_is_too_small_is_refused(modules, setting):
    with pytest.raises(DvirlError, match=rf"^{setting.split('=')[0]} is \S+; expected at least \d$"):
        modules.peers.parse_args([setting])


def test_without_a_registry_the_reason_is_one_sentence(modules, tmp_path, monkeypatch):
    printed = Namespace(returncode=1, stderr="many lines\nERROR: No matching distribution found for torch\n")
    monkeypatch.setattr(modules.setting_up.subprocess, "run", lambda *_, **__: printed)
    (tmp_path / "installed.txt").write_text("here==1")
    with pytest.raises(DvirlError) as caught:
        modules.setting_up.installed(tmp_path, "here==1", "torch==2")
    assert str(caught.value) == (
        "could not install torch==2 from the package registry: ERROR: No matching distribution found for torch"
    )
    assert (tmp_path / "installed.txt").read_text() == "here==1"
    assert modules.setting_up.installed(tmp_path, "here==1") == tmp_path / "bin/python"


def test_the_recorded_figures_follow_from_the_recorded_seconds(modules):
    recorded = json.loads((ROOT / "book/results/peers-cpu.json").read_text())
    rows = recorded["figures"]
    for row in rows:
        given = recorded["answers"][f"{row['library']}, {row['way']}"]
        pairs = zip(given["tokens"], given["seconds"], strict=True)
        answers = [answer([0] * tokens, seconds, []) for tokens, seconds in pairs]
        assert len(answers) == row["answers"] == len(recorded["questions"])
        again = modules.peers.speed(answers)
        assert again == pytest.approx(row["tok_per_s"], rel=1e-3)
    assert recorded["over_best"] == modules.peers.over_best(rows)
    assert set(recorded["packages"]) == {*modules.peers.BASE, *modules.peers.ADDED}
