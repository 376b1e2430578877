// The dashboard of a chanflow task service: one page that talks to the HTTP API it is served beside.
//
// Invariants:
// 1. Whatever came from the server enters the page as text (`textContent`, `value`), never as markup.
// 2. Every URL is relative, since the service may be mounted below a prefix.
// 3. What has the focus keeps it: rows are found again by key and updated in place, the task's row in use is not
//    removed, and what is hidden hands the focus on.
// 4. Without a token that the server takes, nothing but the login form shows.
"use strict";

const PAGE_SIZE = 50;
const POLL_SECONDS = 5; // For what the snapshots don't tell: older rows, dead letters.
const CHART_SECONDS = 120;
const GAP_SECONDS = 3.5; // Snapshots come each second: after a longer pause the line of a chart is broken.
const SILENT_SECONDS = 30; // A stream that is silent for so long is dead, whatever the socket says.
const FIRST_DELAY = 0.5;
const LAST_DELAY = 10;
const CELL_CHARACTERS = 200;
const TEXT_CHARACTERS = 20_000;
const TOKEN_KEY = `chanflow token ${location.pathname}`; // By path: two services may share an origin.
const ENDS = ["success", "failed", "cancelled"];

const $ = (id) => document.getElementById(id);

// --- Text and nodes -------------------------------------------------------------------------------------------------

function cut(text, limit = CELL_CHARACTERS) {
  // A pair of surrogates that is cut in two would show as a broken character.
  return text.length > limit ? `${text.slice(0, limit).replace(/[\ud800-\udbff]$/, "")}…` : text;
}

function setText(node, text) {
  // Setting the same text again would drop the user's selection, and have it read aloud again.
  if (node.textContent !== text) node.textContent = text;
}

/** Hide or show a node; one that is hidden while it has the focus gives it to `next`. */
function setHidden(node, hidden, next) {
  const focused = node.contains(document.activeElement);
  node.hidden = hidden;
  if (focused && hidden) next.focus();
}

const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
const clone = (template) => $(template).content.firstElementChild.cloneNode(true);

/** Make the children of `parent` those of `items`, in order; one that stays is the same node, updated in place. */
function reconcile(parent, items, { attribute, key, create, update }) {
  const wanted = new Map(items.map((item) => [String(key(item)), item]));
  const present = new Map();
  // First those that go: otherwise all that follow a gap would be moved, and moving a node takes its focus.
  for (const node of [...parent.children]) {
    if (wanted.has(node.dataset[attribute])) present.set(node.dataset[attribute], node);
    else node.remove();
  }
  let place = parent.firstElementChild;
  for (const [id, item] of wanted) {
    const node = present.get(id) ?? create(item);
    node.dataset[attribute] = id;
    update(node, item);
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
  }
}

/** Show a text that may be huge: its beginning, and the rest when asked for. */
function setLongText(box, text, label) {
  if (box.shownText === text) return;
  box.shownText = text;
  const pre = make("pre", { textContent: cut(text, TEXT_CHARACTERS), tabIndex: 0, dir: "auto" });
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", label);
  box.replaceChildren(pre);
  if (text.length <= TEXT_CHARACTERS) return;
  const button = make("button", { type: "button", className: "show-all" });
  setText(button, `Show all ${text.length.toLocaleString()} characters`);
  button.addEventListener("click", () => {
    pre.textContent = text;
    button.remove();
    pre.focus();
  });
  box.append(button);
}

const pretty = (value) => JSON.stringify(value, null, 2);

/** Parse JSON; integers that a double can't hold keep their digits, in browsers that can do it. */
function parse(text) {
  return JSON.parse(text, (_, value, context) =>
    typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source)
      ? JSON.rawJSON(context.source)
      : value,
  );
}

// --- Units ----------------------------------------------------------------------------------------------------------

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 0.001) return `${Math.max(0, Math.round(seconds * 1e6))} µs`;
  if (seconds < 0.9995) return `${(seconds * 1e3).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  if (seconds < 59.95) return `${seconds.toFixed(seconds < 9.995 ? 2 : 1)} s`;
  const whole = Math.round(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${whole % 60} s`;
}

function rate(perSecond) {
  return `${perSecond.toLocaleString(undefined, { maximumFractionDigits: perSecond < 10 ? 1 : 0 })}/s`;
}

function localTime(iso) {
  const time = new Date(iso);
  if (Number.isNaN(time.getTime())) return "–";
  const today = time.toDateString() === new Date().toDateString();
  const precise = today ? { second: "2-digit" } : { month: "short", day: "numeric" };
  return time.toLocaleString(undefined, { ...precise, hour: "2-digit", minute: "2-digit" });
}

function setTime(node, iso) {
  setText(node, iso ? localTime(iso) : "–");
  node.dateTime = iso ?? "";
  node.title = iso ?? "";
}

/** Fill what has a `data-field` below `root` with the values of those names. */
function fill(root, values, limit) {
  for (const node of root.querySelectorAll("[data-field]")) {
    const value = values[node.dataset.field];
    if (node.tagName === "TIME") setTime(node, value);
    else setText(node, typeof value === "number" ? value.toLocaleString() : cut(String(value ?? "–"), limit));
  }
}

let clockOffset = 0; // Of the server's clock, in milliseconds: how long a task has run is told by the server's clock.

function runSeconds(record) {
  if (!record.started_at) return NaN;
  const end = record.finished_at ? Date.parse(record.finished_at) : Date.now() + clockOffset;
  if (!record.finished_at && record.status !== "running") return NaN;
  return Math.max(0, (end - Date.parse(record.started_at)) / 1000);
}

function setProgress(bar, progress) {
  const { done, total } = progress ?? {};
  if (Number.isFinite(done) && total > 0 && Number.isFinite(total)) {
    bar.max = total;
    bar.value = Math.min(Math.max(done, 0), total);
    return `${Math.floor(bar.position * 100)}%`;
  }
  bar.removeAttribute("value");
  return "";
}

// --- Requests -------------------------------------------------------------------------------------------------------

class Problem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Fetch a path of the API; raise a `Problem` with the server's words for anything but success. */
async function request(path, { method = "GET", headers = {}, body, signal } = {}) {
  const token = sessionStorage.getItem(TOKEN_KEY);
  const sent = token ? { ...headers, Authorization: `Bearer ${token}` } : headers;
  let response;
  try {
    response = await fetch(path, { method, headers: sent, body, signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem(0, "The server can't be reached.");
  }
  if (response.ok) return response;
  const problem = (await response.json().catch(() => null)) ?? {};
  // A request that began before the last login has nothing to say about the token of now.
  if (response.status === 401 && token === sessionStorage.getItem(TOKEN_KEY)) {
    showLogin(token ? "The server doesn't accept this token." : "");
  }
  const words = [problem.title ?? `Error ${response.status}`, problem.detail].filter(Boolean).join(": ");
  const after = response.headers.get("Retry-After");
  throw new Problem(response.status, cut(words, 2000) + (after ? ` Try again in ${after} s.` : ""));
}

const getJson = async (path, options) => parse(await (await request(path, options)).text());

const sendJson = (path, method, body) =>
  getJson(path, { method, body, headers: body === undefined ? {} : { "Content-Type": "application/json" } });

/** The events of a response, in the format of server-sent events; `onBytes` is called whenever anything arrives. */
async function* eventsOf(response, onBytes) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    onBytes();
    buffer += decoder.decode(value, { stream: true }).replace(/\r/g, ""); // JSON holds no raw carriage return.
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield parse(lines.map((line) => line.slice(5)).join("\n"));
    }
  }
}

/** Follow an event stream until `onEvent` returns true or the signal aborts, connecting again with a growing delay. */
async function follow(path, signal, { onOpen = () => {}, onEvent, onLost = () => {}, onRefused = () => {} }) {
  let delay = FIRST_DELAY;
  while (!signal.aborted) {
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    let silence = setTimeout(stop, SILENT_SECONDS * 1000);
    signal.addEventListener("abort", stop);
    try {
      const response = await request(path, { signal: attempt.signal, headers: { Accept: "text/event-stream" } });
      onOpen();
      const onBytes = () => {
        clearTimeout(silence);
        silence = setTimeout(stop, SILENT_SECONDS * 1000);
      };
      for await (const event of eventsOf(response, onBytes)) {
        delay = FIRST_DELAY;
        if (signal.aborted || onEvent(event)) return;
      }
    } catch (error) {
      if ([401, 403, 404].includes(error.status)) return onRefused(error);
      if (!(error instanceof Problem) && !attempt.signal.aborted) console.error(error); // Maybe a fault of this page.
    } finally {
      clearTimeout(silence);
      signal.removeEventListener("abort", stop);
      stop();
    }
    if (signal.aborted) return;
    onLost();
    await new Promise((resolve) => setTimeout(resolve, delay * 1000));
    delay = Math.min(delay * 2, LAST_DELAY);
  }
}

/** Do the work of a button once at a time, with its outcome told in `output`. */
async function perform(button, output, work) {
  // Not `disabled`, which would take the focus from the button.
  if (button.getAttribute("aria-busy") === "true") return;
  button.setAttribute("aria-busy", "true");
  const say = (text, failed) => {
    setText(output, text ?? "");
    output.classList.toggle("error", failed);
  };
  try {
    say("", false);
    say(await work(), false);
  } catch (error) {
    say(error.message, true);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

// --- Session --------------------------------------------------------------------------------------------------------

let session = new AbortController();

function start() {
  session.abort();
  session = new AbortController();
  const { signal } = session;
  setText($("starting"), "Connecting…");
  $("starting").hidden = !($("app").hidden && $("login-page").hidden);
  follow("events", signal, {
    onOpen() {
      $("starting").hidden = true;
      $("login-page").hidden = true;
      $("app").hidden = false;
      $("logout").hidden = sessionStorage.getItem(TOKEN_KEY) === null;
      loadHandlers();
      poll();
    },
    onEvent: showSnapshot,
    onRefused(error) {
      if (error.status === 403) showLogin(error.message); // A token that may not look.
    },
    onLost() {
      setText($("starting"), "The server can't be reached. Trying again…");
      $("starting").hidden = !$("app").hidden;
      setConnection("reconnecting");
    },
  });
  const timer = setInterval(poll, POLL_SECONDS * 1000);
  signal.addEventListener("abort", () => clearInterval(timer));
}

function poll() {
  if (document.hidden || $("app").hidden) return;
  loadTasks();
  loadDeadLetters();
}

function showLogin(message) {
  session.abort();
  $("details").close();
  sessionStorage.removeItem(TOKEN_KEY);
  $("starting").hidden = true;
  $("app").hidden = true;
  $("login-page").hidden = false;
  setText($("login-message"), message);
  $("token").value = "";
  $("token").focus();
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  // A header can't carry other characters, so that no server has such a token.
  if (!/^[\x21-\x7e]+$/.test(token)) return showLogin("The server doesn't accept this token.");
  sessionStorage.setItem(TOKEN_KEY, token);
  start();
});

$("logout").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN_KEY);
  location.reload(); // What was shown leaves the memory too.
});

document.addEventListener("visibilitychange", poll);

// --- Live figures ---------------------------------------------------------------------------------------------------

function setConnection(state) {
  $("connection").dataset.state = state;
  setText($("connection"), state);
}

function showSnapshot(snapshot) {
  clockOffset = Date.parse(snapshot.at) - Date.now();
  setConnection(snapshot.draining ? "draining" : "live");
  const { busy, total } = snapshot.workers;
  setText($("workers"), `${busy} of ${total}`);
  setProgress($("workers-bar"), { done: busy, total });
  let all = 0;
  for (const [status, count] of Object.entries(snapshot.counts)) {
    all += count;
    setText($(`count-${status}`), count.toLocaleString());
  }
  setText($("count-all"), all.toLocaleString());
  const point = { time: Date.parse(snapshot.at) / 1000, throughput: snapshot.throughput, ...snapshot.latency };
  throughputChart.add(point);
  latencyChart.add(point);
  reconcile($("queues"), snapshot.queues, {
    attribute: "name",
    key: ({ name }) => name,
    create: () => clone("queue-row"),
    update(row, queue) {
      fill(row, queue);
      row.firstElementChild.title = cut(queue.name);
    },
  });
  if (page.after === null) mergeTasks(snapshot.recent);
  else showTasks();
  if (details.record) showDetails(details.record); // The time that it has run goes on.
}

/** A line chart of the last two minutes; its legend tells the values of now, or of the time under the pointer. */
class Chart {
  // SVG rather than canvas: it is sharp at any resolution, and takes new colours when the theme changes, by itself.
  constructor(figure, format) {
    Object.assign(this, { figure, format, points: [], pointedAt: null });
    this.svg = figure.querySelector("svg");
    this.series = [...figure.querySelectorAll(".key")].map(({ dataset }) => dataset);
    this.svg.addEventListener("pointermove", ({ clientX }) => {
      const { left, width } = this.svg.getBoundingClientRect();
      this.pointedAt = ((clientX - left) / width) * CHART_SECONDS;
      this.draw();
    });
    this.svg.addEventListener("pointerleave", () => {
      this.pointedAt = null;
      this.draw();
    });
  }

  add(point) {
    this.points.push(point);
    this.points = this.points.filter(({ time }) => time >= point.time - CHART_SECONDS && time <= point.time);
    this.draw();
  }

  draw() {
    const last = this.points[this.points.length - 1];
    if (!last) return;
    const x = ({ time }) => CHART_SECONDS - (last.time - time);
    const distance = (point) => Math.abs(x(point) - this.pointedAt);
    const shown = this.pointedAt === null ? last : this.points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const top = niceCeiling(Math.max(...this.points.flatMap((point) => this.series.map(({ key }) => point[key]))));
    const words = (point, key) => (point[key] === null ? "–" : this.format(point[key]));
    const find = (selector) => this.figure.querySelector(selector);
    for (const { key } of this.series) {
      find(`.line.${key}`).setAttribute("d", this.line(key, x, top));
      setText(find(`.key.${key} .number`), words(shown, key));
    }
    setText(find(".top"), this.format(top));
    setText(find(".when"), shown === last ? "now" : `${Math.round(last.time - shown.time)} s ago`);
    find(".cursor").setAttribute("d", this.pointedAt === null ? "" : `M${x(shown)} 0V100`);
    const current = this.series.map(({ key, label }) => `${label} ${words(last, key)}`).join(", ");
    this.svg.setAttribute("aria-label", `${find("h3").textContent} over the last 2 minutes. Now: ${current}.`);
  }

  line(key, x, top) {
    let path = "";
    let before = null;
    for (const point of this.points.filter((each) => each[key] !== null)) {
      const joined = before && point.time - before.time < GAP_SECONDS;
      path += `${joined ? "L" : "M"}${x(point).toFixed(2)} ${(100 - (point[key] / top) * 100).toFixed(2)}`;
      if (!joined) path += "h0.01"; // So that a lone point is seen.
      before = point;
    }
    return path;
  }
}

function niceCeiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value) * power;
}

const throughputChart = new Chart($("throughput-chart"), rate);
const latencyChart = new Chart($("latency-chart"), duration);

// --- Submit ---------------------------------------------------------------------------------------------------------

let handlers = [];

async function loadHandlers() {
  try {
    const loaded = (await getJson("handlers")).handlers;
    if (pretty(loaded) === pretty(handlers)) return;
    handlers = loaded;
  } catch {
    return; // The next connection tries again.
  }
  const option = ({ name }) => make("option", { value: name, textContent: cut(name, 80), dir: "auto" });
  const [chosen, filter] = [$("submit-name").value, $("name-filter").value];
  $("submit-name").replaceChildren(...handlers.map(option));
  $("name-filter").replaceChildren($("name-filter").options[0], ...handlers.map(option));
  $("name-filter").value = handlers.some(({ name }) => name === filter) ? filter : "";
  if (handlers.some(({ name }) => name === chosen)) $("submit-name").value = chosen;
  else prefill();
}

/** A value to begin from, for a JSON schema: what is required, each with a value of its type. */
function example(schema, root, depth = 0) {
  if (depth > 8 || schema === null || typeof schema !== "object") return null;
  if (typeof schema.$ref === "string") {
    const steps = schema.$ref.startsWith("#/") ? schema.$ref.slice(2).split("/") : [];
    const names = steps.map((step) => decodeURIComponent(step).replace(/~1/g, "/").replace(/~0/g, "~"));
    return example(steps.length ? names.reduce((node, name) => node?.[name], root) : null, root, depth + 1);
  }
  if ("default" in schema) return schema.default;
  if ("const" in schema) return schema.const;
  if (schema.examples?.length) return schema.examples[0];
  if (schema.enum?.length) return schema.enum[0];
  const choices = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (choices?.length) return example(choices[0], root, depth + 1);
  const type = Array.isArray(schema.type) ? schema.type[0] : schema.type;
  if (type === "object") {
    const filled = (name) => [name, example(schema.properties?.[name], root, depth + 1)];
    return Object.fromEntries((schema.required ?? []).map(filled));
  }
  const empty = { string: "", integer: schema.minimum ?? 0, number: schema.minimum ?? 0, boolean: false, array: [] };
  return empty[type] ?? null;
}

function prefill() {
  const handler = handlers.find(({ name }) => name === $("submit-name").value);
  const schema = handler?.arguments ?? {};
  setText($("submit-description"), cut(handler?.description ?? "", 1000));
  setText($("submit-schema"), cut(pretty(schema), TEXT_CHARACTERS));
  $("submit-arguments").value = pretty(example({ type: "object", ...schema }, schema) ?? {});
  setText($("submit-message"), "");
}

$("submit-name").addEventListener("change", prefill);

$("submit-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("submit-arguments").value.trim() || "{}";
  perform($("submit-button"), $("submit-message"), async () => {
    try {
      JSON.parse(text);
    } catch (error) {
      throw new Problem(0, `The arguments are not JSON: ${error.message}`);
    }
    // The text as it was written: parsed and printed again, a large integer would be another number.
    const { task_id } = await sendJson(`tasks/${encodeURIComponent($("submit-name").value)}`, "POST", text);
    loadTasks();
    await openTask(task_id);
    return `Submitted ${task_id}.`;
  });
});

// --- Tasks ----------------------------------------------------------------------------------------------------------

// What the table shows: `records` are newest first; `after` is the cursor of this page, null on the first one.
const page = { status: "", after: null, next: null, records: [], loading: new AbortController() };

const handlerFilter = () => {
  const words = $("search").value.trim();
  return $("name-filter").value || (handlers.some(({ name }) => name === words) ? words : "");
};

/** The row that must stay although its task is no longer asked for: it has the focus, or its details are open. */
function rowInUse() {
  return details.record?.id ?? document.activeElement?.closest("#tasks tr")?.dataset.taskId;
}

function mergeTasks(records) {
  const inUse = rowInUse();
  const name = handlerFilter();
  const asked = (record) => (!page.status || record.status === page.status) && (!name || record.name === name);
  const merged = new Set(records.map(({ id }) => id));
  page.records = [...records, ...page.records.filter(({ id }) => !merged.has(id))]
    .filter((record) => asked(record) || (record.id === inUse && page.records.some(({ id }) => id === inUse)))
    .sort((a, b) => Date.parse(b.created_at) - Date.parse(a.created_at));
  const over = page.records.slice(PAGE_SIZE);
  if (over.length) {
    page.records = [...page.records.slice(0, PAGE_SIZE), ...over.filter(({ id }) => id === inUse)];
    page.next = page.records[PAGE_SIZE - 1].id; // Those pushed off are the first of the next page.
  }
  showTasks();
}

async function loadTasks() {
  page.loading.abort();
  const { signal } = (page.loading = new AbortController());
  const query = new URLSearchParams({ limit: PAGE_SIZE });
  if (page.status) query.set("status", page.status);
  if (handlerFilter()) query.set("name", handlerFilter());
  if (page.after) query.set("after", page.after);
  try {
    const { tasks, next } = await getJson(`tasks?${query}`, { signal });
    if (signal.aborted) return;
    const inUse = rowInUse();
    page.records = page.records.filter(({ id }) => id === inUse);
    page.next = next;
    page.problem = "";
    mergeTasks(tasks);
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 410) return showPage(null); // Where this page begins is gone.
    page.problem = error.message;
    showTasks();
  }
}

function showPage(after) {
  page.after = after;
  page.records = [];
  loadTasks();
}

function showTasks() {
  const words = $("search").value.trim().toLowerCase();
  const inUse = rowInUse();
  const found = page.records.filter(
    ({ id, name, error_message }) =>
      id === inUse || !words || [name, id, error_message ?? ""].some((text) => text.toLowerCase().includes(words)),
  );
  reconcile($("tasks"), found, { attribute: "taskId", key: ({ id }) => id, create: createRow, update: updateRow });
  const none = found.length ? "" : "No tasks to show.";
  const some = words && found.length ? `${found.length} of the ${page.records.length} on this page.` : none;
  setText($("tasks-note"), page.problem || some);
  setHidden($("newest"), page.after === null, $("tasks-heading"));
  setHidden($("older"), page.next === null, $("tasks-heading"));
}

function createRow({ id, name }) {
  const row = clone("task-row");
  const open = row.querySelector("button");
  setText(open, id.slice(0, 8));
  open.title = id;
  open.setAttribute("aria-label", `${id.slice(0, 8)}, open ${cut(name, 80)}`);
  return row;
}

function updateRow(row, record) {
  row.dataset.status = record.status;
  setStatus(row.querySelector(".status"), record);
  fill(row, record);
  setText(row.querySelector(".col-time"), duration(runSeconds(record)));
  const bar = row.querySelector("progress");
  bar.hidden = record.status !== "running" || !record.progress;
  const percent = setProgress(bar, record.progress);
  const failed = record.error_type ?? record.error_message;
  const error = failed ? [record.error_type, record.error_message].filter(Boolean).join(": ") : "";
  setText(row.querySelector(".col-note bdi"), bar.hidden ? cut(error) : cut(`${percent} ${record.progress.message}`));
}

function setStatus(node, record) {
  node.dataset.status = record.status;
  const asked = record.cancel_requested && !ENDS.includes(record.status);
  setText(node, asked ? `${record.status}, to be cancelled` : record.status);
}

$("tasks").addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  if (getSelection().isCollapsed || event.target.closest("button")) openTask(row.dataset.taskId);
});

$("status-filter").addEventListener("click", (event) => {
  const chosen = event.target.closest("button");
  if (!chosen) return;
  for (const button of $("status-filter").children) button.setAttribute("aria-pressed", String(button === chosen));
  page.status = chosen.dataset.status;
  showPage(null);
});

$("name-filter").addEventListener("change", () => showPage(null));
$("older").addEventListener("click", () => showPage(page.next));
$("newest").addEventListener("click", () => showPage(null));

let searchedName = "";

$("search").addEventListener("input", () => {
  const words = $("search").value.trim();
  if (/^[0-9a-f]{32}$/.test(words)) openTask(words);
  if (handlerFilter() === searchedName) return showTasks();
  searchedName = handlerFilter();
  showPage(null);
});

// --- Details --------------------------------------------------------------------------------------------------------

const details = { record: null, opening: new AbortController() };

/** Open the details of a task, and follow it until its end. */
async function openTask(id) {
  details.opening.abort();
  const { signal } = (details.opening = new AbortController());
  try {
    const record = await getJson(`tasks/${id}`, { signal });
    if (signal.aborted) return;
    setText($("message"), "");
    setText($("details-message"), "");
    showDetails(record);
    if (!$("details").open) $("details").showModal();
    $("details-heading").focus(); // Not a button: an Enter typed after the id in the search box would press it.
    followTask(id, signal);
  } catch (error) {
    if (!signal.aborted) setText($("message"), `${id}: ${error.message}`);
  }
}

function followTask(id, signal) {
  if (ENDS.includes(details.record.status)) return;
  follow(`tasks/${id}/events`, signal, {
    onEvent(record) {
      showDetails(record);
      return ENDS.includes(record.status);
    },
  });
}

function showDetails(record) {
  details.record = record;
  const { status, progress } = record;
  setText($("details-name"), cut(record.name));
  setStatus($("details-status"), record);
  $("details-progress-block").hidden = !progress;
  const percent = setProgress($("details-progress"), progress);
  setText($("details-progress-text"), progress ? `${percent} (${progress.done} of ${progress.total})` : "");
  setText($("details-progress-message"), cut(progress?.message ?? "", 1000));
  const error = [record.error_type, record.error_message].filter((part) => part !== null).join(": ");
  $("details-error-block").hidden = !error;
  setLongText($("details-error"), error, "Error");
  setLongText($("details-result"), pretty(record.result), "Result");
  setLongText($("details-arguments"), pretty(record.arguments), "Arguments");
  setHidden($("details-cancel"), ENDS.includes(status) || record.cancel_requested, $("details-heading"));
  setHidden($("details-retry"), status !== "failed" && status !== "cancelled", $("details-heading"));
  fill($("details-fields"), { ...record, duration: duration(runSeconds(record)) }, 1000);
}

async function changeTask(button, path, method) {
  const { id } = details.record;
  await perform(button, $("details-message"), async () => {
    const record = await sendJson(path, method);
    if (details.record?.id !== id) return;
    showDetails(record);
    details.opening.abort();
    followTask(id, (details.opening = new AbortController()).signal);
    loadTasks();
  });
}

$("details-cancel").addEventListener("click", () =>
  changeTask($("details-cancel"), `tasks/${details.record.id}`, "DELETE"),
);
$("details-retry").addEventListener("click", () =>
  changeTask($("details-retry"), `tasks/${details.record.id}/retry`, "POST"),
);
$("details-close").addEventListener("click", () => $("details").close());
$("details").addEventListener("click", (event) => {
  if (event.target === $("details")) $("details").close(); // The backdrop.
});
$("details").addEventListener("close", () => {
  // The browser gives the focus back to where it was, unless that was a click into a row.
  const row = [...$("tasks").children].find((node) => node.dataset.taskId === details.record?.id);
  details.opening.abort();
  details.record = null;
  if (document.activeElement === document.body) (row?.querySelector("button") ?? $("search")).focus();
});

// --- Dead letters ---------------------------------------------------------------------------------------------------

async function loadDeadLetters() {
  const { topics } = await getJson("dead-letters", { signal: session.signal }).catch(() => ({ topics: null }));
  if (!topics) return; // Shown is what was known; the connection's state tells of the trouble.
  setHidden($("dead-letters"), !topics.length, $("tasks-heading"));
  const key = ({ topic }) => topic;
  reconcile($("topics"), topics, { attribute: "topic", key, create: createTopic, update: updateTopic });
}

function createTopic({ topic }) {
  const section = clone("topic");
  const all = section.querySelector(".replay-all");
  section.querySelector(".scroll").setAttribute("aria-label", `Dead letters of ${cut(topic, 80)}`);
  all.setAttribute("aria-label", `Replay all of ${cut(topic, 80)}`);
  all.addEventListener("click", () => replay(all, topic, {}));
  return section;
}

function updateTopic(section, { topic, messages }) {
  fill(section.querySelector("h3"), { topic, count: messages.length });
  section.querySelector(".replay-all").hidden = !messages.length;
  reconcile(section.querySelector("tbody"), messages, {
    attribute: "messageId",
    key: ({ id }) => id,
    create: (message) => createMessage(topic, message),
    update: () => {}, // A dead letter doesn't change.
  });
}

function createMessage(topic, message) {
  const row = clone("dead-letter");
  fill(row, message);
  const show = () => setLongText(row.querySelector(".whole"), pretty(message), "The whole message");
  row.querySelector("details").addEventListener("toggle", show);
  const one = row.querySelector("button");
  one.setAttribute("aria-label", `Replay ${cut(String(message.id), 80)}`);
  one.addEventListener("click", () => replay(one, topic, { ids: [message.id] }));
  return row;
}

async function replay(button, topic, body) {
  await perform(button, $("dead-letters-message"), async () => {
    const path = `dead-letters/${encodeURIComponent(topic)}/replay`;
    const { replayed } = await sendJson(path, "POST", JSON.stringify(body));
    $("dead-letters-heading").focus(); // The button goes away with its row.
    await loadDeadLetters();
    return `Replayed ${replayed}.`;
  });
}

start();
