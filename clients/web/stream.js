// The stream on this page: asks for it, receives its events and frames, and connects again when the connection is lost.
// Events arrive over a WebSocket. Frames arrive over WebRTC, or as JPEGs over the WebSocket where WebRTC does not get
// through. The other modules hear of changes by the event `stream` of the document.

import { ApiError, api, send, tokenIn } from "./api.js";
import { $, alertError, alertUser } from "./dom.js";
import { drawTimeline } from "./figures.js";
import { WhepSession, decodeJpeg, onVideoFrame, openSocket, retryDelay } from "./js/index.js";
import { addEntry, setEntry, showIgnoredWords } from "./log.js";
import { draw, pageState, setGeometry, show, showStatus } from "./stage.js";

/** @typedef {import("./api.js").Json} Json */
/** @typedef {import("./log.js").Entry} Entry */
/** @typedef {{ index: number, ms: number, frames: number, pts: number }} Chunk */
/** @typedef {{ prompt: string, askedAt: number, entry: Entry, chunk: number | null }} Change A change under way. */
/** @typedef {{ at_s: number, prompt: string, transition: string }} Played A prompt, and when it took effect. */
/** @typedef {ReturnType<typeof newStream>} Stream */

const CHUNKS_SHOWN = 48;
const MAX_DECODING = 4; // with more undecoded frames than this the browser is too slow: newer frames are skipped
const MAX_RETRY_MS = 8000;
const CLOCK_RATE = 90_000; // of presentation times, a second
const SILENCE_MS = 3000; // WebRTC that has shown nothing for this long is replaced by JPEGs; a silent socket is checked
// Close codes after which no retry helps: ended, refused, failed, unknown stream. Any other is a lost connection.
const FINAL_CODES = new Set([1000, 1008, 1011, 4404]);

/** @type {Stream | null} The stream on this page; null when there is none. */
let stream = null;

/** @returns {Stream | null} The stream that is being played; null after its end. */
export function playing() {
  return stream && !stream.over ? stream : null;
}

/** @returns {Stream | null} The stream that is being played, or was played last. */
export function latest() {
  return stream;
}

/** @param {boolean} own Whether this page has opened the stream, and ends it when the page is left. */
function newStream(own) {
  return {
    own,
    id: "",
    model: "",
    prompt: "",
    /** @type {number | null} */
    seed: null,
    /** @type {File | null} */
    image: null,
    askedAt: performance.now(),
    /** @type {WebSocket | null} */
    socket: null,
    token: "",
    format: /** @type {"events" | "mjpeg"} */ (hasWebRtc ? "events" : "mjpeg"), // what the socket carries
    /** @type {WhepSession | null} */
    session: null, // when frames arrive by WebRTC
    heardAt: 0, // when the session last showed a frame
    messageAt: 0, // when the socket was opened or last brought something, or the server last answered
    checking: false, // whether the server is being asked because the socket is silent
    lost: false, // the connection, which is tried again
    retryText: "",
    interrupted: false, // the engine is being restarted
    stalled: false, // the next frame is late
    /** @type {string[] | null} */
    ignored: null, // words of the prompt that the model ignores; null if not known
    /** @type {{ frames: number, at: number } | null} */
    shown: null, // how far playback had come, and when
    attempts: 0,
    timer: 0,
    over: false,
    failure: "",
    message: ["", ""], // title and detail
    fps: 16,
    chunkFrames: 0,
    /** @type {Chunk[]} */
    chunks: [],
    generatedUntil: 0, // pts
    pts: -1, // of the frame on screen
    /** @type {number | null} */
    queue: null, // place
    /** @type {number | null} */
    wait: null, // seconds
    stalls: 0,
    /** @type {Json | null} */
    quality: null,
    /** @type {number[]} */
    drawn: [], // times of recent frames
    decoding: 0,
    bytes: 0, // received over the WebSocket
    /** @type {{ kind: string, chunk: number }[]} */
    markers: [],
    /** @type {Change[]} */
    changes: [],
    /** @type {Played[]} */
    played: [],
    /** @type {Json[]} */
    scheduled: [], // changes to come
    /** @type {Entry | null} */
    first: null, // log entry of the first prompt
    /** @type {number | null} */
    firstFrame: null, // seconds
    /** @type {number | null} */
    steer: null, // seconds
  };
}

/**
 * Open a stream in place of the one that plays.
 *
 * @param {{ prompt: string, model?: string, seed?: number, duration_s?: number, prompts?: Json[], image?: File | null }} wanted
 */
export async function play({ image = null, ...fields }) {
  stop();
  const { prompt } = fields;
  const current = newStream(true);
  stream = current;
  current.image = image;
  current.prompt = prompt;
  showIgnoredWords(current, { ignored_words: null });
  current.first = addEntry({ prompt, text: "starting", kind: "waiting" });
  show("starting", current, "Starting", "Asking the server for a stream.");
  try {
    const info = await api("POST", "v1/streams", request(fields, image));
    if (stream !== current) return void api("DELETE", `v1/streams/${info.id}`).catch(() => {});
    adopt(current, info);
  } catch (error) {
    if (stream !== current) return;
    const full = error instanceof ApiError && error.code === "queue_full";
    finish(current, "failed", full ? "Every place is taken" : "That did not start", /** @type {Error} */ (error).message);
    alertError(error);
  }
}

/**
 * Watch a stream that somebody else has opened.
 *
 * @param {string} id
 */
export async function watch(id) {
  stop();
  const current = newStream(false);
  stream = current;
  current.id = id;
  show("starting", current, "Joining", "Asking the server for the stream.");
  try {
    const info = await api("GET", `v1/streams/${id}`);
    if (stream !== current) return;
    current.first = addEntry({ prompt: info.prompt, text: "joined", kind: "waiting" });
    adopt(current, info);
  } catch (error) {
    if (stream === current) finish(current, "failed", "That stream is not there", /** @type {Error} */ (error).message);
  }
}

/**
 * @param {Stream} current
 * @param {Json} info The stream object.
 */
function adopt(current, info) {
  current.id = info.id;
  current.token = tokenIn(info.ws_url);
  takeInfo(current, info);
  setState(current, info.state);
  connect(current);
}

/**
 * @param {Stream} current
 * @param {Json} info The stream object.
 */
function takeInfo(current, info) {
  current.model = info.model;
  current.prompt = info.prompt;
  current.seed = info.seed;
  current.queue = info.queue_position;
  current.wait = info.queue_wait_s;
  current.quality = info.quality;
  current.scheduled = info.prompts;
  if (!current.played.length) current.played.push({ at_s: 0, prompt: info.prompt, transition: "cut" });
  showIgnoredWords(current, info);
}

/**
 * The body that opens a stream: JSON, or a form when the video continues from a picture.
 *
 * @param {Json} fields
 * @param {File | null} image
 * @returns {FormData | Json}
 */
function request({ prompts, ...fields }, image) {
  if (!image) return prompts?.length ? { ...fields, prompts } : fields;
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value !== undefined) form.set(name, String(value));
  for (const change of prompts ?? []) {
    for (const [name, value] of Object.entries(change)) form.append(`prompts[][${name}]`, String(value));
  }
  form.set("image", image);
  return form;
}

/** @param {Stream} current */
function connect(current) {
  current.messageAt = performance.now();
  current.socket = openSocket(`v1/streams/${current.id}/ws`, {
    format: current.format,
    token: current.token,
    onEvent(event) {
      current.messageAt = performance.now();
      if (stream === current) onEvent(current, event);
    },
    onFrame(frame) {
      current.messageAt = performance.now();
      current.bytes += frame.data.length;
      if (stream === current) onFrame(current, frame);
    },
    onClose(code) {
      if (stream === current && !current.over) onClose(current, code);
    },
  });
}

/**
 * @param {Stream} current
 * @param {number} [code]
 */
function onClose(current, code = 1006) {
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

/**
 * The stream object, if the server gives it soon.
 *
 * @param {Stream} current
 */
export function ask(current) {
  return api("GET", `v1/streams/${current.id}`, undefined, { signal: AbortSignal.timeout(SILENCE_MS), background: true });
}

/**
 * Reconnect if the server cannot be reached, or has generated frames that the silent socket did not tell of.
 *
 * @param {Stream} current
 */
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

/** @param {Stream} current */
function closeSocket(current) {
  if (!current.socket) return;
  current.socket.onclose = current.socket.onmessage = null;
  current.socket.close();
}

/** Replace a connection that has fallen silent. To be called a few times a second. */
export function watchdog() {
  const current = playing();
  if (!current) return;
  const now = performance.now();
  // The server repeats a still picture, so silence means a lost connection. A hidden page gets no frame callbacks.
  if (document.hidden) current.heardAt = now;
  if (current.session && now - current.heardAt > SILENCE_MS) watchBySocket(current);
  if (current.socket && now - current.messageAt > SILENCE_MS && !current.checking) checkConnection(current);
}

// WebRTC

const hasWebRtc = "RTCPeerConnection" in window && "requestVideoFrameCallback" in HTMLVideoElement.prototype;

/**
 * Ask for the frames by WHEP. `watchdog` notices when none arrive.
 *
 * @param {Stream} current
 */
async function watchByWebRtc(current) {
  if (current.session || current.format !== "events") return;
  const session = new WhepSession(`v1/streams/${current.id}/whep`, {
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

/**
 * @param {Stream} current
 * @param {MediaStreamTrack} track
 */
function drawTrack(current, track) {
  const video = document.createElement("video");
  video.muted = true;
  video.srcObject = new MediaStream([track]);
  video.play().catch(() => {});
  const { session } = current;
  onVideoFrame(video, () => {
    if (stream !== current || current.session !== session) return false;
    current.heardAt = performance.now();
    if (!current.over && pageState() !== "paused") {
      document.body.dataset.transport = "webrtc";
      draw(video, video.videoWidth, video.videoHeight);
      onDrawn(current, playedUntil(current));
    }
    return true;
  });
}

/**
 * Presentation time of the frame on screen, which WebRTC does not tell: counted from the last chunk event, at 1:1.
 *
 * @param {Stream} current
 */
function playedUntil(current) {
  if (!current.shown) return 0;
  const frames = current.shown.frames + ((performance.now() - current.shown.at) / 1000) * current.fps;
  return Math.min(Math.max(0, frames - 1) * (CLOCK_RATE / current.fps), current.generatedUntil);
}

/** @param {Stream} current */
function closeWebRtc(current) {
  if (current.over && current.own) current.session?.close(false); // the server has deleted the session with the stream
  else current.session?.close();
  current.session = null;
}

/**
 * Take the frames over the WebSocket from now on.
 *
 * @param {Stream} current
 */
function watchBySocket(current) {
  closeWebRtc(current);
  if (stream !== current || current.over || current.format !== "events") return;
  current.format = "mjpeg";
  document.body.dataset.transport = "websocket";
  if (current.lost) return; // the next attempt takes frames, too
  closeSocket(current);
  connect(current);
}

// What the user changes

/**
 * Change the prompt of the stream that plays.
 *
 * @param {string} prompt
 * @param {string} transition
 */
export async function change(prompt, transition) {
  const current = playing();
  if (!current) return;
  const entry = addEntry({ prompt, text: "asked", kind: "waiting" });
  /** @type {Change} */
  const wanted = { prompt, askedAt: performance.now(), entry, chunk: null };
  current.changes.push(wanted);
  current.markers.push({ kind: "asked", chunk: chunkOnScreen(current) });
  drawTimeline(current);
  try {
    const answer = await api("PATCH", `v1/streams/${current.id}`, { prompt, transition });
    wanted.chunk = answer.chunk_index;
    if (answer.prompt === prompt) showIgnoredWords(current, answer);
    // The event `prompt.applied` may have arrived before this answer.
    if (current.changes.includes(wanted)) setEntry(entry, `takes effect with chunk ${answer.chunk_index}`, "waiting");
  } catch (error) {
    current.changes = current.changes.filter((change) => change !== wanted);
    setEntry(entry, "refused", "refused");
    if (stream === current) alertError(error);
  }
}

/**
 * Schedule changes of the prompt, in place of those that are still to come.
 *
 * @param {Json[]} prompts
 */
export async function schedule(prompts) {
  const current = playing();
  if (!current) return;
  try {
    current.scheduled = (await api("PATCH", `v1/streams/${current.id}`, { prompts })).prompts;
    document.dispatchEvent(new Event("stream"));
  } catch (error) {
    alertError(error);
  }
}

export async function togglePause() {
  const current = playing();
  if (!current || !["live", "paused"].includes(pageState())) return;
  try {
    await api("PATCH", `v1/streams/${current.id}`, { paused: pageState() !== "paused" });
  } catch (error) {
    if (stream === current) alertError(error);
  }
}

/** End the stream, or only leave it if somebody else has opened it. */
export function stop() {
  const current = stream;
  if (!current) return;
  if (current.id && !current.over && current.own) {
    api("DELETE", `v1/streams/${current.id}`, undefined, { keepalive: true }).catch(() => {});
  }
  if (!current.over) finish(current, "ended", "Stopped", "Press Play to start another.");
}

/**
 * @param {Stream} current
 * @param {string} state
 * @param {string} title
 * @param {string} detail
 */
function finish(current, state, title, detail) {
  current.over = true;
  clearTimeout(current.timer);
  closeWebRtc(current);
  current.socket?.close();
  for (const change of current.changes) setEntry(change.entry, "never reached the screen", "refused");
  current.changes = [];
  if (current.first) setEntry(current.first, "never reached the screen", "refused");
  current.first = null;
  show(state, current, title, detail);
}

// Events and frames from the server

/** @type {Record<string, [string, string]>} */
const ENDINGS = {
  finished: ["Finished", "The stream has played to its end."],
  deleted: ["Stopped", "Press Play to start another."],
  idle: ["Ended", "Nobody was watching any more."],
  shutting_down: ["The server is shutting down", "Start it again and press Play."],
  failed: ["The stream failed", "Press Play to start another."],
};

/**
 * @param {Stream} current
 * @param {Json} event
 */
function onEvent(current, event) {
  switch (event.type) {
    case "stream.started": {
      const info = event.stream;
      current.attempts = 0;
      current.lost = current.stalled = false;
      current.interrupted = info.interrupted;
      current.stalls = info.stalls;
      if (info.width) setGeometry(info.width, info.height);
      if (info.fps) current.fps = info.fps;
      current.generatedUntil = Math.max(current.generatedUntil, info.frames_generated * (CLOCK_RATE / current.fps));
      takeInfo(current, info);
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
    case "quality.changed":
      current.quality = { ...current.quality, level: event.level, steps: event.steps };
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
      finish(current, event.reason === "failed" ? "failed" : "ended", title, current.failure || detail);
      if (current.failure) alertUser(current.failure);
      break;
    }
  }
}

/**
 * @param {Stream} current
 * @param {Json} event
 */
function onApplied(current, event) {
  const { prompt, transition, chunk_index: chunk } = event;
  current.markers.push({ kind: "applied", chunk });
  current.prompt = prompt;
  current.played.push({ at_s: event.pts / CLOCK_RATE, prompt, transition });
  current.scheduled = current.scheduled.filter((change) => change.at_s * CLOCK_RATE > event.pts + CLOCK_RATE / 2);
  /** @param {Change} change */
  const same = (change) => change.prompt === prompt;
  // A later take of the same prompt is still to come. In a new engine a change may come earlier than was said.
  const due = current.changes.findLastIndex((change) => same(change) && (change.chunk ?? 0) <= chunk);
  const last = due >= 0 ? due : current.changes.findIndex(same);
  const applied = current.changes[last];
  if (!applied) addEntry({ prompt, text: `as scheduled, chunk ${chunk}`, kind: "applied" });
  // The event precedes the first frame under the new prompt, and replaces every older change.
  for (const change of current.changes.splice(0, last + 1)) {
    const seconds = (performance.now() - change.askedAt) / 1000;
    if (change === applied) {
      setEntry(change.entry, `on screen after ${seconds.toFixed(2)} s, chunk ${chunk}`, "applied");
      current.steer = seconds;
    } else setEntry(change.entry, "overtaken by the next one", "refused");
  }
  drawTimeline(current);
  document.dispatchEvent(new Event("stream"));
}

/**
 * @param {Stream} current
 * @param {import("./js/socket.js").Frame} frame
 */
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

/**
 * @param {Stream} current
 * @param {number} pts
 */
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

/**
 * @param {Stream} current
 * @param {string} state
 */
function setState(current, state) {
  if (state === "queued") {
    const place = current.queue ?? "…";
    const wait = current.wait == null ? "You are next as soon as a stream ends." : `About ${Math.ceil(current.wait)} s to wait.`;
    const many = (current.queue ?? 0) > 1 && current.wait == null;
    const detail = many ? "It starts as soon as enough streams have ended." : wait;
    show("queued", current, `Place ${place} in the queue`, current.queue == null ? "The engine is starting." : detail);
  } else if (state === "starting") {
    show("starting", current, "Generating the first frames", "They play as soon as they are there.");
  } else if (state === "ended" || state === "failed") {
    finish(current, state, "The stream is over", "Press Play to start another.");
  } else {
    show(state, current, "", "");
  }
  if (["starting", "live", "paused"].includes(state)) watchByWebRtc(current);
}

/**
 * Ask which words the model ignores: before the engine was up nobody could say.
 *
 * @param {Stream} current
 */
async function learnIgnoredWords(current) {
  const info = await ask(current).catch(() => null);
  if (info && stream === current && current.ignored === null) showIgnoredWords(current, info);
}

/** @param {Stream} current */
export function chunkOnScreen(current) {
  const chunk = current.chunks.findLast((chunk) => chunk.pts <= current.pts);
  return chunk ? chunk.index : 0;
}

addEventListener("offline", () => {
  if (stream) stream.messageAt = 0;
});
// A closed tab must not occupy the engine until the idle timeout.
addEventListener("pagehide", stop);
// The buttons that a stream has.
$("stop").addEventListener("click", stop);
$("pause").addEventListener("click", togglePause);
