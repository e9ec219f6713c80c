// The page's script: charts, the pinned head, prompts and replies, all driven by one state that is kept in the URL.
// Text from the run is only ever set as textContent; nothing here parses markup, and nothing is fetched.
"use strict";
(async () => {
  const root = document.documentElement, byId = (id) => document.getElementById(id);

  // Make an element: el("td.num", "text") or el("p", child, child).
  function el(what, ...children) {
    const [tag, ...classes] = what.split(".");
    const node = document.createElement(tag);
    if (classes.length) node.className = classes.join(" ");
    for (const child of children) node.append(child);
    return node;
  }
  const nice = (value) => (typeof value === "number" ? String(+value.toPrecision(4)).replace("-", "−") : typeof value === "boolean" ? (value ? "yes" : "no") : value ?? "–");
  const percent = (value) => (value == null ? "–" : `${nice(Math.round(1000 * value) / 10)} %`);
  const bounded = (value, words) => (Array.isArray(value) ? el("span", words(value[0]), el("small.quiet", `${words(value[1]).replace(" %", "")} to ${words(value[2])}`)) : words(value));
  const options = (select, pairs) => select.replaceChildren(...pairs.map(([value, words]) => Object.assign(el("option", words), { value })));
  const table = (heads, rows) => Object.assign(el("div.scroll", el("table",
    el("thead", el("tr", ...heads.map((words, i) => el(i ? "th.num" : "th", words)))),
    el("tbody", ...rows.map((row) => el("tr", ...row.map((value, i) => el(i ? "td.num" : "td", value))))))), { tabIndex: 0, role: "group", ariaLabel: "table" });
  // A folded box whose content is made when it is first opened.
  function fold(what, words, make) {
    const box = el(what, el("summary", words));
    box.addEventListener("toggle", () => box.open && box.children.length === 1 && box.append(...make()));
    return box;
  }

  const packed = Uint8Array.from(atob(byId("payload").textContent.trim()), (char) => char.charCodeAt(0));
  const payload = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json(), { heads } = payload.pinned;

  const charts = [...document.querySelectorAll("figure[data-figure]")].map((node) => ({
    node, id: node.dataset.figure, plot: node.querySelector(".plot"), place: node.querySelector(".switch"),
    ...payload.figures[node.dataset.figure], at: 0, result: null,
  }));
  const bench = charts.filter(({ views }) => views.some((view) => view.arm)), switched = charts.filter((chart) => chart.views.length > 1 && !bench.includes(chart));
  // what measure and arm can be: the views of the grids; of the other linked charts where there is no grid
  const linked = bench.flatMap(({ views }) => views), grids = linked.filter((view) => view.measure), lead = grids.length ? grids : linked;

  // --- state: what is pinned and shown, in the URL fragment as far as it is not as at first ------------------------
  const start = lead.find((view) => view.measure === lead[0].measure && view.arm === "adversarial − none") || lead[0];  // what the suffix changed
  const first = { head: "", prompt: 0, token: "", measure: start?.measure, arm: start?.arm, find: "", kind: Object.keys(payload.replies.arms)[0], which: "all", sort: "" };
  for (const { id, views } of switched) first[id] = views[0].label;
  const state = { ...first }, followers = [];  // these are called with the names of what changed
  function set(change) {
    const wanted = { ...state, ...change };
    if (lead.length) {  // the state says what is shown: an arm that this measure lacks gives way before any chart follows
      const fits = lead.filter((view) => view.measure === wanted.measure);
      ({ measure: wanted.measure, arm: wanted.arm } = fits.find((view) => view.arm === wanted.arm) || fits[0] || lead[0]);
    }
    const changed = Object.keys(state).filter((key) => state[key] !== wanted[key]);
    if (!changed.length) return;
    Object.assign(state, wanted);
    const kept = new URLSearchParams();
    for (const [key, value] of Object.entries(state)) if (value !== first[key]) kept.set(key, value);
    try { history.replaceState(null, "", kept.size ? `#${kept}` : location.pathname + location.search); } catch { /* a notebook's frame has no address */ }
    for (const follow of followers) follow(changed);
  }
  function fromAddress() {
    if (location.hash && !location.hash.includes("=")) return;  // a link to a section
    const given = new URLSearchParams(location.hash.slice(1)), wanted = { ...first };
    for (const key of ["measure", "arm", "token", "find", "kind", "which", "sort"]) if (given.has(key)) wanted[key] = given.get(key);
    if (Object.hasOwn(heads, given.get("head"))) wanted.head = given.get("head");
    if (payload.prompts[Number(given.get("prompt"))]) wanted.prompt = Number(given.get("prompt"));
    for (const { id, views } of switched) if (views.some((view) => view.label === given.get(id))) wanted[id] = given.get(id);
    set(wanted);
  }
  const pin = (name) => set({ head: name === state.head ? "" : name });
  const go = (id) => { byId(id).focus({ preventScroll: true }); byId(id).scrollIntoView(); };  // the address keeps the state

  // --- charts ------------------------------------------------------------------------------------------------------
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themeNow = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const tip = byId("tip");
  function tooltip(_handler, event, _item, value) {
    if (value == null || value === "") { tip.hidden = true; return; }
    tip.textContent = typeof value === "object" ? Object.entries(value).map(([key, item]) => `${key}: ${nice(item)}`).join("\n") : String(value);
    tip.hidden = false;
    const { clientX: x, clientY: y } = event, box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
    tip.style.top = `${y + 14 + box.height > innerHeight ? y - box.height - 10 : y + 14}px`;
  }
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  async function draw(chart) {
    const name = themeNow(), turn = (chart.turn = (chart.turn || 0) + 1), view = chart.views[chart.at], stage = el("div");
    if (chart.result) { chart.plot.style.minHeight = `${chart.plot.offsetHeight}px`; chart.result.finalize(); }
    chart.plot.replaceChildren(stage);
    chart.result = null;
    if (!view) { chart.plot.dataset.drawn = name; chart.plot.style.minHeight = ""; return; }
    const narrow = chart.plot.clientWidth < 420, above = narrow && view.spec.usermeta?.above;
    // on a phone legends stand in two columns, else they are cut, and long labels above their rows, not beside them
    const spec = JSON.parse(JSON.stringify(view.spec), (key, value) =>
      (narrow && key === "columns" && value === 3 ? 2 : above && key === "axis" && value?.labelLimit ? { ...value, ...above.axis } : value));
    if (above) spec.height = above.height;
    for (const param of spec.params || []) if (param.name === "pinned") param.value = state.head;
    const result = await vegaEmbed(stage, spec, {
      mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false, tooltip, config: payload.themes[name],
    });
    if (turn !== chart.turn) { result.finalize(); return; }
    chart.result = result;
    result.view.addEventListener("click", (_event, item) => Object.hasOwn(heads, item?.datum?.name) && pin(item.datum.name));
    chart.plot.dataset.drawn = name, chart.plot.style.minHeight = "";
  }
  function show(chart, at) {
    if (at === chart.at) return;
    chart.at = at, fill(chart);
    if (chart.plot.dataset.drawn) draw(chart);
  }
  for (const chart of switched) {
    const { id, views, place } = chart, follow = () => {
      for (const control of place.children) control.matches("select") ? control.value = state[id] : control.setAttribute("aria-pressed", String(control.value === state[id]));
      show(chart, views.findIndex((view) => view.label === state[id]));
    };
    for (const control of place.children) control.addEventListener(control.matches("select") ? "change" : "click", () => set({ [id]: control.value }));
    followers.push((changed) => changed.includes(id) && follow());
  }

  // The table behind a chart: filled when opened, and again when the view changes.
  function fill(chart) {
    const details = chart.node.querySelector("details.data");
    details.querySelector(".scroll")?.remove();
    if (!details.open || !chart.views[chart.at]) return;
    const rows = chart.views[chart.at].spec.datasets.main;
    const columns = chart.columns.filter(([field]) => rows.some((row) => row[field] != null));
    const shown = rows.filter((row) => columns.some(([field]) => row[field] != null));
    details.append(table(columns.map(([, title]) => title), shown.map((row) => columns.map(([field]) => nice(row[field])))));
  }
  async function save(chart) {
    const spec = structuredClone(chart.views[chart.at]?.spec);  // drawn for paper: a figure from the dark page could not be read there
    if (!spec) return;
    if (spec.width === "container") spec.width = chart.plot.clientWidth;
    const made = await vegaEmbed(el("div"), spec, { mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false, config: payload.themes.light });
    Object.assign(el("a"), { href: `data:image/svg+xml,${encodeURIComponent(await made.view.toSVG())}`, download: `${chart.id}.svg` }).click();
  }
  for (const chart of charts) {
    chart.node.querySelector("details.data").addEventListener("toggle", () => fill(chart));
    chart.node.querySelector("button.svg").addEventListener("click", () => save(chart));
  }

  // --- the workbench's controls: measure, arm and head drive every linked chart and panel ---------------------------
  const unique = (key, views) => [...new Set(views.map((view) => view[key]).filter(Boolean))].map((value) => [value, value]);
  for (const key of ["measure", "arm", "head", "token"]) byId(key)?.addEventListener("change", () => set({ [key]: byId(key).value }));
  function choose() {
    if (!lead.length) return;
    options(byId("measure"), unique("measure", lead)), options(byId("arm"), unique("arm", lead.filter((view) => view.measure === state.measure)));
    byId("measure").value = state.measure, byId("arm").value = state.arm;
    const place = ({ views }) => views.findIndex((view) => (!view.measure || view.measure === state.measure) && view.arm === state.arm);
    for (const chart of bench) chart.node.hidden = chart.id === "circuit-control" && place(chart) < 0;  // before the other is drawn, which is wider then
    for (const chart of bench) {
      const at = place(chart);
      chart.place.replaceChildren(el("span.quiet", at < 0 ? `No ${chart.id.split("-")[0]} for this arm (${state.arm}).` : chart.views[at].label));
      show(chart, at);
    }
  }
  choose();
  followers.push((changed) => (changed.includes("measure") || changed.includes("arm")) && choose());
  const headSelect = byId("head");
  if (headSelect) options(headSelect, [["", "all heads"], ...Object.entries(heads).map(([name, { label }]) => [name, label])]);
  followers.push((changed) => {
    if (!changed.includes("head")) return;
    if (headSelect) headSelect.value = state.head;
    for (const { result, views, at } of charts) if (views[at]?.spec.params?.some((param) => param.name === "pinned")) result?.view.signal("pinned", state.head).run();
    pinned();
  });

  function pinned() {
    const place = byId("pinned");
    if (!place) return;
    const record = state.head && heads[state.head];
    if (!record) { place.replaceChildren(el("p.quiet", "No head is pinned: click one in the grid or the circuit, a point of the profile for a whole layer, or choose above.")); return; }
    const rows = Object.entries(record.arms).map(([arm, values]) => [arm, ...values.map((value, i) => bounded(value, i ? percent : nice))]);
    place.replaceChildren(el("h3", state.head, el("span.quiet", ` · ${record.about}`)),
      table(["arm", ...payload.pinned.columns], rows));
    if (record.factors.length) place.append(el("h4", "Why it brings less from the instruction"), table(["cause", "along r̂", "share"], record.factors.map(([words, value, share]) => [words, bounded(value, nice), bounded(share, percent)])));
    place.append(...record.notes.map((words) => el("p.quiet", words)));
  }

  // --- prompts: token strips and attention ------------------------------------------------------------------------
  // The heads with a stored pattern that are pinned, one or a layer's; and what each token gives: of these, else of all.
  const own = (view) => view.heads.flatMap((name, h) => (name === state.head || name.startsWith(`${state.head}.`) ? [h] : []));
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const given = (view) => (own(view).length ? view.tokens.map((_, k) => sum(own(view).map((h) => view.by_head[h][k]))) : view.contribution);

  function strip(view, values, most) {
    const made = view.tokens.map((words, k) => {
      const token = el("span.tok", words), value = values[k];
      token.dataset.place = view.places[k];
      if (!(most > 0)) return token;
      const share = Math.min(1, Math.abs(value) / most), colour = value > 0 ? "var(--pos)" : "var(--neg)";
      token.style.background = `color-mix(in srgb, ${colour} ${Math.round(45 * share)}%, transparent)`;
      if (share > 0.1) token.style[value > 0 ? "borderTopColor" : "borderBottomColor"] = colour;
      token.title = `${words}  ${value > 0 ? "+" : ""}${nice(value)}`;
      return token;
    });
    return el("div.regions", ...view.regions.map(([name, length]) =>
      el(["suffix", "instruction"].includes(name) ? `div.region.${name}` : "div.region", el("i", name), ...made.splice(0, length))));
  }

  // One token, head by head and arm beside arm: what it gives along r̂, and how much the chat's last token looks at it.
  function token() {
    const record = payload.prompts[state.prompt];
    if (!record || !byId("token")) return;
    const words = new Map();
    for (const node of document.querySelectorAll("#strips .tok")) node.classList.toggle("chosen", node.dataset.place === state.token);
    for (const view of record.arms) view.places.forEach((place, k) => words.set(place, [...new Set([...(words.get(place) || []), view.tokens[k]])]));
    options(byId("token"), [["", "none"], ...[...words].map(([place, found]) => [place, `${place}: ${found.join(" | ")}`])]);
    byId("token").value = words.has(state.token) ? state.token : "";
    const rows = record.arms.filter((view) => view.places.includes(state.token)).flatMap((view) => {
      const k = view.places.indexOf(state.token), mine = own(view);
      return view.heads.map((name, h) => [name, view.title, view.tokens[k], nice(view.by_head[h][k]), percent(view.attention[h].at(-1)[k] / 1000)]).filter((_, h) => !mine.length || mine.includes(h));
    });
    byId("token-heads").replaceChildren(...(rows.length ? [table(["head", "arm", "token", "along r̂", "attention of chat[−1]"], rows.sort((a, b) => a[0].localeCompare(b[0], "en", { numeric: true })))] : []));
  }

  // The same as a table, with where chat[−1] looks in the pinned head: for those who cannot hover.
  function tokens(view, values) {
    const looks = view.attention[view.heads.indexOf(state.head)]?.at(-1);
    return [table(["token", "region", "along r̂", ...(looks ? [`attention of chat[−1] in ${state.head}`] : [])],
      view.tokens.map((token, k) => [token, view.places[k].replace(/ −\d+$/, ""), nice(values[k]), ...(looks ? [percent(looks[k] / 1000)] : [])]))];
  }

  // The pairs of tokens between which most attention passes, but for that to the first token, where idle heads look.
  const pairs = (view, which) => which.flatMap((h) => view.attention[h].flatMap((row, i) => row.map((share, k) => [view.heads[h], i, k, share])))
    .filter(([, , k]) => k > 0).sort((a, b) => b[3] - a[3]).slice(0, 12).map(([name, i, k, share]) => [name, `${i + 1}. ${view.tokens[i]}`, `${k + 1}. ${view.tokens[k]}`, percent(share / 1000)]);
  let serial = 0, inView = false;
  function patterns(record) {
    const place = byId("cv"), { most } = record;
    if (!window.CircuitsVis) document.head.append(Object.assign(el("script"), { textContent: document.querySelector("script[data-name=circuitsvis]").textContent }));  // a quarter of a second that can wait till here
    place.replaceChildren();
    for (const view of record.arms) {
      const which = own(view).length ? own(view) : view.heads.map((_, h) => h), size = view.tokens.length, target = el("div.cv");
      target.id = `cv-${serial++}`;
      place.append(el("div.paper", el("h4", view.title), target, fold("details.data", "Largest token pairs", () => [table(["head", "looks", "at", "attention"], pairs(view, which))])));
      const say = () => target.querySelectorAll("canvas:not([aria-label])").forEach((canvas, i) =>  // drawn later, by React
        canvas.setAttribute("aria-label", `attention pattern ${i + 1}, ${view.title}`));
      new MutationObserver(say).observe(target, { childList: true, subtree: true });
      const whole = view.attention.map((head) => head.map((row) => Array.from({ length: size }, (_, k) => (k < row.length ? row[k] / 1000 : 0))));
      CircuitsVis.render(target.id, CircuitsVis.AttentionHeads, {
        attention: which.map((h) => whole[h]), attentionHeadNames: which.map((h) => view.heads[h]),
        tokens: view.tokens.map((token) => (token.length > 12 ? token.slice(0, 11) + "…" : token)),
        maxValue: most, minValue: -most, positiveColor: "#17569b", negativeColor: "#c84e00", maskUpperTri: true,
      });
    }
    byId("cv-note").textContent = `Full colour from ${most.toFixed(2)} up, the same on both sides.${!state.head || record.arms.some((view) => own(view).length) ? "" : ` Patterns are stored for the top heads only, not for ${state.head}.`}`;
  }
  function prompt() {
    const record = payload.prompts[state.prompt];
    if (!record || !byId("prompt")) return;
    byId("prompt").value = String(state.prompt);
    const most = Math.max(0, ...record.arms.flatMap((view) => given(view).map(Math.abs)));
    byId("strips").replaceChildren(...record.arms.map((view) => {
      const values = given(view), whose = own(view).length ? own(view).map((h) => view.heads[h]).join(" + ") : "top heads";
      return el("div.strip", el("h4", view.title, el("span", `${view.suffix ? ` · ${view.suffix}` : ""} · ${whose}, sum ${nice(sum(values).toFixed(2))}${view.cropped ? `, first ${view.cropped} tokens left out` : ""}`)), strip(view, values, most), fold("details.data", "Table of these tokens", () => tokens(view, values)));
    }));
    const row = payload.replies.rows.find((other) => other.id === record.id);
    byId("prompt-replies").replaceChildren(...(row ? opened(row, new Map(record.arms.map((view) => [view.arm, view.suffix ?? null]))) : []));
    token();
    if (inView) patterns(record);
  }
  followers.push((changed) => (changed.includes("prompt") || changed.includes("head") ? prompt() : changed.includes("token") && token()));
  if (byId("prompt") && payload.prompts.length) {
    options(byId("prompt"), payload.prompts.map((record, i) => [String(i), `${i + 1}. ${record.text.length > 110 ? record.text.slice(0, 109) + "…" : record.text}`]));
    byId("prompt").addEventListener("change", () => set({ prompt: Number(byId("prompt").value) }));
    byId("strips").addEventListener("click", ({ target: { dataset: { place } } }) => place && set({ token: place === state.token ? "" : place }));
    const watch = new IntersectionObserver((entries) => {
      if (inView || !entries.some((entry) => entry.isIntersecting)) return;
      inView = true, watch.disconnect();
      patterns(payload.prompts[state.prompt]);
    }, { rootMargin: "300px" });
    watch.observe(byId("cv"));
  }

  // --- replies -----------------------------------------------------------------------------------------------------
  function opened(row, only) {  // only: arm → the suffix whose reply is wanted
    const all = Object.entries(row.cells).flatMap(([arm, cell]) => cell.map((reply) => [arm, ...reply]));
    const wanted = only ? all.filter(([arm, suffix]) => only.has(arm) && only.get(arm) === (suffix || null)) : all;
    return wanted.map(([arm, suffix, verdict, , score, text]) => {
      const head = `${arm}${suffix ? ` · ${suffix}` : ""} · ${payload.replies.verdicts[verdict]} · refusal score ${nice(score)} · model reply, may be unpleasant`;
      const words = (payload.replies.texts[text] ?? "(only in the run folder)") || "(an empty reply)";
      return el("details.reply", el("summary", head), Object.assign(el("p", words), { dir: "auto" }));
    });
  }
  function replies(data) {
    const place = byId("reply-table");
    if (!place) return;
    const [find, kind, which, sort, more, hits] = ["find", "kind", "which", "sort", "more", "hits"].map(byId), filters = { find, kind, which, sort };
    const PAGE = 25, views = new Map(payload.prompts.map((record, i) => [record.id, i])), arms = () => data.arms[kind.value] || [];
    const ways = () => options(sort, [["", "as in the file"], ["text", "by text"],
      ...arms().flatMap((arm) => [[`-${arm}`, `most refused: ${arm}`], [`+${arm}`, `least refused: ${arm}`]])]);
    options(kind, Object.keys(data.arms).map((name) => [name, name]));
    let limit = PAGE;
    function matches(row) {
      if (which.value !== "all" && which.value !== row.fate) return false;
      const words = find.value.trim().toLowerCase();
      row.search ??= [row.id, row.text, row.topic, ...Object.values(row.cells).flat().map((r) => data.verdicts[r[1]])].join(" ").toLowerCase();
      return !words || row.search.includes(words);
    }
    function badge(cell) {
      if (!cell || !cell.length) return el("span.quiet", "–");
      const refused = cell.filter((reply) => reply[2]).length, mostly = refused * 2 >= cell.length, words = cell.length === 1 ? data.verdicts[cell[0][1]] : `${refused} of ${cell.length} refused`;
      return el(mostly ? "span.badge.refused" : "span.badge.other", `${mostly ? "■" : "□"} ${words}`);
    }
    function line(row) {
      const text = Object.assign(el("div", row.text || row.id), { dir: "auto" }), number = Object.values(row.cells).flat().length, box = fold("details", `${number} model ${number === 1 ? "reply" : "replies"}, folded`, () => opened(row));
      const first = el("td", text, el("span.quiet", [row.topic, row.id].filter(Boolean).join(" · ")), box);
      if (views.has(row.id)) first.append(Object.assign(el("button.jump", "its tokens"), { type: "button", onclick: () => { set({ prompt: views.get(row.id) }); go("prompts"); } }));
      return el("tr", first, ...arms().map((arm) => Object.assign(el("td", badge(row.cells[arm])), { title: arm })));
    }
    function sorted(rows) {  // in one arm, by the share of its replies that refuse, then by their mean refusal score
      const sign = sort.value[0] === "-" ? -1 : 1, rate = (row) => row.rates[sort.value.slice(1)] || [-1, 0];
      if (sort.value === "text") return rows.sort((a, b) => a.text.localeCompare(b.text, "en", { numeric: true }));
      return sort.value ? rows.sort((a, b) => sign * (rate(a)[0] - rate(b)[0] || rate(a)[1] - rate(b)[1])) : rows;
    }
    function list() {
      const rows = sorted(data.rows.filter((row) => row.kind === kind.value && matches(row)));
      place.tHead.replaceChildren(el("tr", el("th", "prompt"), ...arms().map((arm) => el("th", arm))));
      place.tBodies[0].replaceChildren(...rows.slice(0, limit).map(line));
      hits.textContent = `${rows.length} prompts${data.left_out ? `, ${data.left_out} only in the run folder` : ""}`;
      more.hidden = rows.length <= limit;
      more.textContent = `Show all ${rows.length}`;
    }
    function follow(changed) {  // an address may ask for what this page has not: then the first choice is shown
      for (const [key, control] of Object.entries(filters)) {
        if (key === "sort") ways();
        if (control.value !== state[key]) control.value = state[key];
        if (control.selectedIndex < 0) set({ [key]: (control.selectedIndex = 0, control.value) });
      }
      if (changed) limit = PAGE;
      which.disabled = !arms().some((arm) => arm.includes("adversarial"));  // look-alikes meet no suffix
      list();
    }
    for (const [key, control] of Object.entries(filters)) control.addEventListener("input", () => set({ [key]: control.value, ...(key === "kind" && { sort: "" }) }));
    followers.push((changed) => changed.some((key) => key in filters) && follow(changed));
    more.addEventListener("click", () => { limit = Infinity, list(); Object.assign(place.tBodies[0].rows[PAGE], { tabIndex: -1 }).focus(); });
    follow();
  }

  // --- theme and start ---------------------------------------------------------------------------------------------
  const redraw = () => charts.forEach((chart) => chart.plot.dataset.drawn && draw(chart));
  byId("data")?.addEventListener("click", () => Object.assign(el("a"), { href: URL.createObjectURL(new Blob([JSON.stringify(payload, null, 1)], { type: "application/json" })), download: "report-data.json" }).click());
  byId("theme").addEventListener("click", () => { root.dataset.theme = themeNow() === "dark" ? "light" : "dark"; redraw(); });
  dark.addEventListener("change", () => root.dataset.theme || redraw()), addEventListener("hashchange", fromAddress);
  for (const link of document.querySelectorAll("nav a")) link.addEventListener("click", (event) => { event.preventDefault(); go(link.hash.slice(1)); });
  const idle = () => new Promise((done) => (window.requestIdleCallback ? requestIdleCallback(done, { timeout: 200 }) : setTimeout(done, 0)));
  for (const chart of charts.slice(0, 4)) await draw(chart);
  root.dataset.firstMs = String(Math.round(performance.now()));
  fromAddress(), pinned(), prompt(), replies(payload.replies);
  for (const chart of charts.slice(4)) { await idle(); await draw(chart); }
  root.dataset.drawnMs = String(Math.round(performance.now()));
})();
