// The sampling options of the form, and the sliders that change them for one distribution.

import {el, number} from "./dom.js";

// name in the request, label, attributes of the input, value; limits that depend on the model are filled in later.
const FIELDS = [
  ["max_new_tokens", "New tokens", {min: 1, step: 1}, 60],
  ["temperature", "Temperature", {min: 0, max: 100, step: "any"}, 0.8],
  ["top_k", "Top-k", {min: 1, step: 1, placeholder: "all"}, ""],
  ["top_p", "Top-p", {min: 0.0001, max: 1, step: "any", placeholder: "1"}, ""],
  ["min_p", "Min-p", {min: 0, max: 1, step: "any", placeholder: "0"}, ""],
  ["repetition_penalty", "Repetition penalty", {min: 0.001, max: 1000, step: "any", placeholder: "1"}, ""],
  ["seed", "Seed", {min: 0, max: Number.MAX_SAFE_INTEGER, step: 1}, 0],
  ["stop", "Stop text", {type: "text", maxlength: 100, placeholder: "none"}, ""],
];

export class OptionsForm {
  constructor(container, prefix) {
    this.inputs = {};
    for (const [name, label, attributes, value] of FIELDS) {
      const input = el("input", {type: "number", id: `${prefix}-${name}`, name, value, ...attributes});
      this.inputs[name] = input;
      container.append(el("label.field", {for: input.id}, el("span", {}, label), input));
    }
  }

  limit(config) {
    this.inputs.max_new_tokens.max = config.n_ctx;
    this.inputs.top_k.max = config.n_vocab;
    this.inputs.max_new_tokens.value = Math.min(this.inputs.max_new_tokens.value, Math.max(1, Math.floor(config.n_ctx / 2)));
  }

  // The options that are given; an invalid one is an error that names it and its limits.
  read() {
    const options = {};
    for (const [name, label] of FIELDS) {
      const input = this.inputs[name];
      if (!input.checkValidity()) {
        input.focus();
        throw new Error(`${label}: ${input.validationMessage}`);
      }
      if (name === "stop") {
        if (input.value) options.stop = [input.value];
      } else if (input.value !== "") options[name] = Number(input.value);
    }
    return options;
  }
}

// A slider's position 0..1 as the value of an option, and back.
const SCALES = {
  temperature: {label: "Temperature", from: (x) => Math.round(200 * x) / 100, to: (v) => v / 2, off: 1},
  topK: {label: "Top-k", from: (x, V) => Math.max(1, Math.round(V ** x)), to: (v, V) => Math.log(v) / Math.log(V)},
  topP: {label: "Top-p", from: (x) => Math.max(0.001, Math.round(1000 * x) / 1000), to: (v) => v, off: 1},
  minP: {label: "Min-p", from: (x) => Math.round(1000 * x * x) / 1000, to: (v) => Math.sqrt(v), off: 0},
  repetitionPenalty: {label: "Repetition penalty", from: (x) => Math.round(100 * (1 + x)) / 100, to: (v) => v - 1, off: 1},
};

export class Sliders {
  constructor(container, prefix, onChange) {
    this.sliders = {};
    this.outputs = {};
    this.values = {};
    this.n_vocab = 2;
    for (const [name, {label}] of Object.entries(SCALES)) {
      const id = `${prefix}-slider-${name}`;
      const slider = el("input", {type: "range", id, min: 0, max: 1, step: 0.005, input: () => {
        this.values[name] = SCALES[name].from(Number(slider.value), this.n_vocab);
        this.show(name);
        onChange();
      }});
      this.sliders[name] = slider;
      this.outputs[name] = el("output", {for: id});
      container.append(el("label", {for: id}, label), slider, this.outputs[name]);
    }
  }

  // Sets the sliders to the options of a request.
  set(options, n_vocab) {
    this.n_vocab = n_vocab;
    this.values = {
      temperature: options.temperature ?? 1,
      topK: options.top_k ?? n_vocab,
      topP: options.top_p ?? 1,
      minP: options.min_p ?? 0,
      repetitionPenalty: options.repetition_penalty ?? 1,
    };
    for (const name of Object.keys(SCALES)) {
      this.sliders[name].value = SCALES[name].to(this.values[name], n_vocab);
      this.show(name);
    }
  }

  show(name) {
    const value = this.values[name];
    const off = value === (name === "topK" ? this.n_vocab : SCALES[name].off) && name !== "temperature";
    const text = off ? "off" : name === "topK" ? String(value) : name === "temperature" && value === 0 ? "greedy" : number(value, value < 0.1 ? 3 : 2);
    this.outputs[name].textContent = text;
    this.sliders[name].setAttribute("aria-valuetext", text);
  }
}

export function modelSelect(select, models, both) {
  select.replaceChildren(...models.map((model) => el("option", {value: model.name}, model.label)));
  if (both && models.length === 2) select.append(el("option", {value: "both"}, "both, compared"));
  if (both && models.length === 2) select.value = "both";
}

