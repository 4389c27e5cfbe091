// The picture, the glow around it, and what the page says over it.

import { $, button } from "./dom.js";

const canvas = $("picture", HTMLCanvasElement);
const picture = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { alpha: false }));
const glow = /** @type {CanvasRenderingContext2D} */ ($("glow", HTMLCanvasElement).getContext("2d"));

/** States in which a stream is there. */
export const ACTIVE = ["queued", "starting", "live", "paused"];

/**
 * @param {CanvasImageSource} image
 * @param {number} width In pixels.
 * @param {number} height
 */
export function draw(image, width, height) {
  setGeometry(width, height);
  picture.drawImage(image, 0, 0);
  glow.drawImage(image, 0, 0, 16, 16);
}

/**
 * @param {number} width
 * @param {number} height
 */
export function setGeometry(width, height) {
  if (canvas.width === width && canvas.height === height) return;
  canvas.width = width;
  canvas.height = height;
  $("stage").style.setProperty("--aspect", `${width} / ${height}`);
}

/** @returns {string} What the page is doing: `idle`, a state of the stream, `ended` or `failed`. */
export function pageState() {
  return document.body.dataset.state ?? "idle";
}

/**
 * @param {string} state
 * @param {import("./stream.js").Stream | null} stream
 * @param {string} title
 * @param {string} detail
 */
export function show(state, stream, title, detail) {
  const active = ACTIVE.includes(state);
  const focused = document.activeElement;
  document.body.dataset.state = state;
  if (stream) stream.message = [title, detail];
  showStatus(stream);
  $("play").textContent = active ? "Apply" : "Play";
  $("stop").hidden = !active;
  $("pause").hidden = state !== "live" && state !== "paused";
  $("pause").textContent = state === "paused" ? "Resume" : "Pause";
  if (active) $("alert").hidden = true;
  document.dispatchEvent(new Event("stream"));
  // A control that is hidden now would drop the focus.
  if (focused && focused !== document.body && !focused.checkVisibility({ visibilityProperty: true })) {
    button("play").focus({ preventScroll: true });
  }
}

/**
 * Show in the badge and over the picture what the stream is doing, or what keeps it from doing that.
 *
 * @param {import("./stream.js").Stream | null} stream
 */
export function showStatus(stream) {
  const state = pageState();
  let [title, detail] = stream?.message ?? ["", ""];
  let trouble = "";
  if (!stream || stream.over) trouble = "";
  else if (stream.lost) {
    trouble = "reconnecting";
    [title, detail] = ["Connection lost", stream.retryText];
  } else if (stream.interrupted) {
    trouble = "engine restarting";
    // Frames that were generated before still play.
    if (stream.stalled || state === "starting") {
      [title, detail] = ["The engine is restarting", "The stream goes on when it is back."];
    }
  } else if (stream.stalled) trouble = "stalled";
  if (trouble) document.body.dataset.trouble = trouble;
  else delete document.body.dataset.trouble;
  $("badge-text").textContent = trouble || state;
  $("message").classList.toggle("empty", !title);
  $("message-title").textContent = title;
  $("message-detail").textContent = detail;
}

/** @returns {Promise<Blob>} The picture on screen, as PNG. */
export function snapshot() {
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("There is no picture to save."))), "image/png");
  });
}

/** @returns {MediaStream} The picture as it changes. */
export function captureStage() {
  return canvas.captureStream();
}

const video = document.createElement("video");
video.muted = true;

/** Show the picture in a small window above all others, or take it back. */
export async function togglePictureInPicture() {
  if (document.pictureInPictureElement) return void (await document.exitPictureInPicture());
  video.srcObject ??= captureStage();
  await video.play();
  await video.requestPictureInPicture();
}

export function toggleFullscreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else canvas.parentElement?.requestFullscreen().catch(() => {});
}

button("scaling").addEventListener("click", () => {
  button("scaling").setAttribute("aria-pressed", String(canvas.classList.toggle("pixels")));
});
button("fullscreen").addEventListener("click", toggleFullscreen);
button("pip").hidden = !document.pictureInPictureEnabled;
button("pip").addEventListener("click", () => togglePictureInPicture().catch(() => {}));
