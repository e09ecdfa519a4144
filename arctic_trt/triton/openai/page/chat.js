// The conversation, its answers as they stream in, and nothing from elsewhere. Text of a model only ever becomes text nodes.

const at = (id) => document.getElementById(id);
const chat = at("chat"), empty = at("empty"), ask = at("ask"), text = at("text"), send = at("send"), stop = at("stop");
const settings = at("settings");
const STORE = "arctic-trt-chat", NEAR_END_PX = 48;

let turns = []; // {role, content, facts?, failure?}
let running = null; // the AbortController of the answer under way
let model = "";

// ---- what is kept in this tab ----

function save() {
  const values = Object.fromEntries(new FormData(settings));
  sessionStorage.setItem(STORE, JSON.stringify({ turns, values }));
}

function restore() {
  const kept = JSON.parse(sessionStorage.getItem(STORE) || "{}");
  turns = kept.turns || [];
  for (const [name, value] of Object.entries(kept.values || {})) settings.elements[name].value = value;
  for (const turn of turns) show(turn);
}

// ---- drawing ----

function node(tag, className, content = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = content;
  return made;
}

function button(label, onclick) {
  const made = node("button", "", label);
  made.type = "button";
  made.onclick = onclick;
  return made;
}

/** Draw a turn; the returned function draws it again after a change. */
function show(turn) {
  empty.hidden = true;
  const article = node("article", `turn ${turn.role}`);
  chat.append(article);
  if (turn.role === "user") {
    article.textContent = turn.content;
    return () => {};
  }
  const body = node("div", "body"), failure = node("p", "failure"), facts = node("div", "facts"), figures = node("span", "");
  const copy = button("Copy", () => copyText(turn.content, copy));
  const again = button("Try again", () => retry(turn, article));
  failure.setAttribute("role", "alert");
  facts.append(copy, again, figures);
  article.append(body, failure, facts);
  const draw = () => {
    article.classList.toggle("running", turn === running?.turn);
    body.replaceChildren(...pieces(turn.content));
    body.hidden = !turn.content && turn !== running?.turn;
    failure.textContent = turn.failure || "";
    failure.hidden = !turn.failure;
    figures.textContent = turn.facts || "";
    copy.hidden = !turn.content || turn === running?.turn;
    again.hidden = !turn.failure;
    facts.hidden = copy.hidden && again.hidden && !turn.facts;
  };
  draw();
  return draw;
}

/** Text nodes, and a <pre> for each block between lines of three backticks; the last one may still be open. */
function pieces(content) {
  const parts = content.split(/\n*^[ \t]*```[^\n`]*(?:\n|$)/m);
  return parts.map((part, index) => (index % 2 ? node("pre", "", part) : document.createTextNode(index ? part.replace(/^\n+/, "") : part)));
}

async function copyText(content, button) {
  try {
    await navigator.clipboard.writeText(content);
    button.textContent = "Copied";
  } catch {
    button.textContent = "The browser does not allow copying here";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

/** Do something that changes heights; who reads further up is left there. */
function following(change) {
  const atEnd = chat.scrollHeight - chat.scrollTop - chat.clientHeight < NEAR_END_PX;
  change();
  if (atEnd) chat.scrollTop = chat.scrollHeight;
}

function fit() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  send.disabled = !text.value.trim();
}

function busy(is) {
  send.hidden = is;
  stop.hidden = !is;
}

// ---- asking ----

function headers() {
  const key = settings.elements.key.value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function request() {
  const { system, temperature, max_tokens } = Object.fromEntries(new FormData(settings));
  const past = turns.filter((turn) => turn.content).map(({ role, content }) => ({ role, content }));
  return {
    messages: [...(system.trim() ? [{ role: "system", content: system }] : []), ...past],
    ...(temperature && { temperature: Number(temperature) }),
    ...(max_tokens && { max_tokens: Number(max_tokens) }),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
}

/** The failure that an answer other than a stream of events tells. */
async function failureOf(response) {
  if (response.status === 401) openSettings(true);
  const body = await response.json().catch(() => ({}));
  return new Error(body.error?.message || `The server answered ${response.status} ${response.statusText}.`);
}

/** The JSON objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer broke off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

async function loadModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await failureOf(response);
  model = (await response.json()).data[0].id;
  at("model").textContent = model;
  document.title = `${model} · arctic-trt`;
}

/** Tokens a second from the first piece on, so that waiting and reading the prompt do not count. */
function figures(clock, usage) {
  const tokens = usage?.completion_tokens || 0;
  const seconds = (clock.last - clock.first) / 1000;
  const rate = (tokens - clock.tokensAtFirst) / seconds;
  return [
    `${tokens} token${tokens === 1 ? "" : "s"}`,
    ...(seconds > 0 && tokens > clock.tokensAtFirst ? [`${rate.toFixed(rate < 10 ? 2 : 1)} tokens/s`] : []),
    ...(clock.first ? [`first after ${((clock.first - clock.start) / 1000).toFixed(2)} s`] : []),
    ...(clock.end ? [clock.end] : []),
  ].join(" · ");
}

async function open(body, signal) {
  if (!model) await loadModel();
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify({ model, ...body }), signal,
  });
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function answer() {
  const turn = { role: "assistant", content: "" }, body = request();
  const mine = (running = new AbortController());
  mine.turn = turn;
  busy(true);
  turns.push(turn);
  let draw, usage = null, frame = 0;
  following(() => (draw = show(turn)));
  const clock = { start: performance.now(), first: 0, last: 0, tokensAtFirst: 0 };
  const redraw = () => { frame = 0; following(draw); };
  try {
    for await (const event of events(await open(body, mine.signal))) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      const [choice] = event.choices;
      if (choice?.delta.content) {
        clock.last = performance.now();
        if (!clock.first) [clock.first, clock.tokensAtFirst] = [clock.last, usage.completion_tokens];
        turn.content += choice.delta.content;
      }
      if (choice?.finish_reason === "length") clock.end = "ended by the limit";
      turn.facts = figures(clock, usage);
      frame ||= requestAnimationFrame(redraw);
    }
    if (!turn.content) turn.failure = "The answer is empty.";
  } catch (error) {
    if (mine.signal.aborted) turn.facts = figures({ ...clock, end: "stopped" }, usage);
    else turn.failure = error instanceof TypeError ? "The server does not answer." : error.message;
  }
  cancelAnimationFrame(frame);
  if (running === mine) running = null;
  busy(Boolean(running));
  following(draw);
  save();
  text.focus();
}

function submit() {
  const content = text.value.trim();
  if (!content || running) return;
  turns.push({ role: "user", content });
  show(turns.at(-1));
  chat.scrollTop = chat.scrollHeight;
  text.value = "";
  fit();
  answer();
}

function retry(turn, article) {
  if (running || turn !== turns.at(-1)) return;
  turns.pop();
  article.remove();
  answer();
}

// ---- what a person does ----

function openSettings(is) {
  following(() => (settings.hidden = !is));
  at("settings-toggle").setAttribute("aria-expanded", String(is));
}

ask.onsubmit = (event) => { event.preventDefault(); submit(); };
settings.onsubmit = (event) => { event.preventDefault(); openSettings(false); };
settings.onchange = save;
text.oninput = fit;
text.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
};
stop.onclick = () => running?.abort();
document.onkeydown = (event) => { if (event.key === "Escape") running?.abort(); };
at("settings-toggle").onclick = () => openSettings(settings.hidden);
at("new").onclick = () => {
  running?.abort();
  turns = [];
  for (const turn of chat.querySelectorAll(".turn")) turn.remove();
  empty.hidden = false;
  save();
  text.focus();
};

restore();
fit();
chat.scrollTop = chat.scrollHeight;
loadModel().catch((error) => {
  at("model").title = error.message;
  at("model").textContent = "arctic-trt";
});
