// The studio page plays one stream at a time. Events arrive over a WebSocket. Frames arrive over WebRTC, or as JPEGs over
// the WebSocket where WebRTC does not get through.
// There is no build step and no third-party script. Text from elsewhere is written with textContent only.

import { WhepSession, decodeJpeg, onVideoFrame, openSocket, retryDelay } from "/assets/js/index.js";

const EXAMPLES = [
  "a shiny red cube bouncing on grass at sunset, orbiting camera",
  "a big blue ring spinning on sand under the northern lights",
  "a striped orange ball floating over water on a sunny day",
  "a pink cone sliding on a checkerboard at night, with a small white cube on its left",
];

const CLOCK_RATE = 90_000;
const CHUNKS_SHOWN = 48;
const CHUNKS_AVERAGED = 8;
const MAX_DECODING = 4; // with more undecoded frames than this the browser is too slow: newer frames are skipped
const MAX_PROMPT_BYTES = 4096;
const SILENCE_MS = 3000; // WebRTC that has shown nothing for this long is replaced by JPEGs; a silent socket is checked
const MAX_RETRY_MS = 8000;
const IGNORED_SHOWN = 12; // words that the model ignores; of more the number is said
// Close codes after which no retry helps: ended, refused, failed, unknown stream. Any other is a lost connection.
const FINAL_CODES = new Set([1000, 1008, 1011, 4404]);

const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const picture = $("picture").getContext("2d", { alpha: false });
const glow = $("glow").getContext("2d");

/** The state of the stream on this page; null when there is none. */
let stream = null;

class ApiError extends Error {
  constructor(status, error) {
    super(error?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = error?.code;
  }
}

let keyDialog = null; // a promise while the dialog is open
let keyDeclined = false; // the user has closed the dialog without a key

/**
 * Ask the user for an API key and keep it for this tab. All requests that wait share one dialog.
 *
 * @param {boolean} wrong Whether the server has refused the key that was given before.
 * @returns {Promise<boolean>} Whether a key was given.
 */
function askForKey(wrong) {
  keyDialog ??= new Promise((resolve) => {
    $("key-wrong").hidden = !wrong;
    $("ask").onclose = () => {
      const key = $("ask").returnValue === "use" ? $("key").value.trim() : "";
      $("key").value = $("ask").returnValue = "";
      keyDialog = null;
      keyDeclined = !key;
      if (key) sessionStorage.setItem("key", key);
      resolve(Boolean(key));
    };
    $("ask").showModal();
  });
  return keyDialog;
}

/**
 * `fetch` with the API key, if there is one. After a 401 the user is asked for a key, and the request is repeated, until
 * the server takes the key or the user gives none. A request in the background does not ask again after that.
 */
async function send(path, { headers, background = false, ...options } = {}) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const credentials = key ? { Authorization: `Bearer ${key}` } : {};
    const response = await fetch(path, { ...options, headers: { ...headers, ...credentials } });
    if (response.status !== 401) return response;
    if (sessionStorage.getItem("key") !== key) continue; // another request has asked meanwhile
    if (key) sessionStorage.removeItem("key");
    if ((background && keyDeclined) || !(await askForKey(Boolean(key)))) return response;
  }
}

/** The token in a stream's address. It replaces the API key where headers cannot be sent. */
function tokenIn(address) {
  return new URL(address).searchParams.get("token") ?? "";
}

async function api(method, path, body, options = {}) {
  let response;
  try {
    const form = body instanceof FormData; // the browser sets its Content-Type, with the boundary
    const headers = body === undefined || form ? {} : { "Content-Type": "application/json" };
    response = await send(path, { method, headers, body: form ? body : body && JSON.stringify(body), ...options });
  } catch {
    throw new Error("The server cannot be reached.");
  }
  if (response.status === 204) return null;
  const answer = await response.json().catch(() => null);
  if (!response.ok) throw new ApiError(response.status, answer?.error);
  return answer;
}

// One stream, from Play to its end

async function play(prompt) {
  stop();
  const current = newStream();
  stream = current;
  showIgnoredWords(current, { ignored_words: null });
  logPrompt(current, { prompt, text: "starting", kind: "waiting" });
  show("starting", "Starting", "Asking the server for a stream.");
  try {
    const info = await api("POST", "/v1/streams", request(prompt, $("image").files[0]));
    if (stream !== current) return void api("DELETE", `/v1/streams/${info.id}`).catch(() => {});
    current.id = info.id;
    current.token = tokenIn(info.ws_url);
    current.queue = info.queue_position;
    current.wait = info.queue_wait_s;
    showIgnoredWords(current, info);
    setState(current, info.state);
    connect(current);
  } catch (error) {
    if (stream !== current) return;
    finish(current, "failed", error.code === "queue_full" ? "Every place is taken" : "That did not start", error.message);
    alertUser(error.message);
  }
}

/** The body that opens a stream: JSON, or a form when the video continues from a picture. */
function request(prompt, image) {
  if (!image) return { prompt };
  const form = new FormData();
  form.set("prompt", prompt);
  form.set("image", image);
  return form;
}

function newStream() {
  return {
    id: null,
    askedAt: performance.now(),
    socket: null,
    format: hasWebRtc ? "events" : "mjpeg", // what the socket carries
    session: null, // WhepSession, when frames arrive by WebRTC
    heardAt: 0, // when the session last showed a frame
    messageAt: 0, // when the socket was opened or last brought something, or the server last answered
    checking: false, // whether the server is being asked because the socket is silent
    lost: false, // the connection, which is tried again
    interrupted: false, // the engine is being restarted
    stalled: false, // the next frame is late
    ignored: null, // words of the prompt that the model ignores; null if not known
    shown: null, // { frames, at }: how far playback had come, and when
    attempts: 0,
    timer: 0,
    over: false,
    fps: 16,
    chunkFrames: 0,
    chunks: [], // { index, ms, frames, pts }
    generatedUntil: 0, // pts
    pts: -1, // of the frame on screen
    queue: null, // place
    wait: null, // seconds
    stalls: 0,
    drawn: [], // times of recent frames
    decoding: 0,
    markers: [], // { kind, chunk }
    changes: [], // prompt changes under way: { prompt, askedAt, entry, chunk }
    first: null, // log entry of the first prompt
  };
}

function connect(current) {
  current.messageAt = performance.now();
  current.socket = openSocket(`/v1/streams/${current.id}/ws`, {
    format: current.format,
    token: current.token,
    onEvent(event) {
      current.messageAt = performance.now();
      if (stream === current) onEvent(current, event);
    },
    onFrame(frame) {
      current.messageAt = performance.now();
      if (stream === current) onFrame(current, frame);
    },
    onClose(code) {
      if (stream === current && !current.over) onClose(current, code);
    },
  });
}

function onClose(current, code) {
  if (FINAL_CODES.has(code)) {
    finish(current, code === 1000 ? "ended" : "failed", "The stream is over", "Press Play to start another.");
    return;
  }
  const wait = retryDelay(current.attempts++, MAX_RETRY_MS);
  current.socket = null;
  current.lost = true;
  current.retryText = `Trying again in ${wait / 1000} s.`;
  showStatus(current);
  current.timer = setTimeout(async () => {
    const info = await ask(current).catch(() => null);
    if (stream !== current || current.over) return;
    if (info) current.token = tokenIn(info.ws_url); // the old one may have expired
    connect(current);
  }, wait);
}

/** The stream object, if the server gives it soon. */
function ask(current) {
  return api("GET", `/v1/streams/${current.id}`, undefined, { signal: AbortSignal.timeout(SILENCE_MS), background: true });
}

/** Reconnect if the server cannot be reached, or has generated frames that the silent socket did not tell of. */
async function checkConnection(current) {
  current.checking = true;
  const { socket } = current;
  const info = await ask(current).catch((error) => (error instanceof ApiError ? { frames_generated: 0 } : null));
  current.checking = false;
  if (stream !== current || current.over || current.socket !== socket) return;
  if (info && info.frames_generated * (CLOCK_RATE / current.fps) <= current.generatedUntil + 1) {
    current.messageAt = performance.now();
    return;
  }
  closeSocket(current);
  onClose(current);
}

function closeSocket(current) {
  current.socket.onclose = current.socket.onmessage = null;
  current.socket.close();
}

// WebRTC

const hasWebRtc = "RTCPeerConnection" in window && "requestVideoFrameCallback" in HTMLVideoElement.prototype;

/** Ask for the frames by WHEP. `updateFigures` notices when none arrive. */
async function watchByWebRtc(current) {
  if (current.session || current.format !== "events") return;
  const session = new WhepSession(`/v1/streams/${current.id}/whep`, {
    fetch: send,
    onTrack: (track) => drawTrack(current, track),
    onFail: () => watchBySocket(current),
  });
  current.session = session;
  current.heardAt = performance.now();
  try {
    await session.open();
  } catch {
    if (current.session === session) watchBySocket(current);
  }
}

function drawTrack(current, track) {
  const video = document.createElement("video");
  video.muted = true;
  video.srcObject = new MediaStream([track]);
  video.play().catch(() => {});
  const { session } = current;
  onVideoFrame(video, () => {
    if (stream !== current || current.session !== session) return false;
    current.heardAt = performance.now();
    if (!current.over && document.body.dataset.state !== "paused") {
      document.body.dataset.transport = "webrtc";
      draw(video, video.videoWidth, video.videoHeight);
      onDrawn(current, playedUntil(current));
    }
    return true;
  });
}

/** Presentation time of the frame on screen, which WebRTC does not tell: counted from the last chunk event, at 1:1. */
function playedUntil(current) {
  if (!current.shown) return 0;
  const frames = current.shown.frames + ((performance.now() - current.shown.at) / 1000) * current.fps;
  return Math.min(Math.max(0, frames - 1) * (CLOCK_RATE / current.fps), current.generatedUntil);
}

function closeWebRtc(current) {
  if (current.over) current.session?.close(false); // the server has deleted the session with the stream
  else current.session?.close();
  current.session = null;
}

/** Take the frames over the WebSocket from now on. */
function watchBySocket(current) {
  closeWebRtc(current);
  if (stream !== current || current.over || current.format !== "events") return;
  current.format = "mjpeg";
  document.body.dataset.transport = "websocket";
  if (current.lost) return; // the next attempt takes frames, too
  closeSocket(current);
  connect(current);
}

async function change(prompt) {
  const current = stream;
  const transition = document.querySelector("input[name=transition]:checked").value;
  const entry = logPrompt(current, { prompt, text: "asked", kind: "waiting" });
  const wanted = { prompt, askedAt: performance.now(), entry, chunk: null };
  current.changes.push(wanted);
  current.markers.push({ kind: "asked", chunk: chunkOnScreen(current) });
  drawTimeline(current);
  try {
    const answer = await api("PATCH", `/v1/streams/${current.id}`, { prompt, transition });
    wanted.chunk = answer.chunk_index;
    if (answer.prompt === prompt) showIgnoredWords(current, answer);
    // The event `prompt.applied` may have arrived before this answer.
    if (current.changes.includes(wanted)) setEntry(entry, `takes effect with chunk ${answer.chunk_index}`, "waiting");
  } catch (error) {
    current.changes = current.changes.filter((change) => change !== wanted);
    setEntry(entry, "refused", "refused");
    if (stream === current) alertUser(error.message);
  }
}

async function pause() {
  const current = stream;
  const paused = document.body.dataset.state !== "paused";
  try {
    await api("PATCH", `/v1/streams/${current.id}`, { paused });
  } catch (error) {
    if (stream === current) alertUser(error.message);
  }
}

function stop() {
  const current = stream;
  if (!current) return;
  if (current.id && !current.over) api("DELETE", `/v1/streams/${current.id}`, undefined, { keepalive: true }).catch(() => {});
  if (!current.over) finish(current, "ended", "Stopped", "Press Play to start another.");
  stream = null;
}

function finish(current, state, title, detail) {
  current.over = true;
  clearTimeout(current.timer);
  closeWebRtc(current);
  current.socket?.close();
  for (const change of current.changes) setEntry(change.entry, "never reached the screen", "refused");
  current.changes = [];
  if (current.first) setEntry(current.first, "never reached the screen", "refused");
  current.first = null;
  show(state, title, detail);
}

// Events and frames from the server

const ENDINGS = {
  finished: ["Finished", "The stream has played to its end."],
  deleted: ["Stopped", "Press Play to start another."],
  idle: ["Ended", "Nobody was watching any more."],
  shutting_down: ["The server is shutting down", "Start it again and press Play."],
  failed: ["The stream failed", "Press Play to start another."],
};

function onEvent(current, event) {
  switch (event.type) {
    case "stream.started": {
      const info = event.stream;
      current.attempts = 0;
      current.lost = current.stalled = false;
      current.interrupted = info.interrupted;
      current.stalls = info.stalls;
      current.queue = info.queue_position;
      current.wait = info.queue_wait_s;
      if (info.width) setGeometry(info.width, info.height);
      if (info.fps) current.fps = info.fps;
      current.generatedUntil = Math.max(current.generatedUntil, info.frames_generated * (CLOCK_RATE / current.fps));
      showIgnoredWords(current, info);
      setState(current, info.state);
      break;
    }
    case "queue.position":
      current.queue = event.position;
      current.wait = event.wait_s;
      setState(current, "queued");
      break;
    case "state":
      if (event.state !== "queued") current.queue = null;
      if (event.state !== "ended" && event.state !== "failed") setState(current, event.state);
      if (event.state === "starting" && current.ignored === null) learnIgnoredWords(current);
      break;
    case "chunk":
      current.chunks.push({ index: event.index, ms: event.gen_ms, frames: event.frames, pts: event.pts });
      if (current.chunks.length > CHUNKS_SHOWN) current.chunks.shift();
      current.chunkFrames = Math.max(current.chunkFrames, event.frames);
      current.shown = { frames: event.shown, at: performance.now() };
      current.generatedUntil = event.pts + (event.frames * CLOCK_RATE) / current.fps;
      drawTimeline(current);
      break;
    case "prompt.applied":
      onApplied(current, event);
      break;
    case "stall":
      current.stalled = event.phase === "began";
      if (current.stalled) current.stalls += 1;
      showStatus(current);
      break;
    case "engine.restarted":
      current.interrupted = false;
      showStatus(current);
      break;
    case "error":
      if (event.code === "engine_restarted") {
        current.interrupted = true;
        showStatus(current);
      } else current.failure = event.message;
      break;
    case "ended": {
      const [title, detail] = ENDINGS[event.reason] ?? ["Ended", ""];
      finish(current, event.reason === "failed" ? "failed" : "ended", title, current.failure ?? detail);
      if (current.failure) alertUser(current.failure);
      break;
    }
  }
}

function onApplied(current, event) {
  current.markers.push({ kind: "applied", chunk: event.chunk_index });
  const same = (change) => change.prompt === event.prompt;
  // A later take of the same prompt is still to come. In a new engine a change may come earlier than was said.
  const due = current.changes.findLastIndex((change) => same(change) && (change.chunk ?? 0) <= event.chunk_index);
  const last = due >= 0 ? due : current.changes.findIndex(same);
  const applied = current.changes[last];
  // The event precedes the first frame under the new prompt, and replaces every older change.
  for (const change of current.changes.splice(0, last + 1)) {
    const seconds = (performance.now() - change.askedAt) / 1000;
    if (change === applied) {
      setEntry(change.entry, `on screen after ${seconds.toFixed(2)} s, chunk ${event.chunk_index}`, "applied");
      current.steer = seconds;
    } else setEntry(change.entry, "overtaken by the next one", "refused");
  }
  drawTimeline(current);
}

async function onFrame(current, { pts, data }) {
  if (current.decoding >= MAX_DECODING) return;
  current.decoding += 1;
  let bitmap;
  try {
    bitmap = await decodeJpeg(data);
  } catch {
    return;
  } finally {
    current.decoding -= 1;
  }
  if (stream === current && !current.over && pts >= current.pts) {
    draw(bitmap, bitmap.width, bitmap.height);
    onDrawn(current, pts);
  }
  bitmap.close();
}

function onDrawn(current, pts) {
  const now = performance.now();
  if (current.pts < 0) {
    current.firstFrame = (now - current.askedAt) / 1000;
    if (current.first) setEntry(current.first, `first picture after ${current.firstFrame.toFixed(2)} s`, "applied");
    current.first = null;
  }
  current.pts = pts;
  current.drawn.push(now);
}

function draw(image, width, height) {
  setGeometry(width, height);
  picture.drawImage(image, 0, 0);
  glow.drawImage(image, 0, 0, 16, 16);
}

function setGeometry(width, height) {
  const canvas = picture.canvas;
  if (canvas.width === width && canvas.height === height) return;
  canvas.width = width;
  canvas.height = height;
  $("stage").style.setProperty("--aspect", `${width} / ${height}`);
}

// The page's messages and figures

function setState(current, state) {
  if (state === "queued") {
    const place = current.queue ?? "…";
    const wait = current.wait == null ? "You are next as soon as a stream ends." : `About ${Math.ceil(current.wait)} s to wait.`;
    const detail = current.queue > 1 && current.wait == null ? "It starts as soon as enough streams have ended." : wait;
    show("queued", `Place ${place} in the queue`, current.queue == null ? "The engine is starting." : detail);
  } else if (state === "starting") {
    show("starting", "Generating the first frames", "They play as soon as they are there.");
  } else if (state === "ended" || state === "failed") {
    finish(current, state, "The stream is over", "Press Play to start another.");
  } else {
    show(state, "", "");
  }
  if (["starting", "live", "paused"].includes(state)) watchByWebRtc(current);
}

function show(state, title, detail) {
  const active = ["queued", "starting", "live", "paused"].includes(state);
  const focused = document.activeElement;
  document.body.dataset.state = state;
  if (stream) stream.message = [title, detail];
  showStatus(stream);
  $("play").textContent = active ? "Apply" : "Play";
  $("stop").hidden = !active;
  $("pause").hidden = state !== "live" && state !== "paused";
  $("pause").textContent = state === "paused" ? "Resume" : "Pause";
  if (active) $("alert").hidden = true;
  // A control that is hidden now would drop the focus.
  if (focused !== document.body && !focused.checkVisibility({ visibilityProperty: true })) {
    $("play").focus({ preventScroll: true });
  }
}

/** Show in the badge and over the picture what the stream is doing, or what keeps it from doing that. */
function showStatus(current) {
  const { state } = document.body.dataset;
  let [title, detail] = current.message;
  let trouble = "";
  if (current.over) trouble = "";
  else if (current.lost) {
    trouble = "reconnecting";
    [title, detail] = ["Connection lost", current.retryText];
  } else if (current.interrupted) {
    trouble = "engine restarting";
    // Frames that were generated before still play.
    if (current.stalled || state === "starting") {
      [title, detail] = ["The engine is restarting", "The stream goes on when it is back."];
    }
  } else if (current.stalled) trouble = "stalled";
  if (trouble) document.body.dataset.trouble = trouble;
  else delete document.body.dataset.trouble;
  $("badge-text").textContent = trouble || state;
  $("message").classList.toggle("empty", !title);
  $("message-title").textContent = title;
  $("message-detail").textContent = detail;
}

/** Name the words of the prompt that the model ignores. */
function showIgnoredWords(current, { model, ignored_words: words }) {
  current.ignored = words;
  $("ignored").hidden = !words?.length;
  if (!words?.length) return;
  const more = words.length > IGNORED_SHOWN ? ` and ${words.length - IGNORED_SHOWN} more` : "";
  $("ignored").textContent = `${model} ignores these words: ${words.slice(0, IGNORED_SHOWN).join(", ")}${more}.`;
}

/** Ask which words the model ignores: before the engine was up nobody could say. */
async function learnIgnoredWords(current) {
  const info = await ask(current).catch(() => null);
  if (info && stream === current && current.ignored === null) showIgnoredWords(current, info);
}

function alertUser(message) {
  $("alert").textContent = message;
  $("alert").hidden = false;
}

function logPrompt(current, { prompt, text, kind }) {
  const item = document.createElement("li");
  const when = document.createElement("span");
  when.className = "when";
  item.append(prompt, when);
  const log = $("log");
  log.querySelector(".empty")?.remove();
  log.prepend(item);
  while (log.children.length > 30) log.lastChild.remove();
  const entry = { item, when };
  if (!current.id) current.first = entry;
  setEntry(entry, text, kind);
  return entry;
}

function setEntry({ item, when }, text, kind) {
  item.className = kind;
  when.textContent = text;
}

function figure(id, value, unit = "", tone = "") {
  const element = $(id);
  element.textContent = value;
  if (unit) {
    const small = document.createElement("small");
    small.textContent = unit;
    element.append(small);
  }
  element.className = tone;
}

function chunkOnScreen(current) {
  const chunk = current.chunks.findLast((chunk) => chunk.pts <= current.pts);
  return chunk ? chunk.index : 0;
}

function updateFigures() {
  const current = stream;
  if (!current) return;
  const now = performance.now();
  // The server repeats a still picture, so silence means a lost connection. A hidden page gets no frame callbacks.
  if (document.hidden) current.heardAt = now;
  if (current.session && now - current.heardAt > SILENCE_MS) watchBySocket(current);
  const silent = current.socket && now - current.messageAt > SILENCE_MS;
  if (silent && !current.checking && !current.over) checkConnection(current);
  while (current.drawn.length && current.drawn[0] < now - 2000) current.drawn.shift();
  const playing = current.pts >= 0 && !current.over;
  if (playing) {
    const span = Math.min(2, (now - current.askedAt) / 1000 - current.firstFrame);
    // One second is too short to count frames in.
    const rate = span > 1 ? current.drawn.length / span : current.fps;
    const paused = document.body.dataset.state === "paused";
    figure("fps", paused ? "0" : rate.toFixed(1), "", paused ? "" : rate > current.fps * 0.93 ? "good" : "warn");
    figure("buffer", Math.max(0, (current.generatedUntil - current.pts) / CLOCK_RATE).toFixed(2), "s");
    figure("chunk", String(chunkOnScreen(current)));
  }
  const recent = current.chunks.slice(-CHUNKS_AVERAGED);
  if (recent.length) {
    const played = recent.reduce((sum, chunk) => sum + chunk.frames / current.fps, 0);
    const factor = recent.reduce((sum, chunk) => sum + chunk.ms / 1000, 0) / played;
    figure("rtf", factor.toFixed(2), "", factor <= 0.9 ? "good" : factor <= 1 ? "warn" : "bad");
  }
  if (current.firstFrame != null) figure("ttff", current.firstFrame.toFixed(2), "s");
  if (current.steer != null) figure("steer", current.steer.toFixed(2), "s");
  figure("stalls", String(current.stalls), "", current.stalls ? "warn" : "");
  figure("queue", current.queue == null ? "–" : String(current.queue));
}

function drawTimeline(current) {
  const svg = $("timeline");
  const [width, height] = [320, 96];
  const step = width / CHUNKS_SHOWN;
  const budget = (current.chunkFrames / current.fps) * 1000;
  const top = Math.max(budget * 1.25, ...current.chunks.map((chunk) => chunk.ms));
  const first = current.chunks.length ? current.chunks[0].index : 0;
  const parts = [];
  for (const chunk of current.chunks) {
    const tall = Math.max(1, (chunk.ms / top) * height);
    const late = chunk.ms > (chunk.frames / current.fps) * 1000;
    parts.push(shape("rect", {
      class: late ? "bar late" : "bar", x: (chunk.index - first) * step + 0.75, y: height - tall, width: step - 1.5, height: tall, rx: 1,
    }));
  }
  const line = height - (budget / top) * height;
  if (budget) parts.push(shape("line", { class: "budget", x1: 0, x2: width, y1: line, y2: line }));
  current.markers = current.markers.filter((marker) => marker.chunk >= first);
  for (const { kind, chunk } of current.markers) {
    const x = (chunk - first + (kind === "asked" ? 0.5 : 0)) * step;
    parts.push(shape("line", { class: kind, x1: x, x2: x, y1: 0, y2: height }));
  }
  svg.replaceChildren(...parts);
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

async function updateServer() {
  let text, wait = 5000;
  try {
    const { data } = await api("GET", "/v1/models", undefined, { background: true });
    const model = data.find((model) => model.default) ?? data[0];
    text = model ? `${model.id} · ${model.width}×${model.height} · ${model.fps} frames/s` : "the engine is starting…";
    if (model && !stream) setGeometry(model.width, model.height);
    wait = model ? 15000 : 1000;
  } catch (error) {
    if (error.status === 401) text = "the server needs an API key";
    else text = error instanceof ApiError ? error.message : "the server cannot be reached";
  }
  $("model").textContent = text;
  setTimeout(updateServer, wait);
}

// The user's actions

function submit() {
  const prompt = $("prompt").value.replace(/\s+/g, " ").trim();
  if (!prompt) {
    alertUser("Type what you want to see first.");
    $("prompt").focus();
    return;
  }
  if (new TextEncoder().encode(prompt).length > MAX_PROMPT_BYTES) {
    alertUser(`The sentence is too long: at most ${MAX_PROMPT_BYTES} bytes.`);
    return;
  }
  $("alert").hidden = true;
  if (!stream || stream.over) play(prompt);
  else if (!stream.id) alertUser("The stream is just being asked for: wait a moment.");
  else change(prompt);
}

function fit() {
  const box = $("prompt");
  const { scrollTop } = box;
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`; // the style sheet bounds it
  box.scrollTop = scrollTop;
  const bytes = new TextEncoder().encode(box.value).length;
  $("count").hidden = bytes < MAX_PROMPT_BYTES * 0.8;
  $("count").textContent = `${bytes} / ${MAX_PROMPT_BYTES} bytes`;
}

/** Replace the text in a way that the browser's undo takes back. */
function replacePrompt(text) {
  const box = $("prompt");
  box.focus();
  box.select();
  if (document.execCommand("insertText", false, text)) return; // `input` calls `fit`
  box.value = text;
  fit();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
$("prompt").addEventListener("input", fit);
$("image").addEventListener("change", () => {
  const file = $("image").files[0];
  $("image-name").textContent = file ? file.name : "Picture";
});
addEventListener("resize", fit);
$("stop").addEventListener("click", stop);
$("pause").addEventListener("click", pause);
$("scaling").addEventListener("click", () => {
  const pixels = picture.canvas.classList.toggle("pixels");
  $("scaling").setAttribute("aria-pressed", String(pixels));
});
$("fullscreen").addEventListener("click", () => {
  if (document.fullscreenElement) document.exitFullscreen();
  else picture.canvas.parentElement.requestFullscreen().catch(() => {});
});
$("ask-form").addEventListener("submit", (event) => {
  // Other characters cannot be sent, and no key has them.
  if (event.submitter?.value !== "use" || /^[!-~]+$/.test($("key").value.trim())) return;
  event.preventDefault();
  $("key-wrong").hidden = false;
});
addEventListener("offline", () => {
  if (stream) stream.messageAt = 0;
});
// A closed tab must not occupy the engine until the idle timeout.
addEventListener("pagehide", stop);

for (const text of EXAMPLES) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => {
    replacePrompt(text);
    if (matchMedia("(hover: none)").matches) button.focus(); // the keyboard of a phone would cover the picture
    submit();
  });
  const item = document.createElement("li");
  item.append(button);
  $("examples").append(item);
}

setInterval(updateFigures, 250);
updateServer();
fit();
$("prompt").focus();
