// The page: what is shown at which address, and how its parts speak to each other.

import { toast } from "./actions.js";
import { $, say, show } from "./dom.js";
import { wireKeys } from "./keys.js";
import { Rail } from "./rail.js";
import { wireSignIn } from "./signin.js";
import { Upload } from "./upload.js";
import { View } from "./view.js";

const rail = new Rail({ job: (job) => view.noticed(job) });
const view = new View({ changed: (job) => rail.touch(job), deleted: () => leave() });
const upload = new Upload({ accepted: (job) => arrived(job) });

/** Show what the address names. */
function route() {
  const id = /^\/jobs\/([^/]+)\/view$/.exec(location.pathname)?.[1] ?? null;
  document.body.dataset.page = id ? "view" : "home";
  show($("home"), id === null);
  show($("view"), id !== null);
  if (id === null) {
    view.close();
    if (!$("details").hidden) view.toggleDetails();
    document.title = "Turnwire";
  } else if (view.state?.id !== id) view.open(id);
  rail.current(id);
}

function go(path) {
  if (path !== location.pathname) history.pushState(null, "", path);
  route();
  rail.refresh();
  if (view.state) $("title").focus({ preventScroll: true });
}

/** Follow an upload to its job, unless the reader has gone elsewhere meanwhile. */
function arrived(job) {
  if (location.pathname === "/") {
    go(`/jobs/${job.id}/view`);
    return;
  }
  toast(`${job.filename} is uploaded.`);
  rail.refresh();
}

function leave() {
  history.replaceState(null, "", "/");
  route();
  rail.refresh();
}

// Links inside the page change the page; with a modifier they are links.
document.addEventListener("click", (event) => {
  const anchor = event.target.closest("a[href^='/']");
  if (!anchor || anchor.hasAttribute("download") || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  if (anchor.getAttribute("href") === "/") upload.reset();
  go(anchor.getAttribute("href"));
});
addEventListener("popstate", route);

// A file may be dropped anywhere, on any screen.
let depth = 0;
const carriesFile = (event) => event.dataTransfer?.types.includes("Files") && !document.querySelector("dialog[open]");
const over = (on) => {
  depth = on ? depth : 0;
  show($("overlay"), on && $("home").hidden);
  $("drop").classList.toggle("over", on && !$("home").hidden);
};
addEventListener("dragenter", (event) => {
  if (!carriesFile(event)) return;
  depth += 1;
  over(true);
});
addEventListener("dragleave", (event) => {
  if (carriesFile(event) && (depth -= 1) <= 0) over(false);
});
addEventListener("dragover", (event) => {
  if (carriesFile(event)) event.preventDefault();
});
addEventListener("drop", (event) => {
  over(false);
  if (!carriesFile(event)) return;
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (!file) return;
  go("/");
  upload.look(file);
});

addEventListener("online", () => view.hurry());
document.addEventListener("visibilitychange", () => {
  if (document.hidden) view.rest();
  else view.hurry();
});
if (document.hidden) view.rest(); // opened in the background
addEventListener("beforeunload", (event) => {
  if (upload.busy) event.preventDefault();
});

wireSignIn({
  needed: () => rail.clear(),
  done: () => {
    rail.refresh();
    view.hurry();
  },
  left: () => leave(),
});
wireKeys(() => (view.state ? view : null));
say($("rail-note"), "");
route();
rail.refresh();
