// What the user asks for: the prompt, how the picture changes to it, a picture to start from, the seed.

import { chosenModel, markUnknownWords, options } from "./controls.js";
import { $, alertUser, button, copy, el, input } from "./dom.js";
import { onPromptChosen } from "./log.js";
import { pageState } from "./stage.js";
import { change, latest, play, playing } from "./stream.js";

const EXAMPLES = [
  "a shiny red cube bouncing on grass at sunset, orbiting camera",
  "a big blue ring spinning on sand under the northern lights",
  "a striped orange ball floating over water on a sunny day",
  "a pink cone sliding on a checkerboard at night, with a small white cube on its left",
];
const MAX_PROMPT_BYTES = 4096;

const box = $("prompt", HTMLTextAreaElement);

/** @type {File | null} What the next stream continues from. */
let picture = null;

/** The prompt in the box on one line; null, and the user is told, if it cannot be used. */
function typed() {
  const prompt = box.value.replace(/\s+/g, " ").trim();
  if (!prompt) {
    alertUser("Type what you want to see first.");
    box.focus();
    return null;
  }
  if (new TextEncoder().encode(prompt).length > MAX_PROMPT_BYTES) {
    alertUser(`The sentence is too long: at most ${MAX_PROMPT_BYTES} bytes.`);
    return null;
  }
  return prompt;
}

/** @returns {string} The transition that is chosen. */
function transition() {
  const chosen = document.querySelector("input[name=transition]:checked");
  return chosen instanceof HTMLInputElement ? chosen.value : "recache";
}

/** The seed for the next stream: that of the last one, if it is locked. */
function seed() {
  return input("lock").checked ? (latest()?.seed ?? undefined) : undefined;
}

/** @param {string} prompt */
function open(prompt) {
  play({ prompt, seed: seed(), image: picture, model: chosenModel(), ...options() });
}

function submit() {
  const prompt = typed();
  if (prompt === null) return;
  $("alert").hidden = true;
  const current = playing();
  if (!current || picture) open(prompt); // a picture starts a new scene
  else if (!current.id) alertUser("The stream is just being asked for: wait a moment.");
  else change(prompt, transition());
  choosePicture(null);
  markUnknownWords(""); // the server names them now
}

/** The same prompt again, with other noise. */
export function anotherTake() {
  const current = playing();
  if (current?.id) change(current.prompt, "cut");
  else if (latest()) play({ prompt: latest()?.prompt ?? "", image: latest()?.image ?? null });
}

function fit() {
  const { scrollTop } = box;
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`; // the style sheet bounds it
  box.scrollTop = scrollTop;
  const bytes = new TextEncoder().encode(box.value).length;
  $("count").hidden = bytes < MAX_PROMPT_BYTES * 0.8;
  $("count").textContent = `${bytes} / ${MAX_PROMPT_BYTES} bytes`;
}

/**
 * Replace the prompt in a way that the browser's undo takes back.
 *
 * @param {string} text
 */
function replacePrompt(text) {
  box.focus();
  box.select();
  if (document.execCommand("insertText", false, text)) return; // `input` calls `fit`
  box.value = text;
  fit();
}

// The picture that a stream starts from

/** @param {File | null} file */
function choosePicture(file) {
  picture = file;
  const thumbnail = $("image-thumbnail", HTMLImageElement);
  URL.revokeObjectURL(thumbnail.src);
  thumbnail.removeAttribute("src");
  thumbnail.hidden = !file?.type.startsWith("image/");
  if (file && !thumbnail.hidden) thumbnail.src = URL.createObjectURL(file);
  $("image-name").textContent = file ? file.name : "Picture";
  $("image-remove").hidden = !file;
  if (!file) input("image").value = "";
}

/** @param {DataTransfer | null} data */
function pictureIn(data) {
  return [...(data?.files ?? [])].find((file) => /^(image|video)\//.test(file.type)) ?? null;
}

/** @type {MediaStream | null} */
let camera = null;

async function openCamera() {
  try {
    camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    return alertUser("The camera cannot be used: allow it for this page.");
  }
  const video = $("camera-video", HTMLVideoElement);
  video.srcObject = camera;
  $("camera", HTMLDialogElement).showModal();
  await video.play().catch(() => {});
}

function takePicture() {
  const video = $("camera-video", HTMLVideoElement);
  const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d")?.drawImage(video, 0, 0);
  canvas.toBlob((blob) => blob && choosePicture(new File([blob], "camera.jpg", { type: "image/jpeg" })), "image/jpeg", 0.92);
  $("camera", HTMLDialogElement).close();
}

// The seed of the stream

function showSeed() {
  const known = latest()?.seed;
  $("seed-row").hidden = known == null;
  $("seed").textContent = known == null ? "" : String(known);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  event.preventDefault();
  submit();
});
box.addEventListener("input", () => {
  fit();
  markUnknownWords(box.value);
});
box.addEventListener("paste", (event) => {
  const file = pictureIn(event.clipboardData);
  if (!file) return;
  event.preventDefault();
  choosePicture(file);
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const file = pictureIn(event.dataTransfer);
  if (file) choosePicture(file);
});
input("image").addEventListener("change", () => choosePicture(input("image").files?.[0] ?? null));
button("image-remove").addEventListener("click", () => choosePicture(null));
button("camera-open").hidden = !navigator.mediaDevices;
button("camera-open").addEventListener("click", openCamera);
button("camera-take").addEventListener("click", takePicture);
button("camera-cancel").addEventListener("click", () => $("camera", HTMLDialogElement).close());
$("camera").addEventListener("close", () => camera?.getTracks().forEach((track) => track.stop()));
addEventListener("resize", fit);
button("another").addEventListener("click", anotherTake);
button("seed-copy").addEventListener("click", () => copy($("seed").textContent ?? ""));
document.addEventListener("stream", () => {
  showSeed();
  button("another").disabled = !latest()?.prompt || pageState() === "queued";
});
onPromptChosen((prompt) => {
  replacePrompt(prompt);
  submit();
});
for (const text of EXAMPLES) {
  const chip = el("button", { type: "button" }, text);
  chip.addEventListener("click", () => {
    replacePrompt(text);
    if (matchMedia("(hover: none)").matches) chip.focus(); // the keyboard of a phone would cover the picture
    submit();
  });
  $("examples").append(el("li", {}, chip));
}
fit();
box.focus();
