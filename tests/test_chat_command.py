"""`dvirl chat`: what is asked, shown and stored, in a terminal and without one."""

from __future__ import annotations

import builtins
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_drafters import exported
from test_models import save_tiny

from dvirl import chat, cli
from dvirl.models import loading
from dvirl.models.drafters import open_draft
from dvirl.runs.errors import DvirlError
from kangaroo.decoding.blocks import DecodeConfig, DraftBlock, Verification

FIGURES = re.compile(
    r"^\[[\d.]+ tokens/s, ([\d.]+|nan) tokens a block(; [a-z ]+, \d+ % of the time so far)?\]$", re.M
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Flags that name a tiny model and its drafter."""
    folder = tmp_path_factory.mktemp("chat")
    model = save_tiny(folder / "model")
    exported(folder / "draft", loading.load(str(model), dtype="float32", device="cpu"), draft_vocab=0)
    return ["--model_name", str(model), "--draft", str(folder / "draft"), "--dtype", "float32", "--device", "cpu",
            "--max_new_tokens", "12", "--threads", "1", "--adaptive", "false", "--fast_batch", "1"]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DVIRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def type_in(monkeypatch, lines, terminal=True):
    """Let these lines be typed; what an exception stands for happens in place of a line."""
    asked = []
    left = iter(lines)

    def typed(prompt=""):
        asked.append(prompt)
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: terminal)
    return asked


def test_a_conversation(parts, tmp_path, monkeypatch, capsys):
    asked = type_in(
        monkeypatch, ["hello", "", "/help", KeyboardInterrupt(), "again", "/reset", "hello", "/exit", "never"]
    )
    folder = tmp_path / "run"
    assert cli.main(["chat", *parts, "--learn", "true", "--budget", "0.9", "--run_dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert asked == ["> "] * 8 and len(FIGURES.findall(out)) == 3 and out.count(chat.HELP) == 2
    assert "learned, " in out
    lines = [json.loads(line) for line in (folder / "live.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines if line["event"] == "answer"] == [1, 2, 3]
    assert not any(b"hello" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    # What was learned is a run like any other, and the next conversation goes on from it.
    draft = open_draft(str(folder), "float32", "cpu")
    assert draft.model.generate([5, 6, 7], 8, DecodeConfig(2)).tokens
    type_in(monkeypatch, ["hello"])
    assert cli.main(["chat", *parts, "--learn", "true", "--run_dir", str(folder)]) == 0
    assert json.loads((folder / "live.jsonl").read_text().splitlines()[-1])["answer"] == 4


def test_turns_follow_one_another(parts, monkeypatch):
    seen = []
    monkeypatch.setattr(chat.Chat, "answer", lambda self, turns, system="": seen.append(list(turns)) or "yes")
    type_in(monkeypatch, ["a", "b", "/reset", "c"])
    cli.main(["chat", *parts, "--learn", "false"])
    assert seen == [["a"], ["a", "yes", "b"], ["c"]]


@pytest.mark.parametrize(("reply", "learns"), [("", True), ("yes", True), ("n", False), ("what?", False)])
def test_it_asks_once_whether_to_learn(parts, cache, monkeypatch, reply, learns):
    asked = type_in(monkeypatch, [reply])
    assert cli.main(["chat", *parts]) == 0
    assert len(asked) == 2 and "May the draft learn" in asked[0] and str(cache / "live" / "draft") in asked[0]
    assert json.loads((cache / "chat.json").read_text()) == {"learn": learns}
    asked = type_in(monkeypatch, ["hi"])
    assert cli.main(["chat", *parts]) == 0
    assert asked == ["> ", "> "] and (cache / "live" / "draft").exists() == learns


def test_the_end_of_input_is_no_reply(parts, cache, monkeypatch):
    type_in(monkeypatch, [EOFError(), "hello"])
    assert cli.main(["chat", *parts]) == 0
    assert not (cache / "chat.json").exists() and not (cache / "live").exists()


def test_a_reply_that_is_no_reply_is_one_sentence(parts, cache, monkeypatch, capsys):
    type_in(monkeypatch, ["hello"])
    cache.mkdir()
    (cache / "chat.json").write_text('{"learn": "no"}')
    assert cli.main(["chat", *parts]) == 2
    assert "chat.json: learn is 'no'; expected true or false" in capsys.readouterr().err


def test_the_folder_of_a_session_bears_the_drafters_name(parts, cache, monkeypatch):
    type_in(monkeypatch, ["hello"])
    monkeypatch.chdir(parts[parts.index("--draft") + 1])
    here = [*parts[:2], "--draft", ".", *parts[4:]]
    assert cli.main(["chat", *here, "--learn", "true"]) == 0
    assert [path.name for path in (cache / "live").iterdir()] == ["draft"]


def test_logits_that_are_not_finite_are_one_sentence(parts, tmp_path, monkeypatch, capsys):
    def overflow(*_, **__):
        raise ValueError("the verifier's logits at position 24 are not finite")
        yield

    monkeypatch.setattr("kangaroo.kangaroo_model.KangarooModel.decode_blocks", overflow)
    (tmp_path / "prompts.txt").write_text("hello\n")
    replay = ["--replay", str(tmp_path / "prompts.txt"), "--learn", "false"]
    assert cli.main(["chat", *parts, *replay]) == 2
    assert "at position 24 are not finite" in capsys.readouterr().err
    type_in(monkeypatch, ["hello", "/exit"])
    assert cli.main(["chat", *parts, "--learn", "false"]) == 0


def test_a_full_disk_is_said_and_the_answer_stays(parts, tmp_path, monkeypatch, capsys):
    def no_space(_):
        raise DvirlError("no space left")

    type_in(monkeypatch, ["hello"])
    monkeypatch.setattr("dvirl.live.LiveSession.learn", no_space)
    assert cli.main(["chat", *parts, "--learn", "true", "--run_dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "dvirl: no space left" in said.err and FIGURES.search(said.out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_that_is_closed_keeps_what_was_learned(parts, tmp_path, monkeypatch, number):
    def closed(prompt):
        if (tmp_path / "run/live.jsonl").exists() and "update" in (tmp_path / "run/live.jsonl").read_text():
            os.kill(os.getpid(), number)
        return "hello"

    type_in(monkeypatch, [])
    monkeypatch.setattr(builtins, "input", closed)
    flags = ["--learn", "true", "--budget", "0.9", "--run_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        cli.main(["chat", *parts, *flags])
    assert end.value.code == 128 + number and list(tmp_path.glob("run/checkpoints/step-*"))


def test_bytes_that_are_no_text_are_read_all_the_same(parts, tmp_path):
    command = [sys.executable, "-m", "dvirl.cli", "chat", *parts, "--learn", "false"]
    for encoding in ("utf-8:strict", "ascii:strict"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        run = subprocess.run(command, input=b"hello \xff\n", env=environment, capture_output=True)
        assert run.returncode == 0 and not run.stderr.count(b"Traceback"), run.stderr


def test_without_a_terminal_nothing_is_asked_or_learned(parts, cache, monkeypatch, capsys):
    asked = type_in(monkeypatch, ["hi"], terminal=False)
    assert cli.main(["chat", *parts]) == 0
    assert asked == ["> ", "> "] and not cache.exists() and "of the time" not in capsys.readouterr().out


def test_a_file_is_replayed(parts, tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    file.write_text('a plain line\n\n{"turns": ["hi", "hello", "what is it?"]}\n{"prompt": "last"}\n')
    run = ["chat", *parts, "--replay", str(file), "--learn", "true", "--run_dir", str(tmp_path / "run")]
    assert cli.main(run) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^> (.*)$", out, re.M) == ["a plain line", "what is it?", "last"]
    assert len(FIGURES.findall(out)) == 3


def test_ctrl_c_ends_an_answer_and_not_the_conversation(parts, tmp_path, monkeypatch, capsys):
    class Interrupted(chat.LiveSession):
        def stream(self, prompt):
            for block in super().stream(prompt):
                os.kill(os.getpid(), signal.SIGINT)
                yield block

    monkeypatch.setattr(chat, "LiveSession", Interrupted)
    type_in(monkeypatch, ["hello", "again"])
    folder = tmp_path / "run"
    assert cli.main(["chat", *parts, "--learn", "true", "--run_dir", str(folder)]) == 0
    lines = [json.loads(line) for line in (folder / "live.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines if line["event"] == "answer"] == [1, 1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_drafts_are_coloured_by_source_and_verdict(parts, capsys):
    session = chat.open_session(chat.parse_args([*parts, "--learn", "false"]))
    talk = chat.Chat(session, chat.ChatConfig(show_blocks=True))
    tokens = session.loaded.tokenizer.encode("abcXY", add_special_tokens=False)
    torch = pytest.importorskip("torch")
    draft = DraftBlock(torch.tensor(tokens[:4]), torch.zeros(4), torch.zeros(2, 32))
    block = Verification(7, tuple([*tokens[:3], tokens[4]]), 4, 3, draft)
    colours = [talk._colour(block, place) for place in range(4)]
    assert colours == [chat.LEARNED, chat.LEARNED, chat.LOOKED_UP, f"{chat.REJECTED}X{chat.END}"]
    with session:
        talk.answer(["hi"])
    assert chat.END in capsys.readouterr().out


def test_a_turn_that_is_too_long_is_dropped_with_one_sentence(parts, tmp_path, capsys):
    with chat.open_session(chat.parse_args([*parts, "--learn", "false"])) as session:
        assert chat.Chat(session, chat.ChatConfig())._turn(["a", "b", "z" * 400]) == ["a", "b"]
    assert "expected at most the model's context" in capsys.readouterr().err
    (tmp_path / "log.txt").write_text("hello\n" + "z" * 400)
    assert cli.main(["chat", *parts, "--replay", str(tmp_path / "log.txt")]) == 2
    captured = capsys.readouterr()
    assert "log.txt:2: the prompt has" in captured.err and "the model's context" in captured.err
    assert len(captured.err.strip().splitlines()) == 1 and not captured.out  # not even the first is answered


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts there; expected one a line"),
        ("hello\n{broken\n", "log.txt:2: not valid JSON"),
        ('{"turns": ["a", "b"]}\n', "log.txt:1: 'turns' has 2 entries"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, content, message):
    file = tmp_path / "log.txt"
    file.write_text(content)
    with pytest.raises(DvirlError, match=re.escape(message)):
        chat.read_replay(str(file))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learn", "maybe"], "learn is 'maybe'; expected one of ask, true, false"),
        (["--draft", "nowhere", "--learn", "false"], "no drafter 'nowhere'"),
        (["--replay", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--budget", "2"], "budget is 2.0"),
    ],
)
def test_bad_flags_are_one_sentence(parts, flags, message, capsys):
    assert cli.main(["chat", *parts, *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.strip().splitlines()) == 1


def test_help_says_how_it_is_used(capsys):
    with pytest.raises(SystemExit):
        cli.main(["chat", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "/reset begins a new conversation" in out and "--replay" in out and "smollm2-135m-k2" in out


@pytest.mark.parametrize(
    ("learn", "budget", "remember"), [("ask", 0, 0), ("false", 0, 0), ("true", 0.1, 50_000)]
)
def test_on_a_gpu_a_session_learns_and_remembers_only_if_that_is_asked_for(
    parts, learn, budget, remember, monkeypatch, capsys
):
    """There learning and remembering take more time than they save."""
    opened = []
    loaded = SimpleNamespace(model=SimpleNamespace(can_be_captured=True))
    monkeypatch.setattr(chat, "load_for", lambda config: loaded)
    monkeypatch.setattr(chat, "LiveSession", lambda *arguments: opened.append(arguments))
    assert type_in(monkeypatch, []) == []
    chat.open_session(chat.parse_args([*parts, "--learn", learn]))
    (config,) = [arguments[2] for arguments in opened]
    assert (config.budget, config.remember) == (budget, remember)
    assert (chat.ON_A_GPU in capsys.readouterr().out) == (learn != "true")
