// Shows the stream of this address with its transparency, for OBS and other programs that lay a page over a picture.
//
// Each received frame has its matte below it (`alpha=stacked`); WebGL combines the two. The transports are tried in turn:
// WHEP, fragmented MP4, JPEGs. `?token=` is needed where the server has keys. `?lost=hide` hides the last picture while
// a lost connection is retried.

import { FragmentPlayer, WhepSession, decodeJpeg, onVideoFrame, openSocket, retryDelay } from "../js/index.js";

const FIRST_FRAME_MS = 5000; // a transport that has shown nothing by then is replaced by the next
const SILENCE_MS = 2000; // no frames for this long mean a lost connection
const STEADY_MS = 10000; // an attempt that played for this long resets the count of failures
const MAX_RETRY_MS = 10000;

const query = new URLSearchParams(location.search);
const token = query.get("token") ?? "";
const base = `../v1/streams/${location.pathname.split("/").pop()}`;
const canvas = document.getElementById("picture");
document.body.dataset.lost = query.get("lost") === "hide" ? "hide" : "hold";

let attempt = null; // the current one
let timer = 0; // starts the next one
let failures = 0;
let preferred = 0; // index of the transport to try
let visible = true;
let over = false;

/** `fetch` with the token, if there is one. */
function send(path, { headers, ...options } = {}) {
  return fetch(path, { ...options, headers: token ? { ...headers, Authorization: `Bearer ${token}` } : headers });
}

// The picture

const VERTEX = `
attribute vec2 corner;
varying vec2 position;
void main() {
  position = vec2(corner.x, -corner.y) * 0.5 + 0.5;
  gl_Position = vec4(corner, 0.0, 1.0);
}`;

// Sampling stays half a pixel away from the seam between the halves. Codecs turn black and white slightly grey, which
// the matte's range allows for.
const FRAGMENT = `
precision highp float;
uniform sampler2D picture;
uniform float inset;
varying vec2 position;
void main() {
  vec2 color = vec2(position.x, clamp(position.y, inset, 1.0 - inset) * 0.5);
  float matte = texture2D(picture, color + vec2(0.0, 0.5)).r;
  float alpha = clamp((matte - 0.04) / 0.92, 0.0, 1.0);
  gl_FragColor = vec4(texture2D(picture, color).rgb * alpha, alpha);
}`;

/** A function that draws a stacked frame on the canvas; null without WebGL. */
function createPainter() {
  const gl = canvas.getContext("webgl", { alpha: true, premultipliedAlpha: true, antialias: false, depth: false });
  if (!gl) return null;
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  gl.useProgram(program);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
  const corner = gl.getAttribLocation(program, "corner");
  gl.enableVertexAttribArray(corner);
  gl.vertexAttribPointer(corner, 2, gl.FLOAT, false, 0, 0);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  for (const side of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, side, gl.CLAMP_TO_EDGE);
  for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, filter, gl.LINEAR);
  const inset = gl.getUniformLocation(program, "inset");
  return (source, width, height) => {
    if (canvas.width !== width || canvas.height !== height / 2) {
      canvas.width = width;
      canvas.height = height / 2;
      gl.viewport(0, 0, width, height / 2);
    }
    gl.uniform1f(inset, 1 / height);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGB, gl.RGB, gl.UNSIGNED_BYTE, source);
    gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
  };
}

let paint = createPainter();
canvas.addEventListener("webglcontextlost", (event) => {
  event.preventDefault();
  paint = null;
});
canvas.addEventListener("webglcontextrestored", () => { paint = createPainter(); });

// One attempt over one transport

class Attempt {
  constructor(transport) {
    this.transport = transport;
    this.startedAt = this.heardAt = performance.now();
    this.frames = 0;
    this.found = false; // the stream exists and runs, so a failure is the transport's
    this.still = false; // paused or stalled: no frames are expected
    this.alive = true;
    this.cleanups = [];
  }

  show(source, width, height) {
    if (!this.alive || !width || !height) return;
    paint?.(source, width, height);
    this.frames += 1;
    this.heardAt = performance.now();
    document.body.dataset.state = "playing";
  }

  onEvent({ type, state, phase }) {
    if (type === "ended") finish();
    else if (type === "state") this.still = state === "paused";
    else if (type === "stall") this.still = phase === "began";
    else if (type === "error") return;
    this.heardAt = performance.now();
  }

  fail() {
    if (this.alive) retry(this);
  }

  stop() {
    this.alive = false;
    for (const cleanup of this.cleanups) cleanup();
  }
}

/** A video element whose frames are shown while the attempt lasts. */
function createVideo(current) {
  const video = document.createElement("video");
  video.muted = video.playsInline = video.autoplay = true;
  current.cleanups.push(() => {
    video.srcObject = null;
    video.removeAttribute("src");
    video.load();
  });
  onVideoFrame(video, () => {
    if (current.alive) current.show(video, video.videoWidth, video.videoHeight);
    return current.alive;
  });
  return video;
}

function listen(current, format, onFrame) {
  const socket = openSocket(`${base}/ws`, {
    format,
    token,
    alpha: "stacked",
    onEvent: (event) => current.alive && current.onEvent(event),
    onFrame: (frame) => current.alive && onFrame(frame),
    onClose: () => current.fail(),
  });
  current.cleanups.push(() => socket.close());
}

/** How to watch over each transport, in the order in which they are tried. */
const TRANSPORTS = {
  async whep(current) {
    const session = new WhepSession(`${base}/whep?alpha=stacked`, {
      fetch: send,
      onTrack(track) {
        const video = createVideo(current);
        video.srcObject = new MediaStream([track]);
        video.play().catch(() => {});
      },
      onFail: () => current.fail(),
    });
    // Deleted even while connected: OBS may end the page before WebRTC has told the server.
    current.cleanups.push(() => session.close(true));
    await session.open();
  },

  async fmp4(current) {
    const player = new FragmentPlayer(createVideo(current));
    current.cleanups.push(() => player.close());
    player.video.addEventListener("error", () => current.fail());
    await player.open();
    listen(current, "fmp4", ({ data }) => {
      try {
        player.append(data);
      } catch {
        current.fail();
      }
    });
  },

  async mjpeg(current) {
    let decoding = false;
    listen(current, "mjpeg", async ({ data }) => {
      if (decoding) return;
      decoding = true;
      try {
        const bitmap = await decodeJpeg(data);
        current.show(bitmap, bitmap.width, bitmap.height);
        bitmap.close();
      } catch {
        current.fail();
      } finally {
        decoding = false;
      }
    });
  },
};
const ORDER = Object.keys(TRANSPORTS);

// From one attempt to the next

async function connect() {
  if (attempt || over || !visible) return;
  const current = (attempt = new Attempt(ORDER[preferred]));
  document.body.dataset.transport = current.transport;
  try {
    const response = await send(base, { cache: "no-store" });
    if ([401, 403, 404].includes(response.status)) return finish();
    if (!response.ok) throw new Error(`status ${response.status}`);
    const { state } = await response.json();
    if (!current.alive) return;
    if (state === "ended" || state === "failed") return finish();
    if (state === "queued") return connectLater(current, 1000);
    current.still = state === "paused" && current.transport !== "whep";
    current.found = true;
    await TRANSPORTS[current.transport](current);
  } catch {
    current.fail();
  }
}

/** Start another attempt after one that failed, over the next transport if this one showed nothing. */
function retry(failed) {
  if (failed.frames && performance.now() - failed.startedAt > STEADY_MS) failures = 0;
  if (!failed.frames && failed.found) preferred = (preferred + 1) % ORDER.length;
  document.body.dataset.state = "lost";
  // The random factor keeps many overlays from returning at the same moment.
  connectLater(failed, retryDelay(failures, MAX_RETRY_MS) * (0.5 + Math.random()));
  failures += 1;
}

function connectLater(current, ms) {
  current.stop();
  attempt = null;
  clearTimeout(timer);
  timer = setTimeout(connect, ms);
}

/** The stream is over, or this page may not see it: stop for good. */
function finish() {
  over = true;
  attempt?.stop();
  attempt = null;
  document.body.dataset.state = "over";
}

setInterval(() => {
  if (!attempt) return;
  const now = performance.now();
  const waited = now - attempt.startedAt > FIRST_FRAME_MS;
  const silent = !attempt.still && now - attempt.heardAt > SILENCE_MS;
  if (attempt.frames ? silent : waited) attempt.fail();
}, 250);

// OBS tells the page when its source is hidden: it then takes no frames.

function setVisible(shown) {
  if (visible === shown) return;
  visible = shown;
  if (shown) connect();
  else {
    clearTimeout(timer);
    attempt?.stop();
    attempt = null;
  }
}

for (const [name, field] of [["obsSourceVisibleChanged", "visible"], ["obsSourceActiveChanged", "active"]]) {
  addEventListener(name, ({ detail }) => setVisible(Boolean(detail?.[field])));
}
addEventListener("pagehide", () => attempt?.stop());

connect();
