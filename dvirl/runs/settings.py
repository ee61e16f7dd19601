"""How settings work: frozen dataclasses, checked when made, read from flags, YAML, namespaces and notebooks."""

import ast
import dataclasses
import inspect
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import yaml
from transformers import HfArgumentParser

from dvirl.runs.errors import DvirlError
from dvirl.runs.log import read_text

if TYPE_CHECKING:
    pass

MANY = 1e9
"""Upper limit of counts that have no natural one."""


Config = TypeVar("Config")


def number(default: float, lowest: float, highest: float = MANY) -> Any:
    """A numeric field and its range, both ends included."""
    return field(default=default, metadata={"range": (lowest, highest)})


def choice(default: str, allowed: Sequence[str]) -> Any:
    """A text field that takes one of a few values."""
    return field(default=default, metadata={"allowed": tuple(allowed)})


@dataclass(frozen=True)
class Settings:
    """Base of all settings: every field is checked for its type, range or choice when an object is made.

    Raises:
        DvirlError: when made with a bad value; the message names field, value and range.
    """

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, int) and value.bit_length() > 999:  # Python need not spell it, nor can a float hold it
                raise DvirlError(f"{spec.name} is a number of {value.bit_length()} bits; expected a smaller one")
            if isinstance(value, str) and not (value.isprintable() and (value.strip() or not spec.default)):
                raise DvirlError(f"{spec.name} is {value!r}; expected a name in printable letters")
            allowed, limits = spec.metadata.get("allowed"), spec.metadata.get("range")
            if allowed and value not in allowed:
                raise DvirlError(f"{spec.name} is {value!r:.80}; expected one of {', '.join(allowed)}")
            if limits and not (has_type(value, float) and limits[0] <= value <= limits[1]):
                raise DvirlError(f"{spec.name} is {value!r:.80}; expected a number from {limits[0]:g} to {limits[1]:g}")
            if not has_type(value, spec.type):
                raise DvirlError(f"{spec.name} is {value!r:.80}; expected {inspect.formatannotation(spec.type)}")


def from_mapping(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """A settings object from names and values; what is missing takes its default. `where` is for messages.

    Raises:
        DvirlError: for an unknown name, one that is missing and has no default, or a value out of range.
    """
    known = sorted(spec.name for spec in dataclasses.fields(kind))  # type: ignore[arg-type]
    try:
        if unknown := sorted(map(str, set(values) - set(known))):
            raise DvirlError(f"unknown setting {', '.join(unknown)[:200]}; known are {', '.join(known)}")
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise DvirlError(f"{where}: {' '.join(str(error).split()):.2000}") from error


def from_namespace(kind: type[Config], args: Namespace | Config) -> Config:
    """A settings object from argparse's namespace; a settings object passes through."""
    return from_mapping(kind, vars(args), "arguments") if isinstance(args, Namespace) else args


def narrowed(kind: type[Config], given: Any) -> Config:
    """A settings object of a class that `given`'s class extends, with the same values."""
    return kind(**{spec.name: getattr(given, spec.name) for spec in dataclasses.fields(kind)})  # type: ignore[arg-type]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The names and values of a YAML settings file.

    Raises:
        DvirlError: if it cannot be read, is no mapping, or has aliases, by which a short file can stand for a huge one.
    """
    text = read_text(path)
    try:
        yaml.compose(text)  # ends early where nesting is too deep, which the next line would take long over
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise yaml.YAMLError("an alias, written *name, is not read here")
        values = yaml.safe_load(text)
    except Exception as error:  # for a bad tag, date or number PyYAML raises what its own code runs into
        raise DvirlError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise DvirlError(f"{path}: expected a mapping of settings to values")
    return {str(name): value for name, value in values.items()}


def _field_docs(kind: type[Any]) -> dict[str, str]:
    """The docstring under each field, those of base classes included."""
    texts: dict[str, str] = {}
    for owner in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                assert isinstance(statement.target, ast.Name) and isinstance(following.value, ast.Constant)
                texts[statement.target.id] = str(following.value.value).replace("%", "%%")
    return texts


def with_help(kind: type[Config]) -> type[Config]:
    """The same settings class with each field's docstring as its `help` metadata, which HfArgumentParser shows."""
    texts = _field_docs(kind)
    specs = [
        (spec.name, spec.type, field(default=spec.default, metadata={"help": texts[spec.name]}))
        for spec in dataclasses.fields(kind)  # type: ignore[arg-type]
    ]
    return dataclasses.make_dataclass(kind.__name__, specs)


def parse_args(kind: type[Config], prog: str, description: str, argv: Sequence[str]) -> Config:
    """Settings from flags, on top of a YAML file if `--config` names one, or of those of a run that is to `--resume`.

    Raises:
        DvirlError: for an unknown or bad setting; unknown flags end the program as argparse does, with exit code 2.
    """
    first = ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config", default="", help="YAML file of settings; flags override it")
    parser = HfArgumentParser(with_help(kind), prog=prog, description=description, parents=[first])
    first.add_argument("--resume", default="")
    given = first.parse_known_args(argv)[0]
    path = given.config or (f"{given.resume}/config.yaml" if given.resume else "")
    if path:
        values = read_yaml(path)
        values = values["config"] if isinstance(values.get("config"), dict) else values  # a run's file has more
        from_mapping(kind, values, path)
        parser.set_defaults(**values)
    args = parser.parse_args(list(argv))
    del args.config
    return from_mapping(kind, vars(args), "arguments")


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, and its members of theirs; a whole number is a float too, a bool is no number."""
    if isinstance(kind, UnionType):
        return any(has_type(value, one) for one in get_args(kind))
    if type(value) is get_origin(kind):  # list[inner] or dict[inner, last]
        (inner, *_, last), values = get_args(kind) * 2, value.values() if isinstance(value, dict) else ()
        return all(has_type(one, inner) for one in value) and all(has_type(one, last) for one in values)
    return kind in (Any, object) or type(value) in ((int, float) if kind is float else (kind,))
