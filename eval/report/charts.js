/* Curves as SVG. All charts show the same steps, which dragging, buttons and keys change. */
(() => {
  "use strict";
  const charts = JSON.parse(document.getElementById("curves").textContent);
  const place = document.getElementById("charts");
  if (!place || !charts.length) return;

  const marks = JSON.parse(place.dataset.marks);
  const { svg, html, ticks, shown, short, find, smooth } = selfsupDrawing;
  const HEIGHT = 210, TOP = 10, BOTTOM = 22, LEFT = 50, RIGHT = 8;
  const steps = charts.flatMap((chart) => chart.series.flatMap((one) => [one.x[0], one.x[one.x.length - 1]]));
  const whole = [Math.min(0, ...steps), Math.max(1, ...steps)];
  let view = whole.slice();

  // ---------------------------------------------------------------------------------------------------------- one chart

  class Plot {
    constructor(chart, index) {
      this.chart = chart;
      this.off = new Set();
      const figure = html("figure", { class: "chart" }, place);
      const title = html("h3", {}, figure, chart.title);
      if (chart.unit) html("small", {}, title, ` ${chart.unit}`);
      this.legend = html("figcaption", { class: "legend" }, figure);
      this.svg = svg("svg", { tabindex: 0, role: "img", "aria-label": `${chart.title} over steps`, id: `plot-${index}` }, figure);
      if (chart.levelMeans) html("p", { class: "soft" }, figure, `Dashed: ${chart.levelMeans}.`);
      this.entries = chart.series.map((one, i) => {
        const entry = html("button", { type: "button", "aria-pressed": "true" }, this.legend);
        html("i", { class: `dot s${one.color % 8}` }, entry);
        html("span", { class: "soft" }, entry, ` ${one.name} `);
        entry.addEventListener("click", () => {
          if (!this.off.delete(i)) this.off.add(i);
          entry.setAttribute("aria-pressed", String(!this.off.has(i)));
          this.draw();
        });
        return html("b", {}, entry);
      });
      this.tell(null);
      this.listen();
    }

    /* The figures at a step, or the last ones, in the legend. */
    tell(step) {
      this.chart.series.forEach((one, i) => {
        if (step === null) {
          this.entries[i].textContent = shown(one.last);
          return;
        }
        let at = Math.min(find(one.x, step), one.x.length - 1);
        if (at > 0 && step - one.x[at - 1] < one.x[at] - step) at--;
        const span = one.lo ? ` (${shown(one.lo[at])} to ${shown(one.hi[at])})` : "";
        this.entries[i].textContent = shown(one.y[at]) + span;
      });
    }

    visible() {
      const found = [];
      this.chart.series.forEach((one, i) => {
        const from = Math.max(0, find(one.x, view[0]) - 1), to = Math.min(one.x.length, find(one.x, view[1]) + 2);
        if (this.off.has(i) || from >= to) return;
        const cut = (values) => values && values.slice(from, to);
        found.push({ color: one.color, x: cut(one.x), y: cut(one.y), lo: cut(one.lo), hi: cut(one.hi) });
      });
      return found;
    }

    range(series) {
      let low = Infinity, high = -Infinity;
      for (const one of series) {
        one.x.forEach((x, i) => {
          if (x < view[0] || x > view[1]) return;
          low = Math.min(low, (one.lo || one.y)[i]);
          high = Math.max(high, (one.hi || one.y)[i]);
        });
      }
      if (low > high) [low, high] = [0, 1];
      if (this.chart.zero && low >= 0) low = 0;
      if (this.chart.level !== undefined) high = Math.max(high, 1.3 * this.chart.level);
      const room = 0.05 * (high - low) || Math.abs(high) * 0.1 || 1;
      return [low === 0 && this.chart.zero ? 0 : low - room, high + room];
    }

    draw() {
      const width = this.svg.clientWidth || 320, root = this.svg;
      root.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      root.replaceChildren();
      const series = this.visible(), [low, high] = this.range(series);
      this.x = (step) => LEFT + ((step - view[0]) / (view[1] - view[0])) * (width - LEFT - RIGHT);
      this.step = (x) => view[0] + ((x - LEFT) / (width - LEFT - RIGHT)) * (view[1] - view[0]);
      const y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
      const across = { x1: LEFT, x2: width - RIGHT };
      for (const value of ticks(low, high, 4)) {
        svg("line", { class: "grid", ...across, y1: y(value), y2: y(value) }, root);
        svg("text", { x: LEFT - 7, y: y(value) + 4, "text-anchor": "end" }, root, shown(value));
      }
      svg("line", { class: "axis", ...across, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }, root);
      for (const step of ticks(view[0], view[1], Math.max(2, Math.floor(width / 95)), 1)) {
        const anchor = this.x(step) > width - 24 ? "end" : "middle";
        svg("text", { x: this.x(step), y: HEIGHT - 6, "text-anchor": anchor }, root, short(step));
      }
      const clip = `${root.id}-clip`;
      const box = svg("clipPath", { id: clip }, svg("defs", {}, root));
      svg("rect", { x: LEFT - 2, y: 0, width: width - LEFT - RIGHT + 4, height: HEIGHT - BOTTOM + 2 }, box);
      const inside = svg("g", { "clip-path": `url(#${clip})` }, root);
      const level = this.chart.level;
      if (level !== undefined) svg("line", { class: "level", ...across, y1: y(level), y2: y(level) }, inside);
      for (const step of marks) {
        svg("line", { class: "mark", x1: this.x(step), x2: this.x(step), y1: TOP, y2: HEIGHT - BOTTOM }, inside);
      }
      for (const one of series) this.line(one, y, inside);
      this.cross = svg("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }, root);
      this.picked = svg("rect", { class: "picked", y: TOP, height: HEIGHT - TOP - BOTTOM, visibility: "hidden" }, root);
    }

    line(one, y, parent) {
      const colour = `s${one.color % 8}${one.color >= 8 ? " dashed" : ""}`;
      const path = (values) => "M" + values.map((v, i) => `${this.x(one.x[i]).toFixed(1)},${y(v).toFixed(1)}`).join("L");
      if (one.lo) {
        const back = one.lo.map((v, i) => `${this.x(one.x[i]).toFixed(1)},${y(v).toFixed(1)}`).reverse();
        svg("path", { class: `band ${colour}`, d: `${path(one.hi)}L${back.join("L")}Z` }, parent);
      }
      const many = one.y.length >= 160;
      if (many && !one.lo) svg("path", { class: `raw ${colour}`, d: path(one.y) }, parent);
      svg("path", { class: `line ${colour}`, d: path(many ? smooth(one.y) : one.y) }, parent);
      if (one.y.length > 40) return;
      one.y.forEach((v, i) => svg("circle", { class: `point ${colour}`, cx: this.x(one.x[i]), cy: y(v), r: 2.4 }, parent));
    }

    listen() {
      let start = null;
      const at = (event) => event.clientX - this.svg.getBoundingClientRect().left;
      const leave = () => {
        start = null;
        this.cross.setAttribute("visibility", "hidden");
        this.picked.setAttribute("visibility", "hidden");
        this.tell(null);
        say();
      };
      this.svg.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        start = at(event);
        this.svg.setPointerCapture(event.pointerId);
      });
      this.svg.addEventListener("pointermove", (event) => {
        const x = at(event), step = Math.round(this.step(x));
        if (start !== null && Math.abs(x - start) > 4) {
          this.picked.setAttribute("x", Math.min(start, x));
          this.picked.setAttribute("width", Math.abs(x - start));
          this.picked.setAttribute("visibility", "visible");
        }
        const inside = step >= view[0] && step <= view[1];
        this.cross.setAttribute("visibility", inside ? "visible" : "hidden");
        if (!inside) return;
        this.cross.setAttribute("x1", x);
        this.cross.setAttribute("x2", x);
        this.tell(step);
        say(step);
      });
      this.svg.addEventListener("pointerup", (event) => {
        const from = start, to = at(event);
        start = null;
        this.picked.setAttribute("visibility", "hidden");
        if (from !== null && Math.abs(to - from) > 8) show(this.step(Math.min(from, to)), this.step(Math.max(from, to)));
      });
      this.svg.addEventListener("pointercancel", leave);
      this.svg.addEventListener("pointerleave", leave);
      this.svg.addEventListener("dblclick", () => show(...whole));
      this.svg.addEventListener("keydown", (event) => {
        const verb = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", 0: "all" }[event.key];
        if (!verb || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        move(verb);
      });
    }
  }

  // --------------------------------------------------------------------------------------------------------- all charts

  function show(from, to) {
    const size = Math.min(Math.max(to - from, 4), whole[1] - whole[0]); // a few steps at least
    const start = Math.min(Math.max((from + to - size) / 2, whole[0]), whole[1] - size);
    view = [start, start + size];
    for (const plot of plots) plot.draw();
    say();
  }

  function move(verb) {
    const size = view[1] - view[0], middle = (view[0] + view[1]) / 2;
    if (verb === "all") show(...whole);
    else if (verb === "in") show(middle - size / 4, middle + size / 4);
    else if (verb === "out") show(middle - size, middle + size);
    else show(view[0] + (verb === "left" ? -size / 2 : size / 2), view[1] + (verb === "left" ? -size / 2 : size / 2));
  }

  function say(step) {
    const [from, to] = view.map((s) => Math.round(s).toLocaleString("en"));
    document.getElementById("shown").textContent = step === undefined ? `steps ${from} to ${to}` : `step ${step.toLocaleString("en")}`;
  }

  const plots = charts.map((chart, index) => new Plot(chart, index));
  show(...whole);
  for (const button of document.querySelectorAll(".tools button")) {
    button.addEventListener("click", () => move(button.dataset.do));
  }
  let width = 0;
  new ResizeObserver(() => {
    if (place.clientWidth === width) return;
    width = place.clientWidth;
    for (const plot of plots) plot.draw();
  }).observe(place);
})();
