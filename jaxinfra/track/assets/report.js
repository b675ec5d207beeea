// Draws the charts with uPlot, and redraws them for another axis, size, color scheme, and for print.

"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const control = (id) => document.getElementById(id);
const TIME_STEPS = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, ...[1, 2, 4, 6, 12, 24, 48, 120, 240].map((hours) => hours * 3600)];
const WHOLE_STEPS = Array.from({ length: 16 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();
const DASHES = [[], [8, 4], [2, 3], [8, 3, 2, 3]];
const HEIGHT = 220, FIRST_HEIGHT = 340;  // of the plots, in CSS pixels
const PRINT_WIDTH = 300, FIRST_PRINT_WIDTH = 650;  // fits A4 and US letter
let plots = [];
let isPrinting = false;

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function formatValue(value, isMetric = false) {
  if (value == null) return "-";
  const size = Math.abs(value);
  if (isMetric) return size >= 0.1 ? value.toFixed(4) : String(value);  // rounded already, as in tables
  if (size >= 1e4 && size < 1e15) return Math.round(value).toLocaleString("en");
  if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential(2);
  return String(Number(value.toPrecision(5)));
}

function formatTick(value) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit && size < 1e15) return Number((value / (name === "k" ? 1e3 : unit)).toPrecision(4)) + name;
  }
  if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential().replace(/(\.\d\d)\d+/, "$1");
  return size >= 1000 ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function formatTime(seconds) {
  const whole = Math.round(seconds), pad = (number) => String(number).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  if (whole < 60) return `${Number(seconds.toPrecision(3))} s`;
  return hours ? `${hours}:${pad(minutes)}:${pad(whole % 60)}` : `${minutes}:${pad(whole % 60)}`;
}

// The position of a step of a run on the horizontal axis: itself, its tokens or images, or its training time.
function position(run, step) {
  const axis = control("axis").value;
  if (axis === "steps") return step;
  if (axis !== "time") return step * run.unitsPerStep;
  const [steps, times] = run.clock, next = steps.findIndex((each) => each >= step), last = next - 1;
  if (next < 1) return times.at(next);  // not after the first, or after the last
  return times[last] + ((step - steps[last]) / (steps[next] - steps[last])) * (times[next] - times[last]);
}

// The nearest index at which a line has a value: lines have values at different steps.
function nearest(values, index) {
  for (let distance = 0; distance < values.length; distance++) {
    if (values[index - distance] != null) return index - distance;
    if (values[index + distance] != null) return index + distance;
  }
  return index;
}

// Ticks of a logarithmic axis: 1, 2 and 5 of each decade, or evenly spaced ones within one decade.
function logTicks(low, high, most) {
  if (high / low < 8) {
    const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw * 0.999);
    const first = Math.ceil(low / step), count = Math.floor(high / step) - first + 1;
    return Array.from({ length: count }, (_, i) => Number(((first + i) * step).toPrecision(12)));
  }
  const decades = Math.log10(high / low), digits = decades < most / 3 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil(decades / most)), ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += every) {
    ticks.push(...digits.map((digit) => Number(`${digit}e${power}`)));
  }
  return ticks.filter((tick) => tick >= low && tick <= high);
}

// All charts have the same horizontal axis, also those whose own values begin later.
function horizontalRange(xs, isLog) {
  const [first, last] = wholeRange();
  return (plot, low, high) => {
    if (low === xs[0] && high === xs.at(-1)) [low, high] = [first, last];
    if (low < high) return [low, high];
    return isLog ? [low / 2, low * 2] : [low - 1, low + 1];
  };
}

function verticalRange(chart, isLog) {
  return (plot, low, high) => {
    if (low == null) return [0, 1];
    if (isLog) return [low / 1.05, high * 1.05];
    if (chart.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
    if (low === high) [low, high] = [low - (Math.abs(low) / 2 || 1), high + (Math.abs(high) / 2 || 1)];
    const pad = 0.05 * (high - low);
    return [chart.zero && low === 0 ? 0 : low - pad, high + pad];
  };
}

function seriesOf(line) {
  const stroke = `--s${line.color % 8}`;
  return {
    label: line.label,
    class: line.style,
    stroke: () => color(stroke) + (line.style === "faint" ? "66" : ""),
    width: { faint: 1, mean: 2.2 }[line.style] ?? 1.6,
    dash: DASHES[line.dash % DASHES.length],
    points: { dots: { show: true, size: 6, fill: () => color(stroke) }, mean: { show: false } }[line.style],
    marker: `var(${stroke})`,
  };
}

// Marks the steps whose value is not finite, above the plot.
function drawBroken(lines) {
  return (plot) => {
    const { ctx, bbox } = plot, size = 4 * devicePixelRatio;
    ctx.fillStyle = color("--bad");
    for (const { x, broken } of lines) {
      for (const index of broken) {
        const left = plot.valToPos(x[index], "x", true);
        if (left < bbox.left || left > bbox.left + bbox.width) continue;
        ctx.beginPath();
        ctx.moveTo(left, bbox.top + size);
        ctx.lineTo(left - size, bbox.top - size);
        ctx.lineTo(left + size, bbox.top - size);
        ctx.fill();
      }
    }
  };
}

// Writes the names of the baselines on their lines.
function drawNames(lines) {
  return (plot) => {
    const { ctx, bbox } = plot;
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.fillStyle = color("--soft");
    ctx.textAlign = "right";
    let above = -Infinity;
    for (const { label, y } of lines.filter((line) => line.level).sort((left, right) => right.y[0] - left.y[0])) {
      const top = plot.valToPos(y[0], "y", true), isClose = top - above < 14 * devicePixelRatio;
      above = top;
      if (top < bbox.top || top > bbox.top + bbox.height) continue;
      ctx.textBaseline = isClose ? "top" : "bottom";  // two names at nearly the same height: one below its line
      ctx.fillText(label, bbox.left + bbox.width, top + (isClose ? 2 : -1) * devicePixelRatio);
    }
  };
}

// The first and the last position of all charts.
function wholeRange() {
  const ends = data.charts.flatMap((chart) => chart.lines.map((line) => [line.steps[0], line.steps.at(-1)].map((step) => position(data.runs[line.run], step))));
  return [Math.min(...ends.map(([first]) => first)), Math.max(...ends.map(([, last]) => last))];
}

// The lines as drawn: x on the chosen axis, null for values that are not finite.
function linesOf(chart) {
  const isShown = (line) => line.style !== "faint" || control("single").checked;
  const lines = chart.lines.filter(isShown).map((line) => ({
    ...line,
    x: line.steps.map((step) => position(data.runs[line.run], step)),
    y: line.values.map((value) => (typeof value === "number" ? value : null)),
    broken: line.values.flatMap((value, index) => (typeof value === "number" ? [] : [index])),
  }));
  const ends = [...new Set(wholeRange())];  // one, if all lines have the same single step
  return [...lines, ...chart.levels.map(([label, value]) => ({ label, level: true, x: ends, y: ends.map(() => value), broken: [] }))];
}

function options(chart, figure, lines, table) {
  const isFirst = figure.classList.contains("first");
  const values = lines.flatMap((line) => line.y.filter((value) => value != null));
  const isTime = control("axis").value === "time";
  const isLogX = control("log-x").checked && wholeRange()[0] > 0;
  const isLogY = control("log-y").checked && !chart.zero && values.length > 0 && Math.min(...values) > 0;
  const axis = { stroke: () => color("--soft"), font: "12px system-ui, sans-serif", ticks: { show: false } };
  const ticks = { values: (plot, ticks) => ticks.map(isTime ? formatTime : formatTick), incrs: isTime ? TIME_STEPS : WHOLE_STEPS };
  const grid = { stroke: () => color("--edge"), width: 1 };
  const log = (most) => ({ splits: (plot, _, low, high) => logTicks(low, high, most), filter: (plot, splits) => splits });
  const level = { stroke: () => color("--soft"), width: 1.2, dash: [3, 4], points: { show: false }, marker: "var(--soft)" };
  return {
    ...size(figure),
    series: [
      { label: control("axis").value, value: (plot, value) => (value == null ? "last" : isTime ? formatTime(value) : formatValue(value)) },
      ...lines.map((line, i) => ({
        ...(line.level ? { ...level, label: line.label } : seriesOf(line)),
        // Without a pointer the legend shows the last values.
        value: (plot, value, _, index) => formatValue(index == null ? line.y.findLast((each) => each != null) : value, chart.isMetric),
      })),
    ],
    scales: {
      x: { time: false, distr: isLogX ? 3 : 1, range: horizontalRange(table[0], isLogX) },
      y: { distr: isLogY ? 3 : 1, range: verticalRange(chart, isLogY) },
    },
    axes: [
      { ...axis, grid: { show: false }, space: 70, size: 28, ...ticks, ...(isLogX ? log(5) : {}) },
      { ...axis, grid, space: 36, size: 58, values: (plot, ticks) => ticks.map(formatTick), ...(isLogY ? log(isFirst ? 8 : 5) : {}) },
    ],
    legend: { markers: { width: 2, stroke: (plot, i) => plot.series[i].marker, fill: () => "transparent" } },
    cursor: {
      sync: { key: "all" },
      y: false,
      dataIdx: (plot, i, index) => (i === 0 ? index : nearest(plot.data[i], index)),
      points: { size: 7 },
    },
    padding: [10, 20, 0, 0],
    hooks: { draw: [drawBroken(lines), drawNames(lines)] },
  };
}

function size(figure) {
  const isFirst = figure.classList.contains("first");
  const style = getComputedStyle(figure);
  const inner = figure.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  const width = isPrinting ? (isFirst ? FIRST_PRINT_WIDTH : PRINT_WIDTH) : Math.max(200, Math.floor(inner));
  return { width, height: isFirst ? Math.min(FIRST_HEIGHT, 200 + width / 4) : HEIGHT };
}

function draw() {
  for (const { plot } of plots) plot.destroy();
  plots = data.charts.flatMap((chart, number) => {
    if (!chart.lines.length) return [];
    const figure = document.getElementById(`chart-${number}`);
    const lines = linesOf(chart);
    const table = uPlot.join(lines.map((line) => [line.x, line.y]));
    return [{ figure, plot: new uPlot(options(chart, figure, lines, table), table, figure) }];
  });
  for (const { plot } of plots) makeReachable(plot);
}

// A legend entry shows or hides its line, by Enter or Space, too.
function makeReachable(plot) {
  for (const label of [...plot.root.querySelectorAll(".u-series th")].slice(1)) {
    label.tabIndex = 0;
    label.setAttribute("role", "button");
    label.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      label.click();
    });
  }
}

function resize() {
  for (const { figure, plot } of plots) {
    const wanted = size(figure);
    if (wanted.width !== plot.width || wanted.height !== plot.height) plot.setSize(wanted);
  }
}

function recolor() {
  for (const { plot } of plots) plot.redraw(false);
}

function zoom(plot, factor) {
  const { min, max } = plot.scales.x, xs = plot.data[0];
  const middle = plot.cursor.idx == null ? (min + max) / 2 : xs[plot.cursor.idx];
  const limits = { min: Math.max(xs[0], middle - (middle - min) * factor), max: Math.min(xs.at(-1), middle + (max - middle) * factor) };
  if (limits.max > limits.min) for (const each of plots) each.plot.setScale("x", limits);
}

function onKey(event) {
  const entry = plots.find(({ figure }) => figure === event.target);
  if (!entry) return;
  const { plot } = entry, xs = plot.data[0];
  const first = plot.valToIdx(plot.scales.x.min), last = plot.valToIdx(plot.scales.x.max);
  const now = plot.cursor.idx ?? last, stride = event.shiftKey ? Math.max(1, Math.round((last - first) / 10)) : 1;
  const target = { ArrowLeft: now - stride, ArrowRight: plot.cursor.idx == null ? first : now + stride, Home: first, End: last }[event.key];
  if (target !== undefined) {
    const index = Math.min(last, Math.max(first, target));
    plot.setCursor({ left: plot.valToPos(xs[index], "x"), top: plot.over.clientHeight / 2 }, true, true);
  } else if (event.key === "+" || event.key === "=") zoom(plot, 0.5);
  else if (event.key === "-") zoom(plot, 2);
  else if (event.key === "Escape") {
    for (const each of plots) each.plot.setScale("x", { min: each.plot.data[0][0], max: each.plot.data[0].at(-1) });
    plot.setCursor({ left: -10, top: -10 }, true, true);
  } else return;
  event.preventDefault();
}

function setPrinting(starts) {
  isPrinting = starts;
  resize();
  recolor();
}

const boxes = document.querySelectorAll(".controls input"), folds = document.querySelectorAll("details");

// Loads the page of a run that goes on again, unless it is not looked at, or the pointer is busy.
function reloadLater() {
  setTimeout(() => {
    if (document.hidden || document.documentElement.matches(":active") || getSelection().type === "Range") return reloadLater();
    const [first, last] = wholeRange(), { min, max } = plots[0]?.plot.scales.x ?? {};
    const zoomed = first < last && (min > first || max < last) ? { min, max } : null;
    const checked = [...boxes].map((each) => each.checked), open = [...folds].map((each) => each.open);
    history.replaceState({ axis: control("axis").value, checked, open, zoomed, top: scrollY }, "");
    location.reload();
  }, data.reload.everyMs);
}

const before = history.state;  // how the page looked before it has loaded itself again
if (before) {
  control("axis").value = before.axis;
  boxes.forEach((each, i) => { each.checked = before.checked[i]; });
  folds.forEach((each, i) => { each.open = before.open[i] ?? false; });
}
draw();
if (before?.zoomed) for (const { plot } of plots) plot.setScale("x", before.zoomed);
if (before) scrollTo(0, before.top);
history.replaceState(null, "");
if (Date.now() < data.reload?.untilMs) reloadLater();
for (const { figure } of plots) figure.tabIndex = 0;
document.addEventListener("keydown", onKey);
document.querySelector(".controls").addEventListener("change", draw);
document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);
addEventListener("beforeprint", () => setPrinting(true));
addEventListener("afterprint", () => setPrinting(false));
new ResizeObserver(() => { if (!isPrinting) resize(); }).observe(document.body);
