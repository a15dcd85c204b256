//! The whole of flapjack behind one face: open a model, prune it, let it write, measure it, write it to a file.
//!
//! [`Engine`] owns a model with its tokenizer and its threads. What it is asked for is plain data ([`PruneOptions`] and
//! others), and so is what it reports ([`PruneReport`]). Everything long tells [`Events`] how far it is, and can be cancelled by them.
//!
//! | file | what it does |
//! | --- | --- |
//! | `prune` | pruning from options to report, in order: begin to read here |
//! | `needs` | what a profile must hold, in how much memory |
//! | `text` | where calibration text comes from |
//! | `collection` | a profile from the cache folder, or collected from a text |
//! | `profile` | a profile from a file; pruning by a profile |
//! | `target` | the ratio for a size, a speed, a perplexity |
//! | `bits` | smaller types, together with widths or by themselves |
//! | `sparse` | single weights, by themselves or after heads and channels |
//! | `mixture` | the text that models are calibrated on by default |
//! | `heal` | a short distillation behind pruning |
//! | `effect` | what pruning does to predictions |
//! | `comparison` | speeds of the pruned and the dense model, in turns |
//! | `cache` | profiles and outcomes of earlier runs |
//! | `chat` | the chat template, prompts by it, and where answers end |
//! | `conversation` | turns with a model, whose keys and values stay |
//! | `convert` | files in other types; importance matrices |
//! | `export` | the model as a file, with the record of how it was pruned |
//! | `sampling` | how a model wants to be sampled |
//! | `options`, `events`, `report`, `error` | what goes in and what comes out |
//! | `memory` | what fits in the memory that there is |
//! | `machine` | what the machine has |
//! | `sizes` | sizes as people write them |
//! | `synthetic` | small random models, for examples and tests |

mod bits;
mod cache;
mod chat;
mod collection;
mod comparison;
mod conversation;
mod convert;
mod effect;
mod effort;
mod error;
mod events;
mod export;
mod heal;
mod machine;
mod memory;
mod mixture;
mod needs;
mod options;
mod partial;
mod plans;
mod profile;
mod prune;
mod report;
mod sampling;
mod sizes;
mod sparse;
mod synthetic;
mod target;
mod text;
mod tuning;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

pub use crate::gguf::{MetadataWarning, Value as MetadataValue};
pub use crate::heal::{Budget, What};
pub use crate::progress::Cancelled;
pub use crate::prune::{Effect, EffectText, Found, HealEnd, Target};
pub use comparison::{SpeedComparison, Spread, Turns};
pub use conversation::{Conversation, OnStep, Reply};
pub use convert::{
    ConvertOptions, ConvertReport, FittingTypes, TensorReport, convert, read_importance,
};
pub use effect::{NONSENSE_RISE, NOTABLE_RISE};
pub use error::{CurvesBy, Doing, EngineError, NoSearch, OutOfReach, Unsuited};
pub use events::{Event, Events, Stage, ignore};
pub use machine::{InstructionSet, Machine, machine};
pub use options::{
    Cache, CalibrationOptions, GenerateOptions, HeadType, HealOptions, MethodOptions, OpenOptions,
    Pack, PruneOptions, SequenceOptions, SparseOptions, Tune,
};
pub use prune::Prepared;
pub use report::{
    CacheKind, CalibrationReport, CurvesReport, ExportReport, HealReport, LayerSnapshot,
    ModelReport, NoEffects, Notice, PlanSearchReport, ProfileFrom, PruneReport, SearchReport,
    Shortage, Snapshot, SparseReport, TypesReport,
};
pub use sampling::SamplingDefaults;
pub use synthetic::{SyntheticType, TINY, write_synthetic};
pub use text::{TextError, TextReader, TextSource};
pub use tuning::MeasuredReading;

pub use crate::files::TemporaryFile;
pub use cache::{
    CACHE_SIZE_VARIABLE, CacheContent, CacheEntry, CacheError, CacheFolder, Cleared,
    DEFAULT_CACHE_SIZE,
};
use chat::Chat;
pub use sizes::{UNITS, parse_size};

use crate::checkpoint;
use crate::eval::{self, Perplexity, PerplexityOptions, SpeedRun, SpeedTest};
use crate::generate::{
    GenerateError, Generation, GrammarCompiler, GrammarError, Loaded, Request, Scheduler, Sequence,
};
use crate::gguf::{GgufError, GgufFile};
use crate::hub::{self, Environment, HubError, Step};
#[cfg(doc)]
use crate::kernels::KV_BLOCK;
use crate::kernels::{Reading, Runtime};
use crate::model::{self, CacheType, KvCache, KvPool, Model, Shape};
use crate::tokenize::Tokenizer;

/// A model that is ready to run, with all that running and pruning it takes.
pub struct Engine {
    model: Model,
    /// `None` for a model that was made in memory.
    tokenizer: Option<Arc<Tokenizer>>,
    chat: Chat,
    runtime: Runtime,
    options: OpenOptions,
    cache: CacheFolder,
    /// Whether the model is that of a file, which can be opened again.
    has_file: bool,
    load_time: Duration,
    pack_time: Option<Duration>,
    /// What may be worth knowing about the file, and how it was opened.
    notices: Vec<Notice>,
    /// How the model wants to be sampled.
    sampling: SamplingDefaults,
    /// What compiles grammars, made when it is first needed.
    grammars: OnceLock<Result<GrammarCompiler, GrammarError>>,
    /// Whether some or all of the layers have been pruned.
    touched: bool,
    /// The number of the weights that keys and values are computed by: no other weights of this process have it.
    weights: u64,
    /// What pruning did; `None` before it is done, and where it broke off.
    pruned: Option<Box<PruneReport>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("model", &self.model.path())
            .field("options", &self.options)
            .field("touched", &self.touched)
            .finish_non_exhaustive()
    }
}

// ---- opening ----

impl Engine {
    /// Maps a GGUF file, or the safetensors files of a folder in Hugging Face's form ([`checkpoint`]), and makes it ready to run.
    ///
    /// # Errors
    /// If the file is no model that we run, its tokenizer is none that we know, or there are no threads to compute with.
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self, EngineError> {
        let path = path.as_ref();
        let runtime = runtime(&options)?;
        let cache = CacheFolder::new(options.cache.clone(), options.cache_size)?;
        let start = Instant::now();
        let file = checkpoint::open_with(path, &options.overrides)?;
        // What is no model has no tokenizer either, and that is not what is wrong with it.
        model::architecture(&file)?;
        let mut tokenizer = Tokenizer::from_gguf(&file)?;
        if let Some(json) = checkpoint::tokenizer_json(&file)? {
            tokenizer = tokenizer.with_encoder(file.path(), json)?;
        }
        let chat = Chat::of(&file, &mut tokenizer);
        let added = file.added().map(|key| Notice::KeyAdded { key: key.into() });
        let mut notices: Vec<Notice> = added.collect();
        notices.extend(chat.notice());
        let sampling = SamplingDefaults::read(&file, &mut notices);
        let model = Model::load(file)?;
        if tokenizer.vocab_size() > model.config.vocabulary {
            return Err(EngineError::Vocabulary {
                path: path.to_owned(),
                tokens: tokenizer.vocab_size(),
                embeddings: model.config.vocabulary,
            });
        }
        let load_time = start.elapsed();
        let mut engine = Self {
            load_time,
            tokenizer: Some(Arc::new(tokenizer)),
            chat,
            has_file: true,
            sampling,
            ..Self::of(model, runtime, cache, options)
        };
        engine.notices.extend(notices);
        engine.notice_metadata();
        engine.pack_as_opened();
        Ok(engine)
    }

    /// Opens a model that is given by its path or by a name, as [`find_model`] takes it; without one, the default model.
    ///
    /// # Errors
    /// Those of [`find_model`], [`default_model`] and [`Engine::open`].
    pub fn open_named(
        name: Option<&Path>,
        options: OpenOptions,
        events: &mut Events,
    ) -> Result<Self, EngineError> {
        let (path, notices) = match name {
            Some(name) => find_model(name, events)?,
            None => (default_model(events)?, Vec::new()),
        };
        let mut engine = Self::open(path, options)?;
        engine.notices.splice(0..0, notices);
        Ok(engine)
    }

    /// A model of this shape with random weights, in memory: for measuring speed at sizes that nobody wants to download. It
    /// has no tokenizer, so that it is calibrated on [`TextSource::Tokens`] only.
    ///
    /// # Errors
    /// If the memory or the threads are not to be had.
    ///
    /// # Panics
    /// If the widths are not whole blocks of the type.
    pub fn synthetic(
        shape: Shape,
        synthetic_type: SyntheticType,
        options: OpenOptions,
    ) -> Result<Self, EngineError> {
        let runtime = runtime(&options)?;
        let cache = CacheFolder::new(options.cache.clone(), options.cache_size)?;
        let start = Instant::now();
        let model = Model::synthetic(shape, synthetic_type.block_type(), &runtime)?;
        let load_time = start.elapsed();
        let mut engine = Self {
            load_time,
            ..Self::of(model, runtime, cache, options)
        };
        engine.pack_as_opened();
        Ok(engine)
    }

    fn of(model: Model, runtime: Runtime, cache: CacheFolder, options: OpenOptions) -> Self {
        Self {
            cache,
            model,
            tokenizer: None,
            notices: fewer_threads(&options, &runtime).into_iter().collect(),
            chat: Chat::default(),
            runtime,
            options,
            has_file: false,
            load_time: Duration::ZERO,
            pack_time: None,
            sampling: SamplingDefaults::default(),
            grammars: OnceLock::new(),
            touched: false,
            weights: new_weights(),
            pruned: None,
        }
    }

    /// Notices what of the metadata was passed over, or assumed.
    fn notice_metadata(&mut self) {
        let tokenizer = self.tokenizer.iter().flat_map(|t| t.warnings());
        let warnings = self.model.warnings.iter().chain(tokenizer);
        self.notices.extend(warnings.cloned().map(Notice::Metadata));
    }

    /// The model's file, mapped anew: packing and pruning rearrange the other map.
    fn file(&self) -> Result<GgufFile, GgufError> {
        checkpoint::open_with(self.model.path(), &self.options.overrides)
    }

    fn pack_as_opened(&mut self) {
        if self.options.pack == Pack::Auto {
            self.pack();
        }
    }

    /// Rearranges the weights in place, where the machine computes faster for it and has the memory, and finds out how they are read
    /// the fastest ([`OpenOptions::tune`]). Opening does this unless it is told not to.
    pub fn pack(&mut self) {
        if !self.runtime.kernels.prefers_packed() {
            return;
        }
        match memory::packing_shortage(&self.model) {
            Some(shortage) => self.notices.push(Notice::NotPacked(shortage)),
            None => {
                let start = Instant::now();
                self.model.pack(&self.runtime);
                self.model.narrow(&self.runtime);
                self.pack_time = Some(start.elapsed());
                if self.options.tune == Tune::Auto {
                    let reading = tuning::reading(&self.model, &self.runtime, &self.cache);
                    let reading = reading.unwrap_or_else(Reading::usual);
                    self.runtime.kernels = self.runtime.kernels.reading(reading);
                }
            }
        }
    }

    /// Narrows packed weights, behind what has changed or widened them; does nothing where weights are not packed.
    fn settle(&mut self) {
        if self.pack_time.is_some() {
            self.model.narrow(&self.runtime);
        }
    }

    /// Lets go of packed weights, which are then as they lie in the file, and take no memory of this process.
    fn unpack(&mut self) {
        self.model.forget_packing(&self.runtime);
        self.pack_time = None;
    }

    /// Opens the model's file again: the model is then as its file has it, whatever was done to it. Sequences of before cannot be used
    /// any more.
    ///
    /// # Errors
    /// [`EngineError::NoFile`] for a model that was made in memory; those of opening a file.
    pub fn reopen(&mut self) -> Result<(), EngineError> {
        self.must_have_file()?;
        self.model = Model::load(self.file()?)?;
        self.touched = false;
        self.weights = new_weights();
        self.pruned = None;
        self.pack_as_opened();
        Ok(())
    }

    /// Whether pruning has begun to change the model, and so may have broken off in the middle.
    pub fn is_touched(&self) -> bool {
        self.touched
    }

    /// Takes down that the weights are others than before.
    fn touch(&mut self) {
        self.touched = true;
        self.weights = new_weights();
    }

    /// The same model once more, as it was when it was opened, from a map of its own.
    fn load_again(&self) -> Result<Model, EngineError> {
        self.must_have_file()?;
        let mut model = Model::load(self.file()?)?;
        if self.options.pack == Pack::Auto
            && self.runtime.kernels.prefers_packed()
            && memory::packing_shortage(&model).is_none()
        {
            model.pack(&self.runtime);
        }
        Ok(model)
    }
}

/// A number that no weights have had.
fn new_weights() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn runtime(options: &OpenOptions) -> Result<Runtime, EngineError> {
    let processors = machine::processors();
    let threads = options.threads.unwrap_or(processors).min(processors);
    Ok(Runtime::new(threads)?)
}

/// Whether there are fewer threads than were asked for.
fn fewer_threads(options: &OpenOptions, runtime: &Runtime) -> Option<Notice> {
    let (asked, used) = (options.threads?, runtime.pool.threads());
    (used < asked).then_some(Notice::FewerThreads { asked, used })
}

/// The path of the default model, which is fetched first if it is not in the cache folder yet; see [`hub`].
///
/// # Errors
/// If it cannot be fetched or kept, or `events` cancels.
pub fn default_model(events: &mut Events) -> Result<PathBuf, EngineError> {
    hub::default_model_with(&mut |step| tell(step, events)).map_err(hub_error)
}

/// The path of a model that is given by its path, or by a name: a repository of the hub (`org/repo:Q4_K_M`), which is fetched first if
/// it is not in the Hugging Face cache yet, or a model of Ollama's or LM Studio's (`ollama:NAME`, `lmstudio:PUBLISHER/REPO`); see
/// [`hub::find`]. The notices say what was chosen.
///
/// # Errors
/// If there is no such model, or it cannot be fetched, or `events` cancels.
pub fn find_model(
    name: impl AsRef<Path>,
    events: &mut Events,
) -> Result<(PathBuf, Vec<Notice>), EngineError> {
    let environment = Environment::of_process();
    let name = name.as_ref();
    let found = hub::find(name, &environment, &mut |step| tell(step, events));
    let found = found.map_err(hub_error)?;
    let name = name.to_string_lossy();
    let chosen = found.chosen.map(|file| Notice::FileChosen {
        name: name.clone().into_owned(),
        file,
    });
    let unasked = found.unasked.map(|problem| Notice::HubSilent {
        name: name.clone().into_owned(),
        problem,
    });
    Ok((found.path, chosen.into_iter().chain(unasked).collect()))
}

/// Tells a step in providing a model file as an event.
fn tell(step: Step, events: &mut Events) -> ControlFlow<()> {
    let (stage, done, total) = match step {
        Step::Downloading { done, total } => (Stage::Downloading, done, total),
        Step::Waiting => (Stage::Waiting, 0, 0),
        Step::Unpacking { done, total } => (Stage::Unpacking, done, total),
        Step::Checking => (Stage::Checking, 0, 0),
        Step::Ready => return ControlFlow::Continue(()),
    };
    events(Event { stage, done, total })
}

fn hub_error(error: HubError) -> EngineError {
    match error {
        HubError::Cancelled(cancelled) => cancelled.into(),
        error => EngineError::Hub(Box::new(error)),
    }
}

// ---- looking ----

impl Engine {
    pub fn model(&self) -> &Model {
        &self.model
    }

    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// The tokenizer of the model's file.
    ///
    /// # Errors
    /// [`EngineError::NoTokenizer`] for a model that was made in memory.
    pub fn tokenizer(&self) -> Result<&Tokenizer, EngineError> {
        self.tokenizer.as_deref().ok_or(EngineError::NoTokenizer)
    }

    /// The same, for whoever needs it elsewhere.
    ///
    /// # Errors
    /// [`EngineError::NoTokenizer`] for a model that was made in memory.
    pub fn shared_tokenizer(&self) -> Result<Arc<Tokenizer>, EngineError> {
        self.tokenizer.clone().ok_or(EngineError::NoTokenizer)
    }

    /// What may be worth knowing about the file, and how it was opened.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// What was opened, as it is now.
    pub fn report(&self) -> ModelReport {
        ModelReport {
            path: self.model.path().to_owned(),
            layers: self.model.layers.len(),
            parameters: self.model.parameters(),
            bytes: self.model.bytes(),
            isa: self.runtime.kernels.isa().name(),
            threads: self.runtime.pool.threads(),
            load_time: self.load_time,
            pack_time: self.pack_time,
        }
    }

    /// What pruning did; `None` before it is done.
    pub fn pruned(&self) -> Option<&PruneReport> {
        self.pruned.as_deref()
    }

    /// The token that stands in front of every sequence, where the model wants one.
    fn bos(&self) -> Option<u32> {
        let tokenizer = self.tokenizer.as_ref()?;
        tokenizer.bos().filter(|_| tokenizer.adds_bos())
    }

    /// The fingerprint and the name of the model's file, which is mapped anew: packing has rearranged the other map. A model
    /// that was made in memory has no fingerprint.
    fn identity(&self) -> Result<(String, String), EngineError> {
        let name = hub::name_of_file(self.model.path());
        let fingerprint = match self.has_file {
            true => self.file()?.fingerprint(),
            false => String::new(),
        };
        Ok((fingerprint, name))
    }

    /// What of a cache makes sense for this model: one without a file cannot be known again.
    fn usable_cache(&self, cache: Cache) -> Cache {
        match self.has_file {
            true => cache,
            false => Cache::Nothing,
        }
    }

    fn must_be_dense(&self) -> Result<(), EngineError> {
        match self.touched {
            true => Err(EngineError::AlreadyPruned),
            false => Ok(()),
        }
    }

    fn must_have_file(&self) -> Result<(), EngineError> {
        match self.has_file {
            true => Ok(()),
            false => Err(EngineError::NoFile),
        }
    }
}

// ---- generating ----

impl Engine {
    /// How the model's makers recommend to sample from it. It is for whoever asks for text to follow it.
    pub fn sampling_defaults(&self) -> &SamplingDefaults {
        &self.sampling
    }

    /// What compiles grammars and JSON schemas, to which answers are then held.
    ///
    /// # Errors
    /// If the model has no tokenizer, or none that grammars can be used with.
    pub fn grammars(&self) -> Result<&GrammarCompiler, EngineError> {
        let tokenizer = self.tokenizer()?;
        let compiler = self
            .grammars
            .get_or_init(|| GrammarCompiler::new(tokenizer));
        let compiler = compiler.as_ref().map_err(Clone::clone);
        Ok(compiler.map_err(GenerateError::from)?)
    }

    /// An empty sequence, of as many positions as the model was trained for. It belongs to the model as it is now: one from
    /// before pruning cannot be used after.
    pub fn sequence(&self) -> Sequence {
        let context = self.model.config.context_length;
        Sequence::new(KvCache::new(&self.model, context))
    }

    /// What there is to know about a sequence before it is used: whether there is the memory for all of its positions, which is taken
    /// as they are filled.
    ///
    /// # Errors
    /// Those of [`Engine::sequence_with`].
    pub fn check_sequence(&self, options: SequenceOptions) -> Result<Option<Notice>, EngineError> {
        let pool = KvPool::new(&self.model, options.cache_type)?;
        let trained = self.model.config.context_length;
        memory::check_context(&self.model, &pool, options.context.unwrap_or(trained))
    }

    /// An empty sequence.
    ///
    /// # Errors
    /// If the model's keys and values cannot be stored as the options say, or there are more positions than the model was trained
    /// for and this process could ever hold.
    pub fn sequence_with(&self, options: SequenceOptions) -> Result<Sequence, EngineError> {
        let trained = self.model.config.context_length;
        let context = options.context.unwrap_or(trained);
        let pool = KvPool::new(&self.model, options.cache_type)?;
        memory::check_context(&self.model, &pool, context)?;
        Ok(Sequence::new(pool.cache(context)))
    }

    /// The positions that a prompt and an answer of at most so many tokens get unless a number is set: as many as they need, up to
    /// what the model was trained for. A prompt that is longer than that gets room for the answer all the same.
    pub fn context_for(&self, prompt: usize, max_tokens: usize) -> usize {
        let trained = self.model.config.context_length;
        let needed = prompt.saturating_add(max_tokens);
        match prompt > trained {
            true => needed,
            false => needed.min(trained),
        }
    }

    /// What there is to know about a text of so many positions; `None` where the model was trained for as many.
    pub fn beyond_training(&self, positions: usize) -> Option<Notice> {
        let trained = self.model.config.context_length;
        (positions > trained).then_some(Notice::BeyondTraining { positions, trained })
    }

    /// The tokens of a prompt. An empty one has the token that begins texts.
    ///
    /// # Errors
    /// If the text cannot be encoded, or is empty and no token begins texts.
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        let tokenizer = self.tokenizer()?;
        let tokens = tokenizer.encode_prompt(text)?;
        if !tokens.is_empty() {
            return Ok(tokens);
        }
        let first = tokenizer.bos().or(tokenizer.eos());
        Ok(vec![first.ok_or(EngineError::NothingToBegin)?])
    }

    /// Lets the model go on behind a prompt, and behind what the sequence has already. The pieces of text are complete
    /// characters, and never a stop text or the beginning of one.
    ///
    /// # Errors
    /// If the prompt cannot be encoded or does not fit in the sequence.
    pub fn generate<'a>(
        &'a self,
        sequence: &'a mut Sequence,
        prompt: &str,
        options: &GenerateOptions,
    ) -> Result<Generation<'a>, EngineError> {
        let tokens = match sequence.is_empty() {
            true => self.prompt(prompt)?,
            false => self.tokenizer()?.encode(prompt)?,
        };
        self.generate_behind(sequence, tokens, options)
    }

    /// [`Engine::generate`] behind tokens.
    ///
    /// # Errors
    /// If there are none, or they do not fit in the sequence.
    pub fn generate_behind<'a>(
        &'a self,
        sequence: &'a mut Sequence,
        prompt: Vec<u32>,
        options: &GenerateOptions,
    ) -> Result<Generation<'a>, EngineError> {
        let tokenizer = self.tokenizer()?;
        let request = Request {
            prompt,
            max_tokens: options.max_tokens,
            sampler: options.sampler.clone(),
            stop: options.stop.clone(),
            ignore_end: options.ignore_end,
            grammar: options.grammar.clone(),
            logprobs: options.logprobs,
            prompt_logprobs: options.prompt_logprobs,
        };
        Ok(Generation::new(
            &self.model,
            &self.runtime,
            tokenizer,
            sequence,
            &request,
        )?)
    }
}

impl Engine {
    /// Answers to many requests side by side, each with a context of its own; see [`Scheduler`]. Together they hold at most so
    /// many blocks of [`KV_BLOCK`] positions; `None` for as many as it takes.
    ///
    /// # Errors
    /// If the model's keys and values cannot be stored in this type, or the model has no tokenizer.
    pub fn scheduler(
        &self,
        cache_type: CacheType,
        blocks: Option<usize>,
    ) -> Result<Scheduler, EngineError> {
        self.tokenizer()?;
        Ok(Scheduler::new(self.pool(cache_type, blocks)?))
    }

    /// A pool of this model's KV blocks, of at most so many; `None` for as many as it takes.
    ///
    /// # Errors
    /// If the model's keys and values cannot be stored in this type.
    pub fn pool(
        &self,
        cache_type: CacheType,
        blocks: Option<usize>,
    ) -> Result<KvPool, EngineError> {
        let limit = blocks.unwrap_or(usize::MAX);
        Ok(KvPool::with_limit(&self.model, cache_type, limit)?)
    }

    /// What the answers of a [`Scheduler`] are made with.
    ///
    /// # Errors
    /// [`EngineError::NoTokenizer`] for a model that was made in memory.
    pub fn loaded(&self) -> Result<Loaded<'_>, EngineError> {
        Ok(Loaded {
            model: &self.model,
            runtime: &self.runtime,
            tokenizer: self.tokenizer()?,
        })
    }

    /// What a text is about, as a vector of length 1 and of the width of the residual stream: the mean of the model's outputs behind
    /// the last norm.
    ///
    /// # Errors
    /// If there are no tokens, one is not in the vocabulary, or the caches find no memory.
    pub fn embedding(&self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        let pool = self.pool(CacheType::F16, None)?;
        memory::must_hold_contexts(&pool, tokens.len(), 1)?;
        Ok(eval::embedding(&self.model, &self.runtime, tokens, &pool)?)
    }
}

// ---- measuring ----

impl Engine {
    /// The first tokens of a text, `limit` or all if there are fewer, with the token in front that begins texts, where the model
    /// wants one. The text is read as far as that takes.
    ///
    /// # Errors
    /// If the text cannot be read or encoded.
    pub fn read(&self, source: &TextSource, limit: usize) -> Result<Vec<u32>, EngineError> {
        let mut tokens = Vec::from_iter(self.bos());
        let room = limit.saturating_sub(tokens.len());
        tokens.extend(source.first_tokens(self.tokenizer.as_deref(), None, room)?);
        let tokenizer = self.tokenizer()?;
        if tokens.len() < limit && tokenizer.adds_eos() {
            tokens.extend(tokenizer.eos());
        }
        tokens.truncate(limit);
        Ok(tokens)
    }

    /// How well the model predicts a text.
    ///
    /// # Errors
    /// If the text is shorter than a chunk, the KV cache of a chunk does not fit in memory, the model's output is not a number, or
    /// `events` cancels; behind the first chunk that is [`PerplexityError::Stopped`](crate::eval::PerplexityError::Stopped), with
    /// the figure so far.
    pub fn perplexity(
        &self,
        text: &str,
        options: PerplexityOptions,
        events: &mut Events,
    ) -> Result<Perplexity, EngineError> {
        let tokens = self.tokenizer()?.encode_prompt(text)?;
        self.perplexity_of(&tokens, options, events)
    }

    /// [`Engine::perplexity`] of the tokens of a text; see [`Engine::read`] and [`PerplexityOptions::most_tokens`].
    ///
    /// # Errors
    /// Those of [`Engine::perplexity`].
    pub fn perplexity_of(
        &self,
        tokens: &[u32],
        options: PerplexityOptions,
        events: &mut Events,
    ) -> Result<Perplexity, EngineError> {
        if tokens.len() >= options.context {
            let pool = KvPool::new(&self.model, options.cache_type)?;
            memory::must_hold_contexts(&pool, options.context, 1)?;
        }
        Stage::Scoring.begin(events, 0)?;
        let progress = &mut Stage::Scoring.progress(events);
        let (model, runtime) = (&self.model, &self.runtime);
        // Where it is called off, what there is of it is told.
        eval::perplexity(model, runtime, tokens, self.bos(), options, progress)
            .map_err(EngineError::Perplexity)
    }

    /// Tokens per second in one run of a test, behind a run to warm up.
    ///
    /// # Errors
    /// If the KV caches do not fit in memory; those of a forward pass.
    pub fn speed(&self, test: SpeedTest) -> Result<f64, EngineError> {
        let pool = KvPool::new(&self.model, test.cache_type)?;
        memory::must_hold_contexts(&pool, test.positions(), test.parallel)?;
        Ok(SpeedRun::new(&self.model, &self.runtime, test)?.sample()?)
    }

    /// Bytes per second at which all threads together read the weights, doing next to nothing with them.
    pub fn read_bandwidth(&self) -> f64 {
        let Self { model, runtime, .. } = self;
        eval::read_bandwidth(&model.map, model.bytes(), runtime)
    }
}
