// Takes: recordings, snapshots, the last seconds, and the gallery of films that the server keeps.

import { api, file } from "./api.js";
import { $, action, alertError, alertUser, button, download, el, input } from "./dom.js";
import { captureStage, pageState, snapshot } from "./stage.js";
import { latest, playing } from "./stream.js";

/** @typedef {import("./api.js").Json} Json */

const REPLAY_SECONDS = 15; // that are kept at least
const REFRESH_MS = 2000;
const RATE = 2_500_000; // bits a second of films that the page makes itself

/** @type {string | null} The recording that runs. */
let recording = null;

// Recording on the server

async function toggleRecording() {
  const stream = playing();
  try {
    if (recording) {
      const id = recording;
      recording = null;
      await api("POST", `v1/recordings/${id}/stop`);
    } else if (stream) recording = (await api("POST", `v1/streams/${stream.id}/recordings`, {})).id;
    showTakes();
  } catch (error) {
    alertError(error);
  }
  showButtons();
}

// The last seconds, kept by the page: two recorders take turns, so that one of them always reaches back far enough

/** @typedef {{ recorder: MediaRecorder, parts: Blob[], begun: number }} Tape */

/** @type {Tape[]} The older first. */
let tapes = [];
let turn = 0;
/** @type {{ name: string, blob: Blob }[]} */
const kept = [];

/** @returns {Tape} */
function newTape() {
  const recorder = new MediaRecorder(captureStage(), { videoBitsPerSecond: RATE });
  /** @type {Blob[]} */
  const parts = [];
  recorder.ondataavailable = ({ data }) => parts.push(data);
  recorder.start(1000);
  return { recorder, parts, begun: performance.now() };
}

function toggleReplay() {
  const on = tapes.length === 0;
  clearInterval(turn);
  for (const { recorder } of tapes) if (recorder.state !== "inactive") recorder.stop();
  tapes = [];
  if (on) {
    tapes.push(newTape());
    turn = setInterval(() => {
      if (tapes.length > 1) tapes.shift()?.recorder.stop();
      tapes.push(newTape());
    }, REPLAY_SECONDS * 1000);
  }
  showButtons();
}

function keepLast() {
  const [tape] = tapes;
  if (!tape) return;
  tape.recorder.onstop = () => {
    const blob = new Blob(tape.parts, { type: tape.recorder.mimeType });
    kept.unshift({ name: `Last ${Math.round((performance.now() - tape.begun) / 1000)} s`, blob });
    showTakes();
  };
  tape.recorder.stop();
  tapes = [...tapes.slice(1), newTape()];
}

async function saveSnapshot() {
  try {
    download(await snapshot(), `livereel-${Date.now()}.png`);
  } catch (error) {
    alertError(error);
  }
}

/** Make a clip of the prompts that were played, on the server, with the seconds that the user wants. */
async function makeClip() {
  const stream = latest();
  const seconds = Number(input("clip-seconds").value);
  const prompt = $("prompt", HTMLTextAreaElement).value.trim() || stream?.prompt;
  if (!prompt) return alertUser("Type what you want to see first.");
  try {
    const extra = input("lock").checked && stream?.seed != null ? { seed: stream.seed } : {};
    await api("POST", "v1/videos", { prompt, seconds, extra });
    showTakes();
  } catch (error) {
    alertError(error);
  }
}

// The gallery

/**
 * @param {string} title
 * @param {string} detail
 * @param {HTMLElement[]} actions
 */
function row(title, detail, actions) {
  return el("li", {}, el("p", { class: "name" }, title), el("p", { class: "when" }, detail), el("div", { class: "doing" }, ...actions));
}

/**
 * @param {() => Promise<Blob>} film
 * @param {string} name
 */
function filmActions(film, name) {
  /** @param {(blob: Blob) => void} use */
  const fetched = (use) => () => film().then(use).catch(alertError);
  return [action("Play", fetched((blob) => playFilm(blob, name))), action("Download", fetched((blob) => download(blob, name)))];
}

/**
 * @param {Blob} blob
 * @param {string} name
 */
function playFilm(blob, name) {
  const dialog = $("film", HTMLDialogElement);
  const video = $("film-video", HTMLVideoElement);
  const url = URL.createObjectURL(blob);
  video.src = url;
  $("film-name").textContent = name;
  dialog.onclose = () => {
    video.pause();
    video.removeAttribute("src");
    URL.revokeObjectURL(url);
  };
  dialog.showModal();
  video.play().catch(() => {});
}

/** @param {string} path */
const remove = (path) => action("Delete", () => api("DELETE", path).then(showTakes).catch(alertError));

/** @param {Json} video */
function clipRow(video) {
  const path = `v1/videos/${video.id}`;
  const prompt = $("prompt", HTMLTextAreaElement);
  const remix = action("Remix", () => {
    const text = prompt.value.trim();
    if (!text || text === video.prompt) return alertUser("Type the new prompt first, then press Remix.");
    api("POST", `${path}/remix`, { prompt: text }).then(showTakes).catch(alertError);
  }, { title: "Make it again with the prompt in the box, and the same seed" });
  const done = video.status === "completed";
  const state = { completed: `clip, ${video.seconds} s`, failed: video.error?.message ?? "failed" }[
    /** @type {"completed" | "failed"} */ (video.status)
  ] ?? `clip, ${video.status === "queued" ? "waiting" : `${video.progress} %`}`;
  return row(video.prompt, state, [...(done ? [...filmActions(() => file(`${path}/content`), `${video.id}.mp4`), remix] : []), remove(path)]);
}

/** @param {Json} film */
function recordingRow(film) {
  const path = `v1/recordings/${film.id}`;
  const running = film.status === "recording";
  const state = film.status === "failed" ? `recording failed: ${film.ended_reason}` : `recording, ${film.duration_s.toFixed(1)} s${running ? ", running" : ""}`;
  const films = film.status === "completed" ? filmActions(() => file(`${path}/content`), `${film.id}.${film.format}`) : [];
  return row(new Date(film.created_at * 1000).toLocaleTimeString(), state, [...films, remove(path)]);
}

let shown = ""; // what the gallery shows, so that it is built again only when that has changed

/** Ask the server for its films, and show them with those that the page keeps. */
export async function showTakes() {
  if (!$("takes", HTMLDetailsElement).open) return;
  const background = { background: true };
  const [clips, films] = await Promise.all([
    api("GET", "v1/videos?limit=20", undefined, background).catch(() => ({ data: [] })),
    api("GET", "v1/recordings", undefined, background).catch(() => ({ data: [] })),
  ]);
  const now = JSON.stringify([clips.data, films.data, kept.length]);
  if (now === shown) return;
  shown = now;
  const rows = [
    ...kept.map(({ name, blob }, index) =>
      row(name, "kept by this page until it is closed", [
        ...filmActions(async () => blob, `livereel-last-${kept.length - index}.webm`),
        action("Delete", () => {
          kept.splice(index, 1);
          showTakes();
        }),
      ]),
    ),
    ...films.data.map(recordingRow),
    ...clips.data.map(clipRow),
  ];
  $("gallery").replaceChildren(...(rows.length ? rows : [el("li", { class: "empty" }, "Nothing recorded yet.")]));
}

function showButtons() {
  const stream = playing();
  const shows = Boolean(stream?.id) && ["live", "paused"].includes(pageState());
  if (!stream) recording = null;
  if (!stream && tapes.length) toggleReplay();
  button("record").disabled = !shows;
  button("record").setAttribute("aria-pressed", String(Boolean(recording)));
  $("record").textContent = recording ? "Stop recording" : "Record";
  button("snapshot").disabled = !latest() || latest()?.pts === -1;
  button("replay").disabled = !shows || !("MediaRecorder" in window);
  button("replay").setAttribute("aria-pressed", String(tapes.length > 0));
  button("keep").disabled = tapes.length === 0;
}

button("record").addEventListener("click", toggleRecording);
button("snapshot").addEventListener("click", saveSnapshot);
button("replay").addEventListener("click", toggleReplay);
button("keep").addEventListener("click", keepLast);
button("make-clip").addEventListener("click", makeClip);
button("film-close").addEventListener("click", () => $("film", HTMLDialogElement).close());
$("takes").addEventListener("toggle", showTakes);
document.addEventListener("stream", () => {
  showButtons();
  showTakes();
});
setInterval(() => document.hidden || showTakes(), REFRESH_MS);
showButtons();

export { saveSnapshot, toggleRecording };
