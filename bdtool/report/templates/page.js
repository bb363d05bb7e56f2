"use strict";
(() => {
  const isDark = matchMedia("(prefers-color-scheme: dark)");
  const isNarrow = matchMedia("(max-width: 34rem)");

  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line") };
    const result = {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--text"), family: "system-ui, sans-serif", size: isNarrow.matches ? 12 : 13 },
      hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis/.test(key)) result[key] = { ...layout[key], ...axis };
    }
    return result;
  }

  async function draw() {
    for (const chart of document.querySelectorAll("[data-chart]")) {
      const figure = JSON.parse(document.getElementById(chart.dataset.chart).textContent);
      await Plotly.react(chart, figure.data, themed(figure.layout), { responsive: true, displayModeBar: false });
    }
    document.documentElement.dataset.drawn = isDark.matches ? "dark" : "light";
  }

  isDark.addEventListener("change", draw);
  isNarrow.addEventListener("change", draw);
  draw();
})();
