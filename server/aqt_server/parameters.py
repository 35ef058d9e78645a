"""The protocol's reserved parameters: of the right type and range, or INVALID_ARGUMENT.

Parameters that are not reserved are never looked at.
"""

from collections.abc import Mapping

from aqt_protos import open_inference_pb2 as pb
from aqt_server.errors import InvalidRequest

Parameters = Mapping[str, pb.InferParameter]


def integer(parameters: Parameters, name: str, owner: str, *, largest: int = 2**63 - 1) -> int:
    """The parameter `name` of `owner`, a whole number from 0 to `largest`; 0 where it is absent.

    Raises:
      InvalidRequest: it has another type, or is out of that range.
    """
    value = _value(parameters, name, owner, ("int64_param", "uint64_param"), "a whole number")
    if value is None:
        return 0
    if not isinstance(value, int) or not 0 <= value <= largest:
        raise InvalidRequest(
            f"parameter {name!r} of {owner} is {value}: send a number from 0 to {largest}"
        )
    return value


def text(parameters: Parameters, name: str, owner: str) -> str:
    """The parameter `name` of `owner`, a string; empty where it is absent.

    Raises:
      InvalidRequest: it has another type.
    """
    value = _value(parameters, name, owner, ("string_param",), "a string")
    return "" if value is None else str(value)


def _value(
    parameters: Parameters, name: str, owner: str, fields: tuple[str, ...], kind: str
) -> int | str | None:
    # Asked for with `in`: to read a map of messages is to create the entry.
    if name not in parameters:
        return None
    field = parameters[name].WhichOneof("parameter_choice")
    if field not in fields:
        raise InvalidRequest(
            f"parameter {name!r} of {owner} is in `{field or 'no field'}`: send {kind} in "
            f"`{'` or `'.join(fields)}`"
        )
    return getattr(parameters[name], field)
