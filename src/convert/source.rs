//! What is converted: a model's file or folder, and what of it a GGUF file has in another form.

use std::path::{Path, PathBuf};

use super::rules::{self, Role, Traits};
use super::{ConvertError, OUTPUT};
use crate::checkpoint;
use crate::gguf::{GgufFile, TensorInfo, Value};
use crate::model::{self, Architecture, Config, Rotation};
use crate::quant::BlockType;

/// A model that can be converted.
#[derive(Debug)]
pub struct Source {
    file: GgufFile,
    config: Config,
    /// For each row of a head of queries or keys the number of the source's; `None` where the order stays.
    order: Option<Vec<usize>>,
}

impl Source {
    /// Opens a GGUF file, by any part of a split one, or a folder in Hugging Face's form, with other metadata than its own; see
    /// [`GgufFile::open_with`].
    ///
    /// # Errors
    /// If it cannot be opened, or is no whole model of an architecture that runs.
    pub fn open(
        path: impl AsRef<Path>,
        overrides: &[(String, Value)],
    ) -> Result<Self, ConvertError> {
        let file = checkpoint::open_with(path, overrides)?;
        let architecture = model::architecture(&file)?;
        let config = Config::from_gguf(&file, architecture, &mut Vec::new())?;
        // What the file has, and what a GGUF file of the architecture has.
        let reorders = config.rotation == Rotation::Halves
            && architecture.family().rotation == Rotation::Pairs;
        let half = config.rope_dim / 2;
        let order = reorders.then(|| {
            let row = |row: usize| match row < config.rope_dim {
                true => row % 2 * half + row / 2,
                false => row,
            };
            (0..config.head_dim).map(row).collect()
        });
        Ok(Self {
            file,
            config,
            order,
        })
    }

    pub(super) fn file(&self) -> &GgufFile {
        &self.file
    }

    /// The path that it was opened by, and its bytes.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    pub fn bytes(&self) -> u64 {
        self.file.file_len() as u64
    }

    /// Whether it does not say how text is split into words, which llama.cpp then guesses.
    pub fn lacks_pre_tokenizer(&self) -> bool {
        let has = |key: &str| self.file.metadata().get(key);
        let byte_level = has("tokenizer.ggml.model") == Some(&Value::String("gpt2".into()));
        byte_level && has(crate::tokenize::PRE).is_none()
    }

    /// The type of a tensor where it keeps its own: what is no matrix is in single precision in GGUF files.
    pub(super) fn own_type(&self, tensor: &TensorInfo) -> BlockType {
        match self.file.is_gguf() || rules::may_change(&tensor.name, &tensor.shape) {
            true => tensor.block_type,
            false => BlockType::F32,
        }
    }

    /// The order of the rows of each head of a tensor, if it changes.
    pub(super) fn order_of(&self, name: &str) -> Option<&[usize]> {
        let order = self.order.as_deref()?;
        let turned = [".attn_q.", ".attn_k."];
        turned
            .iter()
            .any(|part| name.contains(part))
            .then_some(order)
    }

    pub(super) fn is_tied(&self) -> bool {
        self.file.tensor(OUTPUT).is_none()
    }

    pub(super) fn traits(&self, by_importance: bool) -> Traits {
        use Architecture::{Deci, Llama, Qwen2};
        let config = &self.config;
        let first = |each: &[usize]| each.first().copied().unwrap_or(0);
        let (heads, kv_heads) = (first(&config.heads), first(&config.kv_heads));
        let tensors = self.file.tensors().iter();
        let values = tensors.filter(|tensor| Role::of(&tensor.name).has_values());
        Traits {
            layers: config.layers(),
            values: values.count(),
            group: heads.checked_div(kv_heads).unwrap_or(0),
            tied: self.is_tied(),
            by_importance,
            is_70b: config.layers() == 80
                && match config.architecture {
                    Llama => heads != kv_heads,
                    Deci | Qwen2 => true,
                    _ => false,
                },
        }
    }

    /// Whether a file at `path` would take the place of this one, or of a file of it.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        let real = |path: &Path| path.canonicalize().ok();
        let (Some(there), Some(own)) = (real(path), real(self.path())) else {
            return false;
        };
        if there == own {
            return true;
        }
        let beside = there.parent() == own.parent();
        let name = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default();
            name.to_string_lossy().into_owned()
        };
        let (there, own) = (name(&there), name(&own));
        beside
            && match self.file.is_gguf() {
                // "model-00001-of-00003.gguf" and its like.
                true => part_of(&there).is_some() && part_of(&there) == part_of(&own),
                false => there.ends_with(".safetensors"),
            }
    }
}

/// What the names of all parts of a split model have in common; `None` of another name.
fn part_of(name: &str) -> Option<(&str, &str)> {
    let stem = name.strip_suffix(".gguf")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (model, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    (digits(count) && digits(number)).then_some((model, count))
}
