// What the other scripts share: the page's data, making elements, and numbers as the page's tables write them.
// Captions and names come from strangers: they become text nodes and attributes, never markup.

const data = JSON.parse(document.getElementById("page-data").textContent);

function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(made.style, value);
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// 1234567 as 1,234,567.
function count(value) {
  return value.toLocaleString("en-US");
}

// Three significant digits, never in exponent form: 0.00245, 0.07, 2000.
function significant(value) {
  if (value === 0) return "0";
  const digits = Math.max(0, Math.min(6, 2 - Math.floor(Math.log10(Math.abs(value)))));
  const text = Number(value.toPrecision(3)).toFixed(digits);
  return text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text;
}

function percent(fraction) {
  return (100 * fraction).toFixed(1);
}

// 20000 as 20 k: for axes.
function magnitude(value) {
  for (const [limit, size, unit] of [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]])
    if (Math.abs(value) >= limit) return `${Number((value / size).toPrecision(3))} ${unit}`;
  return significant(value);
}

function colourOf(series) {
  return `var(--series-${series % 8})`;
}
