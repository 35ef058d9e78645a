"""A forward over the devices of a mesh: each copy of the weights takes its share of the tiles."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aqt_engine.batches import Array, Form
from aqt_engine.layout import COPIES

Forward = Callable[[Sequence[jax.Array], Sequence[jax.Array]], list[jax.Array]]
"""Outputs of weights and of the inputs of some tiles."""


def lowered(
    forward: Forward,
    weights: Sequence[jax.Array | jax.ShapeDtypeStruct],
    batch: Form,
    mesh: Mesh,
    *,
    gathered: bool,
) -> Any:
    """`forward` for the inputs of `batch`, over the devices of `mesh`.

    It is given weights as they are spread, or `gathered`: whole.
    """
    tiles = PartitionSpec(COPIES)
    sharding = NamedSharding(mesh, tiles)
    structs = [
        jax.ShapeDtypeStruct(of.laid_out, of.dtype, sharding=sharding) for of in batch.inputs
    ]
    mapped = jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(PartitionSpec(), tiles),
        out_specs=tiles,
        axis_names={COPIES},
        check_vma=False,
    )
    # A process reads only what lies on its own devices.
    whole = NamedSharding(mesh, PartitionSpec())
    read = sharding if jax.process_count() == 1 else whole

    def forward_gathered(
        weights: Sequence[jax.Array], inputs: Sequence[jax.Array]
    ) -> list[jax.Array]:
        return mapped([lax.with_sharding_constraint(w, whole) for w in weights], inputs)

    laid_out = forward_gathered if gathered else mapped
    return jax.jit(laid_out, out_shardings=read).lower(weights, structs)


def given(arrays: list[Array], mesh: Mesh) -> Sequence[Array | jax.Array]:
    """`arrays` as an executable over the devices of `mesh` takes them."""
    if jax.process_count() == 1:
        return arrays
    sharding = NamedSharding(mesh, PartitionSpec(COPIES))
    return [
        jax.make_array_from_callback(array.shape, sharding, lambda part, a=array: a[part])
        for array in arrays
    ]
