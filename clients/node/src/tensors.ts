// Tensors as the protocol carries them: typed arrays to raw contents and back.

import { endianness } from "node:os";

if (endianness() !== "LE") {
  throw new Error("aqt-client needs a little-endian machine, as the wire is little-endian");
}

/** What holds the elements of each datatype. BOOL is 0 or 1; FP16 and BF16 are their bits. */
export interface Elements {
  BOOL: Uint8Array;
  UINT8: Uint8Array;
  UINT16: Uint16Array;
  UINT32: Uint32Array;
  UINT64: BigUint64Array;
  INT8: Int8Array;
  INT16: Int16Array;
  INT32: Int32Array;
  INT64: BigInt64Array;
  FP16: Uint16Array;
  BF16: Uint16Array;
  FP32: Float32Array;
  FP64: Float64Array;
  BYTES: readonly Uint8Array[];
}

export type Datatype = keyof Elements;

/** Elements in C order, with the shape that they have. */
export type Tensor<D extends Datatype = Datatype> = {
  [K in D]: { readonly datatype: K; readonly shape: readonly number[]; readonly data: Elements[K] };
}[D];

type Fixed = Elements[Exclude<Datatype, "BYTES">];

interface Kind {
  readonly bytes: number;
  readonly make: {
    new (buffer: ArrayBuffer): Fixed;
  };
  /** The field of typed contents; FP16 and BF16 have none. */
  readonly contents?: string;
}

const KINDS: Record<Exclude<Datatype, "BYTES">, Kind> = {
  BOOL: { bytes: 1, make: Uint8Array, contents: "bool_contents" },
  UINT8: { bytes: 1, make: Uint8Array, contents: "uint_contents" },
  UINT16: { bytes: 2, make: Uint16Array, contents: "uint_contents" },
  UINT32: { bytes: 4, make: Uint32Array, contents: "uint_contents" },
  UINT64: { bytes: 8, make: BigUint64Array, contents: "uint64_contents" },
  INT8: { bytes: 1, make: Int8Array, contents: "int_contents" },
  INT16: { bytes: 2, make: Int16Array, contents: "int_contents" },
  INT32: { bytes: 4, make: Int32Array, contents: "int_contents" },
  INT64: { bytes: 8, make: BigInt64Array, contents: "int64_contents" },
  FP16: { bytes: 2, make: Uint16Array },
  BF16: { bytes: 2, make: Uint16Array },
  FP32: { bytes: 4, make: Float32Array, contents: "fp32_contents" },
  FP64: { bytes: 8, make: Float64Array, contents: "fp64_contents" },
};

function sizeOf(shape: readonly number[]): number {
  const wrong = shape.find((size) => !Number.isSafeInteger(size) || size < 0);
  if (wrong !== undefined) throw new RangeError(`shape [${shape}] has ${wrong}: give each its size`);
  return shape.reduce((all, size) => all * size, 1);
}

/**
 * The tensor of `data`; strings stand for their UTF-8 bytes.
 *
 * @throws TypeError or RangeError if `data` is no array of the datatype, or has not the elements of
 *   `shape`.
 */
export function tensor<D extends Datatype>(
  datatype: D,
  shape: readonly number[],
  data: D extends "BYTES" ? readonly (string | Uint8Array)[] : Elements[D],
): Tensor<D> {
  const held =
    datatype === "BYTES"
      ? (data as readonly (string | Uint8Array)[]).map((e) => (typeof e === "string" ? Buffer.from(e) : e))
      : data;
  const made = { datatype, shape, data: held } as unknown as Tensor<D>;
  toRaw(made as Tensor);
  return made;
}

/** The raw contents of a tensor; they share its memory, unless it is of BYTES. */
export function toRaw(of: Tensor): Buffer {
  const { datatype, shape, data } = of;
  const count = sizeOf(shape);
  if (data.length !== count) {
    throw new RangeError(`shape [${shape}] has ${count} elements, got ${data.length}`);
  }
  if (datatype === "BYTES") {
    return Buffer.concat(
      data.flatMap((element) => {
        const length = Buffer.alloc(4);
        length.writeUInt32LE(element.length);
        return [length, element];
      }),
    );
  }
  const kind = KINDS[datatype] as Kind | undefined;
  if (!kind) throw new TypeError(`${datatype} is not a datatype of the protocol`);
  if (!(data instanceof kind.make)) {
    throw new TypeError(`${datatype} takes a ${kind.make.name}, got a ${(data as object).constructor.name}`);
  }
  if (datatype === "BOOL" && data.some((element) => element > 1)) {
    throw new RangeError("a BOOL is 0 or 1, and one is not");
  }
  return Buffer.from(data.buffer, data.byteOffset, data.byteLength);
}

/**
 * The tensor with these raw contents, in memory of its own.
 *
 * @throws RangeError if they do not hold exactly the elements of `shape`.
 */
export function fromRaw(datatype: string, shape: readonly number[], raw: Uint8Array): Tensor {
  const count = sizeOf(shape);
  if (datatype === "BYTES") return { datatype, shape, data: decodeBytes(raw, count) };
  const kind = kindOf(datatype);
  if (raw.length !== count * kind.bytes) {
    throw new RangeError(
      `${datatype} of shape [${shape}] takes ${count * kind.bytes} bytes, got ${raw.length}`,
    );
  }
  // A copy: what gRPC gives starts anywhere, and typed arrays at multiples of their elements.
  return { datatype, shape, data: new kind.make(new Uint8Array(raw).buffer) } as Tensor;
}

/** The tensor with these typed contents. */
export function fromContents(
  datatype: string,
  shape: readonly number[],
  contents: Readonly<Record<string, readonly unknown[]>>,
): Tensor {
  const count = sizeOf(shape);
  const field = datatype === "BYTES" ? "bytes_contents" : kindOf(datatype).contents;
  const elements = (field && contents[field]) || [];
  if (elements.length !== count) {
    throw new RangeError(`shape [${shape}] has ${count} elements, got ${elements.length}`);
  }
  if (datatype === "BYTES") return { datatype, shape, data: elements as Uint8Array[] };
  const kind = kindOf(datatype);
  const data = new kind.make(new ArrayBuffer(count * kind.bytes));
  const wide = data instanceof BigInt64Array || data instanceof BigUint64Array;
  elements.forEach((element, i) => {
    data[i] = wide ? BigInt(element as string) : Number(element);
  });
  return { datatype, shape, data } as Tensor;
}

function kindOf(datatype: string): Kind {
  const kind = Object.hasOwn(KINDS, datatype) && KINDS[datatype as keyof typeof KINDS];
  if (!kind) throw new TypeError(`${datatype} is not a datatype of the protocol`);
  return kind;
}

function decodeBytes(raw: Uint8Array, count: number): Uint8Array[] {
  const all = Buffer.from(raw);
  const found: Uint8Array[] = [];
  let at = 0;
  while (found.length < count) {
    const end = at + 4 <= all.length ? at + 4 + all.readUInt32LE(at) : Infinity;
    if (end > all.length) throw new RangeError(`contents of BYTES end in element ${found.length}`);
    found.push(all.subarray(at + 4, end));
    at = end;
  }
  if (at !== all.length) throw new RangeError(`${all.length - at} bytes follow the elements of BYTES`);
  return found;
}
