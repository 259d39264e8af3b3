"""What a training is told: one flat table, from a TOML file and the command line."""

import argparse
import dataclasses
import math
import types
import typing
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from faceparse.data import DATASETS, LABELS
from faceparse.inference.face_crops import VIEWS
from faceparse.models import MODELS, SECOND_STAGE


class SettingsError(ValueError):
    """A setting that cannot be; the message is one line and names it and where it stands."""


def _setting(default, meaning, *, choices=None, low=-math.inf, high=math.inf):
    metadata = {"meaning": meaning, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the result of a training, but for the data's place on the disk.

    A field is a key of the TOML file, and with dashes an option of train.py.
    """

    dataset: str = _setting("synthetic", "the data set", choices=tuple(DATASETS))
    mix: str = _setting("", "further sets to train on, by comma")
    labels: str = _setting("coarse", "which classes, of the whole and of the face", choices=LABELS)
    view: str = _setting("whole", "what the network is shown of a face", choices=VIEWS)
    model: str = _setting("rnn-g", "the network", choices=(*MODELS, *SECOND_STAGE))
    limit: int | None = _setting(None, "use N faces of each split at most", low=1)
    seed: int = _setting(0, "of the weights and of all that is drawn", low=0, high=2**63 - 1)
    epochs: int = _setting(20, "passes over the training faces", low=1)
    batch_size: int = _setting(10, "faces a step, in each process", low=1, high=2**20)
    lr: float = _setting(4e-3, "learning rate of AdamW", low=1e-9, high=1e3)
    schedule: str = _setting(
        "constant", "of the learning rate, after a warm-up", choices=("constant", "cosine")
    )
    weight_decay: float = _setting(0.0, "of AdamW", low=0, high=1)
    clip: float = _setting(0.0, "the gradient's norm is held at this, if not 0", low=0, high=1e6)
    amp: str = _setting("off", "autocast to this type", choices=("off", "bfloat16", "float16"))
    weight_output: float = _setting(1.0, "of the loss of the output", low=0, high=1e6)
    weight_x: float = _setting(1.0, "of the loss of X", low=0, high=1e6)
    weight_boundary: float = _setting(1.0, "of the loss of the gate", low=0, high=1e6)
    background: int = _setting(
        0, "background pixels for each other one in every loss; 0: all pixels", low=0, high=2**20
    )


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
_TYPES = typing.get_type_hints(Settings)


def _kind(name):
    """The type of a setting, without None."""
    kind = _TYPES[name]
    if isinstance(kind, types.UnionType):
        kind = next(k for k in kind.__args__ if k is not types.NoneType)
    return kind


def check(name, value):
    """``value`` in the setting's type; ValueError says in words why it cannot be."""
    kind, rule = _kind(name), FIELDS[name].metadata
    if value is None and FIELDS[name].default is None:
        return None
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:  # of more than 308 digits
            value = math.inf if value > 0 else -math.inf
    if type(value) is not kind:
        raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")
    if rule["choices"] and value not in rule["choices"]:
        raise ValueError(f"{name} must be one of {', '.join(rule['choices'])}, got {value!r}")
    if kind is not str and not rule["low"] <= value <= rule["high"]:
        raise ValueError(f"{name} must be in {rule['low']} .. {rule['high']}, got {value!r}")
    return value


def read_file(path):
    """The settings in a TOML file, by name.

    Raises:
        SettingsError: no such file, not TOML, an unknown key or a value that cannot be.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # tomllib's own is a ValueError
        raise SettingsError(f"cannot read the settings in {path}: {error}") from None
    for name, value in table.items():
        if name not in FIELDS:
            known = ", ".join(FIELDS)
            raise SettingsError(f"{path}: unknown setting {name!r}; there are {known}")
        try:
            table[name] = check(name, value)
        except ValueError as error:
            raise SettingsError(f"{path}: {error}") from None
    return table


def add_options(parser, *, without=()):
    """One option for each setting; an option that is not given is None in the result."""
    for name, field in FIELDS.items():
        if name in without:
            continue
        rule, kind = field.metadata, _kind(name)
        default = "" if field.default is None else f"; default: {field.default}"
        parser.add_argument(
            option(name),
            type=_converter(name, kind),
            choices=rule["choices"],
            help=rule["meaning"] + default,
        )


def option(name):
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")


def given_options(args):
    """The settings that the command line names, by name."""
    values = {name: getattr(args, name, None) for name in FIELDS if name != "mix"}
    return {name: value for name, value in values.items() if value is not None}


def _converter(name, kind):
    def convert(text):
        value = kind(text)
        if kind is not str:
            try:
                check(name, value)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
        return value

    convert.__name__ = kind.__name__  # argparse names the type by it
    return convert
