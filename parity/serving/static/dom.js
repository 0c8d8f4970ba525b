// Small helpers for elements. Text always becomes text nodes, never HTML.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

// el("span.token", {title: "..."}, "text", child): attributes that are functions are event listeners.
export function el(description, attributes = {}, ...children) {
  const [tag, ...classes] = description.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Runs an action of a form: the button is busy meanwhile, and an error is shown in `slot`, beside what caused it.
const running = new WeakMap(); // number of actions by button

export async function attempt(slot, button, action) {
  slot.textContent = "";
  if (button) {
    running.set(button, (running.get(button) ?? 0) + 1);
    button.setAttribute("aria-busy", "true");
  }
  try {
    return await action();
  } catch (error) {
    if (error.name !== "AbortError") slot.textContent = error.message;
    return undefined;
  } finally {
    if (button) {
      running.set(button, running.get(button) - 1);
      if (!running.get(button)) button.removeAttribute("aria-busy");
    }
  }
}

// Makes the children of a container that match `selector` one tab stop, between which the arrow keys move.
export function roving(container, selector, {columns = () => 0, onMove = () => {}} = {}) {
  container.addEventListener("keydown", (event) => {
    const items = $$(selector, container);
    const current = items.indexOf(event.target.closest(selector));
    if (current < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const width = columns();
    const steps = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: width || 1, ArrowUp: -(width || 1)};
    let next = current + (steps[event.key] ?? 0);
    if (event.key === "Home") next = 0;
    if (event.key === "End") next = items.length - 1;
    if (next === current || !items[next]) return;
    event.preventDefault();
    items[current].tabIndex = -1;
    items[next].tabIndex = 0;
    items[next].focus();
    onMove(items[next]);
  });
}

const places = new WeakMap(); // the point of each chart that was reached last

// Makes a chart one tab stop, at which the arrow keys, Page Up and Down, Home and End go from point to point.
//   count: number of points; show(i): shows what point i is, and returns it as text; leave(): ends that; select(i): called
//   at Enter.
export function walk(chart, {count, show, leave, select}) {
  const go = (index) => {
    places.set(chart, Math.max(0, Math.min(count - 1, index)));
    chart.setAttribute("aria-valuenow", places.get(chart) + 1);
    chart.setAttribute("aria-valuetext", show(places.get(chart)));
  };
  const here = () => go(places.get(chart) ?? 0);
  const attributes = {role: "slider", tabindex: 0, "aria-valuemin": 1, "aria-valuemax": count, "aria-valuenow": 1};
  for (const [name, value] of Object.entries(attributes)) chart.setAttribute(name, value);
  chart.onfocus = here;
  chart.onblur = leave;
  chart.onkeydown = (event) => {
    const page = Math.max(2, Math.round(count / 10));
    const steps = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: page, PageDown: -page, Home: -count, End: count};
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter") select?.(places.get(chart));
    else if (event.key in steps) go(places.get(chart) + steps[event.key]);
    else return;
    event.preventDefault();
  };
  if (document.activeElement === chart) here(); // it was drawn again
}

// Undoes walk(), for a chart that has no points any more.
export function cannotWalk(chart) {
  places.delete(chart);
  chart.onfocus = chart.onblur = chart.onkeydown = null;
  for (const name of ["tabindex", "aria-valuemin", "aria-valuemax", "aria-valuenow", "aria-valuetext"]) chart.removeAttribute(name);
  chart.setAttribute("role", "img");
}

const drawings = new WeakMap(); // what draws each chart
const resized = new ResizeObserver((entries) => entries.forEach(({target}) => drawings.get(target)?.()));

// Draws a chart in units of pixels, so that its text is readable at every width, and again when its width changes.
export function scaled(chart, height, draw) {
  drawings.set(chart, () => {
    const width = Math.round(chart.getBoundingClientRect().width);
    if (!width) return; // hidden; drawn once it is shown
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    draw(width);
  });
  resized.observe(chart);
  drawings.get(chart)();
}

// Visible form of a token's text: leading and trailing spaces, and control characters.
export function visible(text) {
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\u0000-\u001f\u007f-\u009f]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`);
}

export function number(value, digits = 3) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e5 ? value.toFixed(digits) : value.toExponential(1);
}

// With a sign; what rounds to 0 has none.
export function signed(value) {
  const text = value.toFixed(2);
  return Number(text) === 0 ? "0.00" : value > 0 ? `+${text}` : text.replace("-", "−");
}

export function percent(value) {
  if (value === 0) return "0";
  if (value < 0.0001) return `${(100 * value).toExponential(0)}%`;
  return `${(100 * value).toFixed(value < 0.01 ? 2 : 1)}%`;
}
