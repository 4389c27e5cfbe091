/** The answer to a WHEP request was an error. */
export class WhepError extends Error {
  /** @param {number} status HTTP status. */
  constructor(status) {
    super(`The server answered ${status}.`);
    this.name = "WhepError";
    this.status = status;
  }
}

/**
 * One viewer of one stream over WebRTC, set up by WHEP (draft-ietf-wish-whep).
 *
 * There is one exchange: an offer is posted, the answer names every candidate of the server. The browser's own
 * candidates are not sent, because the server answers connectivity checks from any address.
 */
export class WhepSession {
  #url;
  #fetch;
  /** @type {string | null} */
  #location = null;
  #closed = false;

  /**
   * @param {string} url The stream's `whep_url`, with `?alpha=stacked` for frames above their matte.
   * @param {object} options
   * @param {(track: MediaStreamTrack) => void} options.onTrack Called with the video track.
   * @param {() => void} options.onFail Called when the connection fails after it was set up.
   * @param {typeof fetch} [options.fetch] Sends the requests; give one that adds credentials where the server has keys.
   */
  constructor(url, { onTrack, onFail, fetch = (...request) => globalThis.fetch(...request) }) {
    this.#url = url;
    this.#fetch = fetch;
    this.peer = new RTCPeerConnection();
    this.peer.addTransceiver("video", { direction: "recvonly" });
    this.peer.ontrack = ({ track }) => onTrack(track);
    this.peer.onconnectionstatechange = () => {
      if (this.peer.connectionState === "failed") onFail();
    };
  }

  /**
   * Offer, and take the answer. Media follows when the connection is up.
   *
   * @throws {WhepError} When the server refuses.
   */
  async open() {
    const servers = iceServers(await this.#fetch(this.#url, { method: "OPTIONS" }));
    if (servers.length) this.peer.setConfiguration({ iceServers: servers });
    await this.peer.setLocalDescription();
    const headers = { "Content-Type": "application/sdp" };
    const response = await this.#fetch(this.#url, { method: "POST", headers, body: this.peer.localDescription?.sdp });
    if (!response.ok) throw new WhepError(response.status);
    const path = response.headers.get("Location");
    // It may be relative to the URL that was asked (RFC 9110, section 10.2.2).
    this.#location = path && new URL(path, new URL(this.#url, location.href)).href;
    if (this.#closed) this.#delete();
    else await this.peer.setRemoteDescription({ type: "answer", sdp: await response.text() });
  }

  /**
   * Close the connection. Harmless when repeated.
   *
   * @param {boolean} [deleteSession] Whether to also delete the session at the server. By default only where no
   *   connection is up: the server notices the end of one that is.
   */
  close(deleteSession = this.peer.connectionState !== "connected") {
    if (this.#closed) return;
    this.#closed = true;
    if (deleteSession) this.#delete();
    this.peer.close();
  }

  #delete() {
    if (this.#location) this.#fetch(this.#location, { method: "DELETE", keepalive: true }).catch(() => {});
  }
}

/**
 * STUN and TURN servers from the `Link` headers of a response.
 *
 * @param {Response} response
 * @returns {RTCIceServer[]}
 */
export function iceServers(response) {
  const links = (response.headers.get("Link") ?? "").matchAll(/<((?:stun|turns?):[^>]+)>([^<]*)/g);
  return Array.from(links, ([, urls, parameters]) => ({
    urls,
    username: /username="([^"]*)"/.exec(parameters)?.[1],
    credential: /credential="([^"]*)"/.exec(parameters)?.[1],
  }));
}
