// Tables of coloured cells, bars of signed numbers, and lists of most likely tokens.

import {$$, el, number, percent, roving} from "./dom.js";
import {tint} from "./tokens.js";

// A table with one cell per (row, column), filled by cell(row, column) -> {text, value, title}: value in -1..1 is the
// colour. A second call with the same rows and columns changes the cells in place, so that nothing moves.
export function heatGrid(container, {columns, rows, cell, onSelect}) {
  const shape = JSON.stringify([columns, rows]);
  if (container.dataset.shape !== shape) build(container, shape, columns, rows);
  container.select = (button) => {
    const [row, column] = [Number(button.dataset.row), Number(button.dataset.column)];
    for (const other of $$("button", container)) {
      other.tabIndex = other === button ? 0 : -1;
      other.setAttribute("aria-pressed", other === button);
    }
    onSelect(row, column, cell(row, column));
  };
  for (const button of $$("button", container)) {
    const {text, value, title} = cell(Number(button.dataset.row), Number(button.dataset.column));
    button.textContent = text || "\u00a0";
    button.title = title;
    button.setAttribute("aria-label", title);
    button.classList.toggle("negative", value < 0);
    tint(button, Math.abs(value));
  }
}

function build(container, shape, columns, rows) {
  container.dataset.shape = shape;
  const head = el("tr", {}, el("td"), ...columns.map((label) => el("th", {scope: "col", title: label}, el("span", {}, label))));
  const body = rows.map((label, row) => el("tr", {}, el("th", {scope: "row"}, label), ...columns.map((_, column) => {
    const button = el("button.cell", {type: "button", tabindex: row === 0 && column === 0 ? 0 : -1, click: () => container.select(button)});
    Object.assign(button.dataset, {row, column});
    return el("td", {}, button);
  })));
  const table = el("table.heat", {}, el("thead", {}, head), el("tbody", {}, ...body));
  roving(table, "button", {columns: () => columns.length, onMove: (button) => container.select(button)});
  container.replaceChildren(table);
}

// One line per component: its name, a bar to the right or left of the middle, its number.
export function bars(container, parts) {
  const most = Math.max(...parts.map(({value}) => Math.abs(value)), 1e-9);
  const rows = parts.map(({name, value}) => {
    const bar = el(value < 0 ? "div.signed.negative" : "div.signed");
    bar.style.width = `${(50 * Math.abs(value)) / most}%`;
    const label = {embed: "embedding", "ln_f.bias": "bias of the last LayerNorm"}[name] ?? name.replace(/^blocks\.(\d+)\.(attn|mlp)\.out$/, (_, layer, part) => `layer ${layer} ${part === "attn" ? "attention" : "MLP"}`);
    return el("tr", {}, el("th", {scope: "row"}, label), el("td.axis", {}, bar), el("td.figure", {}, number(value)));
  });
  container.replaceChildren(el("table.parts", {}, el("tbody", {}, ...rows)));
}

export function topTable(caption, top, shown) {
  const rows = top.map(({id, logprob}) => el("tr", {}, el("td.piece", {}, shown(id)), el("td.figure", {}, percent(Math.exp(logprob)))));
  return el("table.top", {}, el("caption", {}, caption), el("tbody", {}, ...rows));
}

