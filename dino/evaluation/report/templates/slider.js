const slider = document.getElementById("threshold");
const figures = [...(document.querySelector(".tabs + .gallery")?.querySelectorAll("figure") ?? [])];
const tallies = document.getElementById("tallies");
const counts = tallies ? JSON.parse(tallies.textContent) : null;

function showMarks(threshold) {
  for (const mark of document.querySelectorAll(".mark[data-score]")) {
    const reached = Number(mark.dataset.score) >= threshold;
    mark.hidden = mark.classList.contains("missed") ? reached : !reached;
  }
}

function showTally(threshold) {
  const place = Math.round(threshold * 100) - 1;
  const at = Object.fromEntries(Object.entries(counts).map(([kind, list]) => [kind, list[place]]));
  const detected = at.found + at.misplaced + at.confused + at.duplicate + at.false;
  const precision = detected ? at.found / detected : 1;
  const recall = at.found / Math.max(at.found + at.missed, 1);
  const f1 = (2 * precision * recall) / Math.max(precision + recall, 1e-12);
  for (const [name, value] of Object.entries({ precision, recall, f1 })) {
    document.getElementById(`tally-${name}`).textContent = value.toFixed(3);
  }
  for (const [kind, value] of Object.entries(at)) {
    document.getElementById(`tally-${kind}`).textContent = value.toLocaleString("en");
  }
}

function update() {
  const threshold = Number(slider.value);
  document.getElementById("threshold-value").textContent = threshold.toFixed(2);
  showMarks(threshold);
  placeAllLabels();
  if (counts) showTally(threshold);
}

for (const button of document.querySelectorAll(".tabs button")) {
  button.addEventListener("click", () => {
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
    for (const figure of figures) {
      figure.hidden = button.dataset.group !== "all" && !figure.dataset.groups.split(" ").includes(button.dataset.group);
    }
    placeAllLabels();
  });
}

for (const head of document.querySelectorAll(".sortable th")) {
  head.addEventListener("click", () => {
    const table = head.closest("table");
    const falling = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = (row) => row.cells[head.cellIndex].dataset.value;
    const order = (a, b) => (isNaN(key(a)) ? key(a).localeCompare(key(b)) : Number(key(a)) - Number(key(b)));
    const rows = [...table.tBodies[0].rows].sort((a, b) => (falling ? order(b, a) : order(a, b)));
    table.tBodies[0].append(...rows);
  });
}

slider.addEventListener("input", update);
update();
