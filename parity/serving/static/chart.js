// Loss curves as SVG, with the values under the pointer, or at the step that the arrow keys reached.

import {cannotWalk, number, scaled, svg, walk} from "./dom.js";

const HEIGHT = 320;
const [LEFT, RIGHT, TOP, BOTTOM] = [52, 12, 12, 36];

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const result = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) result.push(Number(value.toPrecision(12)));
  return result;
}

// training, validation: lists of [step, loss].
export function drawCurves(chart, curves) {
  scaled(chart, HEIGHT, (WIDTH) => draw(chart, WIDTH, curves));
}

function draw(chart, WIDTH, {training, validation}) {
  const points = [...training, ...validation];
  chart.onpointermove = chart.onpointerleave = null;
  if (!points.length) {
    const note = svg("text", {x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle"});
    note.textContent = "no step has been logged yet";
    chart.replaceChildren(note);
    cannotWalk(chart);
    return;
  }
  const last = Math.max(1, ...points.map(([step]) => step));
  const low = Math.min(...points.map(([, loss]) => loss));
  const high = Math.max(...points.map(([, loss]) => loss));
  const margin = 0.05 * (high - low || 1);
  const x = (step) => LEFT + ((WIDTH - LEFT - RIGHT) * step) / last;
  const y = (loss) => TOP + ((HEIGHT - TOP - BOTTOM) * (high + margin - loss)) / (high - low + 2 * margin || 1);
  const parts = [];
  const text = (content, attributes) => {
    const element = svg("text", attributes);
    element.textContent = content;
    parts.push(element);
  };
  for (const value of ticks(low - margin, high + margin, 5)) {
    parts.push(svg("line", {x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "grid"}));
    text(String(value), {x: LEFT - 8, y: y(value) + 4, "text-anchor": "end"});
  }
  for (const value of ticks(0, last, WIDTH / 120)) text(value.toLocaleString("en"), {x: x(value), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle"});
  text("step", {x: WIDTH - RIGHT, y: HEIGHT - 2, "text-anchor": "end"});
  text("nats per token", {x: LEFT + 6, y: TOP + 8});
  const path = (list) => list.map(([step, loss], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
  if (training.length) parts.push(svg("path", {d: path(training), class: "training"}));
  if (validation.length) parts.push(svg("path", {d: path(validation), class: "validation"}));
  for (const [step, loss] of validation) parts.push(svg("circle", {cx: x(step), cy: y(loss), r: 3.5, class: "validation"}));
  const line = svg("line", {y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden"});
  chart.replaceChildren(...parts, line);
  const nearest = (list, step) => list.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a), list[0]);
  const read = chart.parentElement.querySelector(".reading");
  const show = (step) => {
    const found = [["training", nearest(training, step)], ["validation", nearest(validation, step)]].filter(([, point]) => point);
    line.setAttribute("x1", x(found[0][1][0]));
    line.setAttribute("x2", x(found[0][1][0]));
    line.setAttribute("visibility", "visible");
    read.textContent = found.map(([name, [at, loss]]) => `${name} ${number(loss, 4)} at step ${at.toLocaleString("en")}`).join("; ");
    return read.textContent;
  };
  const leave = () => {
    line.setAttribute("visibility", "hidden");
    read.textContent = "\u00a0";
  };
  chart.onpointermove = (event) => {
    const box = chart.getBoundingClientRect();
    show((((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * last);
  };
  chart.onpointerleave = leave;
  const steps = [...new Set(points.map(([step]) => step))].sort((a, b) => a - b);
  walk(chart, {count: steps.length, show: (index) => show(steps[index]), leave});
}
