//! The tokens that end an answer.

use std::path::Path;

use serde_json::Value as Json;

use super::{ChatTemplate, ChatTokens};
use crate::tokenize::Tokenizer;

/// The tokens at which generation stops according to `generation_config.json` in a model's folder: those of its `eos_token_id`, which
/// is an id or a list of them. A file that is not there, or cannot be read, names none.
pub fn generation_config_ends(folder: &Path) -> Vec<u32> {
    let text = std::fs::read(folder.join("generation_config.json")).unwrap_or_default();
    let json: Json = serde_json::from_slice(&text).unwrap_or_default();
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match json.get("eos_token_id") {
        Some(Json::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

impl ChatTemplate {
    /// The control token that the template writes behind an answer, blanks aside; `None` if it writes none. An answer that comes from
    /// the model ends there.
    pub fn end_of_turn(&self, tokens: &ChatTokens, tokenizer: &Tokenizer) -> Option<u32> {
        let behind = self.behind_answer(tokens)?;
        let behind = behind.trim_start();
        let ends = tokenizer
            .controls()
            .filter(|(text, _)| behind.starts_with(text));
        ends.max_by_key(|(text, _)| text.len()).map(|(_, id)| id)
    }
}
