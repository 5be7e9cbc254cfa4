/* Figures that the reader moves.

   A page shows a figure as a picture, and beside it, as JSON, the settings that the picture was
   drawn with, or the measurements in it. This script puts a drawing with controls in the picture's
   place. Without it, and in notebooks, the picture stays.

   Measured runs are frames that the page computes; a slider picks one. The other figures compute,
   in their few lines called `compute`: the sliders of the first one alone have more than 600,000
   positions together, and a start that is dragged through the plane has no end of them. A page
   cannot carry that many frames, and frames would need all the other lines, too. The tests hold
   what is computed against the package, at every position that they move to.

   Plain SVG: neither JSXGraph nor D3 brings native sliders, a point that the arrow keys move, words
   for who cannot see the drawing, and letters that keep their size on a phone. */
(() => {
"use strict";

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
  const raised = String(exponent).replace("-", "⁻").replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);
  return exponent ? `10${raised}` : "1";
};
const range = (from, to, count) =>
  Array.from({length: count}, (_, i) => from + (to - from) * i / (count - 1));
const powers = (from, to) => range(from, to, to - from + 1).map((exponent) => 10 ** exponent);
const clamp = (value, from, to) => Math.max(from, Math.min(to, value));

/** A panel of a drawing: a box in pixels, and an axis in each direction. */
class Panel {
  /** In a title, "|blue:model|" has the colour of what it names. */
  constructor(drawing, box, title, x, y) {
    Object.assign(this, box, {x, y});
    const {left, top, width, height} = box, bottom = top + height;
    const frame = {x: left, y: top, width, height};
    const clip = `${drawing.id}-${drawing.querySelectorAll("clipPath").length}`;
    const axes = svg("g", {class: "axes"}, svg("rect", {...frame, class: "frame"}));
    this.inside = svg("g", {"clip-path": `url(#${clip})`});
    this.above = svg("g");
    drawing.append(svg("clipPath", {id: clip}, svg("rect", frame)), axes, this.inside, this.above);

    const write = (x, y, style, ...text) => axes.append(svg("text", {x, y, class: style}, ...text));
    const label = (tick, axis) => axis.format?.(tick) ?? minus(String(tick));
    for (const tick of x.ticks) {
      axes.append(svg("path", {d: `M${this.X(tick)},${bottom}v4`}));
      write(this.X(tick), bottom + 17, "middle", label(tick, x));
    }
    for (const tick of y.ticks) {
      axes.append(svg("path", {d: `M${left},${this.Y(tick)}h-4`}));
      write(left - 7, this.Y(tick) + 4, "end", label(tick, y));
    }
    write(left + width / 2, bottom + 34, "middle", x.label ?? "");
    write(left, top - 8, "", ...title.split("|").map((part) => {
      const [colour, text] = part.split(":");
      return text ? svg("tspan", {class: `words ${colour}`}, text) : part;
    }));
  }

  static place(value, {from, to, log}) {
    const [v, a, b] = log ? [value, from, to].map(Math.log10) : [value, from, to];
    return clamp((v - a) / (b - a), -9, 9);  // far away, but finite
  }
  X(value) { return this.left + this.width * Panel.place(value, this.x); }
  Y(value) { return this.top + this.height * (1 - Panel.place(value, this.y)); }
  /** Pixels in the units of the axes, which are not logarithmic. */
  units(x, y) {
    const at = (part, {from, to}) => from + part * (to - from);
    return [at((x - this.left) / this.width, this.x), at(1 - (y - this.top) / this.height, this.y)];
  }
  holds(x, y) {
    return [Panel.place(x, this.x), Panel.place(y, this.y)].every((part) => part >= 0 && part <= 1);
  }

  line(points, style) {
    const d = points.map(([x, y]) => `${this.X(x).toFixed(2)},${this.Y(y).toFixed(2)}`).join("L");
    this.inside.append(svg("path", {d: `M${d}`, class: `line ${style}`}));
  }
  upright(x, style) { this.line([[x, this.y.from], [x, this.y.to]], style); }
  /** The lines of equal values of y₁² + κ y₂², around a centre, y₁ along an axis. */
  ellipses([x, y], axis, kappa, radii) {
    const [cx, cy, unit] = [this.X(x), this.Y(y), this.X(1) - this.X(0)];
    const transform = `rotate(${Math.atan2(-axis[1], axis[0]) * 180 / Math.PI} ${cx} ${cy})`;
    for (const rx of radii.map((radius) => radius * unit))
      this.inside.append(
        svg("ellipse", {cx, cy, rx, ry: rx / Math.sqrt(kappa), transform, class: "line thin"}));
  }
  dot(x, y, style, r = 4) {
    this.inside.append(svg("circle", {cx: this.X(x), cy: this.Y(y), r, class: `dot ${style}`}));
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
    words.setAttribute("x",
      at.x + Math.max(from - box.x, 0) - Math.max(box.x + box.width - to, 0));
  }
}

const NARROW = 540, EDGE = {left: 48, right: 14, top: 26, bottom: 42};

/** Boxes of two panels, and the height of both: side by side where there is room, the first with
    its share of the width, else one below the other. */
function pair(width, share, wide, narrow) {
  const box = (from, to, top, height) => ({
    left: from + EDGE.left, top: top + EDGE.top, width: to - from - EDGE.left - EDGE.right, height,
  });
  const tall = (height) => EDGE.top + height + EDGE.bottom;
  const [a, b] = narrow, middle = Math.round(width * share);
  return width < NARROW || share === 1
    ? [box(0, width, 0, a), box(0, width, tall(a), b), tall(a) + tall(b)]
    : [box(0, middle, 0, wide), box(middle, width, 0, wide), tall(wide)];
}

// The figures: what can be set, what follows, what is drawn, and what is said.

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
  move(state, x) { state.x = Number((Math.round(clamp(x, -2.5, 2.5) * 20) / 20).toFixed(2)); },

  loss: (x) => -Math.expm1(-x * x / 2),
  compute({x, lambda, gamma}) {
    const g = x * Math.exp(-x * x / 2), C = (1 - x * x) * Math.exp(-x * x / 2);
    const v = -g / (C + lambda), end = x + gamma * v;
    return {g, C, v, end, before: this.loss(x), after: this.loss(end)};
  },

  draw(drawing, state, {g, C, v, end, before, after}, width) {
    const {x, lambda} = state;
    const [first, second, height] = pair(width, 0.56, 230, [170, 140]);
    const y = {from: -0.25, to: 1.25, ticks: [0, 0.5, 1]};
    const left = new Panel(drawing, first, "ink:loss|, and its |blue:damped model",
      {from: -3.2, to: 3.2, ticks: range(-3, 3, 7), label: "x"}, y);
    const right = new Panel(drawing, second, "loss after the step",
      {from: 0, to: 2, ticks: range(0, 2, 5), label: "damping λ"}, y);
    const model = (d) => before + g * d + (C + lambda) * d * d / 2;

    left.line(range(-3.2, 3.2, 161).map((x) => [x, this.loss(x)]), "ink");
    left.line(range(-6, 6, 241).map((d) => [x + d, model(d)]), "blue dashed");
    left.line([[x, before], [end, after]], "orange dotted");
    left.words(x, before, "start", x < 0 ? "orange end" : "orange", [x < 0 ? -14 : 14, 12]);
    if (left.holds(x + v, model(v)) && Math.abs(v) > 0.3) {
      left.dot(x + v, model(v), "ring blue");
      left.words(x + v, model(v), C + lambda > 0 ? "minimum" : "maximum", "blue middle", [0, -10]);
    }
    if (left.holds(end, after)) left.cross(end, after, "orange");
    else if (end < 0) left.words(-3.2, after, "← lands far out", "orange", [6, -8]);
    else left.words(3.2, after, "lands far out →", "orange end", [-6, -8]);

    if (C < 0) {
      right.inside.append(svg("rect", {...second, x: second.left, y: second.top, class: "shade",
        width: right.X(Math.min(2, -C)) - second.left}));
      right.words(0, -0.25, -C > 0.3 ? "uphill" : "", "", [5, -8]);
    }
    right.line([[0, before], [2, before]], "thin");
    right.words(2, before, "before", "end", [-4, before > 0.9 ? 16 : -6]);
    const at = (lambda) => [lambda, this.compute({...state, lambda}).after];
    right.line(range(0, 2, 401).map(at), "orange");
    right.upright(lambda, "thin dotted");
    right.cross(lambda, after, "orange");
    return {height, panel: left, at: [x, before]};
  },

  say({x, lambda}, {C, v, end, before, after}) {
    const rose = after - before;
    const way = Math.abs(rose) < 0.005 ? "as before" : rose < 0 ? "lower" : "higher";
    return [
      `C + λ = *${fixed(C + lambda)}*`, `v = *${fixed(v)}*`,
      `from x = *${fixed(x)}* to *${fixed(end)}*`,
      `loss *${fixed(before)}* before, *${fixed(after)}* after: ${way}`,
    ];
  },
};

/** The damped Newton step in a long valley, direction by direction. */
const valley = {
  label: "Above: the valley's contours, the start, where the damped Newton step lands, and the "
    + "curve of all dampings. Below: for every damping, the part of the way to the minimum that the "
    + "step goes in each direction.",
  sliders: () => ({
    lambda: logarithmic("damping λ", -3, 4),
    gamma: plain("step size γ", 0, 1.2, 0.05),
  }),

  compute({lambda, gamma, start, mu}) {
    const v = start.map((x, i) => -mu[i] * x / (mu[i] + lambda));
    const end = start.map((x, i) => x + gamma * v[i]);
    const part = start.map((x, i) => -gamma * v[i] / x);  // of the way to the minimum at 0
    const loss = (x) => x.reduce((sum, x, i) => sum + mu[i] * x * x / 2, 0);
    return {part, end, v, before: loss(start), after: loss(end)};
  },

  draw(drawing, state, {part, end}, width) {
    const {lambda, start, mu} = state;
    const unit = (width - EDGE.left - EDGE.right) / 14, tall = Math.max(90, 3.2 * unit);
    const [first, second, height] = pair(width, 1, 0, [tall, 150]);
    const top = new Panel(drawing, first, "x₂, and the step for |green:every λ",
      {from: -2.5, to: 11.5, ticks: range(-2, 10, 7), label: "x₁"},
      {from: -tall / unit / 2, to: tall / unit / 2, ticks: [-1, 0, 1]});
    const bottom = new Panel(drawing, second, "part of the way to the minimum",
      {from: 1e-3, to: 1e4, log: true, label: "damping λ", ticks: powers(-3, 4), format: power},
      {from: 0, to: 1.25, ticks: [0, 0.5, 1], format: percent});
    const dampings = range(-3, 4, 141).map((exponent) => 10 ** exponent);
    const at = (lambda) => this.compute({...state, lambda});

    top.ellipses([0, 0], [1, 0], mu[1] / mu[0], range(1, 14, 14));
    top.line(dampings.map((lambda) => at(lambda).end), "green");
    top.line([start, start.map((x, i) => x * (1 - 0.08 * mu[i]))], "blue dotted");
    top.words(start[0] * 0.92, start[1] * -0.6, "−g", "blue", [-4, 14]);
    top.dot(...start, "orange", 5);
    top.words(...start, "start", "orange");
    top.cross(...end, "orange");

    [["x₁", "blue", "blue end", [-8, 8]], ["x₂", "purple dashed", "purple", [8, 0]]].forEach(
      ([name, line, words, shift], i) => {
        bottom.line(dampings.map((lambda) => [lambda, at(lambda).part[i]]), line);
        bottom.dot(lambda, part[i], words, 5);
        bottom.words(mu[i], at(mu[i]).part[i], `${name}: μ = ${mu[i]}`, words, shift);
      });
    bottom.upright(lambda, "thin dotted");
    return {height};
  },

  say: (state, {part, v, before, after}) => [
    `v = *(${v.map((v) => fixed(v)).join(", ")})*`,
    `*${percent(part[0])}* of the way in x₁, *${percent(part[1])}* in x₂`,
    `loss *${fixed(before)}* before, *${fixed(after)}* after`,
  ],
};

/** Gradient descent with exact line search, and conjugate gradients, for two unknowns. */
const paths = {
  label: "Left: contours of the quadratic, and the steps of gradient descent and of conjugate "
    + "gradients from the start. Right: the part of the way left after each step.",
  sliders: () => ({
    kappa: logarithmic("condition number κ", 0, 2),
    steps: plain("steps shown", 0, 20, 1, String),
  }),
  reach: 1.6,  // of the picture, from the solution
  move(state, ...start) {
    const inside = (x, middle) => clamp(x, middle - this.reach, middle + this.reach);
    state.start = start.map((x, i) => Number(inside(x, state.solution[i]).toFixed(2)));
  },

  /** Both paths, as page 2 writes them, from x₀ for A with the eigenvalues 1 and κ. */
  compute({kappa, start, solution, flat: [c, s]}) {
    const A = ([x, y]) => {
      const along = c * x + s * y, across = kappa * (c * y - s * x);
      return [c * along - s * across, s * along + c * across];
    };
    const dot = ([a, b], [c, d]) => a * c + b * d;
    const plus = ([a, b], t, [c, d]) => [a + t * c, b + t * d];
    const b = A(solution), length = (x) => Math.hypot(...plus(x, -1, solution));
    const walk = (conjugate) => {
      let x = start, r = plus(b, -1, A(x)), p = r;
      const path = [x], left = [1];
      while (length(x) > 1e-12 * length(start) && path.length < 5000) {
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

  draw(drawing, {kappa, start, solution, flat, steps}, {descent, conjugate}, width) {
    const size = Math.min(width < NARROW ? width : width / 2, 350);
    const side = size - EDGE.left - EDGE.right;
    const [first, second, height] = pair(width, size / width, side, [side, 140]);
    const axis = (middle) =>
      ({from: middle - this.reach, to: middle + this.reach, ticks: [0, 1, 2], label: "x₁"});
    const left = new Panel(drawing, {...first, width: side}, "x₂", ...solution.map(axis));
    const right = new Panel(drawing, second, "part of the way left",
      {from: 0, to: 20, ticks: range(0, 20, 5), label: "steps"},
      {from: 1e-3, to: 1.8, log: true, ticks: powers(-3, 0), format: percent});

    left.ellipses(solution, flat, kappa, range(0.4, 4.4, 11));
    left.dot(...solution, "ink", 3);
    for (const [walk, style] of [[descent, "orange dashed"], [conjugate, "blue"]]) {
      const colour = style.split(" ")[0], path = walk.path.slice(0, steps + 1);
      const points = walk.left.slice(0, 21).map((part, k) => [k, Math.max(part, 1e-9)]);
      left.line(path, style);
      path.slice(1).forEach((x) => left.dot(...x, colour, 3.5));
      right.line(points, `${style} faint`);
      right.line(points.slice(0, steps + 1), style);
      points.slice(0, steps + 1).forEach((point) => right.dot(...point, colour, 3.5));
    }
    const high = Math.max(descent.left[11] ?? 0, 4e-3);
    right.words(20, high, "gradient descent", "orange end", [-6, 0]);
    right.words(2, 1e-3, "conjugate gradients", "blue", [8, -8]);
    right.upright(steps, "thin dotted");
    left.words(...start, "start", "middle", [0, start[1] > solution[1] ? -14 : 24]);
    return {height, panel: left, at: start};
  },

  say({steps}, {descent, conjugate}) {
    const after = `${steps} ${steps === 1 ? "step" : "steps"}`;
    const line = (name, {left}) => `${name}: *${percent(left[steps] ?? left.at(-1))}* of the way `
      + `left after ${after}, 1 % after *${left.findIndex((part) => part <= 0.01)}*`;
    return [line("gradient descent", descent), line("conjugate gradients", conjugate)];
  },
};

/** Training runs that the page measured, one per damping. */
const runs = {
  label: "Left: the loss and the products per step over the iterations, a curve per damping. "
    + "Right: over the damping, the length of each layer's first step in lengths of its gradient.",
  sliders: ({dampings}) => ({
    run: plain("damping λ", 0, dampings.length - 1, 1, (run) => String(dampings[run])),
  }),

  draw(drawing, {run, dampings, loss, products, ratio, layers}, found, width) {
    const most = 1.1 * Math.max(...products.flat());
    const [first, second, height] = pair(width, 0.54, 290, [290, 200]);
    const x = {from: 0, to: loss[0].length - 1, ticks: range(0, 50, 6)};
    const left = new Panel(drawing, {...first, height: 170}, "mini-batch loss",
      x, {from: 0, to: 3, ticks: range(0, 3, 4)});
    const below = new Panel(drawing, {...first, top: first.top + 220, height: 70},
      "products per step", {...x, label: "iteration"},
      {from: 0, to: most, ticks: [0, 50, 100].filter((tick) => tick <= most)});
    const low = Math.min(...dampings), high = Math.max(...dampings);
    const right = new Panel(drawing, second, "first step, ‖v‖ / ‖g‖",
      {from: low / 2, to: high * 2, log: true, ticks: dampings, format: power, label: "damping λ"},
      {from: 0.2, to: 2e4, log: true, ticks: powers(0, 4), format: power});

    for (const [panel, curves] of [[left, loss], [below, products]]) {
      const line = (curve, style) => panel.line(curve.map((value, i) => [i, value]), style);
      curves.forEach((curve, i) => i === run || line(curve, "gray faint"));
      line(curves[run], "ink");
    }
    const falls = (curve) => curve.findIndex((value) => value < 1);
    loss.forEach((curve, i) => {
      if (i === run) return;
      const before = loss.slice(0, i).filter((other) => falls(other) < 0).length;
      const name = String(dampings[i]);
      if (falls(curve) < 0) left.words(2 + 9 * before, 2.35, name, "", [0, -4]);  // the plateau
      else left.words(falls(curve), 1, name, i ? "" : "end", [i ? 6 : -6, 0]);
    });
    left.words(50, 3, `λ = ${dampings[run]}`, "strong end", [-8, 18]);

    right.line([[low / 2, 2 / low], [high * 2, 0.5 / high]], "thin dashed");
    right.words(0.1, 10, "1/λ", "", [4, -4]);
    right.upright(dampings[run], "thin dotted");
    [
      ["blue", 0, [14, 2]], ["orange end", 1, [-8, 14]], ["green", 0, [0, -8]], ["purple", 0, [0, 16]],
    ].forEach(([style, at, shift], j) => {
      const colour = style.split(" ")[0], points = ratio.map((row, i) => [dampings[i], row[j]]);
      right.line(points, colour);
      points.forEach((point, i) => right.dot(...point, colour, i === run ? 5 : 2));
      right.words(...points[at], layers[j], style, shift);
    });
    return {height};
  },

  say({run, loss, products, ratio, layers}) {
    const sum = (numbers) => numbers.reduce((sum, one) => sum + one), total = sum(products[run]);
    return [
      `mean loss of the last ten steps *${fixed(sum(loss[run].slice(-10)) / 10)}*`,
      `*${total}* products, ${fixed(total / products[run].length, 0)} a step`,
      "‖v‖/‖g‖ of the first step: "
        + layers.map((layer, j) => `${layer} *${fixed(ratio[run][j], 1)}*`).join(", "),
    ];
  },
};

const FIGURES = {parabola, valley, paths, runs};

// From the picture to the drawing

document.querySelectorAll(".explore").forEach((box, number) => {
  const source = box.querySelector("script[data-explore]");
  const figure = FIGURES[source.dataset.explore], state = JSON.parse(source.textContent);
  const id = `explore-${number}`, alone = Boolean(state.start && figure.move);

  const drawing = svg("g", {id: `${id}-drawing`, "aria-hidden": "true"});
  const picture = svg("svg", {
    role: alone ? "group" : "img",  // an image has nothing to focus in it
    "aria-label": figure.label, "aria-describedby": id,
  }, drawing);
  const controls = html("div", {class: "controls"});
  const said = html("output", {id, "aria-live": "polite"});
  const inputs = Object.entries(figure.sliders(state)).map(([name, slider]) => {
    const {text, min, max, step} = slider;
    const shown = html("span", {"aria-hidden": "true"});
    const input = html("input", {type: "range", name, min, max, step});
    input.addEventListener("input", () => {
      state[name] = slider.value(input.value);
      redraw();
    });
    controls.append(html("label", {}, html("span", {}, `${text} `, shown), input));
    return () => {
      input.value = slider.position(state[name]);
      shown.textContent = slider.format(state[name]);
      input.setAttribute("aria-valuetext", shown.textContent);
    };
  });

  let shape, width = 0;
  const grip = figure.move && point(picture, () => shape, alone, (...at) => {
    figure.move(state, ...at);
    redraw();
  });

  function redraw() {
    width = box.clientWidth || width || 600;
    drawing.replaceChildren();
    const found = box.numbers = figure.compute?.(state);  // to all digits, for the tests
    shape = figure.draw(drawing, state, found, width);
    picture.setAttribute("viewBox", `0 0 ${width} ${Math.ceil(shape.height)}`);
    inputs.forEach((show) => show());
    grip?.();
    // Between asterisks are the numbers that change.
    said.replaceChildren(...figure.say(state, found).map((phrase) => html("span", {},
      ...phrase.split("*").map((part, i) => i % 2 ? html("b", {}, part) : part))));
  }

  box.replaceChildren(picture, controls, said);
  redraw();
  new ResizeObserver(() => box.clientWidth !== width && redraw()).observe(box);
});

/** A point that pointers drag. If it is alone, with no slider to move it, the arrow keys do. */
function point(picture, shape, alone, move) {
  const grip = svg("g", {class: alone ? "grip free" : "grip"},
    svg("circle", {r: 22, class: "hand"}), svg("circle", {r: 7, class: "handle"}));
  const tell = (attributes) => {
    for (const [name, value] of Object.entries(attributes)) grip.setAttribute(name, value);
  };
  tell(alone ? {tabindex: 0, role: "slider", "aria-label": "start: arrow keys move it"}
    : {"aria-hidden": "true"});
  picture.append(grip);

  grip.addEventListener("pointerdown", (event) => {
    grip.setPointerCapture(event.pointerId);
    if (alone) grip.focus({preventScroll: true});
    event.preventDefault();
  });
  // Within an SVG, touch-action alone does not keep the page from scrolling under the finger.
  grip.addEventListener("touchstart", (event) => event.preventDefault(), {passive: false});
  grip.addEventListener("pointermove", ({pointerId, clientX, clientY}) => {
    if (!grip.hasPointerCapture(pointerId)) return;
    const {x, y} = new DOMPoint(clientX, clientY)
      .matrixTransform(picture.getScreenCTM().inverse());
    move(...shape().panel.units(x, y));
  });
  grip.addEventListener("keydown", (event) => {
    const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};
    if (!alone || !way[event.key]) return;
    event.preventDefault();
    const far = event.shiftKey ? 0.5 : 0.1;
    move(...shape().at.map((value, i) => value + far * way[event.key][i]));
  });

  return () => {
    const {panel, at: [x, y]} = shape(), {from, to} = panel.x;
    tell({transform: `translate(${panel.X(x)} ${panel.Y(y)})`});
    if (alone) tell({
      "aria-valuemin": from.toFixed(2), "aria-valuemax": to.toFixed(2),
      "aria-valuenow": x.toFixed(2), "aria-valuetext": `x₁ = ${fixed(x)}, x₂ = ${fixed(y)}`,
    });
  };
}
})();
