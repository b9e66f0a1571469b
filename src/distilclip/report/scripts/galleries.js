// A gallery of several pages: buttons and the arrow keys turn them. The pages lie in templates behind the first.

for (const shown of document.querySelectorAll("[data-pages]")) {
  const pages = [[...shown.childNodes]];
  for (let next = shown.nextElementSibling; next?.tagName === "TEMPLATE"; next = next.nextElementSibling)
    pages.push([...next.content.childNodes]);
  let current = 0;

  function turn(to) {
    current = Math.min(Math.max(to, 0), pages.length - 1);
    shown.replaceChildren(...pages[current]);
    place.textContent = `Page ${current + 1} of ${pages.length}`;
    back.setAttribute("aria-disabled", current === 0);
    on.setAttribute("aria-disabled", current === pages.length - 1);
  }

  const back = element("button", { type: "button", onclick: () => turn(current - 1) }, "Previous");
  const on = element("button", { type: "button", onclick: () => turn(current + 1) }, "Next");
  const place = element("span", { role: "status" });
  const bar = element("div", { class: "pager", role: "group", "aria-label": `Pages: ${shown.dataset.pages}` }, back, place, on);
  bar.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: pages.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    turn(to);
  });
  shown.before(bar);
  turn(0);
}
