// Against the server that a test of Python starts: tests/server/test_node_client.py.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, describe, it } from "node:test";

import { credentials } from "@grpc/grpc-js";
import { Client, fromBf16, fromFp16, tensor, toBf16, toFp16 } from "../dist/index.js";

const { addresses, victim, tls, token, features, row, expected, values, halves } = JSON.parse(
  readFileSync(process.env.AQT_EXPECTED, "utf8"),
);
const bytesOf = (base64) => new Uint8Array(Buffer.from(base64, "base64"));
const inMemory = (base64, make) => new make(bytesOf(base64).buffer);
const sameBits = (found, base64) =>
  assert.equal(Buffer.from(found.buffer, found.byteOffset, found.byteLength).toString("base64"), base64);
// By the first that differs: to show arrays of 65,536 elements helps nobody.
const sameElements = (found, known) => {
  assert.equal(found.length, known.length);
  const at = found.findIndex((element, i) => !Object.is(element, known[i]));
  assert.equal(at, -1, `element ${at} is ${found[at]}, and not ${known[at]}`);
};
const arrays = {
  BOOL: Uint8Array, UINT8: Uint8Array, UINT16: Uint16Array, UINT32: Uint32Array,
  UINT64: BigUint64Array, INT8: Int8Array, INT16: Int16Array, INT32: Int32Array,
  INT64: BigInt64Array, FP16: Uint16Array, BF16: Uint16Array, FP32: Float32Array,
  FP64: Float64Array,
};
const x = () => tensor("FP32", [1, features], inMemory(row, Float32Array));
const linear = (id) => ({ model: "linear", id, inputs: { x: x() } });
const fails = (promise, code, message) =>
  assert.rejects(promise, (error) => {
    assert.equal(error.name, "ClientError");
    assert.equal(error.code, code);
    assert.match(error.message, message);
    return true;
  });

describe("a client", () => {
  let client;
  before(() => (client = new Client(addresses.server, { token: async () => token })));
  after(() => client.close());

  it("gets the bits of training, and is told that they are", async () => {
    const result = await client.infer(linear("a"));
    assert.deepEqual([result.model, result.version, result.id], ["linear", "1", "a"]);
    assert.equal(result.exact, true);
    assert.equal(result.parameters.aqt_mode, "exact");
    sameBits(result.outputs.y.data, expected);
  });

  it("takes and gives every datatype", async () => {
    const inputs = Object.fromEntries(
      Object.entries(values).map(([name, { shape, raw }]) =>
        [name, tensor(name, shape, inMemory(raw, arrays[name]))]),
    );
    const { outputs } = await client.infer({ model: "identity", inputs });
    assert.equal(Object.keys(outputs).length, Object.keys(arrays).length);
    for (const [name, { shape, raw }] of Object.entries(values)) {
      const found = outputs[`OUT_${name}`];
      assert.equal(found.datatype, name);
      assert.deepEqual(found.shape, shape);
      assert.ok(found.data instanceof arrays[name]);
      sameBits(found.data, raw);
    }
    const some = await client.infer({ model: "identity", inputs, outputs: ["OUT_BF16"] });
    assert.deepEqual(Object.keys(some.outputs), ["OUT_BF16"]);
  });

  it("sends text, which a model of numbers refuses by name", async () => {
    const text = tensor("BYTES", [1, 2], ["größer", Buffer.from([0, 255])]);
    await fails(client.infer({ model: "linear", inputs: { x: text } }), "INVALID_ARGUMENT", /BYTES/);
  });

  it("asks what the server and its models are", async () => {
    assert.equal(await client.isLive(), true);
    assert.equal(await client.isReady(), true);
    assert.equal(await client.isModelReady("linear"), true);
    assert.equal(await client.isModelReady("linear", "1"), true);
    assert.ok((await client.serverMetadata()).version);
    const { inputs, versions } = await client.modelMetadata("linear");
    assert.deepEqual(inputs, [{ name: "x", datatype: "FP32", shape: [-1, features] }]);
    assert.deepEqual(versions, ["1"]);
    assert.deepEqual((await client.modelStates("linear")).map((s) => s.state), ["READY"]);
  });

  it("says what was wrong", async () => {
    await fails(client.infer({ model: "nope", inputs: {} }), "NOT_FOUND", /no model 'nope'/);
    await fails(client.infer(linear("a"), { timeoutS: 0 }), "DEADLINE_EXCEEDED", /./);
    assert.throws(() => tensor("FP32", [2, 2], new Float32Array(3)), /has 4 elements, got 3/);
    assert.throws(() => tensor("FP32", [1], new Float64Array(1)), /takes a Float32Array/);
    assert.throws(() => tensor("BOOL", [1], new Uint8Array([2])), /0 or 1/);
    assert.throws(() => tensor("FP8", [1], new Uint8Array(1)), /not a datatype/);
  });

  it("is refused without its token", async () => {
    const stranger = new Client(addresses.server, { token: "token-of-nobody-1234" });
    await fails(stranger.infer(linear("a")), "UNAUTHENTICATED", /./);
    stranger.close();
  });

  it("streams requests, and one that fails ends no other", async () => {
    const requests = async function* () {
      yield linear("a");
      yield { model: "nope", id: "b", inputs: {} };
      for (let i = 0; i < 100; i++) yield linear(`c${i}`);
    };
    const answers = [];
    for await (const answer of client.stream(requests())) answers.push(answer);
    assert.equal(answers.length, 102);
    assert.deepEqual(answers.slice(0, 3).map((a) => a.id), ["a", "b", "c0"]);
    assert.equal(answers[101].id, "c99");
    assert.equal(answers[1].error.code, "NOT_FOUND");
    for (const { result } of [answers[0], answers[101]]) sameBits(result.outputs.y.data, expected);
  });

  it("ends a stream that its reader leaves, or whose requests throw", async () => {
    for await (const { id } of client.stream([linear("a"), linear("b")])) {
      assert.equal(id, "a");
      break;
    }
    const broken = async function* () {
      yield linear("a");
      throw new Error("no more rows");
    };
    const read = async () => {
      for await (const answer of client.stream(broken())) assert.equal(answer.id, "a");
    };
    await assert.rejects(read, /no more rows/);
    await fails(client.stream([], { timeoutS: 0 }).next(), "DEADLINE_EXCEEDED", /./);
    const stranger = new Client(addresses.server);
    const refused = [];
    for await (const answer of stranger.stream([linear("a")])) refused.push(answer);
    assert.deepEqual(refused.map(({ id, error }) => [id, error.code]), [["a", "UNAUTHENTICATED"]]);
    stranger.close();
  });
});

it("gets BYTES as they were sent", async () => {
  const client = new Client(addresses.fakes[0]);
  const texts = ["größer", Buffer.from([0, 255]), ""];
  const { outputs } = await client.infer({ model: "m", inputs: { b: tensor("BYTES", [3], texts) } });
  assert.equal(outputs.b.datatype, "BYTES");
  assert.deepEqual(outputs.b.data.map(Buffer.from), texts.map((text) => Buffer.from(text)));
  client.close();
});

describe("a client of several servers", () => {
  it("sends calls to them in turn", async () => {
    const client = new Client(addresses.fakes);
    for (let i = 0; i < 100; i++) assert.equal(await client.isLive(), true);
    client.close();
  });

  it("has no wrong answer and no failed call while one is killed", async () => {
    const port = addresses.server.split(":")[1];
    const client = new Client([`localhost:${port}`, victim.address], { token });
    let answered = 0;
    const ask = async () => {
      for (let i = 0; i < 100; i++) {
        sameBits((await client.infer(linear("a"))).outputs.y.data, expected);
        if (++answered === 300) process.kill(victim.pid, "SIGKILL");
      }
    };
    await Promise.all(Array.from({ length: 8 }, ask));
    assert.equal(answered, 800);
    client.close();
  });

  it("names an address that is wrong", async () => {
    assert.throws(() => new Client([]), /`address` is empty/);
    assert.throws(() => new Client(["a:1", "b"]), /'b': give each as 'host:port'/);
    const once = { maxAttempts: 1 };
    const nowhere = new Client(["127.0.0.1:1", "no-such-host.invalid:1"], once);
    await fails(nowhere.isLive(), "UNAVAILABLE", /'no-such-host.invalid:1' has no IP/);
    const mixed = new Client(["127.0.0.1:1", "[::1]:1"], once);
    await fails(mixed.isLive(), "INVALID_ARGUMENT", /both IPv4 and IPv6/);
    mixed.close();
    await fails(mixed.isLive(), "FAILED_PRECONDITION", /was closed/);
  });
});

describe("an encrypted connection", () => {
  const pem = (text) => text && Buffer.from(text);
  const client = (address, ca, { key, certificate } = {}) =>
    new Client(address, {
      maxAttempts: 1, credentials: credentials.createSsl(pem(ca), pem(key), pem(certificate)),
    });
  const refused = async (of) => {
    await fails(of.isLive(), "UNAVAILABLE", /./);
    of.close();
  };

  it("is one to a server whose certificate is trusted", async () => {
    for (const address of [tls.address, [tls.address], [tls.address, tls.address]]) {
      const trusting = client(address, tls.ca);
      assert.equal(await trusting.isLive(), true);
      trusting.close();
    }
    await refused(client(tls.address, tls.otherCa));
    await refused(new Client(tls.address, { maxAttempts: 1 }));
  });

  it("says who calls by the client's certificate", async () => {
    const known = client(tls.mutual, tls.ca, tls.client);
    sameBits((await known.infer(linear("a"))).outputs.y.data, expected);
    known.close();
    await refused(client(tls.mutual, tls.ca));
    await refused(client(tls.mutual, tls.ca, tls.stranger));
  });
});

it("comes again when the server says", async () => {
  const once = new Client(addresses.limited, { maxAttempts: 1 });
  const patient = new Client(addresses.limited);
  await once.infer(linear("a"));
  await assert.rejects(once.infer(linear("b")), (error) => {
    assert.equal(error.code, "RESOURCE_EXHAUSTED");
    assert.ok(error.retryS > 0 && error.retryS <= 2, String(error.retryS));
    return true;
  });
  sameBits((await patient.infer(linear("c"))).outputs.y.data, expected);
  once.close();
  patient.close();
});

describe("halves", () => {
  const kinds = { fp16: [toFp16, fromFp16, 0x7c00], bf16: [toBf16, fromBf16, 0x7f80] };
  for (const [name, [to, from, infinity]] of Object.entries(kinds)) {
    const bits = Uint16Array.from({ length: 65536 }, (_, i) => i);
    const numbers = bits.filter((b) => (b & 0x7fff) <= infinity);

    it(`${name} stands for the values that numpy gives it`, () => {
      const known = inMemory(halves[name], Float32Array);
      sameElements(from(bits), known);
    });

    it(`${name} is rounded to the nearest, half to even`, () => {
      sameElements(to(from(numbers)), numbers);
      const finite = bits.filter((b) => (b & 0x7fff) < infinity - 1);
      const low = from(finite);
      const high = from(finite.map((b) => b + 1));
      const middle = low.map((v, i) => v / 2 + high[i] / 2);
      sameElements(to(middle), finite.map((b) => b + (b & 1)));
      const above = new Uint32Array(middle.slice().buffer).map((b) => b + 1);
      sameElements(to(new Float32Array(above.buffer)), finite.map((b) => b + 1));
      assert.ok(from(to(new Float32Array([NaN]))).every(Number.isNaN));
    });
  }
});
