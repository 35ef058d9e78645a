"""Symbolic dimensions: every length is computed at its own bucket, with the bits of training."""

import numpy as np
import pytest

import sequences
from aqt_engine import bundle, lengths, proof
from aqt_engine.convert import ConversionError, Signature, convert
from aqt_engine.execution import Program
from engine.contractions import assert_same_bits
from sequences import LENGTHS, PAD, TILE, inputs_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("repository") / "tagger" / "1"
    sequences.write(path)
    return bundle.load(path)


@pytest.fixture(scope="module")
def program(loaded):
    return Program(loaded, max_rows=2 * TILE)


@pytest.fixture(scope="module")
def training():
    return sequences.Training()


def test_the_signature_says_which_dimensions_a_request_chooses(loaded):
    manifest = loaded.manifest
    assert {s.name: s.shape for s in manifest.inputs} == {
        "ids": ("batch", "length"),
        "bias": ("batch",),
        "temperature": ("batch",),
    }
    assert {s.name: (s.dtype, s.shape) for s in manifest.outputs} == {
        "any": ("bool", ("batch",)),
        "best": ("int32", ("batch",)),
        "logits": ("float32", ("batch", "length", 4)),
        "mean": ("bfloat16", ("batch", 4)),
    }
    assert (manifest.lengths, manifest.pads) == ({"length": LENGTHS}, {"ids": PAD})
    assert manifest.per_request == ("temperature",)
    assert {"graphs/length=3.stablehlo", "graphs/length=6.batched.stablehlo"} <= set(manifest.files)
    for bucket, w in loaded.witnesses.items():
        real = (w.inputs["ids"] != PAD).sum(axis=1)
        assert set(real.tolist()) == set(range({3: 0, 6: 3}[bucket[0]] + 1, bucket[0] + 1))


@pytest.mark.parametrize("length", range(7))
def test_every_length_gets_the_bits_of_training(program, training, length):
    inputs = inputs_of(2 * TILE + 3, length, seed=length)
    found = program(inputs)
    for name, expected in training(inputs).items():
        assert_same_bits(found[name], expected)
    for row in (0, 9):
        alone = program({k: v[row : row + 1] for k, v in inputs.items()})
        for name, array in alone.items():
            assert_same_bits(array[0], found[name][row])


def test_the_bucket_follows_from_the_request_alone(loaded, program):
    manifest = loaded.manifest
    assert [lengths.smallest(manifest, {"length": n}) for n in (0, 1, 3, 4, 6)] == [
        *[(3,)] * 3,
        *[(6,)] * 2,
    ]
    with pytest.raises(ValueError, match="length is 7, and the model takes at most 6"):
        program(inputs_of(1, 7))


def test_the_proof_covers_every_bucket(loaded, program):
    witnessed = list(
        proof.of_witnesses(program, loaded.manifest, loaded.witnesses, rows=program.max_rows)
    )
    first = witnessed[: proof.executables(loaded.manifest, loaded.witnesses, program.max_rows)]
    assert {name.split(",")[0] for name, _ in first} == {"at length=3", "at length=6"}
    assert all("with the first" in name for name, _ in first)
    tried = list(proof.of_random_inputs(program, proof.tile_by_tile(loaded), loaded.witnesses))
    names = {name for name, _ in tried}
    assert "at length=6, random inputs, with NaNs in the padding" in names
    assert "at length=3, random inputs, at random lengths" in names
    assert [name for name, verdict in witnessed + tried if not verdict.exact] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": {}}, "'length' is to be in `shapes` and to have buckets"),
        ({"lengths": {"length": (3,), "width": (2,)}}, "'width' is to be in `shapes`"),
        ({"lengths": {"length": (6, 3)}}, r"must be positive and ascend, got \[6, 3\]"),
        ({"shapes": {"ids": ("batch", "length"), "x": ("batch",)}}, "`shapes` names 'x'"),
        ({"shapes": {"ids": ("length", "batch")}}, "name its axes, 'batch' first"),
        ({"shapes": {"ids": ("batch", 7)}, "lengths": {}}, "name its axes"),
        ({"per_request": ("ids",)}, "is to be one scalar per request"),
        ({"pads": {"ids": 0.5}}, "is int32 and cannot be padded by 0.5"),
    ],
)
def test_a_signature_that_does_not_fit_is_refused(tmp_path, changes, message):
    fields = {name: getattr(sequences.SIGNATURE, name) for name in Signature.__dataclass_fields__}
    with pytest.raises(ConversionError, match=message):
        convert(
            sequences.Tagger,
            {},
            inputs_of(10, 5),
            tmp_path / "1",
            signature=Signature(**{**fields, **changes}),
        )


@pytest.mark.parametrize("lengths", [(4,), (2, 4)])
def test_outputs_must_be_cut_back(lengths):
    signature = Signature(shapes={"x": ("batch", "n")}, lengths={"n": lengths})

    def shapes(of):
        return lambda bucket: {"y": np.empty((1, *of(bucket[0])))}

    assert signature.output_specs(shapes(lambda n: (n, 3)))[0].shape == ("batch", "n", 3)
    with pytest.raises(ConversionError, match=r"axis 2 of the model's 'y' is .*8 at n=4"):
        signature.output_specs(shapes(lambda n: (n, 2 * n)))

    def fixed(n):
        if n != 4:
            raise ValueError("another length")
        return (n,)

    if lengths == (4,):
        with pytest.raises(ConversionError, match="traced at n 4 alone"):
            signature.output_specs(shapes(fixed))
