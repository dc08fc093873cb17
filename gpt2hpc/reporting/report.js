// Draws the charts of a report as SVG, and lets the reader zoom (all charts show the same steps) and read values off.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 300, LEFT = 64, RIGHT = 14, TOP = 20, BOTTOM = 40;
  const CLICK = 5; // pixels: less is a click, not a drag
  const DOTS = 60; // so many points or fewer in sight are shown as dots too

  const data = JSON.parse(document.getElementById("data").textContent);
  const every = data.charts.flatMap((chart) => chart.lines.flatMap((line) => line.points.map((point) => point[0])));
  const whole = every.length ? [every.reduce((a, b) => Math.min(a, b)), every.reduce((a, b) => Math.max(a, b))] : [0, 1];
  if (whole[0] === whole[1]) whole[1] += 1;
  const view = { domain: [...whole], logX: false, logY: false, smooth: 1, hidden: new Set() };
  const redraws = [];

  function element(name, attributes, parent, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function html(name, className, parent, text) {
    const made = document.createElement(name);
    made.className = className;
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
    const found = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) found.push(index * step);
    return found;
  }

  function logTicks(low, high, count) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1)
      for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
    const inside = found.filter((each) => each >= low && each <= high);
    return inside.length > 2 ? inside.filter((each, index) => index % Math.ceil(inside.length / (count + 2)) === 0) : ticks(low, high, count);
  }

  function number(value, percent) {
    if (percent) return `${+(value * 100).toPrecision(4)}%`;
    const size = Math.abs(value);
    if (size !== 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    return (+value.toPrecision(5)).toLocaleString("en-US", { maximumFractionDigits: 6 });
  }

  // A mean over the last values, as far as there are so many.
  function smoothed(points, over) {
    let total = 0;
    return points.map((point, index) => {
      total += point[1];
      if (index >= over) total -= points[index - over][1];
      return [point[0], total / Math.min(index + 1, over)];
    });
  }

  // From the last point before the steps in sight to the first one after them, so that lines leave the picture.
  function inSight(points) {
    let begin = points.findIndex((point) => point[0] >= view.domain[0]);
    if (begin < 0) return [];
    begin = Math.max(0, begin - 1);
    let end = points.length;
    while (end > begin && points[end - 1][0] > view.domain[1]) end -= 1;
    return points.slice(begin, end + 1);
  }

  function nearest(points, step) {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] <= step) low = middle; else high = middle;
    }
    return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? points[low] : points[high];
  }

  const bent = (step) => (view.logX ? Math.log10(step + 1) : step);
  const unbent = (value) => (view.logX ? 10 ** value - 1 : value);

  function build(chart, section) {
    const keys = html("div", "keys", section);
    const host = html("div", "plot", section);
    const tip = html("div", "tip", host);
    tip.hidden = true;
    const svg = element("svg", { role: "img", tabindex: "0", "aria-label": `${chart.title}, ${chart.unit}, over steps` }, host);
    let width = 0, toX, toY, toStep, shown = [];

    keys.hidden = chart.lines.length < 2;
    for (const line of chart.lines) {
      const key = html("button", `key c${line.color} ${line.kind}`, keys);
      key.type = "button";
      key.setAttribute("aria-pressed", "true");
      html("span", "swatch", key);
      html("span", "", key, line.name);
      key.addEventListener("click", () => {
        if (!view.hidden.delete(line)) view.hidden.add(line);
        key.setAttribute("aria-pressed", String(!view.hidden.has(line)));
        draw();
      });
    }

    function draw() {
      width = Math.max(260, host.clientWidth);
      svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      svg.replaceChildren();
      shown = chart.lines.filter((line) => !view.hidden.has(line)).map((line) => {
        if (line.kind !== "train" || view.smooth === 1) return { line, points: inSight(line.points), raw: null };
        const mean = smoothed(line.means || line.points, Math.max(1, Math.round(view.smooth / (line.width || 1))));
        return { line, points: inSight(mean), raw: inSight(line.points) };
      });
      const isLog = view.logY && chart.logY;
      const values = shown.flatMap((each) => [...each.points, ...(each.raw || [])].map((point) => point[1])).filter((value) => !isLog || value > 0);
      for (const level of chart.levels) values.push(level.value);
      let low = values.length ? values.reduce((a, b) => Math.min(a, b)) : 0.1;
      let high = values.length ? values.reduce((a, b) => Math.max(a, b)) : 1;
      if (chart.fromZero) low = Math.min(0, low);
      if (low === high) { low -= Math.abs(low) / 10 || 0.5; high += Math.abs(high) / 10 || 0.5; }
      if (isLog) { low = Math.log10(low) - 0.02; high = Math.log10(high) + 0.02; }
      const margin = 0.05 * (high - low);
      if (!isLog) { high += chart.levels.length ? 3 * margin : margin; if (!chart.fromZero) low -= margin; } // names stand above levels

      const [x0, x1] = view.domain.map(bent);
      const inner = width - LEFT - RIGHT, tall = HEIGHT - TOP - BOTTOM;
      toX = (step) => LEFT + ((bent(step) - x0) / (x1 - x0)) * inner;
      toStep = (x) => unbent(x0 + (Math.min(Math.max(x, LEFT), width - RIGHT) - LEFT) / inner * (x1 - x0));
      toY = (value) => HEIGHT - BOTTOM - (((isLog ? Math.log10(value) : value) - low) / (high - low)) * tall;

      axes(isLog ? logTicks(10 ** low, 10 ** high, 5) : ticks(low, high, 5));
      const clip = `clip-${chart.key}`;
      element("rect", { x: LEFT, y: TOP - 4, width: inner, height: tall + 8 }, element("clipPath", { id: clip }, element("defs", {}, svg)));
      const marks = element("g", { "clip-path": `url(#${clip})` }, svg);
      levels();
      for (const each of shown) {
        const className = `line c${each.line.color} ${each.line.kind}`;
        if (each.raw) element("path", { class: `${className} raw`, d: path(each.raw, isLog) }, marks);
        element("path", { class: className, d: path(each.points, isLog), "data-points": each.points.length }, marks);
        if (each.line.kind !== "train" && each.points.length <= DOTS)
          for (const [step, value] of each.points)
            if (!isLog || value > 0) element("circle", { class: `dot c${each.line.color}`, cx: toX(step), cy: toY(value), r: 3 }, marks);
      }
      restarts();
      element("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }, svg);
      element("rect", { class: "selection", y: TOP, height: tall, visibility: "hidden" }, svg);
    }

    function path(points, isLog) {
      const drawn = isLog ? points.filter((point) => point[1] > 0) : points;
      return drawn.map(([step, value], index) => `${index ? "L" : "M"}${toX(step).toFixed(1)} ${toY(value).toFixed(1)}`).join("") || "M0 0";
    }

    function axes(rows) {
      for (const value of rows) {
        element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: toY(value), y2: toY(value) }, svg);
        element("text", { class: "tick", x: LEFT - 8, y: toY(value) + 4, "text-anchor": "end" }, svg, number(value, chart.percent));
      }
      const columns = Math.max(2, Math.floor((width - LEFT) / 110));
      const [first, last] = view.domain;
      const steps = view.logX ? logTicks(Math.max(1, first), last, columns) : ticks(first, last, columns);
      for (const step of steps) {
        element("line", { class: "notch", x1: toX(step), x2: toX(step), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 5 }, svg);
        element("text", { class: "tick", x: toX(step), y: HEIGHT - BOTTOM + 19, "text-anchor": "middle" }, svg, number(step));
      }
      element("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }, svg);
      element("text", { class: "unit", x: width - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, svg, "step");
    }

    // Names on alternate sides, for neighbors may be close.
    function levels() {
      [...chart.levels].sort((a, b) => a.value - b.value).forEach((level, index) => {
        const y = toY(level.value), side = index % 2 ? { x: width - RIGHT - 6, "text-anchor": "end" } : { x: LEFT + 6 };
        element("line", { class: "level", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }, svg);
        element("text", { class: "level-name", y: y - 4, ...side }, svg, `${level.name} ${level.value.toFixed(3)}`);
      });
    }

    // A dashed line with the cause above it, where there is room for words; always in the read-out.
    function restarts() {
      const marks = data.restarts.filter((each) => each.step >= view.domain[0] && each.step <= view.domain[1]);
      marks.sort((a, b) => a.step - b.step).forEach((each, index) => {
        const x = toX(each.step), end = index + 1 < marks.length ? toX(marks[index + 1].step) - 4 : width;
        const mark = element("g", { class: data.runs.length > 1 ? `restart c${each.run % 8}` : "restart" }, svg);
        element("line", { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }, mark);
        element("path", { d: `M${x - 4} ${TOP - 5}h8l-4 6z` }, mark);
        if (data.runs.length === 1 && x + 7 + 6.6 * each.cause.length < end) element("text", { x: x + 7, y: TOP - 1 }, mark, each.cause);
        element("title", {}, mark, `${each.name}: attempt ${each.attempt} from step ${each.step}; before it: ${each.cause}`);
      });
    }

    function read(x) {
      const step = Math.round(toStep(x)), cross = svg.querySelector(".cross");
      cross.setAttribute("x1", toX(step));
      cross.setAttribute("x2", toX(step));
      cross.setAttribute("visibility", "visible");
      tip.replaceChildren();
      html("div", "when", tip, `step ${step.toLocaleString("en-US")}`);
      for (const { line, points } of shown) {
        if (!points.length) continue;
        const [at, value] = nearest(points, step);
        const row = html("div", `row c${line.color} ${line.kind}`, tip);
        html("span", "swatch", row);
        html("span", "name", row, line.name + (at === step ? "" : ` at ${at.toLocaleString("en-US")}`));
        html("b", "", row, number(value, chart.percent));
      }
      for (const each of data.restarts)
        if (Math.abs(toX(each.step) - x) < 7)
          html("div", "why", tip, `${data.runs.length > 1 ? `${each.name}: ` : ""}attempt ${each.attempt} from step ${each.step}, after: ${each.cause}`);
      tip.hidden = false;
      const at = toX(step), left = at + 14 + tip.offsetWidth > width ? at - 14 - tip.offsetWidth : at + 14;
      tip.style.left = `${Math.max(0, left)}px`;
    }

    function forget() {
      tip.hidden = true;
      svg.querySelector(".cross").setAttribute("visibility", "hidden");
    }

    let begun = null;
    const where = (event) => event.clientX - svg.getBoundingClientRect().left;
    svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      begun = where(event);
      try { svg.setPointerCapture(event.pointerId); } catch { /* a pointer that is gone already */ }
    });
    svg.addEventListener("pointermove", (event) => {
      const x = where(event);
      read(x);
      if (begun === null) return;
      const [from, to] = [begun, x].map((each) => Math.min(Math.max(each, LEFT), width - RIGHT)).sort((a, b) => a - b);
      const selection = svg.querySelector(".selection");
      selection.setAttribute("x", from);
      selection.setAttribute("width", to - from);
      selection.setAttribute("visibility", "visible");
    });
    svg.addEventListener("pointerup", (event) => {
      const from = begun, to = where(event);
      begun = null;
      svg.querySelector(".selection").setAttribute("visibility", "hidden");
      if (from === null || Math.abs(to - from) < CLICK) return;
      const [low, high] = [toStep(from), toStep(to)].sort((a, b) => a - b);
      if (high - low >= 1) show([low, high]);
    });
    svg.addEventListener("pointercancel", () => { begun = null; draw(); });
    svg.addEventListener("pointerleave", forget);
    svg.addEventListener("dblclick", () => show([...whole]));
    svg.addEventListener("keydown", (event) => { if (event.key === "Escape") show([...whole]); });

    draw();
    new ResizeObserver(() => { if (Math.max(260, host.clientWidth) !== width) draw(); }).observe(host);
    redraws.push(draw);
  }

  function show(domain) {
    view.domain = domain;
    redrawAll();
  }

  function redrawAll() {
    for (const draw of redraws) draw();
    const zoomed = view.domain[0] !== whole[0] || view.domain[1] !== whole[1];
    const reset = document.getElementById("reset");
    if (reset) reset.disabled = !zoomed;
    // What was drawn, for whoever looks at the page without eyes.
    Object.assign(document.body.dataset, {
      charts: redraws.length,
      paths: document.querySelectorAll("path.line").length,
      restarts: document.querySelectorAll(".restart").length,
      domain: view.domain.map((step) => Math.round(step)).join(" "),
    });
  }

  for (const chart of data.charts) build(chart, document.getElementById(`chart-${chart.key}`));
  const on = (id, event, act) => document.getElementById(id)?.addEventListener(event, act);
  on("reset", "click", () => show([...whole]));
  on("log-x", "change", (event) => { view.logX = event.target.checked; redrawAll(); });
  on("log-y", "change", (event) => { view.logY = event.target.checked; redrawAll(); });
  on("smooth", "change", (event) => { view.smooth = Number(event.target.value); redrawAll(); });
  redrawAll();
})();
