// Controls that are drawn from what the server says of each model (`GET /v1/models`): the numbers that a stream takes, the
// transitions, and the words of a model with a vocabulary. A new model needs no change here.

import { $, action, el } from "./dom.js";

/** @typedef {import("./api.js").Json} Json */

const UNKNOWN_SHOWN = 12;
const HIDDEN = ["seed"]; // has a control of its own, beside the picture
const WORD = /[a-z0-9]+(?:'[a-z]+)?/g;

/** @type {Json[]} */
let models = [];
let chosen = ""; // name of the model
let drawn = ""; // the model that the controls are of

/** The model that the next stream is of. */
function model() {
  return models.find((each) => each.id === chosen) ?? models.find((each) => each.default) ?? models[0];
}

/** @returns {string | undefined} Its name, if the user has chosen it. */
export function chosenModel() {
  return chosen || undefined;
}

/**
 * The schema of a field without the alternative null.
 *
 * @param {Json} field
 * @returns {Json}
 */
function plain(field) {
  return field.anyOf ? { ...field, ...field.anyOf.find((/** @type {Json} */ each) => each.type !== "null") } : field;
}

/** @param {string} name `duration_s` becomes `Duration, seconds`. */
function labelOf(name) {
  const text = name.replace(/_s$/, ", seconds").replaceAll("_", " ");
  return text[0].toUpperCase() + text.slice(1);
}

/** @param {Json[]} found The models of the server, whenever they were asked for. */
export function showModels(found) {
  models = found;
  const choice = $("models", HTMLSelectElement);
  choice.hidden = models.length < 2;
  if (choice.options.length !== models.length) {
    choice.replaceChildren(...models.map((each) => el("option", { value: each.id, selected: each.default, title: each.description }, each.id)));
  }
  draw();
}

/** Draw the controls of the model, unless they are there. */
function draw() {
  const current = model();
  if (!current || drawn === current.id) return;
  drawn = current.id;
  /** @type {Json[]} */
  const fields = Object.entries(current.fields).map(([name, field]) => ({ name, ...plain(field) }));
  const numbers = fields.filter(({ name, type }) => ["number", "integer"].includes(type) && !HIDDEN.includes(name));
  $("option-fields").replaceChildren(...numbers.map(({ name, type, minimum, exclusiveMinimum, maximum, description }) =>
    el("label", { title: description }, labelOf(name), el("input", {
      type: "number", name, min: minimum ?? exclusiveMinimum, max: maximum, step: type === "integer" ? 1 : "any", placeholder: description,
    }))));
  $("options").hidden = !numbers.length;
  const transitions = fields.find(({ name }) => name === "transition")?.enum ?? [];
  for (const radio of $("transition").querySelectorAll("input")) radio.disabled = !transitions.includes(radio.value);
  drawWords(current);
}

/** @param {Json} current */
function drawWords(current) {
  const words = /** @type {string[]} */ (current.vocabulary ?? []);
  $("words").hidden = !words.length;
  $("words-model").textContent = current.id;
  const box = $("prompt", HTMLTextAreaElement);
  $("word-list").replaceChildren(...words.map((word) => el("li", {}, action(word, () => {
    const before = box.value.slice(0, box.selectionStart);
    box.setRangeText(`${before && !/\s$/.test(before) ? " " : ""}${word}`, box.selectionStart, box.selectionEnd, "end");
    box.dispatchEvent(new Event("input"));
    box.focus();
  }))));
}

/** @returns {Json} What the user has set of the fields that open a stream. */
export function options() {
  const set = [...$("option-fields").querySelectorAll("input")].filter((each) => each.value !== "" && each.validity.valid);
  return Object.fromEntries(set.map((each) => [each.name, each.valueAsNumber]));
}

/**
 * Name the words of the text that the model does not know.
 *
 * @param {string} text
 */
export function markUnknownWords(text) {
  const vocabulary = new Set(model()?.vocabulary ?? []);
  // The last word may not be whole yet, and letters of other alphabets are for the server to judge.
  const typed = text.toLowerCase().normalize("NFKD").replace(/\p{M}/gu, "").replaceAll("\u2019", "'").replace(/\S+$/, "");
  const unknown = vocabulary.size ? [...new Set(typed.match(WORD) ?? [])].filter((word) => !vocabulary.has(word)) : [];
  $("unknown").hidden = !unknown.length;
  $("unknown").textContent = `${model()?.id} does not know: ${unknown.slice(0, UNKNOWN_SHOWN).join(", ")}.`;
}

$("models").addEventListener("change", () => {
  chosen = $("models", HTMLSelectElement).value;
  draw();
});
