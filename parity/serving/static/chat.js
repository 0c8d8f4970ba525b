// A conversation with a model that was tuned on instructions.

import {events} from "./api.js";
import {$, attempt, el} from "./dom.js";
import {OptionsForm, modelSelect} from "./options.js";

export function setUp(info) {
  const panel = $("#chat");
  const form = $("form", panel);
  const list = $(".conversation", panel);
  const input = $("textarea", form);
  const go = $("button.go", form);
  const stop = $("button.stop", form);
  const options = new OptionsForm($(".options", form), "chat");
  options.limit(info.config);
  options.inputs.temperature.value = 0;
  modelSelect($("select", form), info.models, false);
  let messages = [];
  let controller = null;

  function clear() {
    controller?.abort();
    messages = [];
    list.replaceChildren();
  }
  $("button.new", form).addEventListener("click", () => {
    clear();
    input.focus();
  });
  stop.addEventListener("click", () => controller?.abort());
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (controller || !input.value.trim()) return;
    attempt($(".error", form), go, async () => {
      const body = {...options.read(), model: $("select", form).value};
      const own = messages; // a new conversation, which may begin before the answer ends, has another list
      const asked = {role: "user", content: input.value};
      const answer = el("p.text");
      const turn = el("li", {}, el("h3", {}, "You"), el("p.text", {}, input.value), el("h3", {}, "Model"), answer);
      list.append(turn);
      input.value = "";
      controller = new AbortController();
      stop.disabled = false;
      let text = "";
      try {
        for await (const part of events("page/complete", {...body, messages: [...own, asked]}, controller.signal)) {
          for (const token of part.tokens ?? []) text += token.text;
          answer.textContent = text;
          turn.scrollIntoView({block: "nearest"});
        }
        if (text.trim()) own.push(asked, {role: "assistant", content: text});
        else answer.replaceWith(el("p.quiet", {}, "The model answered nothing, so the conversation goes on without this turn."));
      } catch (problem) {
        if (problem.name === "AbortError" && text) own.push(asked, {role: "assistant", content: text});
        else {
          turn.remove();
          if (own === messages && !input.value) input.value = asked.content; // to be sent again
        }
        throw problem;
      } finally {
        controller = null;
        stop.disabled = true;
      }
    });
  });
  return clear;
}
