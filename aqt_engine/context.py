"""What a quantized op is told from outside: its key, the train step, and the mode of each side."""

import dataclasses
import enum

import jax


class QuantMode(enum.Enum):
    """What a quantized op does with one of its sides.

    TRAIN quantizes the float operand on every call. CALIBRATE also updates calibration
    statistics. CONVERT quantizes as TRAIN does and stores the result. SERVE reads what CONVERT
    stored and never looks at the float operand.
    """

    TRAIN = 1
    CALIBRATE = 2
    CONVERT = 3
    SERVE = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """What changes from call to call.

    `key` is the PRNG key that noise is drawn with; None where no noise is drawn. `train_step` is
    the number of optimizer steps done.
    """

    key: jax.Array | None = None
    train_step: int | jax.Array | None = None
