"""Notebooks under papermill: other parameters work, unknown and bad ones stop them with our message."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import papermill
import pytest

from dvirl.experiments.notebook import DECLARED, INJECTED, assigned_names, claims, fingerprint
from dvirl.runs.errors import DvirlError
from dvirl.runs.log import read_metrics

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
QUICK = dict(
    num_prompts=8,
    rollout_batch=8,
    max_new_tokens=16,
    eval_prompts=2,
    judged=4,
    held_out=4,
    threads=1,
    fast_batch=1,
)


def execute(tmp_path, notebook="03_train", **parameters):
    """Run a notebook; what it printed."""
    path, out = NOTEBOOKS / f"{notebook}.ipynb", tmp_path / "out.ipynb"
    papermill.execute_notebook(path, out, parameters, kernel_name="python3", progress_bar=False, cwd=tmp_path)
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
        with pytest.raises(AssertionError, match="accept rate 0.062 is under 0.28"):
            claim(False, "accept rate 0.062 is under 0.28")
    else:
        assert claim(False, "accept rate 0.062 is under 0.28") is False


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
def test_imports_are_folded(notebook):
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


@pytest.mark.parametrize("injected", ["# Parameters\nrun_dir = 'run'", "# Parameters\nnum_prompts = 16"])
def test_an_accept_rate_under_the_floor_fails_the_default_run_of_03_alone(injected):
    cells = code_cells("03_train")
    (asserting,) = (
        line for cell in cells for line in cell.splitlines() if line.startswith("claim = claims(")
    )
    (judging,) = (cell for cell in cells if "is under 0.28" in cell)
    step_by_step = SimpleNamespace(accept_rate=0.04, mat=1.04)
    space = {"In": [cells[0], injected], "claims": claims, "config": SimpleNamespace(schedule="kl_to_rl"),
             "rates": {"untrained": 0.037, "kl_to_rl": 0.062}, "before": step_by_step, "after": step_by_step}  # fmt: skip
    for cell in (*space["In"], asserting):
        exec(cell, space)
    if "run_dir" in injected:
        with pytest.raises(AssertionError, match="accept rate 0.062 is under 0.28"):
            exec(judging, space)
    else:
        exec(judging, space)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # jupyter's own
@pytest.mark.parametrize(
    "settings", [dict(exit_layer=4, schedule="kl", seed=1), dict(exit_layer=8, schedule="ce", slow_every=0)]
)
def test_other_parameters_run(tmp_path, settings):
    execute(tmp_path, run_dir="run", **QUICK, **settings)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines and lines[0]["phase"] == settings["schedule"]
    assert (tmp_path / "run/learning_curve.png").stat().st_size > 5000
    assert list((tmp_path / "run/checkpoints").glob("step-*/lora_S/adapter_model.safetensors"))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [(dict(exit_layer=24, shipped="", seed=1), ["layers[:24] draft, layers[24:30] verify", "the 9 tokens of plain"]),
     (dict(prompt="Count to ten.", draft_len=3), ["smollm2-135m-k2: layers[:2] draft", "3 drafts at once"])],
)  # fmt: skip
def test_early_exit_with_other_parameters(tmp_path, settings, expected):
    said = execute(tmp_path, "01_early_exit", num_prompts=1, max_new_tokens=9, threads=1, **settings)
    assert all(sentence in said for sentence in expected)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [(dict(exit_layer=20, shipped="", seed=1, num_prompts=1), ["1 questions of 1 kinds, 9 tokens", "untouched: 0."]),
     (dict(draft_len=2, num_prompts=2), ["2 questions of 2 kinds, 18 tokens", "shipped: confidence 0."])],
)  # fmt: skip
def test_acceptance_with_other_parameters(tmp_path, settings, expected):
    asked = two_questions(tmp_path)
    said = execute(tmp_path, "02_acceptance", questions=asked, max_new_tokens=9, threads=1, **settings)
    assert all(sentence in said for sentence in expected)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [(dict(methods="plain,fixed", fixed_len=2, num_questions=1), ["1 of 1 answers with drafts are"]),
     (dict(methods="generate,plain,pld", repeats=2), ["4 of 4 answers with drafts are", "drift 0.0000 nats"])],
)  # fmt: skip
def test_evaluation_with_other_parameters(tmp_path, settings, expected):
    said = execute(
        tmp_path, "05_evaluate", questions=two_questions(tmp_path), answer_tokens=9, threads=1, **settings
    )
    assert all(sentence in said for sentence in expected)
    lines = (next(tmp_path.glob("runs/05_evaluate-*")) / "answers/plain-1.jsonl").read_text().splitlines()
    assert len(lines) == settings.get("num_questions", 2)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [(dict(exit_layer=20, seed=1, detach_exit=False), ["layers[:20] draft, layers[20:30] verify", "0 to layers[:20]"]),
     (dict(max_steps=3, held_out=2, drafter="layer"), ['"base": 2 of 2 answers are those'])],
)  # fmt: skip
def test_sgp_with_other_parameters(tmp_path, settings, expected):
    small = dict(
        max_steps=2, batch_size=2, held_out_share=0.01, num_prompts=2, held_out=1, max_new_tokens=9, threads=1
    )
    said = execute(tmp_path, "06_sgp", run_dir="run", **{**small, **settings})
    assert all(sentence in said for sentence in expected)
    saved = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert saved["step"] == settings.get("max_steps", 2)
    assert list((tmp_path / "run/from-SGP/checkpoints").glob("step-*/lora_S/adapter_model.safetensors"))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "free", "leashed", "measured"),
    [(dict(exit_layer=20, seed=1, slow_every=1, beta_kl=0.5), "base-every-1-beta-0", "base-every-1-beta-0.5", 1),
     (dict(exit_layer=24, slow_every=3, lr_deep=0.0, dtype="float32"), "base-every-3-beta-0", "base-every-3-beta-1", 3)],
)  # fmt: skip
def test_slow_updates_with_other_parameters(tmp_path, settings, free, leashed, measured):
    few = dict(
        num_prompts=12, rollout_batch=12, held_out=3, max_new_tokens=8, replies=2, threads=1, draft_vocab=512
    )
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


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("notebook", "parameters", "message"),
    [("03_train", {"exit_layr": 6}, "unknown notebook parameter exit_layr; known are"),
     ("03_train", {"exit_layer": 30}, "exit_layer is 30; this model of 30 layers takes 1 to 29")],
)  # fmt: skip
def test_bad_parameters_stop_it(tmp_path, notebook, parameters, message):
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        execute(tmp_path, notebook, **parameters)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("notebook", "parameter", "message"),
    [("01_early_exit", "exit_layr = 6", "unknown notebook parameter exit_layr; known are"),
     ("01_early_exit", "exit_layer = 30", "exit_layer is 30; this model of 30 layers takes 1 to 29"),
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
    """Their cells are executed here, with the cell that papermill would put behind the first, to save a kernel each."""
    monkeypatch.chdir(tmp_path)
    sources = code_cells(notebook)
    space = {"In": []}
    with pytest.raises(DvirlError, match=message):
        for source in (sources[0], f"# Parameters\n{parameter}", *sources[1:]):
            space["In"].append(source)
            exec(compile(source, notebook, "exec"), space)
