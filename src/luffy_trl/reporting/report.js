"use strict";
// Everything from a run reaches the page as text nodes, never as markup.
const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const short = (value) => (value === null ? "-" : String(Number(value.toPrecision(4))));

// The legend has the values under the pointer
for (const panel of document.querySelectorAll(".panel")) {
  const svg = panel.querySelector(":scope > svg"), at = panel.querySelector(".at"), rest = at.textContent;
  const rows = [...panel.querySelectorAll("tbody tr")], lasts = rows.map((row) => [...row.cells].map((cell) => cell.textContent));
  let data = null, cursor = null;
  svg.addEventListener("pointermove", (event) => {
    data ??= JSON.parse(panel.querySelector("script").textContent);
    const [left, right, width] = data.box, [x0, x1] = data.x, frame = svg.getBoundingClientRect();
    const x = Math.min(right, Math.max(left, ((event.clientX - frame.left) / frame.width) * width));
    const step = x0 + ((x - left) / (right - left)) * (x1 - x0);
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    if (!cursor) {
      cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
      cursor.setAttribute("class", "cursor");
      cursor.setAttribute("y1", 8);
      cursor.setAttribute("y2", 194);
      svg.append(cursor);
    }
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    at.textContent = `step ${Math.round(step)}`;
    for (const [run, metric, points] of data.lines) rows[run].cells[metric + 1].textContent = short(nearest(points)[1]);
  });
  svg.addEventListener("pointerleave", () => {
    cursor?.remove();
    cursor = null;
    at.textContent = rest;
    for (const [run, metric] of data?.lines ?? []) rows[run].cells[metric + 1].textContent = lasts[run][metric + 1];
  });
}

// Completions: a step is parsed when it is looked at, and drawn a few groups at a time
const GROUPS_AT_ONCE = 4;
const steps = [...document.querySelectorAll("script.step")];
if (steps.length) {
  const run = document.getElementById("run"), step = document.getElementById("step");
  const list = document.getElementById("groups"), more = document.getElementById("more");
  let groups = [], shown = 0;

  const completion = (row) => {
    const card = element("div", "completion" + (row.demonstration ? " demonstration" : ""));
    const facts = Object.entries(row.rewards).map(([name, value]) => `${name} ${short(value)}`);
    if (row.advantage !== undefined) facts.push(`advantage ${short(row.advantage)}`);
    card.append(element("header", "", facts.join(", ")));
    const text = element("pre", "", row.tokens ? undefined : row.text);
    for (const [token, probability] of row.tokens ?? []) {
      const span = element("span", "", token);
      if (probability !== null) {
        span.style.backgroundColor = `rgba(var(--warm), ${(0.75 * (1 - probability)).toFixed(3)})`;
        span.title = `probability ${short(probability)}`;
      }
      text.append(span);
    }
    card.append(text);
    return card;
  };
  const side = (title, rows, className) => {
    const column = element("div", className);
    column.append(element("h3", "", title), ...rows.map(completion));
    return column;
  };
  const show = () => {
    for (const group of groups.slice(shown, shown + GROUPS_AT_ONCE)) {
      const given = group.rows.filter((row) => row.demonstration), own = group.rows.filter((row) => !row.demonstration);
      const box = element("div", "group"), sides = element("div", "sides" + (given.length && own.length ? " both" : ""));
      box.append(element("h3", "", "Prompt"), element("pre", "prompt", group.prompt));
      if (own.length) sides.append(side(`${own.length} rollout${own.length > 1 ? "s" : ""}`, own));
      if (given.length) sides.append(side("Demonstration", given, "given"));
      box.append(sides);
      list.append(box);
    }
    shown += GROUPS_AT_ONCE;
    more.hidden = shown >= groups.length;
  };
  const open = () => {
    groups = JSON.parse(steps[step.value].textContent);
    shown = 0;
    list.replaceChildren();
    show();
  };
  const choose = () => {
    step.replaceChildren();
    steps.forEach((script, i) => {
      if (script.dataset.run === run.value) step.append(new Option(script.dataset.step, i));
    });
    step.selectedIndex = step.options.length - 1;
    open();
  };
  const move = (by) => {
    step.selectedIndex = Math.min(step.options.length - 1, Math.max(0, step.selectedIndex + by));
    open();
  };
  run.addEventListener("change", choose);
  step.addEventListener("change", open);
  more.addEventListener("click", show);
  document.getElementById("before").addEventListener("click", () => move(-1));
  document.getElementById("after").addEventListener("click", () => move(1));
  choose();
}
// For benchmarks/report_page.py: milliseconds from opening the page to here, where everything is drawn
document.documentElement.dataset.readyMs = Math.round(performance.now());
