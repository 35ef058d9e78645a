"""The geometry of a convolution, and of the two that are its gradients.

Sizes are spatial ones, a value for each dimension. With the dilated sizes x of the image, k of the
kernel and y of the output's gradient, a convolution needs x + low + high >= k. The gradient of the
image slides the reversed kernel over y, so that its result has size x; that of the kernel slides y
over the image, so that its result has size k.
"""

import dataclasses
from collections.abc import Sequence

from jax import lax

_Sizes = Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Strides, padding (low, high) and dilations by spatial dimension, and the groups."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    batch_groups: int = 1

    @staticmethod
    def parse(
        image: _Sizes,
        kernel: _Sizes,
        strides: _Sizes,
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: _Sizes | None,
        rhs_dilation: _Sizes | None,
        groups: int,
    ) -> "Window":
        """The window that the arguments of `jax.lax.conv_general_dilated` describe.

        Raises:
          ValueError: padding is given by name, and the image is dilated.
        """
        ones = (1,) * len(strides)
        rhs_dilation = ones if rhs_dilation is None else tuple(rhs_dilation)
        lhs_dilation = ones if lhs_dilation is None else tuple(lhs_dilation)
        if isinstance(padding, str):
            if lhs_dilation != ones:
                raise ValueError(
                    f"padding {padding!r} is not defined with `lhs_dilation`: give it as numbers"
                )
            spans = [_dilated(n, d) for n, d in zip(kernel, rhs_dilation, strict=True)]
            padding = lax.padtype_to_pads(image, spans, strides, padding)
        return Window(
            strides=tuple(strides),
            padding=tuple((int(low), int(high)) for low, high in padding),
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            groups=groups,
        )

    def of_image_gradient(self, image: _Sizes, kernel: _Sizes, out: _Sizes) -> "Window":
        """The window of the reversed kernel over the output's gradient."""
        padding: list[tuple[int, int]] = []
        for axis, (low, _) in enumerate(self.padding):
            span = _dilated(kernel[axis], self.rhs_dilation[axis])
            before = span - 1 - low
            whole = _dilated(image[axis], self.lhs_dilation[axis]) + span - 1
            padding.append((before, whole - before - _dilated(out[axis], self.strides[axis])))
        return dataclasses.replace(
            self, strides=self.lhs_dilation, padding=tuple(padding), lhs_dilation=self.strides
        )

    def of_kernel_gradient(self, image: _Sizes, kernel: _Sizes, out: _Sizes) -> "Window":
        """The window of the output's gradient over the image, with examples as features."""
        padding: list[tuple[int, int]] = []
        for axis, (low, _) in enumerate(self.padding):
            whole = _dilated(out[axis], self.strides[axis])
            whole += _dilated(kernel[axis], self.rhs_dilation[axis]) - 1
            size = _dilated(image[axis], self.lhs_dilation[axis])
            padding.append((low, whole - low - size))
        return Window(
            strides=self.rhs_dilation,
            padding=tuple(padding),
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.strides,
            groups=1,
            batch_groups=self.groups,
        )


def _dilated(size: int, dilation: int) -> int:
    return 0 if size == 0 else (size - 1) * dilation + 1
