// Theme switch and charts. Specs and data come from the payload; nothing is fetched.
"use strict";
(() => {
  const started = performance.now();
  const { el, nice } = Views;
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themeNow = () => root.dataset.theme || (dark.matches ? "dark" : "light");

  const tip = document.getElementById("tip");
  function tooltip(_handler, event, _item, value) {
    if (value == null || value === "") { tip.hidden = true; return; }
    tip.textContent = typeof value === "object"
      ? Object.entries(value).map(([key, item]) => `${key}: ${nice(item)}`).join("\n") : String(value);
    tip.hidden = false;
    const { clientX: x, clientY: y } = event, box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
    tip.style.top = `${y + 14 + box.height > innerHeight ? y - box.height - 10 : y + 14}px`;
  }
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  const charts = [...document.querySelectorAll("figure[data-figure]")].map((node) => ({
    node, plot: node.querySelector(".plot"), data: payload.figures[node.dataset.figure], at: 0, result: null,
  }));

  async function draw(chart) {
    const name = themeNow(), at = chart.at, turn = (chart.turn = (chart.turn || 0) + 1);
    const narrow = chart.plot.clientWidth < 420;  // legends in two columns, else they are cut
    const spec = JSON.parse(JSON.stringify(chart.data.views[at].spec), (key, value) =>
      (narrow && key === "columns" && value === 3 ? 2 : value));
    const stage = el("div");
    stage.style.width = "100%";
    const old = chart.result, height = chart.plot.offsetHeight;
    if (old) chart.plot.style.minHeight = `${height}px`;
    chart.plot.replaceChildren(stage);
    if (old) old.finalize();
    chart.result = null;
    const result = await vegaEmbed(stage, spec, {
      mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false, tooltip, config: payload.themes[name],
    });
    if (turn !== chart.turn) { result.finalize(); return; }
    chart.result = result;
    chart.plot.dataset.drawn = name;
    chart.plot.style.minHeight = "";
  }

  function switches(chart) {
    const { views } = chart.data, place = chart.node.querySelector(".switch");
    if (views.length < 2) return;
    const choose = (at) => { chart.at = at; fill(chart); draw(chart); };
    if (views.length > 5) {
      const select = el("select", ...views.map((view) => el("option", view.label)));
      select.setAttribute("aria-label", place.getAttribute("aria-label"));
      select.addEventListener("change", () => choose(select.selectedIndex));
      place.append(select);
      return;
    }
    views.forEach((view, at) => {
      const button = el("button", view.label);
      button.type = "button";
      button.setAttribute("aria-pressed", String(at === 0));
      button.addEventListener("click", () => {
        for (const other of place.children) other.setAttribute("aria-pressed", String(other === button));
        choose(at);
      });
      place.append(button);
    });
  }

  // The table behind a chart: filled when opened, and again when the view changes.
  function fill(chart) {
    const details = chart.node.querySelector("details.data");
    details.querySelector(".scroll")?.remove();
    if (!details.open) return;
    const rows = chart.data.views[chart.at].spec.datasets.main;
    const columns = chart.data.columns.filter(([field]) => rows.some((row) => row[field] != null));
    const cell = (value) => el(typeof value === "number" ? "td.num" : "td", typeof value === "boolean" ? (value ? "yes" : "no") : nice(value));
    const head = el("tr", ...columns.map(([field, title]) => el(typeof rows[0][field] === "number" ? "th.num" : "th", title)));
    const body = rows.map((row) => el("tr", ...columns.map(([field]) => cell(row[field]))));
    details.append(el("div.scroll", el("table", el("thead", head), el("tbody", ...body))));
  }

  async function save(chart) {
    if (!chart.result) return;
    const svg = await chart.result.view.toSVG();
    const link = el("a");
    link.href = URL.createObjectURL(new Blob([svg], { type: "image/svg+xml" }));
    link.download = `${chart.node.dataset.figure}.svg`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  for (const chart of charts) {
    switches(chart);
    chart.node.querySelector("details.data").addEventListener("toggle", () => fill(chart));
    chart.node.querySelector("button.svg").addEventListener("click", () => save(chart));
  }

  const redraw = () => charts.forEach((chart) => chart.plot.dataset.drawn && draw(chart));
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = themeNow() === "dark" ? "light" : "dark";
    redraw();
  });
  dark.addEventListener("change", () => { if (!root.dataset.theme) redraw(); });

  const idle = () => new Promise((done) => (window.requestIdleCallback ? requestIdleCallback(done, { timeout: 200 }) : setTimeout(done, 0)));
  (async () => {
    for (const chart of charts.slice(0, 4)) await draw(chart);
    root.dataset.firstMs = String(Math.round(performance.now()));
    Views.replies(payload.replies);
    Views.prompts(payload.prompts);
    for (const chart of charts.slice(4)) { await idle(); await draw(chart); }
    root.dataset.drawnMs = String(Math.round(performance.now()));
    root.dataset.scriptMs = String(Math.round(performance.now() - started));
  })();
})();
