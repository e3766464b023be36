const panels = [...document.querySelectorAll(".panels svg")].map((svg) => ({
  svg,
  points: JSON.parse(svg.dataset.points),
  output: svg.closest("figure").querySelector("output"),
  newest: svg.closest("figure").querySelector("output").textContent,
}));

// All panels at the report nearest to a step.
const showAt = (step) => {
  for (const { svg, points, output, newest } of panels) {
    if (!points.length) continue;
    svg.classList.toggle("on", step !== null);
    if (step === null) {
      output.textContent = newest;
      continue;
    }
    const [x, y, at, value] = points.reduce((a, b) => (Math.abs(b[2] - step) < Math.abs(a[2] - step) ? b : a));
    const cursor = svg.querySelector(".cursor");
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    svg.querySelector(".at").setAttribute("cx", x);
    svg.querySelector(".at").setAttribute("cy", y);
    output.textContent = `${value} at ${at}`;
  }
};
for (const { svg, points } of panels) {
  let index = points.length - 1;
  const show = () => showAt(points[index]?.[2] ?? null);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    index = points.reduce((best, point, at) => (Math.abs(point[0] - x) < Math.abs(points[best][0] - x) ? at : best), 0);
    show();
  });
  svg.addEventListener("pointerleave", () => showAt(null));
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(); });
  svg.addEventListener("blur", () => showAt(null));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    index = Math.min(points.length - 1, Math.max(0, index + step));
    show();
  });
}

const film = document.querySelector(".film");
const slider = film?.querySelector("input[type=range]");
if (slider) {
  const frames = film.querySelectorAll("figure");
  const turn = () => {
    frames.forEach((frame, number) => frame.classList.toggle("now", number === Number(slider.value)));
    film.querySelector("output").textContent = frames[slider.value].dataset.caption;
  };
  film.classList.add("live");
  film.querySelector(".scrub").hidden = false;
  slider.addEventListener("input", turn);
  turn();
}
