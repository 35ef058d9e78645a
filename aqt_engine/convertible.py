"""What can be converted: a training forward, and what serves in its place.

`aqt_engine.convert` knows a model only as a `Convertible`. A Flax linen model is one by its modes.
"""

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList, meta
from flax.errors import FlaxError
from flax.linen.spmd import logical_to_mesh_axes

from aqt_engine import named_axes
from aqt_engine.manifest import Axes, Role
from aqt_engine.modes import QuantMode
from aqt_engine.provenance import Quantized
from aqt_engine.qtensor import QTensor, Scale
from aqt_engine.streaming import Keep, as_it_is, in_turn

STATISTICS = "aqt_statistics"

ModelFactory = Callable[[QuantMode], nn.Module]
Inputs = Mapping[str, Any]


class ConversionError(ValueError):
    """A model cannot be converted so that it answers exactly; the message says what prevents it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One array that a bundle may store: what it is called, and what it is to its tensor."""

    name: str
    value: jax.Array
    role: Role


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What serves: `forward` of the values of `leaves`, in their order, and of inputs by name.

    `forward` may leave leaves unread; those do not go into the bundle. It can be traced for any
    number of rows. `quantized` says which configuration quantized a tensor, by the name of its
    leaves without the part, as far as the model knows.
    """

    leaves: Sequence[Leaf]
    forward: Callable[[Sequence[jax.Array], Inputs], Any]
    quantized: Mapping[str, Quantized] = dataclasses.field(default_factory=dict[str, Quantized])


def leaves_of(variables: Any) -> list[Leaf]:
    """The arrays of `variables` in the order in which JAX flattens them, called after their places.

    One array alone is called "weight". Boxes of metadata are left out.
    """
    leaves: list[Leaf] = []
    for path, found in jax.tree_util.tree_flatten_with_path(variables, is_leaf=_is_leaf)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "weight"
        value = _of_box(found)
        if not _is_stored(value):
            leaves.append(Leaf(name=name, value=value, role="float"))
            continue
        if isinstance(value, QTensor):
            leaves.append(Leaf(name=f"{name}/qvalue", value=_of_box(value.qvalue), role="qvalue"))
        if value.scale is not None:
            leaves.append(Leaf(name=f"{name}/scale", value=_of_box(value.scale), role="scale"))
        if value.bias is not None:
            leaves.append(Leaf(name=f"{name}/bias", value=_of_box(value.bias), role="bias"))
    return leaves


class Convertible(abc.ABC):
    """A model that `aqt_engine.convert` takes.

    Answers are an array, a tuple of arrays, or arrays by name.
    """

    @abc.abstractmethod
    def train(self, variables: Any, inputs: Inputs) -> Any:
        """The answer of the training forward, without gradients. It is called under `jax.jit`."""

    @abc.abstractmethod
    def serving(self, variables: Any, inputs: Inputs, keep: Keep = as_it_is) -> Serving:
        """What serves with the answers of `train`, its weights quantized beforehand.

        Each of those is what `keep` gives for it, if possible before others are made.

        Raises:
          ConversionError: nothing is quantized, or statistics are missing.
        """

    def axes(self, variables: Any, inputs: Inputs) -> Mapping[str, Axes]:
        """The names of the axes of `variables`, of those that have such, as `leaves_of` calls them.

        They are those of the mesh that a variable lies on, unless a model knows more.
        """
        named = ((leaf.name, named_axes.of_array(leaf.value)) for leaf in leaves_of(variables))
        return {name: axes for name, axes in named if axes}

    @abc.abstractmethod
    def calibrated(self, variables: Any, batches: Iterable[Inputs]) -> Any:
        """`variables` with the statistics of `batches`.

        Raises:
          ConversionError: the model keeps no statistics.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class LinenModel(Convertible):
    """A Flax linen model, by the function that gives its module for a mode.

    Run once in CONVERT, it stores its quantized weights; in SERVE it reads them, and of the float
    ones only the shapes.
    """

    factory: ModelFactory

    def train(self, variables: Any, inputs: Inputs) -> Any:
        """The module in TRAIN."""
        return self.factory(QuantMode.TRAIN).apply(variables, inputs, method=_call)

    def serving(self, variables: Any, inputs: Inputs, keep: Keep = as_it_is) -> Serving:
        """The module in SERVE, with the collections that CONVERT fills beside `variables`."""
        stored, quantized = self._stored(variables, inputs, keep)
        everything = {**variables, **stored}
        module = self.factory(QuantMode.SERVE)
        tree = jax.tree.structure(everything)

        def forward(values: Sequence[jax.Array], inputs: Inputs) -> Any:
            return module.apply(jax.tree.unflatten(tree, values), inputs, method=_call)

        return Serving(leaves=leaves_of(everything), forward=forward, quantized=quantized)

    def axes(self, variables: Any, inputs: Inputs) -> Mapping[str, Axes]:
        """Those of boxes: `nn.with_partitioning`, and logical ones by the rules that hold here.

        Variables that were unboxed, as those of most checkpoints, have them as the model says.
        """
        found = dict(Convertible.axes(self, variables, inputs))
        boxed = [*_boxes(self._initial(inputs)), *_boxes(variables)]
        for path, box in boxed:
            names = box.names
            if isinstance(box, nn.LogicallyPartitioned):
                rules = box.rules or nn.get_logical_axis_rules()
                names = logical_to_mesh_axes(names, rules) if rules else names
            if axes := named_axes.of_spec(names, _of_box(box).ndim):
                found[jax.tree_util.keystr(path, simple=True, separator="/")] = axes
        return found

    def _initial(self, inputs: Inputs) -> Any:
        """The shapes of fresh variables; none of a model that cannot be initialized so."""
        module = self.factory(QuantMode.TRAIN)
        with contextlib.suppress(FlaxError):
            init = functools.partial(module.init, method=_call)
            return jax.eval_shape(init, jax.random.key(0), dict(inputs))
        return {}

    def calibrated(self, variables: Any, batches: Iterable[Inputs]) -> Any:
        """`variables` with the collection `aqt_statistics` as CALIBRATE leaves it."""
        module = self.factory(QuantMode.CALIBRATE)
        calibrated = dict(variables)

        @jax.jit
        def observe(current: Mapping[str, Any], inputs: Inputs) -> Mapping[str, Any]:
            kept = DenyList(tuple(set(variables) - {STATISTICS}))
            return _changed(module, current, inputs, kept)

        for batch in batches:
            found = observe(calibrated, batch)
            if STATISTICS not in found:
                raise ConversionError(
                    "the model keeps no statistics in QuantMode.CALIBRATE: give the activations' "
                    "sides a calibration such as MeanOfAbsMaxCalibration, or convert without "
                    "calibrating"
                )
            calibrated[STATISTICS] = found[STATISTICS]
        return calibrated

    def _stored(
        self, variables: Mapping[str, Any], inputs: Inputs, keep: Keep
    ) -> tuple[Mapping[str, Any], Mapping[str, Quantized]]:
        """The collections that CONVERT fills, and by which configurations."""
        given = {name: c for name, c in variables.items() if _holds_stored(c)}
        plain = {name: c for name, c in variables.items() if name not in given}
        fresh = DenyList(tuple(plain))
        module = self.factory(QuantMode.CONVERT)
        quantized: dict[str, Quantized] = {}

        def watch(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name == "store":
                if (collection := context.module.quant_collection) in plain:
                    raise ConversionError(
                        f"the variables have a collection {collection!r} which is not what this "
                        f"model stores there: give them without it, for what is served is made of "
                        f"the parameters; `aqt_engine.migration.from_aqtp` reads what aqtp stored"
                    )
                name, by = context.module.stored_by(args[0])
                quantized[name] = by
            return next_method(*args, **kwargs)

        # Compiled, as training is: a search for the best scale depends on the order of its sums.
        def run(variables: Mapping[str, Any], inputs: Inputs) -> Mapping[str, Any]:
            with nn.intercept_methods(watch):
                return _changed(module, variables, inputs, fresh)

        stored = in_turn(run, keep, plain, dict(inputs))
        _require_same(given, stored)
        counts = [
            leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(variables.get(STATISTICS, {}))[0]
            if jax.tree_util.keystr(path[-1:], simple=True) == "count"
        ]
        if STATISTICS in stored or any(int(count) == 0 for count in counts):
            raise ConversionError(
                "the model quantizes with learned statistics, and was never calibrated: run "
                "`calibrate` on typical data first (`aqt convert --calibration FILE`)"
            )
        if not any(map(_is_qtensor, jax.tree.leaves(stored, is_leaf=_is_qtensor))):
            raise ConversionError(
                "the model stored no quantized weight in QuantMode.CONVERT: pass the mode that the "
                "factory is given to each AqtDotGeneral or AqtEinsum, as `rhs_quant_mode` where "
                "the weight is on the right and `lhs_quant_mode` where it is on the left"
            )
        return dict(stored), quantized


@dataclasses.dataclass(frozen=True, slots=True)
class Stored(Convertible):
    """A function `fn(variables, **inputs)` whose variables hold tensors that are quantized already.

    Nothing was trained here, and nothing is quantized: `fn` itself is what is promised, and served.
    A quantized tensor is a `QTensor`, as `aqt_engine.migration` gives them, or another library's
    with arrays `qvalue` and `scale`.

        Stored(lambda variables, **inputs: Mlp(QuantMode.SERVE).apply(variables, **inputs))
    """

    fn: Callable[..., Any]

    def train(self, variables: Any, inputs: Inputs) -> Any:
        """The function itself."""
        return self.fn(variables, **inputs)

    def serving(self, variables: Any, inputs: Inputs, keep: Keep = as_it_is) -> Serving:
        """The function itself, of the leaves of `variables`.

        Raises:
          ConversionError: none of them is quantized, or one has a dtype that no bundle can store.
        """
        leaves = leaves_of(variables)
        names = {leaf.name for leaf in leaves}
        roled: list[Leaf] = []
        for leaf in leaves:
            of, _, part = leaf.name.rpartition("/")
            tensor = {f"{of}/qvalue", f"{of}/scale"} <= names
            role: Role = cast(Role, part) if tensor and part in ("qvalue", "scale") else leaf.role
            roled.append(dataclasses.replace(leaf, role=role))
        if not any(leaf.role == "qvalue" for leaf in roled):
            raise ConversionError(
                "the variables hold no quantized tensor: give `Stored` what "
                "`aqt_engine.migration` or another library has quantized, and trained parameters "
                "to a model that quantizes them"
            )
        unsigned = [leaf.name for leaf in roled if leaf.value.dtype in (jnp.uint2, jnp.uint4)]
        if unsigned:
            raise ConversionError(
                f"a bundle stores no uint2 or uint4, which {', '.join(unsigned)} has: quantize it "
                f"to signed integers, int4 in the place of nf4"
            )
        tree = jax.tree.structure(variables)

        def forward(values: Sequence[jax.Array], inputs: Inputs) -> Any:
            return self.fn(jax.tree.unflatten(tree, values), **inputs)

        return Serving(leaves=roled, forward=forward)

    def calibrated(self, variables: Any, batches: Iterable[Inputs]) -> Any:
        """Refuses: scales that are stored are not learned again."""
        raise ConversionError(
            "the variables are quantized already, with the scales that they have: convert without "
            "calibrating"
        )


def _call(module: nn.Module, inputs: Inputs) -> Any:
    return module(**inputs)


def _changed(
    module: nn.Module, variables: Mapping[str, Any], inputs: Inputs, mutable: DenyList
) -> Mapping[str, Any]:
    """The collections that a run of `module` changed or made."""
    run = module.apply(variables, inputs, method=_call, mutable=mutable)
    return cast(tuple[Any, Mapping[str, Any]], run)[1]


def _holds_stored(collection: Any) -> bool:
    return any(map(_is_stored, jax.tree.leaves(collection, is_leaf=_is_stored)))


def _require_same(given: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Refuses weights that were stored before and are not what the model stores now."""
    before, now = (
        {leaf.name: leaf.value for leaf in leaves_of({name: tree.get(name, {}) for name in given})}
        for tree in (given, stored)
    )
    wrong = [name for name in sorted(before.keys() | now.keys()) if not _equal(name, before, now)]
    if wrong:
        raise ConversionError(
            f"the variables hold stored weights that this model does not make of their parameters "
            f"({', '.join(wrong[:3])}{' and others' if wrong[3:] else ''}): they were made with "
            f"another configuration, or of other parameters; give the variables without them"
        )


def _equal(name: str, before: Mapping[str, jax.Array], now: Mapping[str, jax.Array]) -> bool:
    if name not in before or name not in now or before[name].dtype != now[name].dtype:
        return False
    return bool(jnp.array_equal(before[name], now[name]))


def _is_qtensor(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def _boxes(tree: Any) -> list[tuple[Any, Any]]:
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]
    return [(path, box) for path, box in found if isinstance(box, nn.Partitioned)]


def _is_leaf(leaf: Any) -> bool:
    return _is_stored(leaf) or isinstance(leaf, meta.AxisMetadata)


def _of_box(found: Any) -> Any:
    """What is in a box of metadata, if it is one. Not unboxed, which could move it to a mesh."""
    return jax.tree.leaves(found)[0] if isinstance(found, meta.AxisMetadata) else found


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, QTensor | Scale)
