"""What a quantized op is told from outside, and what changes from call to call."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """The key and the train step of one call.

    `key` is the PRNG key that noise is drawn with; None where no noise is drawn. `train_step` is
    the number of optimizer steps done, and no op depends on it: what changes with the step is a
    whole configuration, by `aqt_engine.schedule`.
    """

    key: jax.Array | None = None
    train_step: int | jax.Array | None = None
