"""Noise that makes rounding stochastic."""

import abc
import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, slots=True)
class Noise(abc.ABC):
    """Noise to add to a scaled tensor before it is rounded to the nearest bucket.

    Along `shared_axes` of the tensor one value is drawn for all; negative axes count from the end.

    Raises:
      ValueError: `shared_axes` is not a tuple of integers, or names an axis twice.
    """

    shared_axes: tuple[int, ...] = ()

    def __post_init__(self):
        axes = self.shared_axes
        if type(axes) is not tuple or not all(type(axis) is int for axis in axes):
            raise ValueError(f"`shared_axes` must be a tuple of integers, got {axes!r}")
        if len(set(axes)) != len(axes):
            raise ValueError(f"`shared_axes` must name each axis once, got {axes!r}")

    @abc.abstractmethod
    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """float32 noise for a tensor of `shape`, within half a bucket of zero.

        It has that shape, with 1 in the shared axes.

        Raises:
          ValueError: a shared axis is out of range of `shape`, or named from both ends.
        """

    def drawn_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape` with 1 in the shared axes.

        Raises:
          ValueError: a shared axis is out of range of `shape`, or named from both ends.
        """
        ndim = len(shape)
        if any(not -ndim <= axis < ndim for axis in self.shared_axes):
            raise ValueError(
                f"`shared_axes={self.shared_axes}` do not fit a tensor of {ndim} dimensions: use "
                f"axes from {-ndim} to {ndim - 1}"
            )
        shared = {axis % ndim for axis in self.shared_axes}
        if len(shared) != len(self.shared_axes):
            raise ValueError(
                f"`shared_axes={self.shared_axes}` name an axis of {ndim} from both ends: name "
                f"each once"
            )
        return tuple(1 if axis in shared else size for axis, size in enumerate(shape))


@dataclasses.dataclass(frozen=True, slots=True)
class Uniform(Noise):
    """Uniform in [-0.5, 0.5): rounding is then unbiased, up or down by the distance to each."""

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """float32 noise for a tensor of `shape`, in steps of 2^-23."""
        return jax.random.uniform(key, self.drawn_shape(shape), jnp.float32) - 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Centered(Noise):
    """Uniform over the 65,536 centers of equal parts of [-0.5, 0.5]: 16 random bits a value.

    Noise and its negative are equally likely, and neither end is reached: whole numbers stay as
    they are. It draws half of the random bits that `Uniform` does.
    """

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """float32 noise for a tensor of `shape`, within 0.5 - 2^-17 of zero."""
        bits = jax.random.bits(key, self.drawn_shape(shape), jnp.uint16)
        return (bits.astype(jnp.float32) + 0.5) / 2**16 - 0.5
