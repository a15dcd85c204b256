//! The environment that templates are rendered in: Jinja2, as transformers sets it up for chat templates.
//!
//! Blocks are trimmed, loops have `break` and `continue`, nothing is escaped, and there are `raise_exception`, `strftime_now`
//! and a `tojson` of its own. A template may come from anywhere: it sees what it is given and nothing else, and the work that it
//! may do is limited.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};

use super::python;

/// The work that one rendering may do, in instructions of the template and pieces of 64 bytes: some seconds of it.
const FUEL: u64 = 50_000_000;

/// What `raise_exception` was called with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub String);

/// An environment without a template.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    // The delimiters are the usual ones, which are valid.
    environment.set_syntax(syntax.unwrap_or_default());
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Number if !value.is_integer() => out
            .write_str(&python::float(f64::try_from(value.clone())?))
            .map_err(|_| Error::from(ErrorKind::WriteFailure)),
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", python::tojson);
    environment.add_filter("string", |value: Value| match value.kind() {
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value).map(python::float).map(Value::from)
        }
        _ if value.is_safe() => Ok(value),
        _ => Ok(Value::from(value.to_string())),
    });
    environment.add_filter("trim", |text: String, chars: Option<String>| {
        let goes = |c: char| {
            chars
                .as_ref()
                .map_or(python::is_space(c), |chars| chars.contains(c))
        };
        text.trim_matches(goes).to_owned()
    });
    environment.add_filter("int", python::int);
    environment.add_filter("float", python::to_float);
    environment.add_test("iterable", python::is_iterable);
    environment.add_test("sequence", python::is_sequence);
    environment.add_test("number", python::is_number);
    environment.add_test("callable", python::is_callable);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<Value, Error> {
            let raised = Raised(message.clone());
            Err(Error::new(ErrorKind::InvalidOperation, message).with_source(raised))
        },
    );
    environment
}

/// The source of a template as the engine takes it: with plain line ends, and with `{% generation %}`, which marks for transformers
/// what the model wrote, as a scope of its own, which is all that it is for a reader.
pub(super) fn source(text: &str) -> String {
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let mut result = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        result.push_str(before);
        rest = tag;
        let name = tag.trim_start_matches(['-', '+']).trim_start();
        for (theirs, ours) in [("generation", "with"), ("endgeneration", "endwith")] {
            if let Some(behind) = name.strip_prefix(theirs)
                && behind
                    .trim_start()
                    .trim_start_matches(['-', '+'])
                    .starts_with("%}")
            {
                result.push_str(&tag[..tag.len() - name.len()]);
                result.push_str(ours);
                rest = behind;
                break;
            }
        }
    }
    result.push_str(rest);
    result
}
