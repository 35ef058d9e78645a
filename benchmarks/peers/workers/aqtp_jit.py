"""The original AQT, `aqtp`, in plain `jax.jit`: its Flax module in SERVE mode."""

import functools
import warnings

import flax.linen as nn
import jax
import numpy as np
from protocol import work

warnings.filterwarnings("ignore")

import aqt.jax.v2.config as aqtp_config  # noqa: E402
import aqt.jax.v2.flax.aqt_flax as aqtp_flax  # noqa: E402
import aqt.jax.v2.utils as aqtp_utils  # noqa: E402


def layer(arrays, *, rows):
    def module(mode):
        dot_general = functools.partial(
            aqtp_flax.AqtDotGeneral,
            aqtp_config.fully_quantized(fwd_bits=8, bwd_bits=8),
            rhs_quant_mode=mode,
            rhs_freeze_mode=aqtp_flax.FreezerMode.CALIBRATION_AND_VALUE,
        )
        return nn.Dense(arrays["w"].shape[1], use_bias=False, dot_general_cls=dot_general)

    x = arrays["x"][:rows]
    params = {"params": {"kernel": arrays["w"]}}
    key = {"params": jax.random.key(0)}
    convert = module(aqtp_utils.QuantMode.CONVERT)
    _, stored = convert.apply(params, x, rngs=key, mutable=True)
    variables = jax.tree.map(jax.numpy.asarray, {**params, **stored})
    serve = module(aqtp_utils.QuantMode.SERVE)
    forward = jax.jit(lambda variables, x: serve.apply(variables, x, rngs=key))
    return lambda: np.asarray(forward(variables, x))


if __name__ == "__main__":
    work({"layer": layer})
