// The views of one text: loss, attention, logit lens, attribution, ablation and patching.

import {post, unpack} from "./api.js";
import {$, $$, attempt, el, number, percent, roving, signed, visible} from "./dom.js";
import {Inspector} from "./inspector.js";
import {Attention} from "./attention.js";
import {heatGrid, bars, topTable} from "./grids.js";
import {modelSelect} from "./options.js";
import {TokenText} from "./tokens.js";

export function setUp(info, vocabulary) {
  const panel = $("#inside");
  const form = $("form.common", panel);
  const select = $("select[name=model]", form);
  modelSelect(select, info.models, false);
  const {n_layer} = info.config;
  const textOf = () => $("textarea", form).value;
  const shown = (id) => visible(vocabulary[id] ?? `<${id}>`);

  // Views are tabs; the button of the form runs the visible one.
  const views = {loss, attention, lens, attribution, ablation, patching};
  const tabs = $$("[role=tab]", panel);
  let current = "loss";
  const computed = {}; // view: the request that it shows
  function open(name) {
    current = name;
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab.dataset.view === name);
      tab.tabIndex = tab.dataset.view === name ? 0 : -1;
      $(`#inside-${tab.dataset.view}`).hidden = tab.dataset.view !== name;
    }
    // A view that costs one run follows the text without being asked, once any view was computed.
    const isCheap = ["loss", "attention", "lens", "attribution"].includes(name);
    if (isCheap && Object.keys(computed).length && computed[name] !== JSON.stringify(request())) compute();
  }
  const request = () => ({text: textOf(), model: select.value});
  const pending = {}; // view: the request that is being computed for it
  let work = new AbortController(); // of all requests of the views
  const ask = (path, body) => post(path, body, work.signal);
  async function compute() {
    const name = current;
    const wanted = request();
    const key = JSON.stringify(wanted);
    if (pending[name] === key) return;
    pending[name] = key;
    await attempt($(".error", $(`#inside-${name}`)), $("button", form), async () => {
      await views[name](wanted);
      computed[name] = key;
    });
    if (pending[name] === key) delete pending[name];
  }
  for (const tab of tabs) tab.addEventListener("click", () => open(tab.dataset.view));
  roving($("[role=tablist]", panel), "[role=tab]", {onMove: (tab) => open(tab.dataset.view)});
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    compute();
  });

  // Loss of each token.
  const lossView = $("#inside-loss");
  const inspector = new Inspector($(".inspector", lossView), vocabulary, "loss");
  let scored = null;
  const lossText = new TokenText($(".text", lossView), (index) => inspector.show({
    model: scored.model, ids: scored.ids, position: index + 1, token: scored.tokens[index], options: {}, n_vocab: info.config.n_vocab,
  }));
  async function loss(request) {
    scored = {model: request.model, ...(await ask("page/loss", request))};
    inspector.clear();
    lossText.clear();
    for (const token of scored.tokens) lossText.add(token);
    $(".summary", lossView).textContent = `${scored.tokens.length} tokens, ${number(scored.nats_per_token)} nats per token (perplexity ${number(Math.exp(scored.nats_per_token), 2)}), ${number(scored.bits_per_byte)} bits per byte`;
  }

  // Attention patterns.
  const attentionView = $("#inside-attention");
  const pattern = new Attention(attentionView);
  const layerSelect = $("select", attentionView);
  layerSelect.append(...Array.from({length: n_layer}, (_, i) => el("option", {value: i}, `layer ${i}`)));
  let attended = null;
  async function attention(request) {
    attended = request;
    const result = await ask("page/attention", {...request, layer: Number(layerSelect.value)});
    pattern.show(result, unpack(result.pattern, "uint16"));
  }
  layerSelect.addEventListener("change", () => {
    if (attended) attempt($(".error", attentionView), layerSelect, () => attention(attended));
  });

  // Logit lens.
  const lensView = $("#inside-lens");
  async function lens(request) {
    const result = await ask("page/lens", request);
    const columns = result.tokens.map((token) => visible(token.shown ?? token.text) || "·");
    const rows = [...result.layers].reverse();
    const nameOf = (row) => (rows[row].name === "embed" ? "embedding" : `layer ${rows[row].name.split(".")[1]}`);
    $(".grid", lensView).classList.toggle("narrow", columns.every((text) => text.length < 4 || text.startsWith("<")));
    heatGrid($(".grid", lensView), {
      columns,
      rows: rows.map((_, row) => nameOf(row)),
      cell: (row, column) => {
        const cell = rows[row].cells[column];
        const next = cell.next_rank ? `; the next token has ${percent(cell.next_prob)}, rank ${cell.next_rank}` : "";
        return {text: visible(cell.shown), value: cell.prob, title: `“${visible(cell.shown)}” ${percent(cell.prob)}${next}`};
      },
      onSelect: (row, column, cell) => {
        $(".summary", lensView).textContent = `After “${columns[column]}”, ${nameOf(row)}: ${cell.title}`;
      },
    });
    $(".summary", lensView).textContent = "Each cell is the most likely next token if the model ended there. Choose one for its probabilities.";
  }

  function offerPositions(select, {tokens, position}) {
    select.replaceChildren(...tokens.map((token, i) => el("option", {value: i}, `${i}: ${visible(token.shown ?? token.text) || "·"}`)));
    select.value = position;
  }

  // Attribution.
  const attributionView = $("#inside-attribution");
  const selectsOf = (view) => Object.fromEntries($$("select", view).map((element) => [element.name, element]));
  const attributed = selectsOf(attributionView);
  let attributedText = null;
  async function attribution(request, keep = false) {
    const given = keep ? {
      position: Number(attributed.position.value),
      token: attributed.token.value === "" ? null : Number(attributed.token.value),
      minus: attributed.minus.value === "" ? null : Number(attributed.minus.value),
    } : {};
    const result = await ask("page/attribution", {...request, ...given});
    attributedText = request;
    offerPositions(attributed.position, result);
    const choices = (value) => [...result.top, ...(value && !result.top.some(({id}) => id === value.id) ? [value] : [])].map(({id}) => el("option", {value: id}, shown(id)));
    attributed.token.replaceChildren(...choices(result.token));
    attributed.token.value = result.token.id;
    attributed.minus.replaceChildren(el("option", {value: ""}, "nothing"), ...choices(result.minus));
    attributed.minus.value = result.minus?.id ?? "";
    bars($(".grid", attributionView), result.parts);
    const minus = result.minus ? ` minus that of “${visible(result.minus.shown)}”` : "";
    $(".summary", attributionView).textContent = `Logit of “${visible(result.token.shown)}”${minus}: ${number(result.logit)}; the parts add up to ${number(result.total)}.`;
  }
  for (const element of Object.values(attributed)) {
    element.addEventListener("change", () => {
      if (!attributedText) return;
      if (element === attributed.position) attributed.token.value = attributed.minus.value = "";
      attempt($(".error", attributionView), element, () => attribution(attributedText, true));
    });
  }

  // Runs a request for each layer, and shows their rows as they arrive. A new sweep ends the one before.
  let sweep = null;
  async function forEachLayer(view, path, body, draw) {
    sweep?.abort();
    sweep = new AbortController();
    const signal = AbortSignal.any([sweep.signal, work.signal]);
    const layers = [];
    $(".top-tables", view).replaceChildren();
    for (let layer = 0; layer < n_layer; layer += 1) {
      layers.push(await post(path, {...body, layer}, signal));
      draw(layers);
    }
  }

  function beforeAfter(view, before, after, label) {
    $(".top-tables", view).replaceChildren(topTable("before", before, shown), topTable(label, after, shown));
  }

  const ablationView = $("#inside-ablation");
  const ablated = selectsOf(ablationView);
  let ablatedText = null;
  async function ablation(request, position = null) {
    await forEachLayer(ablationView, "page/ablate", {...request, position, replacement: ablated.replacement.value}, (layers) => {
      const {token, tokens, before, after} = layers[0];
      ablatedText = request;
      offerPositions(ablated.position, layers[0]);
      const most = Math.max(...layers.flatMap((layer) => layer.after.map((entry) => Math.abs(entry.logprob - token.logprob))), 1e-9);
      heatGrid($(".grid", ablationView), {
        columns: after.map((entry) => entry.label),
        rows: Array.from({length: n_layer}, (_, i) => `layer ${i}`),
        cell: (row, column) => {
          const entry = layers[row]?.after[column];
          if (!entry) return {text: "", value: 0, title: "not computed yet"};
          const change = entry.logprob - token.logprob;
          const title = `without ${entry.label} of layer ${row}: log-probability ${number(entry.logprob)} (${signed(change)}), KL ${number(entry.kl)} nats`;
          return {text: signed(change), value: change / most, title};
        },
        onSelect: (row, column, cell) => {
          const entry = layers[row]?.after[column];
          if (!entry) return;
          $(".summary", ablationView).textContent = cell.title;
          beforeAfter(ablationView, before, entry.top, `without ${entry.label} of layer ${row}`);
        },
      });
      $(".summary", ablationView).textContent = `Change of the log-probability (${number(token.logprob)}) of “${visible(token.shown)}” after “${visible(tokens[layers[0].position].shown ?? tokens[layers[0].position].text) || "·"}”, without one head or MLP.`;
    });
  }
  for (const element of Object.values(ablated)) {
    element.addEventListener("change", () => {
      if (ablatedText) attempt($(".error", ablationView), element, () => ablation(ablatedText, Number(ablated.position.value)));
    });
  }

  const patchingView = $("#inside-patching");
  const kind = $("select", patchingView);
  const corrupted = $("textarea", patchingView);
  async function patching(request) {
    await forEachLayer(patchingView, "page/patch", {model: request.model, clean: request.text, corrupted: corrupted.value, kind: kind.value}, (layers) => {
      const first = layers[0];
      const columns = first.corrupted.map((token, i) => {
        const [a, b] = [first.clean[i], token].map((entry) => visible(entry.shown ?? entry.text) || "·");
        return a === b ? a : `${b} ← ${a}`;
      });
      const range = first.clean_score - first.corrupted_score;
      heatGrid($(".grid", patchingView), {
        columns,
        rows: Array.from({length: n_layer}, (_, i) => `layer ${i}`),
        cell: (row, column) => {
          const entry = layers[row]?.after[column];
          if (!entry) return {text: "", value: 0, title: "not computed yet"};
          const restored = (entry.score - first.corrupted_score) / range;
          return {text: restored.toFixed(2).replace(/^-0.00$/, "0.00"), value: restored, title: `layer ${row}, position ${column}: ${percent(Math.max(0, restored))} restored, difference of logits ${number(entry.score)}`};
        },
        onSelect: (row, column, cell) => {
          const entry = layers[row]?.after[column];
          if (!entry) return;
          $(".summary", patchingView).textContent = cell.title;
          beforeAfter(patchingView, first.before, entry.top, `patched at layer ${row}, position ${column}`);
        },
      });
      $(".summary", patchingView).textContent = `Logit of “${visible(first.answer.shown)}” minus that of “${visible(first.other.shown)}”: ${number(first.clean_score)} after the first prompt, ${number(first.corrupted_score)} after the second. Cells: 0 is the second, 1 the first.`;
    });
  }
  open("loss");

  // Forgets what was computed, and what is being computed.
  const summaries = $$(".summary", panel).map((element) => [element, element.textContent]);
  return () => {
    work.abort();
    work = new AbortController();
    for (const name of Object.keys(computed)) delete computed[name];
    for (const name of Object.keys(pending)) delete pending[name];
    for (const [element, text] of summaries) element.textContent = text;
    for (const element of $$(".grid, .top-tables", panel)) element.replaceChildren();
    for (const element of $$(".grid", panel)) delete element.dataset.shape;
    for (const element of [...Object.values(attributed), ablated.position]) element.replaceChildren();
    attended = attributedText = ablatedText = null;
    pattern.clear();
    lossText.clear();
    inspector.clear();
  };
}
