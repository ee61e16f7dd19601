"""Small random models for logic, the real default model for the few tests that need it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dvirl.data.stream import PromptSplit, PromptStream
from dvirl.models.chat import ChatEncoder
from dvirl.models.loading import LoadedModel, load
from dvirl.runs.folder import environment
from dvirl.runs.log import write_json
from kangaroo.decoding.passes import SHORTEST_VIEW
from kangaroo.decoding.stages import Stages
from kangaroo.earlyexit import EarlyExitLlamaForCausalLM
from kangaroo.kangaroo_model import KangarooModel
from kangaroo.sgp_lora import inject_dual_lora, lora_parameters

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported: they run on the CPU then
    from triton.runtime import interpreter

    prepared = functools.cache(interpreter._patch_lang)

    def call_helper(self, *arguments, **names):
        """Call a function within a kernel. Triton would replace what its language means at each such call again."""
        prepared(self.fn)
        return self.rewrite()(*arguments, **names)

    interpreter.InterpretedFunction.__call__ = call_helper


def synced(descriptor: int) -> None:
    """Stands in for `os.fsync`. A run of half a second calls it 30 times, and each waits milliseconds for the disk."""
    os.fstat(descriptor)


os.fsync = synced


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart() -> None:
    """Let `no_cover` have its effect in processes of xdist, too.

    There pytest-cov 7.1 has begun to count lines once already, and begins again after this. What it does not save would
    go on counting whenever the other one pauses.
    """
    counting = sys.modules.get("coverage")
    early = counting.Coverage.current() if counting else None
    if early and "PYTEST_XDIST_WORKER" in os.environ:
        early.stop()


def pytest_collection_finish() -> None:
    """Let Ctrl-C be heard: a shell's background jobs begin with SIGINT ignored, for which tests would wait for ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


FAULTS: dict[str, list[dict]] = {}
"""What tests say by `record_property` of the faults they made, by their kind; gathered from all processes of tests."""


def pytest_runtest_logreport(report) -> None:
    """Take in what a test found."""
    for kind, found in report.user_properties if report.when == "call" else ():
        FAULTS.setdefault(kind, []).append({**found, "seconds": report.duration})


def pytest_sessionfinish(session) -> None:
    """Sum up the faults, where figures are asked for."""
    if FAULTS and not hasattr(session.config, "workerinput"):
        sums = {
            kind: {name: sum(one[name] for one in found) for name in found[0]}
            for kind, found in FAULTS.items()
        }
        record("faults-cpu", **{kind: {"count": len(FAULTS[kind]), **found} for kind, found in sums.items()})


def pytest_runtest_setup(item) -> None:
    """No test sees what the one before it left: settings that it trained with may ask torch for two threads.

    Tiny models are many times slower on two. And workers steal tests from one another, in no order.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stay(item.path)


@functools.cache
def stay(path: Path) -> None:
    """Before the first test of a file: what is there now stays, so `gc.collect` need not walk it again.

    Studies call that for every row.
    """
    gc.collect()
    gc.freeze()


def record(name: str, **figures) -> None:
    """Add what a long test found to a file in the folder that make names, with what it depends on; else do nothing."""
    if folder := os.environ.get("DVIRL_RESULTS"):
        path, root = Path(folder, f"{name}.json"), Path(__file__).parents[1]
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
        )
        made = {
            "command": os.environ["DVIRL_COMMAND"],
            "commit": commit.stdout.strip(),
            "date": time.strftime("%F"),
        }
        before = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**before, **made, **environment(), **figures})


def in_child(work) -> int:
    """Run in a process of its own; how that ended, as `os.waitpid` says it."""
    number = os.fork()
    if number == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(number, 0)[1]


def timeless(values):
    """Without what the clock says."""
    return {name: value for name, value in values.items() if not name.endswith("_s") and name != "tok_per_s"}


VOCAB = 264
EOS = 2


def tiny_config(heads: int = 4, groups: int = 2, tied: bool = True, **changes) -> LlamaConfig:
    settings = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        initializer_range=0.3,
        rope_theta=5000.0,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    return LlamaConfig(**{**settings, **changes})


def tiny_pair(seed: int = 0, **changes) -> tuple[LlamaForCausalLM, EarlyExitLlamaForCausalLM]:
    """Hugging Face's model and ours with the same random weights."""
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(tiny_config(**changes)).eval()
    ours = EarlyExitLlamaForCausalLM(theirs.config, EARLY_STOP_LAYER=2).eval()
    state = {name: value for name, value in theirs.state_dict().items() if "inv_freq" not in name}
    ours.load_state_dict(state)
    return theirs, ours.requires_grad_(False)


def tiny_model(seed: int = 0, deep_scale: float = 1.0) -> EarlyExitLlamaForCausalLM:
    """A random model; a small `deep_scale` makes its upper half say little, so that drafts are often right."""
    model = tiny_pair(seed)[1]
    for layer in model.model.layers[2:]:
        layer.mlp.down_proj.weight.data *= deep_scale
        layer.self_attn.o_proj.weight.data *= deep_scale
    return model


def scramble_lora(model: torch.nn.Module, names: list[str], scale: float = 0.3, seed: int = 0) -> None:
    """Give adapters weights that matter; a fresh LoRA computes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model, names):
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def tiny_kangaroo(
    seed: int = 0, exit_layer: int = 2, lora: bool = True, deep_scale: float = 1.0, **args
) -> KangarooModel:
    """A model with its draft, both adapters scrambled."""
    base = tiny_model(seed, deep_scale)
    if lora:
        inject_dual_lora(base, exit_layer, rank=4, alpha=8.0)
    model = KangarooModel(base, None, Namespace(**args), exit_layer)
    if lora:
        scramble_lora(model, ["lora_S"], 0.15, seed)
        scramble_lora(model, ["lora_D"], 0.05, seed + 1)
    return model


class Recorded:
    """Stands for captured passes where there is no GPU: what was recorded for a key is run again on its own inputs."""

    def __init__(self):
        self.held = {}
        self.ms = {}

    def __call__(self, key, run, *inputs):
        key = (key, *(one.shape for one in inputs))
        run, static = self.held.setdefault(key, (run, [one.clone() for one in inputs]))
        for own, given in zip(static, inputs, strict=True):
            own.copy_(given)
        return run(*static)

    def in_place(self, key, run, state):
        return self.held.setdefault(key, run)()


def capture_passes(
    model: KangarooModel, monkeypatch: pytest.MonkeyPatch, prompts: bool = True
) -> list[Stages]:
    """Let every decoding of a model run captured passes, as on CUDA; the stages that it makes from now on.

    Args:
        model: of which all stages are kept.
        monkeypatch: undoes it.
        prompts: capture what reads prompts, too, as where our own kernels run.
    """
    fresh = model.base_model.new_stages
    made: list[Stages] = []

    def stages(capacity, *args):
        made.append(fresh(SHORTEST_VIEW, *args))
        made[-1].passes.graphs = Recorded()
        made[-1].passes.own_kernels = prompts
        return made[-1]

    monkeypatch.setattr(model.base_model, "new_stages", stages)
    return made


def write_published(folder: Path, seed: int = 0, **changes) -> dict[str, torch.Tensor]:
    """A random adapter in the published Kangaroo layout; heads, epsilon and rope are not the tiny model's."""
    config = tiny_config(
        **{**dict(heads=8, groups=4, num_hidden_layers=1, rope_theta=100.0, rms_norm_eps=1e-3), **changes}
    )
    generator = torch.Generator().manual_seed(seed)
    size, narrow = (
        config.hidden_size,
        config.hidden_size // config.num_attention_heads * config.num_key_value_heads,
    )
    shapes = {
        "q_proj": (size, size),
        "k_proj": (narrow, size),
        "v_proj": (narrow, size),
        "o_proj": (size, size),
    }
    state = {
        f"layers.0.self_attn.{name}.weight": 0.2 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    for name in ("layers.0.input_layernorm.weight", "norm.weight"):
        state[name] = 0.7 + 1.4 * torch.rand(size, generator=generator)  # sure and doubtful drafts both occur
    config.save_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")
    return state


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and ChatML's control tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def tiny_loaded(seed: int = 0, deep_scale: float = 1.0) -> LoadedModel:
    tokenizer = tiny_tokenizer()
    return LoadedModel(
        tiny_model(seed, deep_scale),
        tokenizer,
        ChatEncoder(tokenizer, "chatml"),
        (EOS,),
        "tiny",
        "sha256:tiny",
    )


def copied(loaded: LoadedModel) -> LoadedModel:
    """The same with a model of its own, which a test may change; ten times quicker than loading it."""
    return dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))


def random_prompts(count: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def tiny_split(count: int = 40, seed: int = 0) -> PromptSplit:
    prompts = random_prompts(count + 8, seed)
    return PromptSplit(PromptStream(prompts[8:], seed), prompts[:8])


@pytest.fixture(scope="session")
def real() -> LoadedModel:
    """The default model in float32, which no test may change."""
    return load(dtype="float32", device="cpu")
