// Numbers in words, and charts of them. What is given as text stays text: see page.js.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function drawn(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export const count = (value) => value.toLocaleString("en");
export const bytes = (value) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  for (; value >= 1000 && at < units.length - 1; at++) value /= 1000;
  return `${at ? value.toPrecision(3) : value} ${units[at]}`;
};
export const seconds = (value) =>
  value === null ? "" : value < 1 ? `${(value * 1e3).toPrecision(3)} ms` : `${value.toPrecision(3)} s`;
export const short = (value) => String(Number(value.toPrecision(3)));

// The least latency that `share` of the requests stay within, guessed within its bucket.
export function quantile(ends, counts, share) {
  const all = counts.reduce((a, b) => a + b, 0);
  if (!all) return null;
  let left = share * all;
  for (let i = 0; i < counts.length; i++) {
    if (left <= counts[i] && counts[i]) {
      if (i === ends.length) break;
      const low = i ? ends[i - 1] : 0;
      return low + ((ends[i] - low) * left) / counts[i];
    }
    left -= counts[i];
  }
  return ends[ends.length - 1];
}

export const WIDE = 350;
export const HIGH = 160;
export const BOX = { left: 54, right: 8, top: 10, bottom: 24 };

export function frame(label, most, unit, left, right) {
  const bottom = HIGH - BOX.bottom;
  const chart = drawn("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": label });
  for (const share of [0, 0.5, 1]) {
    const y = bottom - share * (bottom - BOX.top);
    chart.append(
      drawn("line", { class: "axis", x1: BOX.left, x2: WIDE - BOX.right, y1: y, y2: y }),
      drawn("text", { x: BOX.left - 6, y: y + 4, "text-anchor": "end" }, unit(most * share)),
    );
  }
  chart.append(
    drawn("text", { x: BOX.left, y: HIGH - 6 }, left),
    drawn("text", { x: WIDE - BOX.right, y: HIGH - 6, "text-anchor": "end" }, right),
  );
  return chart;
}

export function lines(title, series, times, unit) {
  const latest = series.map((s) => s.values.findLast((v) => v !== null) ?? null);
  const most = Math.max(...series.flatMap((s) => s.values.map((v) => v ?? 0))) || 1;
  const told = series.map((s, i) => `${s.name} ${latest[i] === null ? "none yet" : unit(latest[i])}`);
  const span = times.length > 1 ? times[times.length - 1] - times[0] : 0;
  const chart = frame(`${title}: ${told.join(", ")}`, most, unit, `${Math.round(span)} s ago`, "now");
  const x = (t) => BOX.left + ((t - times[0]) / (span || 1)) * (WIDE - BOX.left - BOX.right);
  const y = (v) => HIGH - BOX.bottom - (v / most) * (HIGH - BOX.bottom - BOX.top);
  for (const { kind, values } of series) {
    let path = "";
    values.forEach((v, i) => {
      if (v === null) return;
      const joined = i && values[i - 1] !== null;
      // A point alone is a dash, or it would not be seen.
      path += joined ? `L${x(times[i])} ${y(v)}` : `M${x(times[i]) - 1.5} ${y(v)}h3`;
    });
    if (path) chart.append(drawn("path", { class: kind, d: path }));
  }
  const caption = element("figcaption", {}, `${title}: `);
  series.forEach((s, i) => {
    caption.append(i ? ", " : "", element("b", { class: s.kind }, s.name));
    if (latest[i] !== null) caption.append(` ${unit(latest[i])}`);
  });
  return [caption, chart];
}

export function bars(counts, box, chart, say) {
  const most = Math.max(...counts) || 1;
  const wide = (box.right - box.left) / counts.length;
  counts.forEach((c, i) => {
    if (!c) return;
    const high = Math.max(1, (c / most) * (box.bottom - box.top));
    const bar = drawn("rect", {
      class: "bar", x: box.left + i * wide, width: Math.max(0.5, wide - 0.6), y: box.bottom - high,
      height: high,
    });
    bar.append(drawn("title", {}, say(i, c)));
    chart.append(bar);
  });
}
