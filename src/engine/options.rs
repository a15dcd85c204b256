//! What can be chosen: plain data with defaults.

use std::path::PathBuf;
use std::time::Duration;

use super::text::TextSource;
use crate::generate::{Grammar, SamplerConfig};
#[cfg(doc)]
use crate::gguf::GgufFile;
use crate::gguf::Value as MetadataValue;
use crate::heal::{Budget, What};
use crate::model::{CacheType, Model};
use crate::prune::bits::Moves;
use crate::prune::sparse::{Allocate, SparseForm, Sparsity};
use crate::prune::{Effort, HeadUnit, Method, Metric, Recipe, Restore, Structure, Target};
use crate::quant::BlockType;

/// How to open a model.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Threads to compute with; `None` for one for each processor that this process may run on, and never more than these, which
    /// would make nothing faster.
    pub threads: Option<usize>,
    pub pack: Pack,
    pub tune: Tune,
    /// The folder in which profiles and outcomes are kept; `None` for the user's
    /// ([`hub::profiles_dir`](crate::hub::profiles_dir)).
    pub cache: Option<PathBuf>,
    /// Bytes that all profiles and outcomes in that folder may take; `None` for what the environment variable
    /// [`CACHE_SIZE_VARIABLE`](super::CACHE_SIZE_VARIABLE) says, or else [`DEFAULT_CACHE_SIZE`](super::DEFAULT_CACHE_SIZE).
    pub cache_size: Option<u64>,
    /// Metadata that take the place of the file's own, or are added to them; see [`GgufFile::open_with`]. A file that the model is
    /// written to has them too.
    pub overrides: Vec<(String, MetadataValue)>,
}

/// Whether weights are rearranged in place for the vector units, which makes their pages the process's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pack {
    /// Where the machine computes faster for it and has the memory.
    #[default]
    Auto,
    /// The pages stay shared with the file, and can be evicted.
    Never,
}

/// Whether a machine is asked how it likes weights to be read. Results do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tune {
    /// By measurements of a tenth of a second at the first starts with a type of weights, which are kept in the cache folder.
    #[default]
    Auto,
    /// Weights are read as is usual for processors of this maker.
    Never,
}

/// How to prune.
#[derive(Debug, Clone)]
pub struct PruneOptions {
    /// What to reach by removing heads and channels; by default a ratio of 0.3.
    pub target: Target,
    pub method: MethodOptions,
    /// Single weights to remove, after heads and channels if the target removes any: a ratio of 0 leaves these be, and no profile
    /// is collected then. `None` for no single weights. The target must be a ratio.
    pub sparse: Option<SparseOptions>,
    /// By what the model gets smaller where the target is a size, a speed or a perplexity. A ratio is of widths alone.
    pub moves: Moves,
    /// What becomes of the output head, beside that; it keeps its type where single weights go.
    pub head: HeadType,
    /// Train what pruning leaves towards the dense model's predictions, on the text of the calibration; `None` for not. It is not for
    /// models that lose single weights, nor for a profile from a file, which comes without text.
    pub heal: Option<HealOptions>,
    /// How long whole plans are searched; `None` for some plans at [`Effort::Best`], and for no search at less. The target must be a ratio above 0, the
    /// structure loss curves, and no single weights go. What is found in a time depends on the machine and what else it does.
    pub budget: Option<Duration>,
    pub calibration: CalibrationOptions,
    /// A profile to prune by; `None` to find or collect one. The method must not need more than it has.
    pub profile: Option<PathBuf>,
    pub cache: Cache,
    /// Measure what pruning does to predictions: on text of the mixture that is held back, or else on a built-in one, and on text of the source
    /// that the profile was not taken from, if there is enough of it.
    pub effects: bool,
}

impl Default for PruneOptions {
    fn default() -> Self {
        Self {
            target: Target::Ratio(0.3),
            method: MethodOptions::default(),
            sparse: None,
            moves: Moves::default(),
            head: HeadType::default(),
            heal: None,
            budget: None,
            calibration: CalibrationOptions::default(),
            profile: None,
            cache: Cache::default(),
            effects: false,
        }
    }
}

/// The type of the output head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadType {
    /// It keeps its own, unless a target gives it another one.
    #[default]
    Keep,
    /// The smallest by which predictions hardly change: by at most 0.02 nats per token.
    Auto,
    /// This one, if it is smaller.
    Type(BlockType),
}

impl std::str::FromStr for HeadType {
    type Err = String;

    /// `keep`, `auto`, or the name of a type, like `q5_0`.
    fn from_str(text: &str) -> Result<Self, String> {
        let named =
            |t: &BlockType| t.name().eq_ignore_ascii_case(text) && !t.is_float() && t.packs();
        match text {
            "keep" => Ok(Self::Keep),
            "auto" => Ok(Self::Auto),
            _ => match BlockType::ALL.into_iter().find(named) {
                Some(block_type) => Ok(Self::Type(block_type)),
                None => {
                    let quantised = BlockType::ALL.into_iter();
                    let quantised = quantised.filter(|t| !t.is_float() && t.packs());
                    let names: Vec<String> = quantised.map(|t| t.name().to_lowercase()).collect();
                    Err(format!(
                        "must be keep, auto, or one of {}",
                        names.join(", ")
                    ))
                }
            },
        }
    }
}

/// How to heal a pruned model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HealOptions {
    pub budget: Budget,
    /// The highest learning rate; `None` for what suits what is trained.
    pub rate: Option<f32>,
    pub what: What,
    /// The order of the text follows from it.
    pub seed: u64,
}

impl From<Budget> for HealOptions {
    fn from(budget: Budget) -> Self {
        Self {
            budget,
            rate: None,
            what: What::default(),
            seed: 0,
        }
    }
}

/// Which single weights to remove.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SparseOptions {
    pub sparsity: Sparsity,
    /// How the budget is shared out among the modules.
    pub allocate: Allocate,
    /// What becomes of the projections.
    pub form: SparseForm,
}

impl From<Sparsity> for SparseOptions {
    fn from(sparsity: Sparsity) -> Self {
        Self {
            sparsity,
            allocate: Allocate::default(),
            form: SparseForm::default(),
        }
    }
}

/// What is taken from the cache folder and kept there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Profiles, and outcomes of pruning.
    #[default]
    All,
    /// Profiles alone.
    Profiles,
    Nothing,
}

impl Cache {
    pub(super) fn has_profiles(self) -> bool {
        self != Cache::Nothing
    }

    pub(super) fn has_outcomes(self) -> bool {
        self == Cache::All
    }
}

/// A named method, and choices that differ from it.
#[derive(Debug, Clone, Copy, Default)]
pub struct MethodOptions {
    pub method: Method,
    /// What makes a head or channel worth keeping; `None` for the method's choice, as below.
    pub metric: Option<Metric>,
    /// Which units compete with each other for the budget.
    pub structure: Option<Structure>,
    /// Whether query heads go one by one or in whole KV groups.
    pub heads: HeadUnit,
    /// How what goes is made up for.
    pub restore: Option<Restore>,
    pub effort: Effort,
}

impl From<Method> for MethodOptions {
    fn from(method: Method) -> Self {
        Self {
            method,
            ..Self::default()
        }
    }
}

impl MethodOptions {
    /// The choice for every step, where there is a profile and no text.
    pub(super) fn recipe(&self) -> Recipe {
        self.change(self.method.recipe(self.effort))
    }

    /// The choice for every step where a text of so many tokens can be read again, in at most so many bytes.
    pub(super) fn recipe_with_text(&self, model: &Model, tokens: usize, memory: u64) -> Recipe {
        let (method, effort) = (self.method, self.effort);
        self.change(method.recipe_with_text(effort, model, tokens, memory))
    }

    /// Puts the choices that were made in the place of the method's.
    fn change(&self, named: Recipe) -> Recipe {
        Recipe {
            metric: self.metric.unwrap_or(named.metric),
            structure: self.structure.unwrap_or(named.structure),
            heads: self.heads,
            restore: self.restore.unwrap_or(named.restore),
        }
    }
}

/// What to calibrate on, and in how much memory.
#[derive(Debug, Clone, Default)]
pub struct CalibrationOptions {
    pub source: TextSource,
    /// The field of JSON lines that holds the text; `None` for "text", and for files that are not known to be JSON lines.
    pub field: Option<String>,
    /// Tokens to use at most, the mixture's included; `None` for what the effort asks for.
    pub tokens: Option<usize>,
    /// The share of the mixture beside a text that was named, at least 0 and below 1, so that what the text lacks is not lost. `None` for
    /// a quarter beside files and readers by [`Method::Best`], and for none beside other sources and by other methods, of which there
    /// are published figures.
    pub mix: Option<f64>,
    /// Bytes that the covariances of least squares may take; where those of all layers take more, they are collected in groups
    /// of layers, in more passes over the text. `None` for half of the free memory.
    pub memory: Option<u64>,
}

/// A sequence to be.
#[derive(Debug, Clone, Copy, Default)]
pub struct SequenceOptions {
    /// Positions that it may have; `None` for as many as the model was trained for.
    pub context: Option<usize>,
    /// How keys and values are stored.
    pub cache_type: CacheType,
}

/// What to generate behind a prompt.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    pub max_tokens: usize,
    pub sampler: SamplerConfig,
    /// Texts at which generation stops; they are not shown.
    pub stop: Vec<String>,
    /// Go on after the model says that its text has ended.
    pub ignore_end: bool,
    /// What the answer must be like; see [`Engine::grammars`](super::Engine::grammars).
    pub grammar: Option<Grammar>,
    /// Tell how likely the model held each token that was generated, and so many that it held most likely; `None` for not.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt, except the first.
    pub prompt_logprobs: Option<usize>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 128,
            sampler: SamplerConfig::default(),
            stop: Vec::new(),
            ignore_end: false,
            grammar: None,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}
