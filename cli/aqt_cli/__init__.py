"""The command `aqt`: one module for each subcommand."""

import os

# gRPC reads it when it is imported. What it writes to standard error is no record of the log, and
# has in it what clients send, byte for byte; whoever has set it gets what it says.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
