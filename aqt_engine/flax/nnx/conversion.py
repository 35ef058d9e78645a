"""An nnx model as what can be converted."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from aqt_engine import named_axes
from aqt_engine.convertible import ConversionError, Convertible, Inputs, Serving, leaves_of
from aqt_engine.flax.nnx.ops import AqtStatistic
from aqt_engine.functions.folding import Function
from aqt_engine.manifest import Axes
from aqt_engine.modes import QuantMode
from aqt_engine.streaming import Keep, as_it_is


def split(model: nnx.Module) -> "tuple[NnxModel, dict[str, Any]]":
    """`model` in evaluation (`eval()`) as what `convert` takes, and its variables: nested dicts.

        graph, variables = split(model)
        convert(graph, variables, {"x": x}, "models/mine/1")

    Random streams stay in the graph. The model itself is not changed.
    """
    model = nnx.clone(model)
    model.eval()
    graph, streams, state = nnx.split(model, nnx.RngState, ...)
    return NnxModel(graph, streams, state), nnx.to_pure_dict(state)


@dataclasses.dataclass(frozen=True, slots=True)
class NnxModel(Convertible):
    """An nnx model without its variables. Made by `split`; `merge` is the inverse."""

    graph: Any
    streams: Any
    state: Any

    def merge(self, variables: Mapping[str, Any]) -> nnx.Module:
        """The model with `variables`."""
        streams, state = fresh(self.streams), fresh(self.state)
        nnx.replace_by_pure_dict(state, dict(variables))
        return nnx.merge(self.graph, streams, state)

    def variables_in(self, checkpoint: Any) -> dict[str, Any]:
        """The variables of this model in what was saved of one: an `nnx.State`, or nested dicts.

        Raises:
          ConversionError: some are missing, or have another shape.
        """
        places, tree = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(self.state))
        found = [_at(checkpoint, [key.key for key in place]) for place, _ in places]
        for (place, own), value in zip(places, found, strict=True):
            if getattr(value, "shape", None) != own.shape:
                name = jax.tree_util.keystr(place, simple=True, separator="/")
                shown = "nothing" if value is None else f"{getattr(value, 'shape', type(value))}"
                raise ConversionError(
                    f"the model has {name!r} of shape {own.shape}, and the checkpoint {shown} "
                    f"there: give the checkpoint of this model"
                )
        return jax.tree.unflatten(tree, found)

    def train(self, variables: Any, inputs: Inputs) -> Any:
        """The model's answer, as in training without updates."""
        return self._in_mode(QuantMode.TRAIN, variables)(**inputs)

    def serving(self, variables: Any, inputs: Inputs, keep: Keep = as_it_is) -> Serving:
        """The model with everything folded that its variables alone decide.

        Raises:
          ConversionError: that is nothing, or the model has static scales and was not calibrated.
        """
        counts = (v for place, v in self._statistics(variables).items() if place[-1] == "count")
        if any((np.asarray(count) == 0).any() for count in counts):
            raise ConversionError(
                "the model quantizes with learned statistics, and was never calibrated: run "
                "`convert.calibrate` on typical data first"
            )

        def serve(variables: Any, **inputs: Any) -> Any:
            return self._in_mode(QuantMode.SERVE, variables)(**inputs)

        return Function(serve).serving(variables, inputs, keep)

    def axes(self, variables: Any, inputs: Inputs) -> Mapping[str, Axes]:
        """Those of `nnx.with_partitioning`, by the rules that hold here."""
        found = dict(Convertible.axes(self, variables, inputs))
        specs = nnx.to_pure_dict(nnx.get_partition_spec(self.state))
        for leaf, spec in zip(
            leaves_of(variables), jax.tree.leaves(specs, is_leaf=_is_spec), strict=True
        ):
            if axes := named_axes.of_spec(spec, leaf.value.ndim):
                found[leaf.name] = axes
        return found

    def calibrated(self, variables: Any, batches: Iterable[Inputs]) -> Any:
        """`variables` with the statistics of `batches`."""
        if not self._statistics(variables):
            raise ConversionError(
                "the model keeps no statistics: quantize it by a rule whose calibration does, such "
                "as MeanOfAbsMaxCalibration, and call it once on an example before `split`"
            )

        @jax.jit
        def observe(variables: Any, inputs: Inputs) -> Any:
            model = self._in_mode(QuantMode.CALIBRATE, variables)
            model(**inputs)
            _, _, state = nnx.split(model, nnx.RngState, ...)
            return nnx.to_pure_dict(state)

        for batch in batches:
            variables = observe(variables, dict(batch))
        return variables

    def _in_mode(self, mode: QuantMode, variables: Any) -> Any:
        model = self.merge(variables)
        model.set_attributes(quant_mode=mode, raise_if_not_found=False)
        return model

    def _statistics(self, variables: Any) -> dict[tuple[Any, ...], Any]:
        places = dict(nnx.to_flat_state(self.state))
        flat = {tuple(k.key for k in p): v for p, v in jax.tree.leaves_with_path(variables)}
        return {p: v for p, v in flat.items() if isinstance(places.get(p), AqtStatistic)}


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def fresh(state: Any) -> Any:
    """The same in variables of its own, which a trace can change."""
    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, leaves)


def _at(tree: Any, place: Sequence[Any]) -> Any:
    """What stands at `place`, whose numbers may be text in `tree`; None if nothing does."""
    for key in place:
        if not isinstance(tree, Mapping):
            return None
        found = cast(Mapping[Any, Any], tree)
        tree = found.get(key, found.get(str(key)))
    # As a checkpoint of an `nnx.State` has it.
    return tree["value"] if isinstance(tree, Mapping) and set(tree) == {"value"} else tree
