const FIRST_MS = 500;

/**
 * How long to wait before the next attempt: half a second, doubled with each failure.
 *
 * @param {number} failures Attempts that have failed before the one that failed just now.
 * @param {number} maximumMs
 * @returns {number} Milliseconds.
 */
export function retryDelay(failures, maximumMs) {
  return Math.min(maximumMs, FIRST_MS * 2 ** failures);
}
