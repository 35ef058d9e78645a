export { Client, type CallOptions, type ClientOptions, type StreamAnswer } from "./client.js";
export { ClientError } from "./errors.js";
export { fromBf16, fromFp16, toBf16, toFp16 } from "./halves.js";
export type {
  InferRequest, InferResult, ModelMetadata, ModelState, ServerMetadata, TensorMetadata,
} from "./messages.js";
export { type Datatype, type Elements, type Tensor, tensor } from "./tensors.js";
