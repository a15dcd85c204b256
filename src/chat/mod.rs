//! Chat templates: from messages to the text and the tokens that a model was trained on, and from its answer back to reasoning, text
//! and calls of tools.
//!
//! ```
//! use flapjack::chat::{ChatOptions, ChatTemplate, ChatTokens, Message};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let template = ChatTemplate::builtin("chatml").expect("there is one of this name");
//! let messages = [Message::system("Be brief."), Message::user("Why is the sky blue?")];
//! let prompt = template.render(&messages, &ChatOptions::default(), &ChatTokens::default())?;
//! assert_eq!(
//!     prompt.text(),
//!     "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
//! );
//! # Ok(())
//! # }
//! ```
//!
//! A template is a program in Jinja that comes with a model: in its GGUF file, or in files of the hub beside it. It is rendered as
//! transformers renders it with Jinja2, and the tests hold it to the letter against that. Two things are more than rendering:
//!
//! - What a template writes is read with its control tokens, what somebody else wrote never is: a message with `<|im_end|>` in it
//!   ends no turn. See `marks`.
//! - Messages in OpenAI's form are fitted to what a template can read: arguments of tools as an object or as text, content in parts
//!   or as one text.
//!
//! | file | what it does |
//! | --- | --- |
//! | `message`, `options` | what goes in |
//! | `template` | templates, and rendering them |
//! | `sources`, `builtin` | where templates come from: GGUF metadata, files, our own few by name |
//! | `jinja`, `python` | the environment that they are rendered in |
//! | `marks` | telling what a user wrote from what the template wrote |
//! | `rendered` | what comes out, as text and as tokens |
//! | `ends` | the tokens that end an answer |
//! | `answer` | the answer taken apart: reasoning, text, calls |
//! | `error` | the errors |
//!
//! Sources: "Chat templates" in the documentation of transformers; the documentation of Jinja2; OpenAI's reference of the chat
//! completions API, for messages and calls of tools.

mod answer;
mod builtin;
mod ends;
mod error;
mod jinja;
mod marks;
mod message;
mod options;
mod python;
mod rendered;
mod sources;
mod template;

pub(crate) use answer::show_markers;
pub use answer::{AnswerParser, AnswerStyle, Piece, Tags, ToolStyle};
pub use builtin::names as builtin_names;
pub use ends::generation_config_ends;
pub use error::ChatError;
pub use jiff::civil::DateTime;
pub use marks::ChatTokens;
pub use message::{Content, FunctionCall, Message, ToolCall};
pub use options::ChatOptions;
pub use rendered::Rendered;
pub use template::ChatTemplate;
