(async (root) => {
"use strict";

const find = (selector) => root.querySelector(selector);
const data = JSON.parse(find('script[type="application/json"]').textContent);
const uid = `attention-explorer-${document.querySelectorAll(".attention-explorer").length}`;
const grid = find(".grid"), matrix = find(".matrix"), said = find(".said");
const MEAN = -1, LABELLED = 40, TALLEST = 480, NAMED = 8;
const SQUARE = Float64Array.from({ length: 256 }, (_, level) => (level / 255) ** 2);
const INVISIBLE = { "\n": "\u21b5", "\t": "\u21e5", " ": "\u2423", "\r": "\u240d", "": "\u2205" };

// What is shown: `side` 0 is a query and `index` its place; 1 is a key.
const state = {
  view: 0, step: 0, layer: 0, head: 0, side: 0, index: 0, held: false, swapped: false, scaled: false,
};
let view = null, sides = [], painted = null, waiting = false;

async function bytes(text) {
  const letters = atob(text), packed = new Uint8Array(letters.length);
  for (let at = 0; at < packed.length; at++) packed[at] = letters.charCodeAt(at);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function opened(number) {
  const held = data.views[number];
  if (!held.levels) {
    held.levels = new Uint8Array(await bytes(held.values));
    held.largest = new Float32Array(await bytes(held.maxima));
    held.values = held.maxima = null;
  }
  return held;
}

// ---- weights

const all = (count, chosen) => (chosen === MEAN ? [...Array(count).keys()] : [chosen]);

function strips(layer, head) {
  const [, L, N] = view.shape;
  return all(L, layer).flatMap((l) => all(N, head).map((n) => (state.step * L + l) * N + n));
}

/** The weights of query `index` to all keys (side 0), or of all queries to key `index` (side 1). */
function weights(layer, head, side, index) {
  const [, , , T, S] = view.shape;
  const found = new Float64Array(side ? T : S);
  const chosen = strips(layer, head);
  for (const strip of chosen) {
    for (let at = 0; at < found.length; at++) {
      const row = strip * T + (side ? at : index);
      found[at] += view.largest[row] * SQUARE[view.levels[row * S + (side ? index : at)]];
    }
  }
  return found.map((value) => value / chosen.length);
}

const highest = (values) => values.reduce((most, value) => Math.max(most, value), 0);
const percent = (share) =>
  share >= 0.095 ? `${Math.round(100 * share)}%` : `${Number((100 * share).toPrecision(2))}%`;
const isolated = (token) => `\u2068${shown(token)}\u2069`; // of its own direction
const shown = (token) => INVISIBLE[token] ?? token.replaceAll("\n", "\u21b5");

// ---- colours, as the style sheet has them: for the screen in light or dark, or for paper

function colour(name) {
  const probe = root.appendChild(document.createElement("i"));
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function palette() {
  const accent = colour("accent").match(/[\d.]+/g).slice(0, 3);
  const levels = Array.from({ length: 256 }, (_, level) => `rgb(${accent.join(" ")} / ${(level / 255).toFixed(3)})`);
  const names = ["ink", "soft", "line", "paper", "gold", "accent"];
  return { accent: accent.map(Number), levels, ...Object.fromEntries(names.map((n) => [`--${n}`, colour(n)])) };
}
let colours = palette();

// ---- words

function built(side) {
  const box = document.createElement("div");
  const name = document.createElement("h4");
  const tokens = document.createElement("div");
  const words = side ? view.keys : view.queries;
  name.textContent = `${view.sides[side]} (${words.length})`;
  name.id = `${uid}-${side}`;
  Object.assign(tokens, { className: "tokens", tabIndex: 0, dir: "auto" });
  tokens.setAttribute("role", "listbox");
  tokens.setAttribute("aria-labelledby", name.id);
  const spans = words.map((word, index) => {
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = shown(word);
    span.id = `${uid}-${side}-${index}`;
    span.dataset.index = index;
    span.setAttribute("role", "option");
    return span;
  });
  spans.forEach((span) => tokens.append(span, " "));
  box.append(name, tokens);
  listen(tokens, side);
  return { box, tokens, spans, levels: new Uint8Array(words.length) };
}

function listen(tokens, side) {
  const index = (event) => event.target.closest(".token")?.dataset.index;
  tokens.addEventListener("pointerover", (event) => {
    if (!state.held && index(event) !== undefined) choose(side, Number(index(event)));
  });
  tokens.addEventListener("click", (event) => {
    if (index(event) === undefined) return;
    const same = state.held && state.side === side && state.index === Number(index(event));
    choose(side, Number(index(event)), !same);
  });
  tokens.addEventListener("focus", () => {
    if (state.side !== side && !state.held && tokens.matches(":focus-visible")) choose(side, 0);
  });
  tokens.addEventListener("keydown", (event) => {
    const here = state.side === side ? state.index : 0;
    const { spans } = sides[side];
    const forward = getComputedStyle(tokens).direction === "rtl" ? -1 : 1;
    const places = {
      ArrowRight: here + forward, ArrowLeft: here - forward, Home: 0, End: spans.length - 1,
      ArrowDown: beside(spans, here, 1), ArrowUp: beside(spans, here, -1),
    };
    if (event.key in places) {
      choose(side, Math.min(Math.max(places[event.key], 0), spans.length - 1));
      inSight(sides[side], state.index);
    } else if (event.key === "Enter" || event.key === " ") {
      choose(side, here, !state.held);
    } else return;
    event.preventDefault();
  });
}

/** The nearest word in the line below (1) or above (-1). */
function beside(spans, here, way) {
  const { offsetTop: top, offsetLeft: left } = spans[here];
  let best = here, line = null;
  for (let at = here + way; at >= 0 && at < spans.length; at += way) {
    if (spans[at].offsetTop === top) continue;
    line ??= spans[at].offsetTop;
    if (spans[at].offsetTop !== line) break;
    if (best === here || Math.abs(spans[at].offsetLeft - left) < Math.abs(spans[best].offsetLeft - left)) best = at;
  }
  return best;
}

/** Scroll a box, not the page, to a word. */
function inSight({ tokens, spans }, index) {
  const { offsetTop: top, offsetHeight: height } = spans[index];
  if (top < tokens.scrollTop) tokens.scrollTop = top - 4;
  const bottom = top + height - tokens.clientHeight;
  if (bottom > tokens.scrollTop) tokens.scrollTop = bottom + 4;
}

function paint(side, values, scale) {
  const { spans, levels } = sides[side];
  for (let at = 0; at < spans.length; at++) {
    const level = values ? Math.round(255 * Math.min(values[at] / scale, 1)) : 0;
    if (level === levels[at]) continue; // most words have the same weight as before: none
    levels[at] = level;
    spans[at].style.background = level ? colours.levels[level] : "";
    spans[at].style.color = level > 140 ? "var(--paper)" : "";
  }
}

// ---- the chosen word

function choose(side, index, held = state.held) {
  Object.assign(state, { side, index, held });
  later();
}

function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; show(); });
}

function show() {
  const { side, index } = state;
  const words = side ? view.queries : view.keys, own = side ? view.keys : view.queries;
  const values = weights(state.layer, state.head, side, index);
  const most = highest(values);
  paint(1 - side, values, state.scaled ? most || 1 : 1);
  paint(side, null);
  root.querySelectorAll(".active, .gold").forEach((span) => span.classList.remove("active", "held", "gold"));
  root.querySelectorAll("[aria-selected]").forEach((span) => span.removeAttribute("aria-selected"));
  const active = sides[side].spans[index];
  active.classList.add("active");
  active.classList.toggle("held", state.held);
  active.setAttribute("aria-selected", "true");
  sides[side].tokens.setAttribute("aria-activedescendant", active.id);
  sides[1 - side].tokens.removeAttribute("aria-activedescendant");
  view.gold.forEach((pair) => { if (pair[side] === index) sides[1 - side].spans[pair[1 - side]].classList.add("gold"); });
  const order = [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, NAMED);
  if (most) inSight(sides[1 - side], order[0]);
  const named = order.filter((at) => values[at] >= 0.005 * most && most)
    .map((at) => `${isolated(words[at])} ${percent(values[at])}`);
  const verb = side ? "is looked at by" : "looks at";
  said.textContent = `${isolated(own[index])} (${index + 1} of ${own.length}) ${verb}: ${named.join(", ") || "nothing"}`;
  drawGrid();
  drawMatrix();
}

// ---- pictures

function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "12px system-ui, sans-serif";
  pen.textBaseline = "middle";
  return pen;
}

const width = () => Math.max(root.clientWidth, 240);
let cells = null, cross = null;

/** Of every layer and head a bar for each word that the chosen one looks at. */
function drawGrid() {
  const [, L, N] = view.shape;
  grid.hidden = L * N === 1;
  if (grid.hidden) return;
  const probe = grid.getContext("2d");
  probe.font = "12px system-ui, sans-serif";
  const left = Math.min(highest(view.layers.map((name) => probe.measureText(name).width)) + 10, 160);
  const across = Math.min(Math.max((width() - left) / N, 24), 150), down = L > 16 ? 22 : 34, top = 20;
  cells = { left, top, across, down };
  const pen = sized(grid, Math.min(left + N * across, width()), top + L * down);
  for (let l = 0; l < L; l++) {
    pen.fillStyle = colours["--soft"];
    pen.textAlign = "left";
    pen.fillText(view.layers[l], 0, top + (l + 0.5) * down, left - 6);
    for (let n = 0; n < N; n++) {
      const x = left + n * across, y = top + l * down;
      if (l === 0) {
        pen.fillStyle = colours["--soft"];
        pen.fillText(view.heads[n], x + 2, top / 2, across - 4);
      }
      const own = (state.layer === l || state.layer === MEAN) && (state.head === n || state.head === MEAN);
      drawBars(pen, weights(l, n, state.side, state.index), x + 2, y + 2, across - 4, down - 4, own);
    }
  }
  grid.setAttribute("aria-label", `Weights of the chosen word in every ${view.axes[0]} and ${view.axes[1]}; arrow keys choose one.`);
}

function drawBars(pen, values, x, y, across, down, own) {
  const bins = Math.min(values.length, Math.floor(across)), scale = state.scaled ? highest(values) || 1 : 1;
  const bin = new Float64Array(bins);
  values.forEach((value, at) => {
    const to = Math.floor((at * bins) / values.length);
    bin[to] = Math.max(bin[to], value);
  });
  pen.fillStyle = colours["--accent"];
  bin.forEach((value, at) => {
    const tall = Math.min(value / scale, 1) * (down - 2);
    if (tall >= 0.5) pen.fillRect(x + (at * across) / bins, y + down - 1 - tall, Math.max(across / bins - 0.7, 0.8), tall);
  });
  pen.strokeStyle = colours[own ? "--accent" : "--line"];
  pen.lineWidth = own ? 2 : 1;
  pen.strokeRect(x, y, across, down);
}

/** All weights of the layer and head, of many words the largest of each pixel, and a cross at the word. */
function drawMatrix() {
  const [, , , T, S] = view.shape;
  const [rows, columns] = state.swapped ? [S, T] : [T, S];
  const labelled = Math.max(rows, columns) <= LABELLED;
  const [below, beside] = state.swapped ? [view.queries, view.keys] : [view.keys, view.queries];
  const probe = matrix.getContext("2d");
  probe.font = "12px system-ui, sans-serif";
  const longest = (words) => (labelled ? Math.min(highest(words.map((w) => probe.measureText(shown(w)).width)), 130) + 8 : 0);
  const left = longest(beside), bottom = longest(below);
  const [wide, high] = cellOf(rows, columns, width() - left - 2, labelled ? 20 : 12);
  const across = wide * columns, down = high * rows;
  const pen = sized(matrix, left + across + 2, down + bottom + 2);
  const key = [state.view, state.step, state.layer, state.head, state.swapped, state.scaled, colours.accent, across].join();
  if (painted?.key !== key) painted = { key, picture: picture(rows, columns, Math.ceil(across), Math.ceil(down)) };
  pen.imageSmoothingEnabled = false;
  pen.drawImage(painted.picture, left, 1, across, down);
  pen.strokeStyle = colours["--line"];
  pen.strokeRect(left, 1, across, down);
  const at = (query, other) => (state.swapped ? [left + query * wide, 1 + other * high] : [left + other * wide, 1 + query * high]);
  pen.strokeStyle = colours["--gold"];
  view.gold.forEach((pair) => pen.strokeRect(...at(...pair).map((place) => place + 1), wide - 2, high - 2));
  const isRow = (state.side === 0) !== state.swapped;
  pen.strokeStyle = colours["--accent"];
  if (isRow) pen.strokeRect(left, 1 + state.index * high, across, Math.max(high, 1.5));
  else pen.strokeRect(left + state.index * wide, 1, Math.max(wide, 1.5), down);
  cross = { left, high };
  if (labelled) label(pen, beside, below, { left, down, cell: wide });
  matrix.setAttribute("aria-label", `Weights of ${describe()}: ${rows} rows, ${columns} columns.`);
}

/** The width and height of a weight in pixels: equal, unless the picture would be a line. */
function cellOf(rows, columns, space, most) {
  const wide = Math.min(most, space / columns), high = Math.min(most, TALLEST / rows);
  const least = Math.min(wide, high);
  return Math.max(rows, columns) > 8 * Math.min(rows, columns) ? [wide, high] : [least, least];
}

function label(pen, beside, below, { left, down, cell }) {
  const [rows, columns] = state.swapped ? [1, 0] : [0, 1];
  const chosen = (side, at) => (side === state.side && at === state.index ? "--accent" : "--ink");
  pen.textAlign = "right";
  beside.forEach((word, at) => {
    pen.fillStyle = colours[chosen(rows, at)];
    pen.fillText(shown(word), left - 6, 1 + (at + 0.5) * cell, left - 8);
  });
  below.forEach((word, at) => {
    pen.save();
    pen.fillStyle = colours[chosen(columns, at)];
    pen.translate(left + (at + 0.5) * cell, down + 7);
    pen.rotate(-Math.PI / 2);
    pen.fillText(shown(word), 0, 0, 130);
    pen.restore();
  });
}

function picture(rows, columns, across, down) {
  const [, , , T, S] = view.shape;
  const high = Math.min(rows, Math.max(down, 1)), wide = Math.min(columns, Math.max(across, 1));
  const pooled = new Float32Array(high * wide), chosen = strips(state.layer, state.head);
  const sum = new Float64Array(S);
  for (let query = 0; query < T; query++) {
    sum.fill(0);
    for (const strip of chosen) {
      const row = strip * T + query, most = view.largest[row] / chosen.length;
      if (most) for (let other = 0; other < S; other++) sum[other] += most * SQUARE[view.levels[row * S + other]];
    }
    const scale = state.scaled ? highest(sum) || 1 : 1;
    for (let other = 0; other < S; other++) {
      const [row, column] = state.swapped ? [other, query] : [query, other];
      const to = Math.floor((row * high) / rows) * wide + Math.floor((column * wide) / columns);
      pooled[to] = Math.max(pooled[to], sum[other] / scale);
    }
  }
  const canvas = Object.assign(document.createElement("canvas"), { width: wide, height: high });
  const pen = canvas.getContext("2d"), image = pen.createImageData(wide, high);
  pooled.forEach((value, at) => image.data.set([...colours.accent, 255 * Math.min(value, 1)], 4 * at));
  pen.putImageData(image, 0, 0);
  return canvas;
}

// ---- controls

function options(label, names, chosen, mean) {
  const select = label.querySelector("select");
  const entries = names.map((name, at) => [name, at]).concat(mean && names.length > 1 ? [["mean", MEAN]] : []);
  select.replaceChildren(...entries.map(([name, value]) => new Option(name, value)));
  select.value = chosen;
  label.hidden = names.length < 2;
}

function describe() {
  const of = (names, chosen, axis) => (names.length < 2 ? [] : [chosen === MEAN ? `mean of every ${axis}` : names[chosen]]);
  const step = view.steps.length > 1 ? [`step ${view.steps[state.step]}`] : [];
  const parts = [...of(view.layers, state.layer, view.axes[0]), ...of(view.heads, state.head, view.axes[1]), ...step];
  return [view.name, ...parts].filter(Boolean).join(", ") || data.title;
}

function refresh() {
  find(".steps output").textContent = view.steps[state.step] ?? "";
  find(".steps input").setAttribute("aria-valuetext", `step ${view.steps[state.step] ?? ""}`);
  find(".layers select").value = state.layer;
  find(".heads select").value = state.head;
  find(".state").textContent = describe();
  later();
}

async function open(number) {
  view = await opened(number);
  const [P, L, N, T, S] = view.shape;
  Object.assign(state, { view: number, step: P - 1, side: 0, index: 0, held: false, scaled: Math.max(T, S) > 64 });
  if (state.layer >= L) state.layer = 0;
  if (state.head >= N) state.head = 0;
  options(find(".views"), data.views.map((each) => each.name), number);
  options(find(".layers"), view.layers, state.layer, true);
  options(find(".heads"), view.heads, state.head, true);
  find(".layers span").textContent = view.axes[0];
  find(".heads span").textContent = view.axes[1];
  find(".hint span").textContent = L * N === 1 ? ""
    : `Each small picture is one ${view.axes[0]} (row) and ${view.axes[1]} (column): a bar for each word.`;
  find(".steps").hidden = P < 2;
  Object.assign(find(".steps input"), { max: P - 1, value: state.step });
  find(".scale input").checked = state.scaled;
  sides = [built(0), built(1)];
  place();
  painted = null;
  refresh();
}

function place() {
  const boxes = sides.map((side) => side.box);
  find(".sides").replaceChildren(...(state.swapped ? boxes.reverse() : boxes));
}

function recolour() {
  colours = palette();
  sides.forEach((side) => { side.levels.fill(0); side.spans.forEach((span) => span.removeAttribute("style")); });
  if (view) show();
}

find(".views select").addEventListener("change", (event) => open(Number(event.target.value)));
find(".layers select").addEventListener("change", (event) => { state.layer = Number(event.target.value); refresh(); });
find(".heads select").addEventListener("change", (event) => { state.head = Number(event.target.value); refresh(); });
find(".steps input").addEventListener("input", (event) => { state.step = Number(event.target.value); refresh(); });
find(".scale input").addEventListener("change", (event) => { state.scaled = event.target.checked; refresh(); });
find(".swap").addEventListener("click", (event) => {
  state.swapped = !state.swapped;
  event.target.setAttribute("aria-pressed", state.swapped);
  place();
  refresh();
});
root.addEventListener("keydown", (event) => { if (event.key === "Escape") choose(state.side, state.index, false); });
grid.addEventListener("click", (event) => {
  const { left, top, across, down } = cells;
  const layer = Math.floor((event.offsetY - top) / down), head = Math.floor((event.offsetX - left) / across);
  if (layer < 0 || head < 0 || layer >= view.shape[1] || head >= view.shape[2]) return;
  Object.assign(state, { layer, head });
  refresh();
});
grid.addEventListener("keydown", (event) => {
  const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
  if (!(event.key in moves)) return;
  const [layer, head] = moves[event.key];
  const [, L, N] = view.shape;
  state.layer = Math.min(Math.max(Math.max(state.layer, 0) + layer, 0), L - 1);
  state.head = Math.min(Math.max(Math.max(state.head, 0) + head, 0), N - 1);
  event.preventDefault();
  refresh();
});
matrix.addEventListener("pointermove", (event) => {
  if (state.held || !cross) return;
  const { left, high } = cross;
  const rows = state.swapped ? view.keys : view.queries;
  const row = Math.floor((event.offsetY - 1) / high);
  if (event.offsetX >= left && row >= 0 && row < rows.length) choose(state.swapped ? 1 : 0, row);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
matchMedia("print").addEventListener("change", recolour);
let wide = root.clientWidth;
new ResizeObserver(() => {
  if (view && wide !== root.clientWidth) later();
  wide = root.clientWidth;
}).observe(root);
// In a notebook the page is in a frame, which is as high as its content.
new ResizeObserver(() => {
  try {
    if (window.frameElement?.hasAttribute("data-attention-explorer")) {
      window.frameElement.style.height = `${document.documentElement.scrollHeight + 4}px`;
    }
  } catch { /* a frame of another origin keeps its height */ }
}).observe(document.body);

try {
  await open(0);
} catch (error) {
  said.textContent = `The weights cannot be read: ${error.message}`;
  throw error;
}
})(document.currentScript.closest(".attention-explorer"));
