const AVCC = [0x61, 0x76, 0x63, 0x43]; // the box that holds the decoder's configuration
const LAG_SECONDS = 1; // further behind than this, a player jumps to the newest fragment
const KEPT_SECONDS = 10; // of video that was played

/**
 * Call `onFrame` for each frame that `video` presents, until it returns false.
 *
 * @param {HTMLVideoElement} video
 * @param {() => boolean} onFrame
 */
export function onVideoFrame(video, onFrame) {
  const step = () => {
    if (onFrame()) video.requestVideoFrameCallback(step);
  };
  video.requestVideoFrameCallback(step);
}

/**
 * @param {Uint8Array<ArrayBuffer>} data A JPEG.
 * @returns {Promise<ImageBitmap>} To be closed by the caller. Rejected when the data cannot be decoded.
 */
export function decodeJpeg(data) {
  return createImageBitmap(new Blob([data], { type: "image/jpeg" }));
}

/**
 * The media type of fragmented MP4 for Media Source Extensions, with the profile and level that its init segment states
 * (RFC 6381, section 3.3).
 *
 * @param {Uint8Array} init
 * @returns {string} Such as `video/mp4; codecs="avc1.42c015"`.
 * @throws {Error} When it is no init segment with H.264.
 */
export function mediaType(init) {
  const at = init.findIndex((_, start) => AVCC.every((byte, index) => init[start + index] === byte));
  if (at < 0 || init.length < at + 8) throw new Error("This is no init segment with H.264.");
  const profile = Array.from(init.subarray(at + 5, at + 8), (byte) => byte.toString(16).padStart(2, "0"));
  return `video/mp4; codecs="avc1.${profile.join("")}"`;
}

/** Plays fragmented MP4 (H.264) in a video element through Media Source Extensions, close to the newest fragment. */
export class FragmentPlayer {
  video;
  #url;
  #source = new MediaSource();
  /** @type {SourceBuffer | null} */
  #buffer = null;
  /** @type {Uint8Array<ArrayBuffer>[]} */
  #fragments = [];
  #closed = false;

  /**
   * @param {HTMLVideoElement} video
   * @throws {Error} When the browser has no Media Source Extensions.
   */
  constructor(video) {
    this.video = video;
    this.#url = URL.createObjectURL(this.#source);
    video.src = this.#url;
  }

  /** Wait until fragments can be appended. */
  async open() {
    await new Promise((opened) => this.#source.addEventListener("sourceopen", opened, { once: true }));
  }

  /**
   * @param {Uint8Array<ArrayBuffer>} fragment The init segment first.
   * @throws {DOMException} When the browser does not play H.264 of this level.
   */
  append(fragment) {
    if (!this.#buffer) {
      this.#buffer = this.#source.addSourceBuffer(mediaType(fragment));
      this.#buffer.addEventListener("updateend", () => this.#update());
    }
    this.#fragments.push(fragment);
    this.#update();
    this.video.play().catch(() => {});
  }

  close() {
    this.#closed = true;
    URL.revokeObjectURL(this.#url);
  }

  /** Skip what is late, append the next fragment or remove what was played. A buffer does one thing at a time. */
  #update() {
    const [video, buffer] = [this.video, this.#buffer];
    if (this.#closed || !buffer || buffer.updating) return;
    const ranges = buffer.buffered;
    const end = ranges.length ? ranges.end(ranges.length - 1) : 0;
    const start = ranges.length ? ranges.start(0) : 0;
    // The first fragment's time is the stream's age, not 0, and a viewer must not fall behind.
    if (end - video.currentTime > LAG_SECONDS) video.currentTime = end - 0.1;
    const fragment = this.#fragments.shift();
    if (fragment) buffer.appendBuffer(fragment);
    else if (video.currentTime - start > 2 * KEPT_SECONDS) buffer.remove(start, video.currentTime - KEPT_SECONDS);
  }
}
