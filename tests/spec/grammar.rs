//! Answers of a given form: whatever the model would like to say, what it says fits.

use serde_json::Value;

use flapjack::engine::{Engine, EngineError, GenerateOptions, OpenOptions, SequenceOptions};
use flapjack::generate::{
    Finish, GenerateError, Generated, Grammar, GrammarError, Request, SamplerConfig,
};
use flapjack::model::CacheType;

use crate::common::default_model;
use crate::common::engine::Workshop;
use crate::common::program::{fail, stderr, succeeded};

/// Enumerations, numbers and nested arrays, all of them bounded.
const SCHEMA: &str = r##"{
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue", null, 7]},
        "count": {"type": "integer", "minimum": -3, "maximum": 120},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "name": {"type": "string", "maxLength": 12},
        "grid": {
            "type": "array", "minItems": 1, "maxItems": 3,
            "items": {"type": "array", "maxItems": 3, "items": {"$ref": "#/$defs/cell"}}
        },
        "sure": {"type": "boolean"}
    },
    "$defs": {"cell": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"const": "none"}]}},
    "required": ["colour", "count", "share", "grid"],
    "additionalProperties": false
}"##;

/// Whether JSON is of the schema, by hand.
fn is_valid(json: &Value) -> bool {
    let Some(object) = json.as_object() else {
        return false;
    };
    let keys = ["colour", "count", "share", "name", "grid", "sure"];
    let colours = ["\"red\"", "\"green\"", "\"blue\"", "null", "7"];
    let cell = |cell: &Value| {
        cell.as_i64().is_some_and(|n| (0..100).contains(&n)) || cell.as_str() == Some("none")
    };
    let rows = |grid: &Value| {
        let rows = grid.as_array().filter(|rows| (1..=3).contains(&rows.len()));
        rows.is_some_and(|rows| {
            rows.iter().all(|row| {
                let row = row.as_array();
                row.is_some_and(|row| row.len() <= 3 && row.iter().all(cell))
            })
        })
    };
    object.keys().all(|key| keys.contains(&key.as_str()))
        && colours.contains(&object["colour"].to_string().as_str())
        // -0 is a whole number too, which is read as a float.
        && object["count"]
            .as_f64()
            .is_some_and(|n| n.fract() == 0.0 && (-3.0..=120.0).contains(&n))
        && object["share"]
            .as_f64()
            .is_some_and(|n| (0.0..=1.0).contains(&n))
        && rows(&object["grid"])
        && object
            .get("name")
            .is_none_or(|name| name.as_str().is_some_and(|name| name.chars().count() <= 12))
        && object.get("sure").is_none_or(Value::is_boolean)
}

fn answer(engine: &Engine, prompt: &str, options: &GenerateOptions) -> (String, Generated) {
    let place = SequenceOptions {
        context: Some(2000),
        ..SequenceOptions::default()
    };
    let mut sequence = engine.sequence_with(place).unwrap();
    let mut generation = engine.generate(&mut sequence, prompt, options).unwrap();
    let text = (&mut generation).map(Result::unwrap).collect();
    (text, generation.generated().unwrap().clone())
}

fn by(grammar: Grammar, sampler: SamplerConfig) -> GenerateOptions {
    GenerateOptions {
        max_tokens: 1500,
        sampler,
        grammar: Some(grammar),
        ..GenerateOptions::default()
    }
}

fn smollm() -> Engine {
    let options = OpenOptions {
        threads: Some(2),
        ..OpenOptions::default()
    };
    Engine::open(default_model(), options).unwrap()
}

// ---- JSON ----

#[test]
fn a_model_that_knows_nothing_writes_valid_json() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let grammar = engine.grammars().unwrap().json_schema(SCHEMA).unwrap();
    let mut named = 0;
    for seed in 0..60 {
        let options = by(grammar.clone(), SamplerConfig::plain(seed));
        let (text, generated) = answer(&engine, "abc", &options);
        let tokens = generated.tokens.len();
        assert_eq!(
            generated.finish,
            Finish::EndOfText,
            "{tokens} tokens: {text:?}"
        );
        let json: Value = serde_json::from_str(&text).expect(&text);
        assert!(is_valid(&json), "{text}");
        named += usize::from(json.get("name").is_some());
        assert!(grammar.accepts(&generated.tokens));
    }
    assert!(named > 5, "the answers differ: {named}");
}

/// At temperature 1, with the tokens of a real model; `FLAPJACK_ANSWERS` says how many answers.
#[test]
fn a_real_model_writes_valid_json_alone_and_among_others() {
    let engine = smollm();
    let grammar = engine.grammars().unwrap().json_schema(SCHEMA).unwrap();
    let wanted = std::env::var("FLAPJACK_ANSWERS").ok();
    let wanted: usize = wanted.map_or(12, |n| n.parse().expect("a number"));
    let prompt = engine
        .prompt("A description of a thing, in JSON:\n")
        .unwrap();
    let request = |seed| Request {
        prompt: prompt.clone(),
        max_tokens: 600,
        sampler: SamplerConfig::plain(seed),
        grammar: Some(grammar.clone()),
        ..Request::default()
    };
    let mut scheduler = engine.scheduler(CacheType::F16, None).unwrap();
    let (mut waiting, mut ended) = (0..wanted as u64, Vec::new());
    let mut asked = Vec::new();
    while ended.len() < wanted {
        while scheduler.len() < 8
            && let Some(seed) = waiting.next()
        {
            asked.push((
                scheduler
                    .add(engine.loaded().unwrap(), request(seed), 700)
                    .unwrap(),
                seed,
            ));
        }
        for update in scheduler.step(engine.loaded().unwrap()).unwrap() {
            if let Some(end) = update.ended {
                ended.push((update.id, end.unwrap()));
            }
        }
    }
    for (_, generated) in &ended {
        let text = engine.tokenizer().unwrap().decode(&generated.tokens);
        assert_eq!(generated.finish, Finish::EndOfText, "{text}");
        let json: Value = serde_json::from_str(&text).expect(&text);
        assert!(is_valid(&json), "{text}");
    }
    for (id, seed) in asked.iter().take(2) {
        let place = SequenceOptions {
            context: Some(700),
            ..SequenceOptions::default()
        };
        let mut sequence = engine.sequence_with(place).unwrap();
        let options = GenerateOptions {
            max_tokens: 600,
            ..by(grammar.clone(), SamplerConfig::plain(*seed))
        };
        let generation = engine.generate_behind(&mut sequence, prompt.clone(), &options);
        let mut generation = generation.unwrap();
        (&mut generation).for_each(|piece| drop(piece.unwrap()));
        let among = &ended.iter().find(|(other, _)| other == id).unwrap().1;
        assert_eq!(generation.generated().unwrap().tokens, among.tokens);
    }
}

#[test]
fn the_most_likely_answer_has_the_form_too_and_ends_by_itself() {
    let engine = smollm();
    let compiler = engine.grammars().unwrap();
    let schema = r#"{"type": "object", "properties": {"capital": {"enum": ["Berlin", "Paris", "Rome"]}},
        "required": ["capital"], "additionalProperties": false}"#;
    let grammar = compiler.json_schema(schema).unwrap();
    let mut options = by(grammar, SamplerConfig::greedy());
    options.ignore_end = true;
    let (text, generated) = answer(&engine, "The capital of France as JSON: ", &options);
    let json: Value = serde_json::from_str(&text).expect(&text);
    assert_eq!(json["capital"], "Paris");
    assert_eq!(generated.finish, Finish::EndOfText);
    // What does not fit in the answer is the user's limit.
    options.max_tokens = 3;
    let (_, generated) = answer(&engine, "The capital of France as JSON: ", &options);
    assert_eq!(generated.finish, Finish::Length);
}

#[test]
fn control_tokens_are_in_no_answer() {
    let engine = smollm();
    let tokenizer = engine.tokenizer().unwrap();
    let grammar = engine.grammars().unwrap().grammar("start: /(.|\\n){1,20}/");
    let controls =
        (0..tokenizer.vocab_size() as u32).filter(|id| tokenizer.token_bytes(*id).is_empty());
    let controls: Vec<u32> = controls.collect();
    assert!(controls.len() > 2);
    let sampler = SamplerConfig {
        logit_bias: controls.iter().map(|id| (*id, 1000.0)).collect(),
        ..SamplerConfig::greedy()
    };
    let (text, generated) = answer(&engine, "Hello", &by(grammar.unwrap(), sampler));
    // One may end the answer, where it may end.
    assert!(!text.is_empty());
    assert!(
        generated
            .tokens
            .iter()
            .all(|token| !controls.contains(token))
    );
    assert_eq!(generated.finish, Finish::EndOfText);
}

// ---- grammars ----

/// Whether texts are answers by a grammar.
fn assert_accepts(engine: &Engine, grammar: &str, accepted: &[&str], refused: &[&str]) {
    let compiled = engine.grammars().unwrap().grammar(grammar);
    let compiled = compiled.unwrap_or_else(|error| panic!("{grammar}: {error}"));
    let accepts = |text: &str| compiled.accepts(&engine.tokenizer().unwrap().encode(text).unwrap());
    for text in accepted {
        assert!(accepts(text), "{text:?} by {grammar}");
    }
    for text in refused {
        assert!(!accepts(text), "{text:?} by {grammar}");
    }
}

#[test]
fn lark_and_gbnf_say_what_fits() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let accepts = |grammar: &str, accepted: &[&str], refused: &[&str]| {
        assert_accepts(&engine, grammar, accepted, refused);
    };
    accepts(
        "start: \"yes\" | \"no\" WORD\nWORD: /[a-z]+/",
        &["yes", "nothing"],
        &["", "no", "yess", "no way"],
    );
    accepts(
        "root ::= \"yes\" | \"no\" [a-z]+ # a comment\n",
        &["yes", "nothing"],
        &["", "no", "yess", "no way"],
    );
    // Characters by their numbers, others than some, any; how often.
    accepts(
        r#"root ::= [\x41-\x43\u00e9] [^a-c\n] . "\t\"\\" [-+]? ("ab"){2} "x"{1,} [^\]"]{0,2} [a-c-]"#,
        &[
            "Ad\n\t\"\\ababx-",
            "éz🥞\t\"\\+ababxxqq-",
            "Bdd\t\"\\-ababxa",
        ],
        &[
            "Dd\n\t\"\\ababx-",
            "Aa\n\t\"\\ababx-",
            "Ad\n\t\"\\abx-",
            "Ad\n\t\"\\abab-",
            "Ad\n\t\"\\ababx\"-",
        ],
    );
    // Sums, which rules come back to themselves for; spaces; names with a hyphen; over several lines.
    accepts(
        "root ::= sum\nsum ::= a-term (ws [-+*/] ws a-term)*\na-term ::= number\n  | \"(\" sum \")\"\n\nnumber ::= [0-9]+\nws ::= \" \"*\n",
        &["1", "12+3", "(1 - (2))* 33", "((7))"],
        &["", "1+", "(1", "1)", "a", "1 2"],
    );
    // Nothing at all, and rules that come back from the left and from the right.
    accepts("root ::= \"a\"?", &["", "a"], &["aa", "b"]);
    accepts("root ::= ( \"a\" | ) \"b\"", &["ab", "b"], &["a", ""]);
    accepts(
        "root ::= root \"a\" | \"b\"",
        &["b", "baa"],
        &["", "a", "ab"],
    );
    accepts(
        "root ::= \"a\" root | [b-d]",
        &["b", "aac"],
        &["", "a", "bb"],
    );
    accepts(
        "root ::= \"(\" root? \")\"",
        &["()", "((()))"],
        &["", "(()", "())"],
    );
    // JSON as in llama.cpp's example.
    let json = r#"
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= | " " | "\n" [ \t]{0,20}
"#;
    accepts(
        json,
        &[
            "{}",
            r#"{"a": [1, -2.5e3, "x\"\u00e9", {"b": null}], "c": true}"#,
            "{ \"a\":\n  [] }",
        ],
        &[
            "",
            "[]",
            "{",
            "{\"a\"}",
            "{\"a\": 01}",
            "{\"a\": \"\n\"}",
            "{}x",
        ],
    );
}

#[test]
fn by_a_recursive_grammar_a_model_that_knows_nothing_writes_what_fits() {
    /// Reads a sum and returns what is behind it.
    fn sum(text: &str) -> Option<&str> {
        let mut rest = term(text)?;
        while let Some(more) = rest.strip_prefix(['-', '+', '*', '/']) {
            rest = term(more)?;
        }
        Some(rest)
    }
    fn term(text: &str) -> Option<&str> {
        if let Some(inner) = text.strip_prefix('(') {
            return sum(inner)?.strip_prefix(')');
        }
        let rest = text.trim_start_matches(|c: char| c.is_ascii_digit());
        (rest.len() < text.len()).then_some(rest)
    }
    let workshop = Workshop::new();
    let engine = workshop.open();
    let grammar =
        "root ::= sum\nsum ::= term ([-+*/] term){0,2}\nterm ::= [0-9]{1,3} | \"(\" sum \")\"\n";
    let grammar = engine.grammars().unwrap().grammar(grammar).unwrap();
    let mut groups = 0;
    for seed in 0..40 {
        let options = by(grammar.clone(), SamplerConfig::plain(seed));
        let (text, generated) = answer(&engine, "abc", &options);
        assert_eq!(generated.finish, Finish::EndOfText, "{text}");
        assert_eq!(sum(&text), Some(""), "{text}");
        groups += usize::from(text.contains('('));
    }
    assert!(groups > 0, "some have groups");
}

// ---- what cannot be used ----

#[test]
fn what_is_no_grammar_is_refused_with_the_place() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let compiler = engine.grammars().unwrap();
    let error = compiler.json_schema("{\"type\": ").unwrap_err();
    assert!(
        matches!(&error, GrammarError::Json(words) if words.contains("line 1")),
        "{error}"
    );
    for (schema, words) in [
        (r#"{"type": "thing"}"#, "thing"),
        (
            r#"{"type": "string", "minLength": 3, "maxLength": 1}"#,
            "nsatisfiable",
        ),
        (r##"{"$ref": "#/nowhere"}"##, "nowhere"),
        ("7", ""),
    ] {
        let error = compiler.json_schema(schema).unwrap_err();
        assert!(matches!(&error, GrammarError::Schema(_)), "{error}");
        let message = error.to_string();
        assert!(message.contains(words), "{message}");
        assert!(
            !message.contains('\n') && !message.contains("non-verbose"),
            "{message}"
        );
    }
    for (grammar, words) in [
        ("start: word", "word"),
        ("start: \"a\"\nother: \"b", "2("),
        ("begin: \"a\"", "start"),
        ("", ""),
    ] {
        let error = compiler.grammar(grammar).unwrap_err();
        assert!(matches!(&error, GrammarError::Lark(_)), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    for (grammar, line, words) in [
        ("first ::= \"a\"", 1, "no rule named \"root\""),
        (
            "root ::= a\n\na ::= b c\nc ::= \"c\"",
            3,
            "no rule named \"b\"",
        ),
        ("root ::= \"a\"\nroot ::= \"b\"", 2, "there twice"),
        ("root ::= \"a\nb\"", 1, "does not end"),
        ("root ::= [a-z", 1, "does not end"),
        ("root ::= [z-a]", 1, "is empty"),
        ("root ::= []", 1, "is empty"),
        (
            "root ::= (\"a\"\n\n",
            3,
            "expected \")\", and the grammar ends",
        ),
        (
            "root ::= \"a\" )",
            1,
            "expected the end of the rule, found ')'",
        ),
        ("root ::= \"a\"{3,1}", 1, "does not say how often"),
        ("root ::= \"a\"{x}", 1, "does not say how often"),
        ("root ::= \"\\q\"", 1, "\\q stands for nothing"),
        ("root ::= \"\\x4\"", 1, "2 digits"),
        ("root ::= <think>", 1, "tokens"),
        ("root ::= \"a\"\n= \"b\"", 2, "the name of a rule"),
        ("root ::= \"a\"\nb \"b\"", 2, "\"::=\""),
    ] {
        match compiler.grammar(grammar).unwrap_err() {
            GrammarError::Gbnf { line: at, problem } => {
                assert_eq!(at, line, "{grammar}: {problem}");
                assert!(problem.contains(words), "{grammar}: {problem}");
            }
            error => panic!("{grammar}: {error}"),
        }
    }
    let deep = format!("root ::= {}\"a\"{}", "(".repeat(5000), ")".repeat(5000));
    assert!(compiler.grammar(&deep).is_err());
    let repeated = format!("root ::= \"a\"{}", "*".repeat(100_000));
    assert!(compiler.grammar(&repeated).is_err());
    assert!(
        compiler
            .grammar(&format!("root ::= \"{}\"", "a".repeat(600_000)))
            .is_err()
    );
    // As long a chain of rules as there may be: it is compiled or refused, and does no harm.
    let chain = |sign: &str, more: &str| {
        let rules = (0..24_000).map(|i| format!("r{i} {sign} r{}{more}\n", i + 1));
        rules.collect::<String>() + &format!("r24000 {sign} \"a\"\n")
    };
    for more in ["", " | \"b\" r0"] {
        let gbnf = format!("root ::= r0\n{}", chain("::=", more));
        let lark = format!("start: r0\n{}", chain(":", more));
        for grammar in [&gbnf, &lark] {
            if let Err(error) = compiler.grammar(grammar) {
                assert!(error.to_string().len() < 2000, "{error}");
            }
        }
    }
    // Nothing is broken by what was refused.
    assert!(compiler.grammar("root ::= \"a\"").is_ok());
}

#[test]
fn a_model_without_a_tokenizer_has_no_grammars() {
    let options = OpenOptions {
        threads: Some(1),
        ..OpenOptions::default()
    };
    let synthetic = flapjack::engine::SyntheticType::Q4_0;
    let engine = Engine::synthetic(flapjack::engine::TINY, synthetic, options).unwrap();
    assert!(matches!(engine.grammars(), Err(EngineError::NoTokenizer)));
}

#[test]
fn an_answer_that_its_grammar_cannot_go_on_with_ends_with_an_error() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let compiler = engine.grammars().unwrap();
    // Nothing is both.
    let Ok(grammar) = compiler.grammar("start: A\nA: /a+/ & /b+/") else {
        return;
    };
    let mut sequence = engine.sequence();
    let options = by(grammar, SamplerConfig::greedy());
    let mut generation = engine.generate(&mut sequence, "abc", &options).unwrap();
    let end = generation.find_map(Result::err);
    assert!(
        matches!(end, Some(GenerateError::Grammar(GrammarError::Stuck(_)))),
        "{end:?}"
    );
}

// ---- the command line ----

#[test]
fn the_command_line_takes_schemas_and_grammars_as_text_or_from_files() {
    let workshop = Workshop::new();
    let run = |arguments: &[&str]| {
        let run = [
            "run", "-p", "abc", "-n", "400", "-q", "--temp", "1", "--seed", "3",
        ];
        workshop.flapjack(&[&run, arguments].concat())
    };
    let text = |arguments: &[&str]| succeeded(&run(arguments)).0;
    let schema = r#"{"enum": ["one", "two"]}"#;
    let answer = text(&["--json-schema", schema]);
    assert!(
        matches!(answer.as_str(), "\"one\"\n" | "\"two\"\n"),
        "{answer}"
    );
    let file = workshop.write("schema.json", schema);
    assert_eq!(text(&["-j", file.to_str().unwrap()]), answer);
    let answer = text(&["--grammar", "root ::= \"x\" [0-9]{2}"]);
    assert!(answer.len() == 4 && answer.starts_with('x'), "{answer}");
    let file = workshop.write("some.gbnf", "root ::= \"x\" [0-9]{2}");
    assert_eq!(text(&["--grammar", file.to_str().unwrap()]), answer);
    assert_eq!(text(&["--grammar", "start: \"abc\""]), "abc\n");

    for (arguments, words) in [
        (
            ["--json-schema", "{"],
            "--json-schema: the JSON schema is not JSON",
        ),
        (
            ["--json-schema", "nowhere.json"],
            "cannot read nowhere.json",
        ),
        (
            ["--grammar", "root ::= b"],
            "line 1: there is no rule named \"b\"",
        ),
        (["--grammar", "nowhere.gbnf"], "cannot read nowhere.gbnf"),
    ] {
        let output = run(&arguments);
        assert!(!output.status.success());
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
    let both = fail(&["run", "-p", "x", "--grammar", "start: \"a\"", "-j", "{}"]);
    assert!(both.contains("cannot be used with"), "{both}");
}
