"""The groups put together, and which settings do not go together."""

import dataclasses

from aqt_server.settings.access import Access
from aqt_server.settings.connections import Connections, Listen, Tls
from aqt_server.settings.devices import Devices
from aqt_server.settings.models import ModelControl, Models, Serving
from aqt_server.settings.observe import Observe
from aqt_server.settings.requests import Batching, Limits


class Contradiction(Exception):
    """Settings that do not go together.

    The sentence has each of them in braces, for whoever knows where they were given.
    """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All of them. A field is a table in a file; its settings are flags and variables too."""

    models: Models
    serving: Serving = Serving()
    batching: Batching = Batching()
    devices: Devices = Devices()
    listen: Listen = Listen()
    connections: Connections = Connections()
    limits: Limits = Limits()
    tls: Tls = Tls()
    access: Access = Access()
    observe: Observe = Observe()

    def __post_init__(self):
        tls, access = self.tls, self.access
        if bool(tls.tls_certificate) != bool(tls.tls_key):
            raise Contradiction(
                "{tls_certificate} and {tls_key} need each other, and one is missing"
            )
        if tls.tls_client_ca and not tls.tls_certificate:
            raise Contradiction("{tls_client_ca} needs {tls_certificate}, which is missing")
        if (access.auth_issuer or access.auth_audience) and not access.auth_jwks:
            raise Contradiction(
                "{auth_issuer} and {auth_audience} need {auth_jwks}, which is missing"
            )
        if self.listen.fast_port >= 0 and tls.tls_certificate:
            raise Contradiction("{fast_port} has no TLS, and {tls_certificate} asks for it")
        if self.observe.profile_directory and self.listen.http_port < 0:
            raise Contradiction("{profile_directory} needs {http_port}, and it is -1")
        if self.observe.status_page and self.listen.http_port < 0:
            raise Contradiction("{status_page} needs {http_port}, and it is -1")
        if access.auth_policy and not (access.auth_tokens or access.auth_jwks or tls.tls_client_ca):
            raise Contradiction(
                "{auth_policy} needs {auth_tokens}, {auth_jwks} or {tls_client_ca}, for else "
                "nobody has a name"
            )
        if self.devices.copies & (self.devices.copies - 1):
            raise Contradiction(
                "{copies} has to be a power of two, as the sizes of batches are, and it is "
                f"{self.devices.copies}"
            )
        self._check_hosts()
        if self.models.load_model and self.models.model_control is not ModelControl.EXPLICIT:
            raise Contradiction(
                "{load_model} needs {model_control} explicit, and it is "
                f"{self.models.model_control}"
            )

    def _check_hosts(self) -> None:
        devices = self.devices
        if devices.host_index >= devices.hosts:
            raise Contradiction(
                f"{{host_index}} is below {{hosts}}, and they are {devices.host_index} and "
                f"{devices.hosts}"
            )
        host, _, port = devices.coordinator.rpartition(":")
        if devices.hosts > 1 and not (host and port.isdecimal() and int(port) < 2**16):
            raise Contradiction(
                "{hosts} need {coordinator}, the address and port of the one that leads, and it is "
                f"'{devices.coordinator}'"
            )
        if devices.copies * devices.shards % devices.hosts:
            raise Contradiction(
                f"{{copies}} times {{shards}} are {devices.copies * devices.shards} devices, and "
                f"{{hosts}}, {devices.hosts}, have to have as many each"
            )
