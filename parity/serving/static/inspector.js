// What the model thought at one token: the most likely tokens before and after the rules of sampling, redrawn by the
// sliders from the stored logits.

import {post, unpack} from "./api.js";
import {$, attempt, el, number, percent, visible} from "./dom.js";
import {Sliders} from "./options.js";
import {choose, distribution, kept, largest} from "./sampling.js";

const N_ROWS = 10;

export class Inspector {
  // vocabulary: the texts of all tokens by id; prefix: of the ids of its sliders.
  constructor(root, vocabulary, prefix) {
    this.root = root;
    this.vocabulary = vocabulary;
    this.rows = [];
    const body = $("tbody", root);
    for (let i = 0; i <= N_ROWS; i += 1) {
      const cells = {
        token: el("td.piece"),
        bar: el("div.bar"),
        after: el("td.figure"),
        model: el("td.figure"),
      };
      const row = el("tr", {}, cells.token, el("td.bars", {}, cells.bar), cells.after, cells.model);
      this.rows.push({row, ...cells});
      body.append(row);
    }
    this.sliders = new Sliders($(".sliders", root), prefix, () => this.redraw());
    this.reset = $("button", root);
    this.reset.addEventListener("click", () => {
      this.sliders.set(this.subject.options, this.subject.n_vocab);
      this.redraw();
    });
    this.clear();
  }

  clear() {
    this.request?.abort();
    this.subject = null;
    this.stored = null;
    delete this.root.dataset.drawn;
    $(".subject", this.root).textContent = "Choose a token";
    for (const name of ["logprob", "rank", "entropy", "kept", "drawn"]) this.fact(name, "–");
    for (const {row, token, bar, after, model} of this.rows) {
      row.className = "";
      for (const cell of [token, after, model]) cell.textContent = "\u00a0";
      bar.style.width = "0";
    }
    this.enable(false);
  }

  enable(on) {
    for (const input of [...Object.values(this.sliders.sliders), this.reset]) input.disabled = !on;
  }

  fact(name, text) {
    $(`[data-fact=${name}]`, this.root).textContent = text;
  }

  // subject: {model, ids, position, token: {id, text, shown, logprob, rank?, entropy?}, options, n_vocab}
  async show(subject) {
    this.request?.abort();
    this.request = new AbortController();
    const {signal} = this.request;
    this.subject = subject;
    this.stored = null;
    const {token} = subject;
    $(".subject", this.root).textContent = `“${visible(token.shown ?? token.text)}”`;
    this.fact("logprob", `${number(token.logprob)} (${percent(Math.exp(token.logprob))})`);
    this.fact("rank", token.rank === undefined ? "…" : String(token.rank));
    this.fact("entropy", token.entropy === undefined ? "…" : `${number(token.entropy)} nats`);
    this.sliders.set(subject.options, subject.n_vocab);
    await attempt($(".error", this.root), null, async () => {
      const body = {model: subject.model, ids: subject.ids.slice(0, subject.position), seed: subject.options.seed ?? 0};
      const stored = await post("page/logits", body, signal);
      this.stored = {logits: unpack(stored.logits, "float32"), uniform: stored.uniform, seen: new Set(body.ids)};
      const {logits} = this.stored;
      this.fact("rank", (1 + logits.reduce((n, z) => n + (z > logits[token.id] ? 1 : 0), 0)).toLocaleString("en"));
      this.enable(true);
      this.redraw();
    });
  }

  // Draws the distribution under the sliders. No request is made for it.
  redraw() {
    if (!this.stored) return;
    const {logits, uniform, seen} = this.stored;
    const {token} = this.subject;
    const model = distribution(logits, seen, {});
    const after = distribution(logits, seen, this.sliders.values);
    const ids = largest(model, N_ROWS);
    if (!ids.includes(token.id)) ids.push(token.id);
    const highest = Math.max(...ids.map((id) => Math.max(after[id], model[id])));
    this.rows.forEach((cells, index) => {
      const id = ids[index];
      cells.row.className = id === token.id ? "chosen" : id !== undefined && after[id] === 0 ? "dropped" : "";
      cells.token.textContent = id === undefined ? "\u00a0" : visible(this.vocabulary[id] ?? `<${id}>`);
      cells.bar.style.width = id === undefined ? "0" : `${(100 * after[id]) / highest}%`;
      cells.after.textContent = id === undefined ? "\u00a0" : percent(after[id]);
      cells.model.textContent = id === undefined ? "\u00a0" : percent(model[id]);
    });
    let entropy = 0;
    for (const p of model) if (p > 0) entropy -= p * Math.log(p);
    this.fact("entropy", `${number(entropy)} nats`);
    let mass = 0;
    after.forEach((p, id) => {
      if (p > 0) mass += model[id];
    });
    this.fact("kept", `${kept(after).count.toLocaleString("en")} of ${after.length.toLocaleString("en")}, ${percent(mass)}`);
    const drawn = choose(after, uniform);
    const name = this.vocabulary[drawn.id] ?? `<${drawn.id}>`;
    this.fact("drawn", this.sliders.values.temperature === 0 ? `“${visible(name)}”` : `“${visible(name)}” (u = ${uniform.toFixed(4)})`);
    this.root.dataset.drawn = drawn.id;
  }
}
