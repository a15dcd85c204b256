//! What a GGUF file is, which is asked before anything in it is looked for: a whole model of an architecture that we run, a part of
//! one, or something that belongs to one.

use super::{Architecture, ModelError};
use crate::count::count;
use crate::gguf::{GgufError, GgufFile, Part};

const ARCHITECTURE: &str = "general.architecture";
const TYPE: &str = "general.type";

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
