// A text as a list of its tokens, coloured by how improbable each was; one of them is selected, by click or arrow keys.

import {el, percent, roving, visible} from "./dom.js";

// Fraction of the full colour for a log-probability: 0 for certain tokens, 1 from one in a thousand on.
export function surprise(logprob) {
  return Math.min(1, -logprob / Math.log(1000));
}

export function tint(element, fraction) {
  element.style.setProperty("--tint", `${Math.round(70 * Math.max(0, Math.min(1, fraction)))}%`);
}

export class TokenText {
  // onSelect(index) is called when a token is selected; tokens of the prompt have no distribution and are not.
  constructor(container, onSelect = () => {}) {
    this.container = container;
    this.onSelect = onSelect;
    this.clear();
    container.setAttribute("role", "listbox");
    container.addEventListener("click", (event) => {
      const token = event.target.closest(".token");
      if (token) this.select(Number(token.dataset.index));
    });
    roving(container, ".token", {onMove: (token) => this.select(Number(token.dataset.index))});
  }

  clear() {
    this.tokens = [];
    this.spans = [];
    this.selected = -1;
    this.container.replaceChildren();
  }

  prompt(text) {
    this.container.append(el("span.given", {}, text));
  }

  // Adds a token {id, text, shown?, logprob?}.
  add(token) {
    const index = this.tokens.push(token) - 1;
    const span = el("span.token", {role: "option", tabindex: index === 0 ? 0 : -1, "aria-selected": "false"}, token.text);
    span.dataset.index = index;
    if (/^\n+$/.test(token.text)) span.classList.add("newline");
    else if (token.text === "") span.dataset.mark = token.shown?.startsWith("<") ? token.shown : "·";
    this.spans.push(span);
    this.container.append(span);
    if (token.logprob !== undefined) this.judge(index, token.logprob);
  }

  judge(index, logprob) {
    const span = this.spans[index];
    this.tokens[index].logprob = logprob;
    tint(span, surprise(logprob));
    span.title = `${visible(this.tokens[index].shown ?? this.tokens[index].text)}  ${percent(Math.exp(logprob))}`;
    span.setAttribute("aria-label", `${visible(this.tokens[index].shown ?? this.tokens[index].text)}, ${percent(Math.exp(logprob))}`);
  }

  deselect() {
    this.selected = -1;
    for (const span of this.spans) span.setAttribute("aria-selected", "false");
  }

  select(index) {
    if (!this.tokens[index]) return;
    this.spans.forEach((span, number) => {
      span.setAttribute("aria-selected", number === index);
      span.tabIndex = number === index ? 0 : -1;
    });
    this.selected = index;
    this.onSelect(index);
  }
}
