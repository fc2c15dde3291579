// The stepper: Upload → Validate → Connect → Stream → Finalize → Done. Shown until there is text to look at.

import { h, show } from "./dom.js";

const STEPS = ["Upload", "Validate", "Connect", "Stream", "Finalize", "Done"];
const STAGES = { validating: "Validate", connecting: "Connect", reconnecting: "Connect", waiting_for_capacity: "Connect", finalizing: "Finalize" };

/** The step a job is at, or null once the stepper has nothing more to say. */
export function stepOf(job) {
  if (job.status === "queued") return "Validate";
  if (job.status !== "processing") return null;
  const begun = job.turn_count > 0 || job.progress.sent_ms > 0;
  return begun ? null : (STAGES[job.stage] ?? null); // the text below must not move again
}

export function drawSteps(list, current) {
  show(list, current !== null);
  if (current === null || list.dataset.current === current) return;
  list.dataset.current = current;
  const at = STEPS.indexOf(current);
  const state = (i) => (i < at ? "done" : i === at ? "current" : "next");
  list.replaceChildren(...STEPS.map((step, i) => h("li", { "data-state": state(i), "aria-current": i === at ? "step" : null }, step)));
}
