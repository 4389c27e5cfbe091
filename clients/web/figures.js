// The live figures: a chip that says whether the stream keeps 1:1, and a drawer with everything that is measured.

import { $, el } from "./dom.js";
import { pageState } from "./stage.js";

/** @typedef {import("./stream.js").Stream} Stream */

const CLOCK_RATE = 90_000;
const CHUNKS_SHOWN = 48;
const CHUNKS_AVERAGED = 8;
const STALL_REMEMBERED_MS = 10_000;
const SVG = "http://www.w3.org/2000/svg";

let bytesBefore = 0; // received over the WebSocket when the rate was last counted
let countedAt = 0;
let kbps = 0;
let stallsBefore = 0;
let stalledAt = -Infinity;

/**
 * @param {string} id
 * @param {string} value
 * @param {string} [unit]
 * @param {string} [tone] `good`, `warn` or `bad`.
 */
function figure(id, value, unit = "", tone = "") {
  const element = $(id);
  element.replaceChildren(value, ...(unit ? [el("small", {}, unit)] : []));
  element.className = tone;
}

/**
 * @param {Stream} stream
 * @param {number} chunk Index of the chunk on screen.
 */
export function updateFigures(stream, chunk) {
  const now = performance.now();
  while (stream.drawn.length && stream.drawn[0] < now - 2000) stream.drawn.shift();
  const playing = stream.pts >= 0 && !stream.over;
  if (playing) {
    const span = Math.min(2, (now - stream.askedAt) / 1000 - (stream.firstFrame ?? 0));
    // One second is too short to count frames in.
    const rate = span > 1 ? stream.drawn.length / span : stream.fps;
    const paused = pageState() === "paused";
    figure("fps", paused ? "0" : rate.toFixed(1), "", paused ? "" : rate > stream.fps * 0.93 ? "good" : "warn");
    figure("buffer", Math.max(0, (stream.generatedUntil - stream.pts) / CLOCK_RATE).toFixed(2), "s");
    figure("chunk", String(chunk));
  }
  const recent = stream.chunks.slice(-CHUNKS_AVERAGED);
  let factor = null;
  if (recent.length) {
    const played = recent.reduce((sum, chunk) => sum + chunk.frames / stream.fps, 0);
    factor = recent.reduce((sum, chunk) => sum + chunk.ms / 1000, 0) / played;
    figure("rtf", factor.toFixed(2), "", factor <= 0.9 ? "good" : factor <= 1 ? "warn" : "bad");
  }
  if (stream.firstFrame != null) figure("ttff", stream.firstFrame.toFixed(2), "s");
  if (stream.steer != null) figure("steer", stream.steer.toFixed(2), "s");
  figure("stalls", String(stream.stalls), "", stream.stalls ? "warn" : "");
  figure("queue", stream.queue == null ? "–" : String(stream.queue));
  if (stream.quality) figure("quality", `${stream.quality.steps}`, "steps", stream.quality.level ? "warn" : "");
  showTransport(stream, now);
  showHealth(stream, factor, now);
}

/**
 * @param {Stream} stream
 * @param {number} now
 */
function showTransport(stream, now) {
  if (now - countedAt >= 1000) {
    kbps = Math.max(0, ((stream.bytes - bytesBefore) * 8) / (now - countedAt));
    [bytesBefore, countedAt] = [stream.bytes, now];
  }
  const webrtc = document.body.dataset.transport === "webrtc";
  figure("transport", !document.body.dataset.transport ? "–" : webrtc ? "WebRTC" : "WebSocket");
  figure("bitrate", webrtc || !kbps ? "–" : String(Math.round(kbps)), webrtc || !kbps ? "" : "kbit/s");
}

/**
 * One chip for all figures: whether the stream keeps 1:1, and if not, why and what helps.
 *
 * @param {Stream} stream
 * @param {number | null} factor
 * @param {number} now
 */
function showHealth(stream, factor, now) {
  if (stream.stalls > stallsBefore) stalledAt = now;
  stallsBefore = stream.stalls;
  const state = pageState();
  let [tone, text, advice] = ["", "–", ""];
  if (!stream.over && factor !== null && state !== "queued") {
    [tone, text] = ["good", `1:1 · ${factor.toFixed(2)}×`];
    if (factor > 1) {
      [tone, text] = ["bad", `too slow · ${factor.toFixed(2)}×`];
      advice = "Generating takes longer than playing. Fewer streams at once, fewer denoising steps, a smaller model or "
        + "a faster processor helps; beside the server, close what uses the processor.";
    } else if (now - stalledAt < STALL_REMEMBERED_MS) {
      [tone, text] = ["warn", "stalled"];
      advice = "The next frames came late. Something else is using the processor or GPU for moments.";
    } else if (stream.quality?.level) {
      [tone, text] = ["warn", `1:1 · ${stream.quality.steps} steps`];
      advice = "The engine was behind, so the pictures have fewer denoising steps until there is time to spare.";
    } else if (state === "live" && !document.hidden && stream.drawn.length && stream.drawn.length / 2 < stream.fps * 0.6
      && now - stream.askedAt > 6000) {
      [tone, text] = ["warn", "browser is late"];
      advice = "The server keeps 1:1, but this page shows fewer frames: the connection or this computer is too slow.";
    }
  }
  $("health").className = tone;
  $("health-text").textContent = text;
  $("advice").textContent = advice;
  $("advice").hidden = !advice;
}

/** @param {Stream} stream */
export function drawTimeline(stream) {
  const [width, height] = [320, 96];
  const step = width / CHUNKS_SHOWN;
  const budget = (stream.chunkFrames / stream.fps) * 1000;
  const top = Math.max(budget * 1.25, ...stream.chunks.map((chunk) => chunk.ms));
  const first = stream.chunks.length ? stream.chunks[0].index : 0;
  const parts = [];
  for (const chunk of stream.chunks) {
    const tall = Math.max(1, (chunk.ms / top) * height);
    const late = chunk.ms > (chunk.frames / stream.fps) * 1000;
    const [x, y] = [(chunk.index - first) * step + 0.75, height - tall];
    parts.push(shape("rect", { class: late ? "bar late" : "bar", x, y, width: step - 1.5, height: tall, rx: 1 }));
  }
  const line = height - (budget / top) * height;
  if (budget) parts.push(shape("line", { class: "budget", x1: 0, x2: width, y1: line, y2: line }));
  stream.markers = stream.markers.filter((marker) => marker.chunk >= first);
  for (const { kind, chunk } of stream.markers) {
    const x = (chunk - first + (kind === "asked" ? 0.5 : 0)) * step;
    parts.push(shape("line", { class: kind, x1: x, x2: x, y1: 0, y2: height }));
  }
  $("timeline", SVGSVGElement).replaceChildren(...parts);
}

/**
 * @param {string} name
 * @param {Record<string, string | number>} attributes
 */
function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  return element;
}
