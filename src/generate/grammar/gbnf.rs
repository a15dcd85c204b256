//! GBNF, the notation of llama.cpp's grammars, in terms of the Lark dialect that grammars are compiled from.
//!
//! Rules that do not come back to themselves are regular, and become terminals; in the other rules, neighbours that are regular
//! become one terminal together. So the parser has few symbols to look at, and what is read by a terminal has no second reading
//! beside its neighbours.
//!
//! Source: `grammars/README.md` in the llama.cpp repository.

use std::collections::HashMap;
use std::fmt::Write;

use super::GrammarError;

/// How deeply groups may be nested, and how much that says how often may stand behind each other: more would overflow the stack.
const MAX_DEPTH: usize = 200;
const MAX_REPEATS: usize = 8;

/// Whether a text is GBNF and not Lark: by the sign that stands behind the names of rules.
pub(super) fn is_gbnf(text: &str) -> bool {
    text.lines().any(|line| {
        let name = line
            .split("::=")
            .next()
            .filter(|name| name.len() < line.len());
        name.is_some_and(|name| !name.trim().is_empty() && name.trim().chars().all(is_name))
    })
}

/// The same grammar as Lark.
///
/// # Errors
/// If the text is no grammar, or lacks a rule; with the line.
pub(super) fn to_lark(text: &str) -> Result<String, GrammarError> {
    let rules = Parser::new(text).rules()?;
    let names: HashMap<&str, usize> = (0..)
        .zip(&rules)
        .map(|(i, r)| (r.name.as_str(), i))
        .collect();
    let is_again = |(i, rule): &(usize, &Rule)| rules[..*i].iter().any(|r| r.name == rule.name);
    if let Some((_, again)) = (0..).zip(&rules).find(is_again) {
        let problem = format!("the rule {:?} is there twice", again.name);
        return Err(error(again.line, problem));
    }
    let Some(root) = names.get("root").copied() else {
        return Err(error(
            1,
            "there is no rule named \"root\", with which grammars begin",
        ));
    };
    for rule in &rules {
        rule.body
            .each_reference(&mut |name, line| match names.contains_key(name) {
                true => Ok(()),
                false => Err(error(line, format!("there is no rule named {name:?}"))),
            })?;
    }
    let mut writer = LarkWriter {
        regular: regular(&rules, &names),
        rules: &rules,
        names,
        text: String::new(),
        terminals: 0,
    };
    writer.write(root);
    Ok(writer.text)
}

fn error(line: usize, problem: impl Into<String>) -> GrammarError {
    GrammarError::Gbnf {
        line,
        problem: problem.into(),
    }
}

// ---- what a grammar consists of ----

struct Rule {
    name: String,
    line: usize,
    body: Node,
}

enum Node {
    Literal(String),
    /// Characters in these ranges, or all others.
    Class(bool, Vec<(char, char)>),
    Reference(String, usize),
    Sequence(Vec<Node>),
    Choice(Vec<Node>),
    /// At least and at most so many times.
    Repeat(Box<Node>, u32, Option<u32>),
}

impl Node {
    fn each_reference(
        &self,
        visit: &mut impl FnMut(&str, usize) -> Result<(), GrammarError>,
    ) -> Result<(), GrammarError> {
        match self {
            Node::Literal(_) | Node::Class(..) => Ok(()),
            Node::Reference(name, line) => visit(name, *line),
            Node::Sequence(nodes) | Node::Choice(nodes) => {
                nodes.iter().try_for_each(|node| node.each_reference(visit))
            }
            Node::Repeat(node, ..) => node.each_reference(visit),
        }
    }
}

/// For each rule, whether no rule that it leads to comes back to itself.
fn regular(rules: &[Rule], names: &HashMap<&str, usize>) -> Vec<bool> {
    let references: Vec<Vec<usize>> = rules
        .iter()
        .map(|rule| {
            let mut to = Vec::new();
            let all = rule.body.each_reference(&mut |name, _| {
                to.push(names[name]);
                Ok(())
            });
            debug_assert!(all.is_ok(), "nothing is refused");
            to
        })
        .collect();
    // What only leads to what is regular is regular: beginning with what leads nowhere.
    let mut open: Vec<usize> = references.iter().map(Vec::len).collect();
    let mut from = vec![Vec::new(); rules.len()];
    for (rule, to) in references.iter().enumerate() {
        to.iter().for_each(|to| from[*to].push(rule));
    }
    let mut found: Vec<usize> = (0..rules.len()).filter(|rule| open[*rule] == 0).collect();
    let mut regular = vec![false; rules.len()];
    while let Some(rule) = found.pop() {
        regular[rule] = true;
        for user in &from[rule] {
            open[*user] -= 1;
            if open[*user] == 0 {
                found.push(*user);
            }
        }
    }
    regular
}

// ---- reading ----

struct Parser<'a> {
    rest: &'a str,
    line: usize,
}

fn is_name(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '-' | '_')
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            rest: text,
            line: 1,
        }
    }

    fn error(&self, problem: impl Into<String>) -> GrammarError {
        error(self.line, problem)
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn take(&mut self) -> Option<char> {
        let character = self.peek()?;
        self.rest = &self.rest[character.len_utf8()..];
        self.line += usize::from(character == '\n');
        Some(character)
    }

    fn take_if(&mut self, text: &str) -> bool {
        match self.rest.strip_prefix(text) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// Passes over blanks and comments, and over ends of lines where a rule may go on behind them.
    fn skip(&mut self, lines: bool) {
        while let Some(character) = self.peek() {
            match character {
                '#' => {
                    while self.peek().is_some_and(|c| c != '\n') {
                        self.take();
                    }
                }
                '\n' | '\r' if !lines => return,
                character if character.is_whitespace() => {
                    self.take();
                }
                _ => return,
            }
        }
    }

    fn rules(&mut self) -> Result<Vec<Rule>, GrammarError> {
        let mut rules = Vec::new();
        loop {
            self.skip(true);
            if self.rest.is_empty() {
                return Ok(rules);
            }
            let line = self.line;
            let name = self
                .name()
                .ok_or_else(|| self.expected("the name of a rule"))?;
            self.skip(false);
            if !self.take_if("::=") {
                return Err(self.expected("\"::=\" behind the name of a rule"));
            }
            self.skip(true);
            let body = self.choice(0)?;
            if !matches!(self.peek(), None | Some('\n' | '\r')) {
                return Err(self.expected("the end of the rule"));
            }
            rules.push(Rule { name, line, body });
        }
    }

    fn expected(&self, what: &str) -> GrammarError {
        match self.peek() {
            Some(found) => self.error(format!("expected {what}, found {found:?}")),
            None => self.error(format!("expected {what}, and the grammar ends")),
        }
    }

    fn name(&mut self) -> Option<String> {
        let end = self.rest.find(|c| !is_name(c)).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        (!name.is_empty()).then(|| name.to_owned())
    }

    fn choice(&mut self, depth: usize) -> Result<Node, GrammarError> {
        if depth > MAX_DEPTH {
            return Err(self.error("groups are nested too deeply"));
        }
        let mut choices = vec![self.sequence(depth)?];
        while self.take_bar() {
            self.skip(true);
            choices.push(self.sequence(depth)?);
        }
        Ok(match choices.len() {
            1 => choices.remove(0),
            _ => Node::Choice(choices),
        })
    }

    /// Takes the bar in front of another choice, which may stand on a line of its own: no rule begins with one.
    fn take_bar(&mut self) -> bool {
        let (rest, line) = (self.rest, self.line);
        self.skip(true);
        let found = self.take_if("|");
        if !found {
            (self.rest, self.line) = (rest, line);
        }
        found
    }

    fn sequence(&mut self, depth: usize) -> Result<Node, GrammarError> {
        let nested = depth > 0;
        let mut nodes = Vec::new();
        loop {
            self.skip(nested);
            let node = match self.peek() {
                Some('"') => Node::Literal(self.literal()?),
                Some('[') => self.class()?,
                Some('.') => {
                    self.take();
                    Node::Class(true, Vec::new())
                }
                Some('(') => {
                    self.take();
                    self.skip(true);
                    let group = self.choice(depth + 1)?;
                    self.skip(true);
                    if !self.take_if(")") {
                        return Err(self.expected("\")\""));
                    }
                    group
                }
                Some(character) if is_name(character) => {
                    let line = self.line;
                    let name = self.name().unwrap_or_default();
                    Node::Reference(name, line)
                }
                Some('<' | '!') => {
                    return Err(
                        self.error("tokens, as in <name>, cannot be part of a grammar here")
                    );
                }
                _ => break,
            };
            nodes.push(self.repeated(node, nested)?);
        }
        Ok(match nodes.len() {
            1 => nodes.remove(0),
            _ => Node::Sequence(nodes),
        })
    }

    fn repeated(&mut self, mut node: Node, nested: bool) -> Result<Node, GrammarError> {
        for _ in 0..MAX_REPEATS {
            self.skip(nested);
            let (least, most) = match self.peek() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => self.count()?,
                _ => return Ok(node),
            };
            self.take();
            node = Node::Repeat(Box::new(node), least, most);
        }
        Err(self.error("too much stands behind each other that says how often"))
    }

    /// How often, up to the brace that ends it.
    fn count(&mut self) -> Result<(u32, Option<u32>), GrammarError> {
        self.take();
        let inner = self.rest.split('}').next().unwrap_or_default();
        let number = |text: &str| text.trim().parse::<u32>().ok().filter(|n| *n <= 10_000);
        let range = match inner.split_once(',') {
            None => number(inner).map(|n| (n, Some(n))),
            Some((least, most)) => match (least.trim(), most.trim()) {
                (least, "") => number(least).map(|least| (least, None)),
                ("", most) => number(most).map(|most| (0, Some(most))),
                (least, most) => number(least).zip(number(most).map(Some)),
            },
        };
        let range = range.filter(|(least, most)| most.is_none_or(|most| *least <= most));
        let range = range.ok_or_else(|| {
            self.error(format!(
                "{{{inner}}} does not say how often (up to 10000 times)"
            ))
        })?;
        self.rest = &self.rest[inner.len()..];
        match self.peek() {
            Some('}') => Ok(range),
            _ => Err(self.expected("\"}\"")),
        }
    }

    fn literal(&mut self) -> Result<String, GrammarError> {
        let line = self.line;
        self.take();
        let mut text = String::new();
        loop {
            match self.peek() {
                None | Some('\n') => return Err(error(line, "a text does not end (\")")),
                Some('"') => {
                    self.take();
                    return Ok(text);
                }
                _ => text.push(self.character()?),
            }
        }
    }

    fn class(&mut self) -> Result<Node, GrammarError> {
        let line = self.line;
        self.take();
        let others = self.take_if("^");
        let mut ranges = Vec::new();
        loop {
            match self.peek() {
                None | Some('\n') => {
                    return Err(error(line, "a set of characters does not end (])"));
                }
                Some(']') => {
                    self.take();
                    break;
                }
                _ => {}
            }
            let first = self.character()?;
            let is_range = self.rest.starts_with('-') && !self.rest.starts_with("-]");
            let last = match is_range {
                true => {
                    self.take();
                    self.character()?
                }
                false => first,
            };
            if last < first {
                return Err(self.error(format!("the range {first:?} to {last:?} is empty")));
            }
            ranges.push((first, last));
        }
        if ranges.is_empty() && !others {
            return Err(error(line, "a set of characters is empty"));
        }
        Ok(Node::Class(others, ranges))
    }

    /// A character, which may be written with a backslash.
    fn character(&mut self) -> Result<char, GrammarError> {
        let character = self.take().ok_or_else(|| self.expected("a character"))?;
        if character != '\\' {
            return Ok(character);
        }
        let digits = match self.take() {
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some(other @ ('\\' | '"' | '[' | ']' | '-' | '^')) => return Ok(other),
            other => {
                let what = other.map_or_else(String::new, String::from);
                return Err(self.error(format!("\\{what} stands for nothing")));
            }
        };
        let number = self
            .rest
            .get(..digits)
            .filter(|n| n.chars().all(|c| c.is_ascii_hexdigit()));
        let number = number.and_then(|number| u32::from_str_radix(number, 16).ok());
        let character = number.and_then(char::from_u32);
        let character = character.ok_or_else(|| {
            self.error(format!("expected {digits} digits of a character's number"))
        })?;
        self.rest = &self.rest[digits..];
        Ok(character)
    }
}

// ---- writing ----

struct LarkWriter<'a> {
    rules: &'a [Rule],
    names: HashMap<&'a str, usize>,
    regular: Vec<bool>,
    text: String,
    /// Terminals so far that are parts of rules.
    terminals: usize,
}

impl LarkWriter<'_> {
    fn write(&mut self, root: usize) {
        let start = self.reference(root);
        let _ = writeln!(self.text, "start: {start}");
        for (i, rule) in self.rules.iter().enumerate() {
            let name = self.reference(i);
            let body = match self.regular[i] {
                true => self.terminal(&rule.body),
                false => self.body(&rule.body),
            };
            let _ = writeln!(self.text, "{name}: {body}");
        }
    }

    /// The name of a rule, which says by its capitals whether it is a terminal. The numbers keep names apart that differ in
    /// characters that names cannot have here.
    fn reference(&self, rule: usize) -> String {
        match self.regular[rule] {
            true => format!("R{rule}"),
            false => format!("r{rule}"),
        }
    }

    fn is_regular(&self, node: &Node) -> bool {
        match node {
            Node::Literal(_) | Node::Class(..) => true,
            Node::Reference(name, _) => self.regular[self.names[name.as_str()]],
            Node::Sequence(nodes) | Node::Choice(nodes) => {
                nodes.iter().all(|node| self.is_regular(node))
            }
            Node::Repeat(node, ..) => self.is_regular(node),
        }
    }

    /// Something regular, as it stands in a terminal.
    fn terminal(&self, node: &Node) -> String {
        match node {
            Node::Literal(text) if text.is_empty() => "\"\"".to_owned(),
            Node::Literal(text) => {
                let characters: String = text.chars().map(in_regex).collect();
                format!("/{characters}/")
            }
            Node::Class(true, ranges) if ranges.is_empty() => "/[\\x{0}-\\x{10FFFF}]/".to_owned(),
            Node::Class(others, ranges) => {
                let ranges: String = ranges
                    .iter()
                    .map(|(first, last)| format!("{}-{}", in_regex(*first), in_regex(*last)))
                    .collect();
                format!("/[{}{ranges}]/", if *others { "^" } else { "" })
            }
            Node::Reference(name, _) => self.reference(self.names[name.as_str()]),
            Node::Sequence(nodes) if nodes.is_empty() => "\"\"".to_owned(),
            Node::Sequence(nodes) => {
                let nodes: Vec<String> = nodes.iter().map(|node| self.terminal(node)).collect();
                format!("({})", nodes.join(" "))
            }
            Node::Choice(nodes) => {
                let nodes: Vec<String> = nodes.iter().map(|node| self.terminal(node)).collect();
                format!("({})", nodes.join(" | "))
            }
            Node::Repeat(node, least, most) => repeat(&self.terminal(node), *least, *most),
        }
    }

    /// Something with rules in it, as it stands in a rule. What is regular in it becomes terminals of their own.
    fn body(&mut self, node: &Node) -> String {
        if self.is_regular(node) {
            return self.new_terminal(&[node]);
        }
        match node {
            Node::Literal(_) | Node::Class(..) => unreachable!("it is regular"),
            Node::Reference(name, _) => self.reference(self.names[name.as_str()]),
            Node::Sequence(nodes) => {
                let mut parts = Vec::new();
                for nodes in nodes.chunk_by(|a, b| self.is_regular(a) && self.is_regular(b)) {
                    let nodes: Vec<&Node> = nodes.iter().collect();
                    parts.push(match self.is_regular(nodes[0]) {
                        true => nodes,
                        false => vec![nodes[0]],
                    });
                }
                let parts: Vec<String> = parts
                    .into_iter()
                    .map(|nodes| match self.is_regular(nodes[0]) {
                        true => self.new_terminal(&nodes),
                        false => self.body(nodes[0]),
                    })
                    .collect();
                format!("({})", parts.join(" "))
            }
            Node::Choice(nodes) => {
                // All choices that are regular are one.
                let (regular, others): (Vec<&Node>, Vec<&Node>) =
                    nodes.iter().partition(|node| self.is_regular(node));
                let mut parts = Vec::new();
                if !regular.is_empty() {
                    let choices: Vec<String> =
                        regular.iter().map(|node| self.terminal(node)).collect();
                    parts.push(self.put_terminal(&choices.join(" | ")));
                }
                parts.extend(others.into_iter().map(|node| self.body(node)));
                format!("({})", parts.join(" | "))
            }
            Node::Repeat(node, least, most) => repeat(&self.body(node), *least, *most),
        }
    }

    fn new_terminal(&mut self, sequence: &[&Node]) -> String {
        let parts: Vec<String> = sequence.iter().map(|node| self.terminal(node)).collect();
        self.put_terminal(&parts.join(" "))
    }

    fn put_terminal(&mut self, body: &str) -> String {
        let name = format!("T{}", self.terminals);
        self.terminals += 1;
        let _ = writeln!(self.text, "{name}: {body}");
        name
    }
}

fn repeat(what: &str, least: u32, most: Option<u32>) -> String {
    match (least, most) {
        (0, None) => format!("({what})*"),
        (1, None) => format!("({what})+"),
        (0, Some(1)) => format!("({what})?"),
        (least, None) => format!("({what}){{{least},}}"),
        (least, Some(most)) => format!("({what}){{{least},{most}}}"),
    }
}

/// A character in a regular expression, whatever it means there otherwise.
fn in_regex(character: char) -> String {
    match character.is_ascii_alphanumeric() {
        true => character.to_string(),
        false => format!("\\x{{{:X}}}", u32::from(character)),
    }
}
