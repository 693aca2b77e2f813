// Labels of boxes: each finds a free place at its box, or is hidden and counted; pointing at a box shows it all the same.
function placeLabels(picture) {
  const all = picture.closest("figure").classList.contains("large");
  const marks = [...picture.querySelectorAll(".mark")].filter((mark) => !mark.hidden);
  const shown = marks.filter((mark) => all || mark.classList.contains("named"));
  const { clientWidth: width, clientHeight: height } = picture;
  const sizes = shown.map((mark) => [mark, mark.firstElementChild, mark.offsetLeft, mark.offsetTop, mark.offsetWidth, mark.offsetHeight]);
  for (const [, label] of sizes) label.style.maxWidth = `${Math.round(0.6 * width)}px`;
  const labels = sizes.map((entry) => [...entry, entry[1].offsetWidth, entry[1].offsetHeight]);
  const taken = [];
  let hidden = 0;
  for (const [mark, label, x, y, w, h, wide, high] of labels) {
    const inside = h > 3 * high ? [[x, y], [x, y + h - high], [x + w - wide, y]] : [];
    const corners = [[x, y - high], ...inside, [x, y + h], [x + w - wide, y - high], [x + w, y], [x - wide, y], [x, y]];
    const fitted = corners.map(([a, b]) => [Math.max(0, Math.min(a, width - wide)), Math.max(0, Math.min(b, height - high))]);
    const free = fitted.find(([a, b]) => taken.every(([c, d, e, f]) => a >= e || c >= a + wide || b >= f || d >= b + high));
    label.classList.toggle("crowded", !free);
    if (free) taken.push([free[0], free[1], free[0] + wide, free[1] + high]);
    else hidden += 1;
    const [a, b] = free ?? fitted[0];
    label.style.left = `${a - x - mark.clientLeft}px`;
    label.style.top = `${b - y - mark.clientTop}px`;
  }
  const more = picture.querySelector(".more");
  more.hidden = !hidden;
  more.textContent = `${hidden.toLocaleString("en")} more without label`;
}

function placeAllLabels() {
  for (const picture of document.querySelectorAll(".picture")) placeLabels(picture);
}

for (const figure of document.querySelectorAll(".gallery figure")) {
  figure.tabIndex = 0;
  const toggle = () => {
    figure.classList.toggle("large");
    for (const picture of figure.querySelectorAll(".picture")) placeLabels(picture);
  };
  figure.addEventListener("click", toggle);
  figure.addEventListener("keydown", (event) => {
    if (event.key === "Enter") toggle();
  });
}

addEventListener("resize", placeAllLabels);
placeAllLabels();
