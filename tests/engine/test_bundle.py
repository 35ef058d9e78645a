"""A bundle is read as it was written, or it is refused with a sentence that names what is wrong."""

import hashlib
import itertools
import resource
import shutil

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
from jax import export

import bundles
from aqt_engine import bundle
from aqt_engine.bundle import BundleError
from engine.contractions import assert_same_bits


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A whole bundle, which no test changes."""
    path = tmp_path_factory.mktemp("repository") / "linear" / "1"
    bundles.write_linear(path)
    return path


@pytest.fixture(scope="module")
def scratch(written, tmp_path_factory):
    """Another copy of it, which each test leaves as it was."""
    path = tmp_path_factory.mktemp("scratch") / "1"
    shutil.copytree(written, path)
    return path


@pytest.fixture
def own(written, tmp_path):
    path = tmp_path / "1"
    shutil.copytree(written, path)
    return path


def files(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def refusal(root, named):
    """The sentence with which `root` is refused, which has to have `named` in it."""
    with pytest.raises(BundleError) as caught:
        bundle.load(root)
    message = str(caught.value)
    assert message.startswith(str(root))
    assert named in message
    assert "\n" not in message
    return message


def assert_whole(root):
    loaded = bundle.load(root)
    (found,) = jax.jit(loaded.graph.call)(
        list(loaded.weights), [loaded.witness.inputs["x"][: bundles.TILE]]
    )
    assert_same_bits(found, loaded.witness.outputs["y"][: bundles.TILE])


def test_what_is_written_is_loaded(written):
    manifest = bundle.read_manifest(written)
    assert manifest == bundle.load(written).manifest
    assert manifest.inputs == bundles.SPECS["inputs"]
    assert manifest.outputs == bundles.SPECS["outputs"]
    assert manifest.tile == bundles.TILE
    assert manifest.platforms == ("cpu", "cuda", "tpu")
    assert manifest.tools == {"jax": jax.__version__}
    assert [(w.name, w.dtype, w.shape, w.role) for w in manifest.weights] == [
        ("kernel/qvalue", "int8", (6, 4), "qvalue"),
        ("kernel/scale", "float32", (1, 4), "scale"),
        ("bias", "float32", (4,), "float"),
    ]
    assert manifest.nbytes == 24 + 16 + 16
    assert manifest.float_nbytes == 4 * (24 + 4)
    assert_whole(written)


def test_the_manifest_lists_every_file_with_its_digest(written):
    listed = bundle.read_manifest(written).files
    assert sorted([*listed, "manifest.json"]) == files(written)
    assert {"graph.stablehlo"} < set(listed)
    for name, digest in listed.items():
        data = (written / name).read_bytes()
        assert (digest.nbytes, digest.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def write_arrays(path, weights):
    def doubled(weights, inputs):
        return [inputs[0] * 2]

    shape = jax.ShapeDtypeStruct((2, 1), np.float32)
    x = np.ones((2, 1), np.float32)
    return bundle.write(
        path,
        graph=export.export(jax.jit(doubled))(
            [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights.values()], [shape]
        ),
        inputs=(bundle.TensorSpec(name="x", dtype="float32", shape=(bundle.BATCH, 1)),),
        outputs=(bundle.TensorSpec(name="y", dtype="float32", shape=(bundle.BATCH, 1)),),
        tile=2,
        weights=weights,
        roles=dict.fromkeys(weights, "float"),
        float_nbytes=0,
        tools={},
        witness=bundle.Witness(inputs={"x": x}, outputs={"y": 2 * x}),
    )


DTYPES = [
    *(np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, ml_dtypes.int4),
    *(np.float16, np.float32, ml_dtypes.bfloat16),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
]


def test_weights_of_every_dtype_and_shape_keep_their_bits_and_their_order(tmp_path):
    rng = np.random.default_rng(0)
    weights = {}
    for dtype, shape in itertools.product(map(np.dtype, DTYPES), [(), (3,), (2, 1, 5)]):
        raw = rng.bytes(int(np.prod(shape)) * dtype.itemsize)
        if dtype == np.bool_:
            raw = bytes(b & 1 for b in raw)
        # Any bits there are, NaNs of every kind among them; of int4, whole values.
        array = (
            rng.integers(-8, 8, shape).astype(dtype)
            if dtype == ml_dtypes.int4
            else np.frombuffer(raw, dtype).reshape(shape)
        )
        weights[f"{dtype.name}/{len(shape)}"] = array
    weights = dict(reversed(weights.items()))
    manifest = write_arrays(tmp_path / "1", weights)
    loaded = bundle.load(tmp_path / "1")
    assert [w.name for w in manifest.weights] == list(weights)
    for spec, found, expected in zip(
        manifest.weights, loaded.weights, weights.values(), strict=True
    ):
        assert (spec.dtype, spec.shape) == (expected.dtype.name, expected.shape)
        assert found.shape == expected.shape
        assert_same_bits(found, expected)
        assert spec.nbytes == expected.nbytes
        assert spec.bits == (4 if spec.dtype == "int4" else 8 * expected.dtype.itemsize)


@pytest.mark.parametrize("names", [("a.b", "a/b", "a", "a b"), ("..", "/etc", "%2F", "é", "0")])
def test_a_name_of_a_weight_is_only_a_name(tmp_path, names):
    weights = {name: np.full(2, i, np.float32) for i, name in enumerate(names)}
    write_arrays(tmp_path / "deep" / "1", weights)
    loaded = bundle.load(tmp_path / "deep" / "1")
    assert [w[0] for w in loaded.weights] == list(range(len(names)))
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["1"]


def test_a_path_may_be_relative_and_a_str(own, monkeypatch):
    monkeypatch.chdir(own.parent)
    assert bundle.load("1").manifest == bundle.load(own).manifest
    write_arrays("2", {"w": np.ones(3, np.int8)})
    assert bundle.load(own.parent / "2").weights[0].tolist() == [1, 1, 1]


def test_weights_are_read_when_asked_for_and_refused_if_written_over(tmp_path):
    kept, changed = np.arange(3, dtype=np.int8), np.full((2, 5), 7, np.float32)
    write_arrays(tmp_path / "1", {"kept": kept, "changed": changed})
    loaded = bundle.load(tmp_path / "1")
    assert loaded.weights[1] is not loaded.weights[1]
    (file,) = (tmp_path / "1/weights/1").glob("[!.]*")
    file.write_bytes(np.zeros_like(changed).tobytes())
    assert loaded.weights[0].tolist() == [0, 1, 2]
    with pytest.raises(bundle.BundleError, match="0 was written over while it was read"):
        list(loaded.weights)


def test_loading_writes_nothing_and_needs_no_right_to(own):
    everything = [own, *own.rglob("*")]
    before = {p: p.stat().st_mtime_ns for p in everything}
    for path in everything:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        assert_whole(own)
    finally:
        for path in everything:
            path.chmod(path.stat().st_mode | 0o200)
    assert {p: p.stat().st_mtime_ns for p in [own, *own.rglob("*")]} == before


def test_the_specification_of_a_number_of_rows():
    spec = bundle.TensorSpec(name="x", dtype="bfloat16", shape=(bundle.BATCH, 3, 2))
    assert spec.with_rows(5) == jax.ShapeDtypeStruct((5, 3, 2), ml_dtypes.bfloat16)


def test_a_truncated_file_is_named(scratch):
    for name in files(scratch):
        whole = (scratch / name).read_bytes()
        for size in {0, 1, len(whole) // 2, len(whole) - 1}:
            (scratch / name).write_bytes(whole[:size])
            message = refusal(scratch, name)
            if name != "manifest.json":
                assert f"{name} has {size} bytes instead of {len(whole)}" in message
        (scratch / name).write_bytes(whole)
    assert_whole(scratch)


def test_too_many_open_files_are_no_damage(written):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            bundle.read_manifest(written)
        with pytest.raises(OSError, match="Too many open files"):
            bundle.load(written)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert_whole(written)


@hypothesis.settings(max_examples=100)
@hypothesis.given(data=st.data())
def test_one_bit_is_enough(scratch, data):
    name = data.draw(st.sampled_from(files(scratch)))
    whole = (scratch / name).read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    (scratch / name).write_bytes(flipped)
    try:
        # A bit of the manifest can make another format of it, and then the bundle is named.
        refusal(scratch, str(scratch) if name == "manifest.json" else f"{name} has other content")
    finally:
        (scratch / name).write_bytes(whole)


def test_a_file_that_is_removed_is_named(scratch):
    for name in files(scratch):
        whole = (scratch / name).read_bytes()
        (scratch / name).unlink()
        message = refusal(scratch, name)
        assert "cannot be read" in message or f"{name} is missing" in message
        (scratch / name).write_bytes(whole)
    assert_whole(scratch)


def test_a_file_with_the_content_of_another_is_named(scratch):
    contents = {name: (scratch / name).read_bytes() for name in files(scratch)}
    for (name, whole), other in zip(
        contents.items(), [*list(contents.values())[1:], b""], strict=True
    ):
        if whole == other:
            continue
        (scratch / name).write_bytes(other)
        refusal(scratch, name)
        (scratch / name).write_bytes(whole)
    assert_whole(scratch)


@pytest.mark.parametrize("part", ["manifest.json", "graph.stablehlo", "weights", "witness"])
def test_a_part_of_another_bundle_is_refused(own, tmp_path, part):
    write_arrays(tmp_path / "other", {"w": np.ones(2, np.float32)})
    if (own / part).is_dir():
        shutil.rmtree(own / part)
        shutil.copytree(tmp_path / "other" / part, own / part)
    else:
        shutil.copy(tmp_path / "other" / part, own / part)
    refusal(own, "does not match its manifest")


@pytest.mark.parametrize("name", ["code.py", "weights/extra", "witness/d/deep/extra", ".hidden"])
def test_a_file_that_is_added_is_named(own, name):
    (own / name).parent.mkdir(parents=True, exist_ok=True)
    (own / name).write_bytes(b"")
    refusal(own, f"{name} is not listed")


def test_everything_that_is_wrong_is_said_at_once(own):
    (own / "extra").write_bytes(b"")
    (own / "graph.stablehlo").write_bytes(b"")
    (own / "weights" / "_METADATA").unlink()
    message = refusal(own, "extra is not listed")
    assert "graph.stablehlo has 0 bytes" in message
    assert "weights/_METADATA is missing" in message


def test_what_is_no_bundle_is_refused(own, tmp_path):
    (tmp_path / "file").touch()
    (own / "manifest.json").unlink()
    (own / "manifest.json").mkdir()
    for path in (tmp_path / "nothing", tmp_path / "file", tmp_path, own):
        assert "is not a bundle" in refusal(path, "manifest.json")


def test_a_link_to_other_content_is_refused(own, tmp_path):
    (tmp_path / "outside").write_bytes(b"other")
    for name in ("graph.stablehlo", "weights/_METADATA"):
        (own / name).unlink()
        (own / name).symlink_to(tmp_path / "outside")
        refusal(own, f"{name} has 5 bytes")


def test_a_link_to_another_bundle_is_not_followed(own, written):
    shutil.rmtree(own / "weights")
    (own / "weights").symlink_to(written / "weights", target_is_directory=True)
    refusal(own, "weights/_METADATA is missing")


def test_a_bundle_may_be_reached_through_a_link(own, tmp_path):
    (tmp_path / "latest").symlink_to(own)
    assert_whole(tmp_path / "latest")


def test_a_digest_is_checked_before_anything_is_decoded(own, monkeypatch):
    monkeypatch.setattr(export, "deserialize", lambda data: pytest.fail("decoded"))
    (own / "weights" / "extra").touch()
    refusal(own, "weights/extra is not listed")


@pytest.mark.parametrize("name", ["graph.stablehlo", "weights/_METADATA"])
def test_a_link_that_leads_nowhere_is_refused(own, tmp_path, name):
    (own / name).unlink()
    (own / name).symlink_to(tmp_path / "nothing")
    refusal(own, name)


@pytest.mark.parametrize("name", ["extra", "weights/extra"])
def test_a_link_to_a_directory_that_is_added_is_named(own, written, name):
    (own / name).symlink_to(written / "weights", target_is_directory=True)
    refusal(own, f"{name} is not listed")
