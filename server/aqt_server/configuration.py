"""Where settings come from: flags, else the environment, else a file, else their defaults.

Each value is checked as what it was written as, and one that is wrong is named by the place where
it stands: `--port`, `AQT_PORT`, or `aqt.toml line 3: [listen] port`.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pydantic
from pydantic.fields import FieldInfo

from aqt_server.settings import Contradiction, Settings

PREFIX = "AQT_"
_CONFIG = "config"


class SettingsError(Exception):
    """A setting is wrong, unknown or missing; the message says which, where it stands, and why."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """One setting: its name, the group that it is in, its type and what is said of it."""

    name: str
    group: str
    kind: Any
    default: Any
    metavar: str
    description: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def repeated(self) -> bool:
        return typing.get_origin(typing.get_args(self.kind)[0]) is tuple

    @property
    def switch(self) -> bool:
        return typing.get_args(self.kind)[0] is bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """A value as it was written, and the place where it stands. `text`: as text, so untyped."""

    value: Any
    place: str
    text: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """The settings in force, and for each that is not its default the place it comes from."""

    settings: Settings
    places: Mapping[str, str]
    print_only: bool

    def __str__(self) -> str:
        """A file for --config that gives the same settings, with their places as comments."""
        lines: list[str] = []
        for group, members in _groups().items():
            lines += ["", f"[{group}]"]
            for setting in members:
                value = _plain(getattr(getattr(self.settings, group), setting.name))
                place = self.places.get(setting.name, "default")
                # Of what settings are made of, JSON is TOML.
                written = "" if value is None else f"{setting.name} = {json.dumps(value)}  "
                lines.append(f"{written}# {place if written else setting.name + ' is not set'}")
        return "\n".join(lines[1:]) + "\n"


def read(arguments: Sequence[str], environment: Mapping[str, str]) -> Configuration:
    """The settings that command line `arguments`, `environment` and the file they name give.

    `--help` among the arguments prints it and ends the process.

    Raises:
      SettingsError: one of them is wrong.
    """
    flags = vars(_parser().parse_args(arguments))
    print_only = flags.pop("print_config")
    file = flags.pop(_CONFIG, None) or environment.get(PREFIX + _CONFIG.upper())
    settings = {s.name: s for members in _groups().values() for s in members}
    given = _from_file(Path(file)) if file else {}
    given |= {
        s.name: _Given(value=_split(s, environment[s.variable]), place=s.variable, text=True)
        for s in settings.values()
        if s.variable in environment
    }
    given |= {
        name: _Given(value=value, place=settings[name].flag, text=True)
        for name, value in flags.items()
    }
    values = {name: _checked(settings[name], one) for name, one in given.items()}
    for setting in settings.values():
        if setting.default is dataclasses.MISSING and setting.name not in given:
            raise SettingsError(
                f"{setting.flag} is missing: give the {setting.description}, as this flag, as "
                f"{setting.variable} or in a file for --config"
            )
    places = {name: one.place for name, one in given.items()}
    names = {name: places.get(name, setting.flag) for name, setting in settings.items()}
    try:
        made = Settings(
            **{
                group: kind(**{s.name: values[s.name] for s in members if s.name in values})
                for (group, members), kind in zip(_groups().items(), _kinds(), strict=True)
            }
        )
    except Contradiction as error:
        raise SettingsError(str(error).format_map(names)) from None
    return Configuration(settings=made, places=places, print_only=print_only)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none."""
    known = {s.variable for members in _groups().values() for s in members}
    # The last is the engine's own: which kernel computes.
    known |= {PREFIX + _CONFIG.upper(), "AQT_KERNELS"}
    return sorted(v for v in environment if v.startswith(PREFIX) and v not in known)


def _kinds() -> list[type]:
    return list(typing.get_type_hints(Settings).values())


@functools.cache
def _groups() -> Mapping[str, Sequence[_Setting]]:
    """The settings of each group, in the order they are declared."""
    groups: dict[str, list[_Setting]] = {}
    for group, kind in typing.get_type_hints(Settings).items():
        hints = typing.get_type_hints(kind, include_extras=True)
        groups[group] = []
        for field in dataclasses.fields(kind):
            (said,) = (m for m in hints[field.name].__metadata__ if isinstance(m, FieldInfo))
            groups[group].append(
                _Setting(
                    name=field.name,
                    group=group,
                    kind=hints[field.name],
                    default=field.default,
                    metavar=said.title or "",
                    description=said.description or "",
                )
            )
    return groups


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print."""
        flags = [s.flag for members in _groups().values() for s in members]
        unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        close = difflib.get_close_matches(unknown[0], flags, n=1) if unknown else []
        hint = f"; did you mean {close[0]}?" if close and close != unknown[:1] else ""
        raise SettingsError(f"{message}{hint}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="aqt serve",
        usage="aqt serve --model-repository DIR [OPTION ...]",
        description="Serves the bundles of a model repository over the Open Inference Protocol.",
        epilog="A flag goes before its environment variable (AQT_PORT for --port), that before the "
        "file of --config, and that before the default.",
        allow_abbrev=False,
        # What is not given is left out, so that it can come from elsewhere.
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        f"--{_CONFIG}",
        metavar="FILE",
        help="a TOML file of settings, as --print-config writes it: port = 8001 in [listen], and "
        "so on",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        default=False,
        help="print the settings in force, each with its source, and end",
    )
    for (group, members), kind in zip(_groups().items(), _kinds(), strict=True):
        section = parser.add_argument_group(f"{(kind.__doc__ or '').rstrip('.')} ([{group}])")
        for setting in members:
            _add(section, setting)
    return parser


def _add(section: Any, setting: _Setting) -> None:
    if setting.default is dataclasses.MISSING:
        told = "required"
    else:
        default = _plain(setting.default)
        told = "default: none" if default in (None, []) else f"default: {default}"
        if setting.switch:
            told = f"default: {'on' if default else 'off'}"
    text = f"{setting.description} ({told})".replace("%", "%%")
    if setting.switch:
        section.add_argument(setting.flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        action = "append" if setting.repeated else "store"
        section.add_argument(setting.flag, action=action, metavar=setting.metavar, help=text)


def _split(setting: _Setting, text: str) -> Any:
    return [part for part in text.split(",") if part] if setting.repeated else text


def _from_file(file: Path) -> dict[str, _Given]:
    try:
        text = file.read_text()
        tables = tomllib.loads(text)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"--config {file} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"--config {file} is no TOML: {error}") from error
    groups = _groups()
    homes = {s.name: group for group, members in groups.items() for s in members}
    given: dict[str, _Given] = {}
    for group, table in tables.items():
        if group not in groups or not isinstance(table, dict):
            hint = (
                f": it belongs into [{homes[group]}]" if group in homes else _among(group, groups)
            )
            raise SettingsError(f"{_place(file, text, None, group)} is no table of settings{hint}")
        for name, value in typing.cast(dict[str, Any], table).items():
            place = _place(file, text, group, name)
            if name not in homes:
                raise SettingsError(f"{place} is no setting{_among(name, homes)}")
            if homes[name] != group:
                raise SettingsError(f"{place} is in the wrong table: move it to [{homes[name]}]")
            given[name] = _Given(value=value, place=place, text=False)
    return given


def _place(file: Path, text: str, group: str | None, name: str) -> str:
    """FILE line N: [group] name; without the number where the key does not begin its line."""
    table = None
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.partition("=")[0].strip().strip('"')
        if key.startswith("["):
            table = key.strip("[] ")
            key = table if group is None else key
        if key == name and (group is None or table == group):
            file_and_line = f"{file} line {number}"
            break
    else:
        file_and_line = str(file)
    return f"{file_and_line}: [{group}] {name}" if group else f"{file_and_line}: {name}"


def _among(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]}?" if close else f": there are {', '.join(known)}"


def _checked(setting: _Setting, given: _Given) -> Any:
    """The value in the setting's type.

    Raises:
      SettingsError: it has none.
    """
    form = pydantic.TypeAdapter[Any](setting.kind)
    try:
        if given.text:
            return form.validate_python(given.value)
        # As JSON, where a string is a path but no number: a file has types.
        return form.validate_json(json.dumps(given.value, default=str), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise SettingsError(f"{given.place} is wrong (got {given.value!r}): {message}") from None


def _plain(value: Any) -> Any:
    """`value` as a file has it."""
    if isinstance(value, tuple):
        return [_plain(v) for v in typing.cast(tuple[Any, ...], value)]
    return str(value) if isinstance(value, (Path, str)) else value
