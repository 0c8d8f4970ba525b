// Continue a prompt with one backend, or with both side by side.

import {events, post, unpack} from "./api.js";
import {$, attempt, el, number} from "./dom.js";
import {Inspector} from "./inspector.js";
import {OptionsForm, modelSelect} from "./options.js";
import {choose, distribution, penalized} from "./sampling.js";
import {drawAgreement} from "./agreement.js";
import {TokenText} from "./tokens.js";

export function setUp(info, vocabulary) {
  const panel = $("#complete");
  const form = $("form", panel);
  const prompt = $("textarea", form);
  const select = $("select", form);
  const error = $(".error", form);
  const go = $("button.go", form);
  const stop = $("button.stop", form);
  const options = new OptionsForm($(".options", form), "complete");
  options.limit(info.config);
  modelSelect(select, info.models, true);
  const inspector = new Inspector($(".inspector", panel), vocabulary, "complete");
  const columns = info.models.map((model) => {
    const text = el("div.text", {"aria-label": `Text of ${model.name}`, tabindex: -1});
    const status = el("p.status", {role: "status"}, "\u00a0");
    const element = el("section.column", {}, el("h3", {}, model.label), text, status);
    $(".columns", panel).append(element);
    const column = {model: model.name, element, status};
    column.text = new TokenText(text, (index) => inspect(column, index));
    return column;
  });
  let controller = null;
  let comparison = null;

  function chosen() {
    return columns.filter(({model}) => select.value === "both" || select.value === model);
  }

  function arrange() {
    for (const column of columns) column.element.hidden = !chosen().includes(column);
    $(".agreement", panel).hidden = select.value !== "both";
  }
  select.addEventListener("change", arrange);
  arrange();

  async function inspect(column, index) {
    for (const other of columns) if (other !== column) other.text.deselect();
    await inspector.show({
      model: column.model,
      ids: [...column.prompt, ...column.text.tokens.map((token) => token.id)],
      position: column.prompt.length + index,
      token: column.text.tokens[index],
      options: column.options,
      n_vocab: info.config.n_vocab,
    });
  }

  async function complete(column, body, signal) {
    column.text.clear();
    column.text.prompt(body.prompt);
    column.prompt = [];
    column.options = body;
    column.finished = null;
    column.status.textContent = "waiting …";
    const start = performance.now();
    for await (const event of events("page/complete", {...body, model: column.model}, signal)) {
      if (event.prompt) column.prompt = event.prompt;
      for (const token of event.tokens ?? []) column.text.add(token);
      const n = column.text.tokens.length;
      if (event.finish_reason) column.finished = event.finish_reason;
      const how = {stop: "ended by itself", length: "reached the limit"}[column.finished];
      const seconds = (performance.now() - start) / 1000;
      column.status.textContent = `${n} tokens, ${(n / seconds).toFixed(1)} per second${how ? `; ${how}` : ""}`;
    }
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (controller) return;
    await attempt(error, go, async () => {
      const body = {prompt: prompt.value, ...options.read()};
      controller = new AbortController();
      stop.disabled = false;
      go.disabled = true;
      comparison?.abort();
      inspector.clear();
      drawAgreement($(".agreement", panel), null);
      const running = chosen();
      try {
        await Promise.all(running.map((column) => complete(column, body, controller.signal)));
      } catch (problem) {
        controller.abort();
        for (const column of running) if (!column.finished) column.status.textContent = "stopped";
        throw problem;
      } finally {
        controller = null;
        stop.disabled = true;
        go.disabled = false;
      }
      if (running.length === 2) await compare(running, body);
    });
  });
  stop.addEventListener("click", () => controller?.abort());

  // Shows how far the logits of both backends are apart, and the margin where their tokens part.
  async function compare(both, body) {
    const view = $(".agreement", panel);
    const texts = both.map((column) => column.text.tokens.map((token) => token.id));
    const length = Math.min(texts[0].length, texts[1].length);
    let equal = 0;
    while (equal < length && texts[0][equal] === texts[1][equal]) equal += 1;
    const total = Math.max(texts[0].length, texts[1].length);
    drawAgreement(view, {equal, total});
    comparison = new AbortController();
    const {signal} = comparison;
    await attempt($(".error", view), null, async () => {
      const ids = [...both[0].prompt, ...texts[0].slice(0, equal)];
      const first = both[0].prompt.length;
      if (equal < total) {
        const where = {ids, seed: body.seed ?? 0};
        const sides = await Promise.all(both.map((column) => post("page/logits", {...where, model: column.model}, signal)));
        drawAgreement(view, {equal, total, margins: sides.map((side, i) => margin(side, both[i], ids, body))});
      }
      const compared = await post("page/compare", {ids, first}, signal).catch((problem) => {
        if (problem.name !== "AbortError") $(".details", view).textContent = "The logits were not compared.";
        throw problem;
      });
      drawAgreement(view, {equal, total, compared, onSelect: (index) => {
        const column = both[0];
        if (column.text.tokens[index]) column.text.spans[index].click();
      }});
    });
  }

  // How close a choice was: in probability for a sampled token, in logits for a greedy one.
  function margin(side, column, ids, body) {
    const logits = unpack(side.logits, "float32");
    const seen = new Set(ids);
    const rules = {
      temperature: body.temperature, topK: body.top_k, topP: body.top_p, minP: body.min_p, repetitionPenalty: body.repetition_penalty,
    };
    if (body.temperature === 0) {
      const [first, second] = penalized(logits, seen, body.repetition_penalty).sort().slice(-2).reverse();
      return `${column.model}: ${number(first - second)} between the two largest logits`;
    }
    const drawn = choose(distribution(logits, seen, rules), side.uniform);
    return `${column.model}: u = ${side.uniform.toFixed(6)} is ${number(drawn.margin, 6)} from the end of the interval of “${vocabulary[drawn.id]}”`;
  }

  return () => {
    controller?.abort();
    comparison?.abort();
    for (const column of columns) {
      column.text.clear();
      column.status.textContent = "\u00a0";
    }
    inspector.clear();
    drawAgreement($(".agreement", panel), null);
  };
}
