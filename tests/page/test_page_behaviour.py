"""The page against a stand-in: keys, stopping, refusals, broken streams, hostile text."""

from __future__ import annotations

import json

import pytest

from tests.page.cdp import Browser
from tests.page.stand_in import KEY, StandIn

pytestmark = pytest.mark.chromium

SAID = ".answer:last-child .said"
PROBLEM = ".answer:last-child .problem"


def ask(browser: Browser, text: str) -> None:
    browser.evaluate("document.querySelector('#prompt').focus()")
    browser.type(text)
    browser.key("Enter")


def answer_of(browser: Browser) -> str:
    browser.wait("document.querySelector('.answer:last-child:not(.busy)')")
    return browser.text(SAID)


def test_enter_sends_and_shift_enter_makes_a_line(browser: Browser, stand_in: StandIn) -> None:
    stand_in.state.answer = ["One", " two", " three."]
    browser.open(stand_in.url)
    browser.wait("document.querySelector('#state').dataset.state === 'ok'")
    browser.evaluate("document.querySelector('#prompt').focus()")
    browser.type("first")
    browser.key("Enter", shift=True)
    browser.type("second")
    browser.key("Enter")
    assert answer_of(browser) == "One two three."
    (body,) = stand_in.state.bodies
    assert body["messages"] == [{"role": "user", "content": "first\nsecond"}]
    assert body["stream"] and body["stream_options"] == {"include_usage": True}
    assert "3 tokens" in browser.text(".answer .foot")

    ask(browser, "third")
    assert answer_of(browser) == "One two three."
    roles = [message["role"] for message in stand_in.state.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert not browser.complaints()


def test_stop_cancels_by_id_and_the_stream_ends(browser: Browser, stand_in: StandIn) -> None:
    browser.open(stand_in.url)
    ask(browser, "talk without end")
    browser.wait(f"document.querySelector('{SAID}')?.innerText.includes('word20 ')")
    browser.click("#stop")
    kept = answer_of(browser)
    assert "stopped" in browser.text(".answer .foot")
    browser.wait(lambda: stand_in.state.ended and not stand_in.state.running)
    assert stand_in.state.ended[0]["outcome"] == "cancelled"
    assert stand_in.state.cancelled == [stand_in.state.ended[0]["id"]]
    assert browser.text(SAID) == kept  # nothing more was written after the stop
    assert not browser.complaints()


def test_escape_closes_the_stream_of_a_server_that_ignores_cancel(
    browser: Browser, stand_in: StandIn
) -> None:
    stand_in.state.heeds_cancel = False
    browser.open(stand_in.url)
    ask(browser, "talk without end")
    browser.wait(f"document.querySelector('{SAID}')?.innerText.includes('word5 ')")
    browser.key("Escape")
    answer_of(browser)
    browser.wait(lambda: stand_in.state.left)


def test_a_new_chat_stops_the_old_one_and_forgets_it(browser: Browser, stand_in: StandIn) -> None:
    browser.open(stand_in.url)
    ask(browser, "talk without end")
    browser.wait(f"document.querySelector('{SAID}')?.innerText.includes('word5 ')")
    browser.click("#new-chat")
    browser.wait(lambda: not stand_in.state.running)
    assert browser.evaluate("document.querySelectorAll('#messages li').length") == 0
    assert browser.evaluate("document.querySelector('#welcome').checkVisibility()")
    stand_in.state.answer = ["Fresh."]
    ask(browser, "hello")
    assert answer_of(browser) == "Fresh."
    assert [m["content"] for m in stand_in.state.bodies[-1]["messages"]] == ["hello"]


def test_hostile_output_stays_text(browser: Browser, stand_in: StandIn) -> None:
    hostile = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    stand_in.state.answer = [hostile, "\n```html\n", "<b>bold</b>\n", "```\nafter"]
    browser.open(stand_in.url)
    ask(browser, "be hostile")
    said = answer_of(browser)
    assert hostile in said and "<b>bold</b>" in said and "after" in said
    tags = browser.evaluate(
        f"[...document.querySelectorAll('{SAID} *')].map(node => node.tagName).join()"
    )
    assert tags == "P,PRE,P"
    assert "stand-in" in browser.evaluate("document.title")


@pytest.mark.parametrize(
    ("status", "code", "message", "advice"),
    [
        (503, "overloaded", "The server is full.", "try again in 7 s"),
        (429, "rate_exceeded", "The key may make 2 calls a minute.", "try again in 7 s"),
        (400, "context_overflow", "The prompt has 9 tokens too many.", "Start a new chat"),
        (500, "engine_error", "Internal error.", "log has the details"),
    ],
)
def test_refusals_are_shown_in_words_and_can_be_retried(
    browser: Browser, stand_in: StandIn, status: int, code: str, message: str, advice: str
) -> None:
    stand_in.state.refusal = (status, code, message)
    stand_in.state.answer = ["Now it works."]
    browser.open(stand_in.url)
    ask(browser, "hello")
    browser.wait(f"document.querySelector('{PROBLEM}')")
    assert message in browser.text(PROBLEM) and advice in browser.text(PROBLEM)
    stand_in.state.refusal = None
    browser.click(".again")
    browser.wait(f"!document.querySelector('{PROBLEM}')")
    assert answer_of(browser) == "Now it works."
    assert len(stand_in.state.bodies[-1]["messages"]) == 1


def test_what_came_before_a_broken_stream_is_kept(browser: Browser, stand_in: StandIn) -> None:
    stand_in.state.breaks_after = 5
    browser.open(stand_in.url)
    ask(browser, "hello")
    assert answer_of(browser).startswith("word0 word1")
    assert "ended before the answer did" in browser.text(PROBLEM)


def test_an_error_event_in_the_stream_is_shown(browser: Browser, stand_in: StandIn) -> None:
    stand_in.state.fails_after = 5
    browser.open(stand_in.url)
    ask(browser, "hello")
    assert answer_of(browser).startswith("word0 word1")
    assert "The engine process died." in browser.text(PROBLEM)


def test_a_server_that_is_gone_is_named_as_such(browser: Browser, stand_in: StandIn) -> None:
    browser.open(stand_in.url)
    browser.wait("document.querySelector('#state').dataset.state === 'ok'")
    stand_in.close()
    ask(browser, "hello")
    browser.wait(f"document.querySelector('{PROBLEM}')")
    assert "cannot be reached" in browser.text(PROBLEM)
    browser.wait("document.querySelector('#state').dataset.state === 'unreachable'")


def test_a_locked_server_gets_its_key_from_the_settings(
    browser: Browser, stand_in: StandIn
) -> None:
    stand_in.state.locked = True
    stand_in.state.answer = ["Welcome."]
    browser.open(stand_in.url)
    browser.wait("document.querySelector('#settings').open")
    assert browser.evaluate("document.activeElement.id") == "api-key"
    browser.type("not the key")
    browser.key("Enter")
    browser.wait("!document.querySelector('#settings').open")
    browser.wait("document.querySelector('#settings').open")
    assert browser.evaluate("document.querySelector('#key-why').textContent")
    browser.evaluate("document.querySelector('#api-key').select()")
    browser.type(KEY)
    browser.key("Enter")
    browser.wait("document.querySelector('#state').dataset.state === 'ok'")
    assert browser.evaluate("sessionStorage.getItem('coppice.key')") == KEY
    assert KEY not in json.dumps(browser.evaluate("({...localStorage})"))
    ask(browser, "hello")
    assert answer_of(browser) == "Welcome."


def test_settings_reach_the_request_and_survive_a_reload(
    browser: Browser, stand_in: StandIn
) -> None:
    stand_in.state.answer = ["Yes."]
    browser.open(stand_in.url)
    for field, value in (
        ("system", "Be brief."),
        ("temperature", 0.3),
        ("max-tokens", 12),
        ("seed", 7),
    ):
        browser.click("#show-settings")
        browser.evaluate(
            f"(f => {{ f.value = {json.dumps(value)};"
            f" f.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
            f"(document.querySelector('#{field}'))"
        )
        browser.key("Escape")
        browser.wait("!document.querySelector('#settings').open")
    browser.open(stand_in.url)
    ask(browser, "hello")
    assert answer_of(browser) == "Yes."
    body = stand_in.state.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.3, 12, 7)


def test_the_theme_toggle_outlives_a_reload(browser: Browser, stand_in: StandIn) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(stand_in.url)
    light = browser.evaluate(paper)
    browser.scheme("dark")
    dark = browser.evaluate(paper)
    assert light != dark
    browser.click("#theme")  # light, whatever the system prefers
    assert browser.evaluate(paper) == light
    browser.open(stand_in.url)
    assert browser.evaluate(paper) == light
    browser.click("#theme")
    assert browser.evaluate(paper) == dark


def test_every_control_has_a_name(browser: Browser, stand_in: StandIn) -> None:
    browser.open(stand_in.url)
    tree = browser.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "slider", "spinbutton", "img"}
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node["ignored"]
        and node["role"]["value"] in roles
        and not node.get("name", {}).get("value")
    ]
    assert not nameless


def test_the_token_tree_of_a_step_is_drawn_with_its_kept_nodes(
    browser: Browser, stand_in: StandIn
) -> None:
    browser.open(stand_in.url)
    browser.wait("document.querySelector('#state').dataset.state === 'ok'")
    assert browser.evaluate("document.querySelector('#token-tree').hidden")
    stand_in.state.tree = {"source": "suffix", "parents": [-1, 0, 0, -1, 1], "accepted": [0, 1]}
    browser.wait("!document.querySelector('#token-tree').hidden")
    assert browser.evaluate("document.querySelectorAll('#tree line').length") == 5
    assert browser.evaluate("document.querySelectorAll('#tree line.kept').length") == 2
    assert browser.evaluate("document.querySelectorAll('#tree circle.kept').length") == 3
    assert browser.text("#tree-note").startswith("suffix: 2 of 5 kept · 25% of all guesses")
    # Node 1's child stands behind it: the tree is drawn by depth.
    cx = "Array.from(document.querySelectorAll('#tree circle'), c => Number(c.getAttribute('cx')))"
    first, second, twin, other, third, root = browser.evaluate(cx)
    assert root < first == other < second == twin < third
    assert not browser.complaints()


def test_tenants_their_deadlines_and_why_one_waits_are_shown(
    browser: Browser, stand_in: StandIn
) -> None:
    browser.open(stand_in.url)
    browser.wait("document.querySelector('#state').dataset.state === 'ok'")
    assert browser.evaluate("document.querySelector('#tenants').hidden")
    used = {"prompt_tokens": 10, "generated_tokens": 5, "deadlines_met": 0, "deadlines_missed": 0}
    stand_in.state.usage = [
        used | {"tenant": "<b>ann", "key": "a", "step_s": 1.0, "deadlines_met": 3},
        used | {"tenant": "bob", "key": "b", "step_s": 2.0},
        used | {"tenant": "<b>ann", "key": "c", "step_s": 5.0, "deadlines_missed": 1},
    ]
    stand_in.state.waiting_for = "no pages"
    browser.wait("document.querySelectorAll('#tenant-list li').length === 2")
    rows = "Array.from(document.querySelectorAll('#tenant-list li'), r => r.textContent)"
    assert browser.evaluate(rows) == ["<b>ann75% · deadlines 3 met, 1 missed", "bob25%"]
    said = "document.querySelector('#queue-more').innerText"
    browser.wait(f"{said}.includes('waiting: no pages')")
    assert not browser.complaints()
