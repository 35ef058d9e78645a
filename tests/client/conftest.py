"""What most tests of the client talk to."""

import pytest

from client.fake_server import FakeServer


@pytest.fixture
def server():
    with FakeServer() as server:
        yield server
