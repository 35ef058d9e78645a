"""Exactness under attack: live servers, random requests, restarts; and what is not exact is caught.

`make attack` does the same with 100,000 requests and every small model of the zoo.
"""

import asyncio
import secrets

import pytest

from exactness.attack import attack
from exactness.pools import convert_all
from exactness.replica import Replica, two_replicas

pytestmark = pytest.mark.slow

MODELS = ("patients_int8", "language_int8")
LENGTHS = (16, 64)
REQUESTS = 400


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    repository = tmp_path_factory.mktemp("bundles")
    return repository, convert_all(MODELS, repository, LENGTHS)


@pytest.mark.timeout(900)
def test_every_answer_has_the_bits_of_training_whatever_happens(bundles, tmp_path):
    repository, pools = bundles
    with two_replicas(repository, tmp_path) as (polling, explicit):
        tally = asyncio.run(
            attack(
                pools,
                [polling, explicit],
                requests=REQUESTS,
                seed=secrets.randbelow(2**32),
                disturbances=[
                    ("killed", polling.kill),
                    ("loaded again", explicit.reload),
                    ("a new version", polling.new_version),
                    ("restarted", explicit.restart),
                ],
            )
        )
    print(tally)
    assert not tally.wrong, "\n".join(tally.wrong)
    assert sum(tally.disturbances.values()) == 4
    assert tally.answers.keys() == set(MODELS)
    assert sum(tally.answers.values()) > 0.9 * REQUESTS
    assert tally.cancelled
    assert tally.refused


def test_what_is_not_exact_is_caught(bundles, tmp_path):
    repository, pools = bundles
    with Replica(repository, tmp_path / "fast", "--fast-model", "*") as fast:
        tally = asyncio.run(attack(pools, [fast], requests=300, seed=0, exact=False))
    assert tally.differing
    assert tally.wrong
