// The agreement of both backends: equal tokens, and the differences of logits against their bounds.

import {$, $$, cannotWalk, number, scaled, svg, walk} from "./dom.js";

const HEIGHT = 120;
const LEFT = 52;

// result: null, or {equal, total, compared?, margins?, onSelect?}
export function drawAgreement(view, result) {
  const chart = $("svg", view);
  const verdict = $(".verdict", view);
  const details = $(".details", view);
  if (!result) {
    verdict.textContent = "\u00a0";
    details.textContent = "\u00a0";
    $(".margin", view).textContent = "\u00a0";
    $(".error", view).textContent = "";
    $(".reading", view).textContent = "\u00a0";
    scaled(chart, HEIGHT, () => {});
    chart.replaceChildren();
    cannotWalk(chart);
    return;
  }
  const {equal, total, compared, margins, onSelect} = result;
  verdict.textContent = equal === total ? `equal: ${equal} of ${total} tokens` : `equal: the first ${equal} of ${total} tokens`;
  verdict.dataset.equal = equal === total;
  if (margins) $(".margin", view).textContent = `Where they part: ${margins.join("; ")}.`;
  if (!compared) {
    details.textContent = "comparing logits, with error bounds from float64 …";
    return;
  }
  const {rows, dtype} = compared;
  const largest = rows.reduce((a, b) => (b.difference > a.difference ? b : a));
  const share = Math.max(...rows.flatMap((row) => Object.values(row.errors).map((error) => error / row.bound)));
  details.textContent = `Largest difference of a logit: ${number(largest.difference)}. Largest error against float64: ${(100 * share).toFixed(0)}% of the bound for ${dtype}.`;
  details.dataset.share = share;
  const reading = $(".reading", view);
  scaled(chart, HEIGHT, (WIDTH) => {
    draw(chart, WIDTH, rows, onSelect);
    walk(chart, {
      count: rows.length,
      show: (index) => {
        $$("circle", chart).forEach((dot, i) => dot.classList.toggle("reached", i === index));
        reading.textContent = describe(rows[index], index);
        return reading.textContent;
      },
      leave: () => {
        for (const dot of $$("circle", chart)) dot.classList.remove("reached");
        reading.textContent = "\u00a0";
      },
      select: onSelect,
    });
  });
}

function describe(row, index) {
  const errors = Object.entries(row.errors).map(([name, error]) => `${name} ${number(error)}`).join(", ");
  return `token ${index + 1}: difference ${number(row.difference)}, bound ${number(row.bound)}; ${errors} against float64`;
}

function draw(chart, WIDTH, rows, onSelect) {
  const values = rows.flatMap((row) => [row.difference, row.bound, ...Object.values(row.errors)]).filter((v) => v > 0);
  const low = Math.floor(Math.log10(Math.min(...values)));
  const high = Math.ceil(Math.log10(Math.max(...values)));
  const x = (i) => LEFT + ((i + 0.5) * (WIDTH - LEFT)) / rows.length;
  const y = (v) => 6 + ((HEIGHT - 24) * (high - Math.log10(Math.max(v, 10 ** low)))) / Math.max(1, high - low);
  const parts = [];
  for (let power = low; power <= high; power += Math.max(1, Math.ceil((high - low) / 4))) {
    parts.push(svg("line", {x1: LEFT, x2: WIDTH, y1: y(10 ** power), y2: y(10 ** power), class: "grid"}));
    const label = svg("text", {x: LEFT - 6, y: y(10 ** power) + 4, "text-anchor": "end"});
    label.textContent = `1e${power}`;
    parts.push(label);
  }
  const bounds = rows.map((row, i) => `${i ? "L" : "M"}${x(i)} ${y(row.bound)}`).join("");
  parts.push(svg("path", {d: bounds, class: "bound"}));
  rows.forEach((row, i) => {
    const dot = svg("circle", {cx: x(i), cy: y(row.difference), r: 3, class: row.difference > 2 * row.bound ? "outside" : "inside"});
    const title = svg("title");
    title.textContent = describe(row, i);
    dot.append(title);
    dot.addEventListener("click", () => onSelect?.(i));
    parts.push(dot);
  });
  const label = svg("text", {x: (WIDTH + LEFT) / 2, y: HEIGHT - 2, "text-anchor": "middle"});
  label.textContent = "new token";
  chart.replaceChildren(...parts, label);
}

