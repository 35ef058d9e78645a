"""Code blocks of Markdown pages, and how a page is carried out as a reader would."""

import contextlib
import dataclasses
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from compiled import for_children
from server_process import AQT, WAIT_S, serving

_FENCE = re.compile(
    r"(?:^<!-- (?P<marker>[^\n]*?) -->\n)?"
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_PORTS = {"--port": "8001", "--http-port": None, "--metrics-port": "8002"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: a file to write if it has a title, else code to run."""

    place: str
    language: str
    title: str | None
    text: str
    marker: str | None

    @property
    def why_not_run(self) -> str | None:
        found = re.fullmatch("not run: (.+)", self.marker or "")
        return found and found[1]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            place=f"{page.name}:{text.count(chr(10), 0, m.start()) + 1}",
            **m.groupdict(),
        )
        for m in _FENCE.finditer(text)
    ]


def carry_out(page: Path, *, forked: bool = True) -> None:
    """Does in the working directory what the page says, with at most one server.

    Python blocks share their names, as in one session. Where the page says localhost and a port,
    the free port is put that the server has, which is `forked` or started by the command.
    """
    with _Reader(forked=forked) as reader:
        for block in blocks(page):
            reader.read(block)


class _Reader(contextlib.ExitStack):
    def __init__(self, *, forked: bool):
        super().__init__()
        self.forked = forked
        self.names = {"__name__": "__page__"}
        self.ports: dict[str, str] = {}

    def read(self, block: Block) -> None:
        text = block.text
        for port, address in self.ports.items():
            text = text.replace(f"localhost:{port}", address)
        if block.title:
            Path(block.title).write_text(text)
        if block.language == "toml":
            tomllib.loads(text)
        elif block.title or block.why_not_run:
            pass
        elif block.language == "python":
            exec(compile(text, block.place, "exec"), self.names)
        elif text.startswith("aqt serve") and "--print-config" not in text:
            self.serve(shlex.split(text.replace("\\\n", " "))[2:])
        else:
            path = f"{AQT.parent}{os.pathsep}{os.environ['PATH']}"
            shell = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(
                shell, env={**for_children(), "PATH": path}, timeout=WAIT_S, capture_output=True
            )
            assert done.returncode == 0, (block.place, done.stderr.decode())

    def serve(self, arguments: list[str]) -> None:
        assert not self.ports, "a page starts one server at most"
        ports = dict(_PORTS)
        for flag in _PORTS:
            if flag in arguments:
                at = arguments.index(flag)
                ports[flag] = arguments[at + 1]
                del arguments[at : at + 2]
        at = arguments.index("--model-repository")
        repository = Path(arguments[at + 1])
        flags = arguments[:at] + arguments[at + 2 :]
        flags += ["--http-port", "0"] if ports["--http-port"] else []
        server = self.enter_context(
            serving(repository, *flags, log=Path("server.log"), forked=self.forked)
        )
        self.ports[ports["--port"]] = server.address
        self.ports[ports["--metrics-port"]] = urlsplit(server.metrics_url).netloc
        if ports["--http-port"]:
            self.ports[ports["--http-port"]] = urlsplit(server.http_url).netloc


def commands(page: Path) -> list[str]:
    """Indented and quoted commands of a page: `make ...` and `aqt ...`."""
    return re.findall(r"(?:^    |`)((?:make|aqt) [^`#\n]+)", page.read_text(), re.MULTILINE)
