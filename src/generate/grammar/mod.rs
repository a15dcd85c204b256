//! Answers of a given form: a JSON schema or a grammar, compiled once for a tokenizer, which says in front of every token which
//! ones may come.
//!
//! The parser is that of the crate `llguidance`: grammars in its dialect of Lark, JSON schemas, and GBNF, which `gbnf` translates.

mod gbnf;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::tokenize::Tokenizer;

/// The trie of tokens has room for names of this length, and no real token is longer.
const LONGEST_TOKEN: usize = 1000;
/// Bytes of the text of a grammar, and of the stack on which it is compiled: enough for any chain of rules that fits in the text.
const MAX_GRAMMAR: usize = 512 << 10;
const STACK: usize = 512 << 20;
/// Characters of a message, which may quote the grammar.
const LONGEST_MESSAGE: usize = 400;

/// Why there is no such grammar, or an answer cannot go on by it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    #[error("the JSON schema is not JSON: {0}")]
    Json(String),
    #[error("the JSON schema cannot be used: {0}")]
    Schema(String),
    #[error("the grammar cannot be used: {0}")]
    Lark(String),
    #[error("the grammar cannot be used: line {line}: {problem}")]
    Gbnf { line: usize, problem: String },
    #[error("grammars cannot be used with this tokenizer: {0}")]
    Tokenizer(String),
    #[error("the answer cannot go on by its grammar: {0}")]
    Stuck(String),
}

/// Compiles grammars for one tokenizer. Making it takes some ten milliseconds, so it is worth keeping.
pub struct GrammarCompiler {
    factory: ParserFactory,
}

impl GrammarCompiler {
    /// # Errors
    /// If the vocabulary is none that grammars can be used with.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, GrammarError> {
        let ids = 0..tokenizer.vocab_size() as u32;
        // Tokens without bytes, which are control tokens, come in no grammar.
        let words: Vec<Vec<u8>> = ids
            .clone()
            .map(|id| tokenizer.token_bytes(id))
            .map(|bytes| match bytes.len() <= LONGEST_TOKEN {
                true => bytes.to_vec(),
                false => Vec::new(),
            })
            .collect();
        let ends: Vec<u32> = ids
            .filter(|id| tokenizer.is_end_of_generation(*id))
            .collect();
        let first = ends.first().copied().unwrap_or(INVALID_TOKEN);
        let info = TokRxInfo::new(words.len() as u32, first);
        let mut trie = TokTrie::from(&info, &words);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(&ends);
        }
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let factory = ParserFactory::new_simple(&environment);
        let mut factory = factory.map_err(|error| GrammarError::Tokenizer(words_of(&error)))?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(Self { factory })
    }

    /// Answers that are JSON of this schema, which is JSON itself.
    ///
    /// # Errors
    /// If it is not JSON, or no schema that is known.
    pub fn json_schema(&self, schema: &str) -> Result<Grammar, GrammarError> {
        let schema: Value =
            serde_json::from_str(schema).map_err(|error| GrammarError::Json(error.to_string()))?;
        let schema = with_form(schema);
        let grammar = TopLevelGrammar::from_json_schema(schema);
        self.compile(grammar).map_err(GrammarError::Schema)
    }

    /// Answers by a grammar, in Lark or in GBNF: where names stand in front of `::=`, it is GBNF.
    ///
    /// # Errors
    /// If it is no grammar; with the line.
    pub fn grammar(&self, text: &str) -> Result<Grammar, GrammarError> {
        if text.len() > MAX_GRAMMAR {
            let problem = format!("it has {} bytes, and {MAX_GRAMMAR} may be", text.len());
            return Err(GrammarError::Lark(problem));
        }
        let lark = match gbnf::is_gbnf(text) {
            true => gbnf::to_lark(text)?,
            false => text.to_owned(),
        };
        let grammar = TopLevelGrammar::from_lark(lark);
        self.compile(grammar).map_err(GrammarError::Lark)
    }

    fn compile(&self, grammar: TopLevelGrammar) -> Result<Grammar, String> {
        // A rule that leads to a rule that leads to a rule, and so on, takes a stack as long as that.
        let parser = thread::scope(|scope| {
            let thread = thread::Builder::new().stack_size(STACK);
            let compiling = thread.spawn_scoped(scope, || self.factory.create_parser(grammar));
            let parser = compiling.map_err(|error| error.to_string())?.join();
            parser.map_err(|_| "its parser failed".to_owned())
        })?;
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(error) => Err(plain(&error)),
            None => Ok(Grammar(Arc::new(Mutex::new(matcher)))),
        }
    }
}

impl fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GrammarCompiler")
    }
}

/// A schema whose answers have little between their parts, unless it says itself what they may have: nothing, a space, or a line end
/// with the space that indents the next line. Small models would write spaces for ever where they may.
fn with_form(schema: Value) -> Value {
    const FORM: &str = "x-guidance";
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        schema => schema,
    };
    if let Value::Object(keys) = &mut schema
        && !keys.contains_key(FORM)
    {
        let pattern = r"\x20|\r?\n[\x20\t]{0,32}";
        keys.insert(FORM.to_owned(), json!({ "whitespace_pattern": pattern }));
    }
    schema
}

fn words_of(error: &impl fmt::Display) -> String {
    plain(&error.to_string())
}

/// The message on one line, without what is there for the parser's own developers.
fn plain(message: &str) -> String {
    let message = message.split("\n<").next().unwrap_or_default();
    let lines = message
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    let message = lines.collect::<Vec<_>>().join("; ");
    match message.char_indices().nth(LONGEST_MESSAGE) {
        Some((end, _)) => format!("{}…", &message[..end]),
        None => message,
    }
}

/// A grammar that is compiled. A clone is the same one.
#[derive(Clone)]
pub struct Grammar(Arc<Mutex<Matcher>>);

impl Grammar {
    /// Whether these tokens are a whole answer by it.
    pub fn accepts(&self, tokens: &[u32]) -> bool {
        let mut matcher = Constraint::new(self).matcher;
        let fits = matcher
            .try_consume_tokens(tokens)
            .is_ok_and(|n| n == tokens.len());
        fits && matcher.is_accepting().unwrap_or(false)
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammar")
    }
}

/// How far an answer has gone by its grammar.
pub(super) struct Constraint {
    matcher: Matcher,
    /// What may come next, in the order of the numbers.
    allowed: Vec<u32>,
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}

impl Constraint {
    /// The beginning of an answer.
    pub fn new(grammar: &Grammar) -> Self {
        // One that broke while it was copied is as it was.
        let matcher = grammar.0.lock().unwrap_or_else(PoisonError::into_inner);
        Self {
            matcher: matcher.deep_clone(),
            allowed: Vec::new(),
        }
    }

    /// Whether nothing may come any more.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }

    /// The tokens that may come next: those that the grammar goes on with, and where it may end, those that end texts.
    ///
    /// # Errors
    /// If there are none, or the grammar is too complex here.
    pub fn allowed(&mut self) -> Result<&[u32], GrammarError> {
        let mask = self
            .matcher
            .compute_mask()
            .map_err(|error| GrammarError::Stuck(words_of(&error)))?;
        self.allowed.clear();
        mask.iter_set_entries(|id| self.allowed.push(id as u32));
        match self.allowed.is_empty() {
            true => Err(GrammarError::Stuck("no token fits".to_owned())),
            false => Ok(&self.allowed),
        }
    }

    /// Takes a token that was allowed.
    ///
    /// # Errors
    /// If it was not, or the grammar is too complex here.
    pub fn accept(&mut self, token: u32) -> Result<(), GrammarError> {
        let accepted = self.matcher.consume_token(token);
        accepted.map_err(|error| GrammarError::Stuck(words_of(&error)))
    }
}
