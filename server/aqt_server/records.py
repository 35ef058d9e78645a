"""How records of the log are written: as lines of text, or of JSON with what they are about."""

import contextlib
import contextvars
import datetime
import json
import logging
from collections.abc import Generator, Mapping
from typing import Any

from aqt_server.settings import LogFormat
from aqt_server.spans import trace_id

_about = contextvars.ContextVar[dict[str, str]]("about", default={})  # noqa: B039 - never changed


@contextlib.contextmanager
def about(fields: Mapping[str, str]) -> Generator[None]:
    """Records that are made in the block have `fields`, those of them that are not empty."""
    token = _about.set({name: value for name, value in fields.items() if value})
    try:
        yield
    finally:
        _about.reset(token)


class _JsonFormatter(logging.Formatter):
    """One object for each record: time, level, logger, message, and what it is about."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        document: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_about.get(),
        }
        if found := trace_id():
            document["trace_id"] = found
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document)


def use(form: LogFormat) -> None:
    """Writes all records to standard error in `form`."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        _JsonFormatter()
        if form is LogFormat.JSON
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    # By force, as what was imported may have put a handler of its own in place.
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("aqt_server").setLevel(logging.INFO)
