// Sending a stream on: links to watch it, the overlay, outputs by RTMP and WHIP, and what of it is transparent.

import { api, tokenIn } from "./api.js";
import { $, action, alertError, button, copy, el, input } from "./dom.js";
import { decodeJpeg, openSocket } from "./js/index.js";
import { playing } from "./stream.js";

/** @typedef {import("./api.js").Json} Json */

const LINK_SECONDS = 86_400; // that a link lets others watch, where the server has keys
const REFRESH_MS = 2000;

/**
 * An address of this server that shows the stream.
 *
 * @param {(id: string) => string} path Relative to this page.
 */
async function link(path) {
  const stream = playing();
  if (!stream) return null;
  const { token } = await api("POST", `v1/streams/${stream.id}/tokens`, { scope: "view", expires_in_s: LINK_SECONDS });
  const url = new URL(path(stream.id), document.baseURI);
  if (token) url.searchParams.set("token", token);
  return url.href;
}

/** @param {(id: string) => string} path */
async function copyLink(path) {
  try {
    const url = await link(path);
    if (!url) return;
    $("link", HTMLOutputElement).value = url;
    await copy(url);
  } catch (error) {
    alertError(error);
  }
}

async function addOutput() {
  const stream = playing();
  const url = input("output-url").value.trim();
  if (!stream || !url) return;
  const token = input("output-token").value.trim();
  try {
    await api("POST", `v1/streams/${stream.id}/outputs`, token ? { url, token } : { url });
    input("output-url").value = input("output-token").value = "";
  } catch (error) {
    alertError(error);
  }
  await showOutputs();
}

async function showOutputs() {
  const stream = playing();
  if (!$("share", HTMLDetailsElement).open) return;
  const path = `v1/streams/${stream?.id}/outputs`;
  const found = stream?.id ? await api("GET", path, undefined, { background: true }).catch(() => null) : null;
  $("outputs").replaceChildren(...(found?.data ?? []).map((/** @type {Json} */ output) =>
    el("li", {}, el("p", { class: "name" }, output.url), el("p", { class: "when" }, output.error?.message ?? output.state),
      el("div", { class: "doing" }, action("Remove", () => {
        api("DELETE", `${path}/${output.id}`).then(showOutputs).catch(alertError);
      })))));
}

// The matte

async function applyMatte() {
  const stream = playing();
  if (!stream) return;
  const mode = $("matte-mode", HTMLSelectElement).value;
  try {
    if (mode === "none") await api("DELETE", `v1/streams/${stream.id}/matte`);
    else {
      const [tolerance, softness] = [input("matte-tolerance").valueAsNumber, input("matte-softness").valueAsNumber];
      const color = mode === "chroma" ? { color: input("matte-color").value } : {};
      await api("PUT", `v1/streams/${stream.id}/matte`, { mode, tolerance, softness, ...color });
    }
    input("matte-color").disabled = mode !== "chroma";
    preview(mode !== "none");
  } catch (error) {
    alertError(error);
  }
}

/** @type {WebSocket | null} */
let previewed = null;

/**
 * Show the stream with its transparency over a chequered ground, or stop that.
 *
 * @param {boolean} on
 */
function preview(on) {
  const canvas = $("matte-preview", HTMLCanvasElement);
  const stream = playing();
  canvas.hidden = !on || !stream;
  if (canvas.hidden) {
    previewed?.close();
    previewed = null;
  } else if (stream && !previewed) {
    previewed = openSocket(`v1/streams/${stream.id}/ws`, {
      format: "mjpeg",
      alpha: "stacked",
      token: stream.token,
      onEvent() {},
      onFrame: ({ data }) => decodeJpeg(data).then((bitmap) => paint(canvas, bitmap), () => {}),
      onClose() {
        previewed = null;
        canvas.hidden = true;
      },
    });
  }
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {ImageBitmap} stacked The picture above its matte.
 */
function paint(canvas, stacked) {
  const [width, height] = [stacked.width, stacked.height / 2];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) return;
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  context.globalCompositeOperation = "copy";
  context.drawImage(stacked, 0, -height);
  const matte = context.getImageData(0, 0, width, height).data;
  context.drawImage(stacked, 0, 0);
  stacked.close();
  const picture = context.getImageData(0, 0, width, height);
  // Codecs turn black and white slightly grey.
  for (let at = 0; at < matte.length; at += 4) picture.data[at + 3] = ((matte[at] / 255 - 0.04) / 0.92) * 255;
  context.putImageData(picture, 0, 0);
}

// Other streams of the server, side by side

/** @type {string | null} */
let wall = null; // what the wall shows

/** Show the other streams that play, and watch one on a click. */
async function showStreams() {
  const details = $("streams", HTMLDetailsElement);
  if (!details.open) return;
  const found = await api("GET", "v1/streams", undefined, { background: true }).catch(() => null);
  const others = (found?.data ?? []).filter((/** @type {Json} */ each) => ["live", "paused"].includes(each.state) && each.id !== playing()?.id);
  const now = others.map((/** @type {Json} */ each) => `${each.id} ${each.prompt}`).join();
  if (now === wall) return;
  wall = now;
  $("wall").replaceChildren(...(others.length ? others : [null]).map((/** @type {Json | null} */ each) => {
    if (!each) return el("li", { class: "empty" }, "No other stream plays.");
    const token = tokenIn(each.ws_url);
    const src = `v1/streams/${each.id}/mjpeg${token ? `?token=${encodeURIComponent(token)}` : ""}`;
    return el("li", {}, el("a", { href: `?watch=${each.id}`, target: "_blank", rel: "opener" },
      el("img", { src, alt: "", width: each.width, height: each.height }), el("span", {}, each.prompt)));
  }));
}

function closeStreams() {
  wall = null;
  $("wall").replaceChildren(); // ends the connections of the pictures
}

button("copy-view").addEventListener("click", () => copyLink((id) => `?watch=${id}`));
button("copy-overlay").addEventListener("click", () => copyLink((id) => `overlay/${id}`));
$("output-form").addEventListener("submit", (event) => {
  event.preventDefault();
  addOutput();
});
for (const id of ["matte-mode", "matte-color", "matte-tolerance", "matte-softness"]) $(id).addEventListener("change", applyMatte);
$("share").addEventListener("toggle", () => {
  if (!$("share", HTMLDetailsElement).open) preview(false);
  showOutputs();
});
$("streams").addEventListener("toggle", () => ($("streams", HTMLDetailsElement).open ? showStreams() : closeStreams()));
document.addEventListener("stream", () => {
  const there = Boolean(playing()?.id);
  for (const each of $("share").querySelectorAll("button, input, select")) each.toggleAttribute("disabled", !there);
  if (!there) preview(false);
});
setInterval(() => {
  if (document.hidden) return;
  showOutputs();
  showStreams();
}, REFRESH_MS);
document.dispatchEvent(new Event("stream"));
