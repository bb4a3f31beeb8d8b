// The icon set: 24 px line icons, drawn as SVG elements by the page (no font, no request).
import { html } from "../vendor/preact-htm.js";

const PATHS = {
  jobs: ["M4 6h16", "M4 12h16", "M4 18h10"],
  plus: ["M12 5v14", "M5 12h14"],
  images: ["M4 5h16v14H4z", "M4 16l5-5 4 4 2-2 5 5", "M15.5 9.5h.01"],
  model: ["M12 3l8 4.5v9L12 21l-8-4.5v-9z", "M12 12l8-4.5", "M12 12v9", "M12 12L4 7.5"],
  system: ["M7 7h10v10H7z", "M10 3v4", "M14 3v4", "M10 17v4", "M14 17v4", "M3 10h4", "M3 14h4", "M17 10h4", "M17 14h4"],
  sun: ["M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8z", "M12 2v2", "M12 20v2", "M2 12h2", "M20 12h2", "M5 5l1.4 1.4", "M17.6 17.6L19 19", "M5 19l1.4-1.4", "M17.6 6.4L19 5"],
  moon: ["M20 14.5A8.5 8.5 0 1 1 9.5 4a7 7 0 0 0 10.5 10.5z"],
  check: ["M5 12.5l4.5 4.5L19 7.5"],
  x: ["M6 6l12 12", "M18 6L6 18"],
  alert: ["M12 3.5L2.5 20h19z", "M12 10v4", "M12 17h.01"],
  info: ["M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18z", "M12 11v5", "M12 8h.01"],
  clock: ["M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18z", "M12 7v5l3 2"],
  spinner: ["M12 3a9 9 0 1 0 9 9"],
  pause: ["M8 5v14", "M16 5v14"],
  play: ["M7 5l12 7-12 7z"],
  stop: ["M6 6h12v12H6z"],
  save: ["M5 4h11l3 3v13H5z", "M8 4v5h7V4", "M8 20v-6h8v6"],
  copy: ["M9 9h11v11H9z", "M5 15H4V4h11v1"],
  download: ["M12 4v11", "M7 11l5 5 5-5", "M5 20h14"],
  upload: ["M12 16V5", "M7 9l5-5 5 5", "M5 20h14"],
  chev: ["M9 6l6 6-6 6"],
  left: ["M15 6l-6 6 6 6"],
  search: ["M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14z", "M20 20l-4-4"],
  trash: ["M4 7h16", "M9 7V4h6v3", "M6 7l1 13h10l1-13"],
  branch: ["M7 4v16", "M7 14c8 0 10-2 10-6", "M17 8a2 2 0 1 0 0-4 2 2 0 0 0 0 4z"],
  chart: ["M4 4v16h16", "M7 14l4-5 3 3 5-7"],
  file: ["M6 3h8l4 4v14H6z", "M14 3v5h4"],
  log: ["M4 6h10", "M4 10h16", "M4 14h7", "M4 18h12"],
  sliders: ["M4 7h9", "M17 7h3", "M15 5v4", "M4 17h3", "M11 17h9", "M9 15v4"],
  spark: ["M12 3l1.8 5.2L19 10l-5.2 1.8L12 17l-1.8-5.2L5 10l5.2-1.8z", "M19 16v4", "M17 18h4"],
  bolt: ["M13 3L5 14h6l-1 7 8-11h-6z"],
  disk: ["M4 6c0-4 16-4 16 0v12c0 4-16 4-16 0z", "M4 6c0 4 16 4 16 0", "M4 12c0 4 16 4 16 0"],
  memory: ["M3 8h18v9H3z", "M7 8v9", "M12 8v9", "M17 8v9"],
  expand: ["M14 4h6v6", "M10 20H4v-6", "M20 4l-7 7", "M4 20l7-7"],
  key: ["M15 4a5 5 0 1 0 0 10 5 5 0 0 0 0-10z", "M11.5 12.5L4 20", "M4 20h4v-3", "M15 9h.01"],
  out: ["M10 4H5v16h5", "M14 8l4 4-4 4", "M18 12H9"],
  retry: ["M20 12a8 8 0 1 1-2.5-5.8", "M20 4v5h-5"],
};

/** An icon by name. Decorative: words stand beside it. */
export function Icon({ name }) {
  return html`<svg class=${`icon i-${name}`} viewBox="0 0 24 24" aria-hidden="true" focusable="false">${(PATHS[name] ?? []).map((d) => html`<path d=${d} />`)}</svg>`;
}

/** The mark: the two thin factors of a low-rank update, B (tall) and A (wide), standing as an L. */
export function Mark() {
  return html`<svg viewBox="0 0 32 32" aria-hidden="true" focusable="false">
    <rect width="32" height="32" rx="8" class="mark-ground" /><rect x="9" y="7" width="5" height="12" rx="1.6" class="mark-b" />
    <rect x="16" y="20" width="9" height="5" rx="1.6" class="mark-a" /><rect x="9" y="20" width="5" height="5" rx="1.6" class="mark-r" />
  </svg>`;
}
