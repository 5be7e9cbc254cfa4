/* Figures that the reader moves.

   A page shows a figure as a picture, and beside it, as JSON, the settings that the picture was
   drawn with, or the measurements in it. This script puts a drawing with controls in the picture's
   place. Without it, and in notebooks, the picture stays.

   Plain SVG, not JSXGraph or D3: four figures need lines, dots, ellipses and two kinds of axes, which
   are the class Panel. JSXGraph is many times the size of this file, and neither library brings what
   takes care: native sliders, a point that the arrow keys move, words for who cannot see the
   drawing, colours that follow the theme, and letters that keep their size on a phone, for which a
   figure is drawn anew whenever its width changes.

   What can be computed exactly is computed here, in float64; the tests hold it against the package.
   To add a figure: what can be set (sliders, perhaps a handle), what is drawn, and what is said. */
(() => {
"use strict";

// Elements

const make = (namespace) => (name, attributes = {}, ...children) => {
  const element = document.createElementNS(namespace, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const svg = make("http://www.w3.org/2000/svg");
const html = make("http://www.w3.org/1999/xhtml");

// Numbers, as they are shown

const minus = (text) => text.replace("-", "−");
const fixed = (number, digits = 2) => {
  const text = number.toFixed(digits);
  return minus(Number(text) ? text : text.replace("-", ""));  // no negative zero
};
const short = (number) => minus(String(Number(number.toPrecision(2))));
const percent = (part) => {
  const shown = 100 * part;
  return `${shown && shown < 1 ? (shown < 0.01 ? "< 0.01" : short(shown)) : fixed(shown, 0)} %`;
};
const power = (number) => {
  const exponent = Math.round(Math.log10(number));
  const raised = [...String(exponent)].map((sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);
  return exponent ? `10${raised.join("")}` : "1";
};
const range = (from, to, count) =>
  Array.from({length: count}, (_, i) => from + (to - from) * i / (count - 1));
const powers = (from, to) => range(from, to, to - from + 1).map((exponent) => 10 ** exponent);

/** Words of a title, of which some have the colour of what they name: "loss, |blue:model". */
const colourful = (title) => title.split("|").map((part) => {
  const [, colour, text] = part.match(/^(?:(\w+):)?(.*)$/);
  return colour ? svg("tspan", {class: `words ${colour}`}, text) : text;
});

/** A panel of a drawing: a box in pixels, and an axis in each direction. */
class Panel {
  constructor(drawing, {left, top, width, height, x, y, title = ""}) {
    Object.assign(this, {left, top, width, height, x, y});
    const clip = `${drawing.id}-${drawing.querySelectorAll("clipPath").length}`;
    const box = {x: left, y: top, width, height};
    this.inside = svg("g", {"clip-path": `url(#${clip})`});
    this.above = svg("g");
    const axes = svg("g", {class: "axes"}, svg("rect", {...box, class: "frame"}));
    drawing.append(svg("clipPath", {id: clip}, svg("rect", box)), axes, this.inside, this.above);

    const bottom = top + height;
    const label = (tick, axis) => axis.format?.(tick) ?? minus(String(tick));
    for (const tick of x.ticks) {
      const at = this.X(tick);
      axes.append(svg("path", {d: `M${at},${bottom}v4`}),
        svg("text", {x: at, y: bottom + 17, class: "middle"}, label(tick, x)));
    }
    for (const tick of y.ticks) {
      const at = this.Y(tick);
      axes.append(svg("path", {d: `M${left},${at}h-4`}),
        svg("text", {x: left - 7, y: at + 4, class: "end"}, label(tick, y)));
    }
    axes.append(
      svg("text", {x: left + width / 2, y: bottom + 34, class: "middle"}, x.label ?? ""),
      svg("text", {x: left, y: top - 8}, ...colourful(title)));
  }

  static place(value, {from, to, log}) {
    const [v, a, b] = log ? [value, from, to].map(Math.log10) : [value, from, to];
    return Math.max(-9, Math.min(9, (v - a) / (b - a)));  // far away, but finite
  }
  X(value) { return this.left + this.width * Panel.place(value, this.x); }
  Y(value) { return this.top + this.height * (1 - Panel.place(value, this.y)); }

  /** The line through points in the units of the axes. */
  line(points, style) {
    const d = points.map(([x, y]) => `${this.X(x).toFixed(2)},${this.Y(y).toFixed(2)}`).join("L");
    this.inside.append(svg("path", {d: `M${d}`, class: `line ${style}`}));
  }
  level(y, style) { this.line([[this.x.from, y], [this.x.to, y]], style); }
  upright(x, style) { this.line([[x, this.y.from], [x, this.y.to]], style); }
  band(from, to, style) {
    const [a, b] = [this.X(from), this.X(to)];
    this.inside.append(
      svg("rect", {x: a, y: this.top, width: Math.max(0, b - a), height: this.height, class: style}));
  }
  /** The lines of equal values of half of μ₁ y₁² + μ₂ y₂², around a centre, y₁ along an axis. */
  ellipses([x, y], axis, ratio, radii) {
    const angle = Math.atan2(-axis[1], axis[0]) * 180 / Math.PI;
    const unit = this.X(1) - this.X(0);  // the same in both directions
    for (const radius of radii)
      this.inside.append(svg("ellipse", {
        cx: this.X(x), cy: this.Y(y), rx: radius * unit, ry: radius * unit / Math.sqrt(ratio),
        transform: `rotate(${angle} ${this.X(x)} ${this.Y(y)})`, class: "line thin",
      }));
  }
  dot(x, y, style, size = 4) {
    this.inside.append(svg("circle", {cx: this.X(x), cy: this.Y(y), r: size, class: `dot ${style}`}));
  }
  cross(x, y, style) {
    const d = `M${this.X(x) - 6},${this.Y(y) - 6}l12,12m0,-12l-12,12`;
    this.above.append(svg("path", {d, class: `line cross ${style}`}));
  }
  /** Words beside a point, by default to its right, but within the panel. */
  words(x, y, text, style = "", [right, down] = [8, 4]) {
    const at = {x: this.X(x) + right, y: this.Y(y) + down};
    const words = svg("text", {...at, class: `words ${style}`}, text);
    this.above.append(words);
    const box = words.getBBox(), from = this.left + 3, to = this.left + this.width - 3;
    const shift = Math.max(from - box.x, 0) - Math.max(box.x + box.width - to, 0);
    words.setAttribute("x", at.x + shift);
  }
  holds(x, y) {
    return [Panel.place(x, this.x), Panel.place(y, this.y)].every((part) => part >= 0 && part <= 1);
  }
}

// Panels stand side by side where there is room, else one below the other.

const NARROW = 540, EDGE = {left: 48, right: 14, top: 26, bottom: 42};

/** Boxes of panels, the first of which takes a share of the width. */
function boxes(width, share, heights) {
  const box = (from, to, top, height) => ({
    left: from + EDGE.left, top: top + EDGE.top, width: to - from - EDGE.left - EDGE.right, height,
  });
  const tall = (height) => height + EDGE.top + EDGE.bottom;
  if (width < NARROW)
    return {
      first: box(0, width, 0, heights[0]), second: box(0, width, tall(heights[0]), heights[1]),
      height: tall(heights[0]) + tall(heights[1]),
    };
  const middle = Math.round(width * share), height = Math.max(...heights);
  return {
    first: box(0, middle, 0, height), second: box(middle, width, 0, height), height: tall(height),
  };
}

// The figures: what can be set, what is drawn, and what is said of it.

const plain = (text, min, max, step, format = fixed) =>
  ({text, min, max, step, format, value: Number, position: Number});
const logarithmic = (text, min, max) => ({
  text, min, max, step: 0.05, format: short,
  value: (position) => Number((10 ** position).toPrecision(2)), position: Math.log10,
});

/** The damped Newton step on a bell-shaped valley, as page 1 begins. */
const parabola = {
  label: "Left: the loss over x, the damped parabola that touches it at the start, and the step. "
    + "Right: the loss after the step, for every damping.",
  sliders: () => ({
    x: plain("start x", -2.5, 2.5, 0.05),
    lambda: plain("damping λ", 0, 2, 0.01),
    gamma: plain("step size γ", 0, 1.5, 0.05),
  }),
  handle: "x",

  compute({x, lambda, gamma}) {
    const loss = (x) => -Math.expm1(-x * x / 2);
    const g = x * Math.exp(-x * x / 2), C = (1 - x * x) * Math.exp(-x * x / 2);
    const step = (lambda) => -g / (C + lambda);
    const v = step(lambda), end = x + gamma * v;
    return {loss, g, C, step, v, end, before: loss(x), after: loss(end)};
  },

  draw(drawing, state, width) {
    const {x, lambda, gamma} = state, {loss, g, C, step, v, end, before, after} = this.compute(state);
    const {first, second, height} = boxes(width, 0.56, width < NARROW ? [170, 140] : [230]);
    const y = {from: -0.25, to: 1.25, ticks: [0, 0.5, 1]};
    const left = new Panel(drawing, {
      ...first, y, title: "|ink:loss|, and its |blue:damped model",
      x: {from: -3.2, to: 3.2, ticks: [-3, -2, -1, 0, 1, 2, 3], label: "x"},
    });
    const right = new Panel(drawing, {
      ...second, y, title: "loss after the step",
      x: {from: 0, to: 2, ticks: [0, 0.5, 1, 1.5, 2], label: "damping λ"},
    });
    const model = (d) => before + g * d + (C + lambda) * d * d / 2;

    left.line(range(-3.2, 3.2, 161).map((x) => [x, loss(x)]), "ink");
    left.line(range(-6, 6, 241).map((d) => [x + d, model(d)]), "blue dashed");
    left.line([[x, before], [end, after]], "orange dotted");
    left.words(x, before, "start", x < 0 ? "orange end" : "orange", [x < 0 ? -14 : 14, 12]);
    if (left.holds(x + v, model(v)) && Math.abs(v) > 0.3) {
      left.dot(x + v, model(v), "ring blue");
      left.words(x + v, model(v), C + lambda > 0 ? "minimum" : "maximum", "blue middle", [0, -10]);
    }
    if (left.holds(end, after)) left.cross(end, after, "orange");
    else {
      const edge = Math.sign(end) * 3.2;
      left.words(edge, after, end < 0 ? "← lands far out" : "lands far out →",
        end < 0 ? "orange" : "orange end", end < 0 ? [6, -8] : [-6, -8]);
    }

    if (C < 0) {
      right.band(0, Math.min(2, -C), "shade");
      right.words(0, -0.25, -C > 0.3 ? "uphill" : "", "", [5, -8]);
    }
    right.level(before, "thin");
    right.words(2, before, "before", "end", [-4, before > 0.9 ? 16 : -6]);
    right.line(range(0, 2, 401).map((lambda) => [lambda, loss(x + gamma * step(lambda))]), "orange");
    right.upright(lambda, "thin dotted");
    right.cross(lambda, after, "orange");
    return {height, panel: left, at: [x, before]};
  },

  say(state) {
    const {C, v, end, before, after} = this.compute(state);
    const rose = after - before;
    const way = Math.abs(rose) < 0.005 ? "as before" : rose < 0 ? "lower" : "higher";
    return [
      `C + λ = *${fixed(C + state.lambda)}*`, `v = *${fixed(v)}*`,
      `from x = *${fixed(state.x)}* to *${fixed(end)}*`,
      `loss *${fixed(before)}* before, *${fixed(after)}* after: ${way}`,
    ];
  },
};

/** The damped Newton step in a long valley, direction by direction. */
const valley = {
  label: "Above: the valley's contours, the start, where the damped Newton step lands, and the curve "
    + "of all dampings. Below: for every damping, the part of the way to the minimum that the step "
    + "goes in each direction.",
  sliders: () => ({
    lambda: logarithmic("damping λ", -3, 4),
    gamma: plain("step size γ", 0, 1.2, 0.05),
  }),

  compute({lambda, gamma, start, mu}) {
    const part = mu.map((mu) => gamma * mu / (mu + lambda));  // of the way to the minimum at 0
    const end = start.map((x, i) => x * (1 - part[i]));
    const v = start.map((x, i) => -mu[i] * x / (mu[i] + lambda));
    const loss = (x) => x.reduce((sum, x, i) => sum + mu[i] * x * x / 2, 0);
    return {part, end, v, before: loss(start), after: loss(end)};
  },

  draw(drawing, state, width) {
    const {lambda, start, mu} = state, {part, end} = this.compute(state);
    const wide = width - EDGE.left - EDGE.right, unit = wide / 14;
    const tall = Math.max(90, 3.2 * unit), reach = tall / unit / 2;
    const box = {left: EDGE.left, width: wide};
    const top = new Panel(drawing, {
      ...box, top: EDGE.top, height: tall, title: "x₂, and the step for |green:every λ",
      x: {from: -2.5, to: 11.5, ticks: [-2, 0, 2, 4, 6, 8, 10], label: "x₁"},
      y: {from: -reach, to: reach, ticks: [-1, 0, 1]},
    });
    const below = tall + EDGE.top + EDGE.bottom;
    const bottom = new Panel(drawing, {
      ...box, top: below + EDGE.top, height: 150, title: "part of the way to the minimum",
      x: {from: 1e-3, to: 1e4, log: true, label: "damping λ",
        ticks: powers(-3, 4), format: power},
      y: {from: 0, to: 1.25, ticks: [0, 0.5, 1], format: percent},
    });

    top.ellipses([0, 0], [1, 0], mu[1] / mu[0], range(1, 14, 14));
    const all = range(-3, 4, 141).map((exponent) => 10 ** exponent);
    top.line(all.map((lambda) => this.compute({...state, lambda}).end), "green");
    top.line([start, start.map((x, i) => x * (1 - 0.08 * mu[i]))], "blue dotted");
    top.words(start[0] * 0.92, start[1] * -0.6, "−g", "blue", [-4, 14]);
    top.dot(...start, "orange", 5);
    top.words(...start, "start", "orange");
    top.cross(...end, "orange");

    [["x₁", "blue", "blue end", [-8, 8]], ["x₂", "purple dashed", "purple", [8, 0]]].forEach(
      ([name, line, words, shift], i) => {
        const way = (lambda) => this.compute({...state, lambda}).part[i];
        bottom.line(all.map((lambda) => [lambda, way(lambda)]), line);
        bottom.dot(lambda, part[i], words, 5);
        bottom.words(mu[i], way(mu[i]), `${name}: μ = ${mu[i]}`, words, shift);
      });
    bottom.upright(lambda, "thin dotted");
    return {height: below + 150 + EDGE.top + EDGE.bottom};
  },

  say(state) {
    const {part, v, before, after} = this.compute(state);
    return [
      `v = *(${v.map((v) => fixed(v)).join(", ")})*`,
      `*${percent(part[0])}* of the way in x₁, *${percent(part[1])}* in x₂`,
      `loss *${fixed(before)}* before, *${fixed(after)}* after`,
    ];
  },
};

/** Gradient descent with exact line search, and conjugate gradients, for two unknowns. */
const paths = {
  label: "Left: contours of the quadratic, and the steps of gradient descent and of conjugate "
    + "gradients from the start. Right: the part of the way left after each step.",
  sliders: () => ({
    kappa: logarithmic("condition number κ", 0, 2),
    steps: plain("steps shown", 0, 20, 1, String),
  }),
  handle: "start",

  /** Both paths, as page 2 writes them, from x₀ for A with the eigenvalues 1 and κ. */
  compute({kappa, start, solution, flat: [c, s]}, steps = 20) {
    const A = ([x, y]) => {
      const along = c * x + s * y, across = kappa * (c * y - s * x);
      return [c * along - s * across, s * along + c * across];
    };
    const dot = ([a, b], [c, d]) => a * c + b * d;
    const plus = ([a, b], t, [c, d]) => [a + t * c, b + t * d];
    const b = A(solution);
    const length = ([x, y]) => Math.hypot(x - solution[0], y - solution[1]);
    const walk = (conjugate) => {
      let x = start, r = plus(b, -1, A(x)), p = r;
      const path = [x], left = [1];
      const enough = 1e-12 * length(start);
      for (let k = 0; k < steps && length(x) > enough; k++) {
        const Ap = A(p), alpha = dot(p, r) / dot(p, Ap);
        x = plus(x, alpha, p);
        r = plus(b, -1, A(x));
        p = conjugate ? plus(r, -dot(r, Ap) / dot(p, Ap), p) : r;
        path.push(x);
        left.push(length(x) / length(start));
      }
      return {path, left};
    };
    return {descent: walk(false), conjugate: walk(true)};
  },

  draw(drawing, state, width) {
    const {kappa, start, solution, flat, steps} = state;
    const {descent, conjugate} = this.compute(state);
    const side = Math.min(width < NARROW ? width : width / 2, 350) - EDGE.left - EDGE.right;
    const {first, second, height} = boxes(width, (side + EDGE.left + EDGE.right) / width,
      [side, width < NARROW ? 140 : side]);
    const [a, b] = solution, size = this.reach;
    const left = new Panel(drawing, {
      ...first, width: side, title: "x₂",
      x: {from: a - size, to: a + size, ticks: [0, 1, 2], label: "x₁"},
      y: {from: b - size, to: b + size, ticks: [0, 1, 2]},
    });
    const right = new Panel(drawing, {
      ...second, title: "part of the way left",
      x: {from: 0, to: 20, ticks: [0, 5, 10, 15, 20], label: "steps"},
      y: {from: 1e-3, to: 1.8, log: true, ticks: [1e-3, 1e-2, 0.1, 1], format: percent},
    });

    left.ellipses(solution, flat, kappa, range(0.4, 4.4, 11));
    left.dot(...solution, "ink", 3);
    for (const [{path, left: way}, style] of [[descent, "orange dashed"], [conjugate, "blue"]]) {
      const colour = style.split(" ")[0];
      left.line(path.slice(0, steps + 1), style);
      path.slice(1, steps + 1).forEach((x) => left.dot(...x, colour, 3.5));
      const points = way.map((part, k) => [k, Math.max(part, 1e-9)]);
      right.line(points, `${style} faint`);
      right.line(points.slice(0, steps + 1), style);
      points.slice(0, steps + 1).forEach((point) => right.dot(...point, colour, 3.5));
    }
    right.words(20, Math.max(descent.left[11] ?? 0, 4e-3), "gradient descent", "orange end", [-6, 0]);
    right.words(2, 1e-3, "conjugate gradients", "blue", [8, -8]);
    right.upright(steps, "thin dotted");
    left.words(...start, "start", "middle", [0, start[1] > b ? -14 : 24]);
    return {height, panel: left, at: start};
  },
  reach: 1.6,  // of the picture, from the solution

  say(state) {
    const {descent, conjugate} = this.compute(state);
    const long = this.compute(state, 5000);
    const left = ({left}) => percent(left[Math.min(state.steps, left.length - 1)]);
    const needs = ({left}) => left.findIndex((part) => part <= 0.01);
    const steps = (count) => `${count} ${count === 1 ? "step" : "steps"}`;
    const line = (name, walk, long) => `${name}: *${left(walk)}* of the way left after `
      + `${steps(state.steps)}, 1 % after *${needs(long)}*`;
    return [
      line("gradient descent", descent, long.descent),
      line("conjugate gradients", conjugate, long.conjugate),
    ];
  },
};

/** Training runs that the page measured, one per damping. */
const runs = {
  label: "Left: the loss and the products per step over the iterations, a curve per damping. "
    + "Right: over the damping, the length of each layer's first step in lengths of its gradient.",
  sliders: ({dampings}) => ({
    run: {
      ...plain("damping λ", 0, dampings.length - 1, 1), format: (run) => String(dampings[run]),
    },
  }),

  draw(drawing, {run, dampings, loss, products, ratio, layers}, width) {
    const most = Math.max(...products.flat());
    const upper = 170, lower = 70, between = 24;  // pixels, of the two panels on the left
    const {first, second, height} = boxes(width, 0.54, width < NARROW
      ? [upper + between + EDGE.top + lower, 200] : [upper + between + EDGE.top + lower]);
    const x = {from: 0, to: loss[0].length - 1, ticks: [0, 10, 20, 30, 40, 50]};
    const left = new Panel(drawing, {
      ...first, height: upper, x, title: "mini-batch loss", y: {from: 0, to: 3, ticks: [0, 1, 2, 3]},
    });
    const below = new Panel(drawing, {
      ...first, top: first.top + upper + between + EDGE.top, height: lower,
      x: {...x, label: "iteration"}, title: "products per step",
      y: {from: 0, to: 1.1 * most, ticks: [0, 50, 100].filter((tick) => tick <= 1.1 * most)},
    });
    const [low, high] = [Math.min(...dampings), Math.max(...dampings)];
    const right = new Panel(drawing, {
      ...second, title: "first step, ‖v‖ / ‖g‖",
      x: {from: low / 2, to: high * 2, log: true, ticks: dampings, format: power, label: "damping λ"},
      y: {from: 0.2, to: 2e4, log: true, ticks: powers(0, 4), format: power},
    });
    const points = (curve) => curve.map((value, i) => [i, value]);
    for (const [panel, curves] of [[left, loss], [below, products]]) {
      curves.forEach((curve, i) => i === run || panel.line(points(curve), "gray faint"));
      panel.line(points(curves[run]), "ink");
    }
    left.words(50, 3, `λ = ${dampings[run]}`, "strong end", [-8, 18]);

    right.line([[low / 2, 2 / low], [high * 2, 0.5 / high]], "thin dashed");
    right.words(0.1, 10, "1/λ", "", [4, -4]);
    right.upright(dampings[run], "thin dotted");
    const colours = ["blue", "orange", "green", "purple"];
    layers.forEach((layer, j) => {
      right.line(ratio.map((row, i) => [dampings[i], row[j]]), colours[j]);
      ratio.forEach((row, i) => right.dot(dampings[i], row[j], colours[j], i === run ? 5 : 2));
    });
    right.words(low, ratio[0][0], "conv 1", "blue", [14, 2]);
    right.words(dampings[1], ratio[1][1], "conv 2", "orange end", [-8, 14]);
    right.words(low, ratio[0][2], "linear 1", "green", [0, -8]);
    right.words(low, ratio[0][3], "linear 2", "purple", [0, 16]);
    return {height};
  },

  say({run, loss, products, ratio, layers}) {
    const total = products[run].reduce((sum, one) => sum + one);
    const late = loss[run].slice(-10).reduce((sum, one) => sum + one) / 10;
    return [
      `mean loss of the last ten steps *${fixed(late)}*`,
      `*${total}* products, ${fixed(total / products[run].length, 0)} a step`,
      "‖v‖/‖g‖ of the first step: "
        + layers.map((layer, j) => `${layer} *${fixed(ratio[run][j], 1)}*`).join(", "),
    ];
  },
};

const FIGURES = {parabola, valley, paths, runs};

// From the picture to the drawing

function explore(box, number) {
  const source = box.querySelector("script[data-explore]");
  const figure = FIGURES[source.dataset.explore];
  const state = JSON.parse(source.textContent);
  const sliders = figure.sliders(state);
  const id = `explore-${number}`;

  const drawing = svg("g", {id: `${id}-drawing`, "aria-hidden": "true"});
  const picture = svg("svg", {
    role: figure.handle === "start" ? "group" : "img",  // an image has nothing to focus in it
    "aria-label": figure.label, "aria-describedby": id,
  }, drawing);
  const controls = html("div", {class: "controls"});
  const said = html("output", {id, "aria-live": "polite"});
  const inputs = Object.entries(sliders).map(([name, slider]) => {
    const shown = html("span", {"aria-hidden": "true"});
    const {min, max, step} = slider;
    const input = html("input", {type: "range", name, min, max, step});
    input.value = slider.position(state[name]);
    input.addEventListener("input", () => {
      state[name] = slider.value(input.value);
      redraw();
    });
    controls.append(html("label", {}, html("span", {}, `${slider.text} `, shown), input));
    return () => {
      input.value = slider.position(state[name]);
      const text = slider.format(state[name]);
      shown.textContent = text;
      input.setAttribute("aria-valuetext", text);
    };
  });

  let shape, width = 0;
  const handle = figure.handle && point(picture, () => shape, (x, y) => {
    if (figure.handle === "start") {
      const inside = (value, centre) =>
        Math.max(centre - figure.reach, Math.min(centre + figure.reach, value));
      state.start = [x, y].map((value, i) => Number(inside(value, state.solution[i]).toFixed(2)));
    } else {
      const {min, max, step} = sliders.x;
      state.x = Number((Math.round(Math.max(min, Math.min(max, x)) / step) * step).toFixed(2));
    }
    redraw();
  }, figure.handle === "start");

  function redraw() {
    width = box.clientWidth || width || 600;
    drawing.replaceChildren();
    shape = figure.draw(drawing, state, width);
    picture.setAttribute("viewBox", `0 0 ${width} ${Math.ceil(shape.height)}`);
    inputs.forEach((show) => show());
    box.numbers = figure.compute?.(state);  // to all digits, for the tests and the curious
    handle?.();
    // Between asterisks are the numbers that change.
    said.replaceChildren(...figure.say(state).map((phrase) => html("span", {}, ...phrase.split("*")
      .map((part, i) => i % 2 ? html("b", {}, part) : part))));
  }

  source.remove();
  box.replaceChildren(picture, controls, said);
  redraw();
  new ResizeObserver(() => box.clientWidth !== width && redraw()).observe(box);
}

/** A point that pointers drag. Where it is alone, with no slider to move it, the arrow keys do. */
function point(picture, shape, move, alone) {
  const hand = svg("circle", {r: 22, class: "hand"});
  const dot = svg("circle", {r: 7, class: "handle"});
  const grip = svg("g", {class: alone ? "grip free" : "grip"}, hand, dot);
  picture.append(grip);
  if (alone)
    for (const [name, value] of Object.entries({
      tabindex: 0, role: "slider", "aria-label": "start: arrow keys move it",
    })) grip.setAttribute(name, value);
  else grip.setAttribute("aria-hidden", "true");

  grip.addEventListener("pointerdown", (event) => {
    grip.setPointerCapture(event.pointerId);
    if (alone) grip.focus({preventScroll: true});
    event.preventDefault();
  });
  // Within an SVG, touch-action alone does not keep the page from scrolling under the finger.
  grip.addEventListener("touchstart", (event) => event.preventDefault(), {passive: false});
  grip.addEventListener("pointermove", ({pointerId, clientX, clientY}) => {
    if (!grip.hasPointerCapture(pointerId)) return;
    const {panel} = shape(), {left, top, width} = picture.getBoundingClientRect();
    const scale = picture.viewBox.baseVal.width / width;
    const part = (pixel, from, size) => (pixel * scale - from) / size;
    const [u, v] = [part(clientX - left, panel.left, panel.width),
      1 - part(clientY - top, panel.top, panel.height)];
    move(panel.x.from + u * (panel.x.to - panel.x.from),
      panel.y.from + v * (panel.y.to - panel.y.from));
  });
  grip.addEventListener("keydown", (event) => {
    const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};
    if (!alone || !way[event.key]) return;
    event.preventDefault();
    const [x, y] = shape().at, far = event.shiftKey ? 0.5 : 0.1;
    move(x + far * way[event.key][0], y + far * way[event.key][1]);
  });

  return () => {
    const {panel, at: [x, y]} = shape();
    grip.setAttribute("transform", `translate(${panel.X(x)} ${panel.Y(y)})`);
    if (!alone) return;
    const {from, to} = panel.x;
    for (const [name, value] of Object.entries({
      "aria-valuemin": from.toFixed(2), "aria-valuemax": to.toFixed(2), "aria-valuenow": x.toFixed(2),
      "aria-valuetext": `x₁ = ${fixed(x)}, x₂ = ${fixed(y)}`,
    })) grip.setAttribute(name, value);
  };
}

document.querySelectorAll(".explore").forEach(explore);
})();
