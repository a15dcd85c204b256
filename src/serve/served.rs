//! What handlers know of a model that is served.

use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use serde_json::{Value, json};

use super::error::ApiError;
use super::{ServeModel, ServeOptions};
use crate::chat::{
    AnswerStyle, ChatOptions, ChatTemplate, ChatTokens, Message, Rendered, ToolStyle,
};
use crate::engine::{Engine, EngineError, Event, ModelReport, PruneReport, SparseOptions};
use crate::generate::{Grammar, GrammarCompiler, GrammarError, SamplerConfig};
use crate::model::Config;
use crate::prune::sparse::Allocate;
use crate::tokenize::Tokenizer;

/// A model, as handlers know it; the worker has the model itself.
pub(super) struct Model {
    pub name: String,
    pub tokenizer: Arc<Tokenizer>,
    /// `None` for a model that only completes text.
    pub template: Option<Arc<ChatTemplate>>,
    /// What the template must know of the tokens.
    tokens: ChatTokens,
    /// How the model writes what is not plain text.
    pub style: AnswerStyle,
    /// What stands before conversations without a system message.
    system: Option<String>,
    /// How tokens are chosen where a request does not say.
    pub sampling: SamplerConfig,
    /// Tokens that prompt and answer may have together.
    pub context: usize,
    pub trained_context: usize,
    /// As `general.architecture` names it.
    pub architecture: &'static str,
    pub vocabulary: usize,
    pub embedding_length: usize,
    /// Numbers of columns that projections have, as the file states them.
    columns: Vec<usize>,
    head_dim: usize,
    /// What answers by a grammar are made with, from the first one on.
    grammars: OnceLock<Result<GrammarCompiler, GrammarError>>,
    pub state: RwLock<ModelState>,
}

/// What pruning changes.
#[derive(Debug, Clone)]
pub(super) struct ModelState {
    pub report: ModelReport,
    pub pruned: Option<Box<PruneReport>>,
    /// Bytes of the weights that a generated token reads.
    pub token_bytes: usize,
    /// How far pruning is that is under way; `None` where there is none.
    pub under_way: Option<Event>,
}

impl ModelState {
    pub fn of(engine: &Engine) -> Self {
        Self {
            report: engine.report(),
            pruned: engine.pruned().cloned().map(Box::new),
            token_bytes: engine.model().bytes_per_token(),
            under_way: None,
        }
    }
}

impl Model {
    /// # Errors
    /// If the model has no tokenizer.
    pub fn of(model: &ServeModel, options: &ServeOptions) -> Result<Self, EngineError> {
        let engine = &model.engine;
        let config = &engine.model().config;
        let tokenizer = engine.shared_tokenizer()?;
        let template = engine.shared_chat_template();
        Ok(Self {
            name: model.name.clone(),
            tokens: ChatTokens::of(&tokenizer),
            style: template.as_deref().map(AnswerStyle::of).unwrap_or_default(),
            tokenizer,
            template,
            system: model.system.clone(),
            sampling: model.sampling.clone(),
            context: options.context.unwrap_or(config.context_length),
            trained_context: config.context_length,
            architecture: config.architecture.name(),
            vocabulary: config.vocabulary,
            embedding_length: config.embedding_length,
            columns: columns(config),
            head_dim: config.head_dim,
            grammars: OnceLock::new(),
            state: RwLock::new(ModelState::of(engine)),
        })
    }

    /// Refuses single weights that cannot go by this pattern, before the model that runs is given up for it.
    ///
    /// # Errors
    /// If groups leave no choice that curves could make, or do not fill rows, also of any number of heads where `ratio` removes some.
    pub fn check_sparse(&self, sparse: SparseOptions, ratio: f64) -> Result<(), ApiError> {
        let pattern = sparse.sparsity.pattern;
        let group = pattern.group();
        if group > 1 && sparse.allocate == Allocate::Curves {
            let words = format!(
                "{pattern} takes as many weights of every group, and has nothing to share out by curves"
            );
            return Err(ApiError::field("allocate", words));
        }
        let head = Some(self.head_dim).filter(|_| ratio > 0.0);
        let mut columns = self.columns.iter().copied().chain(head);
        match columns.find(|columns| !columns.is_multiple_of(group)) {
            None => Ok(()),
            Some(columns) => Err(ApiError::field(
                "sparse",
                format!("groups of {group} columns do not fill {columns}, which this model has"),
            )),
        }
    }

    pub fn state(&self) -> ModelState {
        self.state
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Changes the state.
    pub fn set_state(&self, change: impl FnOnce(&mut ModelState)) {
        change(&mut self.state.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// A conversation as the model's template writes it.
    ///
    /// # Errors
    /// If the model has no template, or it refuses the messages.
    pub fn render(
        &self,
        messages: &[Message],
        options: &ChatOptions,
    ) -> Result<Rendered, ApiError> {
        let template = self.template.as_deref().ok_or_else(|| {
            ApiError::invalid(
                "this model has no chat template; use /v1/completions, or start the server with one",
            )
        })?;
        let mut all = Vec::new();
        let has_own = messages.iter().any(|message| message.role == "system");
        all.extend(self.system.iter().filter(|_| !has_own).map(Message::system));
        all.extend_from_slice(messages);
        template
            .render(&all, options, &self.tokens)
            .map_err(|error| ApiError::field("messages", error.to_string()))
    }

    /// The tokens of a text, on a thread where that may take its time. `add_special` puts those around it that begin and end texts,
    /// and `parse_special` takes control tokens that it spells as such.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub async fn encode(
        &self,
        text: String,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<u32>, ApiError> {
        let tokenizer = self.tokenizer.clone();
        aside(move || match (add_special, parse_special) {
            (true, false) => tokenizer.encode_prompt(&text),
            (false, false) => tokenizer.encode(&text),
            (_, true) => {
                let mut tokens = tokenizer.encode_special(&text, None)?;
                if let Some(bos) = tokenizer
                    .bos()
                    .filter(|_| add_special && tokenizer.adds_bos())
                    && tokens.first() != Some(&bos)
                {
                    tokens.insert(0, bos);
                }
                if add_special && tokenizer.adds_eos() {
                    tokens.extend(tokenizer.eos());
                }
                Ok(tokens)
            }
        })
        .await?
        .map_err(|error| ApiError::invalid(error.to_string()))
    }

    /// The tokens of a chat as its template has written it.
    pub async fn tokens_of(&self, rendered: Rendered) -> Result<Vec<u32>, ApiError> {
        let tokenizer = self.tokenizer.clone();
        aside(move || rendered.encode(&tokenizer))
            .await?
            .map_err(|error| ApiError::invalid(error.to_string()))
    }

    /// # Errors
    /// If a token is not in the vocabulary.
    pub fn check_tokens(&self, tokens: &[u32]) -> Result<(), ApiError> {
        let vocabulary = self.vocabulary;
        match tokens.iter().find(|token| **token as usize >= vocabulary) {
            Some(token) => Err(ApiError::invalid(format!(
                "there is no token {token}; the vocabulary has {vocabulary}"
            ))),
            None => Ok(()),
        }
    }

    fn grammars(&self) -> Result<&GrammarCompiler, ApiError> {
        let made = self
            .grammars
            .get_or_init(|| GrammarCompiler::new(&self.tokenizer));
        made.as_ref()
            .map_err(|error| ApiError::invalid(error.to_string()))
    }

    /// An answer that follows a schema.
    pub fn json_schema(&self, schema: &Value) -> Result<Grammar, ApiError> {
        let made = self.grammars()?.json_schema(&schema.to_string());
        made.map_err(|error| ApiError::field("response_format", error.to_string()))
    }

    /// An answer that follows a grammar.
    pub fn grammar(&self, text: &str) -> Result<Grammar, ApiError> {
        let made = self.grammars()?.grammar(text);
        made.map_err(|error| ApiError::field("grammar", error.to_string()))
    }

    /// An answer that is a call of one of these tools, in the model's own way to write that.
    pub fn tool_call(&self, tools: &[Value]) -> Result<Grammar, ApiError> {
        let Some(style) = self.style.tools else {
            return Err(ApiError::field(
                "tool_choice",
                "it is not known how this model calls tools, so that none can be required",
            ));
        };
        let arguments = match style {
            ToolStyle::Llama => "parameters",
            ToolStyle::Hermes | ToolStyle::Mistral => "arguments",
        };
        let call = |tool: &Value| {
            let any = json!({ "type": "object" });
            let parameters = tool.pointer("/function/parameters").unwrap_or(&any);
            json!({
                "type": "object",
                "properties": {
                    "name": { "const": tool.pointer("/function/name") },
                    arguments: parameters,
                },
                "required": ["name", arguments],
                "additionalProperties": false,
            })
        };
        let calls: Vec<Value> = tools.iter().map(call).collect();
        let json = json!({ "anyOf": calls });
        let lark = match style {
            ToolStyle::Hermes => {
                format!("start: \"<tool_call>\\n\" call \"\\n</tool_call>\"\ncall: %json {json}\n")
            }
            ToolStyle::Llama => format!("start: %json {json}\n"),
            ToolStyle::Mistral => {
                format!("start: \"[TOOL_CALLS] [\" call \"]\"\ncall: %json {json}\n")
            }
        };
        let made = self.grammars()?.grammar(&lark);
        made.map_err(|error| ApiError::field("tools", error.to_string()))
    }
}

/// Numbers of columns that projections have, as the file states them.
fn columns(config: &Config) -> Vec<usize> {
    let heads = config.heads.iter().map(|heads| heads * config.head_dim);
    let channels = config.channels.iter().copied();
    let embedding = [config.embedding_length];
    embedding.into_iter().chain(heads).chain(channels).collect()
}

/// Does work that takes a while, off the thread on which all requests are handled.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| ApiError::internal("the server has dropped this work"))
}
