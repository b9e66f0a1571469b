// Training curves that can be smoothed and drawn on a logarithmic scale. They stand in for the drawn ones.

if (data.curves.charts.length) {
  const state = { smoothing: 0, log: false, hidden: new Set() };
  const grid = document.querySelector("#training .charts");
  const charts = [...grid.querySelectorAll("figure")].map((figure, i) => {
    const { title, lines } = data.curves.charts[i];
    const label = `${title} against the training step. Arrow keys move the cursor and read the values.`;
    figure.classList.add("replaced");
    const draw = plot(figure, { title, label, axis: "step" });
    figure.append(...figure.querySelectorAll("figcaption"));
    return () => draw(lines.filter((line) => !state.hidden.has(line.model)).flatMap(styled), state);
  });

  function styled(line) {
    const model = data.curves.models[line.model], few = line.validation;
    const drawn = { name: model.name + (few === "held-out" ? ", held out" : ""), colour: colourOf(model.series), x: line.step,
      y: line.value, dashed: model.series >= 8 || few === "held-out", dots: few };
    if (few || !state.smoothing) return [drawn];
    return [{ ...drawn, faint: true }, { ...drawn, y: smooth(line.value, state.smoothing) }];
  }

  // A mean whose weights fall by the factor `keep` from point to point, without a pull to 0 at the beginning.
  function smooth(values, keep) {
    let sum = 0, weight = 0;
    return values.map((value) => {
      sum = keep * sum + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  }

  function redraw() {
    for (const draw of charts) draw();
  }

  const amount = element("output", { for: "smoothing" }, "0");
  const smoothing = element("input", { id: "smoothing", type: "range", min: 0, max: 0.98, step: 0.02, value: 0, oninput: () => {
    state.smoothing = Number(smoothing.value);
    amount.textContent = smoothing.value;
    redraw();
  } });
  const log = element("input", { id: "logarithmic", type: "checkbox", onchange: () => {
    state.log = log.checked;
    redraw();
  } });
  grid.before(element("p", { class: "control" }, element("label", { for: "smoothing" }, "Smoothing"), smoothing, amount,
    element("label", { for: "logarithmic" }, log, " Logarithmic scale")));

  document.querySelectorAll("#training .legend li").forEach((item, model) => {
    const toggle = element("button", { type: "button", "aria-pressed": "true", title: "Show or hide", onclick: () => {
      const isHidden = state.hidden.has(model);
      state.hidden[isHidden ? "delete" : "add"](model);
      toggle.setAttribute("aria-pressed", isHidden);
      redraw();
    } }, ...item.childNodes);
    item.append(toggle);
  });
  redraw();
}
