// Following an answer as it grows, until the reader scrolls up.

const NEAR = 40;

export class Follower {
  /** @param {Element} scroller what scrolls. @param {Element} latest the button that leads back. */
  constructor(scroller, latest) {
    Object.assign(this, { scroller, latest, following: true, top: 0 });
    scroller.addEventListener("scroll", () => this.noticed(), { passive: true });
    latest.addEventListener("click", () => this.toEnd());
  }

  distance() {
    return this.scroller.scrollHeight - this.scroller.clientHeight - this.scroller.scrollTop;
  }

  /** Upwards means to read; near the end means to follow. */
  noticed() {
    const up = this.scroller.scrollTop < this.top - 1;
    if (this.distance() < 2) this.following = true;
    else if (up) this.following = false;
    else if (this.distance() < NEAR) this.following = true;
    this.top = this.scroller.scrollTop;
    this.latest.hidden = this.following;
  }

  /** To be called when the messages have grown. */
  grown() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.top = this.scroller.scrollTop;
    this.latest.hidden = this.following || this.distance() < NEAR;
  }

  toEnd() {
    this.following = true;
    this.grown();
  }
}
