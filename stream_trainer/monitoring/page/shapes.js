// Small things that every panel is made of. Texts of a run go in as text, never as HTML.

export const byId = (id) => document.getElementById(id);

export function element(tag, options = {}, ...children) {
  const made = Object.assign(document.createElement(tag), options);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// A number for people; a dash for what is unknown or not finite.
export function number(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

// Short, for the ticks of an axis, but with digits enough to tell them apart.
export function short(value) {
  return Math.abs(value) < 1e4 ? number(value) : value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 5 });
}

export function percent(value) {
  return Number.isFinite(value ?? NaN) ? `${(100 * value).toFixed(Math.abs(value) < 0.1 ? 1 : 0)} %` : "–";
}

export function duration(seconds) {
  if (!Number.isFinite(seconds ?? NaN)) return "–";
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} days`;
}

export function show(id, visible) {
  byId(id).hidden = !visible;
  return visible;
}

// A part of a bar, from and to in shares of its width.
export function part(from, to, className = "") {
  const made = element("i", { className });
  made.style.left = `${100 * Math.min(from, to)}%`;
  if (className !== "zero") made.style.width = `${Math.max(0.5, 100 * Math.abs(to - from))}%`;
  return made;
}

export function row(name, parts, value, className = "") {
  return element("div", { className: "row" },
    element("span", { className: "name", textContent: name, title: name }),
    element("span", { className: `bar ${className}` }, ...parts),
    element("span", { className: "value", textContent: value }));
}

// A table of shares from 0 to 1; the deeper the colour, the larger.
export function heat(table, heads, rows) {
  const largest = Math.max(1e-12, ...rows.flatMap((found) => found.values.filter((value) => value !== null)));
  const head = element("tr", {}, element("th"), ...heads.map((text) => element("th", { scope: "col" }, element("span", { textContent: text }))));
  const body = rows.map(({ name, values, titles }) => element("tr", {}, element("th", { textContent: name, scope: "row" }),
    ...values.map((value, i) => {
      const cell = element("td", { title: `${name}, ${titles[i]}: ${number(value)}` });
      if (value !== null && value > 0) cell.style.background = `rgb(var(--heat) / ${0.08 + 0.92 * (value / largest)})`;
      return cell;
    })));
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}
