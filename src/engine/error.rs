//! Why the engine could not do what it was asked.

use std::path::PathBuf;
use std::sync::Arc;

use super::cache::CacheError;
#[cfg(doc)]
use super::options::OpenOptions;
use super::report::Shortage;
use super::text::TextError;
use crate::chat::ChatError;
use crate::convert::{ConvertError, ImportanceError};
use crate::count::count;
use crate::eval::PerplexityError;
use crate::generate::{GenerateError, GrammarError};
use crate::gguf::GgufError;
use crate::heal::{SearchError, TrainingError};
use crate::hub::HubError;
use crate::kernels::RuntimeError;
use crate::model::ModelError;
use crate::progress::Cancelled;
use crate::prune::sparse::{Pattern, Sparsity};
use crate::prune::{HeadUnit, Metric, ProfileError, PruneError, Restore};
use crate::tokenize::{self, TokenizeError};

/// Why the engine could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Hub(Box<HubError>),
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    /// The chat template is missing or unusable, or refuses the messages.
    #[error(transparent)]
    Chat(Arc<ChatError>),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Generate(GenerateError),
    #[error(transparent)]
    Perplexity(PerplexityError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// What pruning met. Its `touched` names the layers that are pruned already, where there are any; the model must be opened
    /// anew then.
    #[error(transparent)]
    Prune(PruneError),
    /// A profile lacks what the method needs.
    #[error(transparent)]
    Unsuited(#[from] Unsuited),
    #[error(transparent)]
    OutOfReach(#[from] OutOfReach),
    #[error("{doing}")]
    While {
        doing: Doing,
        source: Box<EngineError>,
    },

    /// The events were answered with a break; the model is as it was.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    #[error(
        "{}: the tokenizer has {} and the embedding only {embeddings}; the file is damaged",
        path.display(), count(tokens, "token")
    )]
    Vocabulary {
        path: PathBuf,
        tokens: usize,
        embeddings: usize,
    },
    #[error("the model has no tokenizer, and so neither reads nor writes text")]
    NoTokenizer,
    #[error("the model was made in memory, and there is no file of it")]
    NoFile,
    #[error("the prompt is empty, and this model has no token to begin a text with")]
    NothingToBegin,
    #[error("the model has been pruned already; open its file again to prune it in another way")]
    AlreadyPruned,
    #[error("pruning the model was broken off; open its file again")]
    BrokenOff,
    /// A metric looks at all covariances at once, and they do not fit.
    #[error(
        "the metric {metric} looks at the covariances of all layers at once, {}, and that is more than {}",
        mebibytes(shortage.needed), allowed(shortage)
    )]
    MetricMemory { metric: Metric, shortage: Shortage },
    /// Not even the covariances of one layer fit, and the restoration needs them.
    #[error(
        "least squares need the covariances of one layer at least, {}, and that is more than {}",
        mebibytes(shortage.needed), allowed(shortage)
    )]
    LayerMemory { shortage: Shortage },
    /// Pruning makes the weights that stay the process's own, and they do not fit.
    #[error(
        "pruning rewrites the weights that stay in memory, {}, and {} are available",
        mebibytes(shortage.needed), mebibytes(shortage.allowed)
    )]
    PruningMemory { shortage: Shortage },
    /// The dense model does not fit beside the pruned one.
    #[error(
        "the dense model takes {} beside the pruned one, and {} are available",
        mebibytes(shortage.needed), mebibytes(shortage.allowed)
    )]
    DenseMemory { shortage: Shortage },
    #[error(
        "the profile {} takes up to {} in memory, and {} are available",
        path.display(), mebibytes(shortage.needed), mebibytes(shortage.allowed)
    )]
    ProfileMemory { path: PathBuf, shortage: Shortage },
    #[error(
        "restoring in sequence holds the text in memory, {}, and {} are available",
        mebibytes(shortage.needed), mebibytes(shortage.allowed)
    )]
    SequentialMemory { shortage: Shortage },
    /// More positions than the model was trained for, and than could ever be held.
    #[error(
        "a context of {positions} tokens takes {} of KV cache when it is full, and {}",
        size(*bytes), at_most(*total)
    )]
    Context {
        positions: usize,
        /// A float, as it may be more than an integer holds.
        bytes: f64,
        /// All memory that the process may have; `None` where the system does not tell.
        total: Option<u64>,
    },
    /// A context that is sure to be filled does not fit.
    #[error(
        "the KV cache of {sequences} sequence{} of {positions} tokens takes {}, and {} are available",
        if *sequences == 1 { "" } else { "s" }, size(*bytes), size(*available as f64)
    )]
    ContextMemory {
        positions: usize,
        sequences: usize,
        /// A float, as it may be more than an integer holds.
        bytes: f64,
        available: u64,
    },
    /// Of every group as many weights go.
    #[error(
        "{pattern} takes as many weights of every group, so that there is nothing to share out by loss curves"
    )]
    CurvesOfGroups { pattern: Pattern },
    #[error(
        "removing single weights rewrites all weights of the layers and holds the text in memory, {}, and {} are available",
        mebibytes(shortage.needed), mebibytes(shortage.allowed)
    )]
    SparseMemory { shortage: Shortage },
    /// A factor of speed, or a share by which the perplexity may rise, that is none.
    #[error("the target of pruning must be a number above 0, and not {0}")]
    Amount(f64),
    #[error(
        "healing takes {}, and that is more than {}",
        mebibytes(shortage.needed), allowed(shortage)
    )]
    HealMemory { shortage: Shortage },
    /// A budget for a search over whole plans that cannot be made.
    #[error("there are no plans to spend a budget on: {0}")]
    NoSearch(NoSearch),
    #[error("healing is not for models that lose single weights, which it would bring back")]
    HealSparse,
    #[error("healing is for LLaMA's layers, and not for those of {architecture:?} models")]
    HealFamily { architecture: &'static str },
    #[error("a learning rate must be a number above 0, and not {rate}")]
    HealRate { rate: f32 },
    #[error(transparent)]
    Training(#[from] TrainingError),
    #[error("{} has changed since pruning began; try again", path.display())]
    FileChanged { path: PathBuf },
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A model that cannot be written in other types.
    #[error(transparent)]
    Convert(Box<ConvertError>),
    #[error(transparent)]
    Importance(#[from] ImportanceError),
}

impl EngineError {
    /// The metadata key that a value of one's own would mend, because the file lacks it or has a value that is not known; `None` for
    /// other errors. [`OpenOptions::overrides`] takes one.
    pub fn wanted_key(&self) -> Option<&str> {
        match self {
            EngineError::Gguf(GgufError::Missing { key, .. })
            | EngineError::Model(ModelError::Gguf(GgufError::Missing { key, .. })) => Some(key),
            // Of a tokenizer that is missing no single key is enough.
            EngineError::Tokenize(TokenizeError::PreTokenizer { .. }) => Some(tokenize::PRE),
            _ => None,
        }
    }

    /// The error with what was being done when it came up.
    pub(super) fn at(doing: Doing) -> impl FnOnce(EngineError) -> EngineError {
        // Whoever cancels knows what was being done.
        move |source| match source {
            EngineError::Cancelled(cancelled) => cancelled.into(),
            source => EngineError::While {
                doing,
                source: Box::new(source),
            },
        }
    }
}

impl From<ChatError> for EngineError {
    fn from(error: ChatError) -> Self {
        EngineError::Chat(Arc::new(error))
    }
}

impl From<ConvertError> for EngineError {
    fn from(error: ConvertError) -> Self {
        match error {
            ConvertError::Gguf(GgufError::Cancelled(cancelled)) => cancelled.into(),
            ConvertError::Gguf(error) => error.into(),
            ConvertError::Model(error) => error.into(),
            error => EngineError::Convert(Box::new(error)),
        }
    }
}

impl From<PruneError> for EngineError {
    /// Where pruning was cancelled and has changed nothing, there is nothing else to say.
    fn from(error: PruneError) -> Self {
        match error.is_cancelled() && error.is_untouched() {
            true => Cancelled.into(),
            false => EngineError::Prune(error),
        }
    }
}

impl From<GenerateError> for EngineError {
    fn from(error: GenerateError) -> Self {
        match error {
            GenerateError::Cancelled(cancelled) => cancelled.into(),
            error => EngineError::Generate(error),
        }
    }
}

impl From<GrammarError> for EngineError {
    fn from(error: GrammarError) -> Self {
        GenerateError::from(error).into()
    }
}

impl From<PerplexityError> for EngineError {
    fn from(error: PerplexityError) -> Self {
        match error {
            PerplexityError::Stopped(_) | PerplexityError::Cancelled(_) => Cancelled.into(),
            error => EngineError::Perplexity(error),
        }
    }
}

/// What was being done when an error came up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Doing {
    #[error("writing the calibration text")]
    OwnText,
    #[error("calibrating on {text}")]
    Calibrating { text: String },
    #[error("measuring loss curves on {text}")]
    Curves { text: String },
    #[error("looking for the ratio")]
    Searching,
    #[error("measuring the dense model on {text}")]
    EffectBefore { text: String },
    #[error("measuring the pruned model on {text}")]
    EffectAfter { text: String },
    #[error("writing {}", path.display())]
    Export { path: PathBuf },
}

/// Why whole plans are not searched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoSearch {
    #[error("a profile from a file comes without the text that they are measured on")]
    ProfileFile,
    #[error("the target is not a ratio")]
    Target,
    #[error("the search begins with loss curves, and the structure is another")]
    Curves,
    #[error("single weights are to go")]
    Sparse,
    #[error("models of this architecture have no backward pass yet")]
    Family,
}

/// What a profile lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsuited {
    /// Restoring in sequence reads the text itself.
    #[error("restoring in sequence reads the calibration text itself, which no profile holds")]
    Sequential,
    /// Removing single weights reads the text itself.
    #[error("removing single weights reads the calibration text itself, which no profile holds")]
    SingleWeights,
    /// Healing reads the text itself.
    #[error("healing trains on the calibration text itself, which no profile holds")]
    Healing,
    #[error("{} has no loss curves", profile.display())]
    NoCurves { profile: PathBuf },
    /// Curves belong to a metric, a unit of heads and a restoration.
    #[error(
        "the loss curves of {} were measured by the metric {}, heads by {}, with restoration {}, and not by {}, {} and {}",
        profile.display(), theirs.metric, theirs.heads, theirs.restore, ours.metric, ours.heads, ours.restore
    )]
    OtherCurves {
        profile: PathBuf,
        theirs: CurvesBy,
        ours: CurvesBy,
    },
    #[error("{} has no covariances, which the metric {metric} needs", profile.display())]
    MetricNeedsCovariances { profile: PathBuf, metric: Metric },
    #[error("{} has no covariances, which restoration {restore} needs", profile.display())]
    RestoreNeedsCovariances { profile: PathBuf, restore: Restore },
}

/// What loss curves are measured by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CurvesBy {
    pub metric: Metric,
    pub heads: HeadUnit,
    pub restore: Restore,
}

/// A target that no ratio reaches.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum OutOfReach {
    #[error(
        "weights of {} are out of reach: at the highest ratio the weights take {}",
        megabytes(*bytes), megabytes(*least as u64)
    )]
    Bytes { bytes: u64, least: usize },
    #[error(
        "{factor} times the speed is out of reach: at the highest ratio generation should be {most:.2} times as fast, for only so much of its time is the weights' ({:.0} %) and not all of them are pruned",
        100.0 * share
    )]
    Speed {
        factor: f64,
        /// How many times as fast generation should be at the highest ratio.
        most: f64,
        /// The share of a token's time that its products with weights take.
        share: f64,
    },
    #[error(
        "a rise of at most {:.1} % is out of reach: of the ratios tried the smallest is too large already{}",
        limit * 100.0, too_large(*smallest)
    )]
    Perplexity {
        limit: f64,
        /// The smallest ratio that was tried, and the share by which it would raise the perplexity.
        smallest: Option<(f64, f64)>,
    },
    #[error(
        "a rise of at most {:.1} % is out of reach: without any heads or channels gone, {sparsity} raises the perplexity by {:.1} %",
        limit * 100.0, rise * 100.0
    )]
    SparsePerplexity {
        limit: f64,
        sparsity: Sparsity,
        /// The share by which removing the single weights alone raises the perplexity.
        rise: f64,
    },
}

fn too_large(smallest: Option<(f64, f64)>) -> String {
    smallest.map_or(String::new(), |(ratio, rise)| {
        let rise = rise * 100.0;
        format!(" (ratio {ratio:.4} would raise the perplexity by {rise:.1} %)")
    })
}

fn allowed(shortage: &Shortage) -> String {
    let allowed = mebibytes(shortage.allowed);
    match shortage.set {
        true => format!("the {allowed} that may be taken"),
        false => format!("the {allowed} that there are for them"),
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn size(bytes: f64) -> String {
    let gibibytes = bytes / f64::from(1 << 30);
    match gibibytes {
        ..1.0 => format!("{:.1} MiB", 1024.0 * gibibytes),
        ..1024.0 => format!("{gibibytes:.1} GiB"),
        _ => format!("{:.1} TiB", gibibytes / 1024.0),
    }
}

fn at_most(total: Option<u64>) -> String {
    match total {
        Some(total) => format!("this process can have {} at most", size(total as f64)),
        None => "that is more than any machine has".to_owned(),
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

impl From<SearchError> for EngineError {
    fn from(error: SearchError) -> Self {
        match error {
            SearchError::Measuring(error) => error.into(),
            SearchError::Pruning(error) => error.into(),
        }
    }
}
