// The token tree the engine verified last: guessed tokens, and the path that was kept.

const WIDTH = 240;
const HEIGHT = 96;
const MARGIN = 8;
const MAX_NODES = 128;
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);

/** Where nodes stand: depth to the right, leaves spread evenly, a parent amid its children. */
export function places(parents) {
  const children = parents.map(() => []);
  const roots = [];
  parents.forEach((parent, node) => (parent < 0 ? roots : children[parent]).push(node));
  const lanes = new Array(parents.length).fill(0);
  const depths = new Array(parents.length).fill(1);
  parents.forEach((parent, node) => {
    if (parent >= 0) depths[node] = depths[parent] + 1;
  });
  let leaves = 0;
  const visit = (node) => {
    for (const child of children[node]) visit(child);
    const below = children[node];
    lanes[node] = below.length ? (lanes[below[0]] + lanes[below.at(-1)]) / 2 : leaves++;
  };
  roots.forEach(visit);
  const deepest = Math.max(1, ...depths);
  const root = roots.length ? (lanes[roots[0]] + lanes[roots.at(-1)]) / 2 : 0;
  const place = (depth, lane) => ({
    x: MARGIN + ((WIDTH - 2 * MARGIN) * depth) / deepest,
    y: leaves > 1 ? MARGIN + ((HEIGHT - 2 * MARGIN) * lane) / (leaves - 1) : HEIGHT / 2,
  });
  return { root: place(0, root), nodes: parents.map((_, node) => place(depths[node], lanes[node])) };
}

function shape(name, attributes, kept) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (kept) made.setAttribute("class", "kept");
  return made;
}

export function drawTree({ tree, drafted, accepted }) {
  at("token-tree").hidden = !tree;
  if (!tree) return;
  const parents = tree.parents.slice(0, MAX_NODES);
  const kept = new Set(tree.accepted);
  const { root, nodes } = places(parents);
  const from = (node) => (parents[node] < 0 ? root : nodes[parents[node]]);
  const lines = nodes.map(({ x, y }, node) =>
    shape("line", { x1: from(node).x, y1: from(node).y, x2: x, y2: y }, kept.has(node)));
  const dots = nodes.map(({ x, y }, node) => shape("circle", { cx: x, cy: y, r: 3.5 }, kept.has(node)));
  const svg = at("tree");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.replaceChildren(...lines, ...dots, shape("circle", { cx: root.x, cy: root.y, r: 4.5 }, true));
  svg.setAttribute(
    "aria-label", `${tree.parents.length} tokens guessed by ${tree.source}, ${kept.size} kept`,
  );
  const share = drafted ? ` · ${Math.round((100 * accepted) / drafted)}% of all guesses were right` : "";
  at("tree-note").textContent = `${tree.source}: ${kept.size} of ${tree.parents.length} kept${share}`;
}
