const H264 = 'video/mp4; codecs="avc1.42c01f"';
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
   * @throws {Error} When the browser has no Media Source Extensions, or no H.264.
   */
  constructor(video) {
    if (!MediaSource.isTypeSupported(H264)) throw new Error("This browser does not play H.264.");
    this.video = video;
    this.#url = URL.createObjectURL(this.#source);
    video.src = this.#url;
  }

  /** Wait until fragments can be appended. */
  async open() {
    await new Promise((opened) => this.#source.addEventListener("sourceopen", opened, { once: true }));
    this.#buffer = this.#source.addSourceBuffer(H264);
    this.#buffer.addEventListener("updateend", () => this.#update());
  }

  /** @param {Uint8Array<ArrayBuffer>} fragment The init segment first. */
  append(fragment) {
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
