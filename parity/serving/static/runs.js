// Run folders: loss curves that follow a run while it trains, its samples, and its checkpoints.

import {get, post} from "./api.js";
import {$, attempt, el, number, roving} from "./dom.js";
import {drawCurves} from "./chart.js";

const PAUSE = 2000; // milliseconds between two looks at a run

export function setUp(info, isVisible, onLoad) {
  const panel = $("#runs");
  const list = $("tbody", panel);
  const view = $(".run", panel);
  const steps = $("select[name=step]", view);
  const checkpoint = $("select[name=checkpoint]", view);
  let shown = null;
  let version = null;
  let samples = [];
  roving(list, "button", {onMove: (button) => button.click()});

  async function refresh() {
    const {runs} = await get("page/runs");
    $(".none", panel).hidden = runs.length > 0;
    list.replaceChildren(...runs.map((run, index) => {
      const button = el("button.link", {type: "button", tabindex: index ? -1 : 0, click: () => open(run.path)}, run.name);
      return el("tr", {"data-path": run.path, "aria-current": run.path === shown ? "true" : null},
        el("th", {scope: "row"}, button),
        el("td", {}, run.problem ? `${run.state}: ${run.problem}` : run.state),
        el("td.figure", {}, run.steps === null ? "" : `${run.steps.toLocaleString("en")} of ${run.planned_steps.toLocaleString("en")}`),
        el("td.figure", {}, run.best_loss === null ? "" : number(run.best_loss, 4)));
    }));
    if (!shown && runs.length) await open(runs[0].path);
  }

  async function open(path) {
    shown = path;
    version = null;
    for (const row of list.children) {
      if (row.dataset.path === path) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
    await attempt($(".error", view), null, look);
  }

  // Asks for the run; the server answers without it if nothing has changed.
  async function look() {
    const path = shown;
    const {run} = await post("page/run", {path, version});
    if (!run || path !== shown) return;
    const isNew = version === null;
    version = run.version;
    view.hidden = false;
    $("h3", view).textContent = run.summary.name;
    const {steps: done, planned_steps: planned, state, problem} = run.summary;
    $(".state", view).textContent = [problem ? `${state}: ${problem}` : state, done === null ? "" : `step ${done.toLocaleString("en")} of ${planned.toLocaleString("en")}`,
      run.best_step === null ? "" : `best at step ${run.best_step.toLocaleString("en")}`,
      run.skipped.length ? `${run.skipped.length} steps skipped` : ""].filter(Boolean).join(", ");
    drawCurves($("svg", view), run);
    options(checkpoint, run.checkpoints.map((step) => [step, `step ${step.toLocaleString("en")}${step === run.best_step ? " (best)" : ""}`]), isNew);
    $(".load button", view).disabled = !run.checkpoints.length;
    samples = run.samples;
    options(steps, samples.map(({step}) => [step, `step ${step.toLocaleString("en")}`]), isNew);
    showSamples();
  }

  // Fills a select, and keeps its choice; the last option is chosen first, and stays chosen if it was.
  function options(select, entries, isNew) {
    const followed = isNew || select.selectedIndex === select.options.length - 1;
    const before = select.value;
    select.replaceChildren(...entries.map(([value, label]) => el("option", {value}, label)));
    if (entries.length) select.value = followed || ![...select.options].some(({value}) => value === before) ? entries.at(-1)[0] : before;
  }

  function showSamples() {
    const chosen = samples.find(({step}) => String(step) === steps.value);
    $(".samples", view).replaceChildren(...(chosen ? chosen.texts.map((text) => el("pre", {}, text)) : [el("p.quiet", {}, "This run has no samples yet.")]));
  }
  steps.addEventListener("change", showSamples);

  $(".load", view).addEventListener("submit", (event) => {
    event.preventDefault();
    const slot = $(".load .error", view);
    attempt(slot, $(".load button", view), async () => {
      const loaded = await post("page/load", {path: shown, checkpoint: Number(checkpoint.value)});
      $(".loaded", view).textContent = `Every view and the API now use step ${checkpoint.value} of ${$("h3", view).textContent}.`;
      onLoad(loaded);
    });
  });

  async function follow() {
    if (isVisible() && document.visibilityState === "visible") {
      await attempt($(".follow.error", panel), null, shown ? look : refresh);
    }
    setTimeout(follow, PAUSE);
  }
  follow();
  return () => attempt($(".follow.error", panel), null, refresh);
}
