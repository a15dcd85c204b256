//! What a GGUF file is, which is asked before anything in it is looked for: a whole model of an architecture that we run, a part of
//! one, or something that belongs to one.

use std::fmt;
use std::path::{Path, PathBuf};

use super::{Architecture, ModelError};
use crate::count::count;
use crate::gguf::{GgufError, GgufFile};

const ARCHITECTURE: &str = "general.architecture";
const TYPE: &str = "general.type";
/// The number of files that a model is split among, and the place of this one, from 0. A file that was merged again has a count
/// of 0.
const SPLIT_COUNT: &str = "split.count";
const SPLIT_NO: &str = "split.no";

/// What a file is that is not a model. The words say what to name instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Kind {
    #[error(
        "an adapter (LoRA), and not a model; merge it into its base model with `llama-export-lora`, and name the result"
    )]
    Adapter,
    #[error(
        "the image or audio part (mmproj) of a model; name the file of the text model that it belongs to"
    )]
    Projector,
    #[error(
        "an importance matrix, which `llama-quantize` reads, and not a model; name the file of the model"
    )]
    ImportanceMatrix,
    #[error("a control vector, and not a model; name the file of the model that it goes with")]
    ControlVector,
    #[error("a vocabulary without a model; name the file of the model")]
    Vocabulary,
    #[error("a file without tensors, and so not a model; fetch it again, or name another one")]
    Empty,
    #[error("of the type {0:?} ({TYPE}), and not a model; name the file of the model")]
    Other(String),
}

/// The architecture of the model in a file.
///
/// # Errors
/// If the file is only a part of a model, or no model, or one that we do not run: of another architecture, a mixture of experts, or
/// with tensors of types that are not supported.
pub(crate) fn architecture(file: &GgufFile) -> Result<Architecture, ModelError> {
    if let Some(part) = Part::of(file) {
        return Err(ModelError::Part(Box::new(part)));
    }
    if let Some(kind) = kind(file) {
        return Err(ModelError::NotAModel {
            path: file.path().to_owned(),
            kind,
        });
    }
    let name = file.require::<&str>(ARCHITECTURE)?;
    let Some(architecture) = Architecture::from_name(name) else {
        return Err(ModelError::Architecture {
            path: file.path().to_owned(),
            found: name.to_owned(),
        });
    };
    refuse_experts(file, architecture)?;
    file.refuse_unsupported()?;
    Ok(architecture)
}

/// What the file is, if it is not a model.
fn kind(file: &GgufFile) -> Option<Kind> {
    let text = |key| file.get::<&str>(key).ok().flatten();
    let has = |prefix: &str| file.entries().any(|(key, _)| key.starts_with(prefix));
    let (file_type, architecture) = (text(TYPE), text(ARCHITECTURE));
    match (file_type, architecture) {
        (Some("adapter"), _) => return Some(Kind::Adapter),
        (Some("mmproj"), _) | (_, Some("clip")) => return Some(Kind::Projector),
        (Some("imatrix"), _) => return Some(Kind::ImportanceMatrix),
        (_, Some("controlvector")) => return Some(Kind::ControlVector),
        (Some(other), _) if other != "model" => return Some(Kind::Other(other.to_owned())),
        // Files of before `general.type`.
        _ if has("adapter.") => return Some(Kind::Adapter),
        (_, None) if has("imatrix.") => return Some(Kind::ImportanceMatrix),
        _ => {}
    }
    let tensors = file.tensors().len() + file.unsupported().len();
    match (tensors, has("tokenizer.ggml.tokens")) {
        (0, true) => Some(Kind::Vocabulary),
        (0, false) => Some(Kind::Empty),
        _ => None,
    }
}

fn refuse_experts(file: &GgufFile, architecture: Architecture) -> Result<(), GgufError> {
    let key = format!("{}.expert_count", architecture.name());
    if let Some(experts) = file.get::<usize>(&key)?
        && experts > 0
    {
        return Err(file.metadata_error(
            &key,
            format!(
                "{}: mixture-of-experts models are not supported",
                count(experts, "expert")
            ),
        ));
    }
    let names = file.tensors().iter().map(|t| &t.name);
    let mut names = names.chain(file.unsupported().iter().map(|t| &t.name));
    match names.find(|name| name.contains("_exps.") || name.contains(".ffn_gate_inp.")) {
        None => Ok(()),
        Some(name) => Err(file.tensor_error(
            name,
            "belongs to a mixture of experts, and such models are not supported",
        )),
    }
}

/// One of the files that a model is split among.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub path: PathBuf,
    /// Its number from 1; `None` if the file does not say.
    pub number: Option<usize>,
    /// The number of parts.
    pub count: usize,
    /// The other parts, in their order; empty if the name of the file does not tell theirs.
    pub others: Vec<OtherPart>,
}

/// A part that was not opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherPart {
    pub path: PathBuf,
    /// Whether there is such a file.
    pub is_there: bool,
}

impl OtherPart {
    fn name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

/// More parts than any model is split among.
const MOST_PARTS: usize = 65_535;

impl Part {
    /// Which part of a model a file is; `None` for a whole one.
    fn of(file: &GgufFile) -> Option<Self> {
        let number = |key| file.get::<usize>(key).ok().flatten();
        let count = number(SPLIT_COUNT).filter(|count| (2..=MOST_PARTS).contains(count))?;
        let path = file.path().to_owned();
        let named = NamedPart::of(&path);
        let number = number(SPLIT_NO)
            .map(|no| no.saturating_add(1))
            .or(named.as_ref().map(|named| named.number));
        let others = named.map(|named| {
            let numbers = (1..=count).filter(|n| Some(*n) != number);
            let paths = numbers.map(|n| path.with_file_name(named.name_of(n, count)));
            let others = paths.map(|path| OtherPart {
                is_there: path.exists(),
                path,
            });
            others.collect()
        });
        Some(Self {
            number,
            count,
            others: others.unwrap_or_default(),
            path,
        })
    }
}

/// What the name of a part says, as llama.cpp gives it: `model-00002-of-00003.gguf`.
struct NamedPart {
    stem: String,
    number: usize,
}

impl NamedPart {
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, _count) = name.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        Some(Self {
            stem: stem.to_owned(),
            number: number.parse().ok()?,
        })
    }

    fn name_of(&self, number: usize, count: usize) -> String {
        format!("{}-{number:05}-of-{count:05}.gguf", self.stem)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is ", self.path.display())?;
        match self.number {
            Some(number) => write!(f, "part {number} of {}", self.count)?,
            None => write!(f, "one of {} parts", self.count)?,
        }
        write!(f, " of a model that is split among several files")?;
        let (there, missing): (Vec<_>, Vec<_>) = self.others.iter().partition(|p| p.is_there);
        match (there.as_slice(), missing.as_slice()) {
            ([], []) => write!(f, ", whose names do not follow from its own")?,
            (there, []) => write!(f, "; {} beside it", are(there))?,
            ([], missing) => write!(f, "; it is alone, {} missing", are(missing))?,
            (there, missing) => {
                write!(
                    f,
                    "; {} beside it, but {} missing",
                    are(there),
                    are(missing)
                )?;
            }
        }
        let first = match (self.number, self.others.first()) {
            (Some(1), _) => Some(self.path.display()),
            (_, first) => first.map(|part| part.path.display()),
        };
        let fetch = if missing.is_empty() {
            ""
        } else {
            "fetch what is missing, and "
        };
        write!(
            f,
            ". Split models do not run yet: {fetch}merge the parts with "
        )?;
        match first {
            Some(first) => write!(f, "`llama-gguf-split --merge {first} whole.gguf`"),
            None => write!(f, "`llama-gguf-split --merge FIRST-PART whole.gguf`"),
        }
    }
}

impl std::error::Error for Part {}

/// The names of some files with the verb behind them; of many only the first.
fn are(parts: &[&OtherPart]) -> String {
    const MOST: usize = 4;
    let mut names: Vec<String> = parts.iter().take(MOST).map(|part| part.name()).collect();
    match parts.len() - names.len() {
        0 => {}
        more => names.push(format!("{more} more")),
    }
    match names.as_slice() {
        [one] => format!("{one} is"),
        [some @ .., last] => format!("{} and {last} are", some.join(", ")),
        [] => String::new(),
    }
}
