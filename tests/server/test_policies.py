"""What a file of policies says, and how requests are shared out."""

import collections
import os
import random

import pytest

from aqt_server.policies import Policies, Policy, PolicyFileError, Versions

SPLIT = Policy(aliases={"stable": 1, "canary": 2}, split={"stable": 80, "canary": 20})


def policies(tmp_path, text):
    file = tmp_path / "policies.toml"
    file.write_text(text)
    return Policies(file)


def test_a_model_has_its_table_and_what_it_leaves_out_from_the_default(tmp_path):
    found = policies(
        tmp_path,
        '["*"]\nversions = {latest = 2}\n[a]\nversions = [3, 1]\n[b]\nversions = "all"\n'
        "[c]\naliases = {stable = 4}\n",
    )
    assert found.of("a").versions == Versions(numbers=frozenset({1, 3}))
    assert found.of("b").versions == Versions()
    assert found.of("c").versions == found.of("other").versions == Versions(latest=2)
    assert found.of("c").number("stable") == 4
    assert Policies(None).of("a") == Policy()


def test_which_versions_are_served():
    def served(policy, there):
        found = []
        for version in sorted(there, reverse=True):
            if policy.serves(version, newer=len(found)):
                found.append(version)
        return found

    assert served(Policy(), range(1, 5)) == [4, 3, 2, 1]
    assert served(Policy(versions={"latest": 2}), range(1, 5)) == [4, 3]
    assert served(Policy(versions=[1, 3, 9]), range(1, 5)) == [3, 1]
    # What has a name or a share is served whatever else is.
    assert served(Policy(versions={"latest": 1}, aliases={"old": 2}), range(1, 5)) == [4, 2]
    assert served(Policy(versions={"latest": 1}, split={"1": 1, "3": 1}), range(1, 5)) == [4, 3, 1]


WRONG = {
    "[a]\nversions = 'newest'": r"a\.versions: is \"all\", { latest = 2 } or \[1, 3\], and got",
    "[a]\nversions = {latest = 0}": r"a\.versions: is \"all\"",
    "[a]\nversions = []": r"a\.versions: is \"all\"",
    "[a]\nversions = [true]": r"a\.versions: is \"all\"",
    "[a]\nversion = 1": r"a\.version: unexpected keyword",
    "[a]\naliases = {3 = 4}": "an alias begins with a letter",
    "[a]\naliases = {stable = 0}": r"a\.aliases\.stable: input should be greater than 0",
    "[a]\nsplit = {stable = 1}": "split has 'stable', which is no alias and no version",
    "[a]\nsplit = {1 = 0}": r"a\.split\.1: input should be greater than 0",
    "a = 1": "made of tables",
    "[a": "no TOML",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_named_with_what_is_wrong(text, tmp_path):
    with pytest.raises(PolicyFileError, match=f"--model-policies .*{WRONG[text]}"):
        policies(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PolicyFileError, match=r"--model-policies .*nowhere\.toml cannot be read"):
        Policies(tmp_path / "nowhere.toml")


def test_a_request_with_an_id_has_one_share_for_ever():
    ids = [f"request-{i}" for i in range(4000)]
    shares = [SPLIT.share({1, 2}, i, random.Random(0)) for i in ids]
    assert shares == [SPLIT.share({2, 1}, i, random.Random(1)) for i in ids]
    # 4000 draws with p = 0.2: the standard deviation is 25.
    assert abs(collections.Counter(shares)[2] - 800) < 125
    # A larger share for the canary moves requests to it, and none away.
    more = Policy(aliases=SPLIT.aliases, split={"stable": 50, "canary": 50})
    moved = [(a, more.share({1, 2}, i, random.Random())) for a, i in zip(shares, ids, strict=True)]
    assert {pair for pair in moved if pair[0] != pair[1]} == {(1, 2)}


def test_a_request_without_an_id_is_drawn_by_weight():
    class Drawn:
        def choices(self, targets, weights):
            self.asked = targets, weights
            return ["canary"]

    drawn = Drawn()
    assert SPLIT.share({1, 2}, "", drawn) == 2
    assert drawn.asked == (["stable", "canary"], [80, 20])


def test_shares_are_among_what_is_ready():
    assert {SPLIT.share({1, 7}, f"{i}", random.Random()) for i in range(50)} == {1}
    assert SPLIT.share({7}, "1", random.Random()) is None
    assert Policy().share({1}, "1", random.Random()) is None


def test_a_new_content_is_read_and_a_broken_one_changes_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("aqt_server.security.watched._LOOK_S", -1.0)
    found = policies(tmp_path, "[a]\naliases = {stable = 1}")
    file = tmp_path / "policies.toml"
    for text, expected in (("[a]\naliases = {stable = 22}", 22), ("[a]\naliases = 3", 22)):
        file.write_text(text)
        os.utime(file, ns=(expected, len(text)))
        assert found.of("a").number("stable") == expected
    assert "what it held holds on" in caplog.text
