"""All settings of the server, in groups by the question that they answer.

A setting has one name everywhere: `port` is the flag --port, the variable AQT_PORT and the key
`port` in the table `[listen]` of a file. `configuration` reads them. None holds a secret: what is
secret stands in a file, and a setting says in which.
"""

from aqt_server.settings.access import Access as Access
from aqt_server.settings.access import Exempt as Exempt
from aqt_server.settings.connections import Connections as Connections
from aqt_server.settings.connections import Listen as Listen
from aqt_server.settings.connections import Tls as Tls
from aqt_server.settings.devices import Devices as Devices
from aqt_server.settings.models import ModelControl as ModelControl
from aqt_server.settings.models import Models as Models
from aqt_server.settings.models import Serving as Serving
from aqt_server.settings.observe import LogFormat as LogFormat
from aqt_server.settings.observe import Observe as Observe
from aqt_server.settings.requests import Batching as Batching
from aqt_server.settings.requests import Limits as Limits
from aqt_server.settings.settings import Contradiction as Contradiction
from aqt_server.settings.settings import Settings as Settings

__all__ = [
    "Access",
    "Batching",
    "Connections",
    "Contradiction",
    "Devices",
    "Exempt",
    "Limits",
    "Listen",
    "LogFormat",
    "ModelControl",
    "Models",
    "Observe",
    "Serving",
    "Settings",
    "Tls",
]
