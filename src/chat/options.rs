//! How a conversation is rendered.

use jiff::civil::DateTime;
use serde_json::{Map, Value};

/// How a conversation is rendered.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatOptions {
    /// Whether what begins an answer stands at the end. It does not if the last message is continued.
    pub add_generation_prompt: bool,
    /// Whether the text ends with the last message's own text, so that the model goes on with it.
    pub continue_final_message: bool,
    /// The tools that the model may call, in OpenAI's form (`{"type": "function", "function": {…}}`); mostly none.
    pub tools: Vec<Value>,
    /// Documents for templates that can read them, with `title` and `text`; mostly none.
    pub documents: Vec<Value>,
    /// The local time that templates ask for; `None` for the clock's.
    pub now: Option<DateTime>,
    /// Which of a model's templates is used; `None` for the one for tools where there are both, and else for the default one.
    pub template: Option<String>,
    /// Other variables that the template knows, such as `enable_thinking`.
    pub variables: Map<String, Value>,
}

impl Default for ChatOptions {
    fn default() -> Self {
        Self {
            add_generation_prompt: true,
            continue_final_message: false,
            tools: Vec::new(),
            documents: Vec::new(),
            now: None,
            template: None,
            variables: Map::new(),
        }
    }
}
