// What a call can fail with.

import { type ServiceError, status } from "@grpc/grpc-js";
import protobuf from "protobufjs";

const ANY = "type.googleapis.com/google.rpc.RetryInfo";
const DETAILS = protobuf.Root.fromJSON({
  nested: {
    Any: { fields: { type_url: { type: "string", id: 1 }, value: { type: "bytes", id: 2 } } },
    Status: { fields: { details: { rule: "repeated", type: "Any", id: 3 } } },
    Duration: { fields: { seconds: { type: "int64", id: 1 }, nanos: { type: "int32", id: 2 } } },
    RetryInfo: { fields: { retry_delay: { type: "Duration", id: 1 } } },
  },
});
interface Details {
  readonly details: readonly { readonly type_url: string; readonly value: Uint8Array }[];
}
interface RetryInfo {
  readonly retry_delay?: { readonly seconds: number; readonly nanos: number };
}

/**
 * A call failed; the message is the server's sentence.
 *
 * `code` is the name of the gRPC status, and `retryS` after how many seconds the server would have
 * it repeated, 0 where it does not say.
 */
export class ClientError extends Error {
  override readonly name = "ClientError";

  constructor(
    message: string,
    readonly code: keyof typeof status,
    readonly retryS = 0,
  ) {
    super(message);
  }

  /** Whether the same call may succeed later: the server was away, or had too much to do. */
  get temporary(): boolean {
    // gRPC gives a message that is too large the code of a server that is overloaded.
    const large = this.message.includes("message larger than max");
    // CANCELLED is what a server that stops answers to calls that arrive at that moment.
    const away = this.code === "UNAVAILABLE" || this.code === "CANCELLED";
    return away || (this.code === "RESOURCE_EXHAUSTED" && !large);
  }
}

/** The error that stands for what gRPC failed with. */
export function fromService(error: ServiceError): ClientError {
  const code = status[error.code] as keyof typeof status;
  return new ClientError(error.details || error.message, code, retryS(error));
}

/** What google.rpc.RetryInfo in the status says; 0 without one. */
function retryS(error: ServiceError): number {
  const [found] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!(found instanceof Uint8Array)) return 0;
  try {
    const { details } = read<Details>("Status", found);
    const info = details?.find((detail) => detail.type_url === ANY);
    const delay = info && read<RetryInfo>("RetryInfo", info.value).retry_delay;
    return delay ? Math.max(0, Number(delay.seconds) + delay.nanos / 1e9) : 0;
  } catch {
    return 0; // It is no such message, and the error stands without it.
  }
}

function read<T>(type: string, bytes: Uint8Array): T {
  const found = DETAILS.lookupType(type);
  return found.toObject(found.decode(bytes), { longs: Number, defaults: true }) as T;
}
