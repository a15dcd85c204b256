//! Text behind a prompt.

use std::ffi::{c_char, c_int, c_void};
use std::ops::ControlFlow;
use std::ptr;

use super::model::{FlapjackModel, shared};
use super::shared::Shared;
use super::status::{Failure, FlapjackStatus, call};
use super::values::{Options, Plain, fill, fill_options, needed_text, options, text, texts};
use crate::engine::{Engine, GenerateOptions};
use crate::generate::{Finish, SamplerConfig, Timings};

/// Text as it becomes complete, of whole characters in UTF-8: `length` bytes, and a zero byte behind them. Anything but 0 ends the
/// answer. It is called on the thread that asks.
pub type FlapjackText =
    Option<unsafe extern "C" fn(text: *const c_char, length: usize, data: *mut c_void) -> c_int>;

/// How to generate. flapjack_generate_options_default() fills it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct FlapjackGenerateOptions {
    /// The size of this struct; filled by the function.
    pub size: usize,
    /// Tokens to generate at most.
    pub max_tokens: u64,
    /// The same seed gives the same text.
    pub seed: u64,
    /// 0 always takes the most likely token.
    pub temperature: f32,
    /// Chooses among the most likely tokens that together have this probability; 1 for all.
    pub top_p: f32,
    /// Chooses among tokens of at least this share of the best one's probability; 0 for all.
    pub min_p: f32,
    /// Makes tokens of the recent text less likely; 1 for not.
    pub repetition_penalty: f32,
    /// Chooses among so many of the most likely tokens; 0 for all.
    pub top_k: u64,
    /// Texts that end the answer, and behind the last one NULL; NULL for none.
    pub stop: *const *const c_char,
    /// A JSON schema that the answer is held to; NULL for none.
    pub json_schema: *const c_char,
    /// In conversations, gets what a reasoning model thinks before it answers, with the same data as the answer; NULL to leave it
    /// out.
    pub on_reasoning: FlapjackText,
}

// SAFETY: numbers and pointers, the first a `usize`. C gives a function or NULL, which is `None`.
unsafe impl Plain for FlapjackGenerateOptions {}
// SAFETY: as above.
unsafe impl Options for FlapjackGenerateOptions {
    const FILLED_BY: &str = "flapjack_generate_options_default";
}

impl FlapjackGenerateOptions {
    fn new(size: usize, sampler: &SamplerConfig) -> Self {
        Self {
            size,
            max_tokens: GenerateOptions::default().max_tokens as u64,
            seed: sampler.seed,
            temperature: sampler.temperature,
            top_p: sampler.top_p,
            min_p: sampler.min_p,
            repetition_penalty: sampler.repetition_penalty,
            top_k: sampler.top_k as u64,
            stop: ptr::null(),
            json_schema: ptr::null(),
            on_reasoning: None,
        }
    }
}

/// Fills options for flapjack_generate() and flapjack_conversation_say() with what is recommended for the model; `model` may be NULL
/// for general defaults. `size` is the size of the options, as the caller knows it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_generate_options_default(
    model: *const FlapjackModel,
    options: *mut FlapjackGenerateOptions,
    size: usize,
) {
    call(|| {
        // SAFETY: as the module's documentation says, here and below.
        let defaults = match unsafe { shared(model) } {
            Ok(shared) => FlapjackGenerateOptions::new(size, &shared.sampler),
            Err(_) => FlapjackGenerateOptions::new(size, &SamplerConfig::default()),
        };
        unsafe { fill_options(options, size, &defaults) };
        Ok(())
    });
}

/// Why an answer ended.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlapjackFinish {
    /// The model ended it, or what the JSON schema asks for is complete.
    End = 0,
    /// It has as many tokens as were asked for.
    Length = 1,
    /// It came to a text that ends it.
    Stop = 2,
    /// The context is full.
    ContextFull = 3,
    /// A callback, or flapjack_cancel(), ended it.
    Stopped = 4,
}

impl From<Finish> for FlapjackFinish {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::EndOfText => Self::End,
            Finish::Length => Self::Length,
            Finish::StopString => Self::Stop,
            Finish::ContextFull => Self::ContextFull,
            Finish::Stopped => Self::Stopped,
        }
    }
}

/// An answer in numbers.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct FlapjackAnswer {
    /// Tokens of the prompt that were read. Of what was read for an earlier turn none are.
    pub prompt_tokens: u64,
    /// Tokens that were generated.
    pub tokens: u64,
    pub prompt_seconds: f64,
    pub seconds: f64,
    /// Messages of a conversation, from the oldest on, that the context has no more room for since this turn.
    pub left_out: u64,
    /// A number of FlapjackFinish.
    pub finish: i32,
    /// Always 0.
    pub reserved: i32,
}

// SAFETY: numbers.
unsafe impl Plain for FlapjackAnswer {}

impl FlapjackAnswer {
    pub(super) fn new(tokens: usize, finish: Finish, timings: &Timings, left_out: usize) -> Self {
        Self {
            prompt_tokens: timings.prompt_tokens as u64,
            tokens: tokens as u64,
            prompt_seconds: timings.prompt.as_secs_f64(),
            seconds: timings.generation.as_secs_f64(),
            left_out: left_out as u64,
            finish: FlapjackFinish::from(finish) as i32,
            reserved: 0,
        }
    }
}

/// Lets the model go on behind a text as it stands, and gives `on_text` what it writes. `options` may be NULL for what is recommended
/// for the model, `on_text` and `answer` for none; `size` is that of `*answer`, as the caller knows it. Each call begins anew;
/// flapjack_conversation_say() goes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_generate(
    model: *const FlapjackModel,
    prompt: *const c_char,
    options: *const FlapjackGenerateOptions,
    on_text: FlapjackText,
    data: *mut c_void,
    answer: *mut FlapjackAnswer,
    size: usize,
) -> FlapjackStatus {
    call(|| {
        // SAFETY: as the module's documentation says, here and below.
        let shared = unsafe { shared(model) }?;
        let prompt = unsafe { needed_text(prompt, "the prompt") }?;
        let engine = shared.take()?;
        let (options, _) = unsafe { generate_options(options, &engine, &shared) }?;
        let mut sequence = engine.sequence_with(shared.sequence)?;
        let mut sink = Sink::new(on_text, data);
        let mut generation = engine.generate(&mut sequence, prompt, &options)?;
        while let Some(text) = generation.step()? {
            if sink.take(&text).is_break() || shared.go_on().is_break() {
                break;
            }
        }
        let rest = generation.stop();
        let _ = sink.take(&rest);
        let generated = generation.generated().expect("the generation has ended");
        let (tokens, timings) = (generated.tokens.len(), &generated.timings);
        let numbers = FlapjackAnswer::new(tokens, generated.finish, timings, 0);
        unsafe { fill(answer, size, &numbers) };
        Ok(())
    })
}

/// Options for the engine, and what gets reasoning.
///
/// # Safety
/// As the module's documentation says of structs and texts.
pub(super) unsafe fn generate_options(
    given: *const FlapjackGenerateOptions,
    engine: &Engine,
    shared: &Shared,
) -> Result<(GenerateOptions, FlapjackText), Failure> {
    let defaults = FlapjackGenerateOptions::new(0, &shared.sampler);
    // SAFETY: as the caller promises, here and below.
    let given = unsafe { options(given, defaults) }?;
    let numbers = [
        ("temperature", given.temperature, 0.0..=100.0),
        ("top_p", given.top_p, 0.0..=1.0),
        ("min_p", given.min_p, 0.0..=1.0),
        ("repetition_penalty", given.repetition_penalty, 0.01..=100.0),
    ];
    for (name, value, range) in numbers {
        if !range.contains(&value) {
            let (low, high) = (range.start(), range.end());
            return Err(Failure::argument(format!(
                "{name} must be from {low} to {high}, and not {value}"
            )));
        }
    }
    let whole = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let schema = unsafe { text(given.json_schema, "the JSON schema") }?;
    let grammar = match schema {
        Some(schema) => {
            let grammar = engine.grammars()?.json_schema(schema);
            Some(grammar.map_err(|error| Failure::argument(error.to_string()))?)
        }
        None => None,
    };
    let options = GenerateOptions {
        max_tokens: whole(given.max_tokens),
        sampler: SamplerConfig {
            seed: given.seed,
            temperature: given.temperature,
            top_p: given.top_p,
            min_p: given.min_p,
            repetition_penalty: given.repetition_penalty,
            top_k: whole(given.top_k),
            ..shared.sampler.clone()
        },
        stop: unsafe { texts(given.stop, "a text that ends the answer") }?,
        grammar,
        ..GenerateOptions::default()
    };
    Ok((options, given.on_reasoning))
}

/// A function of C's for text, with its data.
pub(super) struct Sink {
    function: FlapjackText,
    data: *mut c_void,
    stopped: bool,
}

impl Sink {
    pub fn new(function: FlapjackText, data: *mut c_void) -> Self {
        Self {
            function,
            data,
            stopped: false,
        }
    }

    /// Hands a text on, unless there is none, or the function has said that it wants no more.
    pub fn take(&mut self, text: &str) -> ControlFlow<()> {
        if self.stopped {
            return ControlFlow::Break(());
        }
        let Some(function) = self.function.filter(|_| !text.is_empty()) else {
            return ControlFlow::Continue(());
        };
        // A zero byte is a character like others; whoever minds it looks at the length.
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        // SAFETY: as the module's documentation says of callbacks.
        self.stopped = unsafe { function(bytes.as_ptr().cast(), text.len(), self.data) } != 0;
        match self.stopped {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}
