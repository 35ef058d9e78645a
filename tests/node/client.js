// Calls a server as its .proto says, and prints what it answers as JSON.
//
// node client.js ADDRESS PROTO, with the values of one row on standard input as a JSON list.

"use strict";

const fs = require("fs");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, proto] = process.argv.slice(2);
const row = JSON.parse(fs.readFileSync(0, "utf8"));
const definition = loader.loadSync(proto, {
  keepCase: true,
  longs: Number,
  enums: String,
  defaults: true,
});
const { GRPCInferenceService } = grpc.loadPackageDefinition(definition).inference;
const client = new GRPCInferenceService(address, grpc.credentials.createInsecure());
const deadline = () => ({ deadline: Date.now() + 60_000 });

const call = (name, request) =>
  new Promise((resolve) => {
    client[name](request, new grpc.Metadata(), deadline(), (error, response) =>
      resolve(error ? { code: grpc.status[error.code], details: error.details } : response),
    );
  });

function request(id, contents) {
  const tensor = { name: "x", datatype: "FP32", shape: [1, row.length] };
  const raw = Buffer.from(new Float32Array(row).buffer);
  return contents
    ? { model_name: "linear", id, inputs: [{ ...tensor, contents: { fp32_contents: row } }] }
    : { model_name: "linear", id, inputs: [tensor], raw_input_contents: [raw] };
}

function stream(requests) {
  return new Promise((resolve, reject) => {
    const answers = [];
    const open = client.ModelStreamInfer(new grpc.Metadata(), deadline());
    open.on("data", (answer) => answers.push(answer));
    open.on("error", reject);
    open.on("end", () => resolve(answers));
    requests.forEach((one) => open.write(one));
    open.end();
  });
}

async function main() {
  const raw = await call("ModelInfer", request("raw"));
  const typed = await call("ModelInfer", request("typed", true));
  const answers = await stream([request("a"), { model_name: "nope", id: "b" }, request("c")]);
  const floats = (bytes) => Array.from(new Float32Array(new Uint8Array(bytes).buffer));
  return {
    ready: (await call("ServerReady", {})).ready,
    metadata: await call("ModelMetadata", { name: "linear" }),
    raw: floats(raw.raw_output_contents[0]),
    id: raw.id,
    exact: raw.parameters.aqt_exact.bool_param,
    typed: typed.outputs[0].contents.fp32_contents,
    stream: answers.map((a) => ({
      id: a.infer_response.id,
      error: a.error_message,
      y: a.infer_response.raw_output_contents.map(floats),
    })),
    unknown: await call("ModelInfer", { model_name: "nope" }),
  };
}

main().then(
  (found) => {
    process.stdout.write(JSON.stringify(found));
    client.close();
  },
  (error) => {
    process.stderr.write(`${error.stack}\n`);
    process.exit(1);
  },
);
