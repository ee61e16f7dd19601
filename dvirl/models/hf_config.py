"""Reads a model's `config.json`, as any transformers of recent years wrote it, into the names that we compute with."""

import re
from typing import Any

from transformers import LlamaConfig
from transformers.activations import ACT2FN

from dvirl.runs.errors import DvirlError
from dvirl.runs.log import JsonObject, parse_line, read_text
from dvirl.runs.settings import has_type
from kangaroo.adapter import ROPE_TYPES

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "head_dim",
)
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""What each way of scaling positions cannot do without."""
ROPE_OPTIONS = (
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",
)
"""What may stand beside them; `finetuned` says only how the model came about."""
UNDERSTOOD = (
    "attention_bias",
    "mlp_bias",
    "rope_parameters",
    "partial_rotary_factor",
    "layer_norm_eps",
    "use_sliding_window",
)
"""Fields that newer configurations have, and that are computed or checked here."""
CHANGES_NUMBERS = re.compile(
    "rope|rotary|norm|scal|multiplier|softcap|window|clip|expert|bias|residual|interleav|layer_type|quant|alibi|chunk"
)
"""Words in the names of fields by which relatives of Llama compute something else."""


def read_json(file: str | None) -> JsonObject:
    """The content of one of a model's JSON files; nothing if the model does not have it."""
    return parse_line(file, read_text(file), dict) if file else {}


def read_config(values: JsonObject) -> LlamaConfig:
    """The configuration of a Llama, its positions under `rope_theta` and `rope_scaling`.

    Args:
        values: the content of `config.json`.

    Raises:
        DvirlError: for another architecture, a field that is missing or out of range, or one that changes the numbers
            and is not understood.
    """
    if values.get("model_type") != "llama":
        raise DvirlError(f"architecture is {values.get('model_type')!r}, expected 'llama'")
    quantised = values.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "some method") if isinstance(quantised, dict) else quantised
        raise DvirlError(f"its weights are quantised by {method}; expected a model in 16 or 32 bits")
    _refuse_unknown(values)
    # Rotary positions are set below; the pinned LlamaConfig would refuse most of them.
    moved = ("rope_scaling", "rope_parameters", "dtype", "torch_dtype", "quantization_config")
    plain = {name: value for name, value in values.items() if name not in moved}
    config: LlamaConfig = LlamaConfig.from_dict(plain)
    for name in SIZES:
        size: Any = getattr(config, name, None)
        optional = name == "head_dim" and size is None
        if not optional and not (has_type(size, int) and size > 0):
            raise DvirlError(f"config.json: {name} is {size!r}; expected a whole number of at least 1")
    if not has_type(config.rms_norm_eps, float) or config.rms_norm_eps < 0:
        raise DvirlError(f"config.json: rms_norm_eps is {config.rms_norm_eps!r}; expected a number")
    _check_heads(config)
    if config.hidden_act not in ACT2FN:
        raise DvirlError(f"config.json: hidden_act {config.hidden_act!r} is not known")
    config.rope_theta, config.rope_scaling = _positions(values, config)
    # Without it no token ends an answer, whatever a Llama has by default.
    config.eos_token_id = values.get("eos_token_id")
    # A token outside the vocabulary cannot be padded with.
    if not has_type(config.pad_token_id, int) or not 0 <= config.pad_token_id < config.vocab_size:
        config.pad_token_id = None
    return config


def _check_heads(config: LlamaConfig) -> None:
    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size / heads
    if heads % groups or size % 2:
        raise DvirlError(
            f"config.json: {heads} query heads, {groups} key/value heads and head size {size:g} do not fit; "
            "expected whole groups of query heads and an even size"
        )


def _refuse_unknown(values: JsonObject) -> None:
    """Refuse what relatives of Llama compute otherwise, unless it is switched off.

    Raises:
        DvirlError: with the field's name.
    """
    known = {*UNDERSTOOD, *LlamaConfig().to_dict()}
    if values.get("use_sliding_window") is False:
        known |= {"sliding_window", "max_window_layers"}
    context: int = values.get("max_position_embeddings") or 0
    for name, value in values.items():
        harmless = name in known or not CHANGES_NUMBERS.search(name) or value in (None, False, 0, [], {})
        wide = name == "sliding_window" and type(value) is int and value >= context
        if not harmless and not wide:
            raise DvirlError(f"config.json: {name} is {value!r:.60}, which is not computed here")
    if values.get("transformers_weights"):
        raise DvirlError(
            f"config.json: transformers_weights is {values['transformers_weights']!r:.60}; expected the usual names"
        )
    if values.get("is_causal") is False:
        raise DvirlError(
            "config.json: is_causal is false; expected a model whose positions see none after them"
        )
    if values.get("partial_rotary_factor") not in (None, 1):
        raise DvirlError(
            f"config.json: partial_rotary_factor is {values['partial_rotary_factor']}, expected 1"
        )


def _positions(values: JsonObject, config: LlamaConfig) -> tuple[float, JsonObject | None]:
    """`rope_theta` and `rope_scaling`, wherever and by whatever names they stand.

    Raises:
        DvirlError: for a kind, a field or a number that is not understood.
    """
    found = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not has_type(found, dict[str, object]):
        raise DvirlError(f"config.json: rope_scaling is {found!r:.60}, expected an object")
    scaling = dict(found)
    old_name = scaling.pop("type", None)
    kind = scaling.pop("rope_type", None) or old_name or "default"
    theta = scaling.pop("rope_theta", None)
    theta = values.get("rope_theta") if theta is None else theta
    theta = 10000.0 if theta is None else theta
    partial = scaling.pop("partial_rotary_factor", None)
    if kind not in ROPE_TYPES or partial not in (None, 1):
        raise DvirlError(
            f"config.json: rope_scaling is {found!r:.120}; expected the type {', '.join(ROPE_TYPES)}, for whole heads"
        )
    for name, value in scaling.items():
        unknown = name not in (*ROPE_FIELDS[kind], *ROPE_OPTIONS) and value is not None
        # What scales nothing has no parameters that count; an object would be one for some of the layers.
        if unknown and (kind != "default" or isinstance(value, dict)):
            raise DvirlError(f"config.json: rope_scaling has {name}, which {kind!r} positions do not take")
    for name in ROPE_FIELDS[kind]:
        if not has_type(scaling.get(name), float) or scaling[name] <= 0:
            raise DvirlError(
                f"config.json: {name} of rope_scaling is {scaling.get(name)!r}; expected a number"
            )
    if kind == "llama3" and scaling["low_freq_factor"] > scaling["high_freq_factor"]:
        raise DvirlError("config.json: low_freq_factor of rope_scaling is above high_freq_factor")
    if not has_type(theta, float) or theta <= 0:
        raise DvirlError(f"config.json: rope_theta is {theta!r}; expected a number above 0")
    if kind == "default":
        return float(theta), None
    if kind == "dynamic":  # its context of training is the configuration's own
        scaling["original_max_position_embeddings"] = config.max_position_embeddings
    elif "original_max_position_embeddings" in values:
        scaling["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    # Newer and older transformers look for the kind under different names.
    return float(theta), {"type": kind, "rope_type": kind, **scaling}
