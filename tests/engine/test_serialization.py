"""Configurations are data: they come back from JSON as they were, or an error names the path."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from aqt_engine import calibration, config, numerics
from aqt_engine.config import serialization
from aqt_engine.config.serialization import (
    FAMILIES,
    SerializationError,
    fingerprint,
    from_dict,
    from_json,
    to_dict,
    to_json,
)
from engine.configurations import CONFIGURATIONS

PRESETS = {
    "fully_quantized": config.fully_quantized(),
    "config_v4": config.config_v4(dlhs_local_aqt=config.LocalAqt(2)),
    "config_fwd_fp8": config.config_fwd_fp8(),
    "weight_only": config.weight_only(4),
    "float": config.DotGeneral(),
}
# Of format version 1, for good: a default or a name that changes needs a new version.
FINGERPRINTS = {
    "fully_quantized": "819da5a57d9d7d34d46aea18e8174c03cc7f0638805fe13c6ca4bc6838c5552f",
    "config_fwd_fp8": "14fbaecb0337835be57787ca26644ee4c515831a37fa60600561b93cdf1817ba",
    "float": "13fab26ae752162c0d8d71c14df0f350b7f01cfd3b97c037c5538d0e63ab22ad",
}


@given(CONFIGURATIONS)
def test_any_configuration_comes_back_as_it_was(c):
    text = to_json(c)
    back = from_json(text)
    assert back == c
    assert hash(back) == hash(c)
    assert to_json(back) == text
    assert from_dict(to_dict(c)) == c
    assert fingerprint(back) == fingerprint(c)


@given(CONFIGURATIONS, CONFIGURATIONS)
def test_fingerprints_tell_configurations_apart(a, b):
    assert (fingerprint(a) == fingerprint(b)) == (a == b)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_as_they_were(name):
    assert from_json(to_json(PRESETS[name])) == PRESETS[name]


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints_stay_as_they_were_published(name):
    assert fingerprint(PRESETS[name]) == FINGERPRINTS[name]


def test_the_same_description_has_one_fingerprint():
    def of(dtype, factor, axes):
        side = config.Tensor(
            numerics=dataclasses.replace(config.int_numerics(8), dtype=dtype),
            calibration=calibration.AbsMaxCalibration(factor),
            calib_shared_axes=axes,
        )
        return config.DotGeneral(fwd=config.DotGeneralRaw(lhs=side))

    spellings = [of(jnp.int8, 1, [0]), of("int8", 1.0, (0,)), of(np.dtype(np.int8), 1.0, (0,))]
    assert len({fingerprint(c) for c in spellings}) == 1
    assert len(set(spellings)) == 1


def test_every_class_has_a_name():
    def concrete(base):
        for cls in base.__subclasses__():
            if cls.__module__.startswith("aqt_engine.") and not cls.__abstractmethods__:
                yield cls.__name__
            yield from concrete(cls)

    for base, family in FAMILIES.items():
        # A KnownBound holds an array: it is an intermediate result, and not configured.
        assert set(concrete(base)) - {"KnownBound"} == {cls.__name__ for cls in family}


def written(**changes):
    document = to_dict(PRESETS["fully_quantized"])
    document["config"]["fwd"]["lhs"]["numerics"].update(changes)
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (written(bits="8"), r"`config\.fwd\.lhs\.numerics\.bits`: Input should be a valid integer"),
        (written(bits=True), r"`config\.fwd\.lhs\.numerics\.bits`"),
        (written(bits=40), r"`config\.fwd\.lhs\.numerics`: `bits` must be from 1 to 22, got 40"),
        (written(bites=8), r"`config\.fwd\.lhs\.numerics\.bites`: Extra inputs"),
        (written(dtype="i1"), r"numerics\.dtype`: 'i1' is the name of no dtype"),
        (written(dtype="os"), r"numerics\.dtype`: 'os' is the name of no dtype"),
        (written(noise_fn={"type": "Loud"}), r"numerics\.noise_fn`.*'Uniform', 'Centered'"),
        (written(type="os.system"), r"`config\.fwd\.lhs\.numerics`.*'IntNumerics'"),
        ({"version": 1, "config": {"fwd": {"lhs": {"calib_shared_axes": 0.5}}}}, r"shared_axes`"),
        ({"version": 1, "config": {"fwd": {"lhs": {"dequant_mode": 1}}}}, r"dequant_mode`: .*OUTP"),
        (
            {"version": 1, "config": {"fwd": {"lhs": {"numerics": {"type": "IntNumerics"}}}}},
            r"`config\.fwd\.lhs\.numerics\.bits`: Field required",
        ),
        (
            {"version": 1, "config": {"fwd": {"dg_accumulator_dtype": "int32"}}},
            r"`config\.fwd`: `dg_accumulator_dtype=int32` needs whole numbers",
        ),
        (
            {"version": 1, "config": {"fwd": {"lhs": {"use_fwd_quant": True}}}},
            r"`config`: `fwd\.lhs` has `use_fwd_quant`",
        ),
        ({"version": 1}, r"`config`: Field required"),
        ({"version": 2, "config": {}}, "has format version 2, and this release reads 1"),
        ({"config": {}}, "has no `version`"),
        ({"version": 1, "config": {"fwd": {1}}}, "no JSON"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(document, message):
    with pytest.raises(SerializationError, match=message):
        from_dict(document)


def test_text_that_is_no_document_is_refused():
    for text in ("", "[]", "{", '{"version":1,"config":{"fwd":NaN}}'):
        with pytest.raises(SerializationError):
            from_json(text)


def test_all_mistakes_are_named_at_once():
    document = written(bits="8", clip=0)
    document["config"]["dlhs"]["rhs"]["po2_scale"] = "no"
    with pytest.raises(SerializationError) as caught:
        from_json(json.dumps(document))
    for path in ("fwd.lhs.numerics.bits", "fwd.lhs.numerics.clip", "dlhs.rhs.po2_scale"):
        assert f"`config.{path}`" in str(caught.value)


def test_what_has_no_name_is_not_written():
    class Own(calibration.AbsMaxCalibration):
        pass

    c = config.update(config.config_v4(), "fwd.rhs", calibration=Own())
    with pytest.raises(SerializationError, match=r"`config\.fwd\.rhs\.calibration` is a Own"):
        to_json(c)
    ill_typed = config.update(config.config_v4(), "fwd.rhs", scale_stop_grad="yes")
    with pytest.raises(SerializationError, match=r"`config\.fwd\.rhs\.scale_stop_grad`"):
        to_json(ill_typed)


def test_an_infinite_number_is_not_written():
    c = config.Tensor(numerics=numerics.IntNumerics(8, True, False, True, False, True))
    c = dataclasses.replace(c, calibration=calibration.AbsMaxCalibration())
    document = serialization.to_dict(config.DotGeneral(fwd=config.DotGeneralRaw(lhs=c)))
    document["config"]["fwd"]["lhs"]["calibration"] = {
        "type": "AbsMaxCalibration",
        "clipping_scale": float("inf"),
    }
    with pytest.raises(SerializationError, match="no JSON"):
        from_dict(document)
