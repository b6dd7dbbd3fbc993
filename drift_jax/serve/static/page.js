"use strict";

// Images in a row of the downloaded grid, where more of a class are asked for.
const MAX_COLUMNS = 16;
const SHOWN_CHIPS = 12;
// Pixels of a downloaded image at least, if it is not wanted as it is.
const DOWNLOADED = 256;
const $ = (id) => document.getElementById(id);

let model = null;
let request = null; // AbortController of the request under way.
let shown = null; // What the grid shows: {asked, images}.
const chosen = new Set();

// A class that is called by its index shows it once.
function nameOf(label) {
  const name = model.class_names[label] ?? "";
  return name === String(label) ? "" : name;
}
const titleOf = (label) => `${label} ${nameOf(label)}`.trim();

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(error) {
  $("error").textContent = error;
  $("error").hidden = !error;
}

// Classes.

function listClasses() {
  const entries = Array.from({ length: model.num_classes }, (_, label) => {
    const box = element("input", { type: "checkbox", value: label });
    const name = element("span", { textContent: nameOf(label) });
    const index = element("span", { textContent: label });
    box.addEventListener("change", () => choose([label], box.checked));
    return element("li", {}, element("label", {}, box, index, name));
  });
  $("classes").replaceChildren(...entries);
}

function choose(labels, on) {
  for (const label of labels) {
    if (on) chosen.add(label);
    else chosen.delete(label);
    $("classes").children[label].querySelector("input").checked = on;
  }
  const sorted = labelsChosen();
  const chips = sorted.slice(0, SHOWN_CHIPS).map((label) => {
    const chip = element("button", {
      type: "button",
      textContent: `× ${titleOf(label)}`,
      title: `Remove ${titleOf(label)}`,
    });
    chip.setAttribute("aria-label", `Remove ${titleOf(label)}`);
    chip.addEventListener("click", () => {
      choose([label], false);
      $("search").focus();
    });
    return element("li", {}, chip);
  });
  if (sorted.length > SHOWN_CHIPS) {
    const more = sorted.length - SHOWN_CHIPS;
    chips.push(element("li", { textContent: `and ${more} more` }));
  }
  $("chosen").replaceChildren(...chips);
  showTotal();
}

const labelsChosen = () => [...chosen].sort((a, b) => a - b);

const labelsFound = () =>
  [...$("classes").children].flatMap((entry, i) => (entry.hidden ? [] : [i]));

function search() {
  const wanted = $("search").value.trim().toLowerCase();
  const isIndex = /^\d+$/.test(wanted);
  [...$("classes").children].forEach((entry, label) => {
    const found =
      nameOf(label).toLowerCase().includes(wanted) ||
      (isIndex && String(label).startsWith(wanted));
    entry.hidden = Boolean(wanted) && !found;
  });
  const found = labelsFound().length;
  $("matches").textContent = wanted
    ? `${found} of ${model.num_classes} match`
    : `${model.num_classes} classes`;
}

// The request.

function readForm() {
  const integer = (id) => {
    const text = $(id).value.trim();
    return /^\d+$/.test(text) ? Number(text) : NaN;
  };
  const style = $("style").value.trim();
  return {
    labels: labelsChosen(),
    count: integer("count"),
    alpha: Number($("alpha").value),
    seed: integer("seed"),
    style: style === "" ? null : style.split(/[\s,]+/).map(Number),
  };
}

// What is wrong with it, in words; the server has the last one.
function mistake(asked) {
  const total = asked.labels.length * asked.count;
  if (!asked.labels.length) return "Choose at least one class.";
  if (!(asked.count >= 1)) return "Per class: want a whole number, 1 or more.";
  if (total > model.max_images) {
    return `${total} images are too many: at most ${model.max_images} at once.`;
  }
  if (!(asked.seed <= model.max_seed)) {
    return `Seed: want a whole number from 0 to ${model.max_seed}.`;
  }
  if (asked.style && !asked.style.every(Number.isInteger)) {
    return "Style: want whole numbers, or nothing for random ones.";
  }
  return "";
}

function showTotal() {
  if (!model) return; // The form may be filled in before it is known.
  const { labels, count } = readForm();
  const total = labels.length * (count || 0);
  const classes = labels.length === 1 ? "class" : "classes";
  $("total").textContent =
    `${labels.length} ${classes} × ${count || 0} = ${total} images`;
  $("alpha-value").textContent = Number($("alpha").value).toFixed(2);
}

// The request in the page's address.

function showLink({ labels, count, alpha, seed, style }) {
  const ranges = [];
  for (const label of labels) {
    const last = ranges.at(-1);
    if (last?.[1] === label - 1) last[1] = label;
    else ranges.push([label, label]);
  }
  const classes = ranges.map(([a, b]) => (a === b ? a : `${a}-${b}`)).join();
  const styles = style ? `&style=${style.join()}` : "";
  const link = `classes=${classes}&alpha=${alpha}&seed=${seed}&count=${count}`;
  history.replaceState(null, "", `?${link}${styles}`);
}

// Fills in the form from the address; returns what is wrong there, in words.
function followLink(link) {
  const text = link.get("classes");
  const labels = text.split(",").flatMap((part) => {
    const match = /^(\d+)(?:-(\d+))?$/.exec(part);
    const [low, high] = [match?.[1], match?.[2] ?? match?.[1]].map(Number);
    if (!(low <= high && high < model.num_classes)) return [NaN];
    return Array.from({ length: high - low + 1 }, (_, i) => low + i);
  });
  if (labels.includes(NaN)) {
    const last = model.num_classes - 1;
    return `The link's classes=${text}: want indices from 0 to ${last}.`;
  }
  choose(labelsChosen(), false);
  choose(labels, true);
  for (const id of ["alpha", "seed", "count", "style"]) {
    if (link.has(id)) $(id).value = link.get(id);
  }
  const [low, high] = model.alpha_range;
  const alpha = link.get("alpha") ?? low;
  showTotal();
  if (Number(alpha) >= low && Number(alpha) <= high) return "";
  return `The link's alpha=${alpha}: want ${low} to ${high}.`;
}

async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
  if (rest) throw new Error("The answer was cut off.");
}

async function answerTo(asked, signal) {
  let response;
  try {
    response = await fetch("api/sample", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked),
      signal,
    });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Error("The server can't be reached. Is it still running?");
  }
  if (response.ok) return response;
  let reason = response.statusText;
  try {
    reason = (await response.json()).error;
  } catch {
    // Not an answer of this application: its status says all that is known.
  }
  const wait = response.headers.get("Retry-After");
  const again = wait ? ` Try again in ${wait} s.` : "";
  throw new Error(`The server refused (${response.status}): ${reason}.${again}`);
}

async function generate() {
  const asked = readForm();
  const wrong = mistake(asked);
  say(wrong);
  if (wrong) return;
  request = new AbortController();
  const { signal } = request;
  const start = performance.now();
  const total = asked.labels.length * asked.count;
  setBusy(true);
  showLink(asked);
  showCells(asked);
  if (matchMedia("(max-width: 52rem)").matches) $("result").scrollIntoView();
  $("status").textContent = `Waiting for ${total} images…`;
  let first = 0;
  let last = null;
  try {
    const response = await answerTo(asked, signal);
    for await (const line of linesOf(response)) {
      if (line.error) throw new Error(line.error);
      if (line.png === undefined) {
        last = line;
        continue;
      }
      first ||= performance.now() - start;
      addImage(line);
      const ready = shown.images.filter(Boolean).length;
      $("status").textContent = `${ready} of ${total} images…`;
      $("progress").value = ready / total;
    }
    if (!last) throw new Error("The server ended before all images were ready.");
    showFigures(last, performance.now() - start, first);
    $("status").textContent = `${total} images. Click one to download it.`;
    $("command").textContent = commandFor(asked);
    $("command-line").hidden = false;
  } catch (error) {
    const ready = shown.images.filter(Boolean).length;
    const how = signal.aborted ? "Cancelled" : "Ended early";
    $("status").textContent = `${how}: ${ready} of ${total} images.`;
    if (!signal.aborted) say(error.message);
  } finally {
    request = null;
    setBusy(false);
  }
}

function setBusy(busy) {
  const focused = document.activeElement;
  $("result").setAttribute("aria-busy", busy);
  $("generate").disabled = busy;
  $("generate").textContent = busy ? "Generating…" : "Generate";
  $("cancel").hidden = !busy;
  $("progress").hidden = !busy;
  $("download").disabled = busy || !shown?.images.some(Boolean);
  if (busy) {
    $("progress").value = 0;
    $("figures").hidden = true;
    $("command-line").hidden = true;
  }
  // A button that goes away must not take the keyboard's place with it.
  if (busy && focused === $("generate")) $("cancel").focus();
  if (!busy && focused === $("cancel")) $("generate").focus();
}

// The grid.

function showCells(asked) {
  for (const image of shown?.images ?? []) {
    if (image) URL.revokeObjectURL(image.src);
  }
  shown = { asked, images: Array(asked.labels.length * asked.count).fill(null) };
  const rows = asked.labels.map((label) => {
    const cells = Array.from({ length: asked.count }, () => element("li"));
    const title = element("h2", { textContent: titleOf(label) });
    return element("li", {}, title, element("ul", {}, ...cells));
  });
  $("grid").replaceChildren(...rows);
}

function addImage({ index, label, png }) {
  const bytes = Uint8Array.from(atob(png), (c) => c.charCodeAt(0));
  const src = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  const { seed, count } = shown.asked;
  const image = element("img", { src, alt: `Image ${index}: ${titleOf(label)}` });
  const download = `seed${seed}_image${index}_class${label}.png`;
  const link = element("a", { href: src, download, title: "Download" });
  link.append(image);
  link.addEventListener("click", (event) => {
    const scale = Number($("size").value);
    if (!(scale > 1)) return;
    event.preventDefault();
    const { canvas, draw } = blank(scale * image.naturalWidth, scale * image.naturalHeight);
    draw(image, 0, 0, canvas.width, canvas.height);
    saveCanvas(canvas, download);
  });
  const row = $("grid").children[Math.floor(index / count)];
  row.querySelectorAll("ul > li")[index % count].replaceChildren(link);
  shown.images[index] = image;
}

function showFigures(last, milliseconds, first) {
  const time = (ms) =>
    ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`;
  $("latency").textContent = time(milliseconds);
  $("first").textContent = time(first);
  $("device").textContent = time(last.device_ms);
  $("rate").textContent = last.images_per_second.toLocaleString("en");
  $("figures").hidden = false;
}

function commandFor({ labels, count, alpha, seed, style }) {
  // A class may be called by the number of another.
  const named = model.class_names.some((n, i) => /^\d+$/.test(n) && +n !== i);
  const classes = labels.map((label) => (named ? `index:${label}` : label));
  const styles = style ? ` --style=${style.join(",")}` : "";
  return (
    `python -m drift_jax.sample --from=… --labels=${classes.join(",")} ` +
    `--count=${count} --alpha=${alpha} --seed=${seed}${styles}`
  );
}

function save(blob, name) {
  const href = URL.createObjectURL(blob);
  element("a", { href, download: name }).click();
  URL.revokeObjectURL(href);
}

// A white picture, and what draws images on it without smoothing them.
function blank(width, height) {
  const canvas = element("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  return { canvas, draw: context.drawImage.bind(context) };
}

function saveCanvas(canvas, name) {
  canvas.toBlob((blob) => {
    if (blob) save(blob, name);
    else say("The picture is too large for this browser.");
  }, "image/png");
}

// As drift_jax.sample lays it out.
async function downloadGrid() {
  const [height, width] = model.image_shape;
  const { asked, images } = shown;
  const scale = Math.max(1, Math.floor(48 / height));
  const padding = 2;
  const columns = Math.min(asked.count, MAX_COLUMNS);
  const rows = Math.ceil(images.length / columns);
  const stepX = scale * width + padding;
  const stepY = scale * height + padding;
  const { canvas, draw } = blank(
    columns * stepX + padding,
    rows * stepY + padding,
  );
  await Promise.all(images.map((image) => image?.decode()));
  images.forEach((image, i) => {
    const x = padding + (i % columns) * stepX;
    const y = padding + Math.floor(i / columns) * stepY;
    if (image) draw(image, x, y, scale * width, scale * height);
  });
  saveCanvas(canvas, `seed${asked.seed}_alpha${asked.alpha}.png`);
}

// Start.

function setUp() {
  const [low, high] = model.alpha_range;
  const [height, width] = model.image_shape;
  const facts = [
    model.num_classes > 1 ? `${model.num_classes} classes` : "",
    `${height}×${width} pixels`,
    model.step === null ? "" : `step ${model.step}`,
    model.ema_decay === null ? "" : `EMA ${model.ema_decay}`,
  ];
  $("name").textContent = model.name;
  document.title = `${model.name} · drift_jax`;
  $("about").textContent = facts.filter(Boolean).join(" · ");

  // Steps that end exactly at the range's ends.
  const steps = Math.max(1, Math.round((high - low) / 0.05));
  const step = low < high ? (high - low) / steps : 1;
  Object.assign($("alpha"), { min: low, max: high, step, value: low });
  $("alpha").disabled = low === high;
  $("alpha-low").textContent = low;
  $("alpha-high").textContent = high;

  $("count").max = model.max_images;
  $("seed").max = model.max_seed;
  $("style-field").hidden = !model.style_tokens;
  $("style-hint").textContent =
    `0 to ${model.style_vocab - 1}, or ${model.style_tokens} of them`;

  const longest = Math.max(height, width);
  const scale = Math.ceil(DOWNLOADED / longest);
  const sizes = scale > 1 ? [scale, 1] : [];
  $("size").replaceChildren(
    ...sizes.map((value) => {
      const pixels = `${value * width}×${value * height}`;
      return element("option", { value, textContent: `${pixels} pixels` });
    }),
  );
  $("size").hidden = $("size-label").hidden = scale === 1;
  const cell = [32, 64, 128].findIndex((size) => longest <= size);
  const size = [64, 96, 128, 192][cell < 0 ? 3 : cell];
  $("grid").style.setProperty("--cell", `${size}px`);
  $("grid").style.setProperty("--ratio", `${width} / ${height}`);
  $("grid").classList.toggle("pixels", longest < size);
  const all = Array.from({ length: model.num_classes }, (_, label) => label);
  $("grid").classList.toggle("named", all.some(nameOf));
  $("grid").classList.toggle("single", model.num_classes === 1);
  $("classes-field").hidden = model.num_classes === 1;

  listClasses();
  const first = Math.min(model.num_classes, 10);
  const spaced = Array.from({ length: first }, (_, i) =>
    Math.floor((i * model.num_classes) / first),
  );
  choose(spaced, true);
  search();
  $("generate").disabled = false;
}

function listen() {
  $("search").addEventListener("input", search);
  $("search").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // Chooses the first match; does not generate.
    const found = labelsFound();
    if ($("search").value && found.length) choose(found.slice(0, 1), true);
  });
  $("all").addEventListener("click", () => choose(labelsFound(), true));
  $("none").addEventListener("click", () => choose(labelsChosen(), false));
  $("dice").addEventListener("click", () => {
    $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  });
  for (const id of ["alpha", "count"]) {
    $(id).addEventListener("input", showTotal);
  }
  $("cancel").addEventListener("click", () => request?.abort());
  $("download").addEventListener("click", downloadGrid);
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!request) generate();
  });
}

async function begin() {
  listen();
  try {
    const response = await fetch("api/model");
    model = await response.json();
    if (!response.ok) throw new Error(model.error);
  } catch (error) {
    say(`The model's description did not come: ${error.message}`);
    return;
  }
  setUp();
  const link = new URLSearchParams(location.search);
  if (!link.has("classes")) return; // A proxy's own, perhaps.
  const wrong = followLink(link);
  if (wrong) say(wrong);
  else generate();
}

begin();
