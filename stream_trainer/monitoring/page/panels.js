// The panels beside the charts. One that does not apply to the run stays hidden.

import { byId, duration, element, heat, number, part, percent, row, show } from "./shapes.js";

let chosen = null; // step of the pool that is shown; null for the newest
let order = null; // column that candidates are sorted by; null for the pool's own order
const open = new Set(); // arms that were clicked

export function drawPanels(panels) {
  drawPools(panels);
  drawMask(panels.mask);
  drawArms(panels.arms);
  drawLearned(panels.learned);
  drawMix(panels.mix);
  drawTime(panels.time);
}

function drawPools(panels) {
  const pools = panels.pools ?? [];
  if (!show("pool", pools.length > 0)) return show("layers", false);
  const pool = pools.find((found) => found.step === chosen) ?? pools[0];
  if (pool.step !== chosen) chosen = null;
  const again = () => drawPools(panels);
  byId("pool").querySelector(".tabs").replaceChildren(...pools.map((found) => tab(found, pool, found === pools[0], again)));
  byId("pool-note").textContent = noteOf(pool);
  drawCandidates(pool, again);
  const layers = panels.layers ?? [];
  if (!show("layers", Boolean(pool.by_layer) && layers.length > 0)) return;
  heat(byId("layers").querySelector("table"), pool.candidates.map((_, i) => String(i)), pool.by_layer.map((values, i) => ({
    name: layers[i], values, titles: values.map((_, j) => `candidate ${j}`),
  })));
}

function tab(found, pool, newest, again) {
  return element("button", {
    type: "button", role: "tab", ariaSelected: String(found === pool), textContent: `step ${found.step}`,
    onclick: () => { chosen = newest ? null : found.step; again(); },
  });
}

function noteOf(pool) {
  const parts = [`${pool.candidates.filter((one) => one.coefficient > 0).length} of ${pool.candidates.length} trained on`];
  if (pool.positive !== null) parts.push(`${pool.positive} point to the target`);
  if (pool.redundancy !== null) parts.push(`redundancy takes ${percent(pool.redundancy)} of the gain`);
  parts.push(`as good as ${number(pool.effective_samples, 3)} samples`);
  return parts.join(" · ") + (pool.result === "applied" ? "" : ` · ${pool.result}`);
}

function drawCandidates(pool, again) {
  const has = (name) => pool.candidates.some((one) => one[name] !== null && one[name] !== undefined);
  const columns = [["#", "index"], ["coefficient", "coefficient"], ["alignment", "alignment"], ["loss", "loss"], ["tokens", "tokens"],
    ["source", "label"], ["arm", "arm"], ["like", "near"], ["record", "offset"], ["text", "text"]]
    .filter(([, name]) => name === "index" || has(name));
  const rows = pool.candidates.map((one, index) => ({ ...one, index }));
  if (order !== null) rows.sort((a, b) => compare(b[order], a[order]));
  const head = element("tr", {}, ...columns.map(([title, name]) => element("th", {
    textContent: title, scope: "col", title: `sort by ${title}`, onclick: () => { order = name === "index" ? null : name; again(); },
  })));
  const body = rows.map((one) => element("tr", { className: one.coefficient > 0 ? "in" : "" }, ...columns.map(([, name]) => cell(one, name))));
  byId("candidates").replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}

const compare = (a, b) => (typeof a === "string" ? String(a).localeCompare(String(b)) : value(a) - value(b));
const value = (found) => found?.share ?? found ?? -Infinity;

function cell(one, name) {
  if (name === "near") {
    const near = one.near;
    return element("td", near ? { className: "copy", textContent: `#${near.candidate}, ${percent(near.share)}` } : {});
  }
  if (name === "text") return element("td", { className: "text", textContent: one.text });
  if (name === "offset") {
    return element("td", { textContent: one.id ?? `${one.partition} @ ${one.offset}`, title: `${one.partition} offset ${one.offset}` });
  }
  const found = one[name];
  return element("td", { textContent: typeof found === "number" ? number(found, 3) : found ?? "–" });
}

function drawMask(mask) {
  if (!show("mask", Boolean(mask))) return;
  byId("mask-note").textContent = `${percent(mask.overall)} of all weights` + (mask.age === null ? "" : `, chosen ${number(mask.age)} updates ago`);
  heat(byId("mask").querySelector("table"), mask.modules, mask.layers.map((name, i) => ({ name, values: mask.density[i], titles: mask.modules })));
}

function drawArms(arms) {
  if (!show("arms", Boolean(arms?.length))) return;
  const ends = arms.flatMap((arm) => [arm.mean - arm.deviation, arm.mean + arm.deviation]).filter(Number.isFinite);
  const low = Math.min(0, ...ends), span = Math.max(0, ...ends) - low || 1;
  const at = (found) => (found - low) / span;
  byId("arm-list").replaceChildren(...arms.map((arm) => {
    const parts = [part(at(0), at(arm.mean), arm.mean < 0 ? "minus" : ""), part(at(arm.mean - arm.deviation), at(arm.mean + arm.deviation), "error"), part(at(0), at(0), "zero")];
    const line = row(`arm ${arm.arm}`, parts, `${number(arm.mean, 3)}, ${number(arm.pulls)} drawn`);
    const nearest = arm.nearest.map((one) => element("li", {
      textContent: [one.label, one.id ?? `${one.partition} @ ${one.offset}`, one.text].filter(Boolean).join(" · "),
    }));
    return element("details", {
      open: open.has(arm.arm), ontoggle: (event) => (event.target.open ? open.add(arm.arm) : open.delete(arm.arm)),
    }, element("summary", {}, line), element("ul", {}, ...(nearest.length ? nearest : [element("li", { textContent: "none waits" })])));
  }));
}

function drawLearned(learned) {
  if (!show("learned", Boolean(learned))) return;
  byId("learned-note").textContent = `explains ${percent(learned.explained)} of what probes find; a probe every ${number(learned.interval)} steps`
    + (learned.way ? `; now ${learned.way}` : "");
  const features = [...learned.features].sort((a, b) => Math.abs(b.coefficient) - Math.abs(a.coefficient)).slice(0, 24);
  const largest = Math.max(1e-12, ...features.map((one) => Math.abs(one.coefficient) + one.deviation));
  const at = (found) => 0.5 + found / (2 * largest);
  byId("features").replaceChildren(...features.map((one) => row(one.name, [
    part(0.5, at(one.coefficient), one.coefficient < 0 ? "minus" : ""),
    part(at(one.coefficient - one.deviation), at(one.coefficient + one.deviation), "error"), part(0.5, 0.5, "zero"),
  ], `${number(one.coefficient, 2)} ± ${number(one.deviation, 2)}`)));
}

function drawMix(mix) {
  if (!show("mix", Boolean(mix?.length))) return;
  const stream = Math.max(1, ...[mix.reduce((sum, one) => sum + one.stream, 0)]);
  const trained = Math.max(1, mix.reduce((sum, one) => sum + one.trained, 0));
  const legend = element("p", { className: "note" }, element("span", { className: "key" }), "stream", element("span", { className: "key second" }), "trained on");
  byId("mix-rows").replaceChildren(legend, ...mix.map((one) => row(one.label,
    [part(0, one.stream / stream), part(0, one.trained / trained, "second")],
    `${percent(one.stream / stream)} → ${percent(one.trained / trained)}`, "two")));
}

function drawTime(time) {
  const phases = Object.entries(time ?? {}).filter(([, seconds]) => seconds > 0).sort((a, b) => b[1] - a[1]);
  const total = phases.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (!show("time", total > 0)) return;
  byId("phases").replaceChildren(...phases.map(([name, seconds]) => row(name, [part(0, seconds / total)], `${percent(seconds / total)}, ${duration(seconds)}`)));
}
