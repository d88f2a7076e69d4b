/* Small parts of charts.js: elements, ticks, figures in words, places in a curve. */
const selfsupDrawing = (() => {
  "use strict";

  function svg(name, attributes, parent, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  function html(name, attributes, parent, text) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  /* 1, 2 or 5 times a power of ten, some `count` of them within [low, high]. */
  function ticks(low, high, count, least = 0) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max(least, [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) || 10 * power);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
    return found;
  }

  function shown(value) {
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  }

  function short(step) {
    if (Math.abs(step) >= 1e6) return `${Number((step / 1e6).toPrecision(4))}M`;
    return Math.abs(step) >= 1e4 ? `${Number((step / 1e3).toPrecision(4))}k` : String(Math.round(step));
  }

  /* The first place whose step is not below `step`. */
  function find(x, step) {
    let low = 0, high = x.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (x[middle] < step) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /* Centred moving average over about a fortieth of the points. */
  function smooth(y) {
    const half = Math.floor(y.length / 80), sums = [0];
    for (const value of y) sums.push(sums[sums.length - 1] + value);
    return y.map((_, i) => {
      const from = Math.max(0, i - half), to = Math.min(y.length, i + half + 1);
      return (sums[to] - sums[from]) / (to - from);
    });
  }

  return { svg, html, ticks, shown, short, find, smooth };
})();
