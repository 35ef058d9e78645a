"""The manifest: whatever is wrong with it is refused with a sentence, never with a stray error."""

import copy
import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import bundles
from aqt_engine import bundle
from aqt_engine.bundle import BundleError
from aqt_engine.files import digest, files
from aqt_engine.manifest import FileDigest
from engine.contractions import assert_same_bits


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("repository") / "linear" / "1"
    bundles.write_linear(path)
    return path


@pytest.fixture
def own(written, tmp_path):
    path = tmp_path / "1"
    shutil.copytree(written, path)
    return path


def refusal(root, named):
    """The sentence with which `root` is refused, which has to have `named` in it."""
    with pytest.raises(BundleError) as caught:
        bundle.load(root)
    assert str(caught.value).startswith(str(root))
    assert named in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", ["null", "[]", "1", '"x"', "{}", "", "NaN", "\xff", "[" * 500])
def test_what_is_no_manifest_is_refused(own, text):
    (own / "manifest.json").write_text(text, encoding="latin-1")
    assert "no JSON manifest" in refusal(own, "manifest.json")


@pytest.mark.parametrize("version", [4, 0, 10**30, "1", None, True, [1], {}])
def test_another_format_is_refused_by_its_name(own, version):
    document = json.loads((own / "manifest.json").read_text())
    for changed in (document | {"format_version": version}, {"format_version": version}):
        (own / "manifest.json").write_text(json.dumps(changed))
        message = refusal(own, f"has bundle format {version!r} and this program reads 1 to 3")
        assert "use a newer aqt, or write it again with `aqt convert`" in message


def edits(document):
    """Copies of the manifest in each of which one field is missing, new or of another type."""

    def places(part, prefix=()):
        keys = list(part) if isinstance(part, dict) else range(len(part))
        for key in keys:
            yield (*prefix, key)
            if isinstance(part[key], dict | list) and prefix[:1] != ("files",):
                yield from places(part[key], (*prefix, key))

    for place in places(document):
        for value in ("missing", None, 7, -1, "x", 0.5, [], {}, [None]):
            changed = copy.deepcopy(document)
            part = changed
            for key in place[:-1]:
                part = part[key]
            if value == "missing":
                del part[place[-1]]
            else:
                part[place[-1]] = value
            if changed != document:
                yield (*place, value), changed
    yield ("extra",), document | {"extra": 1}


def test_a_manifest_that_was_edited_is_refused(own):
    whole = (own / "manifest.json").read_text()
    try:
        for place, changed in edits(json.loads(whole)):
            (own / "manifest.json").write_text(json.dumps(changed))
            with pytest.raises(BundleError, match=r"was changed after|damaged|has bundle format"):
                pytest.fail(f"{place} was taken: {bundle.read_manifest(own)}")
    finally:
        (own / "manifest.json").write_text(whole)


def test_every_bit_of_the_manifest_counts(own):
    whole = (own / "manifest.json").read_bytes()
    try:
        for position in range(0, len(whole), 7):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            (own / "manifest.json").write_bytes(flipped)
            with pytest.raises(BundleError):
                bundle.read_manifest(own)
    finally:
        (own / "manifest.json").write_bytes(whole)


def signed(document):
    """The document with the digest that fits it, as the format has it."""
    document = {k: v for k, v in document.items() if k != "digest"}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return json.dumps(document | {"digest": hashlib.sha256(text.encode()).hexdigest()})


def test_a_manifest_is_signed_as_the_format_has_it(own):
    document = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(signed(document))
    assert bundle.load(own).manifest == bundle.read_manifest(own)
    (own / "manifest.json").write_text(signed(document | {"tools": {"jax": "another"}}))
    assert bundle.load(own).manifest.tools == {"jax": "another"}


def test_a_manifest_of_format_1_is_read(own):
    document = json.loads((own / "manifest.json").read_text())
    for added in ("lengths", "pads", "per_request", "tile_costs", "portable"):
        del document[added]
    (own / "manifest.json").write_text(signed(document | {"format_version": 1}))
    manifest = bundle.read_manifest(own)
    assert (manifest.lengths, manifest.pads, manifest.per_request) == ({}, {}, ())


def test_arrays_of_format_2_are_read_by_their_names(own):
    """As one Orbax checkpoint with all arrays in the same files, compressed."""
    new = bundle.load(own)
    names, weights = [spec.name for spec in new.manifest.weights], [*new.weights]
    inputs, outputs = new.witness.inputs, new.witness.outputs
    for folder, stored in (
        ("weights", dict(zip(names, weights, strict=True))),
        ("witness", {"inputs/x": inputs["x"], "outputs/y": outputs["y"]}),
    ):
        shutil.rmtree(own / folder)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(own / folder, {k: np.asarray(v) for k, v in stored.items()})
    document = json.loads((own / "manifest.json").read_text()) | {"format_version": 2}
    document["files"] = {f: dataclasses.asdict(digest(own / f)) for f in files(own)}
    (own / "manifest.json").write_text(signed(document))
    old = bundle.load(own)
    found = (*old.weights, old.witness.inputs["x"], old.witness.outputs["y"])
    expected = (*weights, inputs["x"], outputs["y"])
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "weights/../../secret"])
def test_a_listed_file_outside_of_the_bundle_is_not_read(own, name):
    (own.parent.parent / "secret").write_text("secret")
    document = json.loads((own / "manifest.json").read_text())
    document["files"][name] = document["files"]["graph.stablehlo"]
    (own / "manifest.json").write_text(signed(document))
    refusal(own, f"{name} is missing")


def test_a_graph_that_jax_cannot_read_is_refused(own):
    (own / "graph.stablehlo").write_bytes(b"from a newer jax")
    document = json.loads((own / "manifest.json").read_text())
    document["files"]["graph.stablehlo"] = dataclasses.asdict(
        FileDigest(
            sha256=hashlib.sha256(b"from a newer jax").hexdigest(), nbytes=len(b"from a newer jax")
        )
    )
    (own / "manifest.json").write_text(signed(document))
    assert f"cannot be decoded by jax {jax.__version__}" in refusal(own, "it was written with")


def loaded_with(root, document):
    """What comes of a manifest that has the digest of its content: an outcome in words."""
    (root / "manifest.json").write_text(signed(document))
    try:
        bundle.load(root)
    except BundleError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def keeps_the_form(*where, value):
    """Whether the edit leaves a manifest of the right form, which says something else."""
    match where:
        case [*_, int()] if value == "missing":
            return True
        case ["tile" | "float_nbytes"] | ["weights", _, "shape", _] | [*_, "shape", 1]:
            return value == 7
        case ["outputs" | "weights", _, "name"]:
            return value == "x"
        case ["platforms"]:
            return value == []
        case ["tools"]:
            return value == {}
        case ["not_batched"] | ["platforms", _] | ["tools", _]:
            return value in ("x", "missing")
    return False


def test_a_signed_manifest_of_another_form_is_refused(own):
    """Another program, or a hand, may have signed it: a digest says nothing of the form."""
    document = json.loads((own / "manifest.json").read_text())
    outcomes = [
        (place, loaded_with(own, changed))
        for place, changed in edits(document)
        if place[0] not in ("digest", "format_version")
        and not keeps_the_form(*place[:-1], value=place[-1])
    ]
    assert len(outcomes) > 100
    assert [(place, outcome) for place, outcome in outcomes if outcome != "refused"] == []


def test_a_manifest_of_nothing_but_brackets_is_refused(own):
    (own / "manifest.json").write_text("[" * 100_000)
    refusal(own, "manifest.json")
