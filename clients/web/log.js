// The list of prompts that were asked for and what became of each. A click on one asks for it again.

import { $, el } from "./dom.js";

/** @typedef {{ item: HTMLLIElement, when: HTMLSpanElement }} Entry */

const ENTRIES_SHOWN = 30;
const IGNORED_SHOWN = 12; // words that the model ignores; of more the number is said

/** @type {(prompt: string) => void} */
let onChosen = () => {};

/** @param {(prompt: string) => void} listener Called with the prompt of an entry that was clicked. */
export function onPromptChosen(listener) {
  onChosen = listener;
}

/**
 * @param {{ prompt: string, text: string, kind: string }} entry `kind` is `waiting`, `applied` or `refused`.
 * @returns {Entry}
 */
export function addEntry({ prompt, text, kind }) {
  const when = el("span", { class: "when" });
  const again = el("button", { type: "button", title: "Show this again", onclick: () => onChosen(prompt) }, prompt);
  const item = el("li", {}, again, when);
  const log = $("log");
  log.querySelector(".empty")?.remove();
  log.prepend(item);
  while (log.children.length > ENTRIES_SHOWN) log.lastElementChild?.remove();
  const entry = { item, when };
  setEntry(entry, text, kind);
  return entry;
}

/**
 * @param {Entry} entry
 * @param {string} text
 * @param {string} kind
 */
export function setEntry({ item, when }, text, kind) {
  item.className = kind;
  when.textContent = text;
}

/**
 * Name the words of the prompt that the model ignores.
 *
 * @param {import("./stream.js").Stream} stream
 * @param {import("./api.js").Json} info
 */
export function showIgnoredWords(stream, { model, ignored_words: words }) {
  stream.ignored = words;
  $("ignored").hidden = !words?.length;
  if (!words?.length) return;
  const more = words.length > IGNORED_SHOWN ? ` and ${words.length - IGNORED_SHOWN} more` : "";
  $("ignored").textContent = `${model} ignores these words: ${words.slice(0, IGNORED_SHOWN).join(", ")}${more}.`;
}
