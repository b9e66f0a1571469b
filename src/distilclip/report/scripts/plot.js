// A chart of lines with a cursor that the pointer or the arrow keys move.

const PLOT = { width: 346, height: 226, left: 48, right: 12, top: 27, bottom: 36 };

function plot(host, { title, label, axis }) {
  const { width, height, left, right, top, bottom } = PLOT;
  const drawing = shape("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "aria-label": label, class: "plot" });
  const box = element("div", { class: "reading", role: "status", hidden: "" });
  host.append(element("div", { class: "live" }, drawing, box));
  let lines = [], steps = [], at = -1, toX, toY;

  function draw(shown, { log }) {
    lines = shown.map((line) => (log ? positive(line) : line)).filter((line) => line.x.length);
    steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const xs = extent(steps), ys = extent(lines.flatMap((line) => line.y));
    const ticks = log ? logTicks(...ys) : linearTicks(...ys);
    const bounds = log ? ys : [Math.min(ys[0], ticks[0]), Math.max(ys[1], ticks.at(-1))];
    toX = scale(xs, [left, width - right], false);
    toY = scale(bounds, [height - bottom, top], log);
    drawing.replaceChildren(
      shape("text", { x: left, y: 14, class: "name" }, title),
      ...ticks.map((tick) => shape("line", { x1: left, x2: width - right, y1: toY(tick), y2: toY(tick), class: "grid" })),
      ...ticks.map((tick) => shape("text", { x: left - 6, y: toY(tick) + 4, "text-anchor": "end" }, magnitude(tick))),
      ...linearTicks(...xs).map((tick) => shape("text", { x: toX(tick), y: height - bottom + 16, "text-anchor": "middle" }, magnitude(tick))),
      shape("text", { x: width - right, y: height - 4, "text-anchor": "end" }, axis),
      ...lines.map(path),
      ...lines.filter((line) => line.dots).flatMap(dots),
      shape("line", { y1: top, y2: height - bottom, class: "cursor", visibility: "hidden" }),
    );
    read(-1);
  }

  function path(line) {
    const points = line.x.map((x, i) => `${toX(x).toFixed(1)} ${toY(line.y[i]).toFixed(1)}`);
    return shape("path", { d: `M${points.join("L")}`, class: "line", "stroke-dasharray": line.dashed ? "5 3" : null,
      opacity: line.faint ? 0.25 : null, style: { stroke: line.colour } });
  }

  function dots(line) {
    return line.x.map((x, i) => shape("circle", { cx: toX(x), cy: toY(line.y[i]), r: 2.5, style: { fill: line.colour } }));
  }

  // Put the cursor at a place of `steps` and say every line's value there; -1 takes it away.
  function read(to) {
    at = to;
    const cursor = drawing.querySelector(".cursor");
    box.hidden = at < 0;
    cursor.setAttribute("visibility", at < 0 ? "hidden" : "visible");
    if (at < 0) return;
    const x = toX(steps[at]);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    const values = lines.filter((line) => !line.faint).map((line) => [line, valueAt(line, steps[at])]);
    box.replaceChildren(element("strong", {}, `${axis} ${count(steps[at])}`), ...values.map(([line, value]) =>
      element("span", {}, element("i", { class: "swatch", style: { background: line.colour } }), `${line.name}: ${value === null ? "–" : significant(value)}`)));
    const isRight = x > width / 2;
    box.style.left = isRight ? "auto" : `${(100 * x) / width + 2}%`;
    box.style.right = isRight ? `${100 - (100 * x) / width + 2}%` : "auto";
  }

  drawing.addEventListener("pointermove", (event) => {
    const bounds = drawing.getBoundingClientRect();
    const wanted = ((event.clientX - bounds.left) / bounds.width) * width;
    read(steps.reduce((best, step, i) => (Math.abs(toX(step) - wanted) < Math.abs(toX(steps[best]) - wanted) ? i : best), 0));
  });
  drawing.addEventListener("pointerleave", () => read(-1));
  drawing.addEventListener("blur", () => read(-1));
  drawing.addEventListener("keydown", (event) => {
    const last = steps.length - 1;
    const to = { ArrowLeft: Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, last), PageDown: Math.max(at - 10, 0),
      PageUp: Math.min(at + 10, last), Home: 0, End: last, Escape: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    read(to);
  });
  return draw;
}

function positive(line) {
  const kept = line.y.map((y, i) => i).filter((i) => line.y[i] > 0);
  return { ...line, x: kept.map((i) => line.x[i]), y: kept.map((i) => line.y[i]) };
}

// The last value at or before a step; null before the first.
function valueAt(line, step) {
  let found = null;
  for (let i = 0; i < line.x.length && line.x[i] <= step; i++) found = line.y[i];
  return found;
}

function extent(values) {
  return values.length ? [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))] : [1, 2];  // of nothing: any range that both scales can draw
}

function scale([low, high], [from, to], log) {
  const change = log ? Math.log10 : (value) => value;
  const span = change(high) - change(low) || 1;
  return (value) => from + ((change(value) - change(low)) / span) * (to - from);
}

// Round numbers within and around a range, about five.
function linearTicks(low, high) {
  const rough = (high - low || Math.abs(high) || 1) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((size) => size * power >= rough) * power;
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks.length ? ticks : [low];
}

// 1, 10, 100; with 2 and 5 between them where there are few of those.
function logTicks(low, high) {
  const few = Math.log10(high / low) < 2.5, ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const digit of few ? [1, 2, 5] : [1]) ticks.push(Number((digit * 10 ** power).toPrecision(12)));
  const within = ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  return within.length > 1 ? within : [low, high].map((value) => Number(value.toPrecision(3)));
}
