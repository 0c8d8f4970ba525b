// The tabs of the page, and what it knows about the models.

import {get, setKey} from "./api.js";
import {$, $$, attempt, roving} from "./dom.js";
import * as chat from "./chat.js";
import * as complete from "./complete.js";
import * as inside from "./inside.js";
import * as runs from "./runs.js";

const tabs = $$("nav [role=tab]");
let refreshRuns = () => {};

function open(name, focus = false) {
  const chosen = tabs.find((tab) => tab.dataset.panel === name && !tab.hidden) ?? tabs[0];
  for (const tab of tabs) {
    const selected = tab === chosen;
    tab.setAttribute("aria-selected", selected);
    tab.tabIndex = selected ? 0 : -1;
    $(`#${tab.dataset.panel}`).hidden = !selected;
    if (selected && focus) tab.focus();
  }
  if (location.hash !== `#${chosen.dataset.panel}`) history.replaceState(null, "", `#${chosen.dataset.panel}`);
  if (chosen.dataset.panel === "runs") refreshRuns();
}

function describe(info) {
  $("#tab-chat").hidden = !info.chat;
  $(".model-source").textContent = info.source;
  $(".model-shape").textContent = `${info.parameters.toLocaleString("en")} parameters, ${info.config.n_layer} layers, ${info.config.n_head} heads, width ${info.config.n_embd}, context ${info.config.n_ctx.toLocaleString("en")}; ${info.models.map((model) => model.description || model.name).join("; ")}`;
}

async function start() {
  const info = await get("page/info");
  const {shown} = await get("page/vocabulary");
  $("#key").hidden = true;
  $("main").hidden = false;
  describe(info);
  const clearings = [complete.setUp(info, shown), inside.setUp(info, shown), chat.setUp(info)];
  refreshRuns = runs.setUp(info, () => !$("#runs").hidden, (loaded) => {
    describe(loaded);
    for (const clear of clearings) clear(); // what the weights before have computed
  });
  for (const tab of tabs) tab.addEventListener("click", () => open(tab.dataset.panel));
  roving($("nav [role=tablist]"), "[role=tab]:not([hidden])", {onMove: (tab) => open(tab.dataset.panel)});
  addEventListener("hashchange", () => open(location.hash.slice(1)));
  open(location.hash.slice(1));
  document.documentElement.dataset.ready = "true";
}

// A server with --api-key wants it once for each tab of the browser.
function askForKey() {
  $("#key").hidden = false;
  $("#key input").focus();
}

$("#key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("#key input").value);
  attempt($("#key .error"), null, start);
});

attempt($("#trouble"), null, async () => {
  try {
    await start();
  } catch (error) {
    if (error.status !== 401) throw error;
    askForKey();
  }
});
