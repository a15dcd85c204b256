//! The errors of chat templates.

use std::io;
use std::path::PathBuf;

use super::builtin;
use super::jinja::Raised;

use crate::gguf::GgufError;

/// Why there is no template, or why it does not render a conversation.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    #[error("the model has no chat template")]
    NoTemplate,
    #[error("there is no chat template {name:?}; there are {}", known.join(", "))]
    NoSuchTemplate { name: String, known: Vec<String> },
    #[error("{path} is no chat template: {problem}", path = path.display())]
    NotATemplate { path: PathBuf, problem: String },
    #[error("{path} cannot be read: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Metadata(#[from] GgufError),
    /// The template is not in Jinja, or in more of it than we know.
    #[error("line {line} of {template} is not understood: {problem}")]
    Syntax {
        template: String,
        line: usize,
        problem: String,
    },
    /// The template itself refuses the conversation: the words are its own.
    #[error("the chat template refuses these messages: {message}")]
    Refused { message: String },
    /// The template calls a function, a filter, a test or a method that we do not have.
    #[error("line {line} of {template} uses what is not there: {problem}")]
    Unknown {
        template: String,
        line: usize,
        problem: String,
    },
    /// The template does not get on with these messages.
    #[error("line {line} of {template} fails: {problem}")]
    Failed {
        template: String,
        line: usize,
        problem: String,
    },
    #[error("{template} does not come to an end: it was stopped after the work of some seconds")]
    Endless { template: String },
    #[error("a part of the type {kind:?} cannot be read: this model reads text")]
    Part { kind: String },
    #[error("there is no message to continue")]
    NothingToContinue,
    #[error(
        "the message that is to be continued does not appear in what the chat template made of it"
    )]
    LostMessage,
    #[error(
        "the text uses all characters of the private use area, and none is left to mark it with"
    )]
    NoMark,
}

impl ChatError {
    /// What the template engine says.
    pub(super) fn from_jinja(template: &str, error: &minijinja::Error) -> Self {
        use minijinja::ErrorKind as Kind;
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(error) = cause {
            if let Some(Raised(message)) = error.downcast_ref() {
                return Self::Refused {
                    message: message.clone(),
                };
            }
            cause = error.source();
        }
        let template = template.to_owned();
        let line = error.line().unwrap_or(0);
        let detail = error.detail().unwrap_or_default();
        let problem = match (error.kind(), detail) {
            (Kind::SyntaxError, detail) if !detail.is_empty() => detail.to_owned(),
            (kind, "") => kind.to_string(),
            (kind, detail) => format!("{kind}: {detail}"),
        };
        match error.kind() {
            Kind::SyntaxError | Kind::BadEscape => Self::Syntax {
                template,
                line,
                problem,
            },
            Kind::UnknownFilter
            | Kind::UnknownFunction
            | Kind::UnknownMethod
            | Kind::UnknownTest => Self::Unknown {
                template,
                line,
                problem,
            },
            Kind::OutOfFuel => Self::Endless { template },
            _ => Self::Failed {
                template,
                line,
                problem,
            },
        }
    }

    /// The error about a name that is none of our own templates.
    pub(super) fn no_builtin(name: &str) -> Self {
        Self::NoSuchTemplate {
            name: name.to_owned(),
            known: builtin::names().map(str::to_owned).collect(),
        }
    }
}
