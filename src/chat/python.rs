//! What templates expect of Python's own types, where `minijinja` and its `pycompat` do otherwise or nothing: whitespace, methods
//! of strings, JSON as `json.dumps` writes it.

use std::fmt::Write;

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

/// The variable that holds the mark (see `marks`), where there is one: it stays as it is wherever texts are written in another way.
pub(super) const MARK: &str = "flapjack_mark";

/// How deep what is written as JSON may be nested, so that no template fills the stack.
const MAX_DEPTH: usize = 200;

/// Whether Python's `str.isspace` holds of a character: four separators more than in Unicode's property.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

/// `str.strip`.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// A method that a value has in Python and not in Jinja: ours, or else that of `pycompat`.
pub(super) fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, name, args)
    {
        return result;
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

/// `None` for a method that is as `pycompat` has it.
fn string_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match name {
        "strip" | "lstrip" | "rstrip" => strip_method(text, name, args),
        "split" | "rsplit" => split_method(text, name == "rsplit", args),
        "splitlines" => splitlines(text, args),
        "removeprefix" => from_args(args)
            .map(|(prefix,): (&str,)| Value::from(text.strip_prefix(prefix).unwrap_or(text))),
        "removesuffix" => from_args(args)
            .map(|(suffix,): (&str,)| Value::from(text.strip_suffix(suffix).unwrap_or(text))),
        "partition" => from_args(args).map(|(separator,): (&str,)| {
            let (before, after) = text.split_once(separator).unzip();
            triple(
                before.unwrap_or(text),
                before.map_or("", |_| separator),
                after.unwrap_or(""),
            )
        }),
        "rpartition" => from_args(args).map(|(separator,): (&str,)| {
            let (before, after) = text.rsplit_once(separator).unzip();
            triple(
                before.unwrap_or(""),
                before.map_or("", |_| separator),
                after.unwrap_or(text),
            )
        }),
        "index" => from_args(args).and_then(|(part,): (&str,)| match text.find(part) {
            Some(at) => Ok(Value::from(text[..at].chars().count())),
            None => Err(Error::new(
                ErrorKind::InvalidOperation,
                "substring not found",
            )),
        }),
        "isspace" => Ok(Value::from(!text.is_empty() && text.chars().all(is_space))),
        "zfill" | "ljust" | "rjust" | "center" => pad_method(text, name, args),
        "swapcase" => Ok(Value::from(swapcase(text))),
        "casefold" => Ok(Value::from(text.to_lowercase().replace('ß', "ss"))),
        _ => return None,
    })
}

fn triple(before: &str, separator: &str, after: &str) -> Value {
    Value::from(Tuple::from([before, separator, after].map(Value::from)))
}

fn strip_method(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (chars,): (Option<&str>,) = from_args(args)?;
    let goes = |c: char| chars.map_or(is_space(c), |chars| chars.contains(c));
    Ok(Value::from(match name {
        "lstrip" => text.trim_start_matches(goes),
        "rstrip" => text.trim_end_matches(goes),
        _ => text.trim_matches(goes),
    }))
}

/// `str.split(sep=None, maxsplit=-1)` and `str.rsplit`.
fn split_method(text: &str, from_right: bool, args: &[Value]) -> Result<Value, Error> {
    let (mut separator, mut most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    if separator.is_none() {
        separator = named.get("sep")?;
    }
    if most.is_none() {
        most = named.get("maxsplit")?;
    }
    named.assert_all_used()?;
    let most = most.and_then(|most| usize::try_from(most).ok());
    let parts: Vec<&str> = match separator.filter(|value| !value.is_none()) {
        None => split_at_space(text, most, from_right),
        Some(separator) => {
            let separator = separator.as_str().filter(|separator| !separator.is_empty());
            let Some(separator) = separator else {
                let problem = "the separator must be a string that is not empty";
                return Err(Error::new(ErrorKind::InvalidOperation, problem));
            };
            match (most, from_right) {
                (None, _) => text.split(separator).collect(),
                (Some(most), false) => text.splitn(most + 1, separator).collect(),
                (Some(most), true) => {
                    let mut parts: Vec<&str> = text.rsplitn(most + 1, separator).collect();
                    parts.reverse();
                    parts
                }
            }
        }
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

/// The words of a text; where there are more than `most` splits, the last word (of `rsplit` the first) has the rest.
fn split_at_space(text: &str, most: Option<usize>, from_right: bool) -> Vec<&str> {
    let most = most.unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest = if from_right {
        text.trim_end_matches(is_space)
    } else {
        text.trim_start_matches(is_space)
    };
    while !rest.is_empty() {
        if parts.len() == most {
            parts.push(if from_right {
                rest.trim_start_matches(is_space)
            } else {
                rest.trim_end_matches(is_space)
            });
            parts.retain(|part| !part.is_empty());
            break;
        }
        let (part, left) = match from_right {
            false => {
                let at = rest.find(is_space).unwrap_or(rest.len());
                (&rest[..at], rest[at..].trim_start_matches(is_space))
            }
            true => {
                let space = rest.char_indices().rev().find(|(_, c)| is_space(*c));
                let at = space.map_or(0, |(at, c)| at + c.len_utf8());
                (&rest[at..], rest[..at].trim_end_matches(is_space))
            }
        };
        parts.push(part);
        rest = left;
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// `str.splitlines(keepends=False)`.
fn splitlines(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep, named): (Option<bool>, Kwargs) = from_args(args)?;
    let keep = match keep {
        Some(keep) => keep,
        None => named.get::<Option<bool>>("keepends")?.unwrap_or(false),
    };
    named.assert_all_used()?;
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some((at, end)) = rest.char_indices().find(|(_, c)| ends_line(*c)) {
        let width = match rest[at..].starts_with("\r\n") {
            true => 2,
            false => end.len_utf8(),
        };
        lines.push(Value::from(&rest[..if keep { at + width } else { at }]));
        rest = &rest[at + width..];
    }
    if !rest.is_empty() {
        lines.push(Value::from(rest));
    }
    Ok(Value::from(lines))
}

fn ends_line(character: char) -> bool {
    matches!(
        character,
        '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
    )
}

/// Widths are limited, so that no template makes a text of gigabytes out of nothing.
fn pad_method(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (i64, Option<&str>) = from_args(args)?;
    let fill = fill.unwrap_or(if name == "zfill" { "0" } else { " " });
    let width = usize::try_from(width).unwrap_or(0).min(100_000);
    let missing = width.saturating_sub(text.chars().count());
    // As CPython has it: the odd character stands on the left if the width is odd.
    let left = match name {
        "ljust" => 0,
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let (sign, digits) = match name {
        "zfill" if text.starts_with(['+', '-']) => text.split_at(1),
        _ => ("", text),
    };
    let (left, right) = (fill.repeat(left), fill.repeat(missing - left));
    Ok(Value::from(format!("{sign}{left}{digits}{right}")))
}

fn swapcase(text: &str) -> String {
    let mut swapped = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_uppercase() {
            true => swapped.extend(character.to_lowercase()),
            false => swapped.extend(character.to_uppercase()),
        }
    }
    swapped
}

/// A float as Python writes it: the shortest digits that mean it, with an exponent below 1e-4 and from 1e16.
pub(super) fn float(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "nan"
        } else if value > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        _ => format!("{value:?}"),
    }
}

/// The filter `tojson` as transformers has it, which is `json.dumps(value, ensure_ascii=False)` with its options.
pub(super) fn tojson(
    state: &State,
    value: &Value,
    ascii: Option<Value>,
    indent: Option<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let option = |given: Option<Value>, name| match given {
        Some(value) => Ok(Some(value)),
        None => named.get::<Option<Value>>(name),
    };
    let ascii = option(ascii, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let sort = named
        .get::<Option<Value>>("sort_keys")?
        .is_some_and(|value| value.is_true());
    let indent = option(indent, "indent")?.filter(|value| !value.is_none());
    let separators = named.get::<Option<Value>>("separators")?;
    let separators = separators.filter(|value| !value.is_none());
    named.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(
                usize::try_from(i64::try_from(indent)?)
                    .unwrap_or(0)
                    .min(100),
            ),
        }),
    };
    let (between, colon) = match separators {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some(pair) => (
            pair.get_item_by_index(0)?.to_string(),
            pair.get_item_by_index(1)?.to_string(),
        ),
    };
    let mark = state
        .lookup(MARK)
        .and_then(|mark| mark.as_str()?.chars().next());
    let mut json = Json {
        text: String::new(),
        ascii,
        mark,
        sort,
        indent,
        between,
        colon,
        depth: 0,
    };
    json.value(value)?;
    state.consume_fuel(json.text.len() as u64 / 8)?;
    Ok(json.text)
}

/// The filter `int`: what cannot be read as a number is `default`.
pub(super) fn int(value: &Value, default: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    let named_default = named.get::<Option<Value>>("default")?;
    named.assert_all_used()?;
    let default = default.or(named_default).unwrap_or(Value::from(0));
    Ok(match value.as_str() {
        Some(text) => match (strip(text).parse::<i64>(), strip(text).parse::<f64>()) {
            (Ok(number), _) => Value::from(number),
            (_, Ok(number)) if number.is_finite() => Value::from(number.trunc() as i64),
            _ => default,
        },
        None if value.kind() == ValueKind::Bool => Value::from(i64::from(value.is_true())),
        None if value.is_integer() => value.clone(),
        None => match f64::try_from(value.clone()) {
            Ok(number) if number.is_finite() => Value::from(number.trunc() as i64),
            _ => default,
        },
    })
}

/// The filter `float`: what cannot be read as a number is `default`.
pub(super) fn to_float(
    value: &Value,
    default: Option<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let named_default = named.get::<Option<Value>>("default")?;
    named.assert_all_used()?;
    let number = match value.as_str() {
        Some(text) => strip(text).parse::<f64>().ok(),
        None => f64::try_from(value.clone()).ok(),
    };
    let default = || default.or(named_default).unwrap_or(Value::from(0.0));
    Ok(number.map_or_else(default, Value::from))
}

/// The test `iterable`.
pub(super) fn is_iterable(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    matches!(value.kind(), Iterable | Map | Seq | String | Undefined)
}

/// The test `sequence`: what has a length and items.
pub(super) fn is_sequence(value: &Value) -> bool {
    is_iterable(value)
}

/// The test `number`, which in Python holds of truth values too.
pub(super) fn is_number(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
}

/// The test `callable`.
pub(super) fn is_callable(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined)
}

/// JSON in the making, as Python's `json` writes it.
struct Json {
    text: String,
    ascii: bool,
    mark: Option<char>,
    sort: bool,
    /// What a level is indented by; `None` for one line.
    indent: Option<String>,
    between: String,
    colon: String,
    depth: usize,
}

impl Json {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self
                .text
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.text.push_str(&value.to_string()),
            ValueKind::Number => {
                let number = json_float(f64::try_from(value.clone())?);
                self.text.push_str(&number);
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
                self.items('[', ']', &items, |json, item| json.value(item))?;
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for key in value.try_iter()?.checked() {
                    let key = key?;
                    pairs.push((json_key(&key)?, value.get_item(&key)?));
                }
                if self.sort {
                    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.items('{', '}', &pairs, |json, (key, value)| {
                    json.string(key);
                    let colon = std::mem::take(&mut json.colon);
                    json.text.push_str(&colon);
                    json.colon = colon;
                    json.value(value)
                })?;
            }
            kind => {
                let problem = format!("a value of the kind {kind} cannot be written as JSON");
                return Err(Error::new(ErrorKind::BadSerialization, problem));
            }
        }
        Ok(())
    }

    fn items<T>(
        &mut self,
        open: char,
        close: char,
        items: &[T],
        write: impl Fn(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            let problem = "a value is nested too deeply to be written as JSON";
            return Err(Error::new(ErrorKind::BadSerialization, problem));
        }
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.text.push_str(&self.between);
            }
            self.new_line();
            write(self, item)?;
        }
        self.depth -= 1;
        if !items.is_empty() {
            self.new_line();
        }
        self.text.push(close);
        Ok(())
    }

    fn new_line(&mut self) {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            self.text.push_str(&indent.repeat(self.depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for character in text.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                c if c < ' ' || (self.ascii && c > '~' && self.mark != Some(c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string does not fail.
                        let _ = write!(self.text, "\\u{unit:04x}");
                    }
                }
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }
}

fn json_float(value: f64) -> String {
    match float(value).as_str() {
        "nan" => "NaN".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        number => number.to_owned(),
    }
}

/// A key of a dictionary as Python writes it: keys that are no strings become strings.
fn json_key(key: &Value) -> Result<String, Error> {
    Ok(match key.kind() {
        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.to_owned(),
        ValueKind::None => "null".to_owned(),
        ValueKind::Number if key.is_integer() => key.to_string(),
        ValueKind::Number => json_float(f64::try_from(key.clone())?),
        kind => {
            let problem = format!("a value of the kind {kind} cannot be a key in JSON");
            return Err(Error::new(ErrorKind::BadSerialization, problem));
        }
    })
}
