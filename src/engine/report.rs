//! What was done, as data. The words are for whoever shows it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::gguf::MetadataWarning;
use crate::heal::What;
use crate::memory;
use crate::model::{Model, Weight};
use crate::prune::bits::TypeChanges;
use crate::prune::sparse::{Allocate, SparseForm, SparseLayer, Sparsity, TypeChange};
use crate::prune::{Effect, Effort, Found, HealEnd, Method, Plan, Recipe, Restore, Target};

/// A model that was opened.
#[derive(Debug, Clone, Serialize)]
pub struct ModelReport {
    #[serde(serialize_with = "path_as_text")]
    pub path: PathBuf,
    pub layers: usize,
    pub parameters: usize,
    /// Bytes of all weights.
    pub bytes: usize,
    /// The instruction set that it is computed with.
    pub isa: &'static str,
    pub threads: usize,
    /// What mapping and checking took, without fetching the file.
    #[serde(serialize_with = "seconds")]
    pub load_time: Duration,
    /// What packing the weights took; `None` if they were not packed.
    #[serde(serialize_with = "maybe_seconds")]
    pub pack_time: Option<Duration>,
}

/// What pruning did.
#[derive(Debug, Clone, Serialize)]
pub struct PruneReport {
    #[serde(serialize_with = "plain_target")]
    pub target: Target,
    /// The ratio that the target came to.
    pub ratio: f64,
    /// The share of the layers' weights that is gone, which units of several weights bring near the ratio.
    pub removed: f64,
    pub method: Method,
    pub recipe: Recipe,
    /// What stays of each layer.
    #[serde(skip)]
    pub plan: Plan,
    pub calibration: CalibrationReport,
    /// How the ratio was found; `None` where it was the target.
    pub search: Option<SearchReport>,
    /// The search for a better plan; `None` where there was none in this run.
    pub plan_search: Option<PlanSearchReport>,
    /// Smaller types that matrices were given; `None` where none could be.
    pub types: Option<TypesReport>,
    /// Single weights that were removed; `None` where none were to be.
    pub sparse: Option<SparseReport>,
    /// How it was healed; `None` where it was not to be.
    pub heal: Option<HealReport>,
    /// What it did to predictions, where that was measured.
    pub effects: Vec<Effect>,
    /// Why that was not measured, where it was asked for.
    pub no_effects: Option<NoEffects>,
    pub before: Snapshot,
    pub after: Snapshot,
    /// What removing heads and channels alone took.
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    /// Whether the outcome of an earlier run was taken from the cache folder.
    pub repeated: bool,
    /// What came up meanwhile, beside what was known [before](super::Prepared::notices).
    pub notices: Vec<Notice>,
}

/// A search over whole plans.
#[derive(Debug, Clone, Serialize)]
pub struct PlanSearchReport {
    /// Plans that were tried, and those of them that were better than what there was.
    pub tried: usize,
    pub better: usize,
    /// The mean divergence from the dense model by the first and by the last plan, in nats per token.
    pub before: f64,
    pub after: f64,
    /// Tokens, held back from statistics, that it was measured on.
    pub tokens: usize,
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
}

/// Single weights that were removed.
#[derive(Debug, Clone, Serialize)]
pub struct SparseReport {
    pub sparsity: Sparsity,
    pub allocate: Allocate,
    /// What was asked for; see [`Notice::StayAsLarge`] and [`Notice::KeptDense`] for projections that have zeros instead.
    pub form: SparseForm,
    /// Tokens that scores were taken from; 0 where they look at no text.
    pub tokens: usize,
    /// The share of the layers' weights that was removed, of those that were there before.
    pub removed: f64,
    /// The share of each module that was to go: attention and MLP of the first layer, and so on.
    pub shares: Vec<f64>,
    pub layers: Vec<SparseLayer>,
    /// Loss curves that were measured; `None` where shares are even.
    pub curves: Option<CurvesReport>,
    /// Bytes of all weights before and after.
    pub bytes_before: usize,
    pub bytes_after: usize,
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
}

impl SparseReport {
    /// Whether all projections have the types that they had.
    pub fn changes_no_types(&self) -> bool {
        self.layers.iter().all(|layer| layer.types.is_empty())
    }

    /// Whether what was removed takes bytes, as zeros do.
    pub fn leaves_zeros(&self) -> bool {
        self.form == SparseForm::Zeros
            || self.form == SparseForm::Auto && self.bytes_after >= self.bytes_before
    }
}

/// Smaller types that matrices were given.
#[derive(Debug, Clone, Serialize)]
pub struct TypesReport {
    pub changes: TypeChanges,
    /// What they should cost, in nats per token, if losses add up; `None` where nothing was measured.
    pub predicted: Option<f64>,
    /// Tokens that it was measured on.
    pub measured_on: usize,
    #[serde(serialize_with = "seconds")]
    pub measuring: Duration,
    /// What encoding took.
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
}

/// How a pruned model was healed.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct HealReport {
    /// Tokens that were trained on, those that came several times counted as often.
    pub tokens: usize,
    pub steps: usize,
    /// Steps of these that an earlier run had done which was broken off.
    pub resumed: usize,
    pub what: What,
    /// The highest learning rate.
    pub rate: f32,
    /// Tokens that were held back, and the mean divergence KL(dense ‖ pruned) on them, in nats, before and after.
    pub held_back: usize,
    pub before: f64,
    pub after: f64,
    /// What became of the weights that were trained.
    pub end: HealEnd,
    /// What the steps took.
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    /// Whether the weights were taken from the cache folder.
    pub repeated: bool,
}

/// A profile, and what it took to get it.
#[derive(Debug, Clone, Serialize)]
pub struct CalibrationReport {
    /// The name of the text that the profile was taken from.
    pub source: String,
    /// Tokens that statistics were taken from.
    pub tokens: usize,
    /// Of these, tokens that a run that was broken off had read.
    pub resumed: usize,
    /// All tokens of the text: also those of loss curves, and those that were kept for judging.
    pub all_tokens: usize,
    pub profile: ProfileFrom,
    /// The profile's [hash](crate::prune::StoredProfile::hash); empty where there is no profile.
    pub hash: String,
    /// The [fingerprint](crate::gguf::GgufFile::fingerprint) of the model's file.
    pub model: String,
    /// What reading the text and taking the statistics took.
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    /// Tokens of loss curves, and the time that they took; `None` where none were measured now.
    pub curves: Option<CurvesReport>,
    /// Groups of layers in which covariances were collected; `None` where they were held all at once, or there are none.
    pub groups: Option<usize>,
    pub notices: Vec<Notice>,
}

/// Loss curves that were measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct CurvesReport {
    pub tokens: usize,
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
}

/// Where a profile comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProfileFrom {
    /// It was collected now.
    Now,
    /// It was read from a file: one that was named, or one in the cache folder.
    File,
    /// It is in the cache folder, and was not needed.
    Unread,
    /// There is none: only single weights were removed, for which the text itself is read.
    NotNeeded,
}

/// A search for the ratio.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SearchReport {
    #[serde(serialize_with = "plain_found")]
    pub found: Found,
    /// What the search took; zero where its result was in the cache folder.
    #[serde(serialize_with = "seconds")]
    pub time: Duration,
    /// How many times as fast generation has become; `None` where the target was not a speed.
    pub speedup: Option<f64>,
}

/// Why effects were not measured though they were asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NoEffects {
    /// The model has no tokenizer, and so no text to be measured on.
    NoText,
    Cancelled,
}

/// Sizes of a model, and memory of this process, at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct Snapshot {
    pub parameters: usize,
    /// Parameters of the layers' attention and MLP weights, of which ratios are shares.
    pub layer_parameters: usize,
    /// Bytes of all weights.
    pub bytes: usize,
    /// Bytes of the map that are in memory; `None` where the system does not tell.
    pub map_resident: Option<u64>,
    /// Bytes of the map that were written to, and so belong to this process alone.
    pub map_private: Option<u64>,
    /// Bytes of this process that are in memory.
    pub process_resident: Option<u64>,
    pub layers: Vec<LayerSnapshot>,
}

/// One layer at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LayerSnapshot {
    pub heads: usize,
    pub kv_heads: usize,
    pub channels: usize,
    /// The type of the attention output's weights.
    pub output_type: &'static str,
    /// The type of the MLP down weights.
    pub down_type: &'static str,
}

impl Snapshot {
    pub(super) fn take(model: &Model) -> Self {
        let map = model.map.residency();
        let layers = model.layers.iter().map(|layer| LayerSnapshot {
            heads: layer.heads(),
            kv_heads: layer.kv_heads(),
            channels: layer.channels(),
            output_type: layer.o.weight.block_type.name(),
            down_type: layer.down.weight.block_type.name(),
        });
        let gone = |weight: &Weight| weight.parameters() - weight.kept(&model.map);
        let gone: usize = model.sparse_weights().map(gone).sum();
        Self {
            parameters: model.parameters() - gone,
            layer_parameters: model.layer_parameters() - gone,
            bytes: model.bytes(),
            map_resident: map.map(|m| m.resident),
            map_private: map.map(|m| m.private),
            process_resident: memory::resident(),
            layers: layers.collect(),
        }
    }
}

/// A model that was written to a file.
#[derive(Debug, Clone, Serialize)]
pub struct ExportReport {
    /// Bytes of the file, and of the one that the model was loaded from.
    pub bytes: u64,
    pub source_bytes: u64,
    /// The architecture that the file states.
    pub architecture: &'static str,
    /// llama.cpp has no form for this model, and only flapjack runs the file.
    pub own_form: bool,
    /// Query heads of zeros that were added, and KV heads that were repeated, because in a file all KV heads of a layer have
    /// equally many query heads.
    pub added_heads: usize,
    pub repeated_kv_heads: usize,
    /// Bytes of weights that the file has more than the model.
    pub added_bytes: usize,
}

/// Something that whoever asked may want to know, or to ask for differently.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// Of several files that a name can stand for, this one was taken.
    FileChosen { name: String, file: String },
    /// The hub does not answer, so that what was fetched before is used.
    HubSilent { name: String, problem: String },
    /// Something of the file's metadata was passed over, or assumed.
    Metadata(MetadataWarning),
    /// An override gives a value to a key that the file does not have.
    KeyAdded { key: String },
    /// More threads were asked for than there are processors to run them, of which each has one.
    FewerThreads { asked: usize, used: usize },
    /// There is not the memory to pack the weights, which stay as they lie in the file and are slower.
    NotPacked(Shortage),
    /// Packed weights leave too little memory to prune in: they go back to how they lie in the file.
    UnpackedToPrune(Shortage),
    /// There is not the memory for a sequence of so many positions. It is taken as they are filled, and generation ends with an error
    /// where it is used up.
    ContextMemory {
        positions: usize,
        shortage: Shortage,
    },
    /// There may be more text: only so many tokens of it are used, as the effort has it.
    FirstTokens { source: String, tokens: usize },
    /// What the effort has time for, where that takes a while.
    Effort {
        effort: Effort,
        /// What it takes on two cores with AVX-512.
        #[serde(serialize_with = "seconds")]
        time: Duration,
        /// Tokens of the calibration text, all included.
        tokens: usize,
        /// Tokens that loss curves are measured on, and from how many layers to the next; `None` for no curves.
        curves: Option<(usize, usize)>,
        restore: Restore,
        /// Whether the method would do more if there were time.
        less: bool,
    },
    /// Restoring in sequence takes about three more passes over the text, and so many bytes for its streams.
    InSequence { bytes: u64 },
    /// There is not even memory for the covariances of one layer, so that biases make up for what goes.
    BiasesForMemory(Shortage),
    /// The profile has no covariances, so that biases make up for what goes.
    BiasesForProfile {
        #[serde(serialize_with = "path_as_text")]
        profile: PathBuf,
    },
    /// A profile or an outcome is larger than all that the cache may hold, so that the next run has to do without.
    TooLargeToKeep {
        kind: CacheKind,
        bytes: u64,
        limit: u64,
    },
    /// A profile or an outcome cannot be written to the cache folder, so that the next run has to do without.
    CannotKeep { kind: CacheKind, problem: String },
    /// A recommendation for sampling is of no use, and is passed over: that of one key, or (`None`) the whole file's.
    SamplingIgnored {
        #[serde(serialize_with = "path_as_text")]
        path: PathBuf,
        key: Option<String>,
        problem: String,
    },
    /// A text takes more positions than the model was trained for; what the model makes of those behind may be nonsense.
    BeyondTraining { positions: usize, trained: usize },
    /// A prompt has more tokens than the model was trained for positions; what it answers may be nonsense.
    PromptBeyondTraining { prompt: usize, trained: usize },
    /// Healing will take about so many bytes.
    HealMemory { bytes: u64 },
    /// Whole plans are not searched, because that would take so many bytes, or because covariances are collected in groups for want of
    /// memory.
    NoPlanSearch { bytes: u64, in_groups: bool },
    /// The calibration text has fewer tokens than were asked for.
    FewerTokens {
        source: String,
        tokens: usize,
        asked: usize,
    },
    /// Projections whose type has no code for 0 have changed it, so that single weights could go, and take more bytes.
    TypesForZeros { changes: Vec<TypeChange> },
    /// So many projections of this type have zeros in the place of single weights, and take as many bytes as before: the type has no
    /// sparse form, or that would not be smaller.
    StayAsLarge {
        block_type: &'static str,
        projections: usize,
    },
    /// So many projections of this type have zeros in the place of single weights, and take as many bytes as before, since the kernels of
    /// this instruction set generate more slowly with sparse ones.
    KeptDense {
        block_type: &'static str,
        projections: usize,
        isa: &'static str,
    },
    /// So many projections of this type are sparse, though the kernels of this instruction set generate more slowly by it: the type has no
    /// code for 0 to be kept dense with.
    SlowerSparse {
        block_type: &'static str,
        projections: usize,
        isa: &'static str,
    },
    /// The model has a chat template, which cannot be used.
    ChatTemplate { problem: String },
    /// Pruning has made predictions much worse.
    MuchWorse {
        effect: Effect,
        /// A ratio at which the perplexity should not rise by more than [`NOTABLE_RISE`](super::NOTABLE_RISE); `None` where that is not known, or
        /// none of use.
        ratio: Option<f64>,
    },
}

/// What a file of the cache folder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheKind {
    Profile,
    Outcome,
    /// The hash of a profile that was too large to stay.
    Hash,
    /// What the model has written to be calibrated on.
    Text,
    /// A healing that was broken off.
    Training,
    /// A calibration that was broken off.
    Partial,
}

/// Memory that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Shortage {
    /// Bytes that are needed.
    pub needed: u64,
    /// Bytes that may be taken.
    pub allowed: u64,
    /// Whether these were set; else they are what there is, or a share of it.
    pub set: bool,
}

/// A path, of which text cannot show everything.
fn path_as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

fn seconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

fn maybe_seconds<S: Serializer>(time: &Option<Duration>, s: S) -> Result<S::Ok, S::Error> {
    time.map(|time| time.as_secs_f64()).serialize(s)
}

/// A target in plain numbers; where it is kept, its numbers are bits.
fn plain_target<S: Serializer>(target: &Target, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(rename_all = "snake_case")]
    enum Plain {
        Ratio(f64),
        Bytes(u64),
        Speedup(f64),
        PerplexityRise(f64),
    }
    let plain = match *target {
        Target::Ratio(ratio) => Plain::Ratio(ratio),
        Target::Bytes(bytes) => Plain::Bytes(bytes),
        Target::Speedup(factor) => Plain::Speedup(factor),
        Target::PerplexityRise(rise) => Plain::PerplexityRise(rise),
    };
    plain.serialize(serializer)
}

/// What was found, in plain numbers.
fn plain_found<S: Serializer>(found: &Found, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(rename_all = "snake_case")]
    enum Plain {
        Bytes {
            before: u64,
            after: u64,
        },
        Speed {
            bytes_before: u64,
            bytes_after: u64,
            before: f64,
            predicted: f64,
        },
        Perplexity {
            tokens: usize,
            dense: f64,
            rise: f64,
            beyond: Option<(f64, f64)>,
        },
    }
    let plain = match *found {
        Found::Bytes { before, after } => Plain::Bytes { before, after },
        Found::Speed {
            bytes_before,
            bytes_after,
            before,
            predicted,
        } => Plain::Speed {
            bytes_before,
            bytes_after,
            before,
            predicted,
        },
        Found::Perplexity {
            tokens,
            dense,
            rise,
            beyond,
        } => Plain::Perplexity {
            tokens,
            dense,
            rise,
            beyond,
        },
    };
    plain.serialize(serializer)
}
