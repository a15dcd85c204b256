//! How the server does with many clients: tokens per second of eight at once against one alone, and how long running answers wait
//! while a long prompt is read.
//!
//! `cargo bench --bench serve` takes the default model, or the one that `FLAPJACK_BENCH_MODEL` names. With a filter for other
//! benchmarks it does nothing.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use flapjack::engine::{self, Engine, OpenOptions};
use flapjack::eval::median;
use flapjack::generate::SamplerConfig;
use flapjack::serve::{ServeModel, ServeOptions, Server};
use serde_json::{Value, json};

const CLIENTS: usize = 8;
const TOKENS: usize = 128;
/// Tokens of the long prompt, about.
const LONG: usize = 4000;
const TURNS: usize = 5;

fn main() {
    let mut filters = std::env::args().skip(1);
    if filters.any(|argument| !argument.starts_with('-') && !"serve".contains(&argument)) {
        return;
    }
    let model = std::env::var_os("FLAPJACK_BENCH_MODEL").map_or_else(
        || engine::default_model(&mut engine::ignore).expect("the default model can be had"),
        Into::into,
    );
    let engine = Engine::open(&model, OpenOptions::default()).expect("a model");
    let context = engine.model().config.context_length;
    let model = ServeModel {
        name: "model".to_owned(),
        engine,
        system: None,
        sampling: SamplerConfig::greedy(),
    };
    let options = ServeOptions {
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        parallel: CLIENTS,
        ..ServeOptions::default()
    };
    let server = Server::start(vec![model], options).expect("the server starts");
    let address = server.address();
    throughput(address);
    if context > LONG + TOKENS {
        gaps(address);
    } else {
        println!("the model was trained for {context} tokens, too few for a prompt of {LONG}");
    }
    server.stop();
}

/// One client and eight of them, in turns.
fn throughput(address: SocketAddr) {
    let speed = |clients: usize, turn: usize| {
        let begin = Instant::now();
        let answers: Vec<String> = std::thread::scope(|scope| {
            let asked: Vec<_> = (0..clients)
                .map(|client| scope.spawn(move || answer(address, client, turn)))
                .collect();
            let joined = asked.into_iter().map(|thread| thread.join());
            joined.map(|text| text.expect("an answer")).collect()
        });
        let speed = (clients * TOKENS) as f64 / begin.elapsed().as_secs_f64();
        (speed, answers)
    };
    speed(1, TURNS);
    let (mut one, mut many, mut ratios, mut equal) = (Vec::new(), Vec::new(), Vec::new(), true);
    for turn in 0..TURNS {
        let (alone, first) = speed(1, turn);
        let (together, all) = speed(CLIENTS, turn);
        equal &= first[0] == all[0];
        one.push(alone);
        many.push(together);
        ratios.push(together / alone);
    }
    // Every answer of the last turn, alone.
    let (_, all) = speed(CLIENTS, TURNS);
    for (client, text) in all.iter().enumerate() {
        equal &= *text == answer(address, client, TURNS);
    }
    println!(
        "answers of {TOKENS} tokens: one client {:.1} tokens/s, {CLIENTS} clients {:.1} tokens/s, {:.2} times as much (medians of {TURNS}); answers {}",
        median(&one),
        median(&many),
        median(&ratios),
        if equal {
            "are equal to those alone"
        } else {
            "DIFFER from those alone"
        }
    );
}

fn answer(address: SocketAddr, client: usize, turn: usize) -> String {
    let prompt = format!("Story {client} of day {turn}. Once upon a time");
    let request = json!({ "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": true });
    let mut stream = send(address, &request);
    let mut body = String::new();
    while !body.ends_with("\r\n\r\n") {
        assert!(stream.read_line(&mut body).expect("headers") > 0);
    }
    body.clear();
    std::io::Read::read_to_string(&mut stream, &mut body).expect("a body");
    let json: Value = serde_json::from_str(&body).expect("JSON");
    json["choices"][0]["text"]
        .as_str()
        .expect("a text")
        .to_owned()
}

/// The times between tokens of an answer: alone, and at the same depths while a long prompt is read.
fn gaps(address: SocketAddr) {
    let (mut worst, mut late) = (Vec::new(), Vec::new());
    for turn in 0..TURNS {
        // A beginning of its own, so that nothing of it is there already.
        let words = format!("{turn} ") + &"one two three four five ".repeat(LONG / 5);
        let (mut beside, took) = Running::start(address).until_read(address, words);
        let mut alone = Running::start(address).next(beside.len());
        // The first wait is for the prompt, and some of it is the other one's.
        alone.drain(..SKIPPED);
        beside.drain(..SKIPPED);
        let step = median(&alone);
        let [alone_longest, longest] = [&alone, &beside].map(|gaps| share(gaps, 1.0));
        let [alone_late, slow] = [&alone, &beside].map(|gaps| share(gaps, 0.99));
        println!(
            "a prompt of about {LONG} tokens read in {took:.2} s beside {} tokens of an answer: step alone {:.1} ms (longest {:.1}, 99 of 100 below {:.1}), beside it {:.1} ms (longest {:.1}, 99 of 100 below {:.1})",
            beside.len(),
            step * 1e3,
            alone_longest * 1e3,
            alone_late * 1e3,
            median(&beside) * 1e3,
            longest * 1e3,
            slow * 1e3,
        );
        worst.push(longest / step);
        late.push(slow / step);
    }
    println!(
        "longest gap {:.2} steps, 99 of 100 below {:.2} (medians of {TURNS})",
        median(&worst),
        median(&late),
    );
}

/// Tokens of an answer that are not looked at: until the prompt has arrived.
const SKIPPED: usize = 20;

/// The value below which this share of them lies.
fn share(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

/// An answer that streams.
struct Running {
    lines: std::io::Lines<BufReader<TcpStream>>,
    times: Vec<Instant>,
}

impl Running {
    fn start(address: SocketAddr) -> Self {
        let request = json!({
            "prompt": "Once upon a time", "max_tokens": 7000, "ignore_eos": true, "stream": true
        });
        let (lines, times) = (send(address, &request).lines(), Vec::new());
        Self { lines, times }
    }

    fn token(&mut self) {
        loop {
            let line = self.lines.next().expect("a line").expect("UTF-8");
            assert!(line != "data: [DONE]", "the answer was too short");
            if line.starts_with("data: ") {
                self.times.push(Instant::now());
                return;
            }
        }
    }

    /// The times between its next tokens.
    fn next(mut self, count: usize) -> Vec<f64> {
        (0..=count).for_each(|_| self.token());
        intervals(&self.times)
    }

    /// The times between its tokens until another request's prompt is read, and the seconds that this takes.
    fn until_read(mut self, address: SocketAddr, prompt: String) -> (Vec<f64>, f64) {
        (0..SKIPPED).for_each(|_| self.token());
        let reading = std::thread::spawn(move || {
            let request = json!({ "prompt": prompt, "max_tokens": 1 });
            let begin = Instant::now();
            let mut stream = send(address, &request);
            let mut body = String::new();
            std::io::Read::read_to_string(&mut stream, &mut body).expect("an answer");
            assert!(body.starts_with("HTTP/1.1 200"), "{body}");
            begin.elapsed().as_secs_f64()
        });
        while !reading.is_finished() {
            self.token();
        }
        let took = reading.join().expect("it was read");
        (intervals(&self.times), took)
    }
}

fn intervals(times: &[Instant]) -> Vec<f64> {
    let pairs = times.windows(2);
    pairs
        .map(|pair| (pair[1] - pair[0]).as_secs_f64())
        .collect()
}

fn send(address: SocketAddr, request: &Value) -> BufReader<TcpStream> {
    let body = request.to_string();
    let mut stream = TcpStream::connect(address).expect("a connection");
    let time = Some(Duration::from_secs(120));
    stream.set_read_timeout(time).expect("a time limit");
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).expect("it is sent");
    stream.write_all(body.as_bytes()).expect("it is sent");
    BufReader::new(stream)
}
