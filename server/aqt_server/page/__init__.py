"""The status page: what the server does, for a browser. Off unless the settings ask for it."""
