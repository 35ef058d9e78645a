"""Where a channel leads, and who calls on it."""

import json
import socket
from collections.abc import Callable, Sequence

from aqt_client._calls import MAX_MESSAGE_NBYTES

Address = str | Sequence[str]
Token = str | Callable[[], str]

_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_NBYTES),
    # A server that restarts is back in a second or two, and gRPC would wait up to two minutes
    # before it connects again, failing every attempt meanwhile.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_BALANCED = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        # A server that loads, stops or hangs up is left out; one without the service is healthy.
        "healthCheckConfig": {"serviceName": ""},
    }
)


def channel_arguments(address: Address) -> tuple[str, tuple[tuple[str, str | int], ...]]:
    """The target and the options of a channel to `address`.

    Raises:
      ValueError: there is no address, or one of several is no "host:port" that has an IP.
    """
    if isinstance(address, str):
        return address, _OPTIONS
    options = (*_OPTIONS, ("grpc.service_config", _BALANCED))
    if not address:
        raise ValueError("`address` is empty: give one or more of the form 'host:port'")
    if len(address) == 1:
        return address[0], options
    first = address[0].rpartition(":")[0]
    return _target(address), (*options, ("grpc.default_authority", first))


def metadata(token: Token | None) -> tuple[tuple[str, str], ...]:
    """What goes with an attempt: the token of who calls, if there is one."""
    if token is None:
        return ()
    return (("authorization", f"Bearer {token if isinstance(token, str) else token()}"),)


def _target(addresses: Sequence[str]) -> str:
    """All of them in the form in which gRPC takes several: by their IPs, of one family."""
    ips: dict[str, None] = {}
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`address` has {address!r}, which is no 'host:port' with an IP: {error}"
            ) from error
        in_4 = {str(place[4][0]): None for place in found if place[0] == socket.AF_INET}
        in_6 = {f"[{place[4][0]}]": None for place in found if place[0] == socket.AF_INET6}
        ips |= {f"{ip}:{int(port)}": None for ip in in_4 or in_6}
    families = {"ipv6" if ip.startswith("[") else "ipv4" for ip in ips}
    if len(families) > 1:
        raise ValueError(f"`address` has both IPv4 and IPv6, and gRPC takes one: {list(ips)}")
    return f"{families.pop()}:{','.join(ips)}"
