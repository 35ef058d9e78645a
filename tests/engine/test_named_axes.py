"""Which axes of what is stored the trainer named: by boxes, metadata of nnx, or how arrays lie."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aqt_engine import QuantMode, config, convert
from aqt_engine.convertible import LinenModel, leaves_of
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.flax import nnx as aqt_nnx

INT8 = config.fully_quantized(use_stochastic_rounding=False)
MATMUL = (((1,), (0,)), ((), ()))
X, SQUARE, WIDE = (
    np.random.default_rng(0).normal(size=(n, m)).astype(np.float32)
    for n, m in ((4, 8), (8, 8), (8, 6))
)


def recorded(model, variables):
    """The names of the axes of all that is stored, by its name."""
    leaves = model.serving(variables, {"x": X}).leaves
    return convert._axes(model.axes(variables, {"x": X}), leaves_of(variables), leaves)


class Square(nn.Module):
    """A kernel whose axes cannot be told apart by their sizes, and a bias that stays float."""

    mode: object
    logical: bool = False

    @nn.compact
    def __call__(self, x):
        named = nn.with_logical_partitioning if self.logical else nn.with_partitioning
        return nn.Dense(
            8,
            kernel_init=named(nn.initializers.normal(), ("embed", "mlp")),
            bias_init=named(nn.initializers.ones, ("mlp",)),
            dot_general=AqtDotGeneral(INT8, rhs_quant_mode=self.mode),
        )(x)


def linen(logical):
    model = LinenModel(lambda mode: Square(mode, logical))
    return model, model.factory(QuantMode.TRAIN).init(jax.random.key(0), X)


STORED = "aqt/AqtDotGeneral_0/qrhs/qvalue"


@pytest.mark.slow
@pytest.mark.parametrize("logical", [False, True])
def test_boxes_of_linen(logical):
    model, variables = linen(logical)
    assert recorded(model, variables) == {
        "params/Dense_0/kernel": ("embed", "mlp"),
        "params/Dense_0/bias": ("mlp",),
        STORED: ("embed", "mlp"),
    }


@pytest.mark.slow
def test_variables_that_were_unboxed_have_the_names_that_the_model_gives():
    model, variables = linen(logical=False)
    assert recorded(model, nn.unbox(variables)) == recorded(model, variables)


def test_logical_names_are_those_of_the_mesh_where_rules_say_so():
    model, variables = linen(logical=True)
    with nn.logical_axis_rules([("mlp", "model"), ("embed", None)]):
        found = recorded(model, variables)
    assert found[STORED] == (None, "model")
    assert found["params/Dense_0/bias"] == ("model",)


def mesh():
    return jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))


def test_metadata_of_nnx():
    with jax.set_mesh(mesh()):
        init = nnx.with_partitioning(nnx.initializers.normal(), (None, "model"))
        model = nnx.Sequential(nnx.Linear(8, 8, kernel_init=init, rngs=nnx.Rngs(0)))
        graph, variables = aqt_nnx.split(model)
    # On no mesh, as from a checkpoint.
    variables = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), variables)
    assert graph.axes(variables, {}) == {"layers/0/kernel": (None, "model")}


def test_how_the_arrays_of_a_function_lie():
    """A weight that is transposed before it is quantized has other axes than the variable."""
    lies = NamedSharding(mesh(), PartitionSpec("model"))
    square, wide = (jax.device_put(w, lies) for w in (SQUARE, WIDE))

    def fn(variables, x):
        h = INT8(x, variables["square"].T, MATMUL)
        return INT8(h, variables["wide"], MATMUL)

    assert recorded(convert.Function(fn), {"square": square, "wide": wide}) == {
        "square": ("model", None),
        "wide": ("model", None),
        "wide/qvalue": ("model", None),
    }
