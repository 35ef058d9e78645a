// The client: a connection, deadlines, and calls that are made again.

import * as path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import * as grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

import { checked, targetOf } from "./addresses.js";
import { ClientError, fromService } from "./errors.js";
import {
  type InferRequest, type InferResult, type ModelMetadata, type ModelState, type ServerMetadata,
  type WireMetadata, type WireResponse, decode, encode, metadataOf,
} from "./messages.js";

const SERVICE = loadSync(path.join(__dirname, "open_inference.proto"), {
  keepCase: true,
  longs: String,
  enums: String,
  defaults: true,
  arrays: true,
  objects: true,
  oneofs: true,
})["inference.GRPCInferenceService"] as grpc.ServiceDefinition;

const MAX_MESSAGE_BYTES = 256 * 2 ** 20;
const FIRST_BACKOFF_S = 0.1;
const MAX_BACKOFF_S = 2;
const BALANCED = JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] });

export interface ClientOptions {
  /** Seconds that a call has for all of its attempts together; 30 without it. */
  readonly timeoutS?: number;
  /** How often a call is tried while the server is away or overloaded; 5 without it. */
  readonly maxAttempts?: number;
  /** Without it the connection is not encrypted; `grpc.credentials.createSsl` makes them. */
  readonly credentials?: grpc.ChannelCredentials;
  /** Who calls, or what gives it for each attempt. */
  readonly token?: string | (() => string | Promise<string>);
}

export interface CallOptions {
  /** Instead of the client's. */
  readonly timeoutS?: number;
}

/** The answer to one request of a stream: its result, or what it failed with. */
export type StreamAnswer =
  | { readonly id: string; readonly result: InferResult; readonly error?: undefined }
  | { readonly id: string; readonly error: ClientError; readonly result?: undefined };

interface WireStreamAnswer {
  readonly error_message: string;
  readonly infer_response: WireResponse;
}

/**
 * A connection to the server at `address`, "host:port". Nothing is connected before a call.
 *
 * Several addresses take calls in turn, and so do all that the only "dns:///host:port" of a list
 * resolves to: one that is down is left out, and a call that fails there, or finds it loading or
 * stopping, goes to another. Of several the IPs are looked up once, at the first call, and their
 * certificates must have the name of the first.
 */
export class Client {
  private readonly addresses: readonly string[];
  private readonly balanced: boolean;
  private connection: Promise<grpc.Client> | undefined;
  private closed = false;

  /** @throws TypeError if there is no address, or one of several is no "host:port". */
  constructor(
    address: string | readonly string[],
    private readonly options: ClientOptions = {},
  ) {
    this.balanced = typeof address !== "string";
    this.addresses = checked(typeof address === "string" ? [address] : address);
  }

  close(): void {
    this.closed = true;
    this.connection?.then((connection) => connection.close(), () => {});
  }

  /** Whether the server runs. One that cannot be reached is an error, and not a no. */
  async isLive(): Promise<boolean> {
    return (await this.call<{ live: boolean }>("ServerLive", {})).live;
  }

  /** Whether the server takes requests of inference. */
  async isReady(): Promise<boolean> {
    return (await this.call<{ ready: boolean }>("ServerReady", {})).ready;
  }

  /** Whether the model does. Without `version`: the one that would answer. */
  async isModelReady(name: string, version = ""): Promise<boolean> {
    return (await this.call<{ ready: boolean }>("ModelReady", { name, version })).ready;
  }

  serverMetadata(): Promise<ServerMetadata> {
    return this.call<ServerMetadata>("ServerMetadata", {});
  }

  async modelMetadata(name: string, version = ""): Promise<ModelMetadata> {
    return metadataOf(await this.call<WireMetadata>("ModelMetadata", { name, version }));
  }

  /** Each version of the model, where it is in its life, and why. */
  async modelStates(name: string): Promise<ModelState[]> {
    const { models } = await this.call<{ models: (ModelState & { name: string })[] }>(
      "RepositoryIndex", {},
    );
    return models
      .filter((model) => model.name === name)
      .map(({ version, state, reason }) => ({ version, state, reason }));
  }

  /**
   * The answer to a request. While the server is unavailable or overloaded it is sent again, within
   * its time.
   *
   * @throws ClientError if the server refuses it or does not answer; TypeError or RangeError if it
   *   cannot be sent.
   */
  async infer(request: InferRequest, options: CallOptions = {}): Promise<InferResult> {
    return decode(await this.call<WireResponse>("ModelInfer", encode(request), options));
  }

  /**
   * The answers to `requests`, in their order, over one stream. A request that fails is an answer
   * with an error, and the others go on. Without `timeoutS` there is no end to its time.
   *
   * @throws ClientError if the stream itself fails, and whatever `requests` throws.
   */
  async *stream(
    requests: Iterable<InferRequest> | AsyncIterable<InferRequest>,
    { timeoutS }: CallOptions = {},
  ): AsyncGenerator<StreamAnswer, void, undefined> {
    const method = methodOf("ModelStreamInfer");
    const connection = await this.connected();
    const call = connection.makeBidiStreamRequest(
      method.path, method.requestSerialize, method.responseDeserialize, await this.metadata(),
      timeoutS === undefined ? {} : { deadline: Date.now() + timeoutS * 1e3 },
    );
    let failed: { error: unknown } | undefined;
    // Heard here too, as nobody reads after the caller has left: unheard, it ends the process.
    call.on("error", (error) => (failed ??= { error: fromService(error as grpc.ServiceError) }));
    this.send(call, requests).catch((error: unknown) => {
      failed ??= { error };
      call.cancel();
    });
    try {
      for await (const answer of call) yield streamAnswer(answer as WireStreamAnswer);
    } catch (error) {
      failed ??= { error };
    } finally {
      call.cancel();
    }
    if (failed) throw failed.error;
  }

  private async send(
    call: grpc.ClientDuplexStream<object, object>,
    requests: Iterable<InferRequest> | AsyncIterable<InferRequest>,
  ): Promise<void> {
    for await (const request of requests) {
      if (call.destroyed) return;
      // Until it is sent, so that no more is taken than goes over the wire.
      await new Promise<void>((resolve) => {
        call.once("close", resolve);
        call.write(encode(request), () => {
          call.off("close", resolve);
          resolve();
        });
      });
    }
    call.end();
  }

  private async call<Response>(
    name: string, request: object, { timeoutS = this.options.timeoutS ?? 30 }: CallOptions = {},
  ): Promise<Response> {
    const deadline = Date.now() + timeoutS * 1e3;
    for (let attempt = 1; ; attempt++) {
      try {
        return (await this.attempt(name, request, deadline)) as Response;
      } catch (error) {
        const again = error instanceof ClientError && error.temporary;
        if (!again || attempt >= (this.options.maxAttempts ?? 5)) throw error;
        const backoff = Math.min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (attempt - 1));
        const wait = (error.retryS + Math.random() * backoff) * 1e3;
        if (Date.now() + wait >= deadline) throw error;
        await sleep(wait);
      }
    }
  }

  private async attempt(name: string, request: object, deadline: number): Promise<object> {
    const method = methodOf(name);
    const metadata = await this.metadata();
    const connection = await this.connected();
    return new Promise((resolve, reject) => {
      connection.makeUnaryRequest(
        method.path, method.requestSerialize, method.responseDeserialize, request, metadata,
        { deadline },
        (error, response) => {
          if (error) reject(fromService(error));
          else resolve(response as object);
        },
      );
    });
  }

  private connected(): Promise<grpc.Client> {
    if (this.closed) throw new ClientError("the client was closed before the call", "FAILED_PRECONDITION");
    this.connection ??= this.connect().catch((error: unknown) => {
      this.connection = undefined; // The next attempt looks the names up again.
      throw error;
    });
    return this.connection;
  }

  private async connect(): Promise<grpc.Client> {
    const { target, host } = await targetOf(this.addresses);
    const credentials = this.options.credentials ?? grpc.credentials.createInsecure();
    return new grpc.Client(target, credentials, {
      "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
      "grpc.initial_reconnect_backoff_ms": 100,
      "grpc.max_reconnect_backoff_ms": 1000,
      "grpc.enable_retries": 0, // It would not wait as long as the server says.
      ...(this.balanced && { "grpc.service_config": BALANCED }),
      ...(host !== undefined && {
        "grpc.default_authority": host,
        "grpc.ssl_target_name_override": host,
      }),
    });
  }

  private async metadata(): Promise<grpc.Metadata> {
    const made = new grpc.Metadata();
    const { token } = this.options;
    if (token !== undefined) {
      made.set("authorization", `Bearer ${typeof token === "string" ? token : await token()}`);
    }
    return made;
  }
}

function methodOf(name: string): grpc.MethodDefinition<object, object> {
  return SERVICE[name] as grpc.MethodDefinition<object, object>;
}

function streamAnswer({ error_message: message, infer_response: response }: WireStreamAnswer): StreamAnswer {
  if (!message) return { id: response.id, result: decode(response) };
  const code = response.parameters["aqt_status"]?.["string_param"];
  const known = typeof code === "string" && code in grpc.status;
  return {
    id: response.id,
    error: new ClientError(message, known ? (code as keyof typeof grpc.status) : "UNKNOWN"),
  };
}
