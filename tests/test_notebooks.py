"""Notebooks under papermill: other parameters work, unknown and bad ones stop them with our message.

The real model answers in them at their defaults (`make check-notebooks`) and here where the shipped drafter is asked for;
other parameters are tried on a tiny model, which takes a tenth of the time.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import forked
import nbformat
import papermill
import pytest
from jupyter_client.provisioning import local_provisioner
from test_models import save_tiny

from dvirl import config as training
from dvirl import live
from dvirl.evaluation import runner
from dvirl.experiments import execute as run_notebook
from dvirl.experiments.listing import show_source
from dvirl.experiments.notebook import (
    DECLARED,
    INJECTED,
    assigned_names,
    claims,
    fingerprint,
    notebook_config,
)
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import read_metrics

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
QUICK = dict(
    num_prompts=8,
    rollout_batch=8,
    max_new_tokens=16,
    timed=2,
    judged=4,
    trap_prompts=8,
    held_out=4,
    threads=1,
    fast_batch=1,
)


def execute(tmp_path, notebook="03_train", **parameters):
    """Run a notebook, in a kernel that has imported torch already; what it printed."""
    path, out = NOTEBOOKS / f"{notebook}.ipynb", tmp_path / "out.ipynb"
    how = dict(kernel_name="python3", progress_bar=False, cwd=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_provisioner, "launch_kernel", forked.launch_kernel)
        papermill.execute_notebook(path, out, parameters, **how)
    outputs = [output for cell in json.loads(out.read_text())["cells"] for output in cell.get("outputs", [])]
    return "".join(line for output in outputs for line in output.get("text", []))


def two_questions(tmp_path):
    """A file of two short questions; its path."""
    path = tmp_path / "q.jsonl"
    rows = [
        dict(question_id=at, category=kind, turns=["Name a few rivers."])
        for at, kind in enumerate(("qa", "rag"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings_of(kind):
    """The module that has a notebook's class of settings."""
    return next(module for module in (training, runner, live) if hasattr(module, kind))


def code_cells(notebook):
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize(
    ("edited", "injected", "asserted"),
    [("", "", True),
     ("", "run_dir = 'here'\nthreads = 1", True),
     ("run_dir = 'here'", "", True),
     ("", "exit_layer = 6", True),
     ("", "exit_layer = 4", False),
     ("", "rollout_batch = 8", False),
     ("exit_layer = 4", "", False),
     ("exit_layer = 4", "exit_layer = 6", True)],
)  # fmt: skip
def test_claims_are_asserted_at_the_defaults_and_only_there(edited, injected, asserted):
    space, defaults = {"In": [""]}, fingerprint(dict(exit_layer=6, dtype="auto"))
    declared = f"{DECLARED} (papermill)\nexit_layer = 6\nrun_dir = ''\ndtype = 'auto'\n{edited}"
    for cell in (declared, f"{INJECTED}\n{injected}" if injected else "", "import this_is_no_parameter"):
        space["In"].append(cell)
        exec(cell if cell.startswith(INJECTED) else "", space)
    claim = claims(space, defaults)
    assert claim(True, "") is True
    if asserted:
        with pytest.raises(AssertionError, match="acceptance rate 0.062 is under 0.28"):
            claim(False, "acceptance rate 0.062 is under 0.28")
    else:
        assert claim(False, "acceptance rate 0.062 is under 0.28") is False


def test_nbval_which_keeps_no_cells_asserts_claims():
    with pytest.raises(AssertionError):
        claims({"In": [""], "exit_layer": 6}, "12345678")(False, "")


ALL = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]


@pytest.mark.parametrize("notebook", ALL)
def test_what_a_notebook_imports_is_there(notebook):
    lines = [line for cell in code_cells(notebook) for line in cell.splitlines()]
    exec("\n".join(line for line in lines if re.match(r"(from|import) ", line)), {})


WIDEST = 84
"""Columns of code that fit beside both side bars of the book's pages on a screen of 1280 pixels."""


@pytest.mark.parametrize("notebook", ALL)
def test_code_fits_on_its_page(notebook):
    lines = [line for cell in code_cells(notebook) for line in cell.splitlines()]
    assert [line for line in lines if len(line) > WIDEST] == []


@pytest.mark.parametrize("notebook", ALL)
def test_imports_are_hidden(notebook):
    for cell in json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]:
        lines = "".join(cell["source"]).splitlines()
        if cell["cell_type"] == "code" and lines[0].startswith(("import ", "from ")):
            assert "hide-input" in cell["metadata"]["tags"], lines[0]


@pytest.mark.parametrize("notebook", ALL)
def test_every_notebook_asserts_its_claims_at_its_own_defaults(notebook):
    cells = code_cells(notebook)
    space = {"In": cells[:1]}
    exec(cells[0], space)
    (defaults,) = re.findall(r'claim = claims\(globals\(\), "(\w+)"\)', "\n".join(cells))
    parameters = {name: space[name] for name in assigned_names(cells[0])}
    assert defaults == fingerprint(parameters), (
        "the parameters have changed, so their claims are to be looked at again"
    )
    with pytest.raises(AssertionError):
        claims(space, defaults)(False, "")


@pytest.mark.parametrize("notebook", ALL)
def test_what_a_notebook_asks_to_try_can_be_tried(notebook):
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    (exercise,) = (text for text in texts if text.startswith("## Try it"))
    answers = texts[texts.index(exercise) + 1]
    code = code_cells(notebook)
    kind = (
        re.search(r"notebook_config\(globals\(\)(?:, (?:kind=)?(\w+Config))?", "\n".join(code))[1]
        or "DVIConfig"
    )
    declared = {}
    exec(code[0], declared)
    changes = re.findall(r"^\d\. `(\w+ = [^`]+)`", exercise, re.M)
    for change in changes:
        changed = {}
        exec(change, changed)
        injected = f"{INJECTED}\n{change}"
        space = {**declared, **changed, "In": [code[0], injected]}
        config = notebook_config(space, getattr(settings_of(kind), kind), run_dir="run")
        (name,) = assigned_names(change)
        assert declared.get(name, getattr(type(config), name, None)) != changed[name], (
            f"{change} changes nothing"
        )
    assert len(changes) == 3
    assert answers.startswith("<details>\n<summary>") and answers.endswith("</details>")
    assert re.findall(r"^(\d)\. ", answers, re.M) == ["1", "2", "3"]


@pytest.mark.parametrize("injected", ["# Parameters\nrun_dir = 'run'", "# Parameters\nnum_prompts = 16"])
@pytest.mark.parametrize(
    ("rate", "times", "message"),
    [(0.062, 1.2, "acceptance rate 0.062 is under"), (0.6, 0.97, "drafting is 0.97 times as fast as plain")],
)
def test_a_draft_that_does_not_pay_fails_the_default_run_of_03_alone(injected, rate, times, message):
    cells = code_cells("03_train")
    (asserting,) = (
        line for cell in cells for line in cell.splitlines() if line.startswith("claim = claims(")
    )
    (judging,) = (cell for cell in cells if "times as fast as plain decoding" in cell)
    space = {"In": [cells[0], injected], "claims": claims, "before": 0.02, "trained": rate, "times": times}
    for cell in (*space["In"], asserting):
        exec(cell, space)
    if "run_dir" in injected:
        with pytest.raises(AssertionError, match=message):
            exec(judging, space)
    else:
        exec(judging, space)


def shown_here(batch, rate=1):
    """Not for readers."""
    # For readers.
    return batch * rate


class Shown:
    def two(self):
        """Several

        lines.
        """
        return 2

    def raw(self):
        r"""Of a \n."""
        return 3

    def bare(self):
        return 1


def test_the_source_that_is_shown_is_the_one_that_runs():
    blocks = [
        "def shown_here(batch, rate=1):\n    # For readers.\n    return batch * rate",
        "def two(self):\n    return 2",
        "def raw(self):\n    return 3",
        "def bare(self):\n    return 1",
    ]
    joined = "\n\n".join(blocks)
    assert show_source(shown_here, Shown.two, Shown.raw, Shown.bare).data == f"```python\n{joined}\n```"


@pytest.mark.filterwarnings("ignore")  # jupyter's own
def test_a_notebook_runs_with_its_progress_shown_from_inside_and_a_summary(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        "import sys, warnings",
        "sys.stderr.write('a bar of its own')",
        "print('said in the notebook')",
        "open(f'{run_dir}/summary.txt', 'w').write('learned something\\n')",
        # What the kernel says if it is told to stop while it still leaves its last cell.
        "get_ipython().kernel.log.error('KeyboardInterrupt caught in kernel.')",
    ]
    language = {"language_info": {"name": "python"}}
    cells = [nbformat.v4.new_code_cell("run_dir = ''", metadata={"tags": ["parameters"]})]
    cells.append(nbformat.v4.new_code_cell("\n".join(lines)))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=language), "a.ipynb")
    run_notebook.main(["a.ipynb", "b.ipynb", f"run_dir={tmp_path}"])
    out, err = capfd.readouterr()
    assert out == "learned something\n" and err.strip() == "a bar of its own"
    outputs = nbformat.read("b.ipynb", as_version=4).cells[-1].outputs
    assert "said in the notebook\n" in [output.get("text") for output in outputs]


@pytest.fixture
def tiny(tmp_path):
    """The folder of a random model of four layers."""
    return str(save_tiny(tmp_path / "tiny"))


@pytest.mark.filterwarnings("ignore")  # jupyter's own
@pytest.mark.parametrize(
    "settings",
    [dict(exit_layer=1, schedule="kl", seed=1, drafter="none", slow_every=1, prompts_source="chatterbot"),
     dict(exit_layer=3, schedule="ce")],
)  # fmt: skip
def test_other_parameters_run(tmp_path, tiny, settings):
    execute(tmp_path, run_dir="run", model_name=tiny, **QUICK, **settings)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines and lines[0]["phase"] == settings["schedule"]
    said = (tmp_path / "run/summary.txt").read_text()
    assert re.fullmatch(
        r"acceptance rate on unseen prompts [\d.]+ -> [\d.]+; [\d.]+ times plain decoding's speed\n", said
    )
    assert (tmp_path / "run/learning_curve.png").stat().st_size > 5000
    assert list((tmp_path / "run/checkpoints").glob("step-*/lora_S/adapter_model.safetensors"))


@pytest.mark.filterwarnings("ignore")
def test_early_exit_of_another_model(tmp_path, tiny):
    """The shipped drafter, which was not made for it, is left out."""
    settings = dict(model_name=tiny, exit_layer=3, seed=1, num_prompts=1, threads=1)
    said = execute(tmp_path, "01_early_exit", max_new_tokens=9, **settings)
    assert "untouched, exit layer 3: layers[:3] draft, layers[3:4] verify\n" in said
    assert "the 9 tokens of plain" in said and "smollm2" not in said


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_early_exit_with_another_prompt(tmp_path):
    settings = dict(prompt="Count to ten.", draft_len=3, num_prompts=1, threads=1)
    said = execute(tmp_path, "01_early_exit", max_new_tokens=9, **settings)
    assert "smollm2-135m-k2: layers[:2] draft" in said and "3 drafts at once" in said


@pytest.mark.filterwarnings("ignore")
def test_acceptance_without_the_shipped_drafter(tmp_path, tiny):
    settings = dict(model_name=tiny, exit_layer=3, shipped="", seed=1, num_prompts=1, threads=1)
    said = execute(tmp_path, "02_acceptance", questions=two_questions(tmp_path), max_new_tokens=9, **settings)
    assert "1 questions of 1 kinds, 9 tokens" in said and "untouched: 0." in said and "shipped" not in said


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_acceptance_on_other_questions(tmp_path):
    settings = dict(draft_len=2, num_prompts=2, threads=1)
    said = execute(tmp_path, "02_acceptance", questions=two_questions(tmp_path), max_new_tokens=9, **settings)
    assert "2 questions of 2 kinds, 18 tokens" in said and "shipped: confidence 0." in said


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_evaluation_with_other_parameters(tmp_path):
    settings = dict(methods="generate,plain,pld,fixed", fixed_len=2, num_questions=1, repeats=2, threads=1)
    said = execute(tmp_path, "05_evaluate", questions=two_questions(tmp_path), answer_tokens=9, **settings)
    assert "4 of 4 answers with drafts are" in said and "drift 0.0000 nats" in said
    for repeat in (1, 2):
        lines = next(tmp_path.glob(f"runs/05_evaluate-*/answers/plain-{repeat}.jsonl")).read_text()
        assert len(lines.splitlines()) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [(dict(exit_layer=3, seed=1, detach_exit=False), ["layers[:3] draft, layers[3:4] verify", "0 to layers[:3]"]),
     (dict(exit_layer=2, max_steps=3, held_out=2, drafter="layer"), ['"base": 2 of 2 answers are those'])],
)  # fmt: skip
def test_sgp_with_other_parameters(tmp_path, tiny, settings, expected):
    small = dict(
        max_steps=2, batch_size=2, held_out_share=0.01, num_prompts=2, held_out=1, max_new_tokens=9, threads=1
    )
    small |= dict(model_name=tiny, max_tokens=200)
    said = execute(tmp_path, "06_sgp", run_dir="run", **{**small, **settings})
    assert all(sentence in said for sentence in expected)
    saved = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert saved["step"] == settings.get("max_steps", 2)
    assert list((tmp_path / "run/from-SGP/checkpoints").glob("step-*/lora_S/adapter_model.safetensors"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "free", "leashed", "measured"),
    [(dict(exit_layer=1, seed=1, slow_every=1, beta_kl=0.5, lr_deep=0.02),
      "base-every-1-beta-0", "base-every-1-beta-0.5", 1),
     (dict(exit_layer=3, slow_every=3, lr_deep=0.0, dtype="float32"), "base-every-3-beta-0", "base-every-3-beta-1", 3)],
)  # fmt: skip
def test_slow_updates_with_other_parameters(tmp_path, tiny, settings, free, leashed, measured):
    few = dict(
        num_prompts=12, rollout_batch=12, held_out=3, max_new_tokens=8, replies=2, threads=1, draft_vocab=128
    )
    few |= dict(model_name=tiny)
    said = execute(tmp_path, "04_slow_update", run_dir="run", **few, **settings)
    assert "in 7 variants" in said and "flagged with every seed: 8 of 12" in said
    log = {
        name: read_metrics(tmp_path / "run" / name / "metrics.jsonl")
        for name in (free, leashed, "base-never")
    }
    assert all(len(one) > measured for one in log.values()) and "drift_kl" in log[free]
    assert (
        log["base-never"].drift_kl.isna().all()
        and log["base-never"].accept_rate[0] == log[free].accept_rate[0]
    )
    for name in (free, leashed):
        asked = log[name].step % measured == 0
        assert log[name].drift_kl[~asked].isna().all() and log[name].drift_kl.notna().any()
        assert (log[name].drift_kl.max() > 1e-4) == (settings.get("lr_deep") != 0.0)


@pytest.mark.filterwarnings("ignore")
def test_a_bad_parameter_stops_it(tmp_path):
    message = "unknown notebook parameter exit_layr; known are"
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        execute(tmp_path, "03_train", exit_layr=6)


@pytest.mark.no_cover
@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("notebook", "parameter", "message"),
    [("01_early_exit", "exit_layr = 6", "unknown notebook parameter exit_layr; known are"),
     ("01_early_exit", "exit_layer = 30", "exit_layer is 30; this model of 30 layers takes 1 to 29"),
     ("03_train", "exit_layer = 30", "exit_layer is 30; this model of 30 layers takes 1 to 29"),
     ("01_early_exit", "head = 'full'", "notebook parameter head: this notebook sets it itself"),
     ("05_evaluate", "reference = 'generate'", "notebook parameter reference: this notebook sets it itself"),
     ("02_acceptance", "exit_layr = 6", "unknown notebook parameter exit_layr; known are"),
     ("02_acceptance", "draft_len = 0", "draft_len is 0; expected a number from 1 to 64"),
     ("04_slow_update", "beta = 0.5", "unknown notebook parameter beta; known are"),
     ("04_slow_update", "beta_kl = -1.0", "beta_kl is -1.0; expected a number from 0 to 1e"),
     ("05_evaluate", "exit_layr = 6", "unknown notebook parameter exit_layr; known are"),
     ("05_evaluate", "answer_tokens = 1", "answer_tokens is 1; expected a number from 2 to"),
     ("06_sgp", "fast_batch = 6", "unknown notebook parameter fast_batch; known are"),
     ("06_sgp", "beta_exit = -1.0", "beta_exit is -1.0; expected a number from 0 to 1e")],
)  # fmt: skip
def test_bad_parameters_stop_the_others(tmp_path, monkeypatch, notebook, parameter, message):
    """Their cells are executed here, with the cell that papermill would put after the first, to save a kernel each."""
    monkeypatch.chdir(tmp_path)
    sources = code_cells(notebook)
    space = {"In": []}
    with pytest.raises(DvirlError, match=message):
        for source in (sources[0], f"# Parameters\n{parameter}", *sources[1:]):
            space["In"].append(source)
            exec(compile(source, notebook, "exec"), space)
