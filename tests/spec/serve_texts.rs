//! Texts and tokens of the server as clients count them: where tokens begin, what ends a text, and control tokens written out. Those
//! who measure by them must get every token in its place.

use serde_json::{Value, json};

use crate::common::default_model;
use crate::common::engine::Workshop;
use crate::serve::{Answer, Served, ask_at, options, serve};
use flapjack::engine::{Engine, OpenOptions};
use flapjack::generate::SamplerConfig;
use flapjack::serve::{ServeModel, ServeOptions, Server};

/// Tokens of the small model: `<s>` and `</s>` are these, and a byte b is b + 4.
const BOS: u64 = 1;
const EOS: u64 = 2;

fn ask(served: &Served, prompt: Value, more: Value) -> Value {
    let mut request = json!({ "prompt": prompt, "max_tokens": 1, "echo": true, "logprobs": 1 });
    let fields = request.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    let answer = served.post("/v1/completions", request);
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

fn list<'a>(answer: &'a Value, name: &str) -> &'a Vec<Value> {
    answer["choices"][0]["logprobs"][name].as_array().unwrap()
}

/// A bias by which the model ends its text.
fn ends() -> Value {
    json!({ "logit_bias": { "2": 1000 } })
}

#[test]
fn offsets_are_places_in_the_text_that_is_told() {
    let served = serve(options());
    let answer = ask(&served, json!("aé東b"), json!({ "ignore_eos": true }));
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(text.starts_with("aé東b"), "{text}");
    // The token that the model wants in front is none of the client's text; é has two bytes, 東 three, each a token.
    assert_eq!(
        json!(list(&answer, "text_offset")),
        json!([0, 0, 1, 1, 2, 2, 2, 3, 4])
    );
    assert_eq!(list(&answer, "tokens")[0], "<s>");
    assert_eq!(list(&answer, "tokens")[1], "a");

    // One that the client writes is.
    let answer = ask(&served, json!("<s>ab"), json!({ "ignore_eos": true }));
    assert_eq!(answer["usage"]["prompt_tokens"], 3);
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(text.starts_with("<s>ab"), "{text}");
    assert_eq!(json!(list(&answer, "text_offset")), json!([0, 3, 4, 5]));
    let same = ask(&served, json!([BOS, b'a' + 4, b'b' + 4]), json!({}));
    assert_eq!(
        list(&same, "text_offset")[..3],
        list(&answer, "text_offset")[..3]
    );
    assert_eq!(
        list(&same, "token_logprobs")[2],
        list(&answer, "token_logprobs")[2]
    );
}

/// lm-eval leaves out what was generated, which must be there even where it is the end.
#[test]
fn the_token_that_ends_a_text_has_its_place() {
    let served = serve(options());
    for stream in [false, true] {
        let mut more = ends();
        more["stream"] = json!(stream);
        let mut request = json!({ "prompt": "ab", "max_tokens": 1, "echo": true, "logprobs": 1 });
        request
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let answer = served.post("/v1/completions", request);
        let parts = match stream {
            true => answer.events(),
            false => vec![answer.json()],
        };
        let all = |name: &str| -> Vec<Value> {
            let of = |part: &Value| part["choices"][0]["logprobs"][name].as_array().cloned();
            parts.iter().filter_map(of).flatten().collect()
        };
        assert_eq!(json!(all("tokens")), json!(["<s>", "a", "b", "</s>"]));
        assert_eq!(json!(all("text_offset")), json!([0, 0, 1, 2]));
        let logprobs = all("token_logprobs");
        assert_eq!(logprobs.len(), 4);
        assert!(logprobs[3].as_f64().unwrap() < 0.0, "not by the bias");
        assert!(all("top_logprobs")[3].is_object());
        let texts = parts
            .iter()
            .filter_map(|part| part["choices"][0]["text"].as_str());
        assert_eq!(texts.collect::<String>(), "ab");
        let reason = parts
            .iter()
            .find_map(|part| part["choices"][0]["finish_reason"].as_str());
        assert_eq!(reason, Some("stop"));
    }
}

#[test]
fn of_a_prompt_of_one_token_nothing_is_known_but_it_is_told() {
    let served = serve(options());
    let answer = ask(&served, json!([b'a' + 4]), json!({ "ignore_eos": true }));
    assert_eq!(list(&answer, "tokens").len(), 2);
    assert_eq!(list(&answer, "tokens")[0], "a");
    assert!(list(&answer, "token_logprobs")[0].is_null());
    assert!(list(&answer, "token_logprobs")[1].is_number());
}

/// As with OpenAI, whose lists may so be one longer than was asked for.
#[test]
fn a_token_is_among_the_alternatives_to_it() {
    let served = serve(options());
    let answer = ask(&served, json!("What tokens are worth"), ends());
    let tokens = list(&answer, "tokens");
    let tops = list(&answer, "top_logprobs");
    let own = list(&answer, "token_logprobs");
    for i in 1..tokens.len() {
        let token = tokens[i].as_str().unwrap();
        assert_eq!(tops[i][token], own[i], "{i}");
    }
    assert!(
        tops.iter()
            .any(|top| top.as_object().is_some_and(|top| top.len() == 2))
    );
}

#[test]
fn control_tokens_that_are_written_out_are_read() {
    let served = serve(options());
    let tokens = |body: Value| served.post("/tokenize", body).json()["tokens"].clone();
    let letter = |c: u8| u64::from(c) + 4;
    // As lm-eval finds the token that ends a text.
    let asked = json!({ "prompt": "</s>", "add_special_tokens": false });
    assert_eq!(tokens(asked), json!([EOS]));
    assert_eq!(
        tokens(json!({ "content": "x</s>" })),
        json!([letter(b'x'), EOS])
    );
    assert_eq!(tokens(json!({ "prompt": "x" })), json!([BOS, letter(b'x')]));
    let plain = tokens(json!({ "content": "</s>", "parse_special": false }));
    assert_eq!(plain.as_array().unwrap().len(), 4);
    let back = served.post("/detokenize", json!({ "tokens": [BOS, letter(b'x'), EOS] }));
    assert_eq!(back.json()["prompt"], "<s>x</s>");
    // What was begun before a control token does not go on behind it.
    let half = served.post(
        "/detokenize",
        json!({ "tokens": [0xC3 + 4, EOS, 0xA9 + 4] }),
    );
    assert_eq!(half.json()["content"], "\u{FFFD}</s>\u{FFFD}");
    // In chats no text of a user becomes one.
    let chat = json!({ "messages": [{ "role": "user", "content": "</s>" }], "max_tokens": 1 });
    let longer = json!({ "messages": [{ "role": "user", "content": "1234" }], "max_tokens": 1 });
    let count = |body: Value| {
        let answer = served.post("/v1/chat/completions", body).json();
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert_eq!(count(chat), count(longer));
}

#[test]
fn our_own_template_knows_tools() {
    let served = serve(options());
    let tool = json!({ "type": "function", "function": { "name": "now", "parameters": { "type": "object", "properties": {} } } });
    let call = json!({ "id": "1", "type": "function", "function": { "name": "now", "arguments": "{\"zone\": \"UTC\"}" } });
    let messages = json!([
        { "role": "system", "content": "Be brief." },
        { "role": "user", "content": "What time is it?" },
        { "role": "assistant", "content": null, "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "1", "content": "12:00" },
        { "role": "tool", "tool_call_id": "2", "content": "13:00" },
    ]);
    let text = |body: Value| {
        let answer = served.post("/apply-template", body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["prompt"].as_str().unwrap().to_owned()
    };
    let with = text(json!({ "messages": messages, "tools": [tool] }));
    assert!(
        with.starts_with("<|im_start|>system\nBe brief.\n\n"),
        "{with}"
    );
    assert_eq!(with.matches("Be brief.").count(), 1, "{with}");
    assert!(with.contains("<tools>\n{\"type\": \"function\""), "{with}");
    let called = "<|im_start|>assistant\n<tool_call>\n{\"name\": \"now\", \"arguments\": {\"zone\": \"UTC\"}}\n</tool_call><|im_end|>\n";
    assert!(with.contains(called), "{with}");
    let answers = "<|im_start|>user\n<tool_response>\n12:00\n</tool_response>\n<tool_response>\n13:00\n</tool_response><|im_end|>\n<|im_start|>assistant\n";
    assert!(with.ends_with(answers), "{with}");
    let without = text(json!({ "messages": [{ "role": "user", "content": "Hi" }] }));
    assert_eq!(
        without,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}

/// Two models take turns, and yet each is as fast as it is: of a small one and a large one, side by side, one sees which is which.
#[test]
fn speeds_are_of_the_time_that_a_model_works_itself() {
    let workshop = Workshop::new();
    let large = Engine::open(default_model(), OpenOptions::default()).unwrap();
    let models = [("large", large), ("small", workshop.open())];
    let models = models.map(|(name, engine)| ServeModel {
        name: name.to_owned(),
        engine,
        system: None,
        sampling: SamplerConfig::greedy(),
    });
    let server = Server::start(models.into(), options()).unwrap();
    let ask = |model: &str, tokens: usize| {
        let request = json!({
            "model": model, "prompt": "Once", "max_tokens": tokens, "ignore_eos": true, "stream": true, "timings_per_token": true,
        });
        ask_at(
            server.address(),
            "POST",
            "/v1/completions",
            "",
            &request.to_string(),
        )
    };
    let speeds = |answer: &Answer| -> Vec<f64> {
        let events = answer.events();
        let of = |event: &Value| event["timings"]["predicted_per_second"].as_f64();
        events.iter().filter_map(of).collect()
    };
    let (large, small) = std::thread::scope(|scope| {
        let large = scope.spawn(|| ask("large", 60));
        let small = scope.spawn(|| ask("small", 60));
        (large.join().unwrap(), small.join().unwrap())
    });
    let (large, small) = (speeds(&large), speeds(&small));
    assert!(large.len() > 30 && small.len() > 5, "told all along");
    let (large, small) = (large.last().unwrap(), small.last().unwrap());
    assert!(small > &(large * 4.0), "{small} and {large}");
    server.stop();
}

#[test]
fn clients_of_ollama_get_embeddings_and_what_runs() {
    let served = serve(options());
    let running = served.get("/api/ps").json();
    assert_eq!(running["models"][0]["name"], "tiny");
    let many = served.post(
        "/api/embed",
        json!({ "model": "tiny", "input": ["one", "two"] }),
    );
    assert_eq!(many.status, 200, "{}", many.body);
    let many = many.json();
    assert_eq!(many["embeddings"].as_array().unwrap().len(), 2);
    let one = served
        .post(
            "/api/embeddings",
            json!({ "model": "tiny", "prompt": "two" }),
        )
        .json();
    assert_eq!(one["embedding"], many["embeddings"][1]);
    let own = served
        .post("/v1/embeddings", json!({ "input": "two" }))
        .json();
    assert_eq!(own["data"][0]["embedding"], one["embedding"]);
}

#[test]
fn errors_at_ollamas_addresses_are_a_sentence() {
    let sentence = |answer: Answer, status: u16| {
        assert_eq!(answer.status, status, "{}", answer.body);
        assert!(answer.json()["error"].is_string(), "{}", answer.body);
    };
    let served = serve(options());
    sentence(served.get("/api/nothing"), 404);
    sentence(served.get("/api/chat"), 405);
    sentence(served.post("/api/embed", json!({ "input": 7 })), 400);
    let guarded = serve(ServeOptions {
        api_key: Some("secret".to_owned()),
        ..options()
    });
    sentence(guarded.get("/api/tags"), 401);
}
