/* Tables that sort, pictures that enlarge, text that can be copied. */
(() => {
  "use strict";

  const numeric = (cell) => (cell.dataset.v === undefined ? NaN : Number(cell.dataset.v));

  function sort(table, column, head) {
    const up = head.getAttribute("aria-sort") === "ascending" || (head.classList.contains("n") && !head.hasAttribute("aria-sort"));
    const sign = up ? -1 : 1;
    const rows = [...table.tBodies[0].rows];
    const key = (row) => [numeric(row.cells[column]), row.cells[column].textContent];
    const keyed = rows.map((row) => [row, ...key(row)]);
    keyed.sort(([, a, s], [, b, t]) => {
      if (Number.isNaN(a) !== Number.isNaN(b)) return Number.isNaN(a) ? 1 : -1; // what is no number comes last
      if (!Number.isNaN(a)) return sign * (a - b);
      return sign * s.localeCompare(t, undefined, { numeric: true });
    });
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "descending" : "ascending");
    table.tBodies[0].append(...keyed.map(([row]) => row));
  }

  for (const table of document.querySelectorAll("table.sorts")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => sort(table, column, head));
    });
  }

  const large = document.getElementById("large");
  for (const button of document.querySelectorAll(".enlarge")) {
    button.addEventListener("click", () => {
      const small = button.querySelector("img");
      const image = large.querySelector("img");
      image.src = small.src;
      image.alt = small.alt;
      large.showModal();
    });
  }
  large.addEventListener("click", () => large.close());

  function select(text) {
    const range = document.createRange();
    range.selectNodeContents(text);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  }

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const text = button.parentElement.querySelector("pre");
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        select(text); // where a page may not write there
        button.textContent = "Selected";
      }
    });
  }

  // a link to a run opens it
  function openTarget() {
    const place = location.hash.startsWith("#run-") && document.getElementById(location.hash.slice(1));
    if (place) place.querySelector("details").open = true;
  }
  addEventListener("hashchange", openTarget);
  openTarget();
})();
