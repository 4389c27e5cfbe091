// Finding and making elements. Text from elsewhere becomes text nodes, never markup.

/**
 * The element of this id.
 *
 * @template {Element} [E=HTMLElement]
 * @param {string} id
 * @param {new () => E} [kind] Its class, for callers that need more than `HTMLElement`.
 * @returns {E}
 * @throws {Error} When the page has no such element.
 */
export function $(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof (kind ?? HTMLElement))) throw new Error(`The page has no element ${id}.`);
  return /** @type {E} */ (/** @type {unknown} */ (found));
}

/** @param {string} id */
export const button = (id) => $(id, HTMLButtonElement);

/** @param {string} id */
export const input = (id) => $(id, HTMLInputElement);

/**
 * A new element. Attributes that are false, null or undefined are left out; those whose name begins with "on" are
 * listeners.
 *
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, unknown>} [attributes]
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), /** @type {EventListener} */ (value));
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children);
  return element;
}

/**
 * A button of the page's own.
 *
 * @param {string} label
 * @param {() => void} onClick
 * @param {Record<string, unknown>} [attributes]
 */
export function action(label, onClick, attributes = {}) {
  return el("button", { type: "button", onclick: onClick, ...attributes }, label);
}

/** @param {string} message Shown until the user starts something that works. */
export function alertUser(message) {
  $("alert").textContent = message;
  $("alert").hidden = false;
}

/** @param {unknown} error Shown as `alertUser` does. */
export function alertError(error) {
  alertUser(error instanceof Error ? error.message : String(error));
}

/**
 * Let the user save data as a file.
 *
 * @param {Blob} blob
 * @param {string} name
 */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** @param {string} text */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    prompt("Copy this:", text); // pages without TLS have no clipboard
  }
}
