//! Clients that people have, against the program as they start it: the packages of OpenAI and Ollama, lm-eval, and curl. `.ci/clients`
//! installs the packages; without them those tests are skipped.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use serde_json::Value;

use flapjack::engine::{Engine, OpenOptions};
use flapjack::generate::{Generated, Generation, Request, SamplerConfig, Sequence};

use crate::common::program::stdout;
use crate::common::python::{python, run};
use crate::common::{default_model, skip};

/// `flapjack serve` at a port that is free.
struct Serve {
    child: Child,
    /// Where it is, as `http://127.0.0.1:PORT`.
    base: String,
    /// What it says is read no further, but may be said.
    _errors: BufReader<ChildStderr>,
}

impl Serve {
    /// The default model with these arguments.
    fn start(arguments: &[&str]) -> Self {
        default_model();
        let mut child = Command::new(env!("CARGO_BIN_EXE_flapjack"))
            .args(["serve", "--port", "0"])
            .args(arguments)
            .env_remove("FLAPJACK_API_KEY")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("flapjack starts");
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        let base = loop {
            let end = said.len();
            let read = errors.read_line(&mut said).unwrap();
            assert!(read > 0, "it does not serve: {said}");
            if let Some((_, address)) = said[end..].split_once("serving at ") {
                break address.split(';').next().unwrap().to_owned();
            }
        };
        Self {
            child,
            base,
            _errors: errors,
        }
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_openai_package_gets_what_it_expects() {
    if python().is_some() {
        // A template that knows tools, which that of the model does not.
        let serve = Serve::start(&["--chat-template", "chatml"]);
        run("openai_client.py", &[&serve.base]);
    }
}

#[test]
fn the_openai_package_raises_its_own_errors() {
    if python().is_some() {
        let serve = Serve::start(&["--api-key", "secret", "--parallel", "1", "--queue", "0"]);
        run("openai_client.py", &[&serve.base, "refused"]);
    }
}

#[test]
fn the_package_of_ollama_gets_what_it_expects() {
    if python().is_some() {
        run("ollama_client.py", &[&Serve::start(&[]).base]);
    }
}

// ---- lm-eval ----

/// The engine itself, beside the server.
struct Own {
    engine: Engine,
}

impl Own {
    fn open() -> Self {
        let options = OpenOptions {
            threads: Some(1),
            ..OpenOptions::default()
        };
        let engine = Engine::open(default_model(), options).unwrap();
        Self { engine }
    }

    fn tokens(&self, text: &str) -> Vec<u32> {
        let tokenizer = self.engine.tokenizer().unwrap();
        tokenizer.encode_special(text, None).unwrap()
    }

    fn generate(&self, request: &Request) -> (String, Generated) {
        let mut sequence: Sequence = self.engine.sequence();
        let (model, runtime) = (self.engine.model(), self.engine.runtime());
        let tokenizer = self.engine.tokenizer().unwrap();
        let mut generation =
            Generation::new(model, runtime, tokenizer, &mut sequence, request).unwrap();
        let text = (&mut generation).map(|piece| piece.unwrap()).collect();
        (text, generation.generated().unwrap().clone())
    }

    /// How likely tokens are behind others, and whether each is the likeliest in its place.
    fn log_likelihood(&self, context: &[u32], rest: &[u32]) -> (f64, bool) {
        let request = Request {
            prompt: [context, rest].concat(),
            max_tokens: 1,
            prompt_logprobs: Some(1),
            sampler: SamplerConfig::greedy(),
            ..Request::default()
        };
        let (_, generated) = self.generate(&request);
        let scored = &generated.prompt_logprobs[context.len() - 1..];
        assert_eq!(scored.len(), rest.len());
        let sum = scored.iter().map(|s| f64::from(s.logprob)).sum();
        (sum, scored.iter().all(|s| s.top[0].0 == s.token))
    }
}

/// What lm-eval has asked for in a task, and got.
struct Asked {
    arguments: Vec<String>,
    got: Value,
}

fn asked(run: &Value, task: &str) -> Vec<Asked> {
    let samples = run["samples"][task].as_array().unwrap();
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let of = |sample: &Value| {
        let all = sample[0].as_array().unwrap().clone();
        let got = sample[1].as_array().unwrap().clone();
        let one = move |(arguments, got): (Value, Value)| Asked {
            arguments: arguments.as_array().unwrap().iter().map(text).collect(),
            got: got[0].clone(),
        };
        all.into_iter().zip(got).map(one).collect::<Vec<_>>()
    };
    samples.iter().flat_map(of).collect()
}

/// Log-likelihoods are the engine's own, whichever way lm-eval asks: for tokens, several at once or side by side, for text, or as of
/// llama.cpp's Python server, which tells where tokens begin.
#[test]
fn lm_eval_measures_what_the_engine_does() {
    if python().is_none() {
        return;
    }
    let serve = Serve::start(&[]);
    let printed = run("lm_eval_client.py", &[&serve.base]).unwrap();
    drop(serve);
    let told: Value = serde_json::from_str(printed.lines().last().unwrap()).unwrap();
    let runs = &told["runs"];
    let own = Own::open();

    let mut known: BTreeMap<Vec<String>, (f64, bool)> = BTreeMap::new();
    let mut endings = 0;
    for title in ["tokens", "batches", "side by side", "texts", "gguf"] {
        let asked = asked(&runs[title], "capitals");
        assert_eq!(asked.len(), 12, "{title}");
        for Asked { arguments, got } in asked {
            let (likely, greedy) = *known.entry(arguments.clone()).or_insert_with(|| {
                let (context, rest) = (&arguments[0], &arguments[1]);
                let whole = own.tokens(&format!("{context}{rest}"));
                let context = own.tokens(context).len();
                let next = own.generate(&Request {
                    max_tokens: 1,
                    sampler: SamplerConfig::greedy(),
                    ..Request::new(whole.clone())
                });
                endings += usize::from(next.1.tokens.is_empty());
                own.log_likelihood(&whole[..context], &whole[context..])
            });
            let found = got[0].as_f64().unwrap();
            assert!(
                (found - likely).abs() < 1e-3,
                "{title}, {arguments:?}: {found} and not {likely}"
            );
            // As of llama.cpp's server, the generated token counts too, which is always the likeliest.
            assert_eq!(got[1], greedy, "{title}, {arguments:?}");
        }
        let accuracy = runs[title]["results"]["capitals"]["acc,none"].as_f64();
        assert_eq!(
            accuracy,
            runs["tokens"]["results"]["capitals"]["acc,none"].as_f64()
        );
    }
    assert!(
        endings > 0,
        "behind some choice the model ends the text, which must not cost the last token its place"
    );

    let bos = own.engine.tokenizer().unwrap().bos().unwrap();
    for title in ["tokens", "texts"] {
        let asked = asked(&runs[title], "prose");
        assert_eq!(asked.len(), 2, "{title}");
        for Asked { arguments, got } in asked {
            let (likely, _) = own.log_likelihood(&[bos], &own.tokens(&arguments[0]));
            let found = got.as_f64().unwrap();
            assert!(
                (found - likely).abs() < 1e-3,
                "{title}, {arguments:?}: {found} and not {likely}"
            );
        }
    }

    for title in ["answers", "gguf"] {
        for Asked { arguments, got } in asked(&runs[title], "riddles") {
            let (text, _) = own.generate(&Request {
                max_tokens: if title == "gguf" { 16 } else { 40 },
                sampler: SamplerConfig::greedy(),
                stop: vec!["\n\n".to_owned()],
                ..Request::new(own.tokens(&arguments[0]))
            });
            let found = got.as_str().unwrap();
            assert_eq!(found.trim(), text.trim(), "{title}, {arguments:?}");
        }
    }
    let chats = asked(&runs["chats"], "riddles");
    assert_eq!(chats.len(), 2);
    assert!(
        chats[0].got.as_str().unwrap().contains("Paris"),
        "{}",
        chats[0].got
    );
}

// ---- curl ----

fn curl(arguments: &[&str]) -> Command {
    let mut command = Command::new("curl");
    command
        .args(["-sS", "--noproxy", "*", "--max-time", "120"])
        .args(arguments)
        .stdin(Stdio::null());
    command
}

fn has_curl() -> bool {
    let found = curl(&["--version"]).stdout(Stdio::null()).status().is_ok();
    if !found {
        skip("there is no curl");
    }
    found
}

#[test]
fn curl_sees_an_answer_while_it_is_made() {
    if !has_curl() {
        return;
    }
    let serve = Serve::start(&[]);
    let body =
        r#"{"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": true, "stream": true}"#;
    let address = format!("{}/v1/completions", serve.base);
    let mut child = curl(&["-N", "-d", body, &address])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut first = String::new();
    lines.read_line(&mut first).unwrap();
    assert!(first.starts_with("data: {"), "{first}");
    assert!(
        child.try_wait().unwrap().is_none(),
        "the rest is still to come"
    );
    let mut rest = String::new();
    lines.read_to_string(&mut rest).unwrap();
    assert!(rest.trim_end().ends_with("data: [DONE]"), "{rest}");
    assert!(rest.matches("data: {").count() > 200, "{rest}");
    assert!(child.wait().unwrap().success());
}

#[test]
fn curl_is_told_what_is_wrong() {
    if !has_curl() {
        return;
    }
    let ask = |serve: &Serve, arguments: &[&str], path: &str| {
        let address = format!("{}{path}", serve.base);
        let all = [arguments, &["-w", "\n%{http_code}", &address]].concat();
        let output: Output = curl(&all).output().unwrap();
        let printed = stdout(&output);
        let (body, status) = printed.rsplit_once('\n').unwrap();
        (status.parse::<u16>().unwrap(), body.to_owned())
    };
    let serve = Serve::start(&[]);
    let (status, body) = ask(&serve, &["-d", "{\"messages\": ["], "/v1/chat/completions");
    assert_eq!(status, 400, "{body}");
    let error: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(error["error"]["type"], "invalid_request_error");
    // What curl sends by itself is no JSON by its content type, and is taken all the same.
    let chat = r#"{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}"#;
    assert_eq!(ask(&serve, &["-d", chat], "/v1/chat/completions").0, 200);
    assert_eq!(ask(&serve, &[], "/health").0, 200);
    for path in ["/health", "/", "/v1/models", "/api/tags"] {
        let (status, head) = ask(&serve, &["-I"], path);
        assert_eq!(status, 200, "{path}: {head}");
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    }
    let (status, head) = ask(&serve, &["-i", "-X", "OPTIONS"], "/v1/chat/completions");
    assert_eq!(status, 405, "{head}");
    assert!(head.to_ascii_lowercase().contains("allow: post"), "{head}");
    assert_eq!(ask(&serve, &[], "/v1/nothing").0, 404);
    let (status, body) = ask(&serve, &["-X", "DELETE"], "/api/delete");
    assert_eq!(status, 404);
    let error: Value = serde_json::from_str(&body).unwrap();
    assert!(error["error"].is_string(), "in Ollama's form: {body}");

    // What browsers ask before they let a page of another origin in.
    let open = Serve::start(&["--cors"]);
    let (status, head) = ask(
        &open,
        &[
            "-i",
            "-X",
            "OPTIONS",
            "-H",
            "Origin: https://example.org",
            "-H",
            "Access-Control-Request-Method: POST",
            "-H",
            "Access-Control-Request-Headers: authorization,content-type",
        ],
        "/v1/chat/completions",
    );
    assert_eq!(status, 200, "{head}");
    assert!(
        head.to_ascii_lowercase()
            .contains("access-control-allow-origin: *"),
        "{head}"
    );
}
