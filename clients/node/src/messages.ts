// The protocol's messages that the client reads and writes, and what they are for its callers.

import { ClientError } from "./errors.js";
import { type Tensor, fromContents, fromRaw, toRaw } from "./tensors.js";

/** One request. `outputs` names those that are wanted; without it all are. */
export interface InferRequest {
  readonly model: string;
  readonly version?: string;
  readonly id?: string;
  readonly inputs: Readonly<Record<string, Tensor>>;
  readonly outputs?: readonly string[];
  readonly parameters?: Readonly<Record<string, boolean | bigint | number | string>>;
}

/** Its answer. `exact`: whether it has the bits of training; undefined: the server does not say. */
export interface InferResult {
  readonly model: string;
  readonly version: string;
  readonly id: string;
  readonly outputs: Readonly<Record<string, Tensor>>;
  readonly parameters: Readonly<Record<string, boolean | bigint | number | string>>;
  readonly exact: boolean | undefined;
}

/** Name, datatype and shape of an input or output; a size of -1 is any. */
export interface TensorMetadata {
  readonly name: string;
  readonly datatype: string;
  readonly shape: readonly number[];
}

export interface ModelMetadata {
  readonly name: string;
  readonly versions: readonly string[];
  readonly platform: string;
  readonly inputs: readonly TensorMetadata[];
  readonly outputs: readonly TensorMetadata[];
}

export interface ServerMetadata {
  readonly name: string;
  readonly version: string;
  readonly extensions: readonly string[];
}

/** Where a version is in its life, in the server's words, and why. */
export interface ModelState {
  readonly version: string;
  readonly state: string;
  readonly reason: string;
}

interface WireTensor {
  readonly name: string;
  readonly datatype: string;
  readonly shape: readonly string[]; // of 64 bits
  readonly contents?: Readonly<Record<string, readonly unknown[]>> | null;
}

type WireParameter = { readonly parameter_choice?: string } & Readonly<Record<string, unknown>>;

export interface WireResponse {
  readonly model_name: string;
  readonly model_version: string;
  readonly id: string;
  readonly parameters: Readonly<Record<string, WireParameter>>;
  readonly outputs: readonly WireTensor[];
  readonly raw_output_contents: readonly Uint8Array[];
}

export interface WireMetadata extends Omit<ModelMetadata, "inputs" | "outputs"> {
  readonly inputs: readonly WireTensor[];
  readonly outputs: readonly WireTensor[];
}

/** The message of a request, with raw contents. */
export function encode(request: InferRequest): object {
  const inputs = Object.entries(request.inputs);
  return {
    model_name: request.model,
    model_version: request.version ?? "",
    id: request.id ?? "",
    parameters: Object.fromEntries(
      Object.entries(request.parameters ?? {}).map(([name, value]) => [name, parameter(value)]),
    ),
    inputs: inputs.map(([name, { datatype, shape }]) => ({ name, datatype, shape })),
    outputs: (request.outputs ?? []).map((name) => ({ name })),
    raw_input_contents: inputs.map(([, of]) => toRaw(of)),
  };
}

/**
 * What a response stands for.
 *
 * @throws ClientError if it breaks the protocol.
 */
export function decode(response: WireResponse): InferResult {
  const raw = response.raw_output_contents;
  const read = (output: WireTensor, i: number): [string, Tensor] => {
    const shape = output.shape.map(Number);
    try {
      const of = raw.length
        ? fromRaw(output.datatype, shape, raw[i] ?? new Uint8Array())
        : fromContents(output.datatype, shape, output.contents ?? {});
      return [output.name, of];
    } catch (error) {
      const reason = `output '${output.name}': ${(error as Error).message}`;
      throw new ClientError(`the server's answer breaks the protocol: ${reason}`, "INTERNAL");
    }
  };
  const parameters = Object.fromEntries(
    Object.entries(response.parameters).map(([name, value]) => [name, parameterOf(value)]),
  );
  const exact = parameters["aqt_exact"];
  return {
    model: response.model_name,
    version: response.model_version,
    id: response.id,
    outputs: Object.fromEntries(response.outputs.map(read)),
    parameters,
    exact: typeof exact === "boolean" ? exact : undefined,
  };
}

/** What a response of metadata stands for. */
export function metadataOf(found: WireMetadata): ModelMetadata {
  const specs = (tensors: readonly WireTensor[]) =>
    tensors.map(({ name, datatype, shape }) => ({ name, datatype, shape: shape.map(Number) }));
  return { ...found, inputs: specs(found.inputs), outputs: specs(found.outputs) };
}

function parameter(value: boolean | bigint | number | string): object {
  if (typeof value === "boolean") return { bool_param: value };
  if (typeof value === "string") return { string_param: value };
  const whole = typeof value === "bigint" || Number.isSafeInteger(value);
  return whole ? { int64_param: value.toString() } : { double_param: value };
}

function parameterOf(found: WireParameter): boolean | bigint | number | string {
  const value = found.parameter_choice ? found[found.parameter_choice] : "";
  const wide = found.parameter_choice === "int64_param" || found.parameter_choice === "uint64_param";
  return wide ? BigInt(value as string) : (value as boolean | number | string);
}
