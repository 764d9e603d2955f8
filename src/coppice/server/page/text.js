// Shows a model's text. It only ever becomes text nodes: nothing the model writes is markup.

/** Split at code fences: `[{code: boolean, text}]`. An open fence reaches to the end. */
export function segments(text) {
  const made = [];
  let lines = [];
  let code = false;
  const push = () => {
    const joined = lines.join("\n");
    if (code || joined.trim()) made.push({ code, text: code ? joined : joined.replace(/^\n+|\n+$/g, "") });
    lines = [];
  };
  for (const line of text.split("\n")) {
    if (line.startsWith("```")) {
      push();
      code = !code;
    } else lines.push(line);
  }
  push();
  return made;
}

/** Bring `root` up to date, touching only what changed, so that a selection survives. */
export function drawText(root, text) {
  const wanted = segments(text);
  wanted.forEach((segment, index) => {
    const tag = segment.code ? "PRE" : "P";
    let node = root.children[index];
    if (!node || node.tagName !== tag) {
      const fresh = document.createElement(tag);
      fresh.append(document.createTextNode(""));
      if (segment.code) fresh.tabIndex = 0; // scrolls sideways, so the keyboard must reach it
      if (node) node.replaceWith(fresh);
      else root.append(fresh);
      node = fresh;
    }
    const leaf = node.firstChild;
    if (segment.text.startsWith(leaf.data)) leaf.appendData(segment.text.slice(leaf.data.length));
    else leaf.data = segment.text;
  });
  while (root.children.length > wanted.length) root.lastElementChild.remove();
}
