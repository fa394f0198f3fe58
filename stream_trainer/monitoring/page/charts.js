// Lines over time, by uPlot. Events are dashed marks.

import { byId, number, short } from "./shapes.js";

const made = new Map();
const colours = ["--a", "--b", "--c", "--d", "--e"];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Draw `lines`, [{label, values}] over `times` in seconds, into the section `id`. Redrawn only if something is new.
export function chart(id, times, lines, marks = []) {
  const section = byId(id);
  section.hidden = times.length < 2;
  if (section.hidden) return;
  const key = lines.map((line) => line.label).join("\n");
  let known = made.get(id);
  if (!known || known.key !== key) {
    known?.plot.destroy();
    known = { key, marks, plot: plotted(id, lines, () => made.get(id)?.marks ?? []) };
    made.set(id, known);
  }
  known.marks = marks;
  known.plot.setData([times, ...lines.map((line) => line.values)]);
}

function plotted(id, lines, marks) {
  const box = byId(id).querySelector(".chart");
  const axis = { stroke: () => colour("--faint"), grid: { stroke: () => colour("--line"), width: 1 }, ticks: { show: false } };
  const options = {
    width: box.clientWidth || 300,
    height: 180,
    cursor: { drag: { x: true, y: false } },
    axes: [{ ...axis, space: 80, values: (_, ticks) => ticks.map(clock) }, { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => short(tick)) }],
    series: [{ label: "time" }, ...lines.map((line, i) => ({
      label: line.label, stroke: () => colour(colours[i % colours.length]), width: 1.6, spanGaps: true, points: { size: 4 },
      value: (_, value) => number(value),
    }))],
    hooks: { draw: [(plot) => drawMarks(plot, marks())] },
  };
  const plot = new uPlot(options, [[], ...lines.map(() => [])], box);
  new ResizeObserver(() => plot.setSize({ width: box.clientWidth, height: 180 })).observe(box);
  return plot;
}

function clock(time) {
  const seconds = time % 60 !== 0 ? { second: "2-digit" } : {};
  return new Date(1000 * time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false, ...seconds });
}

function drawMarks(plot, marks) {
  const { left, width, top, height } = plot.bbox;
  plot.ctx.save();
  plot.ctx.strokeStyle = colour("--warn");
  plot.ctx.setLineDash([4, 4]);
  plot.ctx.beginPath();
  for (const mark of marks) {
    const x = plot.valToPos(mark.time, "x", true);
    if (x < left || x > left + width) continue;
    plot.ctx.moveTo(x, top);
    plot.ctx.lineTo(x, top + height);
  }
  plot.ctx.stroke();
  plot.ctx.restore();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => made.forEach(({ plot }) => plot.redraw()));
