"""What several modules of tests serve."""

import pytest

from bundles import write_linear
from server.messages import MODEL
from server.odd_bundles import write_identity


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A linear model and an identity; a module that serves others has a fixture of its own."""
    root = tmp_path_factory.mktemp("repository")
    write_linear(root / MODEL / "1")
    write_identity(root / "identity" / "1")
    return root
