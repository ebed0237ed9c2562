// The page: asks for the state, keeps the history, and draws both.

import { Chart, columns, dots, h, linear, logarithmic, spans, spark } from "./charts.js";
import { ago, amount, bytes, clock, joined, median, number, percent, seconds } from "./format.js";
import { instances, prefixes, tiers } from "./panels.js";

const WINDOW_S = 600, RATE_S = 60, LONGEST_PAUSE_S = 30, ANSWER_S = 10;
const TIERS = { vram: "VRAM", dram: "DRAM", disk: "Disk", peer: "Peers", remote: "Remote" };
const ORDER = Object.keys(TIERS);
const WHY = { absent: "why1", cheaper_to_recompute: "why2", partial_block: "why3" };
const FAULTS = new Set(["corrupt", "foreign", "io_error", "timeout", "breaker_open", "node_away", "owner_gone", "internal"]);

const $ = (id) => document.getElementById(id);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const total = (amounts = {}) => sum(Object.values(amounts));
const over = (found, field, key) => sum(found.map((sample) => sample[field]?.[key] ?? 0));
const tierClass = (tier) => (tier in TIERS ? tier : "other");
const tierName = (tier) => TIERS[tier] ?? tier;
const whyClass = (reason) => WHY[reason] ?? (FAULTS.has(reason) ? "why4" : "why5");
const whyName = (reason) => reason.replaceAll("_", " ");

let state = null, samples = [], failures = 0, timer = 0, answered = 0, asking = false, paused = false;
let token = sessionStorage.getItem("cairn token") ?? "";
if (location.hash.startsWith("#token=")) {
  token = decodeURIComponent(location.hash.slice(7));
  sessionStorage.setItem("cairn token", token);
  history.replaceState(null, "", location.pathname);
}

// --- asking ---------------------------------------------------------------------------------------------------------

async function poll() {
  if (asking) return;
  asking = true;
  clearTimeout(timer);
  const next = await answer();
  asking = false;
  failures = next ? 0 : failures + 1;
  const pause = Math.min(LONGEST_PAUSE_S, (state?.period_s ?? 2) * 2 ** failures);
  if (!paused && !document.hidden && $("login").hidden) timer = setTimeout(poll, pause * 1e3);
  if (next && !paused) take(next);
}

/** The state, with the samples that are new; null: there was no answer, and the page says so. */
async function answer() {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  try {
    const response = await fetch(`../api/v1/state?since=${state?.seq ?? ""}`, { headers, signal: AbortSignal.timeout(ANSWER_S * 1e3) });
    if (response.ok) return await response.json();
    if (response.status === 401 || response.status === 403) ask();
    else connection("error", `the service answers ${response.status}; trying again`);
  } catch {
    connection("stale", `no answer${answered ? ` since ${clock(answered / 1e3, true)}` : ""}; trying again`);
  }
  return null;
}

function ask() {
  $("refused").textContent = token ? "That key is not the right one." : "";
  connection("error", "a key is needed");
  $("main").hidden = true;
  $("login").hidden = false;
  $("token").focus();
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  sessionStorage.setItem("cairn token", token);
  $("main").hidden = false;
  $("login").hidden = true;
  poll();
});

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  $("pause").textContent = paused ? "Resume" : "Pause";
  if (!paused) return poll();
  clearTimeout(timer);
  connection("paused", `paused at ${clock(Date.now() / 1e3, true)}`);
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !paused && $("login").hidden) poll();
});

function connection(kind, text) {
  document.body.dataset.connection = kind;
  if ($("connection").textContent !== text) $("connection").textContent = text;
}

function take(next) {
  if (state && next.started !== state.started) {
    state = null; // another process: its numbers mean other samples
    samples = [];
    return poll();
  }
  const before = state?.instances ?? [];
  samples = [...samples, ...next.samples].slice(-Math.ceil(WINDOW_S / next.period_s));
  state = next;
  answered = Date.now();
  connection("live", `live, every ${next.period_s} s`);
  tell(before, next.instances);
  draw();
}

function tell(before, now) {
  const known = new Map(before.map((one) => [one.name, one.state ?? "ready"]));
  const changed = now.filter((one) => known.size && known.get(one.name) !== (one.state ?? "ready"));
  for (const one of changed) $("news").append(h("p", {}, `${one.name} is ${one.state ?? "ready"}`));
  while ($("news").childElementCount > 20) $("news").firstChild.remove();
}

// --- charts ---------------------------------------------------------------------------------------------------------

const order = (keys) => [...new Set(keys)].sort((a, b) => rank(a) - rank(b));
const rank = (tier) => (tier in TIERS ? ORDER.indexOf(tier) : ORDER.length);
const keysOf = (found, ...fields) => found.flatMap((span) => span.samples).flatMap((one) => fields.flatMap((field) => Object.keys(one[field] ?? {})));
const rate = (field, key) => (span) => over(span.samples, field, key) / span.seconds;
const asked = (found) => sum(found.map((one) => total(one.hit_tokens) + total(one.missed_tokens)));

const hits = new Chart($("hits"), {
  empty: "No prompt has been looked up in this time.",
  plot(found) {
    const keys = order(keysOf(found, "hit_tokens"));
    const share = (span, key) => over(span.samples, "hit_tokens", key) / asked(span.samples) || 0;
    const missed = (span) => (asked(span.samples) ? 1 - sum(keys.map((key) => share(span, key))) : 0);
    const parts = keys.map((key) => ({ cls: tierClass(key), values: found.map((span) => share(span, key)) }));
    parts.push({ cls: "miss", values: found.map(missed) });
    const all = found.flatMap((span) => span.samples), tokens = asked(all);
    const legend = keys.map((key) => ({ cls: tierClass(key), label: tierName(key), value: `${percent(over(all, "hit_tokens", key) / tokens)} %` }));
    if (tokens) legend.push({ cls: "miss", label: "Miss", value: `${percent(sum(all.map((one) => total(one.missed_tokens))) / tokens)} %` });
    const said = tokens && legend.map((one) => `${one.label} ${one.value}`).join(", ");
    return { marks: [0, 0.25, 0.5, 0.75, 1], label: (mark) => `${mark * 100} %`, draw: columns(found, parts), legend, said };
  },
  rows(span) {
    const tokens = asked(span.samples), value = (part) => (tokens ? `${percent(part / tokens)} %` : "–");
    const keys = order(keysOf([span], "hit_tokens"));
    const rows = keys.map((key) => ({ cls: tierClass(key), label: tierName(key), value: value(over(span.samples, "hit_tokens", key)) }));
    rows.push({ cls: "miss", label: "Miss", value: value(sum(span.samples.map((one) => total(one.missed_tokens)))) });
    return [...rows, { cls: "", label: "Tokens/s", value: joined(amount(tokens / span.seconds)) }];
  },
});

const misses = new Chart($("misses"), {
  empty: "Nothing was missed.",
  plot(found) {
    const all = found.flatMap((span) => span.samples), size = (key) => over(all, "missed_tokens", key);
    const keys = [...new Set(keysOf(found, "missed_tokens"))].sort((a, b) => size(b) - size(a));
    const parts = keys.map((key) => ({ cls: whyClass(key), values: found.map(rate("missed_tokens", key)) }));
    const marks = linear(Math.max(...found.map((_, i) => sum(parts.map((part) => part.values[i]))), 1));
    const missed = sum(keys.map(size));
    const legend = keys.slice(0, 4).map((key) => ({ cls: whyClass(key), label: whyName(key), value: `${percent(size(key) / missed)} %` }));
    return { marks, label: (mark) => joined(amount(mark)), draw: columns(found, parts), legend, said: missed && legend.map((one) => `${one.label} ${one.value}`).join(", ") };
  },
  rows: (span) => [...new Set(keysOf([span], "missed_tokens"))].map((key) => ({ cls: whyClass(key), label: whyName(key), value: `${joined(amount(rate("missed_tokens", key)(span)))} tokens/s` })),
});

/** Points of one kind of request: [t, seconds, how many requests it stands for]. */
const points = (found, kind) => found.flatMap((one) => (one[`${kind}_s`] ?? []).map((value) => [one.t, value, one[kind] / one[`${kind}_s`].length]));
const middle = (found, kind) => median(points(found, kind).map((one) => one[1]), points(found, kind).map((one) => one[2]));
const count = (found, kind) => sum(found.map((one) => one[kind] ?? 0));
const KINDS = [["cold", "Cold", "ring"], ["hit", "Hit", "dot"]];

const ttft = new Chart($("ttft"), {
  empty: "No stream has begun in this time.",
  plot(found) {
    const all = found.flatMap((span) => span.samples);
    const parts = KINDS.map(([kind, , mark]) => ({
      cls: kind,
      mark,
      points: points(all, kind),
      line: found.map((span) => [span.t + span.length / 2, middle(span.samples, kind)]).filter((point) => point[1]),
    }));
    const values = parts.flatMap((part) => part.points.map((point) => point[1]));
    const legend = KINDS.filter(([kind]) => count(all, kind)).map(([kind, label, mark]) => ({ cls: `${kind} ${mark}`, label, value: `${joined(seconds(middle(all, kind)))} p50 of ${number(count(all, kind))}` }));
    const marks = values.length ? logarithmic(Math.min(...values), Math.max(...values)) : [0.01, 0.1, 1];
    return { marks, log: true, label: (mark) => joined(seconds(mark)), draw: dots(parts), legend, said: values.length && legend.map((one) => `${one.label} ${one.value}`).join(", ") };
  },
  rows: (span) => KINDS.map(([kind, label, mark]) => ({ cls: `${kind} ${mark}`, label: `${label} p50`, value: `${joined(seconds(middle(span.samples, kind)))} (${count(span.samples, kind)})` })),
});

const moves = new Chart($("moves"), {
  empty: "Nothing has been moved in this time.",
  plot(found) {
    const keys = order(keysOf(found, "load_bytes", "store_bytes"));
    const values = (field, key) => found.map(rate(field, key));
    const loads = keys.map((key) => ({ cls: tierClass(key), values: values("load_bytes", key) }));
    const stores = keys.map((key) => ({ cls: tierClass(key), values: values("store_bytes", key), down: true }));
    const most = (parts) => Math.max(...found.map((_, i) => sum(parts.map((part) => part.values[i]))), 0);
    const up = most(loads), down = most(stores), step = linear(Math.max(up, down), 1024)[1];
    const marks = Array.from({ length: Math.ceil(up / step) + Math.ceil(down / step) + 1 }, (_, i) => (i - Math.ceil(down / step)) * step);
    const all = found.flatMap((span) => span.samples), time = sum(found.map((span) => span.seconds)) || 1;
    const each = (key) => `${joined(bytes(over(all, "load_bytes", key) / time))}/s loaded, ${joined(bytes(over(all, "store_bytes", key) / time))}/s stored`;
    const legend = keys.map((key) => ({ cls: tierClass(key), label: tierName(key), value: each(key) }));
    return { marks: marks.length > 1 ? marks : [0, 1], label: (mark) => joined(bytes(Math.abs(mark))), draw: columns(found, [...loads, ...stores]), legend, said: up + down && legend.map((one) => `${one.label} ${one.value}`).join("; ") };
  },
  rows: (span) => order(keysOf([span], "load_bytes", "store_bytes")).flatMap((key) => [["load_bytes", "load"], ["store_bytes", "store"]].map(([field, word]) => ({ cls: tierClass(key), label: `${tierName(key)} ${word}`, value: `${joined(bytes(rate(field, key)(span)))}/s` }))),
});

// --- everything -----------------------------------------------------------------------------------------------------

function draw() {
  const service = state.kind === "service", now = samples.at(-1)?.t ?? state.time;
  const from = Math.min(Math.max(now - WINDOW_S, samples[0]?.t ?? 0), now - RATE_S);
  $("kind").textContent = service ? "" : state.kind;
  $("name").textContent = state.name;
  $("notice").hidden = !state.instances.some((one) => one.version === "simulated");
  $("notice").textContent = "The model and the time that prefill takes are made up. Keys, tiers, hits, misses and bytes are Cairn's own.";
  for (const id of ["hits", "misses", "ttft", "prefixes"]) $(id).hidden = !service;
  $("moves").classList.toggle("half", service);
  for (const chart of service ? [hits, misses, ttft, moves] : [moves]) chart.update(samples, state.period_s, from, now);
  $("tiles").replaceChildren(...tiles(service));
  const late = samples.filter((one) => one.t > now - RATE_S);
  tiers($("tiers"), state, late, { name: tierName, cls: tierClass });
  instances($("instances"), state);
  prefixes($("prefixes"), state);
  $("about").textContent = `Cairn ${state.version}, up ${ago(state.time - state.started)}, history of ${ago(samples.length * state.period_s)}`;
  const share = hitRate(late);
  document.title = `${share == null ? "" : `${percent(share)} % hit, `}Cairn ${state.name}`;
}

const hitRate = (found) => (asked(found) ? sum(found.map((one) => total(one.hit_tokens))) / asked(found) : null);

function tiles(service) {
  const now = samples.at(-1)?.t ?? state.time, late = samples.filter((one) => one.t > now - RATE_S);
  const time = late.length * state.period_s || 1, history = spans(samples, state.period_s, 24 * 9, now - WINDOW_S);
  const per = (field) => (found, time) => sum(found.map((one) => (typeof one[field] === "number" ? one[field] : total(one[field])))) / time;
  const line = (value) => history.map((span) => value(span.samples, span.seconds));
  const measured = state.instances.filter((one) => one.measured).length;
  const found = [];
  if (service) {
    const cold = middle(samples, "cold"), hit = middle(samples, "hit");
    found.push(
      tile("Hit rate", [percent(hitRate(late)), hitRate(late) == null ? "" : "%"], `of ${joined(amount(asked(late) / time))} prompt tokens/s${!measured ? ", as routed" : ""}`, spark(line(hitRate), "hit")),
      tile("TTFT of hits, p50", seconds(hit), cold && hit ? `${number(cold / hit, 2)} times faster than cold` : "no hit yet", spark(line((one) => middle(one, "hit") ?? 0), "hit")),
      tile("TTFT cold, p50", seconds(cold), `${number(count(samples, "cold"))} of ${number(count(samples, "cold") + count(samples, "hit"))} requests`, spark(line((one) => middle(one, "cold") ?? 0), "cold")),
      tile("Requests", [number(per("requests")(late, time)), "/s"], `${samples.at(-1)?.running ?? 0} running, ${samples.at(-1)?.waiting ?? 0} waiting, ${number(sum(late.map((one) => one.failures ?? 0)))} failed`, spark(line(per("requests")), "accent")),
    );
  }
  const loads = bytes(per("load_bytes")(late, time)), stores = bytes(per("store_bytes")(late, time));
  found.push(tile("Loaded", [loads[0], `${loads[1]}/s`], `${joined(stores)}/s stored`, spark(line(per("load_bytes")), "accent")));
  if (!service) return [...found, tile("Clients", [number(samples.at(-1)?.running ?? 0), ""], `in ${state.instances.length} pools`)];
  const ready = state.instances.filter((one) => (one.state ?? "ready") === "ready").length;
  const rest = state.instances.filter((one) => one.state && one.state !== "ready").map((one) => one.state);
  const words = [...new Set(rest)].map((word) => `${rest.filter((one) => one === word).length} ${word}`);
  found.push(tile("Instances ready", [number(ready), ""], words.join(", ") || "none missing"));
  return found;
}

function tile(name, [figure, unit], below, drawing) {
  return h("div", { class: "tile" }, h("b", {}, name), h("strong", {}, figure, unit ? h("i", {}, unit) : ""), drawing, h("span", {}, below));
}

poll();
