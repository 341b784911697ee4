"""Drive the chat page as a person does, in a headless Chromium; `make browser` runs this.

Text and a picture are sent, the streamed answer is read and stopped, settings and a second turn are
tried by keyboard alone, on a desk's width and a phone's. The last line reads `N checks passed`, or
the exit status is not zero. Pictures of the page are written to runs/browser/.
"""

import json
import pathlib
import shutil
import sys

from playwright.sync_api import Page, Request, expect, sync_playwright

from llama4_jax import from_pretrained
from llama4_jax.checkpoint.location import NANO
from llama4_jax.serve.sizes import EngineConfig
from tests.server.live import serving

PICTURES = pathlib.Path("runs/browser")
WIDTHS = {"desk": (1200, 800), "phone": (360, 640)}
DIGIT = NANO / "examples" / "digit_7.png"
CONFIG = EngineConfig(max_rows=4, step_tokens=256, max_context=1024)
ESCAPE_AT_ONCE = """new MutationObserver((changes, observer) => {
    if (!document.querySelector("article.assistant p")?.textContent) return;
    observer.disconnect();
    document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
}).observe(document.getElementById("log"), {childList: true, subtree: true, characterData: true})"""
checks = 0


def check(holds: bool, claim: str) -> None:
    """Count a claim that holds, or end."""
    global checks
    if not holds:
        raise SystemExit(f"FAILED {claim}")
    checks += 1
    print(f"ok     {claim}", flush=True)


def drop(page: Page, path: pathlib.Path) -> None:
    """Drop a file on the page."""
    page.evaluate(
        """([bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        }""",
        [list(path.read_bytes()), path.name],
    )


def answered(page: Page) -> str:
    """Wait for the end of an answer; return its text."""
    expect(page.locator("#send")).to_be_visible(timeout=120_000)
    return page.locator("article.assistant p").last.text_content() or ""


def try_page(page: Page, name: str, url: str) -> None:
    """Do everything on a page of one width."""
    requested: list[str] = []
    wrong: list[str] = []
    bodies: list[dict] = []

    def see(request: Request) -> None:
        requested.append(request.url)
        if request.method == "POST":
            bodies.append(json.loads(request.post_data or "{}"))

    page.on("request", see)
    page.on(
        "console", lambda message: wrong.append(message.text) if message.type == "error" else None
    )
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    expect(page.locator("#model")).to_have_text("nano", timeout=20_000)

    # By keyboard alone: open the settings, set them, come back, write, send.
    page.keyboard.press("Shift+Tab")
    for _ in range(12):
        if page.evaluate("document.activeElement.id") == "show-settings":
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    for field, value in (("temperature", "0"), ("max_tokens", "24"), ("seed", "3")):
        page.locator(f"#{field}").fill(value)
    page.screenshot(path=PICTURES / f"{name}_settings.png")
    page.locator("#show-settings").click()
    page.locator("#text").focus()
    page.keyboard.type("import os")
    page.keyboard.press("Enter")
    first = answered(page)
    check(len(first) > 0, f"{name}: a text is answered: {first[:40]!r}")
    check(
        bodies[-1]["temperature"] == 0 and bodies[-1]["max_tokens"] == 24,
        f"{name}: settings are sent",
    )
    footer = page.locator("article.assistant footer").last.text_content() or ""
    check("tokens/s" in footer, f"{name}: the rate is shown: {footer}")

    drop(page, DIGIT)
    expect(page.locator("#images li")).to_have_count(1)
    page.locator("#text").fill("Which digit is this?")
    page.screenshot(path=PICTURES / f"{name}_image.png")
    page.keyboard.press("Enter")
    text = answered(page)
    check(len(bodies[-1]["messages"]) == 3, f"{name}: the dialogue has three turns")
    page.locator("#new").click()
    drop(page, DIGIT)
    expect(page.locator("#images li")).to_have_count(1)
    page.locator("#text").fill("Which digit is this?")
    page.keyboard.press("Enter")
    text = answered(page)
    check(text.strip() == "7", f"{name}: a picture of a 7 is read as {text.strip()!r}")

    page.locator("#show-settings").click()
    page.locator("#max_tokens").fill("800")
    page.locator("#show-settings").click()
    page.locator("#new").click()
    page.locator("#text").fill("def f(x):")
    page.evaluate(ESCAPE_AT_ONCE)
    page.keyboard.press("Enter")
    expect(page.locator("article.assistant footer").last).to_contain_text("stopped", timeout=60_000)
    answered(page)
    footer = page.locator("article.assistant footer").last.text_content() or ""
    check("stopped" in footer, f"{name}: an answer is stopped: {footer}")

    page.locator("#temperature").evaluate("field => field.value = -1")
    page.locator("#text").fill("again")
    page.keyboard.press("Enter")
    expect(page.locator("article.wrong")).to_have_count(1, timeout=20_000)
    said = page.locator("article.wrong p").text_content() or ""
    check("temperature" in said, f"{name}: a refusal is shown: {said}")
    page.screenshot(path=PICTURES / f"{name}_end.png")

    width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    check(width <= 0, f"{name}: nothing is wider than the window")
    check(
        all(asked.startswith((url, "data:")) for asked in requested),
        f"{name}: nothing is from elsewhere",
    )
    wrong = [line for line in wrong if "400" not in line]  # the refusal above
    check(not wrong, f"{name}: no errors in the console {wrong[:2]}")


def main() -> None:
    """Serve nano and look at the page on a desk and a phone."""
    browser_path = shutil.which("chromium")
    if browser_path is None:
        sys.exit("there is no chromium; `make browser` installs Debian's.")
    PICTURES.mkdir(parents=True, exist_ok=True)
    with (
        serving(from_pretrained("nano"), config=CONFIG, name="nano") as (url, _),
        sync_playwright() as tools,
    ):
        browser = tools.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name, (width, height) in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            try_page(page, name, url)
            page.close()
        browser.close()
    print(f"{checks} checks passed; pictures are in {PICTURES}")


if __name__ == "__main__":
    main()
