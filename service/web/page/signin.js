// Signing in with an API key: asked for when the server answers 401, kept in this tab only.

import { session, signedIn, signIn, signOut } from "./api.js";
import { $, say, show } from "./dom.js";

/** `on.needed()` when the server wants a key, `on.done()` when it has one, `on.left()` when somebody signs out. */
export function wireSignIn(on) {
  const dialog = $("sign-in");
  session.addEventListener("signed-out", () => {
    show($("sign-out"), false);
    if (!dialog.open) dialog.showModal();
    on.needed();
  });
  session.addEventListener("signed-in", () => {
    show($("sign-out"), true);
    dialog.close();
    on.done();
  });
  // Nothing can be read without a key: the dialog stays.
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  $("sign-in-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const key = $("key").value.trim();
    say($("key-trouble"), "");
    try {
      if (!/^[\x21-\x7e]+$/.test(key)) say($("key-trouble"), "A key is one word of plain characters.");
      else if (await signIn(key)) $("key").value = "";
      else say($("key-trouble"), "This key is not known here.");
    } catch (error) {
      say($("key-trouble"), error.message);
    }
  });
  $("sign-out").addEventListener("click", () => {
    signOut();
    on.left(); // what was read with the key is no longer shown
  });
  show($("sign-out"), signedIn());
}
