//! A real browser without a window: Chromium, driven by chromedriver as the WebDriver standard has it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long a page may take for anything.
const PATIENCE: Duration = Duration::from_secs(90);

/// Keys, as WebDriver calls them.
pub const ENTER: char = '\u{E007}';
pub const TAB: char = '\u{E004}';
pub const ESCAPE: char = '\u{E00C}';
pub const RIGHT: char = '\u{E014}';
pub const SHIFT: char = '\u{E008}';

pub struct Browser {
    driver: Child,
    /// What it says is read no further, but may be said.
    _lines: BufReader<ChildStdout>,
    port: u16,
    session: String,
}

impl Browser {
    /// A window of its own; `None`, after noting a skip, where there is no Chromium.
    ///
    /// # Panics
    /// On a machine that checks commits: `.ci/setup checks` installs it there.
    pub fn start() -> Option<Self> {
        // A port that the system gives out may be taken by another before it is used.
        let started = (0..5).find_map(|_| start_driver());
        let (driver, lines, port) = match started {
            Some(started) => started,
            None => {
                let why = "there is no chromedriver; .ci/setup checks installs it";
                assert!(std::env::var_os("CI").is_none(), "{why}");
                super::skip(why);
                return None;
            }
        };
        let mut browser = Self {
            driver,
            _lines: lines,
            port,
            session: String::new(),
        };
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "goog:loggingPrefs": { "browser": "ALL" },
            "goog:chromeOptions": { "args": [
                "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--window-size=1200,800",
            ] },
        } } });
        let made = browser.command("POST", "/session", &wanted);
        browser.session = made["sessionId"].as_str().unwrap().to_owned();
        Some(browser)
    }

    fn command(&self, method: &str, path: &str, body: &Value) -> Value {
        let (status, answer) =
            exchange(self.port, method, path, body).expect("chromedriver answers");
        assert_eq!(status, 200, "{method} {path}: {answer}");
        answer["value"].clone()
    }

    fn of_session(&self, method: &str, path: &str, body: &Value) -> Value {
        let path = format!("/session/{}{path}", self.session);
        self.command(method, &path, body)
    }

    pub fn open(&self, address: &str) {
        self.of_session("POST", "/url", &json!({ "url": address }));
    }

    /// Runs the body of a function in the page, and returns what it returns; a promise is waited for.
    pub fn script(&self, code: &str) -> Value {
        self.script_with(code, json!([]))
    }

    /// The same with `arguments`.
    pub fn script_with(&self, code: &str, arguments: Value) -> Value {
        let body = json!({ "script": code, "args": arguments });
        self.of_session("POST", "/execute/sync", &body)
    }

    /// Waits until an expression in the page is true, and returns it.
    pub fn wait(&self, expression: &str) -> Value {
        let begin = Instant::now();
        loop {
            let found = self.script(&format!("return {expression}"));
            let no = [json!(null), json!(false), json!(""), json!(0)];
            if !no.contains(&found) {
                return found;
            }
            if begin.elapsed() > PATIENCE {
                let text = self.script("return document.body.innerText");
                panic!("{expression} never becomes true; the page has: {text}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn find(&self, selector: &str) -> String {
        let by = json!({ "using": "css selector", "value": selector });
        let found = self.of_session("POST", "/element", &by);
        let (_, id) = found.as_object().unwrap().iter().next().unwrap();
        id.as_str().unwrap().to_owned()
    }

    /// Clicks where the element is, as a hand would: one that is hidden or covered is an error.
    pub fn click(&self, selector: &str) {
        let path = format!("/element/{}/click", self.find(selector));
        self.of_session("POST", &path, &json!({}));
    }

    /// Types into an element.
    pub fn write(&self, selector: &str, text: &str) {
        let path = format!("/element/{}/value", self.find(selector));
        self.of_session("POST", &path, &json!({ "text": text }));
    }

    /// Presses a key, wherever the focus is.
    pub fn press(&self, key: char) {
        self.press_with(&[], key);
    }

    /// Presses a key while others are held.
    pub fn press_with(&self, held: &[char], key: char) {
        let step = |kind: &str, key: char| json!({ "type": kind, "value": key.to_string() });
        let down = held.iter().map(|key| step("keyDown", *key));
        let up = held.iter().map(|key| step("keyUp", *key));
        let hit = [step("keyDown", key), step("keyUp", key)];
        let actions: Vec<Value> = down.chain(hit).chain(up).collect();
        let body = json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": actions }] });
        self.of_session("POST", "/actions", &body);
    }

    /// A command of Chromium's own protocol.
    pub fn devtools(&self, command: &str, parameters: Value) -> Value {
        let body = json!({ "cmd": command, "params": parameters });
        self.of_session("POST", "/goog/cdp/execute", &body)
    }

    /// Makes the window so large, as that of a phone or of a desk.
    pub fn resize(&self, width: u32, height: u32, phone: bool) {
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone });
        self.devtools("Emulation.setDeviceMetricsOverride", size);
    }

    /// Has the reader prefer `light` or `dark`.
    pub fn prefer(&self, scheme: &str) {
        let feature = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.devtools("Emulation.setEmulatedMedia", feature);
    }

    /// What the page and the browser have written to the console since the last time, from warnings on.
    pub fn complaints(&self) -> Vec<String> {
        let entries = self.of_session("POST", "/se/log", &json!({ "type": "browser" }));
        let entries = entries.as_array().unwrap().iter();
        entries
            .filter(|entry| entry["level"] == "SEVERE" || entry["level"] == "WARNING")
            .map(|entry| entry["message"].as_str().unwrap_or_default().to_owned())
            .collect()
    }

    /// The window as a PNG.
    pub fn picture(&self) -> Vec<u8> {
        use base64::Engine;
        let coded = self.of_session("GET", "/screenshot", &Value::Null);
        let coded = coded.as_str().unwrap();
        base64::prelude::BASE64_STANDARD.decode(coded).unwrap()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Chromium ends with its session.
        let path = format!("/session/{}", self.session);
        let _ = exchange(self.port, "DELETE", &path, &Value::Null);
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// chromedriver at a port that it chooses; `None` if it is not there, or does not get that port.
fn start_driver() -> Option<(Child, BufReader<ChildStdout>, u16)> {
    let mut driver = Command::new("chromedriver")
        .arg("--port=0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut lines = BufReader::new(driver.stdout.take()?);
    let mut line = String::new();
    while lines.read_line(&mut line).is_ok_and(|read| read > 0) {
        if let Some((_, port)) = line.split_once("successfully on port ") {
            let port = port.trim().trim_end_matches('.').parse().ok()?;
            return Some((driver, lines, port));
        }
        line.clear();
    }
    let _ = driver.wait();
    None
}

/// Asks chromedriver, and returns its status and its JSON.
fn exchange(port: u16, method: &str, path: &str, body: &Value) -> std::io::Result<(u16, Value)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut stream = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    while !head.ends_with("\r\n\r\n") {
        let end = head.len();
        if stream.read_line(&mut head)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let line = head[end..].to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let answer = serde_json::from_slice(&body)?;
    Ok((status.unwrap_or(0), answer))
}
