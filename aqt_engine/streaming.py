"""Programs of all weights, computed so that few of them are in memory at once.

The compiler may order the operations of a program so that as little as possible is held, or so that
as much as possible can be computed at once, which for a training forward is to quantize all weights
before the first layer. The order of operations is not what they compute: the bits are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval

from aqt_engine import heap

Keep = Callable[[Any], Any]
"""Puts an array elsewhere, such as into a file that is mapped, and gives it from there."""


def as_it_is(array: Any) -> Any:
    """`array` itself."""
    return array


def frugal(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit(fn)`, compiled so that it holds as little as it can."""
    if jax.default_backend() != "cpu":
        return jax.jit(fn)
    # Elsewhere it is what XLA does by itself.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return jax.jit(fn, compiler_options=options)


def in_turn(fn: Callable[..., Any], keep: Keep, *args: Any) -> Any:
    """What `fn` gives for `args`, compiled, each array of it by `keep`.

    Where `keep` does something, what takes more than half of the largest argument is computed in
    several programs, each of which computes what its results need. What is made of the same
    arguments is one program's.
    """
    if keep is as_it_is:
        return jax.jit(fn)(*args)
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    given, (outputs, tree) = jax.tree.leaves(args), jax.tree.flatten(shapes)
    most = max((leaf.nbytes for leaf in given), default=0) // 2
    results: list[Any] = [None] * len(outputs)
    for group in _groups(closed, [x.size * x.dtype.itemsize for x in outputs], most):
        wanted = [i in group for i in range(len(outputs))]
        part, consts, used = _part(closed, wanted)
        arguments = [x for x, use in zip(given, used, strict=True) if use]
        alone = core.jaxpr_as_fun(ClosedJaxpr(part, consts))
        for i, value in zip(sorted(group), frugal(alone)(*arguments), strict=True):
            results[i] = jax.device_put(keep(value))
            del value
        heap.give_back()
    return jax.tree.unflatten(tree, results)


def _groups(closed: ClosedJaxpr, nbytes: Sequence[int], most: int) -> Iterator[set[int]]:
    """The results, those of the same arguments together, others while they take at most `most`."""
    count = len(nbytes)
    if sum(nbytes) <= most:
        yield set(range(count))
        return
    together: dict[tuple[bool, ...], set[int]] = {}
    for i in range(count):
        used = _part(closed, [j == i for j in range(count)])[2]
        together.setdefault(tuple(used), set()).add(i)
    group, size = set[int](), 0
    for members in together.values():
        takes = sum(nbytes[i] for i in members)
        if group and size + takes > most:
            yield group
            group, size = set(), 0
        group |= members
        size += takes
    yield group


def _part(closed: ClosedJaxpr, wanted: list[bool]) -> tuple[Any, list[Any], list[bool]]:
    """What of a program the wanted results need: operations, constants, and which arguments."""
    part, consts, used = partial_eval.dce_jaxpr_consts(closed.jaxpr, wanted, instantiate=False)
    return part, [c for c, use in zip(closed.consts, consts, strict=True) if use], used
