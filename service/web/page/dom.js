// Making and changing elements. Text only ever becomes text: nothing in this page parses a string as HTML, so a transcript, a file name or an
// error may hold anything. No style attributes either (the Content-Security-Policy refuses them); styles are classes or CSSOM properties.

const SVG = "http://www.w3.org/2000/svg";

/** One element of the document by id. */
export const $ = (id) => document.getElementById(id);

/** `h("p", {class: "note", hidden: true, onclick: f}, "text", child)`; null children are left out. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An icon of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Put `text` into `element` unless it is there already: an unchanged text is neither painted nor announced again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A command line that breaks between its words only. */
export function sayCommand(element, command) {
  if (element.textContent === command) return;
  element.replaceChildren(...command.split(" ").flatMap((word, i) => [i ? " " : "", h("span", { class: "word" }, word)]));
}

/** Show or hide. */
export function show(element, visible) {
  if (element.hidden === visible) element.hidden = !visible;
}

/** Turn a button's icon into another. */
export function swapIcon(button, name) {
  const use = button.querySelector("use");
  if (use.getAttribute("href") !== `#i-${name}`) use.setAttribute("href", `#i-${name}`);
}

/** Copy to the clipboard; on plain http away from localhost the modern way is missing. */
export async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Refused by a permission: the old way below may still do.
    }
  }
  const area = h("textarea", { class: "off-screen", readonly: true, "aria-hidden": "true" });
  area.value = text;
  const before = document.activeElement;
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  before?.focus?.();
  return copied;
}

/** A button that copies `text()` and says so on itself for a moment. */
export function wireCopy(button, text) {
  const label = button.querySelector(".label") ?? button;
  const usual = label.textContent;
  let timer = 0;
  button.addEventListener("click", async () => {
    const done = await copyText(text());
    say(label, done ? "Copied" : "Not copied");
    announce(done ? "Copied" : "The browser refused to copy");
    clearTimeout(timer);
    timer = setTimeout(() => say(label, usual), 1600);
  });
}

/** Tell a screen reader something that is only seen otherwise. */
export function announce(text) {
  const region = $("announcer");
  region.textContent = "";
  requestAnimationFrame(() => {
    region.textContent = text;
  });
}
