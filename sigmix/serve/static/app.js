"use strict";

const $ = (id) => document.getElementById(id);
const BY_HAND = "by hand";
let turns = [];
let models = [];
let running = null; // AbortController of the running request
let last = null; // id of the last response

function element(tag, text, attributes = {}) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function fail(error, place = "error") {
  $(place).textContent = error.message;
  $(place).hidden = false;
}

function clearError(place = "error") {
  $(place).hidden = true;
  $(place).textContent = "";
}

// ------------------------------------------------------------------ bank

async function refresh() {
  try {
    models = (await api.call("GET", "/v1/models")).data;
    $("status").textContent = `ready: ${kind("expert").length} experts, ${kind("mix").length} saved mixes`;
  } catch (error) {
    $("status").textContent = "not connected";
    fail(error);
    return;
  }
  const chosen = $("model").value || "auto";
  $("model").replaceChildren(...["auto", "base", ...names(), BY_HAND].map((name) => element("option", name, { value: name })));
  $("model").value = [...$("model").options].some((option) => option.value === chosen) ? chosen : "auto";
  sliders();
  cards();
}

const kind = (wanted) => models.filter((model) => model.sigmix.kind === wanted);
const names = () => [...kind("expert"), ...kind("mix")].map((model) => model.id);

function sliders() {
  const before = weights();
  $("sliders").replaceChildren(...kind("expert").map(({ id }) => {
    const row = element("div", undefined, { class: "bar" });
    const slider = element("input", undefined, {
      type: "range", min: "0", max: "1.5", step: "0.05", value: String(before[id] ?? 0), id: `alpha-${id}`, "data-expert": id,
    });
    const shown = element("output", Number(slider.value).toFixed(2), { for: slider.id });
    slider.addEventListener("input", () => {
      shown.textContent = Number(slider.value).toFixed(2);
      $("by-hand").textContent = byHand();
      $("model").value = BY_HAND;
    });
    row.append(element("label", id, { for: slider.id }), slider, shown);
    return row;
  }));
  $("by-hand").textContent = byHand();
}

function weights() {
  const found = {};
  for (const slider of document.querySelectorAll("#sliders input")) found[slider.dataset.expert] = Number(slider.value);
  return found;
}

function byHand() {
  const parts = Object.entries(weights()).filter(([, alpha]) => alpha > 0);
  return parts.map(([name, alpha]) => `${name}:${Number(alpha.toFixed(2))}`).join("+") || "base";
}

function cards() {
  $("bank").replaceChildren(...[...kind("expert"), ...kind("mix")].map((model) => {
    const item = element("li");
    item.append(element("strong", model.id));
    const about = model.sigmix;
    item.append(element("p", about.kind === "mix" ? `a saved mix: ${about.mix}` : about.description || about.domain || ""));
    if (about.kind === "expert") item.append(element("p", `z acts on ${about.positions === "prompt" ? "the prompt" : "all tokens"}`));
    const button = element("button", about.kind === "mix" ? "Forget" : "Unload", { type: "button" });
    button.setAttribute("aria-label", `${button.textContent} ${model.id}`);
    button.addEventListener("click", () => change("DELETE", `/v1/${about.kind === "mix" ? `mixes/${model.id}` : `experts/${about.expert}`}`));
    if (about.kind === "mix" && Object.values(about.weights).some(Array.isArray)) {
      const show = element("button", "α by layer", { type: "button" });
      show.addEventListener("click", () => layers(about.weights));
      item.append(show);
    }
    item.append(button);
    return item;
  }));
}

async function change(method, path, body) {
  clearError();
  try {
    await api.call(method, path, body);
    await refresh();
    return true;
  } catch (error) {
    fail(error);
    return false;
  }
}

// ------------------------------------------------------------------ decision

function decided(about) {
  $("reason").textContent = `${about.mix}: ${about.reason}.`;
  const shares = Object.fromEntries(kind("expert").map(({ sigmix }) => [sigmix.expert, 0]));
  for (const [name, alpha] of Object.entries(about.weights)) {
    const values = Array.isArray(alpha) ? alpha : typeof alpha === "object" ? Object.values(alpha) : [alpha];
    shares[name] = values.reduce((sum, value) => sum + value, 0) / values.length;
  }
  $("bars").replaceChildren(...Object.entries(shares).map(([name, alpha]) => {
    const row = element("div", undefined, { class: "bar", "data-expert": name, "data-alpha": String(alpha) });
    const meter = element("meter", undefined, { min: "0", max: String(Math.max(1, alpha)), value: String(alpha) });
    meter.setAttribute("aria-label", `α of ${name}`);
    row.append(element("span", name), meter, element("span", alpha.toFixed(2)));
    return row;
  }));
  layers(about.weights);
}

function layers(given) {
  const lists = Object.entries(given).filter(([, alpha]) => Array.isArray(alpha));
  $("layers").hidden = !lists.length;
  $("layer-rows").replaceChildren(...lists.map(([name, alphas]) => {
    const most = Math.max(1, ...alphas);
    const row = element("div", undefined, { class: "layer", role: "img" });
    row.setAttribute("aria-label", `${name}: ${alphas.map((alpha) => alpha.toFixed(2)).join(", ")}`);
    for (const alpha of alphas) {
      const bar = element("i", undefined, { title: alpha.toFixed(2) });
      bar.style.height = `${Math.max(0, 100 * alpha / most)}%`;
      row.append(bar);
    }
    const whole = element("div");
    whole.append(element("span", name), row);
    return whole;
  }));
}

// ------------------------------------------------------------------ conversation

async function ask(question) {
  clearError();
  const chosen = $("model").value;
  const model = chosen === BY_HAND ? byHand() : chosen;
  const item = $("turn").content.cloneNode(true).querySelector("li");
  item.querySelector("h3").textContent = question;
  $("log").append(item);
  const columns = $("compare").checked && model !== "base" ? ["base", model] : [model];
  const cells = answerCells(item.querySelector(".answers"), columns);
  item.scrollIntoView({ block: "end" });
  running = new AbortController();
  busy(true);
  const messages = [...turns, { role: "user", content: question }];
  const body = { messages, max_tokens: Number($("tokens").value) || 64 };
  try {
    await Promise.all(cells.map((cell) => stream(cell, body, running.signal, cell.name === model)));
    turns = [...messages, { role: "assistant", content: cells.at(-1).text.textContent }];
    $("feedback").hidden = false;
    $("feedback-done").textContent = "";
  } catch (error) {
    running.abort();
    if (error.name === "AbortError") cells.at(-1).head.textContent += " (stopped)";
    else fail(error);
  } finally {
    running = null;
    busy(false);
    $("question").focus();
  }
}

// Add an empty answer of each model to a container.
function answerCells(container, columns) {
  return columns.map((name) => {
    const cell = element("div", undefined, { class: "answer", "data-model": name });
    const head = element("h4", name);
    const text = element("span", "");
    cell.append(head, text);
    container.append(cell);
    return { name, head, text };
  });
}

async function stream(cell, body, signal, main) {
  await api.chat({ ...body, model: cell.name }, (chunk) => {
    if (chunk.sigmix) {
      cell.head.textContent = chunk.sigmix.mix === cell.name ? cell.name : `${cell.name} → ${chunk.sigmix.mix}`;
      if (main) {
        decided(chunk.sigmix);
        last = chunk.id;
      }
    }
    cell.text.textContent += chunk.choices[0]?.delta?.content ?? "";
  }, signal);
}

function busy(yes) {
  $("send").disabled = yes;
  $("stop").disabled = !yes;
  $("log").setAttribute("aria-busy", String(yes));
}

// ------------------------------------------------------------------ events

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  turns = [];
  $("log").replaceChildren();
  $("feedback").hidden = true;
  clearError();
  $("question").focus();
});
$("save").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (await change("POST", "/v1/mixes", { name: $("mix-name").value, mix: byHand() })) {
    $("model").value = $("mix-name").value;
    $("mix-name").value = "";
  }
});
$("load").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (await change("POST", "/v1/experts", { path: $("path").value })) $("path").value = "";
});
for (const button of document.querySelectorAll("#feedback button")) {
  button.addEventListener("click", async () => {
    clearError();
    try {
      const found = await api.call("POST", "/v1/feedback", { id: last, reward: Number(button.dataset.reward) });
      $("feedback-done").textContent = found.learned ? "Noted; the bandit has learned from it." : "Noted.";
    } catch (error) {
      fail(error);
    }
  });
}
$("key").addEventListener("change", () => {
  forget();
  api.key = $("key").value.trim();
  clearError();
  refresh();
  openTeach();
});
refresh();
