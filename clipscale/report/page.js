"use strict";

// Charts: the step under the pointer, on all of them at once; its values stand in the legends.
const charts = [...document.querySelectorAll(".chart")].map((figure) => ({
  drawing: figure.querySelector(".plot > svg"),
  cursor: figure.querySelector(".cursor"),
  at: figure.querySelector(".at"),
  outputs: [...figure.querySelectorAll("output")],
  resting: [...figure.querySelectorAll("output")].map((output) => output.textContent),
  ...JSON.parse(figure.dataset.chart),
}));

function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

function readAt(step) {
  for (const chart of charts) {
    const share = (step - chart.low) / (chart.high - chart.low);
    chart.cursor.setAttribute("x1", `${100 * share}%`);
    chart.cursor.setAttribute("x2", `${100 * share}%`);
    chart.cursor.classList.add("on");
    chart.at.textContent = `step ${step.toLocaleString("en").replaceAll(",", "\u202f")}`;
    chart.lines.forEach((line, index) => {
      chart.outputs[index].textContent = line.steps.length ? line.values[nearest(line.steps, step)] : "";
    });
  }
}

function rest() {
  for (const chart of charts) {
    chart.cursor.classList.remove("on");
    chart.at.textContent = "";
    chart.outputs.forEach((output, index) => { output.textContent = chart.resting[index]; });
  }
}

for (const chart of charts) {
  let current = Math.floor(chart.high);
  const read = (step) => {
    current = Math.max(Math.ceil(chart.low), Math.min(Math.floor(chart.high), step));
    readAt(current);
  };
  chart.drawing.addEventListener("pointermove", (event) => {
    const box = chart.drawing.getBoundingClientRect();
    read(Math.round(chart.low + ((event.clientX - box.left) / box.width) * (chart.high - chart.low)));
  });
  chart.drawing.addEventListener("pointerleave", rest);
  chart.drawing.addEventListener("blur", rest);
  chart.drawing.addEventListener("keydown", (event) => {
    const stride = Math.max(1, Math.round((chart.high - chart.low) / (event.shiftKey ? 20 : 200)));
    if (event.key === "ArrowRight") read(current + stride);
    else if (event.key === "ArrowLeft") read(current - stride);
    else return;
    event.preventDefault();
  });
}

// Marks with more to say: cells of a confusion picture, interval bars.
const tip = document.body.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));
document.addEventListener("pointermove", (event) => {
  const told = event.target.closest("[data-tip]");
  tip.classList.toggle("on", told !== null);
  if (told === null) return;
  tip.textContent = told.dataset.tip;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(event.clientX + 12, innerWidth - box.width - 6))}px`;
  tip.style.top = `${event.clientY - box.height - 12 > 0 ? event.clientY - box.height - 12 : event.clientY + 18}px`;
});

// On paper everything is open.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((details) => { details.open = true; }));
