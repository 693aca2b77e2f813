for (const picture of document.querySelectorAll(".gallery figure")) {
  picture.tabIndex = 0;
  const toggle = () => picture.classList.toggle("large");
  picture.addEventListener("click", toggle);
  picture.addEventListener("keydown", (event) => {
    if (event.key === "Enter") toggle();
  });
}
