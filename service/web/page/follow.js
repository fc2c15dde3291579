// Following the end of a scroller, and letting go when the reader scrolls up.
//
// While it holds, the scroller stays at its end whatever is added, and the browser's own scroll anchoring is off so that only the reader can move it up:
// that is how the two are told apart. Once let go, anchoring is on and nothing above the reader's eye moves.

const NEAR = 28;

export class Follow {
  #scroller;
  #changed;
  #top = 0;
  #height = 0;

  constructor(scroller, content, changed) {
    this.#scroller = scroller;
    this.#changed = changed;
    this.holding = true;
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    new ResizeObserver(() => this.stick()).observe(content);
    new ResizeObserver(() => this.stick()).observe(scroller);
    this.#anchor();
  }

  /** Stay at the end, if holding. */
  stick() {
    if (!this.holding) return;
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#note();
  }

  hold() {
    this.#set(true);
    this.stick();
  }

  release() {
    this.#set(false);
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    const near = scrollHeight - scrollTop - clientHeight < NEAR;
    // A window that grows pushes the top up too; that is no wish to leave.
    if (near) this.#set(true);
    else if (scrollTop < this.#top - 1 && clientHeight === this.#height) this.#set(false);
    this.#note();
  }

  #note() {
    this.#top = this.#scroller.scrollTop;
    this.#height = this.#scroller.clientHeight;
  }

  #set(holding) {
    if (this.holding === holding) return;
    this.holding = holding;
    this.#anchor();
    this.#changed(holding);
  }

  #anchor() {
    this.#scroller.style.overflowAnchor = this.holding ? "none" : "auto";
  }
}

/** Scroll so that what is heard stays in sight, unless the reader has gone elsewhere. */
export function keepInView(element, scroller) {
  const [box, frame] = [element.getBoundingClientRect(), scroller.getBoundingClientRect()];
  const below = box.bottom > frame.bottom && box.top < frame.bottom + frame.height / 2;
  if (below) element.scrollIntoView({ block: "center" });
}
