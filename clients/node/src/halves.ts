// FP16 and BF16, which JavaScript has no arrays of: float32 to their bits and back.

const bitsOf = (values: Float32Array) =>
  new Uint32Array(values.buffer, values.byteOffset, values.length);

/** `bits` without their last `count`, which are rounded half to even. */
function rounded(bits: number, count: number): number {
  const half = 2 ** (count - 1);
  const kept = Math.floor(bits / 2 ** count);
  const rest = bits - kept * 2 ** count;
  return kept + (rest > half || (rest === half && kept % 2 === 1) ? 1 : 0);
}

/** The bits of BF16 nearest to `values`, half to even. */
export function toBf16(values: Float32Array): Uint16Array {
  return Uint16Array.from(bitsOf(values), (bits) =>
    (bits & 0x7fffffff) > 0x7f800000 ? (bits >>> 16) | 0x40 : rounded(bits, 16),
  );
}

/** The values that bits of BF16 stand for. */
export function fromBf16(bits: Uint16Array): Float32Array {
  return new Float32Array(Uint32Array.from(bits, (b) => b << 16).buffer);
}

/** The bits of FP16 nearest to `values`, half to even; what is too large is infinite. */
export function toFp16(values: Float32Array): Uint16Array {
  return Uint16Array.from(bitsOf(values), (bits) => {
    const sign = (bits >>> 16) & 0x8000;
    const size = bits & 0x7fffffff;
    if (size > 0x7f800000) return sign | 0x7e00 | ((size >>> 13) & 0x3ff);
    const exponent = size >>> 23;
    if (exponent > 142) return sign | 0x7c00;
    // The exponent's bias is 127 there and 15 here; a carry out of the fraction goes into it.
    if (exponent >= 113) return sign | rounded(size - (112 << 23), 13);
    const dropped = 126 - exponent;
    return sign | (dropped > 25 ? 0 : rounded((size & 0x7fffff) | 0x800000, dropped));
  });
}

/** The values that bits of FP16 stand for. */
export function fromFp16(bits: Uint16Array): Float32Array {
  return Float32Array.from(bits, (b) => {
    const sign = b & 0x8000 ? -1 : 1;
    const exponent = (b >>> 10) & 0x1f;
    const fraction = b & 0x3ff;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
  });
}
