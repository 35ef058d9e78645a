"""Noise that makes rounding stochastic."""

import abc
import dataclasses

import jax
import jax.numpy as jnp


class Noise(abc.ABC):
    """Noise to add to a scaled tensor before it is rounded to the nearest bucket."""

    @abc.abstractmethod
    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """float32 noise of `shape`, within half a bucket of zero."""


@dataclasses.dataclass(frozen=True, slots=True)
class Uniform(Noise):
    """Uniform in [-0.5, 0.5): rounding is then unbiased, up or down by the distance to each."""

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """float32 noise of `shape`, each value drawn on its own."""
        return jax.random.uniform(key, shape, jnp.float32) - 0.5
