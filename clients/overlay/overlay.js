// The stream of this address with its transparency, for OBS and whatever else lays a page over a picture.
//
// Every frame comes above its matte (`alpha=stacked`), and WebGL puts the two together. WHEP first; what shows nothing
// gives way to fragments of MP4, then to JPEGs. `?token=` lets it in where the server has keys; `?lost=hide` hides the
// last picture while a lost connection is tried again.
"use strict";

const FIRST_MS = 5000; // a transport that has shown nothing by then gives way to the next
const SILENT_MS = 2000; // frames that stay away for so long are a lost connection
const STEADY_MS = 10000; // who has played for so long starts counting failures anew
const RETRY_MS = [500, 10000];
const LAG_SECONDS = 1; // further behind than this, MP4 jumps to its end
const KEPT_SECONDS = 10; // of MP4 that was played
const HEADER_BYTES = 16;
const MP4 = 'video/mp4; codecs="avc1.42c01f"';

const query = new URLSearchParams(location.search);
const token = query.get("token") ?? "";
const base = `/v1/streams/${location.pathname.split("/")[2]}`;
const authorization = token ? { Authorization: `Bearer ${token}` } : {};
const canvas = document.getElementById("picture");
document.body.dataset.lost = query.get("lost") === "hide" ? "hide" : "hold";

let run = null; // the attempt under way
let timer = 0; // the next one
let failures = 0;
let preferred = 0; // index of the transport to try
let visible = true;
let over = false;

// the picture

const VERTEX = `
attribute vec2 corner;
varying vec2 at;
void main() {
  at = vec2(corner.x, -corner.y) * 0.5 + 0.5;
  gl_Position = vec4(corner, 0.0, 1.0);
}`;

// Half a pixel stays away from the seam between the halves; codecs leave black and white a little grey.
const FRAGMENT = `
precision highp float;
uniform sampler2D picture;
uniform float inset;
varying vec2 at;
void main() {
  vec2 color = vec2(at.x, clamp(at.y, inset, 1.0 - inset) * 0.5);
  float matte = texture2D(picture, color + vec2(0.0, 0.5)).r;
  float alpha = clamp((matte - 0.04) / 0.92, 0.0, 1.0);
  gl_FragColor = vec4(texture2D(picture, color).rgb * alpha, alpha);
}`;

function painter() {
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

let paint = painter();
canvas.addEventListener("webglcontextlost", (event) => {
  event.preventDefault();
  paint = null;
});
canvas.addEventListener("webglcontextrestored", () => { paint = painter(); });

// one attempt

class Run {
  constructor(transport) {
    this.transport = transport;
    this.startedAt = this.seenAt = performance.now();
    this.frames = 0;
    this.quiet = false; // paused or stalled: no frames are to be expected
    this.alive = true;
    this.ends = []; // what to do when it is over
  }

  show(source, width, height) {
    if (!this.alive || !width || !height) return;
    paint?.(source, width, height);
    this.frames += 1;
    this.seenAt = performance.now();
    document.body.dataset.state = "playing";
  }

  event({ type, state, phase }) {
    if (type === "ended") finish();
    else if (type === "state") this.quiet = state === "paused";
    else if (type === "stall") this.quiet = phase === "began";
    else if (type === "error") return;
    this.seenAt = performance.now();
  }

  fail() {
    if (this.alive) lost(this);
  }

  stop() {
    this.alive = false;
    for (const end of this.ends) end();
  }
}

/** Call `step` for each frame that a video shows, while the attempt lasts. */
function follow(attempt, video) {
  const step = () => {
    if (!attempt.alive) return;
    attempt.show(video, video.videoWidth, video.videoHeight);
    video.requestVideoFrameCallback(step);
  };
  video.requestVideoFrameCallback(step);
}

function player(attempt) {
  const video = document.createElement("video");
  video.muted = video.playsInline = video.autoplay = true;
  attempt.ends.push(() => {
    video.srcObject = null;
    video.removeAttribute("src");
    video.load();
  });
  follow(attempt, video);
  return video;
}

const TRANSPORTS = {
  async whep(attempt) {
    const url = `${base}/whep?alpha=stacked`;
    const peer = new RTCPeerConnection();
    attempt.ends.push(() => peer.close());
    peer.addTransceiver("video", { direction: "recvonly" });
    peer.onconnectionstatechange = () => peer.connectionState === "failed" && attempt.fail();
    peer.ontrack = ({ track }) => {
      const video = player(attempt);
      video.srcObject = new MediaStream([track]);
      video.play().catch(() => {});
    };
    const links = (await fetch(url, { method: "OPTIONS", headers: authorization })).headers.get("Link") ?? "";
    const servers = Array.from(links.matchAll(/<((?:stun|turns?):[^>]+)>([^<]*)/g), ([, urls, rest]) => ({
      urls,
      username: /username="([^"]*)"/.exec(rest)?.[1],
      credential: /credential="([^"]*)"/.exec(rest)?.[1],
    }));
    if (servers.length) peer.setConfiguration({ iceServers: servers });
    await peer.setLocalDescription();
    const headers = { ...authorization, "Content-Type": "application/sdp" };
    const answer = await fetch(url, { method: "POST", headers, body: peer.localDescription.sdp });
    if (answer.status !== 201) throw new Error(`status ${answer.status}`);
    const session = answer.headers.get("Location");
    const hangUp = () => fetch(session, { method: "DELETE", headers: authorization, keepalive: true }).catch(() => {});
    if (!attempt.alive) return void hangUp();
    attempt.ends.push(hangUp);
    await peer.setRemoteDescription({ type: "answer", sdp: await answer.text() });
  },

  async fmp4(attempt) {
    if (!MediaSource.isTypeSupported(MP4)) throw new Error("no H.264");
    const source = new MediaSource();
    const video = player(attempt);
    const url = URL.createObjectURL(source);
    attempt.ends.push(() => URL.revokeObjectURL(url));
    video.src = url;
    await new Promise((opened) => source.addEventListener("sourceopen", opened, { once: true }));
    const buffer = source.addSourceBuffer(MP4);
    const waiting = [];
    const append = () => {
      if (!attempt.alive || buffer.updating) return;
      const ranges = buffer.buffered;
      const end = ranges.length ? ranges.end(ranges.length - 1) : 0;
      const start = ranges.length ? ranges.start(0) : 0;
      // The first fragment stands wherever the stream has come to; and nobody is to see what was long ago.
      if (end - video.currentTime > LAG_SECONDS) video.currentTime = end - 0.1;
      if (waiting.length) buffer.appendBuffer(waiting.shift());
      else if (video.currentTime - start > 2 * KEPT_SECONDS) buffer.remove(start, video.currentTime - KEPT_SECONDS);
    };
    buffer.addEventListener("updateend", append);
    video.addEventListener("error", () => attempt.fail());
    listen(attempt, "fmp4", (data) => {
      waiting.push(data);
      append();
      video.play().catch(() => {});
    });
  },

  async mjpeg(attempt) {
    let busy = false;
    listen(attempt, "mjpeg", async (data) => {
      if (busy) return;
      busy = true;
      try {
        const bitmap = await createImageBitmap(new Blob([data], { type: "image/jpeg" }));
        attempt.show(bitmap, bitmap.width, bitmap.height);
        bitmap.close();
      } catch {
        attempt.fail();
      } finally {
        busy = false;
      }
    });
  },
};
const ORDER = Object.keys(TRANSPORTS);

function listen(attempt, format, onData) {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const address = new URL(`${scheme}://${location.host}${base}/ws?format=${format}&alpha=stacked`);
  if (token) address.searchParams.set("token", token);
  const socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => {
    if (!attempt.alive) return;
    if (typeof data === "string") attempt.event(JSON.parse(data));
    else onData(new Uint8Array(data, HEADER_BYTES));
  };
  socket.onclose = () => attempt.fail();
  attempt.ends.push(() => socket.close());
}

// from one attempt to the next

async function connect() {
  if (run || over || !visible) return;
  const attempt = (run = new Run(ORDER[preferred]));
  document.body.dataset.transport = attempt.transport;
  try {
    const response = await fetch(base, { headers: authorization, cache: "no-store" });
    if ([401, 403, 404].includes(response.status)) return finish();
    if (!response.ok) throw new Error(`status ${response.status}`);
    const { state } = await response.json();
    if (!attempt.alive) return;
    if (state === "ended" || state === "failed") return finish();
    if (state === "queued") return wait(attempt, 1000);
    attempt.quiet = state === "paused" && attempt.transport !== "whep";
    attempt.known = true;
    await TRANSPORTS[attempt.transport](attempt);
  } catch {
    attempt.fail();
  }
}

/** The attempt has failed: the next one, a little later. */
function lost(attempt) {
  if (attempt.frames && performance.now() - attempt.startedAt > STEADY_MS) failures = 0;
  if (!attempt.frames && attempt.known) preferred = (preferred + 1) % ORDER.length;
  failures += 1;
  document.body.dataset.state = "lost";
  const [least, most] = RETRY_MS;
  wait(attempt, Math.min(most, least * 2 ** (failures - 1)) * (0.5 + Math.random()));
}

function wait(attempt, ms) {
  attempt.stop();
  run = null;
  clearTimeout(timer);
  timer = setTimeout(connect, ms);
}

/** The stream is over, or not for us: nothing more will come. */
function finish() {
  over = true;
  run?.stop();
  run = null;
  document.body.dataset.state = "over";
}

setInterval(() => {
  if (!run) return;
  const now = performance.now();
  if (!run.frames ? now - run.startedAt > FIRST_MS : !run.quiet && now - run.seenAt > SILENT_MS) run.fail();
}, 250);

// OBS: who is not shown needs no frames.

function show(shown) {
  if (visible === shown) return;
  visible = shown;
  if (shown) connect();
  else {
    clearTimeout(timer);
    run?.stop();
    run = null;
  }
}

for (const [name, field] of [["obsSourceVisibleChanged", "visible"], ["obsSourceActiveChanged", "active"]]) {
  addEventListener(name, ({ detail }) => show(Boolean(detail?.[field])));
}
addEventListener("pagehide", () => run?.stop());

connect();
