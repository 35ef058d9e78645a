"""The command `aqt`: one module for each subcommand."""
