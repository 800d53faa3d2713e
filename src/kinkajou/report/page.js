"use strict";
// Pointing at one chart reads every chart of its stage at the same step; the report is complete without this.
const minus = (text) => text.replace(/-/g, "\u2212");
const readable = (value) => {
  if (value === null) return "not a number";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e9)) return minus(value.toExponential(2).replace(/\.?0+e/, "e").replace("+", ""));
  if (size >= 1e6) return minus(Number((value / 1e6).toPrecision(4)) + "M");
  if (size >= 1e3) return minus(Math.round(value).toLocaleString("en"));
  return minus(size >= 1 || size < 0.01 ? String(Number(value.toPrecision(4))) : value.toFixed(3));
};
const nearest = (steps, step) => {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle; else high = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
};
for (const curves of document.querySelectorAll(".curves")) {
  const [first, last] = curves.dataset.steps.split(",").map(Number);
  const panels = [...curves.querySelectorAll(".panel[data-points]")].map((panel) => {
    const cursor = document.createElement("div"), area = panel.querySelector(".area");
    cursor.className = "cursor";
    cursor.hidden = true;
    cursor.append(document.createElement("span"));
    area.append(cursor);
    const series = JSON.parse(panel.dataset.points).map(([jumps, values]) => {
      let at = 0;
      return { steps: jumps.map((jump) => (at += jump)), values };
    });
    const outputs = [...panel.querySelectorAll("output")];
    return { area, cursor, series, outputs, rest: outputs.map((output) => output.textContent) };
  });
  const show = (step) => curves.classList.add("reading") || panels.forEach(({ cursor, series, outputs }) => {
    cursor.hidden = false;
    cursor.style.left = (last > first ? (100 * (step - first)) / (last - first) : 50) + "%";
    cursor.firstChild.textContent = step;
    outputs.forEach((output, i) => (output.textContent = readable(series[i].values[nearest(series[i].steps, step)])));
  });
  const hide = () => curves.classList.remove("reading") || panels.forEach(({ cursor, outputs, rest }) => {
    cursor.hidden = true;
    outputs.forEach((output, i) => (output.textContent = rest[i]));
  });
  for (const { area, series } of panels) {
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const step = first + ((event.clientX - box.left) / box.width) * (last - first);
      show(series[0].steps[nearest(series[0].steps, step)]);
    });
    area.addEventListener("pointerleave", hide);
  }
}
for (const samples of document.querySelectorAll(".samples")) {
  const sections = [...samples.querySelectorAll(".step")];
  if (sections.length < 2) continue;
  const bar = document.createElement("div");
  bar.className = "tabs";
  const open = (chosen) => sections.forEach((section, i) => {
    section.hidden = i !== chosen;
    bar.children[i].setAttribute("aria-pressed", String(i === chosen));
  });
  sections.forEach((section, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = section.dataset.name;
    button.addEventListener("click", () => open(i));
    bar.append(button);
  });
  samples.prepend(bar);
  samples.classList.add("tabbed");
  open(sections.length - 1);
}
