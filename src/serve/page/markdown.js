// Markdown as models write it, to elements of the page. Text only ever becomes text nodes, so that nothing in it can act.

/** Puts a text in Markdown into an element, in place of what is there. */
export function render(element, text) {
  element.replaceChildren(...blocks(text.split("\n")));
}

function node(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

const fence = /^\s*(```+|~~~+)\s*([\w+#.-]*)\s*$/;
const heading = /^(#{1,6})\s+(.*?)\s*#*$/;
const item = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const ruler = /^\s*([-*_])(\s*\1){2,}\s*$/;
const tableLine = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

function blocks(lines) {
  const made = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    let match;
    if (line.trim() === "") {
      i += 1;
    } else if ((match = fence.exec(line))) {
      let end = i + 1;
      while (end < lines.length && lines[end].trim() !== match[1]) end += 1;
      const code = node("code", lines.slice(i + 1, end).join("\n"));
      if (match[2]) code.dataset.language = match[2];
      made.push(node("pre", code));
      i = end + 1;
    } else if ((match = heading.exec(line))) {
      made.push(node("h" + Math.min(match[1].length + 2, 6), ...inline(match[2])));
      i += 1;
    } else if (ruler.test(line)) {
      made.push(node("hr"));
      i += 1;
    } else if (/^\s*>/.test(line)) {
      let end = i;
      while (end < lines.length && /^\s*>/.test(lines[end])) end += 1;
      const inside = lines.slice(i, end).map((l) => l.replace(/^\s*> ?/, ""));
      made.push(node("blockquote", ...blocks(inside)));
      i = end;
    } else if (item.test(line)) {
      const [list, end] = listFrom(lines, i);
      made.push(list);
      i = end;
    } else if (line.includes("|") && i + 1 < lines.length && isTableLine(lines[i + 1], line)) {
      let end = i + 2;
      while (end < lines.length && lines[end].includes("|")) end += 1;
      made.push(table(lines[i], lines.slice(i + 2, end)));
      i = end;
    } else {
      let end = i + 1;
      while (end < lines.length && startsParagraph(lines[end])) end += 1;
      made.push(node("p", ...inline(lines.slice(i, end).join("\n"))));
      i = end;
    }
  }
  return made;
}

/** Whether a line is that below the head of a table: it has as many cells. */
function isTableLine(line, head) {
  return tableLine.test(line) && cells(line).length === cells(head).length;
}

function startsParagraph(line) {
  return line.trim() !== "" && !fence.test(line) && !heading.test(line) && !item.test(line) && !/^\s*>/.test(line) && !ruler.test(line);
}

/** The list that begins at a line, and the line behind it. Lines that are further in belong to the item before. */
function listFrom(lines, start) {
  const [, space, mark] = item.exec(lines[start]);
  const ordered = /\d/.test(mark);
  const list = node(ordered ? "ol" : "ul");
  if (ordered) list.start = parseInt(mark, 10);
  let i = start;
  while (i < lines.length) {
    const match = item.exec(lines[i]);
    if (!match || match[1].length !== space.length || /\d/.test(match[2]) !== ordered) break;
    const inside = [match[3]];
    const indent = lines[i].length - match[3].length;
    i += 1;
    while (i < lines.length && further(lines, i, space.length)) {
      inside.push(lines[i].slice(Math.min(indent, lines[i].length - lines[i].trimStart().length)));
      i += 1;
    }
    const parts = blocks(inside);
    // A lone paragraph needs no space around it.
    const entry = parts.length && parts[0].tagName === "P" ? [...parts[0].childNodes, ...parts.slice(1)] : parts;
    list.append(node("li", ...entry));
  }
  return [list, i];
}

function further(lines, i, space) {
  if (lines[i].trim() === "") return i + 1 < lines.length && /^\s/.test(lines[i + 1]) && lines[i + 1].trim() !== "";
  return lines[i].length - lines[i].trimStart().length > space;
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function table(head, rows) {
  const row = (name) => (line) => node("tr", ...cells(line).map((cell) => node(name, ...inline(cell))));
  return node("table", node("thead", row("th")(head)), node("tbody", ...rows.map(row("td"))));
}

const spans = [
  [/`([^`]+)`/, (m) => node("code", m[1])],
  [/\*\*(?=\S)([\s\S]+?)\*\*/, (m) => node("strong", ...inline(m[1]))],
  [/\*(?=[^\s*])([^*]+?)\*/, (m) => node("em", ...inline(m[1]))],
  [/(?<!\w)_(?=[^\s_])([^_]+?)_(?!\w)/, (m) => node("em", ...inline(m[1]))],
  [/~~([^~]+)~~/, (m) => node("del", ...inline(m[1]))],
  [/\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/, (m) => link(m[2], m[1])],
  [/https?:\/\/[^\s<>()"']*[^\s<>()"'.,;:!?]/, (m) => link(m[0], m[0])],
];

function link(address, text) {
  const made = node("a", text);
  made.href = address;
  made.rel = "noopener noreferrer";
  made.target = "_blank";
  return made;
}

function inline(text) {
  const made = [];
  while (text) {
    let first = null;
    for (const [pattern, make] of spans) {
      const match = pattern.exec(text);
      if (match && (!first || match.index < first.match.index)) first = { match, make };
    }
    if (!first) break;
    if (first.match.index) made.push(text.slice(0, first.match.index));
    made.push(first.make(first.match));
    text = text.slice(first.match.index + first.match[0].length);
  }
  if (text) made.push(text);
  return made;
}
