/** Length of the header before every frame. */
export const HEADER_BYTES = 16;

/**
 * A frame, or a fragment of MP4.
 *
 * @typedef {object} Frame
 * @property {number} pts Presentation time in 1/90000 s.
 * @property {Uint8Array<ArrayBuffer>} data The payload: a JPEG, a fragment of MP4, or RGB24.
 */

/**
 * Read the header of a binary message: u8 version, u8 format, u16 width, u16 height, u16 flags, u64 presentation time,
 * in network byte order.
 *
 * @param {ArrayBuffer} message
 * @returns {Frame}
 */
export function parseFrame(message) {
  const header = new DataView(message, 0, HEADER_BYTES);
  return { pts: Number(header.getBigUint64(8)), data: new Uint8Array(message, HEADER_BYTES) };
}

/**
 * Open the WebSocket of a stream.
 *
 * @param {string} url The stream's `ws_url`, or a path on this page's server.
 * @param {object} options
 * @param {"events" | "mjpeg" | "fmp4" | "rgb24"} options.format What comes besides events.
 * @param {string} [options.token] A token for the stream, where the server has keys and `url` has none.
 * @param {"stacked"} [options.alpha] Frames above their matte.
 * @param {(event: {type: string}) => void} options.onEvent
 * @param {(frame: Frame) => void} options.onFrame
 * @param {(code: number) => void} options.onClose Called with the close code.
 * @returns {WebSocket}
 */
export function openSocket(url, { format, token, alpha, onEvent, onFrame, onClose }) {
  const address = new URL(url, location.href);
  address.protocol = address.protocol.replace("http", "ws");
  for (const [name, value] of Object.entries({ format, alpha, token })) {
    if (value) address.searchParams.set(name, value);
  }
  const socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => {
    if (typeof data === "string") onEvent(JSON.parse(data));
    else onFrame(parseFrame(data));
  };
  socket.onclose = ({ code }) => onClose(code);
  return socket;
}
