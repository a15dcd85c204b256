//! The words of the command line: quantities, targets as they are typed, notices, and errors with what to do next.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flapjack::convert::{ConvertError, ImportanceError};
pub use flapjack::engine::UNITS;
use flapjack::engine::{
    CACHE_SIZE_VARIABLE, CacheKind, Cancelled, Effect, EffectText, EngineError, MetadataWarning,
    NONSENSE_RISE, NOTABLE_RISE, NoSearch, Notice, OutOfReach, PruneReport, SparseReport, Target,
    TextError, Unsuited,
};
use flapjack::eval::PerplexityError;
use flapjack::generate::GenerateError;
use flapjack::heal::TrainingError;
use flapjack::hub::{HubError, Repository};
use flapjack::model::ModelError;
use flapjack::prune::{Effort, ProfileError, PruneErrorKind, Restore};

use super::streams::is_quiet;
pub use super::streams::say;

// ---- quantities ----

pub fn plural(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

pub fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

pub fn millions(count: usize) -> String {
    format!("{:.1} M", count as f64 / 1e6)
}

pub fn megabytes(bytes: usize) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// How long ago that was, in its largest unit.
pub fn ago(last_used: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let age = now.map_or(0, |now| now.as_secs().saturating_sub(last_used));
    let (count, noun) = match age {
        0..60 => return "just now".to_owned(),
        60..3600 => (age / 60, "minute"),
        3600..86_400 => (age / 3600, "hour"),
        _ => (age / 86_400, "day"),
    };
    format!("{} ago", plural(count as usize, noun))
}

/// Names from files, without what would control a terminal.
pub fn printable(text: &str) -> String {
    let shown = |c: char| {
        if c.is_control() {
            char::REPLACEMENT_CHARACTER
        } else {
            c
        }
    };
    text.chars().map(shown).collect()
}

/// A target as it is asked for.
pub fn target_words(target: Target) -> String {
    match target {
        Target::Ratio(ratio) => format!("--prune {ratio}"),
        Target::Bytes(bytes) => {
            let whole = |unit: &&(&str, u64)| bytes.is_multiple_of(unit.1);
            let (name, unit) = UNITS.iter().find(whole).unwrap_or(&("B", 1));
            format!("--fit {}{name}", bytes / unit)
        }
        Target::Speedup(factor) => format!("--speedup {factor}x"),
        Target::PerplexityRise(rise) => format!("--max-ppl +{}%", percent(rise)),
    }
}

/// What pruning has removed.
pub fn gone(report: &PruneReport) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let structured = format!(
        "{} of the layers' weights are gone",
        percent(report.removed)
    );
    match &report.sparse {
        None => structured,
        Some(sparse) => {
            let (single, are) = (percent(sparse.removed), sparse_words(sparse));
            match report.removed > 0.0 {
                true => format!("{structured}, and {single} of the others are {are}"),
                false => format!("{single} of the layers' weights are {are}"),
            }
        }
    }
}

/// What text the effect of pruning was measured on; `source` is what was calibrated on.
pub fn effect_text(text: EffectText, source: &str) -> String {
    match text {
        EffectText::Unseen => format!("{source}, not seen by statistics"),
        EffectText::Mixture => "the mixture, held back".to_owned(),
        EffectText::HeldBack => "a built-in text, never calibrated on".to_owned(),
    }
}

/// That predictions have become much worse, and what to do about it.
fn much_worse(effect: &Effect, ratio: Option<f64>) -> String {
    let text = effect_text(effect.text, "the calibration's source");
    let result = match effect.rise() > NONSENSE_RISE {
        true => "what the model writes now is likely to make no sense",
        false => "answers will be worse",
    };
    let advice = match ratio {
        Some(ratio) => format!("--prune {ratio} should stay below {NOTABLE_RISE} times"),
        None => "remove less, or take a smaller file type in place of pruning".to_owned(),
    };
    format!(
        "pruning raises the perplexity from {:.2} to {:.2}, {:.1} times as high (on {text}), and the most likely token is the same at {:.0} % of the positions only: {result}; {advice}",
        effect.before,
        effect.after,
        effect.rise(),
        100.0 * effect.agreement,
    )
}

/// What single weights are that were removed.
pub fn sparse_words(report: &SparseReport) -> &'static str {
    match report.leaves_zeros() {
        true => "zero",
        false => "gone, one by one",
    }
}

/// Without the digits that come of dividing by 100.
fn percent(share: f64) -> f64 {
    (share * 1e8).round() / 1e6
}

// ---- notices ----

/// Logs what may be worth knowing, or asking for differently.
pub fn log(notices: &[Notice]) {
    for notice in notices {
        match notice {
            Notice::FileChosen { name, file } => tracing::warn!(
                "of the files that {} could stand for, {} is taken; ORG/REPO:TYPE and ORG/REPO/FILE name others",
                printable(name),
                printable(file)
            ),
            Notice::HubSilent { name, problem } => tracing::warn!(
                "{} is taken as it was fetched before: {}",
                printable(name),
                printable(problem)
            ),
            Notice::Metadata(warning) => log_metadata(warning),
            Notice::KeyAdded { key } => {
                tracing::info!("the file does not have {key}, which --override-kv adds");
            }
            Notice::FewerThreads { asked, used } => tracing::warn!(
                "computing with {} instead of {asked}: there are no more processors to run them",
                plural(*used, "thread")
            ),
            Notice::NotPacked(shortage) => tracing::warn!(
                "weights stay as they lie in the file, which is slower: packing them takes {} and {} are free",
                mebibytes(shortage.needed),
                mebibytes(shortage.allowed)
            ),
            Notice::UnpackedToPrune(shortage) => tracing::warn!(
                "weights go back to how they lie in the file while they are pruned, which is slower: beside packed weights pruning takes about {} and {} are free",
                mebibytes(shortage.needed),
                mebibytes(shortage.allowed)
            ),
            Notice::ContextMemory {
                positions,
                shortage,
            } => tracing::warn!(
                "a context of {positions} tokens takes {} of KV cache when it is full, and {} are free; memory is taken as the context fills, and where it is used up generation ends",
                mebibytes(shortage.needed),
                mebibytes(shortage.allowed)
            ),
            Notice::FirstTokens { source, tokens } => tracing::info!(
                "calibrating on the first {} of {source}; --calib-tokens takes more",
                plural(*tokens, "token")
            ),
            Notice::Effort {
                effort,
                time,
                tokens,
                curves,
                restore,
                less,
            } => say_effort((*effort, *time), *tokens, *curves, *restore, *less),
            Notice::InSequence { bytes } => tracing::info!(
                "restoring in sequence: about three more passes over the text, whose streams take {}",
                mebibytes(*bytes)
            ),
            Notice::BiasesForMemory(shortage) => {
                let which = match shortage.set {
                    true => "--memory",
                    false => "there is for them",
                };
                tracing::warn!(
                    "least squares need the covariances of one layer at least, {}, and that is more than {which} ({}); restoring by biases",
                    mebibytes(shortage.needed),
                    mebibytes(shortage.allowed)
                );
            }
            Notice::BiasesForProfile { profile } => tracing::warn!(
                "{} has no covariances, so that biases have to make up for what goes; `flapjack calibrate --restore lsq` makes one that has",
                profile.display()
            ),
            Notice::TooLargeToKeep { kind, bytes, limit } => tracing::warn!(
                "{} ({}) is not kept for the next run: all together may take {}; {CACHE_SIZE_VARIABLE} sets another limit",
                kept_words(*kind),
                mebibytes(*bytes),
                mebibytes(*limit)
            ),
            Notice::CannotKeep { kind, problem } => tracing::warn!(
                "{} is not kept for the next run: {problem}",
                kept_words(*kind)
            ),
            Notice::SamplingIgnored { path, key, problem } => {
                let key = key.as_ref().map(|key| format!(", {key}"));
                tracing::warn!(
                    "{}{}: {problem}; this recommendation for sampling is passed over",
                    path.display(),
                    key.unwrap_or_default()
                );
            }
            Notice::BeyondTraining { positions, trained } => tracing::warn!(
                "the model was trained for {}, and {positions} are asked for; what comes after the first {trained} may be nonsense",
                plural(*trained, "position")
            ),
            Notice::PromptBeyondTraining { prompt, trained } => tracing::warn!(
                "the prompt has {prompt} tokens, and the model was trained for {trained}, so that what it answers may be nonsense; shorten the prompt"
            ),
            Notice::HealMemory { bytes } => {
                tracing::info!("healing will take about {} of memory", mebibytes(*bytes))
            }
            Notice::NoPlanSearch { bytes, in_groups } => tracing::warn!(
                "no better plan is searched for: {}",
                match in_groups {
                    true => "covariances are collected in groups of layers; allow more --memory"
                        .to_owned(),
                    false => format!("it would take {} of memory", mebibytes(*bytes)),
                }
            ),
            Notice::FewerTokens {
                source,
                tokens,
                asked,
            } => tracing::warn!(
                "{source} has {} in all, fewer than the {asked} of --calib-tokens; all of it is used",
                plural(*tokens, "token")
            ),
            Notice::TypesForZeros { changes } => {
                for change in changes {
                    tracing::warn!(
                        "{} in {} {} {} now: {} has no place for weights that are gone",
                        plural(change.projections, "projection"),
                        change.from,
                        if change.projections == 1 {
                            "is in"
                        } else {
                            "are in"
                        },
                        change.to,
                        change.from,
                    );
                }
            }
            Notice::StayAsLarge {
                block_type,
                projections,
            } => tracing::warn!(
                "{} in {block_type} {} zeros and as many bytes as before: the type has no sparse form, or it would not be smaller",
                plural(*projections, "projection"),
                if *projections == 1 { "has" } else { "have" },
            ),
            Notice::KeptDense {
                block_type,
                projections,
                isa,
            } => tracing::warn!(
                "{} in {block_type} {} kept dense, with zeros and as many bytes as before: on {isa} answers come more slowly from the sparse form of this type",
                plural(*projections, "projection"),
                if *projections == 1 { "is" } else { "are" },
            ),
            Notice::SlowerSparse {
                block_type,
                projections,
                isa,
            } => tracing::warn!(
                "{} in {block_type} {} sparse, and on {isa} answers come more slowly from that than from the dense model; the type has no zero that it could be kept dense with",
                plural(*projections, "projection"),
                if *projections == 1 { "is" } else { "are" },
            ),
            Notice::ChatTemplate { problem } => {
                tracing::warn!("the model's chat template cannot be used: {problem}");
            }
            Notice::MuchWorse { effect, ratio } => {
                tracing::warn!("{}", much_worse(effect, *ratio));
            }
        }
    }
}

fn kept_words(kind: CacheKind) -> &'static str {
    match kind {
        CacheKind::Profile => "the profile",
        CacheKind::Outcome => "the outcome of pruning",
        CacheKind::Hash => "the hash of the profile",
        CacheKind::Text => "the text that the model has written",
        CacheKind::Training => "what healing has done so far",
        CacheKind::Partial => "what calibration has collected so far",
    }
}

/// Says what an effort has time for, as progress is: it stands before work that takes long.
fn say_effort(
    (effort, time): (Effort, Duration),
    tokens: usize,
    curves: Option<(usize, usize)>,
    restore: Restore,
    less: bool,
) {
    if is_quiet() {
        return;
    }
    let curves = match curves {
        Some((tokens, 1)) => format!("loss curves on {tokens} of them"),
        Some((tokens, stride)) => {
            format!("loss curves of one layer in {stride} on {tokens} of them")
        }
        None => "no loss curves".to_owned(),
    };
    let restore = match restore {
        Restore::None => "nothing made up for",
        Restore::Bias => "biases",
        Restore::Auto | Restore::Lsq => "least squares",
        Restore::Sequential => "least squares in sequence",
    };
    let more = match (less, effort) {
        (true, Effort::Fast) => "; --effort normal, which takes up to a minute, does more",
        (true, Effort::Normal) => "; --effort best, which takes up to ten minutes, does more",
        _ => "",
    };
    say(&format!(
        "--effort {effort}: about {:.0} s on two cores with AVX-512, for {}, {curves}, {restore}{more}",
        time.as_secs_f64(),
        plural(tokens, "token")
    ));
}

const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";

fn log_metadata(warning: &MetadataWarning) {
    match warning {
        // An array cannot be given by hand.
        MetadataWarning::Ignored { key, problem } if key == TOKEN_TYPE => {
            tracing::warn!("metadata key {key}: {problem}; it is ignored");
        }
        MetadataWarning::Ignored { key, problem } => tracing::warn!(
            "metadata key {key}: {problem}; it is ignored, --override-kv {key}=TYPE:VALUE takes another value"
        ),
        MetadataWarning::Missing { key, assumed } => match key.as_str() {
            // Most files that lack it were made when it was the same for all models.
            key if key.ends_with("rope.freq_base") => {
                tracing::info!("the file does not have {key}; {assumed} is assumed");
            }
            "tokenizer.ggml.pre" => tracing::warn!(
                "the file does not say how text is split into words ({key}), and it may be split otherwise than in training, which makes the model worse; {assumed:?} is assumed, --override-kv {key}=str:NAME takes another way"
            ),
            TOKEN_TYPE => tracing::warn!(
                "the file does not say which tokens are control tokens ({key}); they are taken for text"
            ),
            key => tracing::warn!(
                "the file does not have {key}; {assumed} is assumed, --override-kv {key}=TYPE:VALUE takes another value"
            ),
        },
    }
}

// ---- errors ----

/// The error and its causes on one line, and what to do next. A cause that a message already tells is not told again.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let words = cause.to_string();
        if text.is_empty() {
            text = words;
        } else if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
    }
    let advice = error.chain().find_map(advice).unwrap_or_default();
    text + &advice
}

/// Whether the error is only that the work was called off.
pub fn is_cancelled(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let pruning = match cause.downcast_ref() {
            Some(EngineError::Prune(error)) => error.is_cancelled(),
            Some(EngineError::Cancelled(_)) => true,
            _ => false,
        };
        pruning || cause.is::<Cancelled>()
    })
}

/// What to do about an error, in the command line's own terms; `None` where its message is all there is to say.
fn advice(cause: &(dyn Error + 'static)) -> Option<String> {
    if let Some(error) = cause.downcast_ref::<EngineError>() {
        return engine_advice(error);
    }
    if let Some(error) = cause.downcast_ref::<Box<EngineError>>() {
        return engine_advice(error);
    }
    if let Some(error) = cause.downcast_ref::<HubError>() {
        return hub_advice(error);
    }
    generate_advice(cause.downcast_ref()?)
}

fn hub_advice(error: &HubError) -> Option<String> {
    let words = match error {
        HubError::Local { path, .. } if is_like_a_repository(path) => {
            ", with -m, and a repository of the hub by --hf"
        }
        HubError::Local { .. } => ", with -m",
        HubError::NoCacheFolder | HubError::Cache { .. } | HubError::Fetch { .. } => {
            "; -m takes the path of one"
        }
        _ => return None,
    };
    Some(words.to_owned())
}

/// Whether a path that leads nowhere could be meant as `org/repo`.
fn is_like_a_repository(path: &Path) -> bool {
    let named = path.to_str().and_then(|text| Repository::read(text).ok());
    named.is_some_and(|named| !named.id.ends_with(".gguf")) && !path.exists()
}

fn engine_advice(error: &EngineError) -> Option<String> {
    let words = match error {
        EngineError::Hub(error) => return hub_advice(error),
        EngineError::Prune(error) if matches!(error.kind, PruneErrorKind::Sparse(_)) => {
            "; prune the file that this one was made from"
        }
        EngineError::Prune(error) if matches!(error.kind, PruneErrorKind::TooShort { .. }) => {
            "; name a longer text with --calib, or leave it out to use the mixture"
        }
        EngineError::Text(TextError::NoField { others, .. }) if !others.is_empty() => {
            ", choose one with --calib-field"
        }
        EngineError::MetricMemory { .. } => "; choose another --metric, or raise --memory",
        EngineError::LayerMemory { .. } => "; raise --memory, or do without by --restore bias",
        EngineError::Perplexity(PerplexityError::TooShort { .. }) => {
            "; name a longer text or a smaller context with -c"
        }
        EngineError::PruningMemory { .. } => {
            "; prune more, take a smaller file type, or allow more memory"
        }
        EngineError::SequentialMemory { .. } => {
            "; take fewer tokens with --calib-tokens, or --restore lsq"
        }
        EngineError::CurvesOfGroups { .. } => "; take --sparse METHOD:SHARE, or --allocate even",
        EngineError::SparseMemory { .. } => {
            "; take fewer tokens with --calib-tokens, a smaller file type, or allow more memory"
        }
        EngineError::HealMemory { shortage } if shortage.set => {
            "; raise --memory, or take --heal-what low-rank or norms"
        }
        EngineError::HealMemory { .. } => {
            "; take --heal-what low-rank or norms, or allow more memory"
        }
        EngineError::NoSearch(NoSearch::Curves) => {
            "; leave out --budget, or take --effort normal or best and no other --structure"
        }
        EngineError::NoSearch(NoSearch::Family) => "; leave out --budget",
        EngineError::NoSearch(_) => "; leave out --budget, or name a ratio with --prune alone",
        EngineError::HealFamily { .. } => "; leave out --heal",
        EngineError::HealSparse => "; leave out --sparse or --heal",
        EngineError::HealRate { .. } | EngineError::Training(TrainingError::NotNumbers { .. }) => {
            "; take another --heal-rate"
        }
        EngineError::Training(TrainingError::TooShort { .. }) => {
            "; name a longer text with --calib, or allow more of it with --calib-tokens"
        }
        EngineError::Context { .. } => "; leave --ctx out, or ask for less",
        EngineError::ContextMemory { .. } => {
            "; ask for fewer tokens, or take --kv q8_0 for about half of that"
        }
        EngineError::Profile(ProfileError::Io { .. }) => return None,
        EngineError::Profile(_) => "; `flapjack calibrate` makes one",
        EngineError::OutOfReach(OutOfReach::Bytes { .. }) => {
            "; ask for at least that, or take a smaller model or file type"
        }
        EngineError::OutOfReach(OutOfReach::SparsePerplexity { .. }) => {
            "; take a smaller share with --sparse, or allow more"
        }
        EngineError::OutOfReach(OutOfReach::Perplexity { .. }) => {
            "; allow more, or calibrate on more text"
        }
        EngineError::Convert(error) => return convert_advice(error),
        EngineError::Importance(ImportanceError::File { .. }) => {
            "; `flapjack calibrate --imatrix` makes one, and so does llama-imatrix"
        }
        EngineError::Unsuited(unsuited) => return Some(unsuited_advice(unsuited)),
        EngineError::Generate(error) => return generate_advice(error),
        error => {
            let key = error.wanted_key()?;
            return Some(format!("; --override-kv {key}=TYPE:VALUE gives it a value"));
        }
    };
    Some(words.to_owned())
}

fn convert_advice(error: &ConvertError) -> Option<String> {
    let words = match error {
        ConvertError::Requantized { .. } => ", or add --allow-requantize",
        ConvertError::NeedsImportance { .. } => {
            "; give --imatrix FILE or --calib TEXT, or take a larger type"
        }
        ConvertError::Sparse { .. } => "; take the file that this one was made from, or keep types",
        ConvertError::OtherImportance { .. } | ConvertError::NoImportance => {
            "; `flapjack calibrate --imatrix` makes one of this model"
        }
        ConvertError::OutOfRange { .. } => "; take bf16 or f32",
        _ => return None,
    };
    Some(words.to_owned())
}

fn unsuited_advice(unsuited: &Unsuited) -> String {
    match unsuited {
        Unsuited::SingleWeights | Unsuited::Healing => {
            "; name the text with --calib instead of --profile".to_owned()
        }
        Unsuited::Sequential => {
            "; name the text with --calib instead of --profile, or take --restore lsq".to_owned()
        }
        Unsuited::NoCurves { .. } => {
            "; make one that has with `flapjack calibrate --structure curves`, or prune with --effort fast or another --structure"
                .to_owned()
        }
        Unsuited::OtherCurves { theirs, ours, .. } => format!(
            "; prune with --metric {} --heads {} --restore {}, or make another profile with `flapjack calibrate --structure curves --metric {} --heads {} --restore {}`",
            theirs.metric, theirs.heads, theirs.restore, ours.metric, ours.heads, ours.restore
        ),
        Unsuited::MetricNeedsCovariances { metric, .. } => {
            format!("; make one that has with `flapjack calibrate --metric {metric}`")
        }
        Unsuited::RestoreNeedsCovariances { restore, .. } => format!(
            "; make one that has with `flapjack calibrate --restore {restore}`, or prune with --restore bias"
        ),
    }
}

fn generate_advice(error: &GenerateError) -> Option<String> {
    let words = match error {
        GenerateError::EmptyPrompt => "; give some text with -p, -f or on standard input",
        GenerateError::Model(ModelError::CacheMemory { .. }) => {
            "; --kv q8_0 takes about half, and a smaller or pruned model leaves more"
        }
        GenerateError::PromptTooLong { .. } => "; shorten the prompt or raise --ctx",
        _ => return None,
    };
    Some(words.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_told_in_its_largest_unit() {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        for (age, words) in [
            (0, "just now"),
            (60, "1 minute ago"),
            (7300, "2 hours ago"),
            (900_000, "10 days ago"),
        ] {
            assert_eq!(ago(now - age), words);
        }
        // A clock that was set back.
        assert_eq!(ago(now + 1000), "just now");
    }
}
