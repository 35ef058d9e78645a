"""Linen's own layers, called so that they contract with hooks from outside.

While `intercepting` lasts, a call of a layer that has fields for hooks runs a copy of it instead,
in the same scope and with the hooks filled in. `nn.Einsum` and `nn.Embed.attend` have no such
fields: what they compute is computed here. A layer that the model gave a hook of its own keeps it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Hashable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext

from aqt_engine.ops.einsum import labels_of

ATTENTION_OPS = ("qk_attn_weights_einsum", "attn_weights_value_einsum")
"""The ops of an attention layer, which have no weight on either side."""

Hook = Callable[..., jax.Array]
Hooks = Callable[[str, str], Hook | None]
"""From the path and the op of a contraction to what computes it; None leaves it as it is.

A hook is called as what it stands for: `jax.lax.dot_general`, `jax.lax.conv_general_dilated` or,
for an op that ends in "einsum", `jax.numpy.einsum`. It may be an unbound linen module.
"""

_hooked = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def intercepting(hooks: Hooks, key: Hashable) -> Generator[None]:
    """Makes layers contract with `hooks` while it lasts. Use it around each run of a model anew.

    `key` stands for `hooks`: equal ones are for equal hooks. Flax keeps what it has traced of an
    `nn.jit` class, and must not take for one model what it has traced of another.
    """
    with _hooked(key), nn.intercept_methods(_interceptor(hooks)):
        yield


def _interceptor(hooks: Hooks) -> Callable[..., Any]:
    # A module is kept beside its copy, so that its id stays its own.
    copies: dict[int, tuple[nn.Module, Any]] = {}

    def intercept(
        following: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: InterceptorContext,
    ) -> Any:
        module = context.module
        make = _makers(module).get(context.method_name)
        if make is None or module.scope is None:
            return following(*args, **kwargs)
        if id(module) not in copies:
            copies[id(module)] = module, make(module, functools.partial(hooks, path_of(module)))
        copy = copies[id(module)][1]
        return following(*args, **kwargs) if copy is None else copy(*args, **kwargs)

    return intercept


# What a layer is called with instead, given its hooks by op; None where it stays as it is.
_Maker = Callable[[Any, Callable[[str], Hook | None]], Callable[..., Any] | None]


def _makers(module: nn.Module) -> Mapping[str, _Maker]:
    """How to make a layer's methods contract with hooks, by the names of the methods."""
    match module:
        case nn.Dense() | nn.DenseGeneral():
            return {"__call__": _with_dot_general}
        case nn.Conv():
            return {"__call__": _with_convolution}
        case nn.MultiHeadDotProductAttention():
            return {"__call__": _with_attention}
        case nn.Einsum() if type(module).__call__ is nn.Einsum.__call__:
            return {"__call__": _with_einsum}
        case nn.Embed() if type(module).attend is nn.Embed.attend:
            return {"attend": _with_attend}
        case _:
            return {}


def _with_dot_general(layer: Any, hooks: Callable[[str], Hook | None]) -> nn.Module | None:
    if layer.dot_general is not None or layer.dot_general_cls is not None:
        return None
    hook = hooks("dot_general")
    return None if hook is None else layer.clone(parent=layer.scope, dot_general=hook)


def _with_convolution(layer: Any, hooks: Callable[[str], Hook | None]) -> nn.Module | None:
    if layer.conv_general_dilated is not None or layer.conv_general_dilated_cls is not None:
        return None
    hook = hooks("conv_general_dilated")
    return None if hook is None else layer.clone(parent=layer.scope, conv_general_dilated=hook)


def _with_attention(layer: Any, hooks: Callable[[str], Hook | None]) -> nn.Module | None:
    given = [getattr(layer, f"{op}_cls") for op in ATTENTION_OPS]
    if given != [None, None]:
        return None
    found = [hooks(op) for op in ATTENTION_OPS]
    if found == [None, None]:
        return None
    # Flax wants both or none of them.
    plain = functools.partial(jnp.einsum, precision=layer.precision)
    einsums = {
        f"{op}_cls": functools.partial(_bound, plain if hook is None else hook, op)
        for op, hook in zip(ATTENTION_OPS, found, strict=True)
    }
    attention = layer.attention_fn
    if layer.precision is not None:
        attention = _without_precision(attention)
    return layer.clone(parent=layer.scope, attention_fn=attention, **einsums)


def _bound(hook: Hook, name: str) -> Hook:
    """`hook`, as a submodule of the attention that asks for it if it is a module."""
    return hook.copy(name=name) if isinstance(hook, nn.Module) else hook


def _without_precision(attention: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attention`, which is not told a precision beside einsums: that it would refuse."""

    @functools.wraps(attention)
    def run(*args: Any, **kwargs: Any) -> jax.Array:
        return attention(*args, **{**kwargs, "precision": None})

    return run


def _with_einsum(layer: Any, hooks: Callable[[str], Hook | None]) -> nn.Module | None:
    hook = hooks("einsum")
    if hook is None:
        return None
    fields: dict[str, Any] = {
        f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.init
    }
    fields.update(parent=layer.scope, einsum=hook)
    return _Einsum(**fields)


def _with_attend(layer: Any, hooks: Callable[[str], Hook | None]) -> Hook | None:
    hook = hooks("attend")
    if hook is None:
        return None
    if isinstance(hook, nn.Module):
        hook = hook.clone(parent=layer.scope.push("attend", reuse=True))

    def attend(query: jax.Array) -> jax.Array:
        query, embedding = layer.promote_dtype(query, layer.embedding, dtype=layer.dtype)
        return hook(query, embedding.T, (((query.ndim - 1,), (0,)), ((), ())))

    return attend


class _Einsum(nn.Einsum):
    """`nn.Einsum` with a hook: the same parameters, and the same result if it is `jnp.einsum`."""

    einsum: Hook = jnp.einsum

    @nn.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        equation = nn.merge_param("einsum_str", self.einsum_str, einsum_str)
        kernel = self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
        _, right, out = labels_of(equation, inputs.ndim, len(self.shape))
        sizes = {c: self.shape[i] for i, c in enumerate(right)}
        bias = None
        if self.use_bias:
            shape = tuple(sizes[c] for c in out if c in sizes)
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        # Arrays, None for a bias of None: Flax declares that any of them may be None.
        promoted: list[Any] = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        y = self.einsum(
            equation,
            *promoted[:2],
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        if bias is None:
            return y
        return y + jnp.reshape(promoted[2], [sizes.get(c, 1) for c in out])


def path_of(module: nn.Module) -> str:
    """The path of a bound module, as rules have it: "encoder/Dense_0"."""
    return "/".join(module.path)
