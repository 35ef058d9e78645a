"""The kernel as a JAX function."""

import jax
import jax.numpy as jnp
import numpy as np

from aqt_engine.kernels import library


def int8_matmul(lhs: jax.Array, packed: jax.Array, columns: int) -> jax.Array:
    """`lhs` times a packed matrix: int8 of shape (rows, depth) to int32 of (rows, columns).

    Sums wrap around modulo 2**32, as XLA's do.

    Raises:
      RuntimeError: there is no kernel here.
    """
    if library.instruction_set() is None:
        raise RuntimeError("there is no int8 kernel here: install where there is a C++ compiler")
    rows, depth = lhs.shape
    out = jax.ShapeDtypeStruct((rows, columns), jnp.int32)
    return jax.ffi.ffi_call(library.TARGET, out)(
        lhs, packed, depth=np.int64(depth), columns=np.int64(columns)
    )
