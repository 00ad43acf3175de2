"""Every page in a real browser: accessible in light and dark, within a phone, by keyboard, and without JavaScript."""

import json
import re
import time

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

READ = (
    *("/", "/?page=2", "/day/2025-10-22", "/day/2025-10-23", "/week/2025-W43", "/month/2025-10", "/trending", "/map"),
    *("/search", "/search?q=noise", "/search?q=site:nowhere", "/papers/2406.02214", "/papers/2510.19811", "/about"),
    *("/papers/2409.17115", "/runs", "/feeds", "/nowhere", "/owner", f"/search?q=noise+{'x' * 600}"),
)
OWNED = ("/", "/papers/2406.02214", "/settings", "/subscribe", "/owner", "/runs/1")


pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def asked(served, browser):
    """A run in the queue, an import with something that was not understood, a comment, and an address refused."""
    context = browser.new_context(base_url=served.base)
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(served.owner)
    page.goto("/papers/sltrain")
    page.get_by_text("Change the treatment").click()
    page.get_by_label("density").fill("0.05")
    page.get_by_role("button", name="Run it").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Cancel").wait_for(state="detached")
    page.goto("/settings")
    head = "Daily Papers\n\nby AK and the research community\n\nNov 3\n"
    text = f"{head}\nOne paper\n\nIts text.\n\n  • 4 authors\n·\nNov 2\n"
    page.get_by_label("File", exact=True).set_input_files(
        {"name": "p.txt", "mimeType": "text/plain", "buffer": f"{text}\nodd\n".encode()}
    )
    page.get_by_label("Day on which").fill("2024-11-03")
    page.get_by_role("button", name="Import").click()
    page.get_by_text("not understood").first.wait_for()
    page.goto("/papers/2406.02214")
    page.get_by_label("Your comment").fill("To be read and looked at.")
    page.get_by_role("button", name="Comment", exact=True).click()
    page.locator(".comment").wait_for()
    page.goto("/subscribe")
    page.get_by_label("Your address").fill("gone@example.org")
    page.get_by_role("button", name="Subscribe").click()
    page.get_by_role("heading", name="Check your mail").wait_for()
    page.goto("/settings")
    until = time.monotonic() + 120
    while not page.get_by_role("button", name="Let it be asked again").count():  # the mail goes out behind the answer
        assert time.monotonic() < until, "the refusal did not come"
        time.sleep(0.2)
        page.reload()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.slow
def test_axe_finds_nothing(served, visit, asked, scheme):
    for owned, addresses in ((False, READ), (True, OWNED)):
        one = visit(served.base, color_scheme=scheme, reduced_motion="reduce")
        if owned:
            one.page.goto(served.owner)
        for address in addresses:
            one.page.goto(address)
            one.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            found = Axe().run(one.page)
            assert found.violations_count == 0, f"{address} {scheme}\n{found.generate_report()}"
        one.troubles = [t for t in one.troubles if "404" not in t]  # of /nowhere itself


@pytest.mark.parametrize("width", [360, 768])
@pytest.mark.slow
def test_nothing_is_wider_than_the_screen(served, visit, asked, width):
    one = visit(served.base, viewport={"width": width, "height": 800})
    one.page.goto(served.owner)
    for address in (*READ, *OWNED):
        one.page.goto(address)
        one.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        wide = one.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, (address, wide)
    one.troubles = [t for t in one.troubles if "404" not in t]


def test_what_others_wrote_runs_in_its_own_direction(served, visit, tmp_path):
    """The full stop at the end of a Hebrew sentence stands to the left of its words, not to the right."""
    sentence = "רעש בקלט משפר את הלמידה."
    file = tmp_path / "papers.json"
    day = "2024-05-06T00:00:00.000Z"
    paper = {"id": "2405.00001", "title": sentence, "summary": sentence, "submittedOnDailyAt": day}
    file.write_text(json.dumps([{"paper": paper}]))
    served.command("feed", "import", str(file))
    one = visit(served.base)
    page = one.page
    page.goto(served.owner)
    page.goto("/papers/2405.00001")
    page.get_by_label("Your comment").fill(sentence)
    page.get_by_role("button", name="Comment", exact=True).click()
    seen = 0
    for address in ("/papers/2405.00001", "/day/2024-05-06", "/search?q=רעש"):
        page.goto(address)
        places = page.evaluate(
            """sentence => {
                const walk = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
                const found = [];
                while (walk.nextNode()) {
                    const node = walk.currentNode, end = node.data.trimEnd().length;
                    if (!sentence.endsWith(node.data.trim()) || !node.data.includes('.')) continue;
                    if (node.parentElement.matches('.unseen')) continue;
                    const x = at => {
                        const range = document.createRange();
                        range.setStart(node, at);
                        range.setEnd(node, at + 1);
                        return range.getBoundingClientRect().left;
                    };
                    found.push([x(end - 1), x(end - 2)]);
                }
                return found;
            }""",
            sentence,
        )
        assert all(stop < letter for stop, letter in places), (address, places)
        seen += len(places)
    assert seen >= 6  # title, abstract and comment, twice each


def test_the_keyboard_alone_will_do(served, visit):
    page = visit(served.base).page
    page.goto("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("getComputedStyle(document.activeElement).top") == "0px"  # it comes into sight
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(12):
        page.keyboard.press("Tab")
        seen = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert seen != "none", page.evaluate("document.activeElement.outerHTML")

    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    first = page.locator("article.card").first
    assert first.evaluate("card => card.classList.contains('here') && card.contains(document.activeElement)")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type("j/k noise")  # plain letters again, in the field
    page.keyboard.press("Enter")
    page.wait_for_url("**/search?q=j*")
    page.goto("/papers/2406.02214")
    page.locator("details summary", has_text="Raw scores").focus()
    page.keyboard.press("Enter")
    assert page.locator("details", has_text="Raw scores").get_attribute("open") is not None


def test_everything_works_without_javascript(served, visit):
    page = visit(served.base, java_script_enabled=False).page
    page.goto(served.owner)
    page.get_by_label("Search papers by words or meaning").fill("noise site:features")
    page.get_by_role("button", name="Search").click()
    page.wait_for_url("**/search?q=noise*")
    title = page.locator(".card h2 a").first.inner_text()
    upvote, upvoted = (page.get_by_role("button", name=re.compile(rf"{said}\b")) for said in ("Upvote", "Upvoted"))
    upvote.nth(1).click()
    upvoted.click()
    expect(upvoted).to_have_count(0)
    assert "/search?q=noise" in page.url  # back where it was
    page.locator(".card h2 a").first.click()
    expect(page.locator("h1")).to_have_text(title)
    upvote.click()
    upvoted.click()
    expect(upvoted).to_have_count(0)
    expect(page.locator("h1")).to_have_text(title)  # back where it was
    page.get_by_label("Your comment").fill("Written without a script.")
    page.get_by_role("button", name="Comment", exact=True).click()
    page.get_by_text("Written without a script.").wait_for()
    page.locator(".comment summary").click()
    page.get_by_role("button", name="Delete this comment").click()
    expect(page.locator(".comment")).to_have_count(0)
    page.goto("/papers/pag")
    page.get_by_text("Change the treatment").click()
    page.get_by_label("strength").fill("0.5")
    page.get_by_role("button", name="Run it").click()
    page.wait_for_url("**/runs/*")
    assert "0.5" in page.locator("main").inner_text()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("main")).to_contain_text("cancelled")
    page.goto("/map")
    page.locator(".house a").nth(3).click()
    page.wait_for_url("**/map#weights")
    page.goto("/month/2025-10")
    page.locator(".turn a").first.click()
    page.wait_for_url(re.compile(r"/month/(?!2025-10)"))
    page.goto("/settings")
    page.get_by_role("button", name="End this session").click()
    page.wait_for_url("**/")
    expect(page.get_by_role("link", name="Import")).to_have_count(0)


def test_a_vote_falls_back_to_the_form_when_the_session_is_gone(served, visit):
    one = visit(served.base)
    page = one.page
    page.goto(served.owner)
    page.goto("/papers/2406.02214")
    one.context.clear_cookies()
    page.get_by_role("button", name="Upvote").click()
    page.get_by_role("heading", name="This is the owner").wait_for()
    one.troubles = [t for t in one.troubles if "403" not in t]


def test_paper_holds_nothing_to_click_on(served, visit):
    page = visit(served.base).page
    page.goto(served.owner)
    for address in ("/day/2025-10-22", "/papers/2406.02214"):
        page.goto(address)
        expect(page.locator("button:visible").first).to_be_visible()
        page.emulate_media(media="print")
        expect(page.locator("form:visible, main button:visible:not(.copied button)")).to_have_count(0)
        page.emulate_media(media="screen")


def test_dark_figures_on_dark_pages(served, visit):
    """The figures are images: that they follow the reader's scheme is seen in their pixels."""
    for scheme, dark in (("light", False), ("dark", True)):
        one = visit(served.base, color_scheme=scheme)
        page = one.page
        page.goto("/papers/2406.02214")
        one.drawn(page.locator("figure img").first)
        background = page.evaluate(
            """async () => {
                const image = document.querySelector('figure img');
                await image.decode();
                const canvas = Object.assign(document.createElement('canvas'), {width: 4, height: 4});
                canvas.getContext('2d').drawImage(image, 0, 0);
                return [...canvas.getContext('2d').getImageData(1, 1, 1, 1).data];
            }"""
        )
        assert (sum(background[:3]) < 3 * 128) is dark, (scheme, background)


def test_axe_would_find_something(served, visit):
    """The check itself: an image without a text for it, and text too pale to read."""
    page = visit(served.base).page
    page.goto("/about")
    page.evaluate("document.querySelector('main').insertAdjacentHTML('beforeend', '<img src=\\'/static/mark.svg\\'>')")
    page.evaluate("document.querySelector('h1').style.color = '#eeeeee'")
    assert {v["id"] for v in Axe().run(page).response["violations"]} >= {"image-alt", "color-contrast"}
