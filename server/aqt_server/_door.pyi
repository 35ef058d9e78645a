"""The compiled gRPC door, from server/native: HTTP/2 in a thread of its own, calls in batches."""

class Door:
    """Listens at once, and takes connections from `start` on; has the calls at `paths` alone.

    Raises:
      OSError: the port cannot be had.
      RuntimeError: the host is unknown.
    """

    def __init__(
        self,
        host: str,
        port: str,
        *,
        paths: list[str],
        message_bytes: int,
        buffered_bytes: int,
        connections: int,
        calls: int,
        streams: int,
        header_bytes: int,
        idle_s: float,
    ) -> None: ...
    def start(self) -> None:
        """Starts the thread."""

    def port(self) -> int:
        """Where it listens."""

    def fileno(self) -> int:
        """A descriptor that is readable while there is something to take."""

    def take(
        self,
    ) -> tuple[list[tuple[int, str, bytes, str, int, str, bytes, float]], list[int]]:
        r"""The calls that came, and the numbers of those whose answers nobody waits for any more.

        A call is its number, path, headers (name\0value\0...), peer, 1 if the message is
        compressed, by what, the message, and in how many seconds it has to be answered; negative:
        in any time.
        """

    def answer(self, answers: list[tuple[int, int, str, bytes, bytes]], /) -> None:
        r"""Answers calls, each once: number, status, sentence, trailers, message.

        Trailers are name\0value\0..., and the message is sent if the status is 0.
        """

    def close(self, grace_s: float, /) -> None:
        """Takes no more, waits for the answers so many seconds at most, and ends the thread."""
