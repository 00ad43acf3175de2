"""A stranger comes by: imports a page, finds a paper by its meaning, reads what was measured, runs it, subscribes."""

import re
import time
from datetime import UTC, datetime, timedelta

import pytest
from playwright.sync_api import expect

YESTERDAY = datetime.now(UTC).date() - timedelta(days=1)
CARDS = (
    (
        "A lantern for lost sailors",
        "Small lights along the coast keep ships from the rocks at night. We compare oil and wax.",
        "3 authors",
    ),
    (
        "Fooling cameras with stickers",
        "A printed patch on a road sign makes a recognition system read another sign, at any angle and in any weather.",
        "12 authors",
    ),
    (
        "How bread dough remembers yesterday",
        "Old leaven passes its microbes on. We follow forty loaves through a winter of baking.",
        "2 authors",
    ),
)


def saved_page():
    head = f"Daily Papers\n\nby AK and the research community\n\n{YESTERDAY:%b} {YESTERDAY.day}\n"
    return head + "".join(f"\n{t}\n\n{a}\n\n  • {n}\n·\n{YESTERDAY:%b} {YESTERDAY.day}\n" for t, a, n in CARDS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_strangers_walk(served, visit, tmp_path):
    one = visit(served.base)
    page = one.page

    # the first page, without any set-up
    page.goto("/")
    expect(page.locator("h1")).to_have_text("87 papers on pre-training and perturbation")
    assert page.locator(".tile").count() >= 8

    # import a saved page
    page.goto(served.owner)
    page.get_by_role("link", name="Import a saved page").click()
    path = tmp_path / "papers.txt"
    path.write_text(saved_page())
    page.get_by_label("File", exact=True).set_input_files(path)
    page.get_by_label("Day on which the page was saved").fill(YESTERDAY.isoformat())
    page.get_by_role("button", name="Import").click()
    page.get_by_text("Every line was understood").wait_for()
    report = page.locator("#imports article").first
    assert report.locator("dd b").all_inner_texts() == ["3", "0", "0", "0", "0"]
    page.get_by_role("link", name="Papers", exact=True).click()
    expect(page.locator("h1")).to_have_text(f"{YESTERDAY:%A}, {YESTERDAY.day} {YESTERDAY:%B %Y}")
    expect(page.locator("article.card")).to_have_count(3)

    # upvote without a reload
    page.evaluate("window.still = true")
    vote = page.locator(".card", has_text="lantern").get_by_role("button", name="Upvote")
    vote.click()
    page.locator(".card button[aria-pressed=true]").wait_for()
    assert page.evaluate("window.still")

    # find a paper by meaning: no word of the question is in it
    question = "sourdough fermentation bacteria"
    page.get_by_role("searchbox").fill(question)
    page.get_by_role("searchbox").press("Enter")
    page.wait_for_url("**/search?q=sourdough*")
    until = time.monotonic() + 600  # the model starts, and reads all papers first
    while True:
        titles = page.locator(".card h2").all_inner_texts()
        if titles[:1] == [CARDS[2][0]]:
            break
        assert time.monotonic() < until, titles
        time.sleep(1)
        page.reload()
    assert not set(question.split()) & set(re.findall(r"\w+", " ".join(CARDS[2]).lower()))
    assert page.locator("[role=note]").count() == 0

    # read the evidence of a measured paper
    page.goto("/search?q=verdict:any")
    page.goto("/papers/adversarial-fine-tuning")
    assert page.locator(".hero .word").inner_text().strip()
    one.drawn(page.locator("figure img").first)
    assert page.locator("#arms ~ table tbody tr, section:has(#arms) table tbody tr").count() >= 2

    # run it: the page follows by itself until the result is there
    page.get_by_label("Smoke").check()
    page.get_by_role("button", name="Run it").click()
    page.wait_for_url("**/runs/*")
    page.evaluate("window.still = true")
    page.locator("[data-run] .hero").wait_for(timeout=900_000)
    assert page.evaluate("window.still")
    assert "say nothing about the method" in page.locator(".hero").inner_text()
    assert page.locator("#progress-said").inner_text() in ("done", "")

    # subscribe, confirm, receive, unsubscribe
    page.get_by_role("link", name="Subscribe", exact=True).click()
    page.get_by_label("Your address").fill("stranger@example.org")
    page.get_by_role("button", name="Subscribe").click()
    expect(page.locator("h1")).to_have_text("Check your mail")
    confirm = re.search(r"http://\S+/confirm/\S+", served.mails.text(0))[0]
    page.goto(confirm)
    page.get_by_role("button", name="Confirm").click()
    expect(page.locator("h1")).to_have_text("Subscribed")
    served.command("feed", "digest", "--public-url", "https://papers.example.org")
    digest = served.mails.text(1)
    assert all(title in digest for title, *_ in CARDS)
    assert served.mails.got[1]["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    leave = re.search(r"https://papers\.example\.org(/unsubscribe/[\w.~-]+)", digest)[1]
    page.goto(leave)
    page.get_by_role("button", name="Unsubscribe").click()
    expect(page.locator("h1")).to_have_text("Unsubscribed")
