// The page: a chat with the model, or with two side by side, over the server's own interface.

import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const storage = "flapjack-settings";

/** Models that are served; with two, both answer. */
let models = [];
/** Turns so far: what was asked, and what each model answered. */
let turns = [];
/** Stops the answers that are under way; null where there are none. */
let stopping = null;

// ---- talking to the server ----

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, body, signal) {
  const answer = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: headers(),
    body: body ? JSON.stringify(body) : undefined,
    signal,
  });
  if (answer.ok) return answer;
  let words = `the server answers ${answer.status}`;
  try {
    words = (await answer.json()).error.message;
  } catch {}
  if (answer.status === 401) {
    $("key-label").hidden = false;
    showSettings(true);
    $("key").focus();
  }
  throw new Error(words);
}

/** The events of a stream, each as what its JSON says. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trim()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// ---- settings ----

const fields = () => document.querySelectorAll("[data-field]");

function showSettings(open) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", String(open));
}

function showValue(input) {
  const output = document.querySelector(`output[for="${input.id}"]`);
  if (output) output.textContent = input.dataset.set ? input.value : "model's";
}

function settings() {
  const chosen = {};
  for (const input of fields()) {
    if (input.dataset.set && input.value !== "") chosen[input.dataset.field] = Number(input.value);
  }
  return chosen;
}

function keepSettings() {
  const kept = { system: $("system").value, key: $("key").value, fields: settings() };
  try {
    localStorage.setItem(storage, JSON.stringify(kept));
  } catch {}
}

function loadSettings() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(storage)) ?? {};
  } catch {}
  $("system").value = kept.system ?? "";
  $("key").value = kept.key ?? "";
  $("key-label").hidden = !kept.key;
  for (const input of fields()) {
    const value = kept.fields?.[input.dataset.field];
    if (value !== undefined) {
      input.value = value;
      input.dataset.set = "1";
    }
    showValue(input);
  }
}

// ---- models and pruning ----

async function loadModels() {
  models = (await (await ask("/v1/models")).json()).data;
  document.body.classList.toggle("compare", models.length > 1);
  $("model").textContent = models.map(describe).join("  ·  ");
  if (!models[0].meta.chat) say("This model has no chat template: it goes on with what you write.");
  await loadPruning();
}

const megabytes = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

function describe(model) {
  const pruned = model.meta.pruned;
  const what = pruned ? `pruned by ${Math.round(pruned.removed * 100)} %` : "dense";
  return `${model.id} (${what}, ${megabytes(model.meta.bytes)})`;
}

async function loadPruning() {
  const state = (await (await ask("/prune")).json()).models[0];
  $("ratio-row").hidden = !state.allowed;
  const pruned = state.pruned;
  if (pruned && !$("prune").disabled) {
    $("ratio").value = pruned.ratio;
    showRatio();
  }
  $("kept-figure").hidden = !pruned;
  $("pruning").hidden = !state.allowed && !pruned;
  if (pruned) drawKept(pruned.before.layers, pruned.after.layers);
}

function showRatio() {
  $("ratio-text").textContent = `${Math.round($("ratio").value * 100)} %`;
}

/** Of every layer two bars: what stays of its heads and of its channels, on a ground of what there was. */
function drawKept(before, after) {
  const svg = $("kept");
  const space = "http://www.w3.org/2000/svg";
  svg.setAttribute("viewBox", `0 0 ${before.length * 3} 100`);
  svg.replaceChildren();
  const bar = (x, share, kind, words) => {
    const made = document.createElementNS(space, "rect");
    made.setAttribute("x", x);
    made.setAttribute("width", 1.2);
    made.setAttribute("y", 100 - 100 * share);
    made.setAttribute("height", 100 * share);
    made.setAttribute("class", kind);
    const title = document.createElementNS(space, "title");
    title.textContent = words;
    made.append(title);
    svg.append(made);
  };
  before.forEach((was, i) => {
    const is = after[i];
    bar(i * 3, 1, "was", `layer ${i}`);
    bar(i * 3, is.heads / was.heads, "heads", `layer ${i}: ${is.heads} of ${was.heads} heads`);
    bar(i * 3 + 1.3, 1, "was", `layer ${i}`);
    bar(i * 3 + 1.3, is.channels / was.channels, "channels", `layer ${i}: ${is.channels} of ${was.channels} channels`);
  });
  const sum = (layers, of) => layers.reduce((total, layer) => total + layer[of], 0);
  $("kept-caption").textContent =
    `What stays of each layer: ${sum(after, "heads")} of ${sum(before, "heads")} heads (left bars), ` +
    `${sum(after, "channels")} of ${sum(before, "channels")} channels (right bars)`;
}

async function prune() {
  $("prune").disabled = true;
  $("prune-state").textContent = "begins …";
  const watching = setInterval(async () => {
    try {
      const { under_way: event } = (await (await ask("/prune")).json()).models[0];
      if (event) {
        const share = event.total ? ` ${Math.round((100 * event.done) / event.total)} %` : "";
        $("prune-state").textContent = `${event.stage} …${share}`;
      }
    } catch {}
  }, 500);
  try {
    const answer = await (await ask("/prune", { ratio: Number($("ratio").value) })).json();
    $("prune-state").textContent = answer.pruned ? `done: ${megabytes(answer.bytes)}` : `dense: ${megabytes(answer.bytes)}`;
  } catch (error) {
    $("prune-state").textContent = "";
    say(error.message);
  } finally {
    clearInterval(watching);
    $("prune").disabled = false;
  }
  await loadModels();
}

// ---- the chat ----

function say(words) {
  $("notice").textContent = words;
}

function element(name, kind, ...children) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
}

function messagesFor(model) {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    messages.push({ role: "user", content: turn.user });
    const answer = turn.answers[model.id];
    if (answer?.text) messages.push({ role: "assistant", content: answer.text });
  }
  return messages;
}

/** Scrolls with what is written, unless the reader has gone up. */
function follow(change) {
  const root = document.documentElement;
  const atEnd = root.scrollHeight - root.scrollTop - root.clientHeight < 80;
  change();
  if (atEnd) root.scrollTop = root.scrollHeight;
}

async function answerWith(model, turn, place, signal) {
  const heading = models.length > 1 ? [element("h2", "", describe(model))] : [];
  const thinking = element("div", "thinking");
  const body = element("div", "body writing");
  const figures = element("div", "figures");
  const box = element("article", "answer" + (model.meta.pruned || models.length === 1 ? "" : " dense"), ...heading, thinking, body, figures);
  box.setAttribute("aria-label", `Answer of ${model.id}`);
  place.append(box);
  const answer = { text: "", thinking: "" };
  turn.answers[model.id] = answer;
  let drawn = true;
  let over = false;
  const draw = () => {
    drawn = true;
    // What was asked for before the end may come behind it.
    if (over) return;
    follow(() => {
      thinking.textContent = answer.thinking;
      render(body, answer.text);
      // By the time that this model works: where two answer, they take turns.
      const speed = answer.timings?.predicted_per_second;
      if (speed) figures.textContent = `${speed.toFixed(1)} tokens/s · ${megabytes(model.meta.bytes)}`;
    });
  };
  const body_ = { model: model.id, stream: true, stream_options: { include_usage: true }, timings_per_token: true, ...settings() };
  const chat = model.meta.chat;
  try {
    const reply = chat
      ? await ask("/v1/chat/completions", { ...body_, messages: messagesFor(model) }, signal)
      : await ask("/v1/completions", { ...body_, prompt: turn.user }, signal);
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      const more = choice?.delta?.content ?? choice?.text ?? "";
      const thought = choice?.delta?.reasoning_content ?? "";
      if (more || thought) {
        answer.text += more;
        answer.thinking += thought;
        if (drawn) {
          drawn = false;
          requestAnimationFrame(draw);
        }
      }
      if (choice?.finish_reason) answer.finish = choice.finish_reason;
      if (event.usage) answer.usage = event.usage;
      if (event.timings) answer.timings = event.timings;
    }
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
    answer.finish ??= "stopped";
  }
  over = true;
  follow(() => {
    body.classList.remove("writing");
    thinking.textContent = answer.thinking;
    render(body, answer.text);
    const words = [];
    if (answer.timings?.predicted_per_second) words.push(`${answer.timings.predicted_per_second.toFixed(1)} tokens/s`);
    if (answer.usage) words.push(`${answer.usage.completion_tokens} tokens`);
    words.push(megabytes(model.meta.bytes));
    if (answer.finish === "length") words.push("cut at its longest");
    if (answer.finish === "stopped") words.push("stopped");
    if (!answer.text && !answer.thinking) words.push("an empty answer");
    figures.textContent = words.join(" · ");
  });
}

async function answer(turn, place) {
  stopping = new AbortController();
  busy(true);
  say("");
  place.replaceChildren();
  turn.answers = {};
  await Promise.all(models.map((model) => answerWith(model, turn, place, stopping.signal)));
  stopping = null;
  busy(false);
  offerAgain(turn, place);
}

/** A way to have the last answer made anew. */
function offerAgain(turn, place) {
  document.querySelectorAll(".again").forEach((button) => button.remove());
  const again = element("button", "again", "Regenerate");
  again.type = "button";
  again.addEventListener("click", () => {
    again.remove();
    answer(turn, place);
  });
  place.lastElementChild?.querySelector(".figures")?.append(again);
}

function busy(is) {
  $("chat").setAttribute("aria-busy", String(is));
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("prune").disabled = is && $("prune-state").textContent.includes("…");
}

async function send(event) {
  event?.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || stopping) return;
  $("prompt").value = "";
  grow();
  const turn = { user: text, answers: {} };
  turns.push(turn);
  $("chat").querySelector(".empty")?.remove();
  const place = element("div", "answers");
  $("chat").append(element("section", "turn", element("p", "user", text)), place);
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
  await answer(turn, place);
  $("prompt").focus();
}

function newChat() {
  stopping?.abort();
  turns = [];
  say("");
  $("chat").replaceChildren(element("p", "empty", "Ask something."));
  $("prompt").focus();
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

// ---- what the reader does ----

$("form").addEventListener("submit", send);
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stopping?.abort();
});
$("stop").addEventListener("click", () => stopping?.abort());
$("new-chat").addEventListener("click", newChat);
$("open-settings").addEventListener("click", () => showSettings($("settings").hidden));
$("reset-settings").addEventListener("click", () => {
  for (const input of fields()) {
    delete input.dataset.set;
    if (input.type === "number") input.value = "";
    showValue(input);
  }
  keepSettings();
});
for (const input of fields()) {
  input.addEventListener("input", () => {
    input.dataset.set = "1";
    showValue(input);
    keepSettings();
  });
}
$("system").addEventListener("input", keepSettings);
$("key").addEventListener("change", () => {
  keepSettings();
  say("");
  loadModels().catch((error) => say(error.message));
});
$("ratio").addEventListener("input", showRatio);
$("prune").addEventListener("click", prune);

loadSettings();
newChat();
loadModels().catch((error) => say(error.message));
