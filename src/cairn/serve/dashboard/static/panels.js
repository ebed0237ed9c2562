// Tables and the tree: what stands now, beside what the charts tell of time.

import { h } from "./charts.js";
import { ago, bytes, joined, number, percent, seconds } from "./format.js";

const ROLES = { DEFAULT: "default", PREFILL: "prefill", DECODE: "decode", MIX: "mixed" };
const HOLDERS = 8;

const empty = (title, ...words) => h("div", { class: "empty" }, h("b", {}, title), ...words);
const note = (section, text) => (section.querySelector("h2 small").textContent = text);

function meter(share, cls) {
  const bar = h("i");
  bar.style.width = `${Math.min(100, 100 * share)}%`;
  return h("span", { class: `meter ${cls}`, "aria-hidden": "true" }, bar);
}

/** What the tiers hold, and what they did lately. */
export function tiers(section, state, late, { name, cls }) {
  const time = late.length * state.period_s || 1;
  const per = (field, tier) => late.reduce((sum, one) => sum + (one[field]?.[tier] ?? 0), 0) / time;
  const shown = (state.tiers ?? []).map((one) => {
    const used = one.used_bytes ?? 0, capacity = one.capacity_bytes ?? 0;
    const fill = capacity ? `${joined(bytes(used))} of ${joined(bytes(capacity))}` : `${joined(bytes(used))}, no bound known`;
    const said = `${name(one.tier)}: ${fill}${capacity ? `, ${percent(used / capacity)} %` : ""}`;
    return h(
      "div", { class: "tier" },
      h("span", {}, h("b", {}, name(one.tier)), one.shared ? " shared by a host" : ""),
      h("span", { "aria-label": said }, fill),
      capacity ? meter(used / capacity, cls(one.tier)) : null,
      h("span", {}, `${number(one.blocks ?? 0, 6)} blocks`),
      h("span", {}, `${number(per("hit_tokens", one.tier))} hit tokens/s`),
    );
  });
  section.querySelector(".body").replaceChildren(...(shown.length ? shown : [empty("No tier is reported.", "Engines report theirs in /metrics once Cairn's connector is loaded in them.")]));
}

/** One row an instance. */
export function instances(section, state) {
  const more = state.more_instances ? `, and ${state.more_instances} more` : "";
  const unmeasured = state.instances.filter((one) => !one.measured && one.state !== "gone").length;
  const service = state.kind === "service";
  section.querySelector("h2").firstChild.textContent = service ? "Instances " : "Pools ";
  note(section, state.instances.length ? `${state.instances.length}${more}${unmeasured && service ? `; of ${unmeasured} the hit rate is what was expected when routing` : ""}` : "");
  const body = section.querySelector(".body");
  if (!state.instances.length) {
    if (!service) return body.replaceChildren(empty("No engine has connected to this node yet.", "Each geometry that one brings gets a pool."));
    return body.replaceChildren(empty("There are no engines yet.", "Name them with ", h("code", {}, "cairn serve --backend URL"), ", or let them join by ", h("code", {}, "cairn register"), "."));
  }
  const heads = COLUMNS.filter((column) => column.only(state));
  body.replaceChildren(
    h("div", { class: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Name"), heads.map((one) => h("th", { scope: "col", class: one.text ? "" : "n" }, one.label)))),
      h("tbody", {}, state.instances.map((one) => row(one, heads, state))),
    )),
  );
}

const serves = (state) => state.kind === "service";
const any = (field) => (state) => state.instances.some((one) => one[field] != null);
const COLUMNS = [
  { label: "Role", text: true, only: serves, cell: (one) => h("span", { class: "role" }, ROLES[one.role ?? "DEFAULT"]) },
  { label: "State", text: true, only: serves, cell: (one, state) => h("span", { class: `state ${one.state ?? "ready"}` }, `${one.state ?? "ready"}${one.state === "gone" ? ` for ${ago(state.time - one.since)}` : ""}`) },
  { label: "Hit rate", only: serves, cell: (one) => (one.hit_rate == null ? "–" : h("span", {}, meter(one.hit_rate, "hit"), `${percent(one.hit_rate)} %`)) },
  { label: "Clients", only: (state) => !serves(state), cell: (one) => number(one.running ?? 0) },
  { label: "Running", only: serves, cell: (one) => number(one.running ?? 0) },
  { label: "Waiting", only: serves, cell: (one) => number(one.waiting ?? 0) },
  { label: "Queued tokens", only: serves, cell: (one) => number(one.queued_tokens ?? 0, 6) },
  { label: "KV cache", only: any("kv_usage"), cell: (one) => (one.kv_usage == null ? "–" : h("span", {}, meter(one.kv_usage, "vram"), `${percent(one.kv_usage)} %`)) },
  { label: "TTFT", only: any("ttft_s"), cell: (one) => joined(seconds(one.ttft_s)) },
  { label: "TPOT", only: any("tpot_s"), cell: (one) => joined(seconds(one.tpot_s)) },
  { label: "Blocks indexed", only: any("indexed_blocks"), cell: (one) => (one.indexed_blocks == null ? "–" : number(one.indexed_blocks, 9)) },
  { label: "Model", text: true, only: any("model"), cell: (one) => one.model ?? "–" },
];

function row(one, heads, state) {
  const gone = one.state === "gone";
  const cells = heads.map((head) => h("td", { class: head.text ? "" : "n", "data-label": head.label }, gone && !head.text ? "–" : head.cell(one, state)));
  return h("tr", { class: gone ? "gone" : "", "data-name": one.name }, h("th", { scope: "row", title: one.http }, one.name), cells);
}

// --- the tree of prefixes -------------------------------------------------------------------------------------------

const turned = new Set(); // digests of nodes that were opened or closed by hand: at first roots alone are open
let drawn = "";

/** What recent prompts begin with, and who holds it. Keys as in every tree: up, down, left, right, Home, End. */
export function prefixes(section, state) {
  const names = state.instances.filter((one) => one.state !== "gone").map((one) => one.name);
  const now = JSON.stringify([state.hot, names]);
  if (now === drawn) return;
  drawn = now;
  note(section, state.prompts ? `shared beginnings of the last ${state.prompts} prompts; bars: how much of it each instance holds, as far as the router knows` : "");
  const body = section.querySelector(".body"), nodes = state.hot ?? [];
  if (!nodes.length) return body.replaceChildren(state.prompts ? empty("No two recent prompts begin alike.") : empty("There were no requests yet.", "Point an OpenAI client at ", h("code", {}, `${location.origin}/v1`), "; ", h("code", {}, "make dashboard"), " brings traffic of its own."));
  const shown = names.slice(0, HOLDERS), focused = document.activeElement?.dataset?.digest;
  const heads = h("div", { class: "heads", "aria-hidden": "true" }, h("span", {}, "Begins with"), h("span", { class: "num" }, "Tokens"), h("span", {}, "Prompts"), h("span", { class: "cells" }, shown.map((name) => h("span", { title: name }, name))));
  const tree = h("ul", { class: "tree", role: "tree", "aria-label": "Hottest prefixes" });
  const most = Math.max(...nodes.map((one) => one.requests));
  nodes.forEach((one, i) => tree.append(item(one, shown, nodes[i + 1]?.depth > one.depth, most)));
  body.replaceChildren(heads, tree);
  fold(tree);
  const keep = [...tree.children].find((line) => line.dataset.digest === focused) ?? tree.firstElementChild;
  keep.tabIndex = 0;
  if (focused) keep.focus();
  tree.addEventListener("keydown", (event) => walk(event, tree));
  tree.addEventListener("click", (event) => toggle(event.target.closest("[role=treeitem]"), tree));
}

function item(one, names, parent, most) {
  const held = names.filter((name) => one.held?.[name]).map((name) => `${name} ${percent(one.held[name])} %`);
  const label = one.text || `prefix ${one.digest}`;
  const cells = names.map((name) => {
    const fill = h("i");
    fill.style.height = `${100 * (one.held?.[name] ?? 0)}%`;
    return h("span", { class: "cell", title: `${name}: ${percent(one.held?.[name] ?? 0)} %` }, fill);
  });
  const text = h("span", { class: "text" }, h("span", { title: label }, one.text ? `${one.depth ? "… " : ""}${label}` : h("code", {}, label)));
  text.style.paddingLeft = `${18 * (one.depth ?? 0)}px`;
  const said = `${label}: ${one.tokens} tokens, ${one.requests} prompts, held by ${held.join(", ") || "nobody"}`;
  const line = h("li", { role: "treeitem", tabindex: -1, "aria-level": (one.depth ?? 0) + 1, "aria-label": said, "data-digest": one.digest, class: parent ? "" : "leaf" },
    text, h("span", { class: "num" }, number(one.tokens, 6)), h("span", {}, meter(one.requests / most, "accent"), number(one.requests)), h("span", { class: "cells" }, cells));
  if (parent) line.setAttribute("aria-expanded", turned.has(one.digest) !== (one.depth === 0));
  return line;
}

/** Hides what lies below closed nodes. */
function fold(tree) {
  let hidden = Infinity;
  for (const line of tree.children) {
    const level = Number(line.ariaLevel);
    line.hidden = level > hidden;
    if (!line.hidden) hidden = line.ariaExpanded === "false" ? level : Infinity;
  }
}

function toggle(line, tree, open = line?.ariaExpanded === "false") {
  if (!line?.hasAttribute("aria-expanded")) return;
  line.setAttribute("aria-expanded", open);
  if (!turned.delete(line.dataset.digest)) turned.add(line.dataset.digest);
  fold(tree);
}

function walk(event, tree) {
  const lines = [...tree.children].filter((line) => !line.hidden), at = lines.indexOf(document.activeElement), line = lines[at];
  if (at < 0) return;
  const above = lines.slice(0, at).findLast((one) => Number(one.ariaLevel) < Number(line.ariaLevel));
  const closes = line.ariaExpanded === "true", opens = line.ariaExpanded === "false";
  const to = { ArrowDown: lines[at + 1], ArrowUp: lines[at - 1], Home: lines[0], End: lines.at(-1), ArrowLeft: closes ? line : above, ArrowRight: closes ? lines[at + 1] : line }[event.key];
  if (event.key === "ArrowLeft" && closes) toggle(line, tree, false);
  else if ((event.key === "ArrowRight" && opens) || event.key === "Enter") toggle(line, tree, event.key === "Enter" ? undefined : true);
  else if (!to) return;
  event.preventDefault();
  if (!to || to === line) return;
  line.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}
