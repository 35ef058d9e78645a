"""The tensors that a bundle stores, each with its scale and by what it was quantized."""

import dataclasses
from collections.abc import Iterator

from aqt_engine.manifest import Manifest, WeightSpec
from aqt_engine.provenance import Quantized


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A stored tensor by its path in the model.

    `scale` stands with quantized values, and is None for what stayed float. `by` is what they were
    quantized by, as far as the bundle knows, and `configuration` its fingerprint there.
    """

    name: str
    values: WeightSpec
    scale: WeightSpec | None
    by: Quantized | None
    configuration: str | None

    @property
    def quantized(self) -> bool:
        """Whether the values are quantized."""
        return self.values.role == "qvalue"

    @property
    def nbytes(self) -> int:
        """Bytes of the values and their scale."""
        return self.values.nbytes + (self.scale.nbytes if self.scale else 0)

    @property
    def numerics(self) -> str | None:
        """What the values were put into buckets by, in words: "IntNumerics, 8 bits"."""
        if self.by is None:
            return None
        numerics = self.by.tensor.numerics
        bits = getattr(numerics, "bits", None)
        name = type(numerics).__name__
        return name if bits is None else f"{name}, {bits} bits"

    @property
    def calibration(self) -> str | None:
        """What gave the scale, by the name of its class."""
        return None if self.by is None else type(self.by.tensor.calibration).__name__


def layers(manifest: Manifest) -> Iterator[Layer]:
    """A layer for each array of the weights, in their order; a scale stands with its values."""
    scales = {w.name.removesuffix("/scale"): w for w in manifest.weights if w.role == "scale"}
    values = {w.name.removesuffix("/qvalue") for w in manifest.weights if w.role == "qvalue"}
    provenance = manifest.provenance
    for weight in manifest.weights:
        if weight.role == "scale" and weight.name.removesuffix("/scale") in values:
            continue
        tensor = weight.name if weight.role == "float" else weight.name.rpartition("/")[0]
        by = provenance.quantized(tensor)
        name = weight.name.removesuffix("/qvalue") if weight.role == "qvalue" else weight.name
        yield Layer(
            name=name,
            values=weight,
            scale=scales.get(name) if weight.role == "qvalue" else None,
            by=by,
            configuration=provenance.tensors[tensor].configuration if by else None,
        )
