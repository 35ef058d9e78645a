"""`aqt health`: whether a server serves, for the health checks of containers."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer


def health(
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the server listens.")
    ] = "localhost:8001",
    ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM of who vouches for it, if it speaks TLS."),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="To wait for it.")] = 5.0,
) -> None:
    """Asks grpc.health.v1; the exit code is 0 if the server takes requests, else 1."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    stub: Any = health_pb2_grpc.HealthStub  # it sets its methods when it is made
    if ca is None:
        channel = grpc.insecure_channel(server)
    else:
        credentials = grpc.ssl_channel_credentials(ca.read_bytes())
        channel = grpc.secure_channel(server, credentials)
    with channel:
        try:
            answer = stub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            told = cast(grpc.Call, error).details()
            typer.echo(f"{server} does not answer: {told}")
            raise typer.Exit(1) from None
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    typer.echo(f"{server} is {'serving' if serving else 'not serving'}")
    raise typer.Exit(not serving)
