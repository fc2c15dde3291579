// The service over HTTP: fetch with the key of this tab, problems as exceptions, links that work without headers.
//
// The key lives in sessionStorage: this tab only, gone with it. It travels in the Authorization header and never in a URL. What cannot send
// headers (EventSource, <audio>, a download) gets a job token: read-only, one job, expiring.

const KEY = "turnwire-key";
const TOKEN_SECONDS = 86_400;

/** The server said no; `detail` is a sentence for people. */
export class Problem extends Error {
  constructor(status, code, detail, retryAfter = null) {
    super(detail);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** No answer at all, or one that says to try again later. */
export class Unreachable extends Error {}

/** Tells "signed-out" when a key is needed and "signed-in" when there is one. */
export const session = new EventTarget();

const tokens = new Map(); // job id → {token, until}

export const signedIn = () => sessionStorage.getItem(KEY) !== null;

/** Keep `key` for this tab; false when the server does not know it. */
export async function signIn(key) {
  const answer = await knock("/jobs?limit=1", { headers: { Authorization: `Bearer ${key}` } });
  if (answer.status === 401) return false;
  if (!answer.ok) throw await problem(answer);
  sessionStorage.setItem(KEY, key);
  tokens.clear();
  session.dispatchEvent(new Event("signed-in"));
  return true;
}

export function signOut() {
  sessionStorage.removeItem(KEY);
  tokens.clear();
  session.dispatchEvent(new Event("signed-out"));
}

export function authorization() {
  const key = sessionStorage.getItem(KEY);
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

/** Any request; a Response that is ok, or `Problem`, or `Unreachable`. */
export async function request(path, { method = "GET", json, headers = {}, signal } = {}) {
  const body = json === undefined ? undefined : JSON.stringify(json);
  const type = body === undefined ? {} : { "Content-Type": "application/json" };
  const answer = await knock(path, { method, body, signal, headers: { ...authorization(), ...type, ...headers } });
  if (answer.ok) return answer;
  const trouble = await problem(answer);
  if (trouble.status === 401) session.dispatchEvent(new Event("signed-out"));
  throw trouble;
}

/** Any request whose answer is JSON. */
export const ask = async (path, options) => (await request(path, options)).json();

/** The job as it is, with the id of its newest event. */
export async function readJob(id, { signal } = {}) {
  const answer = await request(`/jobs/${id}`, { signal });
  return { job: await answer.json(), newest: Number(/\d+/.exec(answer.headers.get("ETag") ?? "")?.[0] ?? 0) };
}

/** A URL under the job that a browser can open by itself. */
export async function link(id, tail, query = {}) {
  const url = new URL(`/jobs/${id}/${tail}`, location.href);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  if (signedIn()) url.searchParams.set("token", await token(id));
  return url.href;
}

async function token(id) {
  const kept = tokens.get(id);
  if (kept && kept.until - Date.now() > 600_000) return kept.token;
  const made = await ask(`/jobs/${id}/token`, { method: "POST", json: { expires_in: TOKEN_SECONDS } });
  tokens.set(id, { token: made.token, until: Date.parse(made.expires_at) });
  return made.token;
}

async function knock(path, options) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("The server does not answer.");
  }
}

async function problem(answer) {
  let told = {};
  try {
    told = await answer.json();
  } catch {
    // A proxy's page: the status has to do.
  }
  if ([502, 503, 504].includes(answer.status)) return new Unreachable(told.detail ?? "The server is not ready.");
  return toProblem(answer.status, told, answer.headers.get("Retry-After"));
}

/** A problem document as an exception; the upload makes its own request and needs it too. */
export function toProblem(status, told, retryAfter = null) {
  const detail = told.detail || told.title || `The server answered ${status} without saying why.`;
  return new Problem(status, told.code ?? "internal", detail, retryAfter === null ? null : Number(retryAfter));
}
