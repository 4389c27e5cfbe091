// The prompt timeline: which prompt begins when. It can be taken from what was played, edited, scheduled ahead while a
// stream plays, kept in a file, and played again: with the same seed the frames are the same.

import { api } from "./api.js";
import { $, action, alertError, alertUser, button, download, el, input } from "./dom.js";
import { ACTIVE, pageState } from "./stage.js";
import { latest, play, playing, schedule } from "./stream.js";
import { showTakes } from "./takes.js";

/** @typedef {{ at_s: number, prompt: string, transition: string }} Line */
/** @typedef {{ seed: number | null, lines: Line[] }} Script */

const NAMES = { recache: "Continue", soft: "Blend", cut: "New scene" };
const STEP_SECONDS = 4; // between the last line and a new one
const CLOCK_RATE = 90_000;
const MOST_SECONDS = 86_400;

/** @type {Script} */
let script = { seed: null, lines: [] };

/**
 * Read a script that was saved.
 *
 * @param {string} text
 * @returns {Script}
 * @throws {Error} When it is none.
 */
export function parseScript(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error("This file is no timeline: it is not JSON.");
  }
  const lines = found?.prompts;
  const sound = Array.isArray(lines) && lines.length && lines.every((line) =>
    typeof line?.prompt === "string" && line.prompt.trim() && line.at_s >= 0 && line.at_s <= MOST_SECONDS
    && line.transition in NAMES);
  if (!sound) throw new Error("This file is no timeline: `prompts` must be a list of `at_s`, `prompt` and `transition`.");
  if (found.seed != null && !(Number.isSafeInteger(found.seed) && found.seed >= 0)) {
    throw new Error("This file is no timeline: `seed` must be an integer from 0.");
  }
  return { seed: found.seed ?? null, lines: sorted(lines.map(({ at_s, prompt, transition }) => ({ at_s, prompt, transition }))) };
}

/**
 * By time; the first line begins at 0, and of lines at the same time the last one counts.
 *
 * @param {Line[]} lines
 */
export function sorted(lines) {
  const times = new Map(lines.map((line) => [line.at_s, line]));
  const rising = [...times.values()].sort((a, b) => a.at_s - b.at_s);
  if (rising.length) rising[0] = { ...rising[0], at_s: 0 };
  return rising;
}

/** Take what has been played, and what is scheduled, as the script. */
function takePlayed() {
  const stream = latest();
  if (!stream) return alertUser("Play something first.");
  script = { seed: stream.seed, lines: sorted([...stream.played, .../** @type {Line[]} */ (stream.scheduled)]) };
  render();
}

/** The changes after the first prompt, as the API takes them. */
function changes() {
  return script.lines.slice(1).map(({ at_s, prompt, transition }) => ({ at_s, prompt: prompt.trim(), transition }));
}

function isReady() {
  if (script.lines.length && script.lines.every((line) => line.prompt.trim())) return true;
  alertUser(script.lines.length ? "Every line of the timeline needs a prompt." : "Add a line to the timeline first.");
  return false;
}

function playScript() {
  if (!isReady()) return;
  const seed = script.seed ?? undefined;
  play({ prompt: script.lines[0].prompt.trim(), seed, prompts: changes(), image: latest()?.image ?? null });
}

/** Schedule the lines that are still ahead of what is being generated. */
async function scheduleAhead() {
  const stream = playing();
  if (!stream || !isReady()) return;
  const ahead = (stream.generatedUntil / CLOCK_RATE) + (2 * stream.chunkFrames) / stream.fps;
  const coming = changes().filter((line) => line.at_s >= ahead);
  if (!coming.length) return alertUser(`Every line lies in what is generated: give a time after ${ahead.toFixed(1)} s.`);
  await schedule(coming);
}

async function renderClip() {
  if (!isReady()) return;
  const last = script.lines[script.lines.length - 1].at_s;
  const extra = { prompts: changes(), ...(script.seed === null ? {} : { seed: script.seed }) };
  try {
    await api("POST", "v1/videos", { prompt: script.lines[0].prompt.trim(), seconds: Math.ceil(last + STEP_SECONDS), extra });
    $("takes", HTMLDetailsElement).open = true;
    await showTakes();
  } catch (error) {
    alertError(error);
  }
}

function save() {
  if (!isReady()) return;
  const text = JSON.stringify({ livereel_timeline: 1, seed: script.seed, prompts: script.lines }, null, 2);
  download(new Blob([text], { type: "application/json" }), "timeline.json");
}

async function load() {
  const [chosen] = input("script-file").files ?? [];
  input("script-file").value = "";
  if (!chosen) return;
  try {
    script = parseScript(await chosen.text());
    render();
  } catch (error) {
    alertError(error);
  }
}

/** @param {number} index */
function lineRow(index) {
  const line = script.lines[index];
  const label = index ? `line ${index + 1}` : "the first prompt";
  const time = el("input", {
    type: "number", min: 0, max: MOST_SECONDS, step: 0.25, value: Number(line.at_s.toFixed(4)), disabled: index === 0,
    "aria-label": `Seconds at which ${label} begins`,
    onchange: () => {
      line.at_s = Math.min(MOST_SECONDS, Math.max(0, time.valueAsNumber || 0));
      script.lines = sorted(script.lines);
      render();
    },
  });
  const text = el("input", {
    type: "text", value: line.prompt, maxlength: 4096, "aria-label": `Prompt of ${label}`,
    oninput: () => (line.prompt = text.value),
  });
  const how = el("select", {
    "aria-label": `Transition to ${label}`, disabled: index === 0, onchange: () => (line.transition = how.value),
  }, ...Object.entries(NAMES).map(([value, name]) => el("option", { value, selected: value === line.transition }, name)));
  /** @param {number} by */
  const move = (by) => {
    const other = script.lines[index + by];
    [line.prompt, other.prompt] = [other.prompt, line.prompt];
    [line.transition, other.transition] = [other.transition, line.transition];
    render();
  };
  return el("li", {}, time, text, how,
    action("↑", () => move(-1), { "aria-label": `Move ${label} up`, disabled: index === 0 }),
    action("↓", () => move(1), { "aria-label": `Move ${label} down`, disabled: index === script.lines.length - 1 }),
    action("×", () => {
      script.lines = sorted(script.lines.filter((each) => each !== line));
      render();
    }, { "aria-label": `Remove ${label}` }));
}

function render() {
  $("script-lines").replaceChildren(...script.lines.map((_, index) => lineRow(index)));
  $("script-seed").textContent = script.seed === null ? "any seed" : `seed ${script.seed}`;
  button("script-schedule").disabled = !playing() || !ACTIVE.includes(pageState());
}

button("script-take").addEventListener("click", takePlayed);
button("script-add").addEventListener("click", () => {
  const last = script.lines[script.lines.length - 1];
  const prompt = $("prompt", HTMLTextAreaElement).value.trim();
  script.lines.push({ at_s: last ? last.at_s + STEP_SECONDS : 0, prompt, transition: "recache" });
  render();
});
button("script-play").addEventListener("click", playScript);
button("script-schedule").addEventListener("click", scheduleAhead);
button("script-clip").addEventListener("click", renderClip);
button("script-save").addEventListener("click", save);
button("script-load").addEventListener("click", () => input("script-file").click());
input("script-file").addEventListener("change", load);
document.addEventListener("stream", () => (button("script-schedule").disabled = !playing()));
render();
