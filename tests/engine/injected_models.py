"""The same models twice: of linen's layers as they come, and with every hook filled in by hand."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from aqt_engine import QuantMode, config
from aqt_engine.flax import AqtConvGeneralDilated, AqtDotGeneral, AqtEinsum
from aqt_engine.rules import Rule, Rules

# Without noise: a model by hand draws its noise under other names.
INT8 = config.config_v4(8, 8, 8, use_stochastic_rounding=False)
INT4 = config.config_v4(4, 8, 8, use_stochastic_rounding=False)
RULES = Rules(
    (
        Rule(modules=".*attention", config=INT4, name="attention"),
        Rule(modules=".*", config=INT8, name="rest"),
    )
)
TOKENS = np.random.default_rng(0).integers(0, 11, (4, 6)).astype(np.int32)


class Everything(nn.Module):
    """Every layer that rules reach, compact."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        x = nn.Conv(8, (3,), name="conv")(embed(tokens))
        x = nn.Einsum((8, 2, 4), "...x,xyz->...zy", name="einsum")(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="general")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(x)
        dense = nn.Dense(8, name="shared")
        x = dense(nn.relu(dense(x)))
        x = nn.remat(nn.Dense)(8, name="remat")(x)
        return embed.attend(x)


class ByHand(nn.Module):
    """`Everything`, with hooks."""

    mode: QuantMode = QuantMode.TRAIN

    @nn.compact
    def __call__(self, tokens):
        def dot_general():
            return AqtDotGeneral(INT8, rhs_quant_mode=self.mode)

        embed = nn.Embed(11, 8, name="embed")
        conv = AqtConvGeneralDilated(INT8, rhs_quant_mode=self.mode)
        x = nn.Conv(8, (3,), name="conv", conv_general_dilated=conv)(embed(tokens))
        x = EinsumByHand(self.mode, name="einsum")(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="general", dot_general=dot_general())(x)
        x = x + nn.MultiHeadDotProductAttention(
            2,
            name="attention",
            qkv_dot_general_cls=dot_general,
            out_dot_general_cls=dot_general,
            qk_attn_weights_einsum_cls=lambda: AqtEinsum(INT4),
            attn_weights_value_einsum_cls=lambda: AqtEinsum(INT4),
        )(x)
        dense = nn.Dense(8, name="shared", dot_general=dot_general())
        x = dense(nn.relu(dense(x)))
        x = nn.remat(nn.Dense)(8, name="remat", dot_general=dot_general())(x)
        contract = dot_general()
        return contract(x, embed.embedding.T, (((2,), (0,)), ((), ())))


class EinsumByHand(nn.Module):
    mode: QuantMode

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (8, 2, 4))
        bias = self.param("bias", nn.initializers.zeros_init(), (4, 2))
        einsum = AqtEinsum(INT8, rhs_quant_mode=self.mode)
        return einsum("...x,xyz->...zy", x, kernel) + bias


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Dense(x.shape[-1], name="dense")(x)), None


class BlockByHand(nn.Module):
    mode: QuantMode

    @nn.compact
    def __call__(self, x, _=None):
        hook = AqtDotGeneral(INT8, rhs_quant_mode=self.mode)
        return nn.relu(nn.Dense(x.shape[-1], name="dense", dot_general=hook)(x)), None


class Lifted(nn.Module):
    """Layers under transformations, defined in `setup`."""

    block: type[nn.Module] = Block
    arguments: tuple = ()

    def setup(self):
        axes = {"params": 0, "aqt": 0}
        split = {"params": True}
        self.scanned = nn.scan(self.block, variable_axes=axes, split_rngs=split, length=3)(
            *self.arguments
        )
        self.mapped = nn.vmap(self.block, variable_axes=axes, split_rngs=split)(*self.arguments)
        self.rematted = nn.remat(self.block)(*self.arguments)

    def __call__(self, x):
        x = self.scanned(x, None)[0]
        x = self.mapped(x)[0]
        return self.rematted(x)[0]


class Custom(nn.Module):
    """Contractions that no layer's hook reaches, and one that has its own configuration."""

    @nn.compact
    def __call__(self, x, flag=False):
        assert isinstance(flag, bool)
        w = self.param("w", nn.initializers.normal(), (8, 8))
        x = nn.Dense(8, dot_general=AqtDotGeneral(INT4), name="own")(x)
        x = nn.ConvTranspose(8, (2,), name="transposed")(x)
        x = nn.ConvLocal(8, (2,), name="local")(x)
        x = nn.Dense(8, name="plain")(x)
        x = nn.remat(Raw)(name="raw")(x)
        return jnp.einsum("bld,de->ble", x, w)


class Raw(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.einsum("bld,bmd->blm", x, x) @ x
