"""Every command that the README and the page on the command line name does what they say.

The commands are extracted from the pages' code, in blocks and in text. Run, with their own settings and with tiny ones
added for what they leave open: every `dvirl` line, on a random model of eight layers, in a folder where the pages' names
(RUN, FILE, runs/NAME) are real files; what `accelerate launch` starts, in two forked processes; the Python of the page.
Of `dvirl sweep` the dry run. Only parsed: `make` (by `make -n`; `make test` is what runs this), `papermill` (by its own
parser and the notebook's settings; test_notebooks.py runs notebooks), `pytest --nbval` (it collects), the flags of
`accelerate launch` (test_processes.py starts it) and `conda`. A command that no rule covers fails.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill.cli
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import random_prompts, tiny_pair, tiny_tokenizer
from test_drafters import exported
from test_processes import in_processes
from test_sgp import write_rows
from test_spec_bench import ASKED, write_questions

from dvirl import cli, config
from dvirl.evaluation import runner
from dvirl.experiments.notebook import DECLARED, INJECTED, notebook_config
from dvirl.models import drafters, loading
from dvirl.runs.checkpoint import newest
from dvirl.runs.errors import DvirlError
from dvirl.scale.corpus import answer, write_shard
from kangaroo.decoding.blocks import DecodeConfig
from kangaroo.decoding.costs import StepCosts
from kangaroo.kangaroo_model import KangarooModel

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "book/using.md", ROOT / "book/cheat-sheet.md"]
STARTS = (
    "make",
    "dvirl",
    "papermill",
    "accelerate",
    "pytest",
    "python",
    "conda",
    "pip",
    "torchrun",
    "jupyter",
)
BLOCK = re.compile(r"^```.*?\n(.*?)^```", re.M | re.DOTALL)


def code(text):
    """The lines of code blocks, without comments, and the code within sentences, on one line each."""
    lines = [
        line.removeprefix("$ ")
        for block in BLOCK.findall(text)
        for line in block.replace("\\\n", " ").split("\n")
    ]
    spans = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    return [" ".join(one.split()) for one in (*(re.sub(r"\s# .*", "", line) for line in lines), *spans)]


def commands(text):
    return [line for line in code(text) if line.split() and line.split()[0] in STARTS]


TEXT = "".join(page.read_text(encoding="utf-8") for page in PAGES)


def test_commands_are_found_wherever_they_stand():
    text = "Say `dvirl train\n--seed 1` or `x`:\n```sh\nmake  test   # all\n$ dvirl a \\\n  --b\nelse\n```\n`make`d {doc}`pip`\n"
    assert commands(text) == ["make test", "dvirl a --b", "dvirl train --seed 1", "make", "pip"]
    assert all(any(line.startswith(start) for line in commands(TEXT)) for start in STARTS[:5])


# Settings that make commands tiny, where a line does not have its own, and what they say at the end

TINY = "--threads 1 --device cpu --dtype float32"
MODEL = f"{TINY} --model_name model --lora_rank 2 --draft_vocab 0"
TRAIN = f"{MODEL} --run_dir OUT --num_prompts 8 --held_out 2 --rollout_batch 4 --max_new_tokens 8"
TUNE = f"{MODEL} --run_dir OUT --exit_layer 2 --records_path records.jsonl --max_steps 2"
ASK = "--questions FILE --answer_tokens 6"
STUDY = "num_prompts=4 held_out=2 max_new_tokens=6 rollout_batch=4 draft_vocab=0 lora_rank=2"
ADDED = {
    "train": (TRAIN, "acceptance rate: "),
    "sgp": (TUNE, "held-out loss_exit: "),
    "distill": (
        f"{MODEL} --run_dir OUT --responses_from shards --head_rank 4 --batch 8",
        "drafter: OUT/drafter",
    ),
    "experiment": (
        f"{TRAIN} {ASK} --methods plain,fixed,dvi --results OUT/results",
        "results: OUT/results/OUT.json",
    ),
    "sgp-experiment": (
        f"{TUNE} {ASK} --methods plain,fixed,dvi --results OUT/results",
        "results: OUT/results/OUT.json",
    ),
    "evaluate": (
        f"{TINY} {ASK} --methods plain,fixed --draft runs/NAME --run_dir OUT",
        "results: OUT/results.json",
    ),
    "sgp-eval": ("--threads 1", "2 of 2 responses equal those of the same verifier"),
    "trace": ("", "scored drafts accepted"),
    "check": ("--device cpu --dtype float32 --max_new_tokens 8", "2 of 2 answers are identical"),
    "agreement": ("--device cpu --max_new_tokens 8", "FILE"),
    "cost": (
        f"{TINY} --model_name model --exit_layers 2 --contexts 8 --draft_len 2 --draft_vocab 0",
        "the fastest is",
    ),
    "study": (
        f"--quick --seeds 0 --out OUT.json --set model_name=model dtype=float32 threads=1 {STUDY}",
        "written: OUT.json",
    ),
    "sweep": ("--dry_run", "-m dvirl.cli train"),
    "average-adapters": ("", "OUT\n"),
    "export": ("", "OUT\n"),
    "chat": (
        f"{TINY} --model_name model --draft RUN/drafter --run_dir OUT --learn true --max_new_tokens 8 "
        "--adaptive false --replay prompts.txt",
        "% of the time so far]",
    ),
}
ALONE = {
    "study": "configs/study-objectives.yaml --minutes 0",
    "average-adapters": "OUT client client",
    "export": "RUN/drafter OUT",
}
"""What a command that a sentence merely names needs besides."""
GO_ON = {"train": "--num_prompts 12 --accept_changes", "sgp": "--max_steps 3 --accept_changes"}
"""Instead, with --resume: the runs are done, and go on with more."""


def tiny_line(words, out):
    """The words of a `dvirl` line and those that make it tiny; no setting of its own is changed."""
    name, *own = words
    if name not in ADDED:
        pytest.fail(f"no rule for dvirl {name}")
    more = GO_ON[name] if "--resume" in own else ADDED[name][0]
    pairs = [f"--{pair}".split() for pair in more.split("--")[1:]]
    added = [word for pair in pairs if pair[0] not in own for word in pair]
    alone = [] if own else ALONE.get(name, "").split()
    return [word.replace("OUT", out) for word in (*words, *alone, *added)]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder in which the pages' names are real: a model, a run of each kind, questions, records and answers."""
    folder = tmp_path_factory.mktemp("room")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "shards").mkdir()
    tiny_pair(num_hidden_layers=8)[0].save_pretrained(folder / "model", safe_serialization=True)
    tiny_tokenizer().save_pretrained(folder / "model")
    for name in ("FILE", "question.jsonl"):
        write_questions(folder / name, ASKED[:2])
    (folder / "prompts.txt").write_text("hello\nwhat is it?\n")
    write_rows(
        folder / "records.jsonl", [{"instruction": f"Say {n}", "response": "x" * n} for n in range(1, 13)]
    )
    with contextlib.chdir(folder):
        loaded = loading.load("model", dtype="float32", device="cpu")
        write_shard(Path("shards/shard-00000.safetensors"), answer(loaded, random_prompts(16), 12, 8))
        for line, out in (("train", "runs/NAME"), ("sgp", "RUN"), ("evaluate", "evaluated")):
            assert cli.main(tiny_line([line], out)) == 0
        Path("evaluated/trace.jsonl").rename("RUN/trace.jsonl")
        Path("client").symlink_to(newest("runs/NAME"))
        for name in ("MODEL", "FOLDER"):  # a model, and another one that drafts
            Path(name).symlink_to("model")
        exported(Path("RUN/drafter"), loaded)
    return folder


def said(*words):
    """What a `dvirl` command prints, if all is well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            ended = cli.main(words)
        except SystemExit as end:
            ended = end.code
    assert ended == 0, words
    return out.getvalue()


@functools.cache
def flags_of(command):
    return set(re.findall(r"(?<![\w-])--\w[\w-]*", said(command, "--help")))


def flags_in(words):
    return {word.split("=")[0] for word in words if word.startswith("--")}


# Rules: each gets the words of a line after its first, and a name in the room for what comes out


def check_make(words, out):
    """`make help` lists the target, and `make` can say its commands."""
    listed = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    assert words and set(words) <= set(listed)
    dry = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0 and dry.stdout.strip(), dry.stderr


def check_dvirl(words, out):
    """It runs, with flags that its help explains."""
    if words == ["--help"]:
        assert re.findall(r"^  (\S+)  ", said("--help"), re.M) == [*cli.COMMANDS]
    elif words == ["COMMAND", "--help"]:
        assert all(said(name, "--help").startswith(f"usage: dvirl {name} [-h]") for name in cli.COMMANDS)
    else:
        line = tiny_line(words, out)
        assert flags_in(words) <= flags_of(words[0])
        assert ADDED[words[0]][1].replace("OUT", out) in said(*line)


def check_papermill(words, out):
    """The notebook is there, and takes these parameters."""
    given = papermill.cli.papermill.make_context("papermill", words).params
    values = {name: papermill.cli._resolve_type(value) for name, value in given["parameters"]}
    notebook = nbformat.read(ROOT / given["notebook_path"], as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    kind = (
        re.search(r"notebook_config\(globals\(\)(?:, (?:kind=)?(\w+Config))?", "\n".join(cells))[1]
        or "DVIConfig"
    )
    declared = next(cell for cell in cells if cell.startswith(DECLARED))
    injected = "\n".join([INJECTED, *(f"{name} = {value!r}" for name, value in values.items())])
    found = notebook_config(
        {"In": [declared, injected], **values}, getattr(config, kind, None) or getattr(runner, kind)
    )
    assert values and all(getattr(found, name, value) == value for name, value in values.items())


def check_accelerate(words, out):
    """The launcher knows its flags, and what it starts works in as many processes."""
    asked = launch_command_parser().parse_args(words[1:])
    module = asked.training_script
    front = [
        name for name, (at, _) in cli.COMMANDS.items() if f"dvirl.{at}" == module
    ]  # `dvirl.cli` names it itself
    line = [*front, *asked.training_script_args]
    assert words[0] == "launch" and asked.module and flags_in(line) <= flags_of(line[0])
    argv = tiny_line(line, out)[len(front) :]

    def work(rank):
        sys.argv = [module, *argv]
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    assert in_processes(asked.num_processes, work) == [0] * asked.num_processes
    assert (Path(out) / {"train": "metrics.jsonl", "evaluate": "results.json"}[line[0]]).exists()


def check_torchrun(words, out):
    """It starts what the other launcher starts."""
    assert words[0] == "--nproc_per_node"
    check_accelerate(["launch", "--num_processes", *words[1:]], out)


def check_pytest(words, out):
    """It finds the cells of every notebook."""
    assert [word for word in words if word[0] != "-" and not (ROOT / word).exists()] == []
    command = [sys.executable, "-m", "pytest", *words, "--collect-only", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert all(path.name in found.stdout for path in (ROOT / "notebooks").glob("*.ipynb"))


def check_conda(words, out):
    """The file of the environment is there; test_project.py says what must be in it."""
    assert (
        words[:3] == ["env", "create", "-f"] and yaml.safe_load((ROOT / words[3]).read_text())["dependencies"]
    )


RULES = {"make": check_make, "dvirl": check_dvirl, "papermill": check_papermill, "accelerate": check_accelerate,
         "torchrun": check_torchrun, "pytest": check_pytest, "conda": check_conda}  # fmt: skip


def check(line, out):
    start, *words = shlex.split(line)
    if start not in RULES:
        pytest.fail(f"no rule for {line}")
    RULES[start](words, out)


LINES = list(dict.fromkeys(commands(TEXT)))


@pytest.mark.parametrize("line", LINES)
def test_every_command_works(line, room, monkeypatch):
    monkeypatch.chdir(room)
    check(line, f"out-{LINES.index(line)}")


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("make lap", AssertionError, "lap"),
        ("make tests", AssertionError, "tests"),
        ("python train.py", pytest.fail.Exception, "no rule for python train.py"),
        ("dvirl dance", pytest.fail.Exception, "no rule for dvirl dance"),
        ("dvirl train --exit_layr 6", AssertionError, "--exit_layr"),
        ("dvirl train --exit_lay 6", AssertionError, "--exit_lay"),
        ("dvirl train --exit_layer 60", AssertionError, "--exit_layer"),
        ("dvirl train --config configs/none.yaml", AssertionError, "none.yaml"),
        ("dvirl sweep configs/none.yaml", AssertionError, "none.yaml"),
        ("dvirl study configs/study-none.yaml", AssertionError, "none.yaml"),
        ("papermill notebooks/00_none.ipynb out.ipynb -p seed 1", FileNotFoundError, "00_none"),
        (
            "papermill notebooks/03_train.ipynb out.ipynb -p exit_layr 4",
            DvirlError,
            "unknown notebook parameter exit_layr",
        ),
        (
            "papermill notebooks/06_sgp.ipynb out.ipynb -p fast_batch 4",
            DvirlError,
            "unknown notebook parameter fast_batch",
        ),
        ("papermill notebooks/03_train.ipynb out.ipynb -p schedule none", DvirlError, "schedule is 'none'"),
        ("accelerate launch --num_process 2 -n dvirl.train_dvi", SystemExit, "2"),
        (
            "accelerate launch --num_processes 2 -m dvirl.train_dvi --rollout_size 64",
            AssertionError,
            "--rollout_size",
        ),
        ("pytest --nbval --nbval-sanitize-with nbval.cfg notebook", AssertionError, "['notebook']"),
        ("pytest --nbval-lax --nbval-sanitize-with none.cfg notebooks", AssertionError, "['none.cfg']"),
        ("conda env create -f none.yml", FileNotFoundError, "none.yml"),
    ],
)
def test_a_wrong_command_is_caught(line, error, message, room, monkeypatch):
    monkeypatch.chdir(room)
    with pytest.raises(error, match=re.escape(message)):
        check(line, "wrong")


def test_every_flag_that_a_sentence_names_is_one_of_a_command():
    named = {line.split()[0] for line in code(TEXT) if line.startswith("--")}
    known = set().union(*map(flags_of, cli.COMMANDS))
    assert len(named) > 10 and named <= known


@pytest.mark.no_cover
@pytest.mark.real
def test_the_python_of_the_page_answers_as_plain_decoding_does(real, monkeypatch, capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.DOTALL)
    monkeypatch.setattr(
        drafters, "load_drafter", functools.partial(drafters.load_drafter, dtype="float32", device="cpu")
    )
    # Measured on a busy machine, drafts may cost more than they gain, and then none are made.
    steps = StepCosts(verify=tuple(30 + n for n in range(9)), draft=5.0)
    monkeypatch.setattr(KangarooModel, "measure_costs", lambda *_, **__: steps)
    names = {}
    exec(compile(block, "using.md", "exec"), names)
    plain = KangarooModel(real.model, EARLY_STOP_LAYER=1)
    alone = plain.generate(names["prompt"], 64, DecodeConfig(draft_len=0), real.eos_ids)
    assert capsys.readouterr().out == f"{real.tokenizer.decode(alone.tokens)}\n"
    assert len(alone.tokens) > 10 and len(names["answer"].blocks) < len(alone.tokens)
