"""Pages as a browser shows them: headless Chromium through playwright, where both are installed."""

import shutil

import pytest


def look_at(path):
    """Returns, for a narrow and a wide window in light and in dark mode: the width that the page
    needs, what the console says, the requests beyond the page, and the colours of page and text."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    seen = {}
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for width in (390, 1200):
                page = browser.new_page(
                    viewport={"width": width, "height": 900}, color_scheme=scheme
                )
                console, requests = [], []
                page.on("console", lambda message, console=console: console.append(message.text))
                page.on("pageerror", lambda error, console=console: console.append(str(error)))
                page.on("dialog", lambda dialog, console=console: console.append(dialog.message))
                page.on("request", lambda asked, requests=requests: requests.append(asked.url))
                page.goto(path.resolve().as_uri())
                colours = page.evaluate(
                    "[document.body, document.querySelector('svg text') || document.body].map("
                    "  (e, i) => getComputedStyle(e)[i ? 'fill' : 'backgroundColor'])"
                )
                seen[scheme, width] = {
                    "width": page.evaluate("document.documentElement.scrollWidth"),
                    "console": console,
                    "requests": [url for url in requests[1:] if not url.startswith("data:")],
                    "page": colours[0],
                    "text": colours[1],
                }
        browser.close()
    return seen


def assert_shown_well(path):
    """Asserts that a page fits a phone, is dark where dark is asked for, and asks for nothing."""
    seen = look_at(path)
    for (scheme, width), found in seen.items():
        assert found["width"] <= width, (scheme, width, found)
        assert not found["console"] and not found["requests"], found
        levels = {
            part: sum(int(n) for n in found[part].strip("rgba()").split(",")[:3]) / 3
            for part in ("page", "text")
        }
        assert (levels["page"] > 200) == (scheme == "light") and levels["page"] not in (0, 100)
        assert abs(levels["page"] - levels["text"]) > 120, found
