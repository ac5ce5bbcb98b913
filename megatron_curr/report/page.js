"use strict";
// A pointer over any figure draws one line at that token through all of them and lists the values.
const tip = document.getElementById("tip");
const charts = [...document.querySelectorAll("script.hover")].map((script) => {
  const svg = script.previousElementSibling;
  const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cross.setAttribute("class", "cross");
  cross.setAttribute("visibility", "hidden");
  svg.append(cross);
  return { svg, cross, ...JSON.parse(script.textContent) };
});

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
}

function written(value, series) {
  if (series.share) return (value * 100).toFixed(1) + " %";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en") + series.unit;
  if (size > 0 && size < 0.01) return value.toExponential(2) + series.unit;
  return Number(value.toPrecision(4)) + series.unit;
}

function hide() {
  tip.hidden = true;
  for (const chart of charts) chart.cross.setAttribute("visibility", "hidden");
}

function mark(tokens) {
  for (const { cross, frame, range } of charts) {
    const across = frame[0] + (frame[1] - frame[0]) * (tokens - range[0]) / (range[1] - range[0]);
    for (const [name, value] of [["x1", across], ["x2", across], ["y1", frame[2]], ["y2", frame[3]]])
      cross.setAttribute(name, value);
    cross.setAttribute("visibility", "visible");
  }
}

function tell(chart, tokens, event) {
  const rows = chart.series.filter((series) => series.x.length).map((series) => {
    const row = document.createElement("tr");
    const name = document.createElement("td");
    const swatch = document.createElement("i");
    swatch.className = series.colour;
    name.append(swatch, series.label);
    const value = document.createElement("td");
    value.textContent = written(series.y[nearest(series.x, tokens)], series);
    row.append(name, value);
    return row;
  });
  const table = document.createElement("table");
  table.append(...rows);
  tip.replaceChildren(Math.round(tokens).toLocaleString("en") + " tokens", table);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 18 + box.width > innerWidth ? event.clientX - 18 - box.width : event.clientX + 18;
  tip.style.left = left + "px";
  tip.style.top = Math.max(8, Math.min(event.clientY - 20, innerHeight - box.height - 8)) + "px";
}

for (const chart of charts) {
  chart.svg.addEventListener("pointermove", (event) => {
    const box = chart.svg.getBoundingClientRect();
    const across = (event.clientX - box.left) * chart.width / box.width;
    const [left, right] = chart.frame;
    if (across < left - 2 || across > right + 2) return hide();
    const share = Math.min(Math.max((across - left) / (right - left), 0), 1);
    const tokens = chart.range[0] + share * (chart.range[1] - chart.range[0]);
    mark(tokens);
    tell(chart, tokens, event);
  });
  chart.svg.addEventListener("pointerleave", hide);
}

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});
