// The map of embeddings: a dot for each picture, which the pointer or the arrow keys show with its caption.

if (data.map) {
  const host = document.querySelector("[data-map]"), canvas = host.querySelector("canvas"), box = host.querySelector(".reading");
  const legend = host.querySelector(".legend"), colours = host.querySelector("select"), words = host.querySelector("input[type=search]");
  const { extent, x, y, captions, cell, side, categories } = data.map;
  const sheets = data.map.sheets.map((source) => Object.assign(new Image(), { src: source }));
  const NUM_COLOURS = 8, MARGIN = 14, REACH = 16;
  const view = { zoom: 1, left: 0, top: 0 };  // the part of the map in sight: `left` and `top` are shares of it
  const state = { category: 0, only: null, words: "", at: -1 };

  function position(i) {
    const [width, height] = [canvas.clientWidth, canvas.clientHeight], size = Math.min(width, height) - 2 * MARGIN;
    return [(width - size) / 2 + (x[i] / extent - view.left) * view.zoom * size, (height - size) / 2 + (y[i] / extent - view.top) * view.zoom * size];
  }

  function isMeant(i) {
    const category = categories[state.category];
    const isOf = state.only === null || (state.only < NUM_COLOURS ? category.of[i] === state.only : category.of[i] >= NUM_COLOURS);
    return isOf && (!state.words || captions[i].toLowerCase().includes(state.words));
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1, styles = getComputedStyle(canvas), category = categories[state.category];
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    const brush = canvas.getContext("2d");
    brush.scale(ratio, ratio);
    const grey = styles.getPropertyValue("--muted");
    const palette = [...Array(NUM_COLOURS).keys()].map((series) => styles.getPropertyValue(`--series-${(series + 2) % 8}`));
    const radius = (x.length > 1500 ? 2.4 : 3.4) * Math.min(2, Math.sqrt(view.zoom));
    for (const isDrawnLast of [false, true])
      for (let i = 0; i < x.length; i++) {
        if (isMeant(i) !== isDrawnLast) continue;
        const value = category ? category.of[i] : 0, [left, top] = position(i);
        brush.fillStyle = value < NUM_COLOURS && value !== category?.without ? palette[value] : grey;
        brush.globalAlpha = isDrawnLast ? 0.8 : 0.1;
        brush.beginPath();
        brush.arc(left, top, radius, 0, 2 * Math.PI);
        brush.fill();
      }
    brush.globalAlpha = 1;
    if (state.at < 0) return;
    const [left, top] = position(state.at);
    brush.strokeStyle = styles.getPropertyValue("--ink");
    brush.lineWidth = 2;
    brush.beginPath();
    brush.arc(left, top, radius + 3, 0, 2 * Math.PI);
    brush.stroke();
  }

  // Show a picture with its caption beside its dot; -1 takes it away.
  function select(i) {
    state.at = i;
    box.hidden = i < 0;
    if (i >= 0) {
      const caption = element("span", { class: "words", dir: "auto" }, captions[i] || "no caption");
      const facts = categories.map((category) => element("span", {}, element("small", {}, `${category.title}: `), category.names[category.of[i]]));
      box.replaceChildren(...thumbnail(i), caption, ...facts);
      const [left, top] = position(i), isRight = left > canvas.clientWidth / 2, isLow = top > canvas.clientHeight / 2;
      const beside = isRight ? left - 10 - box.offsetWidth : left + 10;
      box.style.left = `${Math.max(4, Math.min(beside, canvas.clientWidth - box.offsetWidth - 4))}px`;
      box.style.top = isLow ? "auto" : `${Math.max(top + 10, 4)}px`;
      box.style.bottom = isLow ? `${Math.max(canvas.clientHeight - top + 10, 4)}px` : "auto";
    }
    draw();
  }

  function thumbnail(i) {
    const sheet = sheets[Math.floor(i / (side * side))], place = i % (side * side);
    if (!sheet) return [];
    const shown = element("canvas", { width: cell, height: cell, class: "thumbnail", role: "img", "aria-label": captions[i] || "no caption" });
    const paint = () => shown.getContext("2d").drawImage(sheet, (place % side) * cell, Math.floor(place / side) * cell, cell, cell, 0, 0, cell, cell);
    if (sheet.complete) paint();
    else sheet.addEventListener("load", paint, { once: true });
    return [shown];
  }

  // The dot that a function of its offset likes best, among those in sight that are meant; -1 where it likes none.
  function best(from, cost) {
    let found = -1, least = Infinity;
    for (let i = 0; i < x.length; i++) {
      if (i === state.at && from) continue;
      const [left, top] = position(i);
      if (left < 0 || top < 0 || left > canvas.clientWidth || top > canvas.clientHeight || !isMeant(i)) continue;
      const price = cost(left - (from ? from[0] : 0), top - (from ? from[1] : 0));
      if (price < least) [found, least] = [i, price];
    }
    return found;
  }

  function nearest(left, top, reach) {
    return best(null, (a, b) => {
      const distance = Math.hypot(a - left, b - top);
      return distance <= reach ? distance : Infinity;
    });
  }

  // Go to a near dot in a direction: steps to the side cost more than steps ahead.
  function step(dx, dy) {
    if (state.at < 0) return select(nearest(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity));
    const to = best(position(state.at), (a, b) => {
      const ahead = a * dx + b * dy, aside = Math.abs(a * dy) + Math.abs(b * dx);
      return ahead > 0 && aside <= 2 * ahead ? ahead + 2 * aside : Infinity;
    });
    if (to >= 0) select(to);
  }

  // Zoom so that the map's point at a place of the canvas stays there.
  function zoom(factor, left = canvas.clientWidth / 2, top = canvas.clientHeight / 2) {
    const size = Math.min(canvas.clientWidth, canvas.clientHeight) - 2 * MARGIN;
    const shares = [(left - (canvas.clientWidth - size) / 2) / size, (top - (canvas.clientHeight - size) / 2) / size];
    const next = Math.min(Math.max(view.zoom * factor, 1), 40);
    view.left += shares[0] / view.zoom - shares[0] / next;
    view.top += shares[1] / view.zoom - shares[1] / next;
    view.zoom = next;
    if (next === 1) Object.assign(view, { left: 0, top: 0 });
    select(state.at);
  }

  function recolour() {
    const category = categories[state.category];
    state.only = null;
    legend.replaceChildren(...entries(category).map(([name, colour, num, value]) => {
      const item = element("button", { type: "button", "aria-pressed": "false", title: "Show these alone" },
        element("span", { class: "swatch", style: { background: colour } }), `${name} `, element("small", {}, count(num)));
      item.addEventListener("click", () => {
        state.only = state.only === value ? null : value;
        legend.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", button === item && state.only !== null));
        select(-1);
      });
      return element("li", {}, item);
    }));
    select(state.at);
  }

  function entries(category) {
    if (!category) return [];
    const named = category.names.slice(0, NUM_COLOURS).map((name, i) =>
      [name, i === category.without ? "var(--muted)" : colourOf(i + 2), category.counts[i], i]);
    const rest = category.counts.slice(NUM_COLOURS);
    return rest.length ? [...named, [`${count(rest.length)} others`, "var(--muted)", rest.reduce((a, b) => a + b), NUM_COLOURS]] : named;
  }

  let dragged = null;
  canvas.addEventListener("pointerdown", (event) => (dragged = [event.offsetX, event.offsetY]));
  canvas.addEventListener("pointerup", () => (dragged = null));
  canvas.addEventListener("pointerleave", () => {
    dragged = null;
    if (document.activeElement !== canvas) select(-1);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (dragged && event.buttons && view.zoom > 1) {
      const size = (Math.min(canvas.clientWidth, canvas.clientHeight) - 2 * MARGIN) * view.zoom;
      view.left -= (event.offsetX - dragged[0]) / size;
      view.top -= (event.offsetY - dragged[1]) / size;
      dragged = [event.offsetX, event.offsetY];
    }
    select(nearest(event.offsetX, event.offsetY, REACH));
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;  // the page scrolls
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.25 : 0.8, event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const act = { ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, -1), ArrowDown: () => step(0, 1),
      "+": () => zoom(1.5, ...anchor()), "-": () => zoom(1 / 1.5, ...anchor()), 0: () => zoom(0), Escape: () => select(-1) }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  function anchor() {
    return state.at < 0 ? [] : position(state.at);
  }

  colours.replaceChildren(...categories.map((category, i) => element("option", { value: i }, category.title)));
  colours.parentElement.hidden = categories.length < 2;
  colours.addEventListener("change", () => {
    state.category = Number(colours.value);
    recolour();
  });
  words.addEventListener("input", () => {
    state.words = words.value.trim().toLowerCase();
    const found = x.filter((_, i) => isMeant(i)).length;
    host.querySelector("output").textContent = state.words ? `${count(found)} found` : "";
    select(-1);
  });
  host.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", () => zoom(Number(button.dataset.zoom))));
  new ResizeObserver(draw).observe(canvas);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  host.hidden = false;
  recolour();
}
