"use strict";
// Tables are sorted by a click on a title: by the exact value of a cell where it has one, else by what it shows.
document.querySelectorAll("table").forEach((table) => table.querySelectorAll("th").forEach((head, column) => {
  const button = document.createElement("button"), body = table.tBodies[0];
  button.append(...head.childNodes);
  button.title = "sort";
  head.append(button);
  const value = (row) => {
    const cell = row.cells[column], text = cell.title || cell.firstChild?.textContent || "";
    return /^[-−+±]?[\d.,]+(e[-+]?\d+)?\b/.test(text) ? parseFloat(text.replace("−", "-").replace(/[,±]/g, "")) : text;
  };
  const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    [...body.rows].sort((a, b) => (down ? -1 : 1) * order(value(a), value(b))).forEach((row) => body.append(row));
  });
}));

// The plane of the two axes, an epoch at a time. A frame is {channel: [...], x: [...], y: [...], overlap: [...]}.
document.querySelectorAll(".epochs").forEach((box) => {
  const data = JSON.parse(box.querySelector("script").textContent);
  const [layer, epoch] = [box.querySelector("select"), box.querySelector("input")];
  const [said, tip, svg] = [box.querySelector("output"), box.querySelector(".tip"), box.querySelector("svg")];
  const left = 52, bottom = 40, top = 8, right = 10;
  let width = 0, height = 0, limits = [1, 1], dots = new Map();
  const frames = () => data.layers[layer.selectedIndex].frames;
  const draw = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
    if (text !== undefined) element.textContent = text;
    svg.append(element);
    return element;
  };
  const place = (x, y) => [left + x / limits[0] * (width - left - right), height - bottom - y / limits[1] * (height - bottom - top)];
  const steps = (limit) => {
    const raw = limit / 5, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find((n) => n * power >= raw) * power;
    return Array.from({length: Math.floor(limit / step) + 1}, (_, i) => i * step);
  };
  const most = (key) => 1.05 * Math.max(1e-9, ...frames().flatMap((frame) => frame ? frame[key] : []));
  const short = (value) => String(Number(value.toPrecision(3)));
  const colour = (value) => data.colours[Math.round((data.colours.length - 1) * Math.min(1, Math.max(0, value / data.overlap)))];
  const setup = () => {
    width = box.clientWidth - 26; height = Math.min(440, Math.max(280, 0.6 * width));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren(); dots = new Map(); limits = [most("x"), most("y")];
    const [x0, y0] = place(0, 0);
    draw("path", {class: "axis", d: `M${x0},${top}V${y0}H${width - right}`});
    steps(limits[0]).forEach((value) => draw("text", {x: place(value, 0)[0], y: y0 + 16, "text-anchor": "middle"}, short(value)));
    steps(limits[1]).forEach((value) => draw("text", {x: x0 - 6, y: place(0, value)[1] + 4, "text-anchor": "end"}, short(value)));
    draw("text", {x: (x0 + width) / 2, y: height - 6, "text-anchor": "middle"}, "input capture (nats)");
    draw("text", {transform: `translate(12 ${y0 / 2}) rotate(-90)`, "text-anchor": "middle"}, "task information (nats)");
    draw("path", {class: "trail", d: ""});
    show();
  };
  const show = () => {
    const frame = frames()[epoch.value] || {channel: [], x: [], y: [], overlap: []}, here = new Set(frame.channel);
    said.textContent = `${data.titles[epoch.value]}: ${frame.channel.length || "no"} channels`;
    dots.forEach((dot, channel) => { if (!here.has(channel)) { dot.remove(); dots.delete(channel); } });
    frame.channel.forEach((channel, i) => {
      if (!dots.has(channel)) dots.set(channel, draw("circle", {r: frame.channel.length > 128 ? 3.5 : 5}));
      const [x, y] = place(frame.x[i], frame.y[i]), dot = dots.get(channel);
      dot.setAttribute("cx", x); dot.setAttribute("cy", y); dot.setAttribute("fill", colour(frame.overlap[i]));
    });
    leave();
  };
  const leave = () => {
    tip.hidden = true;
    dots.forEach((dot) => dot.classList.remove("near"));
    svg.querySelector(".trail").setAttribute("d", "");
  };
  const point = (event) => {
    leave();
    const frame = frames()[epoch.value], area = svg.getBoundingClientRect();
    if (!frame) return;
    const [x, y] = [event.clientX - area.left, event.clientY - area.top];
    const away = frame.channel.map((_, i) => { const [a, b] = place(frame.x[i], frame.y[i]); return Math.hypot(a - x, b - y); });
    const i = away.indexOf(Math.min(...away));
    if (!(away[i] < 24)) return;
    const channel = frame.channel[i], [a, b] = place(frame.x[i], frame.y[i]);
    dots.get(channel).classList.add("near");
    // Removed channels renumber the others: the way of a channel is that through the epochs of the same channels.
    const same = frames().filter((other) => other && other.width === frame.width && other.channel.includes(channel));
    const way = same.map((other) => { const j = other.channel.indexOf(channel); return place(other.x[j], other.y[j]).join(","); });
    svg.querySelector(".trail").setAttribute("d", way.length > 1 ? `M${way.join("L")}` : "");
    tip.textContent = `${layer.value}, channel ${channel}\ninput capture ${frame.x[i]} nats\ntask information ${frame.y[i]} nats\npeer overlap ${frame.overlap[i] ?? "–"} nats`;
    tip.hidden = false;
    tip.style.left = `${Math.min(a + 24, box.clientWidth - tip.offsetWidth - 4)}px`;
    tip.style.top = `${svg.offsetTop + b + 14}px`;
  };
  layer.addEventListener("change", setup);
  epoch.addEventListener("input", show);
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);
  setup();
  new ResizeObserver(() => requestAnimationFrame(() => { if (box.clientWidth - 26 !== width) setup(); })).observe(box);
});
