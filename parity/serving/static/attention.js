// Attention patterns of a layer: a picture of each head, the matrix of one, and where each token looks.

import {$, el, percent, roving, visible} from "./dom.js";
import {tint} from "./tokens.js";

const FULL = 65535;

export class Attention {
  constructor(view) {
    this.heads = $(".heads", view);
    this.text = $(".text", view);
    this.canvas = $("canvas.matrix", view);
    this.summary = $(".summary", view);
    this.head = 0;
    this.query = null;
    roving(this.heads, "button", {onMove: (button) => button.click()});
    roving(this.text, ".token", {onMove: (token) => this.look(Number(token.dataset.index))});
    for (const event of ["click", "mouseover"]) {
      this.text.addEventListener(event, ({target}) => {
        const token = target.closest(".token");
        if (token) this.look(Number(token.dataset.index));
      });
    }
    this.canvas.addEventListener("mousemove", (event) => {
      if (!this.tokens) return;
      const box = this.canvas.getBoundingClientRect();
      this.look(Math.min(this.length - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * this.length))));
    });
  }

  show(result, pattern) {
    const [n_heads, length] = result.pattern.shape;
    Object.assign(this, {tokens: result.tokens, length, pattern, layer: result.layer});
    this.head = Math.min(this.head, n_heads - 1);
    this.heads.replaceChildren(...Array.from({length: n_heads}, (_, head) => {
      const picture = el("canvas", {width: length, height: length, "aria-hidden": "true"});
      this.paint(picture, head);
      return el("button", {type: "button", click: () => this.choose(head)}, picture, el("span", {}, `head ${head}`));
    }));
    this.text.replaceChildren(...this.tokens.map((token, index) => {
      const span = el("span.token", {role: "option", tabindex: index ? -1 : 0, focus: () => this.look(index)}, token.text);
      span.dataset.index = index;
      if (/^\n+$/.test(token.text)) span.classList.add("newline");
      else if (token.text === "") span.dataset.mark = token.shown?.startsWith("<") ? token.shown : "·";
      return span;
    }));
    this.query = length - 1;
    this.choose(this.head);
  }

  clear() {
    this.tokens = null;
    this.heads.replaceChildren();
    this.text.replaceChildren();
    this.canvas.width = this.canvas.height = 8; // which clears it
  }

  choose(head) {
    this.head = head;
    [...this.heads.children].forEach((button, index) => {
      button.setAttribute("aria-pressed", index === head);
      button.tabIndex = index === head ? 0 : -1;
    });
    this.canvas.width = this.canvas.height = this.length;
    this.paint(this.canvas, head);
    this.look(this.query);
  }

  weight(query, key) {
    return this.pattern[(this.head * this.length + query) * this.length + key] / FULL;
  }

  // Colours each token by how much the token `query` looks at it.
  look(query) {
    this.query = query;
    let most = 0;
    for (let key = 1; key <= query; key += 1) if (this.weight(query, key) > this.weight(query, most)) most = key;
    [...this.text.children].forEach((span, key) => {
      const weight = key <= query ? this.weight(query, key) : 0;
      tint(span, Math.sqrt(weight));
      span.title = key <= query ? percent(weight) : "a later token";
      span.setAttribute("aria-label", `${visible(this.tokens[key].shown ?? this.tokens[key].text)}, ${span.title}`);
      span.setAttribute("aria-selected", key === query);
      span.classList.toggle("query", key === query);
      span.classList.toggle("later", key > query);
      span.tabIndex = key === query ? 0 : -1;
    });
    const name = (index) => `“${visible(this.tokens[index].shown ?? this.tokens[index].text)}”`;
    this.summary.textContent = `Layer ${this.layer}, head ${this.head}: ${name(query)} looks most at ${name(most)} (${percent(this.weight(query, most))}).`;
  }

  paint(canvas, head) {
    const context = canvas.getContext("2d");
    const image = context.createImageData(this.length, this.length);
    const [r, g, b] = getComputedStyle(document.documentElement).getPropertyValue("--hot-rgb").split(",").map(Number);
    const start = head * this.length * this.length;
    for (let i = 0; i < this.length * this.length; i += 1) {
      image.data.set([r, g, b, Math.round(255 * Math.sqrt(this.pattern[start + i] / FULL))], 4 * i);
    }
    context.putImageData(image, 0, 0);
  }
}
