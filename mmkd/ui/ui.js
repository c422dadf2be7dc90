"use strict";

const TOKEN = document.querySelector('meta[name="mmkd-token"]').content;
const EVERY = 2000;
const STYLES = [
  ["#000000", ""], ["#b2182b", "6 3"], ["#2166ac", "8 3 2 3"], ["#666666", "2 2"],
  ["#1b7837", ""], ["#762a83", "6 3"], ["#e08214", "8 3 2 3"], ["#01665e", "2 2"],
];

const state = { runs: [], chosen: [], tab: "curves", drawn: "", sides: [], sidesOf: null, talks: {}, busy: null };
const byId = (id) => document.getElementById(id);

// Elements and requests

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "line", "polyline", "path", "text", "rect", "circle"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

async function get(path) {
  return answered(await fetch(path));
}

async function post(path, body, signal) {
  const headers = { "Content-Type": "application/json", "X-Mmkd-Token": TOKEN };
  return fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function answered(response) {
  if (response.ok) return response.json();
  const text = await response.text();
  let message = text;
  try { message = JSON.parse(text).error; } catch { /* It is text. */ }
  throw new Error(message);
}

function problem(text) {
  byId("problem").hidden = !text;
  byId("problem").textContent = text || "";
}

function query(names) {
  return names.map((name) => `run=${encodeURIComponent(name)}`).join("&");
}

function shortNumber(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

// The list of runs

async function refresh() {
  try {
    state.runs = (await get("/api/runs")).runs;
    problem("");
  } catch (error) {
    problem(error instanceof TypeError ? "The server does not answer. Is `mmkd ui` still running?" : error.message);
    return;
  }
  const known = new Set(state.runs.map((run) => run.name));
  state.chosen = state.chosen.filter((name) => known.has(name));
  if (!state.chosen.length && state.runs.length) state.chosen = [state.runs[0].name];
  drawRuns();
  await drawTab();
}

function drawRuns() {
  const items = state.runs.map((run) => {
    const of = run.planned ? ` of ${run.planned.toLocaleString("en")}` : "";
    const facts = [];
    if (run.loss !== null) facts.push(`loss ${shortNumber(run.loss)}`);
    if (run.kl !== null) facts.push(`KL ${shortNumber(run.kl)}`);
    if (run.state === "running" && run.eta_minutes !== null) facts.push(`${shortNumber(run.eta_minutes)} min left`);
    const chosen = state.chosen.includes(run.name);
    const bar = run.planned && run.state !== "finished" ? make("progress", { max: run.planned, value: run.step }) : null;
    const step = run.kind === "comparison" ? "comparison" : `${run.part ? `${run.part}, ` : ""}step ${run.step}${of}`;
    return make(
      "li", { class: chosen ? "chosen" : "" },
      make("input", {
        type: "checkbox", "aria-label": `compare ${run.title}`, checked: chosen,
        onchange: (event) => tick(run.name, event.target.checked),
      }),
      make(
        "button", { class: "run", "data-run": run.name, onclick: () => choose([run.name]) },
        make("div", { class: "name" }, run.title),
        make("div", { class: "facts" }, make("span", { class: `state-${run.state}` }, run.state), ` · ${step}`),
        bar,
        make("div", { class: "facts" }, [run.method, run.data, ...facts].filter(Boolean).join(" · ")),
      ),
    );
  });
  const focused = document.activeElement?.dataset?.run;
  byId("runs").replaceChildren(...items);
  if (focused !== undefined) [...byId("runs").querySelectorAll(".run")].find((run) => run.dataset.run === focused)?.focus();
  byId("hint").textContent = state.runs.length
    ? "Choose a run. Tick several to compare them."
    : "There are no runs here yet. A training writes its folder when it begins.";
}

function tick(name, on) {
  choose(on ? [...state.chosen, name] : state.chosen.filter((other) => other !== name));
}

function showChosen() {
  byId("runs").querySelector(".chosen")?.scrollIntoView({ block: "nearest" });
}

function choose(names) {
  state.chosen = names;
  state.drawn = "";
  remember();
  drawRuns();
  drawTab();
}

function showTab(name) {
  state.tab = name;
  state.drawn = "";
  remember();
  drawTab();
}

function remember() {
  const parts = new URLSearchParams([["tab", state.tab], ...state.chosen.map((name) => ["run", name])]);
  history.replaceState(null, "", `#${parts}`);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  state.chosen = parts.getAll("run");
  if (byId(parts.get("tab") || "")?.getAttribute("role") === "tabpanel") state.tab = parts.get("tab");
}

async function drawTab() {
  for (const button of byId("tabs").children) {
    button.setAttribute("aria-selected", String(button.dataset.tab === state.tab));
    byId(button.dataset.tab).hidden = button.dataset.tab !== state.tab;
  }
  if (!state.chosen.length) return;
  // What is shown is drawn again when one of its runs has gone on.
  const marks = state.runs.filter((run) => state.chosen.includes(run.name)).map((run) => [run.name, run.changed, run.state]);
  const wanted = JSON.stringify([state.tab, state.chosen, state.tab === "talk" ? null : marks]);
  if (wanted === state.drawn) return;
  state.drawn = wanted;
  try {
    await { curves: drawCurves, report: drawReport, samples: drawSamples, talk: drawTalk }[state.tab](wanted);
  } catch (error) {
    state.drawn = "";
    problem(error.message);
  }
}

// Curves

async function drawCurves(wanted) {
  const panels = await get(`/api/curves?${query(state.chosen)}`);
  if (wanted !== state.drawn) return;
  const charts = panels.map(chart);
  const empty = make("p", { class: "quiet" }, "Nothing is logged yet.");
  byId("curves").replaceChildren(make("div", { class: "charts" }, ...(charts.length ? charts : [empty])));
}

function ticksOf(low, high, log) {
  if (log) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const step of high / low < 1000 ? [1, 2, 5] : [1]) {
        const tick = Number((step * 10 ** power).toPrecision(3));
        if (tick >= low && tick <= high) ticks.push(tick);
      }
    }
    if (ticks.length > 1) return ticks;
  }
  const rough = (high - low) / 5 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const ticks = [];
  for (let number = Math.ceil(low / step); number * step <= high + step * 1e-9; number += 1) {
    ticks.push(Number((number * step).toPrecision(12)));
  }
  return ticks;
}

function chart(panel) {
  const box = { left: 52, right: 470, top: panel.spans.length ? 20 : 8, bottom: 200, width: 480, height: 230 };
  const points = panel.lines.flatMap((line) => line.points).filter(([, y]) => y !== null);
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  let [left, right] = [Math.min(0, ...xs), Math.max(...xs)];
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (left === right) right = left + 1;
  if (low === high) [low, high] = [low - Math.abs(low || 1) * 0.1, high + Math.abs(high || 1) * 0.1];
  // A margin, so that no line lies on the frame.
  const margin = panel.log ? (high / low) ** 0.05 : (high - low) * 0.05;
  [low, high] = panel.log ? [low / margin, high * margin] : [low - (low < 0 || low > margin ? margin : low), high + margin];
  const scale = panel.log ? Math.log : (value) => value;
  const across = (x) => box.left + ((x - left) / (right - left)) * (box.right - box.left);
  const up = (y) => box.bottom - ((scale(y) - scale(low)) / (scale(high) - scale(low))) * (box.bottom - box.top);
  const svg = make("svg", { viewBox: `0 0 ${box.width} ${box.height}`, role: "img", "aria-label": panel.title });
  panel.spans.forEach(([name, from, to], number) => {
    const [start, end] = [Math.max(box.left, across(from)), Math.min(box.right, across(to))];
    if (number % 2) svg.append(make("rect", { x: start, y: box.top, width: Math.max(0, end - start), height: box.bottom - box.top, fill: "#f1f1f1" }));
    if (name.length * 6 < end - start) svg.append(make("text", { x: (start + end) / 2, y: 14, "text-anchor": "middle" }, name));
  });
  for (const tick of ticksOf(low, high, panel.log)) {
    svg.append(make("line", { class: "grid", x1: box.left, x2: box.right, y1: up(tick), y2: up(tick) }));
    svg.append(make("text", { x: box.left - 5, y: up(tick) + 4, "text-anchor": "end" }, shortNumber(tick)));
  }
  for (const tick of ticksOf(left, right, false)) {
    svg.append(make("text", { x: across(tick), y: box.bottom + 14, "text-anchor": "middle" }, tick.toLocaleString("en")));
  }
  svg.append(make("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  svg.append(make("line", { class: "axis", x1: box.left, x2: box.left, y1: box.top, y2: box.bottom }));
  svg.append(make("text", { x: (box.left + box.right) / 2, y: box.height - 2, "text-anchor": "middle" }, "optimizer step"));
  const values = panel.lines.map((line, number) => {
    const [stroke, dash] = STYLES[number % STYLES.length];
    let path = "", broken = true;
    for (const [x, y] of line.points) {
      if (y === null) { broken = true; continue; }
      path += `${broken ? "M" : "L"}${across(x).toFixed(1)} ${up(y).toFixed(1)}`;
      broken = false;
    }
    svg.append(make("path", { class: "line", d: path, stroke, "stroke-dasharray": dash, "data-points": line.points.length }));
    if (line.points.length < 8) {
      for (const [x, y] of line.points) if (y !== null) svg.append(make("circle", { cx: across(x), cy: up(y), r: 3, fill: stroke }));
    }
    return make("span", { class: "value" });
  });
  const legend = panel.lines.map((line, number) => {
    const [stroke, dash] = STYLES[number % STYLES.length];
    const mark = make("svg", { viewBox: "0 0 26 8" }, make("line", { x1: 0, x2: 26, y1: 4, y2: 4, stroke, "stroke-width": 2, "stroke-dasharray": dash }));
    return make("li", {}, mark, `${line.name} `, values[number]);
  });
  const cursor = make("line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" });
  svg.append(cursor);
  const read = (step) => panel.lines.forEach((line, number) => {
    const known = line.points.filter(([, y]) => y !== null);
    const near = known.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best), known[0]);
    values[number].textContent = near ? shortNumber(near[1]) : "";
  });
  read(right);
  svg.addEventListener("mousemove", (event) => {
    const frame = svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * box.width;
    const step = left + ((x - box.left) / (box.right - box.left)) * (right - left);
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    read(step);
  });
  svg.addEventListener("mouseleave", () => { cursor.setAttribute("visibility", "hidden"); read(right); });
  const title = panel.unit ? `${panel.title} (${panel.unit})` : panel.title;
  return make("div", { class: "chart" }, make("h3", {}, title), svg, make("ul", { class: "legend" }, ...legend));
}

// Report

function drawReport() {
  const frames = state.chosen.map((name) => {
    const source = `/report?${query([name])}`;
    const frame = make("iframe", { src: source, title: `Report of ${name}`, sandbox: "allow-popups" });
    return make("div", {}, make("p", {}, make("a", { href: source, target: "_blank", rel: "noopener" }, `Report of ${name} in a tab of its own`)), frame);
  });
  byId("report").replaceChildren(...frames);
}

// Samples

async function drawSamples(wanted) {
  const answers = await get(`/api/samples?${query(state.chosen)}`);
  if (wanted !== state.drawn) return;
  const several = answers.length > 1;
  // One card per question, with the answers of all runs to it.
  const cards = new Map();
  for (const { run, samples } of answers) {
    for (const sample of samples) {
      const key = JSON.stringify([sample.prompt, sample.target, sample.images]);
      const card = cards.get(key) || { ...sample, answers: [] };
      for (const answer of sample.answers) {
        const model = several && answer.model !== "teacher" ? `${run}: ${answer.model}` : answer.model;
        if (!card.answers.some((other) => other.model === model && other.text === answer.text)) card.answers.push({ ...answer, model });
      }
      cards.set(key, card);
    }
  }
  const shown = [...cards.values()].map((card) => {
    const lines = [make("dt", {}, "prompt"), make("dd", {}, card.prompt)];
    if (card.target) lines.push(make("dt", {}, "wanted"), make("dd", {}, card.target));
    for (const answer of card.answers) {
      const judged = answer.right === null ? "" : answer.right ? "right" : "wrong";
      lines.push(make("dt", {}, answer.model), make("dd", { class: judged }, answer.text));
    }
    const images = card.images.map((image, number) =>
      image.startsWith("data:") ? make("img", { src: image, alt: `picture ${number + 1} of the question` }) : make("em", {}, `[${image}]`));
    return make("div", { class: "card" }, make("p", { class: "quiet" }, card.source), ...images, make("dl", {}, ...lines));
  });
  const buttons = answers.map(({ run }) => make("button", { onclick: (event) => makeSamples(event.target, run) }, `Let ${run} answer 4 held-out questions`));
  const note = make("p", { class: "quiet", id: "samples-note" }, shown.length ? "The first ones of each kind, not chosen ones." : "There are no samples yet.");
  byId("samples").replaceChildren(make("div", { class: "bar" }, ...buttons), note, make("div", { class: "cards" }, ...shown));
}

async function makeSamples(button, run) {
  button.disabled = true;
  byId("samples-note").textContent = "Student and teacher are loaded and answer …";
  try {
    const { reason } = await answered(await post("/api/samples", { run, count: 4 }));
    state.drawn = "";
    await drawTab();
    if (reason) byId("samples-note").textContent = reason;
  } catch (error) {
    byId("samples-note").textContent = error.message;
    button.disabled = false;
  }
}

// Talk

async function drawTalk() {
  const run = state.chosen[0];
  if (state.sidesOf === run) return;
  state.sidesOf = run;
  byId("talk-note").textContent = "";
  let sides = [];
  try {
    const reply = await get(`/api/sides?${query([run])}`);
    sides = reply.sides;
    byId("talk-note").textContent = reply.note;
  } catch (error) {
    byId("talk-note").textContent = error.message;
  }
  state.sides = sides;
  const large = sides.filter((side) => !side.fits).map((side) => side.name);
  if (large.length) byId("talk-note").textContent = `Less than half of this machine's memory would be left by: ${large.join(", ")}.`;
  byId("sides").replaceChildren(...sides.map((side) =>
    make("label", {}, make("input", { type: "checkbox", value: side.name, checked: side.fits }), ` ${side.name}`)));
  byId("picture-label").hidden = !sides.some((side) => side.images);
  fresh();
}

function fresh() {
  state.talks = Object.fromEntries(state.sides.map((side) => [side.name, []]));
  state.picture = null;
  byId("picture").value = "";
  byId("columns").replaceChildren(...state.sides.map((side) =>
    make("div", { class: "column", "data-side": side.name }, make("h3", {}, `${side.name} `, make("span", { class: "quiet" }, `${side.model} ${side.size ? `· ${side.size}` : ""}`)))));
}

function columnOf(side) {
  return [...byId("columns").children].find((column) => column.dataset.side === side);
}

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function ask() {
  const question = byId("question").value.trim();
  const sides = [...byId("sides").querySelectorAll("input:checked")].map((input) => input.value);
  if (!question || !sides.length || state.busy) return;
  state.busy = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  byId("question").value = "";
  const file = byId("picture").files[0];
  const begun = Object.values(state.talks).some((talk) => talk.length);
  // Pictures belong to the first question: the models read them there.
  if (file && !begun) state.picture = await asDataUrl(file);
  const boxes = sides.map((side) => {
    state.talks[side].push({ role: "user", content: question });
    const box = make("div", { class: "message assistant waiting" });
    const picture = state.picture && !begun ? make("img", { src: state.picture, alt: "picture of the question" }) : null;
    columnOf(side).append(make("div", { class: "message user" }, picture, question), box);
    return box;
  });
  for (const [number, side] of sides.entries()) {
    await answer(side, boxes[number]);
  }
  state.busy = null;
  byId("send").disabled = false;
  byId("stop").disabled = true;
  byId("question").focus();
}

async function answer(side, box) {
  const body = {
    run: state.sidesOf, side, messages: state.talks[side], images: state.picture ? [state.picture] : [],
    max_new_tokens: Number(byId("tokens").value), temperature: Number(byId("temperature").value),
  };
  let text = "";
  try {
    const response = await post("/api/chat", body, state.busy.signal);
    if (!response.ok) await answered(response);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      text += piece.value;
      if (text.includes("\0")) throw new Error(text.slice(text.indexOf("\0") + 1));
      box.textContent = text;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      box.classList.add("error");
      box.textContent = error.message;
      text = "";
    }
  }
  box.classList.remove("waiting");
  if (text) state.talks[side].push({ role: "assistant", content: text });
  else state.talks[side].pop();
}

async function unload() {
  try {
    const { unloaded } = await answered(await post("/api/unload", {}));
    byId("talk-note").textContent = unloaded === 1 ? "One model is unloaded." : `${unloaded} models are unloaded.`;
  } catch (error) {
    byId("talk-note").textContent = error.message;
  }
}

function begin() {
  recall();
  for (const button of byId("tabs").children) button.addEventListener("click", () => showTab(button.dataset.tab));
  byId("fresh").addEventListener("click", fresh);
  byId("unload").addEventListener("click", unload);
  byId("stop").addEventListener("click", () => state.busy?.abort());
  byId("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); ask(); }
  });
  const poll = async () => {
    if (!document.hidden) await refresh();
    setTimeout(poll, EVERY);
  };
  poll().then(showChosen);
}

begin();
