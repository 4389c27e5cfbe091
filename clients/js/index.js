/** Watch Livereel streams in a browser. */

export { retryDelay } from "./backoff.js";
export { HEADER_BYTES, openSocket, parseFrame } from "./socket.js";
export { FragmentPlayer, decodeJpeg, mediaType, onVideoFrame } from "./video.js";
export { WhepError, WhepSession, iceServers } from "./whep.js";
