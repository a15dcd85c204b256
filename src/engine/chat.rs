//! The engine's part in conversations: the model's chat template, prompts by it, and the tokens that end an answer.

use std::sync::Arc;

use super::{Engine, EngineError, Notice};
use crate::chat::{
    self, AnswerStyle, ChatError, ChatOptions, ChatTemplate, ChatTokens, Message, Rendered,
};
use crate::gguf::GgufFile;
use crate::tokenize::Tokenizer;

/// The chat template of a model, and what it must know of its tokens.
#[derive(Debug)]
pub(super) struct Chat {
    /// `None` if the model has none; the error where it cannot be used.
    template: Result<Option<Arc<ChatTemplate>>, Arc<ChatError>>,
    tokens: ChatTokens,
}

impl Default for Chat {
    fn default() -> Self {
        Self {
            template: Ok(None),
            tokens: ChatTokens::default(),
        }
    }
}

impl Chat {
    /// The template of a file, or of the folder that it is in; the tokenizer is told where answers end by it.
    pub(super) fn of(file: &GgufFile, tokenizer: &mut Tokenizer) -> Self {
        let mut chat = Self {
            template: match ChatTemplate::of_model(file) {
                Ok(template) => Ok(template.map(Arc::new)),
                Err(error) => Err(Arc::new(error)),
            },
            tokens: ChatTokens::of(tokenizer),
        };
        if let Some(folder) = file.path().parent() {
            for id in chat::generation_config_ends(folder) {
                tokenizer.add_end(id);
            }
        }
        chat.prepare(tokenizer);
        chat
    }

    /// What is wrong with the template, if something is.
    pub(super) fn notice(&self) -> Option<Notice> {
        let error = self.template.as_ref().err()?;
        let problem = error.to_string();
        Some(Notice::ChatTemplate { problem })
    }

    /// Has the tokenizer stop where the template ends an answer, and show what tells the parts of an answer from each other.
    fn prepare(&mut self, tokenizer: &mut Tokenizer) {
        if let Ok(Some(template)) = &self.template {
            if let Some(id) = template.end_of_turn(&self.tokens, tokenizer) {
                tokenizer.add_end(id);
            }
            chat::show_markers(tokenizer);
        }
    }
}

impl Engine {
    /// The chat template of the model: the one of its file, or else of the files of the hub beside it, or the one that was
    /// [set](Self::set_chat_template).
    ///
    /// # Errors
    /// [`ChatError::NoTemplate`] if there is none, and other errors if there is one that cannot be used.
    pub fn chat_template(&self) -> Result<&ChatTemplate, EngineError> {
        match &self.chat.template {
            Ok(Some(template)) => Ok(template),
            Ok(None) => Err(ChatError::NoTemplate.into()),
            Err(error) => Err(EngineError::Chat(error.clone())),
        }
    }

    /// The chat template, for whoever needs it elsewhere; `None` if there is none that can be used.
    pub fn shared_chat_template(&self) -> Option<Arc<ChatTemplate>> {
        self.chat.template.as_ref().ok()?.clone()
    }

    /// Takes another chat template in place of the model's own. Generation stops where it ends a turn, too.
    ///
    /// # Panics
    /// If the tokenizer has been [shared](Self::shared_tokenizer): others would not know of that end.
    pub fn set_chat_template(&mut self, template: ChatTemplate) {
        self.chat.template = Ok(Some(Arc::new(template)));
        self.notices
            .retain(|notice| !matches!(notice, Notice::ChatTemplate { .. }));
        if let Some(tokenizer) = &mut self.tokenizer {
            let tokenizer = Arc::get_mut(tokenizer).expect("the tokenizer is not shared yet");
            self.chat.prepare(tokenizer);
        }
    }

    /// What the chat template makes of a conversation, as text.
    ///
    /// # Errors
    /// If there is no template, or it refuses the messages or fails on them.
    pub fn chat_text(
        &self,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<Rendered, EngineError> {
        let template = self.chat_template()?;
        Ok(template.render(messages, options, &self.chat.tokens)?)
    }

    /// The tokens of a conversation, for [`generate_behind`](Self::generate_behind): the answer comes behind them.
    ///
    /// ```no_run
    /// use flapjack::chat::{ChatOptions, Message};
    /// use flapjack::engine::{Engine, GenerateOptions, OpenOptions};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let engine = Engine::open("model.gguf", OpenOptions::default())?;
    /// let messages = [Message::system("Be brief."), Message::user("What is the capital of France?")];
    /// let prompt = engine.chat_prompt(&messages, &ChatOptions::default())?;
    /// let mut sequence = engine.sequence();
    /// for piece in engine.generate_behind(&mut sequence, prompt, &GenerateOptions::default())? {
    ///     print!("{}", piece?);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// If there is no template, or it refuses the messages or fails on them, or the text cannot be encoded.
    pub fn chat_prompt(
        &self,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<Vec<u32>, EngineError> {
        let rendered = self.chat_text(messages, options)?;
        Ok(rendered.encode(self.tokenizer()?)?)
    }

    /// How the model writes its reasoning and its calls of tools, according to the chat template.
    ///
    /// # Errors
    /// If there is no template.
    pub fn answer_style(&self) -> Result<AnswerStyle, EngineError> {
        Ok(AnswerStyle::of(self.chat_template()?))
    }
}
