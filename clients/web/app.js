// The studio page. It plays one stream at a time; each module beside this one has a part of the page. There is no build
// step and no third-party script.

import { ApiError, api, useToken } from "./api.js";
import { anotherTake } from "./composer.js";
import { showModels } from "./controls.js";
import { $, button } from "./dom.js";
import { updateFigures } from "./figures.js";
import "./script.js";
import "./share.js";
import { setGeometry, toggleFullscreen } from "./stage.js";
import { chunkOnScreen, latest, togglePause, watch, watchdog } from "./stream.js";
import { saveSnapshot, toggleRecording } from "./takes.js";

const THEMES = ["auto", "light", "dark"];

/** @type {Record<string, () => void>} Keys that act while no text is being typed. */
const SHORTCUTS = {
  " ": togglePause,
  f: toggleFullscreen,
  r: toggleRecording,
  s: saveSnapshot,
  t: anotherTake,
  "?": toggleHelp,
  "/": () => $("prompt").focus(),
};

function toggleHelp() {
  const help = $("help", HTMLDialogElement);
  if (help.open) help.close();
  else help.showModal();
}

async function updateServer() {
  let text;
  let wait = 5000;
  try {
    const { data } = await api("GET", "v1/models", undefined, { background: true });
    const model = data.find((/** @type {{default: boolean}} */ each) => each.default) ?? data[0];
    text = model ? `${model.id} · ${model.width}×${model.height} · ${model.fps} frames/s` : "the engine is starting…";
    if (model && !latest()) setGeometry(model.width, model.height);
    showModels(data);
    wait = model ? 15000 : 1000;
  } catch (error) {
    if (error instanceof ApiError) text = error.status === 401 ? "the server needs an API key" : error.message;
    else text = "the server cannot be reached";
  }
  $("model").textContent = text;
  setTimeout(updateServer, wait);
}

/** @param {string} theme */
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
  $("theme").textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme] ?? theme;
}

addEventListener("keydown", (event) => {
  const typing = event.target instanceof Element && event.target.closest("input, textarea, select, button, a, summary, video");
  if (event.ctrlKey || event.metaKey || event.altKey || (typing && event.key !== "Escape")) return;
  const act = SHORTCUTS[event.key.toLowerCase()];
  if (!act || (document.querySelector("dialog[open]") && act !== toggleHelp)) return;
  event.preventDefault();
  act();
});
button("help-open").addEventListener("click", toggleHelp);
button("help-close").addEventListener("click", toggleHelp);
button("health").addEventListener("click", () => {
  const drawer = $("figures", HTMLDetailsElement);
  drawer.open = !drawer.open;
  if (drawer.open) drawer.scrollIntoView({ block: "nearest" });
});
button("theme").addEventListener("click", () => {
  const now = THEMES.indexOf(document.documentElement.dataset.theme ?? "auto");
  setTheme(THEMES[(now + 1) % THEMES.length]);
});
setTheme(THEMES.find((theme) => theme === localStorage.getItem("theme")) ?? "auto");
setInterval(() => {
  watchdog();
  const current = latest();
  if (current) updateFigures(current, chunkOnScreen(current));
}, 250);
updateServer();

// A link that somebody was given: this page only watches.
const query = new URLSearchParams(location.search);
const watched = query.get("watch");
if (watched && /^st_\w+$/.test(watched)) {
  const token = query.get("token");
  if (token) useToken(token);
  document.body.dataset.guest = "";
  watch(watched);
}

