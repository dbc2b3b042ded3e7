"use strict";
for (const button of document.querySelectorAll("th > button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
    const first = head.dataset.first || "descending";
    const other = first === "descending" ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const th of head.parentElement.cells) th.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // what has no value stays last
      const numbers = isFinite(x) && isFinite(y);
      return sign * (numbers ? x - y : x.localeCompare(y, undefined, { numeric: true }));
    });
    body.append(...rows);
  });
}

// A table that is wider than the window says so, until it has been scrolled to its end.
for (const scroll of document.querySelectorAll(".scroll")) {
  const frame = scroll.parentElement;
  const update = () => {
    const hidden = scroll.scrollWidth - scroll.clientWidth;
    frame.toggleAttribute("data-more", hidden - scroll.scrollLeft > 4);
    frame.toggleAttribute("data-wide", hidden > 4);  // keeps the hint's room, so that nothing moves while scrolling
  };
  scroll.addEventListener("scroll", update, { passive: true });
  new ResizeObserver(update).observe(scroll);
}

// On a phone what reproduces each run is folded up until its row is touched; on paper everything is there.
const runs = [...document.querySelectorAll("details.run")];
const unfold = () => {
  const run = runs.find(details => `#${details.id}` === location.hash);
  if (run) run.open = true;
};
if (matchMedia("(max-width: 40rem)").matches) for (const run of runs) run.open = false;
unfold();
addEventListener("hashchange", unfold);
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not(.recipe)")].filter(details => !details.open);
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => { for (const details of folded) details.open = false; });
