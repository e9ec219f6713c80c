// Prompt and reply views. Text from the run is only ever set as textContent; nothing here parses markup.
"use strict";
const Views = (() => {
  // Make an element: el("td.num", "text") or el("p", child, child).
  function el(what, ...children) {
    const [tag, ...classes] = what.split(".");
    const node = document.createElement(tag);
    if (classes.length) node.className = classes.join(" ");
    for (const child of children) node.append(child);
    return node;
  }

  const nice = (value) => (value == null ? "–" : String(value).replace("-", "−"));

  // One line of tokens, coloured by contribution; `most` is the largest |contribution| over both arms.
  function strip(view, most) {
    const box = el("div.regions");
    let at = 0;
    for (const [name, length] of view.regions) {
      const region = el("div.region", el("i", name));
      if (name === "suffix" || name === "instruction") region.classList.add(name);
      for (let k = at; k < at + length; k++) {
        const token = el("span.tok", view.tokens[k]);
        const value = view.contribution[k];
        if (value != null && most > 0) {
          const share = Math.min(1, Math.abs(value) / most);
          const colour = value > 0 ? "var(--pos)" : "var(--neg)";
          token.style.background = `color-mix(in srgb, ${colour} ${Math.round(70 * share)}%, transparent)`;
          if (share > 0.1) token.style[value > 0 ? "borderTopColor" : "borderBottomColor"] = colour;
          token.title = `${view.tokens[k]}  ${value > 0 ? "+" : ""}${nice(value)}`;
        }
        region.append(token);
      }
      at += length;
      box.append(region);
    }
    return box;
  }

  function label(view) {
    if (view.arm === "none") return "without suffix";
    return view.arm === "adversarial" ? "with the suffix" : view.arm;
  }

  // Thousandths of the lower triangle → full [head][dest][src] for CircuitsVis.
  function full(view) {
    const size = view.tokens.length;
    return view.attention.map((head) =>
      head.map((row) => Array.from({ length: size }, (_, k) => (k < row.length ? row[k] / 1000 : 0))));
  }

  // The value at which the colour is full: nearly all weights lie below it, those of the first token (the sink) aside.
  function saturation(arms) {
    const values = [];
    for (const view of arms) for (const head of view.attention) for (const row of head)
      for (let k = 1; k < row.length; k++) if (row[k] > 5) values.push(row[k]);
    values.sort((a, b) => a - b);
    return Math.max(50, values[Math.floor(values.length * 0.98)] || 1000) / 1000;
  }

  let serial = 0;
  function patterns(record) {
    const place = document.getElementById("cv");
    const most = saturation(record.arms);
    place.replaceChildren();
    for (const view of record.arms) {
      const target = el("div.cv");
      target.id = `cv-${serial++}`;
      place.append(el("div.paper", el("h4", label(view)), target));
      CircuitsVis.render(target.id, CircuitsVis.AttentionHeads, {
        attention: full(view),
        tokens: view.tokens.map((token) => (token.length > 12 ? token.slice(0, 11) + "…" : token)),
        attentionHeadNames: view.heads,
        maxValue: most, minValue: -most, positiveColor: "#17569b", negativeColor: "#c84e00", maskUpperTri: true,
      });
    }
    document.getElementById("cv-note").textContent = `Full colour from ${most.toFixed(2)} up, the same on both sides.`;
  }

  // Prompt selector, token strips at once, CircuitsVis once its place comes into view.
  function prompts(records) {
    const select = document.getElementById("prompt");
    if (!select || !records.length) return;
    records.forEach((record, i) => {
      const text = record.text.length > 110 ? record.text.slice(0, 109) + "…" : record.text;
      const option = el("option", `${i + 1}. ${text}`);
      option.value = String(i);
      select.append(option);
    });
    let seen = false;
    function show() {
      const record = records[Number(select.value)];
      const values = record.arms.flatMap((view) => view.contribution.filter((v) => v != null).map(Math.abs));
      const most = Math.max(0, ...values);
      const strips = document.getElementById("strips");
      strips.replaceChildren();
      for (const view of record.arms) {
        const total = view.contribution.reduce((sum, v) => sum + (v || 0), 0);
        const head = el("h4", label(view), el("span", ` · sum ${nice(total.toFixed(2))}${view.cropped ? `, first ${view.cropped} tokens left out` : ""}`));
        strips.append(el("div.strip", head, strip(view, most)));
      }
      if (seen) patterns(record);
    }
    select.addEventListener("change", show);
    show();
    const watch = new IntersectionObserver((entries) => {
      if (seen || !entries.some((entry) => entry.isIntersecting)) return;
      seen = true;
      watch.disconnect();
      patterns(records[Number(select.value)]);
    }, { rootMargin: "300px" });
    watch.observe(document.getElementById("cv"));
  }

  const PAGE = 25;
  function replies(data) {
    const table = document.getElementById("reply-table");
    if (!table) return;
    const [find, kind, which, more, hits] = ["find", "kind", "which", "more", "hits"].map((id) => document.getElementById(id));
    const order = ["harmful", "harmless", "lookalike"];
    const kinds = Object.keys(data.arms).sort((a, b) => (order.indexOf(a) + 9) % 9 - (order.indexOf(b) + 9) % 9);
    for (const name of kinds) kind.append(el("option", name));
    let limit = PAGE;

    const share = (row, arm) => {
      const cell = (row.cells[arm] || []).filter((reply) => reply[2] != null);
      return cell.length ? cell.filter((reply) => reply[2]).length / cell.length : null;
    };
    function matches(row) {
      const bare = row.kind === "harmful" ? "none" : row.kind;
      const attacked = row.kind === "harmless" ? "harmless+adversarial" : "adversarial";
      if (which.value === "flipped" && !(share(row, bare) >= 0.5 && share(row, attacked) < 0.5)) return false;
      if (which.value === "kept" && !(share(row, attacked) >= 0.5)) return false;
      const words = find.value.trim().toLowerCase();
      if (!words) return true;
      row.search ??= [row.id, row.text, row.topic, ...Object.values(row.cells).flat().map((r) => data.verdicts[r[1]])].join(" ").toLowerCase();
      return row.search.includes(words);
    }
    function badge(cell) {
      if (!cell || !cell.length) return el("span.quiet", "–");
      const refused = cell.filter((reply) => reply[2]).length;
      const words = cell.length === 1 ? data.verdicts[cell[0][1]] : `${refused} of ${cell.length} refused`;
      const mostly = refused * 2 >= cell.length;
      return el(mostly ? "span.badge.refused" : "span.badge.other", `${mostly ? "■" : "□"} ${words}`);
    }
    function opened(row, box) {
      for (const [arm, cell] of Object.entries(row.cells)) for (const [suffix, verdict, , score, text] of cell) {
        const head = `${arm}${suffix ? ` · ${suffix}` : ""} · ${data.verdicts[verdict]} · refusal score ${nice(score)} · model reply, may be unpleasant`;
        const body = el("p", data.texts[text] || "(only in the run folder)");
        body.dir = "auto";
        box.append(el("details.reply", el("summary", head), body));
      }
    }
    function draw() {
      const arms = data.arms[kind.value] || [];
      const rows = data.rows.filter((row) => row.kind === kind.value && matches(row));
      table.tHead.replaceChildren(el("tr", el("th", "prompt"), ...arms.map((arm) => el("th", arm))));
      table.tBodies[0].replaceChildren(...rows.slice(0, limit).map((row) => {
        const prompt = el("div", row.text || row.id);
        prompt.dir = "auto";
        const number = Object.values(row.cells).flat().length;
        const box = el("details", el("summary", `${number} model ${number === 1 ? "reply" : "replies"}, folded`));
        box.addEventListener("toggle", () => box.open && box.children.length === 1 && opened(row, box));
        const cells = arms.map((arm) => {
          const cell = el("td", badge(row.cells[arm]));
          cell.dataset.arm = arm;
          return cell;
        });
        return el("tr", el("td", prompt, el("span.quiet", [row.topic, row.id].filter(Boolean).join(" · ")), box), ...cells);
      }));
      hits.textContent = `${rows.length} prompts${data.left_out ? `, ${data.left_out} only in the run folder` : ""}`;
      more.hidden = rows.length <= limit;
      more.textContent = `Show all ${rows.length}`;
    }
    const fresh = () => { limit = PAGE; draw(); };
    find.addEventListener("input", fresh);
    kind.addEventListener("change", fresh);
    which.addEventListener("change", fresh);
    more.addEventListener("click", () => { limit = Infinity; draw(); });
    draw();
  }

  return { el, nice, prompts, replies };
})();
