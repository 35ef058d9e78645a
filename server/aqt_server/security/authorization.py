"""What a principal may do: rules from a file, of which one has to allow what is asked.

    [[allow]]
    principals = ["team-a", "ci-*"]
    actions = ["infer"]
    models = ["digits", "iris-*"]      # all, if left out

Without a file, whoever is authenticated may do everything. Without authentication, everyone may.
"""

import enum
import fnmatch
import tomllib
from pathlib import Path
from typing import Any

import pydantic

from aqt_server.errors import PermissionDenied, Unauthenticated
from aqt_server.security.authentication import (
    ANONYMOUS,
    AccessFileError,
    Authenticator,
    Principal,
)
from aqt_server.security.watched import Watched, of_setting
from aqt_server.settings import Access, Exempt, Tls


class Action(enum.StrEnum):
    """What can be allowed."""

    HEALTH = "health"
    """To ask whether the server and its models live and are ready."""
    REFLECTION = "reflection"
    """To ask for the definitions of the services."""
    METRICS = "metrics"
    """To read the metrics."""
    READ = "read"
    """To see a model: its signature, configuration, statistics and state. Comes with the next."""
    INFER = "infer"
    """To send requests to a model."""
    CONTROL = "control"
    """To load and unload a model."""
    SHARED_MEMORY = "shared_memory"
    """To register regions of shared memory, which are seen by the principal alone."""
    ADMINISTER = "administer"
    """To change what is traced and logged, and to take profiles."""


_OF_MODELS = (Action.READ, Action.INFER, Action.CONTROL)
_NEEDS = {
    "ServerLive": Action.HEALTH,
    "ServerReady": Action.HEALTH,
    "ServerMetadata": Action.HEALTH,
    "ModelReady": Action.READ,
    "ModelMetadata": Action.READ,
    "ModelConfig": Action.READ,
    "ModelStatistics": Action.READ,
    "RepositoryIndex": Action.READ,
    "ModelInfer": Action.INFER,
    "RepositoryModelLoad": Action.CONTROL,
    "RepositoryModelUnload": Action.CONTROL,
    "SystemSharedMemoryStatus": Action.SHARED_MEMORY,
    "SystemSharedMemoryRegister": Action.SHARED_MEMORY,
    "SystemSharedMemoryUnregister": Action.SHARED_MEMORY,
    "CudaSharedMemoryStatus": Action.SHARED_MEMORY,
    "CudaSharedMemoryRegister": Action.SHARED_MEMORY,
    "CudaSharedMemoryUnregister": Action.SHARED_MEMORY,
    "TraceSetting": Action.ADMINISTER,
    "LogSettings": Action.ADMINISTER,
}


def needed(rpc: str, request: Any) -> tuple[Action, str]:
    """The action that `request` of `rpc` is, and the model that it is about, "" for none or all."""
    return _NEEDS[rpc], getattr(request, "model_name", "") or getattr(request, "name", "")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class Rule:
    """Allows `actions` to `principals`, on `models` where the action is about one; both globs."""

    principals: tuple[str, ...]
    actions: tuple[Action, ...]
    models: tuple[str, ...] = ("*",)

    def allows(self, principal: str, action: Action, model: str) -> bool:
        """Whether it does; READ comes with everything else that is about the model."""
        return (
            (action in self.actions or (action is Action.READ and self._about_models))
            and any(fnmatch.fnmatchcase(principal, glob) for glob in self.principals)
            and (
                action not in _OF_MODELS
                or not model
                or any(fnmatch.fnmatchcase(model, glob) for glob in self.models)
            )
        )

    @property
    def _about_models(self) -> bool:
        return any(action in _OF_MODELS for action in self.actions)


class Guard:
    """Decides who may do what.

    Raises:
      AccessFileError: a file that the settings name cannot be used.
    """

    def __init__(self, access: Access, tls: Tls):
        self.authenticator = Authenticator(access, tls)
        self._exempt = frozenset(Action(e) for e in Exempt if e in access.auth_exempt)
        self._rules: Watched[tuple[Rule, ...]] | None = None
        if policy := access.auth_policy:
            self._rules = of_setting(
                "--auth-policy", policy, lambda: _read_rules(policy), AccessFileError
            )

    def check(self, principal: Principal, action: Action, model: str = "") -> None:
        """Returns if `principal` may.

        Raises:
          Unauthenticated: it is nobody's, and somebody may.
          PermissionDenied: it may not.
        """
        if self.allows(principal, action, model):
            return
        if principal == ANONYMOUS:
            raise Unauthenticated(
                "who calls is not known: send the header `authorization: Bearer TOKEN`"
                if self.authenticator.by_token
                else "who calls is not known: connect with a certificate that has a name"
            )
        of = f" on model {model!r}" if model and action in _OF_MODELS else ""
        raise PermissionDenied(f"{principal.name!r} may not {action}{of}: the policy has no rule")

    def allows(self, principal: Principal, action: Action, model: str = "") -> bool:
        """Whether `principal` may."""
        if not self.authenticator.required or action in self._exempt:
            return True
        if principal == ANONYMOUS:
            return False
        if self._rules is None or action is Action.HEALTH or action is Action.REFLECTION:
            return True
        return any(rule.allows(principal.name, action, model) for rule in self._rules.value)


def _read_rules(file: Path) -> tuple[Rule, ...]:
    try:
        document = tomllib.loads(file.read_text())
        form = pydantic.TypeAdapter(dict[str, tuple[Rule, ...]])
        rules = form.validate_python(document)
        if rules.keys() != {"allow"}:
            raise AccessFileError(f"{file} is made of tables [[allow]], and has {sorted(rules)}")
        return rules["allow"]
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AccessFileError(f"{file}: {where}: {first['msg'].lower()}") from error
    except (tomllib.TOMLDecodeError, UnicodeError) as error:
        raise AccessFileError(f"{file} is no TOML: {error}") from error
