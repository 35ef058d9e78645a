"""What the protocol's LogSettings turn on and off, on top of Python's logging."""

import logging

from aqt_protos import open_inference_pb2 as pb
from aqt_server.errors import InvalidRequest

_SWITCHES = {
    "log_info": logging.INFO,
    "log_warning": logging.WARNING,
    "log_error": logging.ERROR,
}
_FIXED = {"log_file": "", "log_format": "default"}
_SERVER = logging.getLogger("aqt_server")


class LogSettings(logging.Filter):
    """Drops the records of the levels that are turned off.

    `log_verbose_level` above 0 adds records of level DEBUG: one line for each request. Where the
    log goes, and its format, are for who starts the server to say and not for its clients.
    """

    def __init__(self):
        super().__init__()
        self._on = dict.fromkeys(_SWITCHES, True)
        self._verbose_level = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is logged."""
        level = min(record.levelno, logging.ERROR)
        return all(self._on[name] for name, of in _SWITCHES.items() if of == level)

    def update(self, request: pb.LogSettingsRequest) -> None:
        """Changes what `request` gives a value for, all of it or nothing.

        Raises:
          InvalidRequest: there is no such setting, it cannot be changed, or the type is wrong.
        """
        given = {
            name: value
            for name, value in request.settings.items()
            if value.WhichOneof("parameter_choice")
        }
        for name, value in given.items():
            _check(name, value)
        for name, value in given.items():
            if name in _SWITCHES:
                self._on[name] = value.bool_param
            elif name == "log_verbose_level":
                self._verbose_level = value.uint32_param
        _SERVER.setLevel(logging.DEBUG if self._verbose_level else logging.INFO)

    def describe(self) -> pb.LogSettingsResponse:
        """All settings."""
        response = pb.LogSettingsResponse()
        for name, text in _FIXED.items():
            response.settings[name].string_param = text
        for name, on in self._on.items():
            response.settings[name].bool_param = on
        response.settings["log_verbose_level"].uint32_param = self._verbose_level
        return response


def _check(name: str, value: pb.LogSettingsRequest.SettingValue) -> None:
    fields = (
        dict.fromkeys(_SWITCHES, "bool_param")
        | dict.fromkeys(_FIXED, "string_param")
        | {"log_verbose_level": "uint32_param"}
    )
    if name not in fields:
        raise InvalidRequest(f"there is no log setting {name!r}: there are {', '.join(fields)}")
    field = value.WhichOneof("parameter_choice")
    if field != fields[name]:
        raise InvalidRequest(f"log setting {name!r} is in `{field}`: send it in `{fields[name]}`")
    if name in _FIXED and value.string_param != _FIXED[name]:
        raise InvalidRequest(
            f"log setting {name!r} cannot be changed by a client: the log is what the server "
            f"writes to its standard error, and who starts it says where that goes"
        )
