//! A model as Hugging Face's programs keep it: a folder with `config.json`, `tokenizer.json` and weights in safetensors files.
//!
//! [`open`] makes of it what a GGUF file is: the same metadata, and tensors of the same names, as views on the mapped files. Nothing of
//! the weights is copied but what the two formats have in different forms, vectors of some KiB: the norms of Gemma, of which 1 is
//! missing there, and factors of rotation, which there are numbers of `config.json`. They lie behind the files in the same map.
//!
//! | file | what it does |
//! | --- | --- |
//! | `settings` | metadata, from `config.json` |
//! | `names` | names of tensors |
//! | `vocabulary` | the tokenizer's metadata, from `tokenizer.json` (else `tokenizer.model`) and `tokenizer_config.json` |
//! | `sentencepiece` | the file `tokenizer.model` |
//!
//! Sources: the safetensors format; for names and settings, the models' code in Hugging Face's transformers.

mod names;
mod sentencepiece;
mod settings;
mod vocabulary;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use serde_json::Value as Json;

use crate::gguf::{GgufError, GgufFile, Map, Shown, TensorInfo, Value};
use crate::quant::{BlockType, Layout, decode_row};
use settings::Settings;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";
const SENTENCEPIECE: &str = "tokenizer.model";
/// Larger files of JSON are none of a model.
const MOST_BYTES: u64 = 256 << 20;

/// Opens a model by any path that names it: a GGUF file, a folder of Hugging Face's form, or a file of its weights.
///
/// # Errors
/// Those of [`GgufFile::open`]; of a folder, if a file of it is missing or damaged, or it asks for what we do not run.
pub fn open(path: impl AsRef<Path>) -> Result<GgufFile, GgufError> {
    match folder_of(path.as_ref()) {
        Some(folder) => Folder::new(folder).open(),
        None => GgufFile::open(path),
    }
}

/// As [`open`], with other metadata than the model's own; see [`GgufFile::open_with`].
///
/// # Errors
/// Those of [`open`].
pub fn open_with(
    path: impl AsRef<Path>,
    overrides: &[(String, Value)],
) -> Result<GgufFile, GgufError> {
    Ok(open(path)?.overridden_by(overrides))
}

/// The name of a model that a path names: that of the folder, or of the file without its ending.
pub fn name_of(path: &Path) -> String {
    let folder = folder_of(path).map(|folder| folder.canonicalize().unwrap_or(folder));
    let name = match &folder {
        Some(folder) => folder.file_name(),
        None => path.file_stem(),
    };
    name.unwrap_or_default().to_string_lossy().into_owned()
}

/// The `tokenizer.json` of a model that [`open`] has made of a folder; `None` for any other, and for one with a `tokenizer.model` alone.
///
/// # Errors
/// If it cannot be read.
pub fn tokenizer_json(file: &GgufFile) -> Result<Option<Json>, GgufError> {
    match folder_of(file.path()) {
        Some(folder) => Folder::new(folder).optional_json(TOKENIZER),
        None => Ok(None),
    }
}

/// The folder that a path names, itself or by a file of weights in it that has a `config.json` beside it.
fn folder_of(path: &Path) -> Option<PathBuf> {
    if path.is_dir() {
        return path.join(CONFIG).is_file().then(|| path.to_owned());
    }
    let name = path.file_name()?.to_string_lossy().into_owned();
    let weights = name.ends_with(".safetensors") || name == INDEX;
    let folder = path.parent()?;
    (weights && folder.join(CONFIG).is_file()).then(|| folder.to_owned())
}

/// A folder, and what is read of it.
struct Folder {
    path: PathBuf,
}

/// A tensor of a file of weights: where it is in the map.
struct Found {
    info: TensorInfo,
    file: usize,
}

impl Folder {
    fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn error(&self, file: &str, problem: impl Into<String>) -> GgufError {
        GgufError::Checkpoint {
            path: self.path.join(file),
            problem: problem.into(),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.path.join(name).is_file()
    }

    /// A file that is not one of weights.
    fn bytes(&self, name: &str) -> Result<Vec<u8>, GgufError> {
        let path = self.path.join(name);
        let io = |source| GgufError::Io {
            path: path.clone(),
            source,
        };
        let metadata = std::fs::metadata(&path).map_err(io)?;
        if metadata.len() > MOST_BYTES {
            return Err(self.error(name, "is larger than any such file"));
        }
        std::fs::read(&path).map_err(io)
    }

    /// A file of JSON.
    fn json(&self, name: &str) -> Result<Json, GgufError> {
        serde_json::from_slice(&self.bytes(name)?)
            .map_err(|error| self.error(name, format!("is not JSON: {error}; fetch it again")))
    }

    /// The same; `None` if there is no such file.
    fn optional_json(&self, name: &str) -> Result<Option<Json>, GgufError> {
        match self.has(name) {
            true => self.json(name).map(Some),
            false => Ok(None),
        }
    }

    fn open(&self) -> Result<GgufFile, GgufError> {
        let config = self.json(CONFIG)?;
        let settings = Settings::read(self, &config)?;
        let (entry, files, listed) = self.weight_files()?;
        let paths: Vec<PathBuf> = files.iter().map(|name| self.path.join(name)).collect();

        let (map, ranges) = Map::open_all(&paths).map_err(|(i, source)| GgufError::Io {
            path: paths[i].clone(),
            source,
        })?;
        let mut tensors = BTreeMap::new();
        for (i, (name, range)) in files.iter().zip(&ranges).enumerate() {
            let found = self.tensors_of(name, &map.bytes()[range.clone()], range.start)?;
            for info in found {
                let own = info.name.clone();
                if tensors
                    .insert(own.clone(), Found { info, file: i })
                    .is_some()
                {
                    return Err(self.error(
                        name,
                        format!("an earlier file has the tensor {} too", Shown(&own)),
                    ));
                }
            }
        }
        if let Some(listed) = &listed {
            self.check_listed(listed, &files, &tensors)?;
        }

        let names = names::of(&settings);
        let (mut known, mut made) = (Vec::new(), Vec::new());
        let mut tail = Vec::new();
        let end = map.bytes().len();
        for (own, Found { mut info, file }) in tensors {
            if names::is_passed_over(&own, &settings) {
                continue;
            }
            let Some(name) = names.ours(&own) else {
                let problem = format!(
                    "tensor {}: is not known in a model of type {}, and running without it would give wrong results",
                    Shown(&own),
                    settings.architecture.name()
                );
                return Err(self.error(&files[file], problem));
            };
            info.name = name.to_owned();
            if settings.norms_lack_one && names::is_norm(name) && info.shape.len() == 1 {
                let mut values = vec![0.0; info.shape[0]];
                decode_row(
                    info.block_type,
                    &map.bytes()[info.range.clone()],
                    &mut values,
                );
                values.iter_mut().for_each(|v| *v += 1.0);
                made.push(put(&mut tail, end, name, &values));
            } else {
                known.push(info);
            }
        }
        if !settings.tied && !known.iter().any(|t| t.name == names::OUTPUT) {
            let problem = format!(
                "tensor {}: is missing, and {CONFIG} does not say that it is the embedding (tie_word_embeddings)",
                names::OUTPUT_OWN
            );
            return Err(self.error(&entry, problem));
        }
        for (name, values) in &settings.factors {
            made.push(put(&mut tail, end, name, values));
        }
        known.extend(made);
        known.sort_by(|a, b| names::place(&a.name).cmp(&names::place(&b.name)));

        // What was made stands behind the files, in a map that has room for it.
        let map = match tail.is_empty() {
            true => map,
            false => {
                drop(map);
                let mapped = Map::open_all_with_room(&paths, tail.len());
                let (mut map, again) = mapped.map_err(|(i, source)| GgufError::Io {
                    path: paths[i].clone(),
                    source,
                })?;
                if again != ranges {
                    return Err(self.error(&entry, "has changed while it was read; try again"));
                }
                map.bytes_mut()[end..end + tail.len()].copy_from_slice(&tail);
                map
            }
        };
        let mut metadata = settings.metadata;
        let embedding = known.iter().find(|t| t.name == names::EMBEDDING);
        let rows = embedding.and_then(|t| t.shape.first().copied());
        metadata.extend(vocabulary::read(self, &config, rows)?);
        let file_len = ranges.iter().map(|range| range.len()).sum();
        Ok(GgufFile::assembled(
            &self.path.join(entry),
            map,
            metadata,
            known,
            names.into_own(),
            file_len,
        ))
    }

    /// The file that names the model, the files of weights, and, with an index, which tensor it says is in which of them.
    #[allow(clippy::type_complexity)] // three things that belong together for a moment
    fn weight_files(
        &self,
    ) -> Result<(String, Vec<String>, Option<BTreeMap<String, String>>), GgufError> {
        let Some(index) = self.optional_json(INDEX)? else {
            if !self.path.join(WEIGHTS).is_file() {
                return Err(self.error(
                    "",
                    format!("has no {WEIGHTS} and no {INDEX}; name a folder with a model in safetensors files, or a .gguf model"),
                ));
            }
            return Ok((WEIGHTS.to_owned(), vec![WEIGHTS.to_owned()], None));
        };
        let wrong = || self.error(INDEX, "has no weight_map of names of tensors and of files");
        let map = index.get("weight_map").and_then(Json::as_object);
        let mut listed = BTreeMap::new();
        for (tensor, file) in map.ok_or_else(wrong)? {
            let file = file.as_str().ok_or_else(wrong)?;
            // Files of the folder, and no others.
            if Path::new(file).file_name().is_none_or(|name| name != file) {
                return Err(self.error(
                    INDEX,
                    format!("names the file {file:?}, which is none of the folder"),
                ));
            }
            listed.insert(tensor.clone(), file.to_owned());
        }
        let files: BTreeSet<String> = listed.values().cloned().collect();
        if files.is_empty() {
            return Err(wrong());
        }
        let missing: Vec<&str> = files
            .iter()
            .filter(|file| !self.path.join(file).is_file())
            .map(String::as_str)
            .collect();
        if !missing.is_empty() {
            return Err(self.error(
                INDEX,
                format!(
                    "names {}, which {} missing from the folder; fetch what is missing",
                    missing.join(", "),
                    if missing.len() == 1 { "is" } else { "are" }
                ),
            ));
        }
        Ok((INDEX.to_owned(), files.into_iter().collect(), Some(listed)))
    }

    /// The tensors of a file of these bytes, which begin at byte `start` of the map.
    fn tensors_of(
        &self,
        file: &str,
        bytes: &[u8],
        start: usize,
    ) -> Result<Vec<TensorInfo>, GgufError> {
        let damaged = |problem: String| {
            self.error(
                file,
                format!("{problem}; the file is truncated or damaged, fetch it again"),
            )
        };
        let read = SafeTensors::read_metadata(bytes);
        let (len, metadata): (usize, Metadata) =
            read.map_err(|error| damaged(error.to_string()))?;
        // Behind the length of the header and the header.
        let data = len + 8;
        let mut tensors = Vec::new();
        for name in metadata.offset_keys() {
            let info = metadata
                .info(&name)
                .expect("it has the names that it lists");
            let block_type = match info.dtype {
                Dtype::F32 => BlockType::F32,
                Dtype::F16 => BlockType::F16,
                Dtype::BF16 => BlockType::BF16,
                // Numbers of nothing that is computed, of old files.
                _ if names::is_buffer(&name) => continue,
                other => {
                    let problem = format!(
                        "tensor {}: type {other:?} is not supported (F32, F16 and BF16 are); take the model in one of these, or as GGUF",
                        Shown(&name)
                    );
                    return Err(self.error(file, problem));
                }
            };
            let (from, to) = info.data_offsets;
            let range = data + from..data + to;
            if range.end > bytes.len() {
                return Err(damaged(format!("tensor {} ends behind it", Shown(&name))));
            }
            tensors.push(TensorInfo {
                name,
                shape: info.shape.clone(),
                block_type,
                layout: Layout::Native,
                range: start + range.start..start + range.end,
            });
        }
        Ok(tensors)
    }

    /// Compares what the index says with what the files have.
    fn check_listed(
        &self,
        listed: &BTreeMap<String, String>,
        files: &[String],
        tensors: &BTreeMap<String, Found>,
    ) -> Result<(), GgufError> {
        for (tensor, file) in listed {
            match tensors.get(tensor) {
                Some(found) if files[found.file] == *file => {}
                _ if names::is_buffer(tensor) => {}
                _ => {
                    let problem = format!(
                        "tensor {}: is missing, and {INDEX} says that it is here; fetch both again",
                        Shown(tensor)
                    );
                    return Err(self.error(file, problem));
                }
            }
        }
        match tensors
            .iter()
            .find(|(tensor, _)| !listed.contains_key(*tensor))
        {
            None => Ok(()),
            Some((tensor, found)) => {
                let problem = format!(
                    "tensor {}: {INDEX} does not list it; fetch both again",
                    Shown(tensor)
                );
                Err(self.error(&files[found.file], problem))
            }
        }
    }
}

/// Adds a vector behind the files, which end at byte `end` of the map.
fn put(tail: &mut Vec<u8>, end: usize, name: &str, values: &[f32]) -> TensorInfo {
    let start = end + tail.len();
    tail.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    TensorInfo {
        name: name.to_owned(),
        shape: vec![values.len()],
        block_type: BlockType::F32,
        layout: Layout::Native,
        range: start..end + tail.len(),
    }
}
