"use strict";
// Page "Teach": a file of examples, what is read from it, a fine-tuning job, and the model beside the base.

const JOBS = "/v1/fine_tuning/jobs";
const VALIDATE = "/v1/fine_tuning/alpha/graders/validate";
const ACTIVE = ["queued", "running", "paused"];
const RETRY_MS = 2000; // between two tries to reach the server
let uploaded = null; // file object of an upload that no job uses yet
let job = null; // the job that is shown
let watching = null; // AbortController of its stream of events
const TITLES = { loss: "Training loss", accuracy: "Validation accuracy" };
const curves = { loss: new Map(), accuracy: new Map() }; // step to value, by id of the picture
const drawing = new Set(); // ids of pictures to draw in the next frame

// Field of a grader object and its value, by type of the grader.
const GRADERS = { string_check: ["operation", "eq"], text_similarity: ["evaluation_metric", "fuzzy_match"] };

// Show an error, beside the grader's field if it is about that.
function warn(error) {
  fail(error, /(^|\.)grader(\.|$)/.test(error.param) ? "grader-error" : "teach-error");
}

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
const count = (number) => number.toLocaleString("en");

// ------------------------------------------------------------------ pages

// Show the page that contains the element of the address's fragment.
function showPage() {
  const target = document.getElementById(location.hash.slice(1));
  const page = target?.closest("main") ?? $("chat");
  for (const main of document.querySelectorAll("main")) main.hidden = main !== page;
  for (const link of document.querySelectorAll("nav a")) {
    if ($(link.hash.slice(1)).closest("main") === page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  $("skip").hash = page === $("teach") ? "file" : "question";
  if (page === $("teach")) openTeach();
  else watching?.abort(); // an open stream counts as a request of the key
  (target ?? $("question")).focus();
}

// List the jobs, and watch the one that was shown before, or the latest one that has not ended.
async function openTeach() {
  if ($("teach").hidden) return;
  clearError("teach-error");
  let jobs = [];
  try {
    jobs = await listJobs();
    $("closed").hidden = true;
  } catch (error) {
    watching?.abort();
    forget();
    $("jobs").replaceChildren();
    fail(error, "closed");
  }
  $("lesson").hidden = !$("closed").hidden;
  const shown = jobs.find(({ id }) => id === job?.id) ?? jobs.find(({ status }) => ACTIVE.includes(status));
  if (shown) watch(shown);
  else $("job").hidden = true;
}

async function listJobs() {
  const { data } = await api.call("GET", JOBS);
  $("jobs").replaceChildren(...data.map((one) => {
    const item = element("li");
    const button = element("button", "Open", { type: "button", "aria-label": `Open ${nameOf(one)}` });
    button.addEventListener("click", () => watch(one));
    item.append(element("strong", nameOf(one)), element("p", stateOf(one)), button);
    return item;
  }));
  return data;
}

const nameOf = (one) => one.fine_tuned_model ?? one.user_provided_suffix ?? one.metadata?.file ?? one.id;
const stateOf = (one) => (one.sigmix.deleted ? "discarded" : one.error ? `failed: ${one.error.message}` : one.status);

// ------------------------------------------------------------------ the file

async function upload(file) {
  if (!file || $("file").disabled) return;
  forget();
  await reading(`Sending ${file.name} …`, async () => {
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file);
    uploaded = await (await api.send("POST", "/v1/files", form)).json();
    $("suffix").value = file.name.replace(/\.\w+$/, "").replace(/[^\w.-]+/g, "-").replace(/^-|-$/g, "").slice(0, 64);
    await read();
  });
}

// Run a task with the file while the form is disabled.
async function reading(text, work) {
  for (const place of ["teach-error", "grader-error"]) clearError(place);
  $("reading").textContent = text;
  const controls = $("lesson").querySelectorAll("input, button, select, textarea");
  for (const control of controls) control.disabled = true;
  try {
    await work();
  } catch (error) {
    warn(error);
  } finally {
    for (const control of controls) control.disabled = false;
    $("reading").textContent = "";
    $("file").value = ""; // the same file can be chosen again
    if (document.activeElement === document.body) $("file").focus(); // a disabled control loses the focus
  }
}

const columns = () => Object.fromEntries(
  ["prompt", "answer"].map((name) => [`${name}_column`, $(`${name}-column`).value]).filter(([, value]) => value));

// Fill in a grader of the chosen type that compares the reply with the answer.
function chooseGrader() {
  clearError("grader-error");
  const type = $("grader").value;
  $("own-grader").hidden = !type;
  if (!(type in GRADERS)) return;
  const field = $("answer-column").value || "answer"; // of a conversation, the last message
  const quote = field.includes("'") ? '"' : "'";
  const reference = /^\w+$/.test(field) ? `item.${field}` : `item[${quote}${field}${quote}]`;
  const [name, value] = GRADERS[type];
  const grader = { type, input: "{{sample.output_text}}", reference: `{{${reference}}}`, [name]: value };
  $("grader-object").value = JSON.stringify(grader, null, 2);
}

// Return the grader object; null: inferred from the answers.
function chosenGrader() {
  if (!$("grader").value) return null;
  try {
    const grader = JSON.parse($("grader-object").value);
    if (!grader?.type) throw new Error('start with {"type": …}');
    return grader;
  } catch (error) {
    throw Object.assign(new Error(`the grader is no JSON object with a type: ${error.message}`), { param: "grader" });
  }
}

async function checkGrader() {
  clearError("grader-error");
  try {
    await api.call("POST", VALIDATE, { grader: chosenGrader() });
  } catch (error) {
    if ($("grader").value) warn(error); // still chosen
  }
}

async function read() {
  const grader = chosenGrader();
  $("reading").textContent = `Reading ${uploaded.filename} …`;
  $("report").hidden = $("train").hidden = true;
  $("columns").hidden = false;
  const query = new URLSearchParams({ ...columns(), ...(grader && { grader: JSON.stringify(grader) }) });
  const found = await api.call("GET", `/v1/files/${uploaded.id}/summary?${query}`);
  $("answer-column").value ||= found.answer_column ?? "";
  report(found);
  $("train").hidden = found.cannot_train !== null;
}

// Delete an upload that was not trained on.
function forget() {
  if (uploaded) api.call("DELETE", `/v1/files/${uploaded.id}`).catch(() => {});
  uploaded = null;
  $("report").hidden = $("train").hidden = $("columns").hidden = true;
  for (const id of ["prompt-column", "answer-column", "grader", "grader-object"]) $(id).value = "";
  chooseGrader();
}

function report(found) {
  const length = ({ median, p95, max }) =>
    `median ${count(median)} characters, 95 % under ${count(p95)}, longest ${count(max)}`;
  const facts = {
    File: found.source,
    Rows: `${count(found.rows)}, ${count(found.prompts)} distinct requests`,
    Columns: found.columns,
    Parts: Object.entries(found.splits).map(([name, rows]) => `${name} ${count(rows)}`).join(", "),
    Grader: `${found.grader} (${found.reason})`,
    Requests: length(found.prompt_characters),
    Answers: length(found.answer_characters),
    Tokens: `longest answer ${count(found.answer_tokens)}, context ${count(found.context ?? Infinity)}`,
    Duplicates: count(found.repeats),
    Conflicts: count(found.conflicts),
    Leaks: Object.entries(found.leaks).map(([parts, number]) => `${count(number)} in ${parts}`).join(", ") || "0",
    "Over the context": count(found.over_context),
  };
  $("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, text]) => [element("dt", name), element("dd", text)]));
  $("problems").replaceChildren(...found.problems.map((text) => element("p", text)));
  const labels = Object.entries(found.labels ?? {});
  const rows = labels.slice(0, 12).map(([label, { share }]) => {
    const row = element("div", undefined, { class: "bar" });
    const meter = element("meter", undefined, { min: "0", max: "1", value: String(share) });
    meter.setAttribute("aria-label", `share of ${label}`);
    row.append(element("span", label), meter, element("span", percent(share)));
    return row;
  });
  if (labels.length > rows.length) rows.push(element("p", `${count(labels.length - rows.length)} more labels`));
  $("labels").replaceChildren(...(rows.length ? [element("h3", "Labels"), ...rows] : []));
  $("examples").replaceChildren(...found.examples.map(({ prompt, answer, system }) => {
    const row = element("div");
    for (const [name, text] of Object.entries({ System: system, Request: prompt, Answer: answer })) {
      if (text) row.append(element("h4", name), element("p", text));
    }
    return row;
  }));
  $("report").hidden = false;
}

async function train() {
  await reading("Starting …", async () => {
    const hyperparameters = { n_epochs: Number($("epochs").value) || "auto" };
    const grader = chosenGrader();
    const type = grader ? "reinforcement" : "supervised";
    const started = await api.call("POST", JOBS, {
      model: "base", training_file: uploaded.id, suffix: $("suffix").value.trim() || null, sigmix: columns(),
      method: { type, [type]: grader ? { grader, hyperparameters } : { hyperparameters } },
      metadata: { file: uploaded.filename },
    });
    uploaded = null; // the job's from now on
    forget();
    watch(started);
    $("job-head").focus();
    listJobs().catch(warn);
  });
}

// ------------------------------------------------------------------ the job

// Show a job and follow its events until it ends, over restarts of the server too.
async function watch(chosen) {
  watching?.abort();
  const { signal } = (watching = new AbortController());
  for (const values of Object.values(curves)) values.clear();
  for (const id of ["request", "system"]) $(id).value = "";
  $("curves").hidden = $("samples").hidden = $("mistakes").hidden = true;
  $("step").textContent = "";
  $("both").replaceChildren();
  $("job").hidden = false;
  show(chosen);
  let lost = false, updated = Promise.resolve();
  while (!signal.aborted) {
    try {
      await api.stream("GET", `${JOBS}/${chosen.id}/events?stream=true`, undefined, (event) => {
        if (lost) clearError("teach-error");
        lost = false;
        happened(event);
        // a change of the status; a failure here is one of the stream, too
        if (!event.data) updated = updated.then(() => update(chosen.id, signal)).catch(() => {});
      }, signal);
      await updated;
      await update(chosen.id, signal);
      if (!ACTIVE.includes(job.status)) return;
    } catch (error) {
      if (signal.aborted) return;
      warn(error);
      if (error.status >= 400 && error.status < 500) return;
      lost = true;
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function update(id, signal) {
  const found = await api.call("GET", `${JOBS}/${id}`);
  if (!ACTIVE.includes(found.status)) await Promise.all([refresh(), listJobs()]);
  if (signal.aborted) return;
  show(found);
  if ($("done").hidden) return;
  await listMistakes(id).catch((error) => {
    if (error.status !== 404) throw error; // a job without a report
  });
}

function happened({ message, data }) {
  if (!data) {
    $("job-state").textContent = `${message}.`;
    return;
  }
  $("steps").max = data.total_steps;
  $("steps").value = data.step;
  $("step").textContent = `step ${data.step} of ${data.total_steps}`;
  if ("train_loss" in data) add("loss", data.step, data.train_loss);
  else {
    add("accuracy", data.step, data.valid_accuracy);
    $("job-state").textContent =
      `After step ${data.step}: ${percent(data.valid_accuracy)} of ${count(data.valid_n)} held-out requests right.`;
    samples(data);
  }
}

function show(found) {
  job = found;
  const { verdict, deleted, system } = found.sigmix;
  const active = ACTIVE.includes(found.status), paused = found.status === "paused";
  $("job-head").textContent = nameOf(found);
  if (found.status !== "running" || !curves.accuracy.size) {
    $("job-state").textContent = { running: "Training …", succeeded: deleted ? "Discarded." : verdict ?? "Trained.",
      paused: "Paused; the checkpoint is kept." }[found.status] ?? `${stateOf(found)}.`;
  }
  $("job-state").classList.toggle("verdict", found.status === "succeeded" && !deleted);
  const stopped = found.status === "failed" && found.error?.code === "storage"; // by a full disk
  $("progress").hidden = !active;
  $("changes").hidden = !active && !stopped;
  for (const button of $("changes").children) {
    button.hidden = button.dataset.change === (paused || stopped ? "pause" : "resume");
  }
  $("system").value ||= system ?? "";
  $("system-label").hidden = !system;
  $("done").hidden = found.status !== "succeeded" || deleted;
}

function samples({ step, valid_samples: rows }) {
  $("samples-head").textContent = `Replies to held-out requests after step ${step}`;
  $("replies").replaceChildren(...rows.map(({ prompt, gold, reply, score }) => graded(prompt, gold, reply, score)));
  $("samples").hidden = !rows.length;
  $("request").value ||= rows[0]?.prompt ?? "";
}

function graded(prompt, answer, reply, score) {
  const row = element("tr");
  const mark = score === null ? "?" : score === 1 ? "right" : score === 0 ? "wrong" : percent(score);
  row.append(...[prompt, answer, reply, mark].map((text) => element("td", text)));
  return row;
}

// Show the first mistakes of a job, or add those that follow one of them.
async function listMistakes(id, after) {
  const query = after ? `?after=${after}` : "";
  const { data, has_more: more, last_id: last } = await api.call("GET", `${JOBS}/${id}/mistakes${query}`);
  if (job?.id !== id) return; // another one was opened
  const rows = data.map(({ prompt, answer, reply, score }) => graded(prompt, answer, reply, score));
  if (after) $("mistake-rows").append(...rows);
  else $("mistake-rows").replaceChildren(...rows);
  $("more-mistakes").dataset.after = last;
  $("more-mistakes").hidden = !more;
  $("mistakes").hidden = !$("mistake-rows").children.length;
}

function add(name, step, value) {
  if (value === null) return; // not finite
  if (!drawing.size) requestAnimationFrame(draw);
  drawing.add(name);
  curves[name].set(step, value);
}

// Draw the curves that have new values.
function draw() {
  for (const name of drawing) {
    const points = [...curves[name]].sort(([a], [b]) => a - b);
    if (!points.length) continue;
    const most = name === "accuracy" ? 1 : Math.max(...points.map(([, value]) => value), 1e-9);
    const x = (step) => 34 + (200 * step) / $("steps").max, y = (value) => 78 - (70 * Math.max(0, value)) / most;
    const label = (text, attributes) => shape("text", attributes, text);
    const shown = (value) => (name === "accuracy" ? percent(value) : value.toFixed(2));
    $(name).replaceChildren(
      shape("line", { x1: 34, y1: 78, x2: 234, y2: 78 }), shape("line", { x1: 34, y1: 8, x2: 34, y2: 78 }),
      label(shown(most), { x: 30, y: 12, "text-anchor": "end" }), label("0", { x: 30, y: 80, "text-anchor": "end" }),
      label(`${$("steps").max} steps`, { x: 234, y: 89, "text-anchor": "end" }),
      shape("polyline", { points: points.map(([step, value]) => `${x(step)},${y(value)}`).join(" ") }),
      ...(name === "accuracy" ? points : points.slice(-1)).map(
        ([step, value]) => shape("circle", { cx: x(step), cy: y(value), r: 2.5 })),
    );
    const ends = [points[0], points.at(-1)].map(([step, value]) => `${shown(value)} at step ${step}`);
    $(name).setAttribute("aria-label", `${TITLES[name]}: ${[...new Set(ends)].join(", ")}`);
    $("curves").hidden = false;
  }
  drawing.clear();
}

function shape(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// ------------------------------------------------------------------ the model

async function answerWithBoth() {
  clearError("teach-error");
  const turns = [["system", $("system").value.trim()], ["user", $("request").value.trim()]];
  const messages = turns.filter(([, content]) => content).map(([role, content]) => ({ role, content }));
  $("both").replaceChildren();
  const cells = answerCells($("both"), ["base", job.fine_tuned_model]);
  const control = new AbortController();
  $("both").setAttribute("aria-busy", "true");
  $("answer").disabled = true;
  try {
    const body = { messages, max_tokens: Number($("tokens").value) || 64 };
    await Promise.all(cells.map((cell) => stream(cell, body, control.signal, false)));
  } catch (error) {
    control.abort();
    warn(error);
  } finally {
    $("both").setAttribute("aria-busy", "false");
    $("answer").disabled = false;
  }
}

function closeJob(text) {
  watching?.abort();
  job = null;
  $("job").hidden = true;
  $("reading").textContent = text;
  $("file").focus();
}

async function discard() {
  const { fine_tuned_model: name, training_file: file, result_files: results } = job;
  if (!confirm(`Delete ${name}, its report and the file of examples?`)) return;
  clearError("teach-error");
  try {
    await api.call("DELETE", `/v1/models/${name}`);
    const gone = await Promise.allSettled([file, ...results].map((id) => api.call("DELETE", `/v1/files/${id}`)));
    closeJob(`${name} is discarded.`);
    const failed = gone.find(({ reason }) => reason && reason.status !== 404);
    if (failed) throw failed.reason;
  } catch (error) {
    warn(error);
  }
  await Promise.all([refresh(), listJobs()]).catch(warn);
}

// ------------------------------------------------------------------ events

window.addEventListener("hashchange", showPage);
window.addEventListener("pagehide", forget);
$("file").addEventListener("change", () => upload($("file").files[0]));
for (const type of ["dragover", "dragleave", "drop"]) {
  window.addEventListener(type, (event) => {
    event.preventDefault(); // a browser would open the file
    const files = event.dataTransfer?.files ?? [];
    $("drop").classList.toggle("over", type === "dragover");
    if (type !== "drop" || !files.length || $("teach").hidden || $("lesson").hidden) return;
    if (files.length > 1) warn(new Error("drop one file at a time"));
    else upload(files[0]);
  });
}
$("grader").addEventListener("change", chooseGrader);
$("grader-object").addEventListener("change", checkGrader);
$("more-mistakes").addEventListener("click", () => listMistakes(job.id, $("more-mistakes").dataset.after).catch(warn));
$("columns").addEventListener("submit", (event) => {
  event.preventDefault();
  reading("", read);
});
$("train").addEventListener("submit", (event) => {
  event.preventDefault();
  train();
});
for (const button of $("changes").children) {
  button.addEventListener("click", async () => {
    clearError("teach-error");
    try {
      const ended = !ACTIVE.includes(job.status);
      const changed = await api.call("POST", `${JOBS}/${job.id}/${button.dataset.change}`);
      if (ended) watch(changed);
      else show(changed);
    } catch (error) {
      warn(error);
    }
  });
}
$("try").addEventListener("submit", (event) => {
  event.preventDefault();
  answerWithBoth();
});
$("keep").addEventListener("click", () => {
  $("model").value = job.fine_tuned_model;
  closeJob(`${job.fine_tuned_model} is kept; it is chosen under “Answer with” in the chat.`);
});
$("discard").addEventListener("click", discard);
showPage();
