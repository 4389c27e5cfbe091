// Requests to the server. Addresses are relative to the page, so that the page also works behind a path prefix.

import { $, input } from "./dom.js";

/** @typedef {Record<string, any>} Json An object of the API; docs/api.md and /docs describe its fields. */

/** The server's answer was an error. */
export class ApiError extends Error {
  /**
   * @param {number} status HTTP status.
   * @param {{ message?: string, code?: string }} [error] The API's error object.
   */
  constructor(status, error) {
    super(error?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = error?.code;
  }
}

/** @type {Promise<boolean> | null} A promise while the dialog is open. */
let keyDialog = null;
let keyDeclined = false; // the user has closed the dialog without a key
let guestToken = ""; // of a page that watches somebody else's stream

/**
 * Send this token with every request, and ask for no key.
 *
 * @param {string} token
 */
export function useToken(token) {
  guestToken = token;
}

/**
 * Ask the user for an API key and keep it for this tab. All requests that wait share one dialog.
 *
 * @param {boolean} wrong Whether the server has refused the key that was given before.
 * @returns {Promise<boolean>} Whether a key was given.
 */
function askForKey(wrong) {
  const dialog = $("ask", HTMLDialogElement);
  keyDialog ??= new Promise((resolve) => {
    $("key-wrong").hidden = !wrong;
    dialog.onclose = () => {
      const key = dialog.returnValue === "use" ? input("key").value.trim() : "";
      input("key").value = dialog.returnValue = "";
      keyDialog = null;
      keyDeclined = !key;
      if (key) sessionStorage.setItem("key", key);
      resolve(Boolean(key));
    };
    dialog.showModal();
  });
  return keyDialog;
}

/**
 * `fetch` with the API key, if there is one. After a 401 the user is asked for a key, and the request is repeated, until
 * the server takes the key or the user gives none. A request in the background does not ask again after that.
 *
 * @param {RequestInfo | URL} path
 * @param {RequestInit & { background?: boolean }} [options]
 */
export async function send(path, { headers, background = false, ...options } = {}) {
  for (;;) {
    const key = guestToken || sessionStorage.getItem("key");
    /** @type {Record<string, string>} */
    const credentials = key ? { Authorization: `Bearer ${key}` } : {};
    const response = await fetch(path, { ...options, headers: { .../** @type {Record<string, string>} */ (headers), ...credentials } });
    if (response.status !== 401 || guestToken) return response;
    if (sessionStorage.getItem("key") !== key) continue; // another request has asked meanwhile
    if (key) sessionStorage.removeItem("key");
    if ((background && keyDeclined) || !(await askForKey(Boolean(key)))) return response;
  }
}

/**
 * Ask the API.
 *
 * @param {string} method
 * @param {string} path Such as `v1/streams`.
 * @param {FormData | Json} [body]
 * @param {RequestInit & { background?: boolean }} [options]
 * @returns {Promise<Json>} The answer; empty for 204.
 * @throws {ApiError} When the answer is an error.
 * @throws {Error} When there is none.
 */
export async function api(method, path, body, options = {}) {
  let response;
  try {
    const form = body instanceof FormData; // the browser sets its Content-Type, with the boundary
    /** @type {HeadersInit} */
    const headers = body === undefined || form ? {} : { "Content-Type": "application/json" };
    response = await send(path, { method, headers, body: form ? body : body && JSON.stringify(body), ...options });
  } catch {
    throw new Error("The server cannot be reached.");
  }
  if (response.status === 204) return {};
  const answer = await response.json().catch(() => null);
  if (!response.ok) throw new ApiError(response.status, answer?.error);
  return answer;
}

/**
 * A file of the API, with the key.
 *
 * @param {string} path
 * @returns {Promise<Blob>}
 */
export async function file(path) {
  const response = await send(path);
  if (!response.ok) throw new ApiError(response.status, (await response.json().catch(() => null))?.error);
  return response.blob();
}

/**
 * The token in a stream's address. It replaces the API key where headers cannot be sent.
 *
 * @param {string} address
 */
export function tokenIn(address) {
  return new URL(address).searchParams.get("token") ?? "";
}

$("ask-form").addEventListener("submit", (event) => {
  // Other characters cannot be sent, and no key has them.
  const submitter = /** @type {SubmitEvent} */ (event).submitter;
  if (!(submitter instanceof HTMLButtonElement) || submitter.value !== "use") return;
  if (/^[!-~]+$/.test(input("key").value.trim())) return;
  event.preventDefault();
  $("key-wrong").hidden = false;
});
