//! Easy questions in the chat format: how many a model answers right, dense and pruned.
//!
//! It takes minutes, and tells figures more than it holds them, so that it runs only when it is asked for:
//! `cargo test --release --test spec -- --ignored easy --nocapture`. `FLAPJACK_EASY` names options of pruning, for example
//! `FLAPJACK_EASY="--prune 0.2"`, and `FLAPJACK_EASY_MODEL` a model other than the default one.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::common::default_model;

/// Questions whose answers are a word, and the spellings that count.
fn questions() -> Vec<(String, Vec<String>)> {
    let text = fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/easy.jsonl"
    ));
    let lines = text.expect("the questions");
    let lines = lines.lines().map(|line| {
        let line: Value = serde_json::from_str(line).expect("a question");
        let answers = line["answers"].as_array().expect("answers").iter();
        let answers = answers.map(|answer| answer.as_str().expect("a text").to_owned());
        (
            line["question"].as_str().expect("a text").to_owned(),
            answers.collect(),
        )
    });
    lines.collect()
}

/// Whether an answer has one of the spellings in it, as whole words; of symbols case counts.
fn is_right(answer: &str, spellings: &[String]) -> bool {
    spellings.iter().any(|spelling| {
        let symbol = spelling.chars().count() <= 2;
        let (text, wanted) = match symbol {
            true => (answer.to_owned(), spelling.clone()),
            false => (answer.to_lowercase(), spelling.to_lowercase()),
        };
        text.match_indices(&wanted).any(|(at, found)| {
            let outside = |c: Option<char>| !c.is_some_and(char::is_alphanumeric);
            outside(text[..at].chars().next_back())
                && outside(text[at + found.len()..].chars().next())
        })
    })
}

#[test]
fn questions_are_many_and_different_and_answers_are_looked_for_as_words() {
    let questions = questions();
    assert!(questions.len() >= 160);
    for (i, (question, answers)) in questions.iter().enumerate() {
        assert!(!answers.is_empty() && answers.iter().all(|answer| !answer.trim().is_empty()));
        assert!(
            questions[..i].iter().all(|(other, _)| other != question),
            "{question}"
        );
        assert!(
            !is_right(question, answers) || question.contains(" or "),
            "{question} tells its answer"
        );
        assert!(
            is_right(&format!("It is {}.", answers[0]), answers),
            "{question}"
        );
    }
    let spellings = ["Au".to_owned()];
    assert!(is_right("The symbol is Au.", &spellings));
    assert!(!is_right("Aurum, au fond", &spellings));
    assert!(is_right("paris!", &["Paris".to_owned()]));
    assert!(!is_right("parish", &["Paris".to_owned()]));
}

struct Server {
    child: Child,
    address: String,
    /// What it says.
    told: String,
}

impl Server {
    fn start(options: &[&str]) -> Self {
        let model =
            std::env::var("FLAPJACK_EASY_MODEL").map_or_else(|_| default_model(), Into::into);
        let mut child = Command::new(env!("CARGO_BIN_EXE_flapjack"))
            .args(["serve", "--port", "0", "--parallel", "8", "--temp", "0"])
            .args(options)
            .arg("-m")
            .arg(model)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        let mut told = String::new();
        let address = loop {
            let line = lines.next().expect("it says where it listens").unwrap();
            if let Some((_, rest)) = line.split_once("http://") {
                let end = rest.find([';', '/', ' ']).unwrap_or(rest.len());
                break rest[..end].to_owned();
            }
            told += &(line + "\n");
        };
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            child,
            address,
            told,
        }
    }

    fn ask(&self, question: &str) -> String {
        let body = json!({
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 24,
            "temperature": 0,
        });
        let body = body.to_string();
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        write!(
            stream,
            "POST /v1/chat/completions HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        )
        .expect("it is sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        let start = body.find('{').expect("JSON");
        let end = body.rfind('}').expect("JSON");
        let body: Value = serde_json::from_str(&body[start..=end]).expect("JSON");
        let text = &body["choices"][0]["message"]["content"];
        text.as_str().expect("a text").to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Which questions are answered right.
fn right(options: &[&str]) -> Vec<bool> {
    let server = Server::start(options);
    for line in server
        .told
        .lines()
        .filter(|line| line.contains("WARN") || line.contains("pruned:"))
    {
        println!("{line}");
    }
    let questions = questions();
    let answers = std::thread::scope(|scope| {
        let handles: Vec<_> = questions
            .chunks(questions.len().div_ceil(8))
            .map(|some| scope.spawn(|| some.iter().map(|(q, _)| server.ask(q)).collect::<Vec<_>>()))
            .collect();
        let answers = handles
            .into_iter()
            .flat_map(|handle| handle.join().expect("answers"));
        answers.collect::<Vec<String>>()
    });
    if std::env::var_os("FLAPJACK_EASY_SHOW").is_some() {
        for ((question, spellings), answer) in questions.iter().zip(&answers) {
            println!(
                "{} {question} {answer:?}",
                if is_right(answer, spellings) {
                    "+"
                } else {
                    "-"
                }
            );
        }
    }
    let right = questions.iter().zip(&answers);
    right
        .map(|((_, spellings), answer)| is_right(answer, spellings))
        .collect()
}

#[test]
#[ignore = "takes minutes"]
fn easy() {
    let dense = right(&[]);
    let count = |right: &[bool]| right.iter().filter(|right| **right).count();
    println!("dense: {} of {} right", count(&dense), dense.len());
    // It would be no measure if the dense model knew nothing.
    assert!(count(&dense) > dense.len() / 4);
    let options = std::env::var("FLAPJACK_EASY").unwrap_or("--prune 0.2".to_owned());
    let pruned = right(&options.split_whitespace().collect::<Vec<_>>());
    let both = dense
        .iter()
        .zip(&pruned)
        .filter(|(a, b)| **a && **b)
        .count();
    println!(
        "{options}: {} right, {both} of the {} that the dense model has right",
        count(&pruned),
        count(&dense)
    );
}
