//! The server under clients that come and go, for minutes: no answer is wrong, and no memory is lost.
//!
//! It takes long, so that it runs only when it is asked for: `FLAPJACK_SOAK=600 cargo test --test spec -- --ignored soak`.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{Random, default_model};

const CLIENTS: usize = 8;
const TOKENS: usize = 24;
const PROMPTS: [&str; 6] = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a line about the sea.",
    "Count to five.",
    "Who wrote Hamlet?",
    "What do cows eat?",
];

/// The program as a server, which ends with this.
struct Program {
    child: Child,
    address: SocketAddr,
}

impl Program {
    fn start() -> Self {
        default_model();
        let arguments = ["serve", "--port", "0", "--parallel", "4", "--temp", "0"];
        let mut child = Command::new(env!("CARGO_BIN_EXE_flapjack"))
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        let address = loop {
            let line = lines.next().expect("it says where it listens").unwrap();
            if let Some((_, rest)) = line.split_once("http://") {
                let end = rest.find([';', '/', ' ']).unwrap_or(rest.len());
                break rest[..end].parse().expect("an address");
            }
        };
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    /// Bytes that are in memory for it: all, and those that are not pages of a file.
    fn memory(&self) -> (u64, u64) {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).expect("it runs");
        let line = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let digits = line.expect("it is told").trim().split(' ').next();
            digits.unwrap().parse::<u64>().unwrap() * 1024
        };
        (line("VmRSS:"), line("RssAnon:"))
    }

    fn send(&self, request: &str) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(self.address).expect("a connection");
        let time = Some(Duration::from_secs(60));
        stream.set_read_timeout(time).unwrap();
        // What it refuses it may close before all of it is read.
        let _ = stream.write_all(request.as_bytes());
        BufReader::new(stream)
    }

    fn post(&self, path: &str, body: &str) -> BufReader<TcpStream> {
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        ))
    }

    /// The answer to a chat; `None` where there was no place for it.
    fn chat(&self, prompt: &str) -> Option<String> {
        let mut text = String::new();
        let asked = self.post("/v1/chat/completions", &chat(prompt, false).to_string());
        { asked }.read_to_string(&mut text).expect("an answer");
        let (head, body) = text.split_once("\r\n\r\n").expect("headers");
        if head.starts_with("HTTP/1.1 429") {
            return None;
        }
        assert!(head.starts_with("HTTP/1.1 200"), "{text}");
        let json: Value = serde_json::from_str(body).expect("JSON");
        let content = &json["choices"][0]["message"]["content"];
        Some(content.as_str().expect("a text").to_owned())
    }

    /// The same as a stream, of which so many events are taken; all of them, if there are fewer.
    fn stream(&self, prompt: &str, events: usize) -> (String, bool) {
        let asked = self.post("/v1/chat/completions", &chat(prompt, true).to_string());
        let (mut text, mut taken) = (String::new(), 0);
        for line in asked.lines() {
            let line = line.expect("UTF-8");
            let Some(data) = line.strip_prefix("data: ") else {
                continue;
            };
            if data == "[DONE]" {
                return (text, true);
            }
            let json: Value = serde_json::from_str(data).expect("JSON");
            let content = &json["choices"][0]["delta"]["content"];
            text += content.as_str().unwrap_or_default();
            taken += 1;
            if taken == events {
                break;
            }
        }
        (text, false)
    }

    fn rubbish(&self, random: &mut Random) {
        let mut text = String::new();
        let kind = random.below(6);
        let asked = match kind {
            0 => self.post("/v1/chat/completions", "{\"messages\": [{\"role\": "),
            1 => self.post("/v1/chat/completions", "{\"messages\": 7}"),
            2 => self.post("/v1/completions", "{\"prompt\": [99999999]}"),
            3 => self.post("/nowhere", "{}"),
            4 => {
                let long = "word ".repeat(20_000);
                self.post("/v1/completions", &json!({ "prompt": long }).to_string())
            }
            _ => self.send("\u{1}\u{2} rubbish\r\n\r\n"),
        };
        // Some do not even wait for what is said to it.
        if random.below(2) == 0 {
            let _ = { asked }.read_to_string(&mut text);
            let refused = text.starts_with("HTTP/1.1 4");
            assert!(refused || kind > 3, "rubbish {kind} got {text}");
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn chat(prompt: &str, stream: bool) -> Value {
    json!({
        "messages": [{ "role": "user", "content": prompt }],
        "max_tokens": TOKENS,
        "stream": stream,
    })
}

#[test]
#[ignore = "takes as many seconds as FLAPJACK_SOAK says, or 60"]
fn soak() {
    let seconds = std::env::var("FLAPJACK_SOAK").ok();
    let seconds = seconds.map_or(60, |text| text.parse().expect("FLAPJACK_SOAK in seconds"));
    let program = Program::start();
    let alone: HashMap<&str, String> = PROMPTS
        .iter()
        .map(|prompt| (*prompt, program.chat(prompt).expect("there is a place")))
        .collect();
    let (program, alone) = (&program, &alone);
    let (end, answers) = (&AtomicBool::new(false), &AtomicUsize::new(0));
    let mut levels = Vec::new();
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                let mut random = Random::new(client as u64 + 1);
                while !end.load(Ordering::Relaxed) {
                    let prompt = PROMPTS[random.below(PROMPTS.len())];
                    match random.below(4) {
                        0 => {
                            if let Some(text) = program.chat(prompt) {
                                assert_eq!(text, alone[prompt]);
                            }
                        }
                        1 => {
                            let (text, whole) = program.stream(prompt, usize::MAX);
                            assert!(whole && text == alone[prompt], "{text:?}");
                        }
                        2 => {
                            let (text, _) = program.stream(prompt, 1 + random.below(8));
                            assert!(alone[prompt].starts_with(&text), "{text:?}");
                        }
                        _ => program.rubbish(&mut random),
                    }
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let begin = Instant::now();
        while begin.elapsed().as_secs() < seconds {
            std::thread::sleep(Duration::from_secs(1));
            let (all, own) = program.memory();
            levels.push(all);
            if levels.len() % 60 == 0 {
                println!(
                    "{:4} s: {} requests, {:.1} MB, {:.1} MB of them not pages of a file",
                    levels.len(),
                    answers.load(Ordering::Relaxed),
                    all as f64 / 1e6,
                    own as f64 / 1e6,
                );
            }
        }
        end.store(true, Ordering::Relaxed);
    });
    let level = |of: &[u64]| of.iter().sum::<u64>() as f64 / of.len() as f64;
    let after_a_minute = level(&levels[levels.len().min(60) * 5 / 6..][..levels.len().min(60) / 6]);
    let last = level(&levels[levels.len() - levels.len().min(60) / 6..]);
    println!(
        "{} requests in {seconds} s; {:.1} MB after a minute, {:.1} MB in the end, {:.1} MB at most",
        answers.load(Ordering::Relaxed),
        after_a_minute / 1e6,
        last / 1e6,
        *levels.iter().max().unwrap() as f64 / 1e6,
    );
    assert!(
        last <= after_a_minute * 1.05,
        "memory grew from {after_a_minute} to {last} bytes"
    );
    // It still answers, and nothing is left of those that have gone.
    for prompt in PROMPTS {
        assert_eq!(program.chat(prompt).as_ref(), Some(&alone[prompt]));
    }
}
