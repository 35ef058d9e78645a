"""Traces: the moments of single requests, one line of JSON in the log for each that is sampled.

The settings are the protocol's, for the whole server or for one model: `trace_level` is OFF or
TIMESTAMPS, one of `trace_rate` requests is traced, and after `trace_count` of them no more (-1 for
no end). The moments have Triton's names; they are in nanoseconds of a clock that only goes forward.
"""

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Mapping

from aqt_protos import open_inference_pb2 as pb
from aqt_server.errors import InvalidRequest
from aqt_server.statistics import Times

_log = logging.getLogger(__name__)
_ID_CHARACTERS = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which requests are traced, as the protocol writes it."""

    trace_level: str = "OFF"
    trace_rate: str = "1000"
    trace_count: str = "-1"


class _Sampler:
    """Counts the requests under one set of rules."""

    def __init__(self, rules: Rules):
        self._on = rules.trace_level == "TIMESTAMPS"
        self._rate = int(rules.trace_rate)
        self._left = int(rules.trace_count)
        self._seen = itertools.count()

    def take(self) -> bool:
        if not self._on or not self._left or next(self._seen) % self._rate:
            return False
        self._left -= self._left > 0
        return True


class Tracer:
    """The rules of the server and of each model, and the traces that follow from them."""

    def __init__(self):
        self._changes: dict[str, dict[str, str]] = {}
        self._samplers = {"": _Sampler(Rules())}

    def rules(self, model: str) -> Rules:
        """The rules for `model`, or with "" for models that have none of their own."""
        return Rules(**{**self._changes.get("", {}), **self._changes.get(model, {})})

    def update(self, model: str, settings: Mapping[str, list[str]]) -> None:
        """Changes rules, all or none; an empty list takes one back to what it was at first.

        For a model, that is the rule of the server.

        Raises:
          InvalidRequest: there is no such rule, or it cannot have such a value.
        """
        for name, value in settings.items():
            if value:
                _check(name, value)
            else:
                _check_name(name)
        changes = {**self._changes.get(model, {})}
        for name, value in settings.items():
            changes.pop(name, None)
            if value:
                changes[name] = value[0]
        self._changes[model] = changes
        # Counting begins anew wherever these rules hold.
        self._samplers = {
            name: _Sampler(self.rules(name)) for name, own in self._changes.items() if own
        }
        self._samplers[""] = _Sampler(self.rules(""))

    def trace(
        self,
        request: pb.ModelInferRequest,
        *,
        model: str,
        version: int,
        arrived: int,
        times: Times | None,
    ) -> None:
        """Logs the moments of `request`, which is answered now, if it is its turn.

        Without `times` it was answered from the cache, and has only a first and a last moment.
        """
        if not self._samplers.get(model, self._samplers[""]).take():
            return
        document = {
            "id": request.id[:_ID_CHARACTERS],
            "model_name": model,
            "model_version": version,
            "REQUEST_START": arrived,
        }
        if times:
            document |= {
                "QUEUE_START": times.queued,
                "COMPUTE_START": times.started,
                "COMPUTE_INPUT_END": times.inputs_ready,
                "COMPUTE_OUTPUT_START": times.computed,
                "COMPUTE_END": times.finished,
            }
        document["REQUEST_END"] = time.monotonic_ns()
        _log.info("%s", json.dumps(document))


def _check_name(name: str) -> None:
    known = [field.name for field in dataclasses.fields(Rules)]
    if name not in known:
        raise InvalidRequest(
            f"trace setting {name!r} is not one that a client can change here: there are "
            f"{', '.join(known)}"
        )


def _check(name: str, value: list[str]) -> None:
    _check_name(name)
    (text, *more) = value
    if name == "trace_level":
        fits, expected = text in ("OFF", "TIMESTAMPS"), "OFF or TIMESTAMPS"
    elif name == "trace_rate":
        fits, expected = _is_number(text) and int(text) > 0, "a number from 1"
    else:
        fits, expected = text == "-1" or _is_number(text), "a number from 0, or -1 for no end"
    if more or not fits:
        raise InvalidRequest(f"trace setting {name!r} is {', '.join(value)!r}: send {expected}")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 19
