// Draws what /status/data says, again every two seconds. Names of models are whatever somebody
// called them, so all text goes into text nodes, and none is read as markup.

import {
  BOX, HIGH, WIDE, bars, bytes, count, drawn, element, frame, lines, quantile, seconds, short,
} from "./charts.js";

const POLL_MS = 2000;
const KEPT = 300;
const RECENT_S = 10;

const byId = (id) => document.getElementById(id);
const keyOf = (version) => `${encodeURIComponent(version.name)}/${version.version}`;
const histories = new Map(); // of each version: what it had done at each poll
const rows = new Map(); // of each version: its row, and the cells that change
let token = "";
let shown = null; // the key of the version that is drawn, and since which load of it

function setText(node, text) {
  // Left alone where nothing changed, so that a selection stays.
  if (node.textContent !== text) node.textContent = text;
}

// ---- what happened between two polls

const differences = (now, before) => now.latencies.map((c, i) => c - (before?.latencies[i] ?? 0));

function remember(key, at, { done, loaded_at: since }) {
  const kept = histories.get(key) ?? [];
  // Another load of the version counts from zero again.
  if (kept.length && kept[0].since !== since) kept.length = 0;
  kept.push({ at, done, since });
  if (kept.length > KEPT) kept.shift();
  histories.set(key, kept);
  return kept;
}

function lately(kept, secondsBack) {
  const last = kept[kept.length - 1];
  return kept.find((sample) => sample.at >= last.at - secondsBack) ?? last;
}

function drawLatencies(kept, ends) {
  const times = kept.slice(1).map((sample) => sample.at);
  const steps = kept.slice(1).map((sample, i) => differences(sample.done, kept[i].done));
  const of = (share) => steps.map((counts) => quantile(ends, counts, share));
  byId("latency-chart").replaceChildren(
    ...lines("Latency", [
      { name: "p50", kind: "first", values: of(0.5) },
      { name: "p99", kind: "second", values: of(0.99) },
    ], times, seconds),
  );
  const rates = steps.map(
    (_, i) => (kept[i + 1].done.requests - kept[i].done.requests) / (kept[i + 1].at - kept[i].at),
  );
  byId("rate-chart").replaceChildren(
    ...lines("Requests a second", [{ name: "answered", kind: "first", values: rates }], times, short),
  );
  const counts = kept[kept.length - 1].done.latencies;
  const label = (i) => (i < ends.length ? `up to ${seconds(ends[i])}` : `above ${seconds(ends[i - 1])}`);
  const whole = frame(
    `Histogram of all requests: ${counts.map((c, i) => `${label(i)}: ${c}`).join("; ")}`,
    Math.max(...counts) || 1, (v) => count(Math.round(v)), label(0), label(ends.length),
  );
  const box = { left: BOX.left, right: WIDE - BOX.right, top: BOX.top, bottom: HIGH - BOX.bottom };
  bars(counts, box, whole, (i, c) => `${label(i)}: ${count(c)}`);
  byId("histogram-chart").replaceChildren(
    element("figcaption", {}, "All requests since the version was loaded, by latency"), whole,
  );
}

// ---- models

function rowOf(version) {
  const key = keyOf(version);
  if (rows.has(key)) return rows.get(key);
  const link = element("a", { href: `#${key}` }, `${version.name} `, `version ${version.version}`);
  const cells = [...Array(9)].map((_, i) => element("td", i > 1 ? { class: "number" } : {}));
  const row = { row: element("tr", {}, element("th", { scope: "row" }, link), ...cells), cells };
  rows.set(key, row);
  return row;
}

function fill(version, at, ends) {
  const { row, cells } = rowOf(version);
  const serving = version.serving;
  const told = [version.state.toLowerCase(), "", "", "", "", "", "", "", ""];
  if (serving) {
    const done = serving.done;
    const kept = remember(keyOf(version), at, serving);
    const start = lately(kept, RECENT_S);
    const recent = differences(done, start.done);
    const rate = at > start.at ? (done.requests - start.done.requests) / (at - start.at) : 0;
    const failed = Object.values(done.failed).reduce((a, b) => a + b, 0);
    told[1] = serving.exact ? "exact" : serving.mode === "fast" ? "fast" : "not exact";
    told[2] = count(done.requests);
    told[3] = count(failed);
    told[4] = short(rate);
    told[5] = seconds(quantile(ends, recent, 0.5));
    told[6] = seconds(quantile(ends, recent, 0.99));
    told[7] = count(done.pending);
    told[8] = bytes(serving.weight_bytes);
  }
  cells.forEach((cell, i) => setText(cell, told[i]));
  cells[0].className = version.state === "READY" ? "good" : version.reason ? "bad" : "";
  cells[1].className = serving && serving.exact ? "good" : "bad";
  return row;
}

function drawModels(data) {
  const wanted = data.versions.map((version) => fill(version, data.at_s, data.latency_ends_s));
  const body = byId("versions");
  // Only where rows came or went: what is replaced loses the reader's focus.
  if (wanted.length !== body.children.length || wanted.some((row, i) => row !== body.children[i])) {
    body.replaceChildren(...wanted);
  }
  byId("empty").hidden = data.versions.length > 0;
}

// ---- one version

function factsOf(serving) {
  const tensors = (specs) => specs.map((s) => `${s.name}: ${s.datatype} [${s.shape.join(", ")}]`).join("; ");
  const lengths = Object.entries(serving.lengths).map(([name, sizes]) => `${name} to ${sizes.join(", ")}`);
  const mean = (s) => (serving.done.requests ? seconds(s / serving.done.requests) : "");
  return {
    Inputs: tensors(serving.inputs),
    Outputs: tensors(serving.outputs),
    "Padded to": lengths.join("; ") || "no dimension is symbolic",
    "Rows at once": `${serving.bucket_rows.join(", ")}; tile of ${serving.tile}`,
    Kernel: serving.kernel ?? "XLA's",
    Memory: `${bytes(serving.weight_bytes)} of weights, ${bytes(serving.float_bytes)} before ` +
      `conversion; ${bytes(serving.workspace_bytes)} to compute in`,
    "Mean in the queue, of computing": [serving.done.queue_s, serving.done.compute_s].map(mean).join(", "),
    Loaded: new Date(serving.loaded_at * 1e3).toLocaleString(),
    "Fingerprint of configurations": serving.fingerprint.slice(0, 16),
  };
}

function drawFacts(serving) {
  const list = byId("facts");
  for (const [name, text] of Object.entries(factsOf(serving))) {
    let value = [...list.querySelectorAll("dd")].find((dd) => dd.dataset.of === name);
    if (!value) {
      value = element("dd", { "data-of": name });
      list.append(element("div", {}, element("dt", {}, name), value));
    }
    setText(value, text);
  }
}

// A path, that may be broken after each part of it.
const breakable = (path) => path.split(/(?<=\/)/).flatMap((part) => [part, element("wbr", {})]);

function layerRow(layer) {
  const cell = (text, kind = "") => element("td", kind ? { class: kind } : {}, text);
  const values = element("td", {});
  if (layer.values) {
    const { low, high, counts } = layer.values;
    const step = (high - low) / counts.length;
    const chart = drawn("svg", {
      viewBox: "0 0 208 46", role: "img",
      "aria-label": `Values from ${short(low)} to ${short(high)}; the most in one of ` +
        `${counts.length} bars are ${Math.max(...counts)}`,
    });
    const range = (i) => `${short(low + i * step)} to ${short(low + (i + 1) * step)}`;
    bars(counts, { left: 0, right: 208, top: 2, bottom: 32 }, chart, (i, c) => `${range(i)}: ${count(c)}`);
    chart.append(
      drawn("line", { class: "axis", x1: 0, x2: 208, y1: 32.5, y2: 32.5 }),
      drawn("text", { x: 0, y: 44 }, short(low)),
      drawn("text", { x: 208, y: 44, "text-anchor": "end" }, short(high)),
    );
    values.append(chart);
  }
  const scales = layer.scale_shape
    ? `${layer.scale_shape.join("×")}${layer.scales ? `: ${short(layer.scales.low)} to ${short(layer.scales.high)}` : ""}`
    : "";
  return element("tr", layer.quantized ? {} : { class: "float" },
    element("th", { scope: "row" }, ...breakable(layer.name)),
    cell(layer.dtype), cell(String(layer.bits), "number"), cell(layer.shape.join("×") || "scalar"),
    cell(scales), cell(count(layer.bytes), "number"),
    cell([layer.numerics, layer.calibration].filter(Boolean).join("; ")), values,
  );
}

async function drawLayers(wanted) {
  const body = byId("layers");
  body.replaceChildren();
  const response = await ask(`status/weights/${wanted.key}`);
  const layers = response.ok ? await response.json() : [];
  if (shown === wanted) body.replaceChildren(...layers.map(layerRow));
}

function zeros(datatype, [size, ...inner]) {
  if (size === undefined) return datatype === "BOOL" ? false : datatype === "BYTES" ? "" : 0;
  return Array.from({ length: size }, () => zeros(datatype, inner));
}

function drawForm(serving) {
  byId("inputs").replaceChildren(...serving.inputs.map((input, i) => {
    const text = JSON.stringify(zeros(input.datatype, input.first));
    const area = element("textarea", {
      id: `input-${i}`, rows: Math.min(8, 2 + Math.floor(text.length / 120)), spellcheck: "false",
    });
    area.value = text;
    const about = element("span", {}, ` ${input.datatype} [${input.shape.join(", ")}], as JSON`);
    return element("div", { class: "field" }, element("label", { for: area.id }, input.name, about), area);
  }));
  byId("answer").replaceChildren();
  byId("body").hidden = true;
}

function drawSelected(data) {
  const versions = new Map(data.versions.map((version) => [keyOf(version), version]));
  const first = data.versions.find((version) => version.serving) ?? data.versions[0];
  const version = versions.get(location.hash.slice(1)) ?? first;
  byId("selected").hidden = !version;
  if (!version) return;
  const key = keyOf(version);
  for (const [name, { row }] of rows) {
    if (name === key) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  }
  const serving = version.serving;
  setText(byId("selected-title"), `${version.name}, version ${version.version}`);
  setText(byId("verdict"), serving ? serving.verdict : version.reason || version.state.toLowerCase());
  byId("verdict").className = serving ? (serving.exact ? "good" : "bad") : version.reason ? "bad" : "";
  byId("live").hidden = byId("facts").hidden = !serving;
  if (!serving) {
    shown = null;
    return;
  }
  drawFacts(serving);
  drawLatencies(histories.get(key), data.latency_ends_s);
  if (shown?.key !== key || shown.since !== serving.loaded_at) {
    shown = { key, since: serving.loaded_at };
    drawForm(serving);
    drawLayers(shown);
  }
}

// ---- requests

const ask = (path, options = {}) =>
  fetch(path, {
    ...options,
    headers: token ? { Authorization: `Bearer ${token}` } : {},
    cache: "no-store",
  });

const shapeOf = (data) => (Array.isArray(data) ? [data.length, ...(data.length ? shapeOf(data[0]) : [])] : []);

async function send(version) {
  const tensors = version.serving.inputs.map((input, i) => {
    const text = byId(`input-${i}`).value;
    let data;
    try {
      data = JSON.parse(text);
    } catch (error) {
      throw new Error(`${input.name} is no JSON: ${error.message}`);
    }
    // As it was typed: a number of 64 bits would lose some here.
    const list = Array.isArray(data) ? text : `[${text}]`;
    const told = JSON.stringify({ name: input.name, datatype: input.datatype, shape: shapeOf(data) });
    return `${told.slice(0, -1)},"data":${list}}`;
  });
  const start = performance.now();
  const response = await ask(`v2/models/${encodeURIComponent(version.name)}/versions/${version.version}/infer`, {
    method: "POST", body: `{"inputs":[${tensors.join(",")}]}`,
  });
  const text = await response.text();
  const took = seconds((performance.now() - start) / 1e3);
  byId("body").textContent = text;
  byId("body").hidden = false;
  const exact = response.ok && /"aqt_exact": *true/.test(text);
  const said = !response.ok ? `refused with ${response.status}` : exact ? "exact" : "not exact";
  byId("answer").replaceChildren(element("b", { class: exact ? "good" : "bad" }, said), `, in ${took}`);
}

let latest = null;

async function poll() {
  try {
    const response = await ask("status/data");
    const refused = response.status === 401 || response.status === 403;
    byId("access").hidden = !refused;
    if (refused) setText(byId("refusal"), (await response.json()).error);
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    latest = await response.json();
    const { version, platform, devices } = latest.server;
    setText(byId("server"), `${version} on ${platform}, ${devices} device${devices > 1 ? "s" : ""}`);
    drawModels(latest);
    drawSelected(latest);
    setText(byId("connection"), "live");
    byId("connection").className = "";
  } catch (error) {
    setText(byId("connection"), `not up to date: ${error.message}`);
    byId("connection").className = "lost";
  }
}

async function repeat() {
  await poll();
  setTimeout(repeat, POLL_MS);
}

addEventListener("hashchange", () => latest && drawSelected(latest));
byId("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token").value.trim();
  poll();
});
byId("request").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = event.target.querySelector("button");
  button.disabled = true;
  try {
    await send(latest.versions.find((version) => keyOf(version) === shown.key));
  } catch (error) {
    byId("body").hidden = true;
    byId("answer").replaceChildren(element("b", { class: "bad" }, error.message));
  } finally {
    button.disabled = false;
  }
});
repeat();
