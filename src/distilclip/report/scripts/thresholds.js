// The slider over the threshold of a balance: what each threshold would remove, and the pairs next to it.

// A threshold between unit vectors in all three metrics.
function inMetrics(threshold, metric) {
  const squared = { euclidean: threshold * threshold, sqeuclidean: threshold, cosine: 2 * threshold }[metric];
  return { euclidean: Math.sqrt(squared), sqeuclidean: squared, cosine: squared / 2 };
}

// How many of some ascending numbers are smaller than a threshold; compared in float32, as balance does.
function numBelow(distances, threshold) {
  const limit = Math.fround(threshold);
  let low = 0, high = distances.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (distances[middle] < limit) low = middle + 1;
    else high = middle;
  }
  return low;
}

function sliderPicture([source, width, height, caption, key], measure) {
  const words = caption || "no caption";
  return element("li", {},
    element("img", { src: source, width, height, alt: words, title: key }),
    element("span", { class: "measure" }, measure),
    element("span", { class: "words", dir: "auto", title: words }, words));
}

for (const host of document.querySelectorAll("[data-slider]")) {
  const balance = data.sliders[host.dataset.slider];
  const range = host.querySelector("input");
  const facts = Object.fromEntries([...host.querySelectorAll("[data-fact]")].map((fact) => [fact.dataset.fact, fact]));
  const lists = Object.fromEntries([...host.querySelectorAll("[data-pairs]")].map((list) => [list.dataset.pairs, list]));
  const distances = balance.pairs.map(([, , distance]) => distance);
  const cursors = markAxes(host.previousElementSibling);

  function pairsOf(list, pairs) {
    const shown = pairs.flatMap(([left, right, distance]) =>
      [sliderPicture(balance.pictures[left], ""), sliderPicture(balance.pictures[right], significant(distance))]);
    list.replaceChildren(...(shown.length ? shown : [element("li", { class: "absent" }, "none on this page")]));
  }

  function show() {
    const place = Number(range.value), threshold = balance.threshold[place], groups = balance.num_groups[place];
    const removed = 1 - groups / Math.max(balance.num_valid, 1);
    const others = Object.entries(inMetrics(threshold, balance.metric)).filter(([metric]) => metric !== balance.metric);
    facts.threshold.replaceChildren(significant(threshold), " ",
      element("small", {}, balance.metric + others.map(([metric, value]) => ` = ${significant(value)} ${metric}`).join("")));
    facts.removed.textContent = `${percent(removed)} %`;
    facts.groups.textContent = count(groups);
    facts.largest.textContent = count(balance.largest_group[place]);
    range.setAttribute("aria-valuetext", `${significant(threshold)} ${balance.metric}, ${percent(removed)} % removed`);
    if (lists.under) {
      const stop = numBelow(distances, threshold);
      pairsOf(lists.under, balance.pairs.slice(Math.max(0, stop - 3), stop).reverse());
      pairsOf(lists.over, balance.pairs.slice(stop, stop + 3));
    }
    for (const { line, start, unit } of cursors) {
      const x = (start + unit * threshold).toFixed(2);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
    }
  }

  range.addEventListener("input", show);
  host.querySelector("button").addEventListener("click", () => {
    range.value = balance.chosen;
    show();
  });
  host.hidden = false;
  show();
}

// Add a line to the threshold's chart, the broad and the narrow one, and say where it lies.
function markAxes(figure) {
  return [...(figure?.querySelectorAll("[data-axis]") ?? [])].map((drawing) => {
    const [start, unit] = drawing.dataset.axis.split(" ").map(Number);
    const line = shape("line", { y1: 20, y2: drawing.viewBox.baseVal.height - 54, class: "cursor" });
    drawing.append(line);
    return { line, start, unit };
  });
}
