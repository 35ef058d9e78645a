"""Float sums in an order of their own.

How a compiler adds up `jnp.sum` is its affair, and differs between processors. These add halves of
an axis to each other, elementwise, until one is left: every addition is written out, and is
rounded alike on every platform. It takes log2(n) additions of whole tensors.
"""

import jax
import jax.numpy as jnp


def ordered_sum(x: jax.Array, axis: int = -1) -> jax.Array:
    """The sum of `x` along `axis`, which is dropped, with the same bits on every platform.

    The first half of the axis is added to the second; where the count is odd, the last value waits
    for the next round. An empty axis sums to 0.

    Raises:
      ValueError: `axis` is out of range.
    """
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"`axis={axis}` does not fit a tensor of {x.ndim} dimensions")
    x = jnp.moveaxis(x, axis, 0)
    if x.shape[0] == 0:
        return jnp.zeros(x.shape[1:], x.dtype)
    while (count := x.shape[0]) > 1:
        half = count // 2
        added = x[:half] + x[half : 2 * half]
        x = jnp.concatenate([added, x[2 * half :]]) if count % 2 else added
    return x[0]


def ordered_mean(x: jax.Array, axis: int = -1) -> jax.Array:
    """The mean of `x` along `axis`: `ordered_sum` times the nearest float to 1 / n.

    Raises:
      ValueError: `axis` is out of range, or there is nothing to take the mean of.
    """
    total = ordered_sum(x, axis)
    if x.shape[axis] == 0:
        raise ValueError(f"axis {axis} of shape {list(x.shape)} is empty, and has no mean")
    return total * jnp.asarray(1 / x.shape[axis], x.dtype)
