// Talk to /v1/chat/completions: text streams in, images go out as data URLs, nothing else is loaded.
"use strict";

const at = (id) => document.getElementById(id);
let messages = []; // what the server is sent: {role, content}
let images = []; // data URLs that wait to be sent
let running = null; // the AbortController of the answer under way
let model = null;

function headers() {
  const key = at("key").value;
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

async function findModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await problemOf(response));
    model = (await response.json()).data[0].id;
    at("model").textContent = document.title = model;
    at("status").textContent = "";
  } catch (error) {
    at("status").textContent = error.message;
  }
}

async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// ------------------------------------------------------------------------------------ the dialogue

function show(role, text, pictures = []) {
  const article = document.createElement("article");
  article.className = role;
  const name = document.createElement("h2");
  name.textContent = { user: "You", assistant: model ?? "Model", wrong: "Error" }[role];
  const body = document.createElement("div");
  for (const url of pictures) {
    const picture = document.createElement("img");
    picture.src = url;
    picture.alt = "an image that you sent";
    body.append(picture);
  }
  const words = document.createElement("p");
  words.textContent = text;
  const footer = document.createElement("footer");
  body.append(words);
  article.append(name, body, footer);
  at("log").append(article);
  article.scrollIntoView({ block: "end" });
  return { article, words, footer };
}

function settings() {
  const chosen = {};
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if (at(name).value !== "") chosen[name] = Number(at(name).value);
  }
  chosen.seed ??= Math.floor(Math.random() * 2 ** 31);
  return chosen;
}

function dialogue() {
  const system = at("system").value;
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

async function send() {
  const text = at("text").value;
  if (running || (!text.trim() && !images.length)) return;
  if (model === null) await findModel();
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  const content = parts.length ? [...parts, { type: "text", text }] : text;
  messages.push({ role: "user", content });
  show("user", text, images);
  at("text").value = "";
  images = [];
  drawImages();
  fitHeight();
  await answer();
}

async function answer() {
  const talk = messages; // "New chat" begins another while this answer may still run
  const control = running = new AbortController();
  setRunning(true);
  const place = show("assistant", "");
  let text = "";
  const began = performance.now();
  let first = null;
  let usage = null;
  let reason = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: control.signal,
      body: JSON.stringify({
        model, messages: dialogue(), ...settings(),
        stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
      }),
    });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const event of eventsOf(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      if (!choice.delta.content) continue;
      first ??= performance.now();
      text += choice.delta.content;
      const log = at("log");
      const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      place.words.textContent = text;
      if (follows) log.scrollTop = log.scrollHeight;
      place.footer.textContent = speed(usage, first);
    }
  } catch (error) {
    reason = "stopped";
    if (error.name !== "AbortError") {
      if (!text) {
        talk.pop(); // the question was not answered; it may be asked again
        place.article.remove();
      }
      show("wrong", error.message);
    }
  }
  const waited = first === null ? "" : `first after ${((first - began) / 1000).toFixed(2)} s`;
  const end = { length: "cut at the most new tokens", stopped: "stopped" }[reason] ?? "";
  place.footer.textContent = [speed(usage, first), waited, end].filter(Boolean).join(" · ");
  if (text) talk.push({ role: "assistant", content: text });
  if (running === control) {
    running = null;
    setRunning(false);
  }
}

function speed(usage, first) {
  const tokens = usage?.completion_tokens ?? 0;
  if (!tokens || first === null) return "";
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? ` · ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  return `${tokens} tokens${rate}`;
}

// Server-sent events: lines "data: JSON", an empty line after each, "[DONE]" at the end.
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (waiting + value).split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      if (event.startsWith("data: ")) yield JSON.parse(data);
    }
  }
}

function setRunning(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
  at("status").textContent = is ? "answering" : "";
  (is ? at("stop") : at("text")).focus();
}

// -------------------------------------------------------------------------------------- images

function addImages(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.onload = () => {
      images.push(reader.result);
      drawImages();
    };
    reader.readAsDataURL(file);
  }
}

function drawImages() {
  at("images").replaceChildren(...images.map((url, place) => {
    const item = document.createElement("li");
    const picture = document.createElement("img");
    picture.src = url;
    picture.alt = `image ${place + 1} to send`;
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `remove image ${place + 1}`);
    remove.onclick = () => {
      images.splice(place, 1);
      drawImages();
      at("text").focus();
    };
    item.append(picture, remove);
    return item;
  }));
}

// -------------------------------------------------------------------------------------- events

function fitHeight() {
  at("text").style.height = "auto";
  at("text").style.height = `${at("text").scrollHeight + 2}px`;
}

at("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("text").addEventListener("input", fitHeight);
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => {
  running?.abort();
  running = null;
  setRunning(false);
  messages = [];
  at("log").replaceChildren();
  at("text").focus();
});
at("show-settings").addEventListener("click", () => {
  const panel = at("settings");
  panel.hidden = !panel.hidden;
  at("show-settings").setAttribute("aria-expanded", String(!panel.hidden));
});
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("key").addEventListener("change", findModel);
at("file").addEventListener("change", (event) => {
  addImages(event.target.files);
  event.target.value = "";
});
document.querySelector(".attach").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    at("file").click();
  }
});
document.addEventListener("paste", (event) => addImages(event.clipboardData.files));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("compose").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") addImages(event.dataTransfer.files);
  });
}
findModel();
