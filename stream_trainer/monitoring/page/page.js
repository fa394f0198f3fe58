// Asks the service what it does, every second or so, and shows it. Nothing here makes the service wait.

import { chart } from "./charts.js";
import { drawPanels } from "./panels.js";
import { byId, duration, element, number, percent, show } from "./shapes.js";

const EVERY_MS = 1500;
let run = null;
let since = 0;
let known = { rows: [], evaluations: [], events: [], start: {} };

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${path} answered ${answer.status}`);
  return answer.json();
}

async function turn() {
  try {
    if (!document.hidden) {
      const [status, history, panels] = await Promise.all([ask("status"), ask(`history?since=${since}`), ask("panels")]);
      take(history);
      drawStatus(status);
      drawCharts();
      drawEvents();
      drawPanels(panels);
    }
  } catch (error) {
    badge("not reachable", "bad");
    byId("doing").textContent = "the service does not answer; trying again";
    console.info(error.message);
  }
  setTimeout(turn, EVERY_MS);
}

function take(history) {
  if (history.run !== run) {
    const restarted = run !== null;
    run = history.run;
    since = 0;
    known = { rows: [], evaluations: [], events: [], start: {} };
    if (restarted) return; // its numbers begin anew: all of it comes with the next turn
  }
  since = history.number ?? 0;
  known.start = history.start ?? {};
  for (const name of ["rows", "evaluations", "events"]) known[name].push(...(history[name] ?? []));
}

function badge(text, kind) {
  const shown = byId("badge");
  shown.textContent = text;
  shown.className = `badge ${kind}`;
}

function drawStatus(status) {
  const health = status.health ?? { ok: true, detail: "" };
  const kind = !health.ok ? "bad" : health.detail || health.state === "degraded" || status.state === "paused" ? "warn" : "good";
  badge((health.state ?? status.state).replaceAll("_", " "), kind);
  byId("doing").textContent = status.doing ?? "";
  byId("reason").textContent = health.detail;
  show("reason", Boolean(health.detail));
  const effects = status.effects;
  byId("effects").textContent = effects === undefined ? "" : "A step's samples lower the loss on the held-back target by "
    + `${number(effects.measured.chosen)} (predicted ${number(effects.predicted.chosen)}), those of a uniform draw by `
    + `${number(effects.measured.uniform)} (predicted ${number(effects.predicted.uniform)}).`;
  const records = status.records ?? {};
  const decided = Object.values(records).reduce((sum, count) => sum + count, 0);
  const facts = [
    ["step", number(status.step)],
    ["lag", lagOf(status)],
    ["time to drain", status.lag === 0 ? "none left" : duration(status.seconds_to_drain)],
    ["buffered", number(status.buffer_records)],
    ["loss of the pool", number(status.pool_loss)],
    ["learning rate", number(status.learning_rate)],
    ["step takes", status.step_seconds === undefined ? "–" : `${number(status.step_seconds, 3)} s`],
    ["tensors that moved", status.moved_tensors === undefined ? "–" : percent(status.moved_tensors)],
    ["weights that moved", status.moved_weights === undefined ? "–" : percent(status.moved_weights)],
    ["records decided", number(decided)],
    ...Object.entries(records).filter(([, count]) => count > 0).map(([name, count]) => [name.replaceAll("_", " "), `${number(count)}, ${percent(count / decided)}`]),
    ["model", status.model, "long"],
    ["selection", status.selection, "long"],
    ["version", status.version],
  ];
  if (status.resumed_otherwise?.length) facts.push(["changed since the checkpoint", status.resumed_otherwise.join(", "), "long"]);
  byId("facts").replaceChildren(...facts.map(([name, text, className = ""]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: text ?? "–", className }))));
}

function lagOf(status) {
  return Number.isFinite(status.lag ?? NaN) ? `${number(status.lag)} behind` : "–";
}

function drawCharts() {
  const { rows, evaluations, start } = known;
  const marks = known.events.filter((event) => event.kind !== "checkpoint");
  const times = rows.map((row) => row.time);
  const line = (label, name) => ({ label, values: rows.map((row) => row[name] ?? null) });
  chart("training", times, [line("pool", "pool_loss"), line("trained on", "trained_loss")], marks);
  chart("speed", times, [line("tokens", "tokens_per_second")], marks);
  chart("ratio", times, [line("share", "selected_ratio")], marks);
  chart("lag", rows.some((row) => row.lag != null) ? times : [], [line("behind", "lag")], marks);
  const measured = rows.some((row) => row.advantage_measured != null);
  const advantages = [line("advantage", "advantage"), ...(measured ? [line("measured", "advantage_measured")] : [])];
  chart("advantage", measured || rows.some((row) => row.advantage != null) ? times : [], advantages, marks);
  const sets = Object.keys(start);
  chart("losses", evaluations.map((one) => one.time), sets.map((name) => ({
    label: name, values: evaluations.map((one) => (one.losses[name] == null ? null : one.losses[name] / start[name])),
  })), marks);
  const last = evaluations.at(-1)?.losses ?? {};
  byId("losses-note").textContent = "1 is where this run began. "
    + sets.map((name) => `${name}: ${number(start[name])} → ${number(last[name])}`).join(" · ");
}

function drawEvents() {
  const events = known.events.slice(-60).reverse();
  if (!show("events", events.length > 0)) return;
  byId("event-list").replaceChildren(...events.map((event) => element("li", {},
    element("time", { textContent: new Date(1000 * event.time).toLocaleTimeString() }),
    element("b", { textContent: event.kind.replaceAll("_", " ") }),
    ` at step ${event.step}: ${event.text}`)));
}

turn();
