// Draws the figures of a report with Plotly and redraws them when the reader switches the x-axis,
// hides a group, changes between light and dark, or prints.
"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const dark = matchMedia("screen and (prefers-color-scheme: dark)");
  const print = matchMedia("print");
  const PRINTED = { width: 640, height: 300 }; // pixels: an A4 page less its margins
  const hidden = new Set();
  const state = { x: report.axes[0], log: false };
  let printing = false;

  const faded = (hex) => {
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${red}, ${green}, ${blue}, 0.2)`;
  };

  function traces(figure, scheme) {
    return figure.traces.filter((trace) => !hidden.has(trace.group)).map((given) => {
      const { group, ...trace } = given;
      const colour = group === undefined ? scheme.ink : report.groups[group][scheme.name];
      const follows = !Array.isArray(trace.x) && trace.x !== undefined;
      if (follows) trace.x = trace.x[state.x];
      trace.line = { color: colour, ...trace.line };
      trace.marker = { color: colour, ...trace.marker };
      if (trace.fill) trace.fillcolor = faded(colour);
      if (follows && trace.hoverinfo !== "skip" && !trace.hovertemplate) {
        const at = `%{x:,.8~g} ${state.x}`;
        trace.hovertemplate = `%{y:,.5~g}<br>${at}<extra>%{fullData.name}</extra>`;
      }
      return trace;
    });
  }

  function layout(figure, scheme) {
    const axis = {
      gridcolor: scheme.rule, linecolor: scheme.strong, zerolinecolor: scheme.rule,
      automargin: true,
    };
    const follows = figure.traces.some((trace) => trace.x && !Array.isArray(trace.x));
    const own = figure.layout;
    // so few that their labels have room: 1, 2, 5 a decade, or one
    const logarithmic = (shown) => (shown && shown.type === "log" ? { nticks: 3 } : {});
    const x = follows
      ? { title: { text: state.x }, type: state.log ? "log" : "linear", rangemode: "tozero",
          uirevision: `${state.x} ${state.log}`, tickformat: state.log ? "~s" : "" }
      : {};
    return {
      ...own,
      ...(printing ? PRINTED : { autosize: true }),
      xaxis: { ...axis, ...x, ...logarithmic(x), ...own.xaxis },
      yaxis: { ...axis, tickformat: ",.4~g", uirevision: "y", ...logarithmic(own.yaxis),
        ...own.yaxis },
      showlegend: false, hovermode: "closest", uirevision: "keep",
      margin: { l: 48, r: 14, t: 30, b: 46 },
      font: { color: scheme.ink, family: "system-ui, sans-serif", size: 13 },
      hoverlabel: { namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: scheme.soft, activecolor: scheme.ink },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    };
  }

  function scheme() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    return {
      name: dark.matches && !printing ? "dark" : "light",
      ink: colour("ink"), soft: colour("soft"), rule: colour("rule"), strong: colour("strong"),
    };
  }

  function draw() {
    printing = print.matches;
    const colours = scheme();
    for (const figure of report.figures) {
      const place = document.getElementById(`figure-${figure.name}`);
      Plotly.react(place, traces(figure, colours), layout(figure, colours), {
        responsive: true, displaylogo: false,
        modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
        toImageButtonOptions: { filename: figure.name, scale: 2 },
      });
    }
  }

  document.getElementById("switch-x").addEventListener("change", (event) => {
    if (event.target.name === "x") state.x = event.target.value;
    else state.log = event.target.checked;
    draw();
  });
  document.getElementById("switch-groups").addEventListener("change", (event) => {
    const group = Number(event.target.value);
    if (event.target.checked) hidden.delete(group);
    else hidden.add(group);
    draw();
  });
  dark.addEventListener("change", draw);
  print.addEventListener("change", draw);
  draw();
})();
