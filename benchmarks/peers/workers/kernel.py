"""Our int8 kernel, as it is called in the graph of a bundle that is served."""

import jax
import numpy as np
from protocol import work

from aqt_engine.kernels.contraction import int8_matmul
from aqt_engine.kernels.packing import pack


def product(arrays, *, rows):
    columns = arrays["qvalue"].shape[1]
    packed = jax.device_put(pack(arrays["qvalue"]))
    forward = jax.jit(lambda packed, x: int8_matmul(x, packed, columns))
    x = arrays["xq"][:rows]
    return lambda: np.asarray(forward(packed, x))


if __name__ == "__main__":
    work({"product": product})
