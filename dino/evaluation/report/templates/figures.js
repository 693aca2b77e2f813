// Labels of boxes: each finds a free place at its box, or is hidden and counted; pointing at a box shows it all the same.
function placeLabels(picture) {
  const all = picture.closest("figure").classList.contains("large");
  const shown = [...picture.querySelectorAll(".mark")].filter((mark) => !mark.hidden && (all || mark.classList.contains("named")));
  const more = picture.querySelector(".more");
  const size = [picture.clientWidth, picture.clientHeight];
  for (const mark of shown) mark.firstElementChild.style.maxWidth = `${Math.round(0.6 * size[0])}px`;
  const labels = shown.map((mark) => {
    const label = mark.firstElementChild;
    const box = [mark.offsetLeft, mark.offsetTop, mark.offsetWidth, mark.offsetHeight];
    return { mark, label, box, width: label.offsetWidth, height: label.offsetHeight };
  });
  let places = findPlaces(labels, size, []);
  more.hidden = !places.includes(null);
  if (!more.hidden) {
    more.textContent = `${labels.length.toLocaleString("en")} more without label`;
    places = findPlaces(labels, size, [[more.offsetLeft, more.offsetTop, size[0], size[1]]]);
    more.textContent = `${places.filter((place) => !place).length.toLocaleString("en")} more without label`;
  }
  labels.forEach(({ mark, label, box }, index) => {
    const [x, y] = places[index] ?? box;
    label.classList.toggle("crowded", !places[index]);
    label.style.left = `${x - box[0] - mark.clientLeft}px`;
    label.style.top = `${y - box[1] - mark.clientTop}px`;
  });
}

function findPlaces(labels, [wide, high], taken) {
  return labels.map(({ box: [x, y, w, h], width, height }) => {
    const inside = h > 3 * height ? [[x, y], [x, y + h - height], [x + w - width, y]] : [];
    const corners = [[x, y - height], ...inside, [x, y + h], [x + w - width, y - height], [x + w, y], [x - width, y], [x, y]];
    const fitted = corners.map(([a, b]) => [Math.max(0, Math.min(a, wide - width)), Math.max(0, Math.min(b, high - height))]);
    const free = fitted.find(([a, b]) => taken.every(([c, d, e, f]) => a >= e || c >= a + width || b >= f || d >= b + height));
    if (free) taken.push([free[0], free[1], free[0] + width, free[1] + height]);
    return free ?? null;
  });
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
