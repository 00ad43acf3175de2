// Enhancement only: every page works without it. Upvotes without a reload, live progress of runs, copying, keys.
"use strict";

const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// --- upvotes: the form's own request, answered in JSON; on any trouble the form is sent as it would have been
document.addEventListener("submit", async (event) => {
  const form = event.target;
  const button = event.submitter;
  if (form.id !== "votes" || form.dataset.plain) return;
  event.preventDefault();
  const body = new URLSearchParams(new FormData(form, button));
  button.disabled = true;
  try {
    const answer = await fetch(button.formAction, { method: "POST", body, headers: { Accept: "application/json" } });
    if (!answer.ok) throw new Error(answer.status);
    const { voted } = await answer.json();
    button.setAttribute("aria-pressed", String(voted));
    button.querySelector(".said").textContent = voted ? "Upvoted" : "Upvote";
    if (voted) { button.name = "undo"; button.value = "1"; } else button.removeAttribute("name");
    button.disabled = false;
  } catch {
    button.disabled = false;
    form.dataset.plain = "true";
    form.requestSubmit(button);
  }
});

// --- a run under way: its part of the page is fetched again until the run has ended
async function follow(part) {
  let wait = 1000;
  let said = "";
  while (part.dataset.poll) {
    await new Promise((done) => setTimeout(done, document.hidden ? 5000 : wait));
    try {
      const answer = await fetch(part.dataset.poll, { headers: { Accept: "text/html" } });
      if (!answer.ok) throw new Error(answer.status);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.querySelector("[data-run]");
      if (!fresh) return;
      if (fresh.dataset.run !== part.dataset.run || !fresh.dataset.poll) {
        const focused = part.contains(document.activeElement);
        part.replaceChildren(...fresh.childNodes);
        part.dataset.run = fresh.dataset.run;
        if (fresh.dataset.poll) part.dataset.poll = fresh.dataset.poll;
        else delete part.dataset.poll;
        if (focused) part.focus();
        offerCopies(part);
      }
      // Each tenth is told, not each step: a screen reader would otherwise never be silent.
      if (fresh.dataset.said !== said) {
        said = fresh.dataset.said;
        document.querySelector("#progress-said").textContent = said;
      }
      wait = 1000;
    } catch {
      wait = Math.min(2 * wait, 15000);
    }
  }
}
all("[data-poll]").forEach(follow);

// --- copying a command
function offerCopies(root) {
  if (!navigator.clipboard) return;
  for (const block of all(".copied", root)) {
    if (block.querySelector("button")) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(block.querySelector("code").textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    block.append(button);
  }
}
offerCopies(document);

// --- keys: / to the search, j and k from card to card, e opens the whole entry
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select")) return;
  if (event.key === "/") {
    event.preventDefault();
    document.querySelector("#q").select();
    return;
  }
  const cards = all(".card");
  const here = cards.findIndex((card) => card.classList.contains("here"));
  if (event.key === "j" || event.key === "k") {
    const next = cards[here < 0 ? 0 : Math.max(0, Math.min(cards.length - 1, here + (event.key === "j" ? 1 : -1)))];
    if (!next) return;
    cards[here]?.classList.remove("here");
    next.classList.add("here");
    next.querySelector("a").focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
  } else if (event.key === "e" && here >= 0) {
    const more = cards[here].querySelector("details");
    if (more) more.open = !more.open;
  }
});
