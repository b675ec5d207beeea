// Shows the values at the pointer's step in the legends of all charts.

const charts = [...document.querySelectorAll("figure[data-chart]")].map((figure) => ({
  ...JSON.parse(figure.dataset.chart),
  svg: figure.querySelector("svg"),
  rule: figure.querySelector(".rule"),
  keys: [...figure.querySelectorAll(".key b")],
}));
const at = document.getElementById("at");

function formatValue(value) {
  if (typeof value !== "number") return value;
  const size = Math.abs(value);
  if (size >= 1e4 && size < 1e15) return Math.round(value).toLocaleString("en");
  if (size > 0 && size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(5)));
}

function nearestPoint(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle; else high = middle;
  }
  return step - points[low][0] <= points[high][0] - step ? points[low] : points[high];
}

function showStep(step) {
  for (const chart of charts) {
    const [first, last] = chart.steps, [left, right] = chart.edges;
    const part = last > first ? (step - first) / (last - first) : 0.5;
    const x = (left + (right - left) * part) * chart.width;
    chart.rule.setAttribute("x1", x);
    chart.rule.setAttribute("x2", x);
    chart.rule.classList.add("on");
    chart.keys.forEach((key, i) => { key.textContent = formatValue(nearestPoint(chart.series[i], step)[1]); });
  }
  at.textContent = `step ${step.toLocaleString("en")}`;
}

function showLast() {
  for (const chart of charts) {
    chart.rule.classList.remove("on");
    chart.keys.forEach((key, i) => { key.textContent = formatValue(chart.series[i].at(-1)[1]); });
  }
  at.textContent = "";
}

for (const chart of charts) {
  chart.svg.addEventListener("pointermove", (event) => {
    const box = chart.svg.getBoundingClientRect();
    const [first, last] = chart.steps, [left, right] = chart.edges;
    const part = ((event.clientX - box.left) / box.width - left) / (right - left);
    const step = Math.round(first + (last - first) * Math.min(1, Math.max(0, part)));
    showStep(nearestPoint(chart.series[0], step)[0]);
  });
  chart.svg.addEventListener("pointerleave", showLast);
}
