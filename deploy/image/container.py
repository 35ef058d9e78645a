"""An image in use: a container with its own mounts and processes, as a container engine runs one.

The root file system is read-only, the user is the image's, nothing has a capability, and the server
is process 1. The network is the machine's.
"""

import contextlib
import json
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BOUND_S = 120


def buildah(*arguments: str) -> str:
    environment = os.environ | {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}
    command = ["buildah", *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=BOUND_S, check=True
    )
    return done.stdout.strip()


def configuration(image: str) -> dict[str, Any]:
    """What the image says of how it is run: `User`, `Env`, `Entrypoint` and so on."""
    return json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]


@contextlib.contextmanager
def unpacked(image: str) -> Iterator[Path]:
    """The folder that has the files of the image."""
    container = buildah("from", image)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("rm", container)


class Container:
    """A running container. `mounts` are folders of the machine by where they lie inside."""

    def __init__(
        self, root: Path, config: Mapping[str, Any], mounts: Mapping[str, Path], *arguments: str
    ):
        self._user, self._group = config["User"].split(":")
        self._environment = dict(entry.split("=", 1) for entry in config["Env"])
        script = [
            "mount --make-rprivate /",
            f"mount --bind {root} {root}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
            f"mount -t tmpfs tmpfs {root}/tmp",
            *(f"mount --bind {source} {root}{target}" for target, source in mounts.items()),
            f"mount -o remount,bind,ro {root}",
            f"cd {root}",
            f"exec chroot --userspec={config['User']} --groups= {root} "
            + shlex.join([*config["Entrypoint"], *arguments]),
        ]
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-ec", "\n".join(script)],
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout
        lines = [self._process.stdout.readline() for _ in range(3)]
        if not all(lines):
            self._process.communicate(timeout=BOUND_S)
            raise RuntimeError("the server did not start: its log says why")
        self.told = [line.split()[-1] for line in lines]
        """Where its doors are: gRPC, HTTP and metrics."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.pid = int(children.read_text())
        """Of its process 1, as the machine numbers it."""

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in it, as its user."""
        into = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--root", "--wd"]
        into += ["--setuid", self._user, "--setgid", self._group]
        return subprocess.run(
            [*into, *command],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            check=False,
        )

    def wait(self) -> int:
        """Its exit code."""
        return self._process.wait(BOUND_S)

    def close(self) -> None:
        """Ends it, if it has not ended."""
        if self._process.poll() is None:
            os.kill(self.pid, 9)
            self._process.wait(BOUND_S)
        assert self._process.stdout
        self._process.stdout.close()
