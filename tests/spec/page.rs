//! The page in a real browser: typed at, clicked on and looked at as people do.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::common::browser::{Browser, ENTER, ESCAPE, RIGHT, SHIFT, TAB};
use crate::common::default_model;
use crate::common::engine::{Workshop, flap};
use crate::serve::options;
use flapjack::chat::ChatTemplate;
use flapjack::engine::{Engine, OpenOptions, PruneOptions, Target, ignore};
use flapjack::generate::SamplerConfig;
use flapjack::hub::DEFAULT_SYSTEM;
use flapjack::serve::{ServeModel, ServeOptions, Server};

/// A server, and a browser with its page.
struct Page {
    browser: Browser,
    server: Option<Server>,
    base: String,
    _workshop: Option<Workshop>,
}

impl std::ops::Deref for Page {
    type Target = Browser;

    fn deref(&self) -> &Browser {
        &self.browser
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // The page is left first, so that nothing of it is under way.
        self.browser.open("about:blank");
        self.server.take().expect("it stops once").stop();
    }
}

fn model(name: &str, engine: Engine) -> ServeModel {
    ServeModel {
        name: name.to_owned(),
        engine,
        system: None,
        sampling: SamplerConfig::greedy(),
    }
}

/// The page of these models; `None` where there is no browser.
fn page(
    models: Vec<ServeModel>,
    options: ServeOptions,
    workshop: Option<Workshop>,
) -> Option<Page> {
    let browser = Browser::start()?;
    let server = Server::start(models, options).expect("the server starts");
    let base = format!("http://{}/", server.address());
    let page = Page {
        browser,
        server: Some(server),
        base,
        _workshop: workshop,
    };
    page.open();
    Some(page)
}

fn small(workshop: &Workshop, name: &str) -> ServeModel {
    let mut engine = workshop.open();
    engine.set_chat_template(ChatTemplate::builtin("chatml").unwrap());
    model(name, engine)
}

/// The page of the small model.
fn small_page(options: ServeOptions) -> Option<Page> {
    let workshop = Workshop::new();
    let models = vec![small(&workshop, "tiny")];
    page(models, options, Some(workshop))
}

/// The page of the small model beside itself.
fn comparing_page() -> Option<Page> {
    let workshop = Workshop::new();
    let models = vec![small(&workshop, "tiny"), small(&workshop, "tiny:dense")];
    let options = ServeOptions {
        pruning: Some(flap()),
        ..options()
    };
    page(models, options, Some(workshop))
}

/// The model that a user gets, as it is started by itself.
fn real() -> ServeModel {
    let engine = Engine::open(default_model(), OpenOptions::default()).unwrap();
    ServeModel {
        system: Some(DEFAULT_SYSTEM.to_owned()),
        ..model("SmolLM2-135M-Instruct", engine)
    }
}

fn real_page() -> Option<Page> {
    page(vec![real()], options(), None)
}

/// Notes what the page asks of the server from now on, in `asked`.
const LISTEN: &str = "window.asked = []; const real = window.fetch;
    window.fetch = (path, init) => { if (init?.body) asked.push([path, JSON.parse(init.body)]); return real(path, init); };";

/// Keeps in `begun` what there is of an answer when its figures first show beside it while the page is still busy.
const WATCH: &str = "window.begun = null; new MutationObserver(() => {
      const answer = document.querySelector('.answers:last-child .body')?.innerText ?? '';
      const figures = document.querySelector('.answers:last-child .figures')?.innerText ?? '';
      if (document.getElementById('send').hidden && answer.length > 10 && figures.includes('tokens/s')) window.begun ??= answer;
    }).observe(document.body, { childList: true, subtree: true, characterData: true });";

/// Has the page get this answer instead of the model's, in pieces of a few characters.
const PRETEND: &str = "const text = arguments[0]; const real = window.fetch;
    window.fetch = async (path, init) => {
      if (!String(path).includes('completions')) return real(path, init);
      const chunks = text.match(/[^]{1,7}/g).map((part) => ({ choices: [{ index: 0, delta: { content: part } }] }));
      chunks.push({ choices: [{ index: 0, delta: {}, finish_reason: 'stop' }], timings: { predicted_per_second: 12.34 } });
      chunks.push({ choices: [], usage: { completion_tokens: chunks.length - 1 } });
      const bytes = new TextEncoder().encode(chunks.map((chunk) => `data: ${JSON.stringify(chunk)}\\n\\n`).join('') + 'data: [DONE]\\n\\n');
      let at = 0;
      // Cut where it comes, in the middle of characters too.
      const body = new ReadableStream({ pull(to) { at < bytes.length ? to.enqueue(bytes.slice(at, at += 31)) : to.close(); } });
      return new Response(body, { headers: { 'Content-Type': 'text/event-stream' } });
    };";

const ANSWER: &str = "document.querySelector('.answers:last-child .body')?.innerText";
const FIGURES: &str = "document.querySelector('.answers:last-child .figures')?.innerText";
const BUSY: &str = "document.getElementById('send').hidden";
const IDLE: &str =
    "!document.getElementById('send').hidden && document.getElementById('stop').hidden";

impl Page {
    /// Opens it anew, and waits for what it has to load.
    fn open(&self) {
        self.browser.open(&self.base);
        self.wait("document.getElementById('model').textContent || document.getElementById('notice').textContent");
    }

    fn text(&self, expression: &str) -> String {
        let found = self.script(&format!("return {expression}"));
        found.as_str().unwrap_or_default().to_owned()
    }

    /// Writes a message and sends it by Enter.
    fn ask(&self, message: &str) {
        self.write("#prompt", message);
        self.press(ENTER);
    }

    fn ask_and_wait(&self, message: &str) {
        self.ask(message);
        self.wait(IDLE);
        self.wait("document.querySelector('.answers:last-child .again')");
    }

    /// The bodies of requests for answers since [`LISTEN`].
    fn asked(&self) -> Vec<Value> {
        let asked = self.script("return asked");
        let asked = asked.as_array().unwrap().iter();
        asked
            .filter(|a| a[0].as_str().unwrap().ends_with("completions"))
            .map(|a| a[1].clone())
            .collect()
    }

    fn must_be_content(&self) {
        let complaints = self.complaints();
        assert!(complaints.is_empty(), "{complaints:#?}");
    }
}

/// On its way there is some of the answer, how fast it comes, and a way to stop it.
#[test]
fn an_answer_is_seen_on_its_way() {
    let Some(page) = real_page() else { return };
    page.script(WATCH);
    // One that is over within a frame of the screen would not be seen.
    page.ask("Write a very long story about Paris.");
    page.wait("begun");
    let begun = page.text("begun");
    page.press(ESCAPE);
    page.wait(IDLE);
    let whole = page.text(ANSWER);
    assert!(whole.starts_with(&begun[..10]), "{begun}\n{whole}");
    assert!(whole.len() >= begun.len(), "{begun}\n{whole}");
    page.must_be_content();
}

#[test]
fn a_message_is_answered() {
    let Some(page) = real_page() else { return };
    page.script(LISTEN);
    page.write("#prompt", "What is the capital of France?");
    page.press_with(&[SHIFT], ENTER);
    page.write("#prompt", "Explain.");
    assert_eq!(
        page.script("return asked.length"),
        0,
        "Shift+Enter sends nothing"
    );
    page.press(ENTER);
    page.wait(IDLE);
    let whole = page.text(ANSWER);
    assert!(whole.contains("Paris"), "{whole}");
    let figures = page.wait(FIGURES);
    let figures = figures.as_str().unwrap();
    for words in ["tokens/s", " tokens ", "MB", "Regenerate"] {
        assert!(figures.contains(words), "{words}: {figures}");
    }
    assert_eq!(
        page.text("document.querySelector('.user').innerText"),
        "What is the capital of France?\nExplain."
    );
    assert_eq!(
        page.text("document.activeElement.id"),
        "prompt",
        "one can go on writing"
    );
    assert_eq!(
        page.text("document.getElementById('chat').ariaBusy"),
        "false"
    );

    // What was said goes along with what is said next.
    page.ask_and_wait("And of Italy?");
    let asked = page.asked();
    assert_eq!(asked.len(), 2);
    let messages = asked[1]["messages"].as_array().unwrap();
    let roles: Vec<&str> = messages
        .iter()
        .map(|m| m["role"].as_str().unwrap())
        .collect();
    assert_eq!(roles, ["user", "assistant", "user"]);
    assert!(messages[1]["content"].as_str().unwrap().contains("Paris"));

    // Regenerating asks the same again, and puts the answer in the place of the other.
    page.click(".again");
    page.wait("asked.length === 3");
    page.wait(IDLE);
    let asked = page.asked();
    assert_eq!(asked[2], asked[1]);
    assert_eq!(
        page.script("return document.querySelectorAll('.answer').length"),
        2
    );
    page.wait("document.querySelectorAll('.again').length === 1");

    page.click("#new-chat");
    assert_eq!(
        page.script("return document.querySelectorAll('.answer').length"),
        0
    );
    page.must_be_content();
}

#[test]
fn an_answer_is_stopped_by_a_click_and_by_escape() {
    let Some(page) = real_page() else { return };
    for by_key in [false, true] {
        // Behind an answer that was stopped the model might imitate it, and be as brief.
        page.click("#new-chat");
        page.ask("Write a very long story about a lighthouse.");
        page.wait(&format!("{BUSY} && {ANSWER}?.length > 20"));
        match by_key {
            true => page.press(ESCAPE),
            false => page.click("#stop"),
        }
        page.wait(IDLE);
        let stopped = page.text(ANSWER);
        assert!(stopped.len() > 20, "what there is stays");
        assert!(
            page.text(FIGURES).contains("stopped"),
            "{}",
            page.text(FIGURES)
        );
        assert_eq!(
            page.script("return document.querySelectorAll('.writing').length"),
            0
        );
        assert_eq!(page.text(ANSWER), stopped, "nothing comes behind it");
    }
    // Leaving a chat stops its answer too.
    page.click("#new-chat");
    page.ask("Write a very long story about a lighthouse.");
    page.wait(&format!("{BUSY} && {ANSWER}?.length > 20"));
    page.click("#new-chat");
    page.wait(IDLE);
    assert_eq!(
        page.script("return document.querySelectorAll('.turn').length"),
        0
    );
    page.must_be_content();
}

#[test]
fn settings_go_with_each_message_and_are_kept() {
    let Some(page) = small_page(options()) else {
        return;
    };
    page.script(LISTEN);
    page.ask_and_wait("plain");
    let plain = &page.asked()[0];
    assert_eq!(
        plain["messages"],
        json!([{ "role": "user", "content": "plain" }])
    );
    for field in [
        "temperature",
        "top_p",
        "min_p",
        "top_k",
        "max_tokens",
        "seed",
    ] {
        assert!(
            plain.get(field).is_none(),
            "{field} is the model's: {plain}"
        );
    }
    page.click("#open-settings");
    page.write("#system", "Be brief.");
    for (field, text) in [("#top-k", "7"), ("#max-tokens", "9"), ("#seed", "11")] {
        page.write(field, text);
    }
    page.script("document.getElementById('temperature').focus()");
    page.press(RIGHT);
    let temperature = page.text("document.querySelector('output[for=temperature]').textContent");
    // The small model talks until its context is full.
    page.click("#new-chat");
    page.ask_and_wait("changed");
    let changed = page.asked().pop().unwrap();
    assert_eq!(
        changed["messages"][0],
        json!({ "role": "system", "content": "Be brief." })
    );
    assert_eq!(
        changed["temperature"].to_string().parse::<f64>().unwrap(),
        temperature.parse::<f64>().unwrap()
    );
    assert_eq!(
        (&changed["top_k"], &changed["max_tokens"], &changed["seed"]),
        (&json!(7), &json!(9), &json!(11))
    );
    assert!(
        changed.get("top_p").is_none() && changed.get("min_p").is_none(),
        "{changed}"
    );

    // Whoever comes again finds them, and can go back to what the model recommends.
    page.open();
    assert_eq!(
        page.text("document.getElementById('system').value"),
        "Be brief."
    );
    assert_eq!(page.text("document.getElementById('seed').value"), "11");
    page.script(LISTEN);
    page.click("#open-settings");
    page.click("#reset-settings");
    page.ask_and_wait("back");
    let back = page.asked().pop().unwrap();
    assert!(
        back.get("temperature").is_none() && back.get("seed").is_none(),
        "{back}"
    );
    page.must_be_content();
}

/// An answer in Markdown, with what a page must not let through.
const MARKDOWN: &str = "## A heading\n\nSome **bold**, *slanted* and `code <b>` text, with <b>tags</b>.\n\n\
    - one\n- two\n  - inside\n\n3. three\n4. four\n\n```rust\nfn main() { println!(\"<i>\"); }\n```\n\n\
    | a | b |\n|---|---|\n| 1 | <script>window.bad = 1</script> |\n\n> quoted\n\n\
    <img src=x onerror=\"window.bad = 1\"> [good](https://example.org/) [bad](javascript:window.bad=1) – für 東京 🌋\n";

#[test]
fn markdown_is_shown_and_nothing_in_it_acts() {
    let Some(page) = small_page(options()) else {
        return;
    };
    page.script_with(PRETEND, json!([MARKDOWN]));
    let hostile = "<img src=x onerror='window.bad = 1'> **mine**";
    page.ask_and_wait(hostile);
    let count = |selector: &str| {
        let code = "return document.querySelectorAll(arguments[0]).length";
        page.script_with(code, json!([selector])).as_u64().unwrap()
    };
    for (selector, n) in [
        (".body h4", 1),
        (".body strong", 1),
        (".body em", 1),
        (".body p code", 1),
        (".body ul > li", 3),
        (".body ul ul > li", 1),
        (".body ol > li", 2),
        (".body pre code", 1),
        (".body td", 2),
        (".body blockquote", 1),
        (".body a", 1),
        ("main img", 0),
        ("main script", 0),
        ("main b", 0),
        ("main i", 0),
        (".user strong", 0),
    ] {
        assert_eq!(
            count(selector),
            n,
            "{selector}: {}",
            page.text("document.querySelector('.body').innerHTML")
        );
    }
    assert_eq!(
        page.script("return document.querySelector('.body ol').start"),
        3
    );
    assert_eq!(
        page.text("document.querySelector('.body a').href"),
        "https://example.org/"
    );
    let text = page.text(ANSWER);
    for words in [
        "<img src=x onerror=",
        "[bad](javascript:",
        "<script>window.bad",
        "<b>tags</b>",
        "für 東京 🌋",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert_eq!(
        page.text("document.querySelector('.user').innerText"),
        hostile
    );
    assert!(page.script("return window.bad ?? null").is_null());
    page.must_be_content();
}

/// What Markdown is not finished yet, as it comes, is shown without harm; text in which it only seems to be stays text.
#[test]
fn half_of_markdown_is_text() {
    let Some(page) = small_page(options()) else {
        return;
    };
    let code = "const { render } = await import('/page/markdown.js');
        const made = document.createElement('div');
        return arguments[0].map((text) => { render(made, text); return made.innerHTML; });";
    let async_code = format!(
        "return (async () => {{ {} }}).apply(null)",
        code.replace("arguments[0]", "texts")
    );
    let texts = json!([
        "```js\nlet a",
        "a * b * c",
        "snake_case_name",
        "**not yet",
        "| a | b |\n|--",
        "#no heading",
        "1. one\n\n   more",
        "a < b && c > d",
        "- a\n- b\n\ntext",
        "`<img src=x onerror=alert(1)>`",
        "",
        "\n\n",
    ]);
    let made = page.script_with(
        &format!("const texts = arguments[0]; {async_code}"),
        json!([texts]),
    );
    let made: Vec<&str> = made
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m.as_str().unwrap())
        .collect();
    let wanted = [
        "<pre><code data-language=\"js\">let a</code></pre>",
        "<p>a * b * c</p>",
        "<p>snake_case_name</p>",
        "<p>**not yet</p>",
        "<p>| a | b |\n|--</p>",
        "<p>#no heading</p>",
        "<ol start=\"1\"><li>one<p>more</p></li></ol>",
        "<p>a &lt; b &amp;&amp; c &gt; d</p>",
        "<ul><li>a</li><li>b</li></ul><p>text</p>",
        "<p><code>&lt;img src=x onerror=alert(1)&gt;</code></p>",
        "",
        "",
    ];
    assert_eq!(made, wanted);
    page.must_be_content();
}

#[test]
fn the_dense_and_the_pruned_model_answer_side_by_side() {
    let Some(page) = comparing_page() else { return };
    assert_eq!(
        page.script("return document.getElementById('kept-figure').hidden"),
        true
    );
    page.click("#open-settings");
    page.write("#max-tokens", "60");
    // The slider by keyboard, and the button.
    let prune = |steps: usize| {
        page.script("document.getElementById('ratio').focus()");
        for _ in 0..steps {
            page.press(RIGHT);
        }
        page.press(TAB);
        assert_eq!(page.text("document.activeElement.id"), "prune");
        page.press(ENTER);
        page.wait("!document.getElementById('prune').disabled && /^(done|dense)/.test(document.getElementById('prune-state').textContent)");
        page.wait("document.querySelectorAll('#kept rect.heads').length === 3");
    };
    let bytes = || {
        let code = "return [...document.querySelectorAll('.answers:last-child .figures')].map((f) => parseFloat(/([\\d.]+) kB/.exec(f.innerText)[1]))";
        let found = page.script(code);
        let found = found
            .as_array()
            .unwrap()
            .iter()
            .map(|b| b.as_f64().unwrap());
        found.collect::<Vec<f64>>()
    };
    let kept = || {
        let code = "return [...document.querySelectorAll('#kept rect.channels')].reduce((sum, r) => sum + Number(r.getAttribute('height')), 0)";
        page.script(code).as_f64().unwrap()
    };
    prune(6);
    assert_eq!(
        page.text("document.getElementById('ratio-text').textContent"),
        "30 %"
    );
    let caption = page.text("document.getElementById('kept-caption').textContent");
    assert!(
        caption.contains("of 12 heads") && caption.contains("of 384 channels"),
        "{caption}"
    );
    assert!(
        page.text("document.querySelector('#kept title').textContent")
            .contains("layer 0")
    );
    let first_kept = kept();
    page.ask_and_wait("Hello");
    assert_eq!(
        page.script("return document.querySelectorAll('.answer').length"),
        2
    );
    let code = "return [...document.querySelectorAll('.answer')].every((a) => /tokens\\/s/.test(a.querySelector('.figures').innerText))";
    assert_eq!(
        page.script(code),
        true,
        "{}",
        page.text("document.getElementById('chat').innerText")
    );
    let headings = page
        .text("[...document.querySelectorAll('.answer h2')].map((h) => h.innerText).join('; ')");
    assert!(
        headings.contains("tiny (pruned by") && headings.contains("tiny:dense (dense"),
        "{headings}"
    );
    let one = bytes();
    assert!(one[0] < one[1], "{one:?}");
    let code = "const [a, b] = [...document.querySelectorAll('.answer')].map((a) => a.getBoundingClientRect()); return a.top === b.top && a.right <= b.left";
    assert_eq!(page.script(code), true, "side by side");

    // Another ratio prunes anew, from the model as its file has it.
    prune(4);
    assert_eq!(
        page.text("document.getElementById('ratio-text').textContent"),
        "50 %"
    );
    assert!(kept() < first_kept);
    page.ask_and_wait("Hello");
    assert!(
        bytes()[0] < one[0] && bytes()[1] == one[1],
        "{one:?} {:?}",
        bytes()
    );
    page.must_be_content();
}

#[test]
fn a_key_is_asked_for_where_one_is_wanted() {
    let guarded = ServeOptions {
        api_key: Some("secret".to_owned()),
        ..options()
    };
    let Some(page) = small_page(guarded) else {
        return;
    };
    page.wait("!document.getElementById('key-label').hidden && document.getElementById('notice').textContent.includes('key')");
    assert_eq!(page.text("document.activeElement.id"), "key");
    page.write("#key", "secret");
    page.press(ENTER);
    page.wait("document.getElementById('model').textContent.includes('tiny')");
    page.wait("document.getElementById('notice').textContent === ''");
    page.ask_and_wait("Hello");
    // The browser itself notes requests that are refused; nothing else may be said.
    let complaints = page.complaints();
    assert!(
        complaints.iter().all(|c| c.contains("401")),
        "{complaints:?}"
    );
}

#[test]
fn all_can_be_done_by_keyboard() {
    let Some(page) = comparing_page() else { return };
    page.click("#open-settings");
    page.script_with(PRETEND, json!(["An [address](https://example.org/)."]));
    page.ask_and_wait("Hello");
    page.script("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')");
    let mut reached = Vec::new();
    for _ in 0..40 {
        page.press(TAB);
        let code = "const e = document.activeElement; return [e.id || e.className || e.tagName, getComputedStyle(e).outlineStyle, e === document.body]";
        let found = page.script(code);
        if found[2] == true {
            break;
        }
        assert_ne!(found[1], "none", "one sees where one is: {found}");
        reached.push(found[0].as_str().unwrap().to_owned());
    }
    let order: Vec<Option<usize>> = [
        "skip",
        "new-chat",
        "open-settings",
        "system",
        "temperature",
        "top-p",
        "min-p",
        "top-k",
        "max-tokens",
        "seed",
        "reset-settings",
        "ratio",
        "prune",
        "A",
        "again",
        "prompt",
        "send",
    ]
    .iter()
    .map(|id| reached.iter().position(|r| r == id))
    .collect();
    assert!(
        order.iter().all(Option::is_some) && order.is_sorted(),
        "{reached:?}"
    );
    // All that takes text or a number has a name.
    let code = "return [...document.querySelectorAll('button, input, textarea')].filter((e) => !(e.labels?.length || e.innerText || e.ariaLabel)).map((e) => e.id)";
    let nameless = page.script(code);
    let hidden: Vec<&str> = nameless
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .filter(|id| *id != "stop")
        .collect();
    assert!(hidden.is_empty(), "{hidden:?}");
    page.must_be_content();
}

/// Text whose contrast with what is behind it is below 4.5, as the guidelines for accessible pages ask.
const PALE: &str = "
    const parse = (colour) => { const p = colour.match(/[\\d.]+/g).map(Number); return { rgb: p.slice(0, 3), alpha: p[3] ?? 1 }; };
    const luminance = (rgb) => {
      const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
      for (let e = element; e; e = e.parentElement) {
        const { rgb, alpha } = parse(getComputedStyle(e).backgroundColor);
        if (alpha === 1) return rgb;
        if (alpha > 0) throw new Error('half transparent: ' + e.outerHTML);
      }
      return parse(getComputedStyle(document.documentElement).backgroundColor).rgb;
    };
    const pale = [];
    const check = (element, style, words) => {
      const [a, b] = [luminance(parse(style.color).rgb), luminance(ground(element))].sort((x, y) => y - x);
      const contrast = (a + 0.05) / (b + 0.05);
      if (contrast < 4.5) pale.push(`${element.tagName}#${element.id}.${element.className} ${words}: ${contrast.toFixed(2)}`);
    };
    let looked = 0;
    for (const element of document.querySelectorAll('body *')) {
      if (element.closest('svg') || element.disabled || !element.checkVisibility() || element.closest('script, noscript')) continue;
      const own = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join('');
      if (own) { looked += 1; check(element, getComputedStyle(element), own.slice(0, 20)); }
      if (element.placeholder) check(element, getComputedStyle(element, '::placeholder'), element.placeholder);
      if (element.value) check(element, getComputedStyle(element), element.value);
    }
    return { looked, pale, ground: parse(getComputedStyle(document.documentElement).backgroundColor).rgb };";

#[test]
fn it_can_be_read_on_a_phone_and_in_the_dark() {
    let Some(page) = comparing_page() else { return };
    let long = format!(
        "{MARKDOWN}\n{}\n\n```\n{}\n```\n",
        "endless".repeat(40),
        "code ".repeat(60)
    );
    page.script_with(PRETEND, json!([long]));
    page.ask_and_wait(&"unbroken".repeat(30));
    page.script(
        "document.getElementById('ratio').value = 0.3; document.getElementById('prune').click()",
    );
    page.wait("!document.getElementById('kept-figure').hidden");
    page.click("#open-settings");
    page.script("document.getElementById('notice').textContent = 'Something is wrong.'");
    for (width, height, phone) in [(1200, 800, false), (360, 740, true)] {
        page.resize(width, height, phone);
        let mut grounds = Vec::new();
        for scheme in ["light", "dark"] {
            page.prefer(scheme);
            let found = page.script(PALE);
            assert!(found["looked"].as_u64().unwrap() > 20, "{found}");
            assert_eq!(found["pale"], json!([]), "{scheme}, {width}");
            grounds.push(found["ground"][0].as_f64().unwrap());
            let size =
                page.script("const root = document.documentElement; return [root.scrollWidth - root.clientWidth, window.innerWidth]");
            assert_eq!(
                size,
                json!([0, width]),
                "nothing is cut off or to be scrolled for, {scheme}"
            );
        }
        assert!(grounds[0] > 200.0 && grounds[1] < 60.0, "{grounds:?}");
    }
    // On a phone one can hit what one means, and the message stays in sight.
    let code = "return [...document.querySelectorAll('button')].filter((b) => b.checkVisibility()).map((b) => [b.innerText, b.getBoundingClientRect().height]).filter(([, h]) => h < 24)";
    assert_eq!(page.script(code), json!([]), "large enough");
    page.click("#open-settings");
    page.script("document.documentElement.scrollTop = 0");
    let code = "const r = document.getElementById('prompt').getBoundingClientRect(); return r.top >= 0 && r.bottom <= innerHeight";
    assert_eq!(page.script(code), true);
    page.must_be_content();
}

// ---- pictures ----

/// Pictures for the documentation: `FLAPJACK_SCREENSHOTS=docs/images cargo test --test spec page:: -- --ignored`.
#[test]
#[ignore = "writes files"]
fn pictures_are_taken() {
    let folder =
        std::env::var_os("FLAPJACK_SCREENSHOTS").expect("FLAPJACK_SCREENSHOTS names a folder");
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder);
    std::fs::create_dir_all(&folder).unwrap();
    let save = |page: &Page, name: &str| {
        std::thread::sleep(std::time::Duration::from_millis(300));
        std::fs::write(folder.join(name), page.picture()).unwrap();
    };
    let chat = real_page().expect("a browser");
    chat.resize(960, 600, false);
    chat.prefer("light");
    chat.ask_and_wait("What is the capital of France?");
    chat.ask_and_wait("Name three things to see there, as a list.");
    save(&chat, "chat.png");
    chat.resize(360, 740, true);
    chat.prefer("dark");
    chat.script("document.documentElement.scrollTop = 1e6");
    save(&chat, "phone.png");
    drop(chat);

    let (mut pruned, mut dense) = (real(), real());
    dense.name += ":dense";
    let by = PruneOptions {
        target: Target::Ratio(0.2),
        ..PruneOptions::default()
    };
    pruned.engine.prune(&by, &mut ignore).unwrap();
    let served = ServeOptions {
        pruning: Some(by),
        ..options()
    };
    let both = page(vec![pruned, dense], served, None).expect("a browser");
    both.resize(1100, 640, false);
    both.prefer("dark");
    both.ask_and_wait("What is a pancake made of? Answer with a short list.");
    both.script("document.documentElement.scrollTop = 0; document.activeElement.blur()");
    save(&both, "compare.png");
}
