//! The server: what it answers, what it refuses, and that many at once get what each gets alone.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::engine::{Workshop, flap};
use crate::common::program::{program, run_with_input, stderr};
use flapjack::chat::ChatTemplate;
use flapjack::engine::Engine;
use flapjack::generate::SamplerConfig;
use flapjack::prune::sparse::Sparsity;
use flapjack::serve::{ServeError, ServeModel, ServeOptions, Server};

/// A server of the small model at a port that is free.
pub struct Served {
    server: Option<Server>,
    pub address: SocketAddr,
    _workshop: Workshop,
}

pub fn options() -> ServeOptions {
    ServeOptions {
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        grace: Duration::from_secs(1),
        ..ServeOptions::default()
    }
}

pub fn serve(options: ServeOptions) -> Served {
    let workshop = Workshop::new();
    let engine = workshop.open();
    serve_engine(workshop, engine, options)
}

pub fn serve_engine(workshop: Workshop, mut engine: Engine, options: ServeOptions) -> Served {
    engine.set_chat_template(ChatTemplate::builtin("chatml").unwrap());
    serve_as_it_is(workshop, engine, options)
}

/// With the chat template that the engine has, if any.
fn serve_as_it_is(workshop: Workshop, engine: Engine, options: ServeOptions) -> Served {
    serve_sampling(workshop, engine, options, SamplerConfig::greedy())
}

/// With settings for requests that have none of their own.
fn serve_sampling(
    workshop: Workshop,
    engine: Engine,
    options: ServeOptions,
    sampling: SamplerConfig,
) -> Served {
    let model = ServeModel {
        name: "tiny".to_owned(),
        engine,
        system: None,
        sampling,
    };
    let server = Server::start(vec![model], options).expect("the server starts");
    Served {
        address: server.address(),
        server: Some(server),
        _workshop: workshop,
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.server.take().expect("it stops once").stop();
    }
}

/// An answer: status, headers, body.
pub struct Answer {
    pub status: u16,
    pub headers: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    fn error(&self) -> String {
        let json = self.json();
        let message = json["error"]["message"].as_str();
        message
            .unwrap_or_else(|| panic!("no error: {}", self.body))
            .to_owned()
    }

    /// The events of a stream, without the last one that says that it has ended.
    pub fn events(&self) -> Vec<Value> {
        let data = self
            .body
            .lines()
            .filter_map(|line| line.strip_prefix("data: "));
        let mut events: Vec<&str> = data.collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{}", self.body);
        events
            .into_iter()
            .map(|text| serde_json::from_str(text).unwrap())
            .collect()
    }
}

impl Served {
    fn send(&self, request: &str) -> BufReader<TcpStream> {
        send_to(self.address, request)
    }

    fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        ask_at(self.address, method, path, headers, body)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "", "")
    }

    pub fn post(&self, path: &str, body: Value) -> Answer {
        self.ask(
            "POST",
            path,
            "Content-Type: application/json\r\n",
            &body.to_string(),
        )
    }
}

fn send_to(address: SocketAddr, request: &str) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    BufReader::new(stream)
}

pub fn ask_at(address: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> Answer {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    read(send_to(address, &request))
}

/// Reads an answer to its end, chunked or not.
fn read(mut stream: BufReader<TcpStream>) -> Answer {
    let mut headers = String::new();
    while !headers.ends_with("\r\n\r\n") {
        assert!(
            stream.read_line(&mut headers).unwrap() > 0,
            "an answer: {headers}"
        );
    }
    let status = headers.split(' ').nth(1).unwrap().parse().unwrap();
    let mut body = Vec::new();
    if headers
        .to_ascii_lowercase()
        .contains("transfer-encoding: chunked")
    {
        loop {
            let mut size = String::new();
            stream.read_line(&mut size).unwrap();
            let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
            if size == 0 {
                break;
            }
            let mut chunk = vec![0; size + 2];
            stream.read_exact(&mut chunk).unwrap();
            body.extend_from_slice(&chunk[..size]);
        }
    } else {
        stream.read_to_end(&mut body).unwrap();
    }
    Answer {
        status,
        headers,
        body: String::from_utf8(body).unwrap(),
    }
}

fn chat(text: &str, tokens: usize) -> Value {
    json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": tokens, "ignore_eos": true })
}

fn content(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["choices"][0]["message"]["content"]
        .as_str()
        .unwrap()
        .to_owned()
}

// ---- OpenAI's interface ----

#[test]
fn a_chat_is_answered() {
    let served = serve(options());
    let answer = served.post("/v1/chat/completions", chat("Hello", 12));
    let json = answer.json();
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(json["model"], "tiny");
    assert_eq!(json["choices"][0]["message"]["role"], "assistant");
    assert_eq!(json["choices"][0]["finish_reason"], "length");
    assert_eq!(json["usage"]["completion_tokens"], 12);
    let usage = &json["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        usage["prompt_tokens"].as_u64().unwrap() + 12
    );
}

#[test]
fn a_stream_says_the_same_as_the_whole_answer() {
    let served = serve(options());
    let whole = content(&served.post("/v1/chat/completions", chat("Hello", 24)));
    let mut request = chat("Hello", 24);
    request["stream"] = json!(true);
    request["stream_options"] = json!({ "include_usage": true });
    let answer = served.post("/v1/chat/completions", request);
    assert!(
        answer.headers.contains("text/event-stream"),
        "{}",
        answer.headers
    );
    let events = answer.events();
    let pieces = events
        .iter()
        .filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
    assert_eq!(pieces.collect::<String>(), whole);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let reasons: Vec<&str> = events
        .iter()
        .filter_map(|e| e["choices"][0]["finish_reason"].as_str())
        .collect();
    assert_eq!(reasons, ["length"]);
    let usage = &events.last().unwrap()["usage"];
    assert_eq!(usage["completion_tokens"], 24);
    assert!(
        events.last().unwrap()["choices"]
            .as_array()
            .unwrap()
            .is_empty()
    );
}

#[test]
fn several_answers_to_one_prompt_have_seeds_of_their_own() {
    let served = serve(options());
    let mut request = chat("Hello", 16);
    request["n"] = json!(3);
    request["temperature"] = json!(1.5);
    request["seed"] = json!(7);
    let first = served.post("/v1/chat/completions", request.clone()).json();
    let texts = |json: &Value| -> Vec<String> {
        let choices = json["choices"].as_array().unwrap();
        choices
            .iter()
            .map(|c| c["message"]["content"].as_str().unwrap().to_owned())
            .collect()
    };
    let (texts_of_first, again) = (
        texts(&first),
        texts(&served.post("/v1/chat/completions", request).json()),
    );
    assert_eq!(texts_of_first.len(), 3);
    assert_eq!(
        texts_of_first, again,
        "the same seed gives the same answers"
    );
    assert!(texts_of_first[0] != texts_of_first[1] && texts_of_first[1] != texts_of_first[2]);
    assert_eq!(first["usage"]["completion_tokens"], 48);
}

#[test]
fn a_stop_text_ends_an_answer_and_is_not_part_of_it() {
    let served = serve(options());
    let whole = content(&served.post("/v1/chat/completions", chat("Hello", 40)));
    let stop: String = whole.chars().skip(6).take(3).collect();
    let mut request = chat("Hello", 40);
    request["stop"] = json!(stop);
    let answer = served.post("/v1/chat/completions", request);
    assert_eq!(content(&answer), whole[..whole.find(&stop).unwrap()]);
    assert_eq!(answer.json()["choices"][0]["finish_reason"], "stop");
}

/// The server's penalties are for its temperature, as those of the configuration file are for `run`.
#[test]
fn who_asks_for_temperature_0_gets_the_most_likely_tokens() {
    let ask = |served: &Served, sampling: Value| {
        let mut request = json!({ "prompt": "Once upon", "max_tokens": 48, "ignore_eos": true });
        let fields = request.as_object_mut().unwrap();
        fields.extend(sampling.as_object().unwrap().clone());
        let answer = served.post("/v1/completions", request);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["choices"][0]["text"].clone()
    };
    let greedy = serve(options());
    let workshop = Workshop::new();
    let engine = workshop.open();
    let penalty = SamplerConfig {
        temperature: 0.8,
        repetition_penalty: 8.0,
        ..SamplerConfig::default()
    };
    let penalised = serve_sampling(workshop, engine, options(), penalty);
    let expected = ask(&greedy, json!({}));
    assert_eq!(ask(&penalised, json!({ "temperature": 0 })), expected);
    // What a request asks for itself counts.
    let asked = json!({ "temperature": 0, "repeat_penalty": 8 });
    assert_eq!(ask(&penalised, asked.clone()), ask(&greedy, asked.clone()));
    assert_ne!(ask(&greedy, asked), expected);
}

#[test]
fn completions_take_texts_and_tokens_in_lists() {
    let served = serve(options());
    let ask = |prompt: Value| {
        let request = json!({ "prompt": prompt, "max_tokens": 8, "ignore_eos": true });
        let answer = served.post("/v1/completions", request);
        assert_eq!(answer.status, 200, "{}", answer.body);
        let json = answer.json();
        let choices = json["choices"].as_array().unwrap().clone();
        let index = |c: &Value| c["index"].as_u64().unwrap();
        assert!(
            choices
                .iter()
                .enumerate()
                .all(|(i, c)| index(c) == i as u64)
        );
        choices
            .iter()
            .map(|c| c["text"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let tokens = |text: &str| {
        let answer = served.post("/tokenize", json!({ "prompt": text }));
        answer.json()["tokens"].clone()
    };
    let one = ask(json!("Once upon"));
    assert_eq!(ask(json!(tokens("Once upon"))), one);
    let two = ask(json!(["Once upon", "a time"]));
    assert_eq!(two[0], one[0]);
    assert_eq!(ask(json!([tokens("Once upon"), tokens("a time")])), two);
}

#[test]
fn echoed_prompts_tell_what_each_token_is_worth() {
    let served = serve(options());
    let request = json!({
        "prompt": "Once upon a time", "max_tokens": 1, "echo": true, "logprobs": 2, "ignore_eos": true,
    });
    let json = served.post("/v1/completions", request).json();
    let choice = &json["choices"][0];
    let logprobs = &choice["logprobs"];
    let prompt = json["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(
            logprobs[list].as_array().unwrap().len(),
            prompt + 1,
            "{list}"
        );
    }
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    for i in 1..=prompt {
        let own = logprobs["token_logprobs"][i].as_f64().unwrap();
        let top = logprobs["top_logprobs"][i].as_object().unwrap();
        assert!(own <= 0.0);
        let best = top
            .values()
            .map(|v| v.as_f64().unwrap())
            .fold(f64::MIN, f64::max);
        assert!(own <= best + 1e-6);
    }
    // The generated token is the likeliest, as the temperature is 0.
    let last = logprobs["token_logprobs"][prompt].as_f64().unwrap();
    let top = logprobs["top_logprobs"][prompt].as_object().unwrap();
    assert!(top.values().all(|v| v.as_f64().unwrap() <= last + 1e-6));
    assert!(
        choice["text"]
            .as_str()
            .unwrap()
            .starts_with("Once upon a time")
    );
}

#[test]
fn an_answer_follows_a_schema() {
    let served = serve(options());
    let mut request = chat("Hello", 200);
    request["ignore_eos"] = json!(false);
    request["temperature"] = json!(1.0);
    request["response_format"] = json!({ "type": "json_schema", "json_schema": { "schema": {
        "type": "object",
        "properties": { "colour": { "enum": ["red", "green"] }, "count": { "type": "integer", "minimum": 0, "maximum": 9 } },
        "required": ["colour", "count"],
        "additionalProperties": false,
    } } });
    for seed in 0..4 {
        request["seed"] = json!(seed);
        let text = content(&served.post("/v1/chat/completions", request.clone()));
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(["red", "green"].contains(&value["colour"].as_str().unwrap()));
        assert!(value["count"].as_u64().unwrap() <= 9);
    }
    request["response_format"] =
        json!({ "type": "json_schema", "json_schema": { "schema": { "type": 7 } } });
    let refused = served.post("/v1/chat/completions", request);
    assert_eq!(refused.status, 400, "{}", refused.body);
}

#[test]
fn embeddings_have_length_1_and_tell_texts_apart() {
    let served = serve(options());
    let answer = served.post(
        "/v1/embeddings",
        json!({ "input": ["one text", "another", "one text"] }),
    );
    assert_eq!(answer.status, 200, "{}", answer.body);
    let json = answer.json();
    let vector = |i: usize| -> Vec<f64> {
        let list = json["data"][i]["embedding"].as_array().unwrap();
        list.iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let length = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    assert!((length(&vector(0)) - 1.0).abs() < 1e-4);
    assert_eq!(vector(0), vector(2));
    assert_ne!(vector(0), vector(1));
    let coded = served.post(
        "/v1/embeddings",
        json!({ "input": "one text", "encoding_format": "base64" }),
    );
    let text = coded.json()["data"][0]["embedding"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(text.len(), (vector(0).len() * 4).div_ceil(3) * 4);
}

// ---- what is refused ----

#[test]
fn bad_requests_get_errors_in_openais_form() {
    let served = serve(options());
    let cases = [
        (json!({ "messages": [] }), "messages"),
        (
            json!({ "messages": [{ "role": "user", "content": "x" }], "temperature": -1 }),
            "temperature",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": "x" }], "n": 1000 }),
            "n must",
        ),
        (json!({ "messages": "x" }), "the body"),
        (
            json!({ "messages": [{ "role": "user", "content": "x" }], "tool_choice": "required" }),
            "tool",
        ),
    ];
    for (body, words) in cases {
        let answer = served.post("/v1/chat/completions", body.clone());
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
        assert!(answer.error().contains(words), "{body}: {}", answer.body);
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
    let rubbish = served.ask("POST", "/v1/chat/completions", "", "{\"messages\": [");
    assert_eq!(rubbish.status, 400, "{}", rubbish.body);
    assert!(rubbish.error().contains("line 1"), "{}", rubbish.body);
    assert_eq!(served.get("/nowhere").status, 404);
    assert_eq!(served.get("/v1/chat/completions").status, 405);
}

#[test]
fn a_prompt_beyond_the_context_is_refused_by_name() {
    let served = serve(ServeOptions {
        context: Some(64),
        ..options()
    });
    let answer = served.post("/v1/chat/completions", chat(&"long ".repeat(100), 8));
    assert_eq!(answer.status, 400);
    assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
}

#[test]
fn a_body_beyond_the_limit_is_refused() {
    let served = serve(ServeOptions {
        body_bytes: 1000,
        ..options()
    });
    let answer = served.post("/v1/chat/completions", chat(&"x".repeat(2000), 8));
    assert_eq!(answer.status, 413, "{}", answer.body);
}

#[test]
fn a_key_is_wanted_where_one_is_set() {
    let served = serve(ServeOptions {
        api_key: Some("secret".to_owned()),
        ..options()
    });
    assert_eq!(served.get("/v1/models").status, 401);
    let with = |key: &str| {
        served.ask(
            "GET",
            "/v1/models",
            &format!("Authorization: Bearer {key}\r\n"),
            "",
        )
    };
    assert_eq!(with("guess").status, 401);
    assert_eq!(with("secret").status, 200);
    // Whoever watches the server need not have it.
    assert_eq!(served.get("/health").status, 200);
}

#[test]
fn an_empty_key_is_none_and_the_server_does_not_start() {
    for key in ["", "  "] {
        let workshop = Workshop::new();
        let model = ServeModel {
            name: "tiny".to_owned(),
            engine: workshop.open(),
            system: None,
            sampling: SamplerConfig::greedy(),
        };
        let options = ServeOptions {
            api_key: Some(key.to_owned()),
            ..options()
        };
        let error = Server::start(vec![model], options).unwrap_err();
        assert!(matches!(error, ServeError::EmptyKey), "{error}");

        let output = workshop.flapjack(&["serve", "--port", "0", "--api-key", key]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.contains("--api-key") && said.contains("it is empty"),
            "{said}"
        );
        let mut command = program();
        command
            .args(["serve", "--port", "0", "-m"])
            .arg(&workshop.model);
        command.env("FLAPJACK_API_KEY", key);
        let said = stderr(&run_with_input(command, b""));
        assert!(said.contains("it is empty"), "{said}");
    }
}

#[test]
fn pages_of_other_origins_are_refused_unless_they_are_let_in() {
    let from = |served: &Served, origin: &str| {
        let origin = format!("Origin: {origin}\r\n");
        served
            .ask(
                "POST",
                "/v1/completions",
                &origin,
                "{\"prompt\": \"x\", \"max_tokens\": 1}",
            )
            .status
    };
    let served = serve(options());
    assert_eq!(from(&served, "https://example.org"), 403);
    assert_eq!(from(&served, &format!("http://{}", served.address)), 200);
    let open = serve(ServeOptions {
        cors: true,
        ..options()
    });
    assert_eq!(from(&open, "https://example.org"), 200);
}

#[test]
fn what_finds_no_place_is_told_to_come_back() {
    let served = serve(ServeOptions {
        parallel: 1,
        queue: 0,
        ..options()
    });
    let long =
        json!({ "prompt": "x", "max_tokens": 400, "ignore_eos": true, "stream": true }).to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n{long}",
        served.address,
        long.len()
    );
    let mut first = served.send(&request);
    let mut line = String::new();
    first.read_line(&mut line).unwrap();
    let refused = served.post("/v1/completions", json!({ "prompt": "x", "max_tokens": 1 }));
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(
        refused
            .headers
            .to_ascii_lowercase()
            .contains("retry-after:"),
        "{}",
        refused.headers
    );
    // The client leaves, and its place is free.
    drop(first);
    let begin = Instant::now();
    loop {
        let again = served.post("/v1/completions", json!({ "prompt": "x", "max_tokens": 1 }));
        if again.status == 200 {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{}", again.body);
        std::thread::sleep(Duration::from_millis(5));
    }
}

// ---- many at once ----

#[test]
fn many_at_once_get_what_each_gets_alone() {
    let served = serve(options());
    let prompts: Vec<String> = (0..8)
        .map(|i| format!("{} number {i}", "A story ".repeat(i * 6)))
        .collect();
    let ask = |prompt: &str| {
        let request = json!({ "prompt": prompt, "max_tokens": 40, "ignore_eos": true });
        let answer = served.post("/v1/completions", request);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["choices"][0]["text"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let alone: Vec<String> = prompts.iter().map(|prompt| ask(prompt)).collect();
    let together: Vec<String> = std::thread::scope(|scope| {
        let asked: Vec<_> = prompts
            .iter()
            .map(|prompt| scope.spawn(|| ask(prompt)))
            .collect();
        asked
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(together, alone);
}

#[test]
fn a_prompt_with_several_answers_is_read_once() {
    let counted = |served: &Served| -> usize {
        let text = served.get("/metrics").body;
        let mut lines = text.lines();
        let line = lines.find_map(|line| line.strip_prefix("flapjack_prompt_tokens_total "));
        line.expect("it is counted").parse().unwrap()
    };
    let served = serve(options());
    // Not in whole blocks of the KV cache, so that each answer reads a little of it.
    let mut request = json!({ "prompt": "x".repeat(300), "max_tokens": 4, "ignore_eos": true });
    served.post("/v1/completions", request.clone());
    let alone = counted(&served);
    assert!(alone >= 300, "{alone}");

    let served = serve(options());
    request["n"] = json!(4);
    let answer = served.post("/v1/completions", request).json();
    assert_eq!(answer["choices"].as_array().unwrap().len(), 4);
    let together = counted(&served);
    let block = flapjack::kernels::KV_BLOCK;
    assert!(
        together <= alone + 3 * block,
        "{together} tokens for {alone}"
    );
}

#[test]
fn what_a_chat_has_said_is_not_read_again() {
    let served = serve(options());
    let long = "A long beginning that both have in common. ".repeat(8);
    let first = served
        .post(
            "/v1/completions",
            json!({ "prompt": long, "max_tokens": 1 }),
        )
        .json();
    let second = served
        .post(
            "/v1/completions",
            json!({ "prompt": format!("{long} And more."), "max_tokens": 1 }),
        )
        .json();
    let read = |json: &Value| json["timings"]["prompt_n"].as_u64().unwrap();
    assert!(read(&first) > 128, "{first}");
    assert!(
        read(&second) < read(&first) / 2,
        "{} of {}",
        read(&second),
        read(&first)
    );
}

// ---- pruning ----

#[test]
fn a_model_that_runs_is_pruned_only_where_that_is_allowed() {
    let served = serve(options());
    assert_eq!(served.post("/prune", json!({ "ratio": 0.3 })).status, 403);
    let served = serve(ServeOptions {
        pruning: Some(flap()),
        ..options()
    });
    assert_eq!(served.post("/prune", json!({ "ratio": 1.5 })).status, 400);
    let bytes = |answer: &Answer| answer.json()["bytes"].as_u64().unwrap();
    let dense = served.get("/v1/models").json()["data"][0]["meta"]["bytes"]
        .as_u64()
        .unwrap();
    let pruned = served.post("/prune", json!({ "ratio": 0.3 }));
    assert_eq!(pruned.status, 200, "{}", pruned.body);
    assert!(bytes(&pruned) < dense);
    let more = served.post("/prune", json!({ "ratio": 0.5 }));
    assert!(bytes(&more) < bytes(&pruned), "{}", more.body);
    let back = served.post("/prune", json!({ "ratio": 0.0 }));
    assert_eq!(bytes(&back), dense);
    assert!(served.get("/prune").json()["models"][0]["pruned"].is_null());
}

#[test]
fn a_request_says_which_single_weights_go() {
    let mut base = flap();
    base.sparse = Some("magnitude:0.3".parse::<Sparsity>().unwrap().into());
    let served = serve(ServeOptions {
        pruning: Some(base),
        ..options()
    });
    let pruned = |body: Value| {
        let answer = served.post("/prune", body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["pruned"].clone()
    };
    let gone = |report: &Value| {
        let share = report["sparse"]["removed"].as_f64().unwrap();
        (share * 100.0).round()
    };
    // Alone, or with heads and channels.
    let report = pruned(json!({ "sparse": "wanda:0.5" }));
    assert_eq!(
        (gone(&report), report["removed"].as_f64()),
        (50.0, Some(0.0))
    );
    assert_eq!(report["sparse"]["sparsity"], "wanda:0.5");
    let report = pruned(json!({ "ratio": 0.3, "sparse": "magnitude:2:4" }));
    assert!(gone(&report) == 50.0 && report["removed"].as_f64() > Some(0.0));
    // Without the field as the server was started, and none by null.
    let report = pruned(json!({ "ratio": 0.3 }));
    assert_eq!(
        (gone(&report), &report["sparse"]["allocate"]),
        (30.0, &json!("even"))
    );
    assert!(pruned(json!({ "ratio": 0.3, "sparse": null }))["sparse"].is_null());
    let report = pruned(json!({ "ratio": 0.3, "allocate": "curves" }));
    assert_eq!(report["sparse"]["allocate"], "curves");
    let report = pruned(json!({ "ratio": 0, "sparse": "wanda:0.4", "allocate": "curves" }));
    assert_eq!(report["sparse"]["allocate"], "curves");

    // What makes no sense is refused by name, and the model stays as it is.
    let before = served.get("/prune").json()["models"][0]["pruned"].clone();
    for (body, field, words) in [
        (
            json!({ "sparse": "wanda" }),
            "sparse",
            "needs a share or N:M",
        ),
        (
            json!({ "sparse": "magic:0.5" }),
            "sparse",
            "wanda, magnitude, sparsegpt",
        ),
        (
            json!({ "sparse": "wanda:2:7" }),
            "sparse",
            "groups of 7 columns",
        ),
        (
            json!({ "sparse": "wanda:1.5" }),
            "sparse",
            "above 0 and below 1",
        ),
        (
            json!({ "ratio": 0.2, "sparse": "wanda:0.5", "allocate": "fair" }),
            "allocate",
            "even, curves",
        ),
        (
            json!({ "sparse": "wanda:2:4", "allocate": "curves" }),
            "allocate",
            "of every group",
        ),
        (
            json!({ "ratio": 0.2, "sparse": null, "allocate": "even" }),
            "allocate",
            "no single weights",
        ),
        (
            json!({ "ratio": 0, "allocate": "even" }),
            "allocate",
            "no single weights",
        ),
        (json!({ "sparse": null }), "ratio", "there must be a ratio"),
        (json!({}), "ratio", "there must be a ratio"),
        (
            json!({ "ratio": 0.95, "sparse": "wanda:0.5" }),
            "ratio",
            "below 0.9",
        ),
    ] {
        let answer = served.post("/prune", body.clone());
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!(error["param"], field, "{body}: {}", answer.body);
        assert!(answer.error().contains(words), "{body}: {}", answer.body);
    }
    let wrong = served.post("/prune", json!({ "sparse": 7 }));
    assert_eq!(wrong.status, 400, "{}", wrong.body);
    assert_eq!(served.get("/prune").json()["models"][0]["pruned"], before);
    let back = served.post("/prune", json!({ "ratio": 0 }));
    assert!(back.json()["pruned"].is_null(), "{}", back.body);
}

#[test]
fn answers_under_way_go_on_with_the_pruned_model() {
    let served = serve(ServeOptions {
        pruning: Some(flap()),
        ..options()
    });
    let answer = std::thread::scope(|scope| {
        let request =
            json!({ "prompt": "Once", "max_tokens": 300, "ignore_eos": true, "stream": true });
        let asked = scope.spawn(|| served.post("/v1/completions", request));
        std::thread::sleep(Duration::from_millis(30));
        let pruned = served.post("/prune", json!({ "ratio": 0.3 }));
        assert_eq!(pruned.status, 200, "{}", pruned.body);
        asked.join().unwrap()
    });
    let events = answer.events();
    let reason = events
        .iter()
        .find_map(|e| e["choices"][0]["finish_reason"].as_str());
    assert_eq!(reason, Some("length"), "{}", answer.body);
}

// ---- other interfaces ----

#[test]
fn text_goes_to_tokens_and_back() {
    let served = serve(options());
    let tokens = served
        .post("/tokenize", json!({ "content": "Hello, world" }))
        .json()["tokens"]
        .clone();
    let text = served
        .post("/detokenize", json!({ "tokens": tokens }))
        .json();
    assert_eq!(text["content"], "Hello, world");
    let shown = served.post("/apply-template", chat("Hi", 1)).json();
    let prompt = shown["prompt"].as_str().unwrap();
    assert!(
        prompt.contains("<|im_start|>user\nHi<|im_end|>"),
        "{prompt}"
    );
}

#[test]
fn clients_of_ollama_get_lines_of_json() {
    let served = serve(options());
    let body = json!({
        "model": "tiny", "messages": [{ "role": "user", "content": "Hello" }], "options": { "num_predict": 8, "temperature": 0 },
    });
    let answer = served.post("/api/chat", body.clone());
    let lines: Vec<Value> = answer
        .body
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let text: String = lines
        .iter()
        .filter_map(|l| l["message"]["content"].as_str())
        .collect();
    assert_eq!(lines.last().unwrap()["done"], true);
    assert!(lines.last().unwrap()["eval_count"].as_u64().unwrap() <= 8);
    let mut whole = body;
    whole["stream"] = json!(false);
    let whole = served.post("/api/chat", whole).json();
    assert_eq!(whole["message"]["content"], text.as_str());
    assert_eq!(served.get("/api/tags").json()["models"][0]["name"], "tiny");
    let wrong = served.post("/api/chat", json!({ "messages": 7 }));
    assert!(wrong.json()["error"].is_string(), "{}", wrong.body);
}

#[test]
fn clients_of_ollama_are_told_of_tools_where_the_template_has_them() {
    let shown = |template: Option<ChatTemplate>| {
        let workshop = Workshop::new();
        let mut engine = workshop.open();
        if let Some(template) = template {
            engine.set_chat_template(template);
        }
        let served = serve_as_it_is(workshop, engine, options());
        served.post("/api/show", json!({ "model": "tiny" })).json()["capabilities"].clone()
    };
    let with_tools = json!(["completion", "tools"]);
    assert_eq!(
        shown(Some(ChatTemplate::builtin("chatml").unwrap())),
        with_tools
    );
    // It names them, and does nothing with them.
    let without = "{# tools #}{% for m in messages %}{{ m.content }}<tool_call>{% endfor %}";
    for template in [Some(ChatTemplate::new(without).unwrap()), None] {
        assert_eq!(shown(template), json!(["completion"]));
    }
    // One template of several is enough.
    let own = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}<tool_call>{% endfor %}";
    let named = [("default", without), ("tool_use", own)];
    let named = named.map(|(name, source)| (name.to_owned(), source.to_owned()));
    assert_eq!(shown(Some(ChatTemplate::named(named).unwrap())), with_tools);
}

#[test]
fn counts_are_told_for_prometheus() {
    let served = serve(options());
    content(&served.post("/v1/chat/completions", chat("Hello", 5)));
    let metrics = served.get("/metrics").body;
    assert!(
        metrics.contains("flapjack_generated_tokens_total 5"),
        "{metrics}"
    );
    assert!(
        metrics.contains("flapjack_requests_total{path=\"/v1/chat/completions\",status=\"200\"} 1"),
        "{metrics}"
    );
}

#[test]
fn the_page_is_there_and_may_load_nothing_from_elsewhere() {
    let served = serve(options());
    let page = served.get("/");
    assert_eq!(page.status, 200);
    assert!(
        page.headers
            .to_ascii_lowercase()
            .contains("content-security-policy: default-src 'none'")
    );
    for file in ["style.css", "page.js", "markdown.js"] {
        assert!(
            page.body.contains(file) || served.get("/page/page.js").body.contains(file),
            "{file}"
        );
        assert_eq!(served.get(&format!("/page/{file}")).status, 200, "{file}");
    }
    assert!(
        !page.body.contains("http://") || page.body.contains("http://www.w3.org"),
        "no other addresses"
    );
}
