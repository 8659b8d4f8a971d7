"use strict";
// The page is whole without this: it shows a layer's title below the strip, and filters the long tables.
for (const strip of document.querySelectorAll(".strip")) {
  const line = strip.parentElement.querySelector(".hover");
  const show = (event) => {
    const layer = event.target.closest(".layer");
    line.textContent = layer ? layer.title : "";
  };
  strip.addEventListener("pointerover", show);
  strip.addEventListener("click", show);
  line.classList.add("ready");
}
for (const table of document.querySelectorAll("table.every")) {
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "Filter by any word";
  field.setAttribute("aria-label", "Filter the layers");
  field.addEventListener("input", () => {
    const word = field.value.toLowerCase();
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(word);
  });
  table.parentElement.before(field);
}
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("#reasons details, #resist details")) part.open = true;
});
