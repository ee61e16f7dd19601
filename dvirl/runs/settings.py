"""How settings work: frozen dataclasses, checked when made, read from the command line, YAML and namespaces."""

import ast
import dataclasses
import functools
import inspect
import textwrap
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import yaml
from transformers.hf_argparser import string_to_bool

from dvirl.runs.errors import DvirlError
from dvirl.runs.log import read_text

MANY = 1e9
"""Upper limit of counts that have no natural one."""
MOST_BITS = 999
"""Longer integers are refused first: Python may refuse to print them, and no float can hold them."""
CONFIGS = tuple(Path(__file__).parents[2] / name for name in ("configs", "dvirl_configs"))
"""Where the settings files that ship lie: in the repository, and beside the packages of a wheel."""
Config = TypeVar("Config")
Values = dict[str, Any]
"""Settings by their names."""


def number(default: float, lowest: float, highest: float = MANY) -> Any:
    """A numeric field and its range, both ends included."""
    return field(default=default, metadata={"range": (lowest, highest)})


def choice(default: str, allowed: Sequence[str]) -> Any:
    """A text field that takes one of a few values."""
    return field(default=default, metadata={"allowed": tuple(allowed)})


def required() -> Any:
    """A field that has no default: its flag has to be given."""
    return field(kw_only=True)


def positional(default: Any = MISSING) -> Any:
    """A field that the command line takes by its position, without a flag; it is required if it has no default."""
    return field(default=default, kw_only=True, metadata={"positional": True})


def several(
    *default: Any,
    count: int | str = "+",
    limits: tuple[float, float] | None = None,
    positional: bool = False,
) -> Any:
    """A list field: several values after one flag, `--name A B`.

    Args:
        default: the members by default; without any, the default is an empty list.
        count: number of values on the command line, as argparse's `nargs`: "+", "*" or a number.
        limits: range of each member, both ends included, if they are numbers.
        positional: the command line takes them by their position, without a flag.
    """
    metadata = {"count": count, "range": limits, "positional": positional}
    return field(default_factory=lambda: list(default), metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Base of all settings. When an object is made, every field is checked for its type, range or choice.

    Raises:
        DvirlError: when made with a bad value; the message names field, value and range.
    """

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            for member in value if isinstance(value, list) else [value]:
                _check(spec, member)
            if not has_type(value, spec.type):
                raise DvirlError(
                    f"{spec.name} is {value!r:.80}; expected {inspect.formatannotation(spec.type)}"
                )


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which model, on what, where its run is written."""

    model_name: str = "smollm2-135m"
    """Embedded name, local folder or hub id of a Llama-architecture model."""
    chat_format: str = "auto"
    """auto, template (the model's own), chatml, llama-2, llama-3, vicuna, zephyr or none."""
    dtype: str = "auto"
    """Of the base weights: auto (bfloat16 where the hardware is fast at it), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, or balanced: the layers spread over all cards, for a model larger than one."""
    threads: int = number(2, 1, 1024)
    """Number of torch's CPU threads; more threads than free cores slow each other down."""
    seed: int = number(0, 0, 2**63 - 1)
    """Of prompts, initial weights, and sampled drafts."""
    run_dir: str = "runs/train"
    """Folder of this run: config.yaml, metrics.jsonl, checkpoints/."""


def _check(spec: "dataclasses.Field[Any]", value: Any) -> None:
    """Check a field's value, or a member of it, for everything but its type."""
    allowed = spec.metadata.get("allowed")
    limits = spec.metadata.get("range")
    expected = ""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise DvirlError(f"{spec.name} is a number of {value.bit_length()} bits; expected a smaller one")
    if isinstance(value, str) and not (value.isprintable() and (value.strip() or not spec.default)):
        expected = "a name in printable letters"
    elif allowed and value not in allowed:
        expected = f"one of {', '.join(allowed)}"
    elif limits and not (has_type(value, float) and limits[0] <= value <= limits[1]):
        expected = f"a number from {limits[0]:g} to {limits[1]:g}"
    if expected:
        raise DvirlError(f"{spec.name} is {value!r:.80}; expected {expected}")


def from_mapping(kind: type[Config], values: Values, where: str) -> Config:
    """A settings object from names and values; what is missing takes its default. `where` is for messages.

    Raises:
        DvirlError: for an unknown name, one that is missing and has no default, or a value out of range.
    """
    known = sorted(spec.name for spec in dataclasses.fields(kind))  # type: ignore[arg-type]
    unknown = sorted(str(name) for name in values if name not in known)
    try:
        if unknown:
            raise DvirlError(f"unknown setting {', '.join(unknown)[:200]}; known are {', '.join(known)}")
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise DvirlError(f"{where}: {' '.join(str(error).split()):.2000}") from error


def from_namespace(kind: type[Config], args: Namespace | Config) -> Config:
    """A settings object from argparse's namespace; a settings object passes through."""
    if isinstance(args, Namespace):
        return from_mapping(kind, vars(args), "arguments")
    return args


def defaults(kind: Any) -> Values:
    """The defaults of all settings that have a plain one; a file from before a setting existed means its default."""
    return {spec.name: spec.default for spec in dataclasses.fields(kind) if spec.default is not MISSING}


def narrowed(kind: type[Config], settings: Any) -> Config:
    """A settings object of a class that the class of `settings` extends, with the same values."""
    specs = dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(**{spec.name: getattr(settings, spec.name) for spec in specs})


def _shipped(path: str | Path) -> Path:
    """The settings file of that path, or else the one that ships as `configs/NAME.yaml`, by this path or its name."""
    given = Path(path)
    for root in CONFIGS:
        file = root / f"{given.name.removesuffix('.yaml')}.yaml"
        if not given.exists() and str(given.parent) in (".", "configs") and file.exists():
            return file
    return given


def read_yaml(path: str | Path) -> Values:
    """The names and values of a YAML settings file; `configs/NAME.yaml` and NAME also name one that ships.

    Raises:
        DvirlError: if it cannot be read, is no mapping, or has aliases, by which a short file can stand for a huge one.
    """
    values = parse_yaml(str(path), read_text(_shipped(path)))
    if not isinstance(values, dict):
        raise DvirlError(f"{path}: expected a mapping of settings to values")
    return {str(name): value for name, value in values.items()}


def parse_yaml(where: str, text: str) -> Any:
    """The value of a YAML text.

    Raises:
        DvirlError: if it is not YAML, has aliases or gives a name twice; the message begins with `where`.
    """
    try:
        root = yaml.compose(
            text
        )  # ends early where nesting is too deep, which the next line would take long over
        for event in yaml.parse(text):
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError("an alias, written *name, is not read here")
        _refuse_repeated(root)
        return yaml.safe_load(text)
    except Exception as error:  # for a bad tag, date or number PyYAML raises what its own code runs into
        raise DvirlError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from error


def _refuse_repeated(node: yaml.Node | None) -> None:
    """Refuse names that a mapping gives twice: PyYAML would take the last one."""
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        names = Counter(name.value for name, _ in parts if isinstance(name, yaml.ScalarNode))
        for name, count in names.most_common(1):
            if count > 1:
                raise yaml.YAMLError(f"{name} is there {count} times")
        parts = [value for _, value in parts]
    for part in parts:
        _refuse_repeated(part)


def field_docs(kind: type[Any]) -> dict[str, str]:
    """The docstring under each field, those of base classes included."""
    texts: dict[str, str] = {}
    for owner in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for statement, following in pairwise(tree.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                texts[ast.unparse(statement.target)] = ast.literal_eval(following.value)
    return texts


def parse_args(kind: type[Config], prog: str, description: str, argv: Sequence[str]) -> Config:
    """Settings from the command line, on top of a YAML file.

    The file is the one that `--config` names, or the settings of the run that `--resume` names. Each field is a flag,
    with its docstring as help.

    Raises:
        DvirlError: for an unknown or bad setting; unknown flags end the program as argparse does, with exit code 2.
    """
    arguments = vars(_parser(kind, prog, description).parse_args(list(argv)))  # type: ignore[arg-type]
    path = arguments.pop("config", "")
    if not path and arguments.get("resume"):
        path = f"{arguments['resume']}/config.yaml"
    in_file: Values = {}
    if path:
        in_file = read_yaml(path)
        if isinstance(in_file.get("config"), dict):  # a run's file also has its versions and its model
            in_file = in_file["config"]
        # The file is checked by itself, so that messages name it; fields without a default come from the command line.
        specs = dataclasses.fields(kind)  # type: ignore[arg-type]
        required = [spec.name for spec in specs if spec.kw_only]
        needed = {name: arguments[name] for name in required if name in arguments}
        from_mapping(kind, needed | in_file, path)
    return from_mapping(kind, in_file | arguments, "arguments")


def command_line(kind: type[Config], prog: str, description: str) -> Callable[[Sequence[str]], Config]:
    """What reads the settings of one command from its arguments, see `parse_args`."""
    return functools.partial(parse_args, kind, prog, description)


@functools.cache
def _parser(kind: type[Any], prog: str, description: str) -> ArgumentParser:
    """A parser that returns only the given arguments; the settings class knows the defaults."""
    parser = ArgumentParser(prog=prog, description=description, argument_default=SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags override it")
    texts = field_docs(kind)
    for spec in dataclasses.fields(kind):
        _add_argument(parser, spec, texts[spec.name].replace("%", "%%"))
    return parser


def _add_argument(parser: ArgumentParser, spec: "dataclasses.Field[Any]", text: str) -> None:
    """Let the command line take one field."""
    options: dict[str, Any] = {"type": spec.type}
    default = spec.default if spec.default_factory is MISSING else spec.default_factory()
    if default not in (MISSING, "", []):
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text += f" (default: {shown})"
    if get_origin(spec.type) is list:
        options = {"type": get_args(spec.type)[0], "nargs": spec.metadata["count"]}
    elif spec.type is bool:
        options = {"type": string_to_bool, "nargs": "?", "const": True}
    if spec.metadata.get("positional"):
        if default is not MISSING:
            options.setdefault("nargs", "?")
        parser.add_argument(spec.name, help=text, **options)
        return
    parser.add_argument(f"--{spec.name}", help=text, required=default is MISSING, **options)
    if default is True:
        parser.add_argument(
            f"--no_{spec.name}", dest=spec.name, action="store_false", help=f"the same as --{spec.name} false"
        )


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value and its members have the types given; an int is a float too, and a bool is not a number."""
    if isinstance(kind, UnionType):
        return any(has_type(value, option) for option in get_args(kind))
    if type(value) is get_origin(kind):  # list[member] or dict[key, member]
        member_kinds = get_args(kind)
        members = value.items() if isinstance(value, dict) else zip(value)
        return all(all(map(has_type, member, member_kinds)) for member in members)
    if kind is float:
        return type(value) in (int, float)
    return kind in (Any, object) or type(value) is kind
