//! Where templates come from: the metadata of a GGUF file, files of the hub, and a few of our own.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value as Json;

use super::template::DEFAULT;
use super::{ChatError, ChatTemplate};
use crate::gguf::GgufFile;

const TEMPLATE: &str = "tokenizer.chat_template";
const NAMES: &str = "tokenizer.chat_templates";
/// The largest file that is read as a template.
const MAX_BYTES: u64 = 16 << 20;

impl ChatTemplate {
    /// The template of a model: that in its file's metadata, or else in the files of the hub beside it; `None` if there is none.
    ///
    /// # Errors
    /// The errors of [`ChatTemplate::from_gguf`] and [`ChatTemplate::from_folder`].
    pub fn of_model(file: &GgufFile) -> Result<Option<Self>, ChatError> {
        match (Self::from_gguf(file)?, file.path().parent()) {
            (None, Some(folder)) => Self::from_folder(folder),
            (found, _) => Ok(found),
        }
    }

    /// The templates in a file's metadata: `tokenizer.chat_template`, and those of other names in
    /// `tokenizer.chat_template.NAME`; `None` if there is none.
    ///
    /// # Errors
    /// If one cannot be understood, or is no text.
    pub fn from_gguf(file: &GgufFile) -> Result<Option<Self>, ChatError> {
        let mut templates = Vec::new();
        if let Some(source) = file.get::<&str>(TEMPLATE)? {
            templates.push((DEFAULT.to_owned(), source.to_owned()));
        }
        let mut names: Vec<&str> = Vec::new();
        if let Some(listed) = file.get::<&[String]>(NAMES)? {
            names.extend(listed.iter().map(String::as_str));
        }
        let keys = file.metadata().keys();
        names.extend(keys.filter_map(|key| key.strip_prefix(TEMPLATE)?.strip_prefix('.')));
        for name in names {
            if templates.iter().any(|(known, _)| known == name) {
                continue;
            }
            if let Some(source) = file.get::<&str>(&format!("{TEMPLATE}.{name}"))? {
                templates.push((name.to_owned(), source.to_owned()));
            }
        }
        match templates.is_empty() {
            true => Ok(None),
            false => Self::named(templates).map(Some),
        }
    }

    /// The templates in the files of a model's folder as the hub has them: `chat_template.jinja`, with others in
    /// `additional_chat_templates`, or else `chat_template.json` or `tokenizer_config.json`; `None` if there is none.
    ///
    /// # Errors
    /// If a file cannot be read or a template not be understood.
    pub fn from_folder(folder: &Path) -> Result<Option<Self>, ChatError> {
        let plain = folder.join("chat_template.jinja");
        if plain.is_file() {
            let mut templates = vec![(DEFAULT.to_owned(), read(&plain)?)];
            templates.extend(additional(&folder.join("additional_chat_templates"))?);
            return Self::named(templates).map(Some);
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let path = folder.join(name);
            if path.is_file()
                && let Some(templates) = in_json(&path, &read(&path)?)?
            {
                return Self::named(templates).map(Some);
            }
        }
        Ok(None)
    }

    /// The template in a file: Jinja, JSON that has it under `chat_template` (as `tokenizer_config.json` does), or a GGUF file.
    ///
    /// # Errors
    /// If the file cannot be read or has no template, or the template cannot be understood.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, ChatError> {
        let path = path.as_ref();
        let none = |problem: &str| ChatError::NotATemplate {
            path: path.to_owned(),
            problem: problem.to_owned(),
        };
        if begins_as_gguf(path)? {
            let found = Self::from_gguf(&GgufFile::open(path)?)?;
            return found.ok_or_else(|| none("its metadata have none"));
        }
        let text = read(path)?;
        let is_json = path
            .extension()
            .is_some_and(|extension| extension == "json");
        if is_json || serde_json::from_str::<serde_json::Map<String, Json>>(&text).is_ok() {
            let found = in_json(path, &text)?;
            return Self::named(found.ok_or_else(|| none("there is no chat_template in it"))?);
        }
        Self::new(&text)
    }
}

/// The templates of other names, one in each file of a folder, which need not be there.
fn additional(folder: &Path) -> Result<Vec<(String, String)>, ChatError> {
    let mut templates = Vec::new();
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Ok(templates);
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "jinja")
            && let Some(name) = path.file_stem().and_then(|stem| stem.to_str())
        {
            templates.push((name.to_owned(), read(&path)?));
        }
    }
    templates.sort();
    Ok(templates)
}

/// What JSON has under `chat_template`: one template, or a list of `{"name", "template"}`; `None` if it has no such key.
fn in_json(path: &Path, text: &str) -> Result<Option<Vec<(String, String)>>, ChatError> {
    let wrong = |problem: String| ChatError::NotATemplate {
        path: path.to_owned(),
        problem,
    };
    let json: Json = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
    match json.get("chat_template") {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(source)) => Ok(Some(vec![(DEFAULT.to_owned(), source.clone())])),
        Some(Json::Array(items)) => {
            let pair = |item: &Json| {
                let text = |key| Some(item.get(key)?.as_str()?.to_owned());
                Some((text("name")?, text("template")?))
            };
            let pairs: Option<Vec<_>> = items.iter().map(pair).collect();
            let pairs = pairs.filter(|pairs| !pairs.is_empty());
            let problem = "its chat_template is a list, but not of names and templates";
            pairs.map(Some).ok_or_else(|| wrong(problem.to_owned()))
        }
        Some(_) => Err(wrong(
            "its chat_template is neither a text nor a list".to_owned(),
        )),
    }
}

fn begins_as_gguf(path: &Path) -> Result<bool, ChatError> {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read(&mut magic));
    let read = read.map_err(|source| ChatError::File {
        path: path.to_owned(),
        source,
    })?;
    Ok(magic[..read] == *b"GGUF")
}

fn read(path: &Path) -> Result<String, ChatError> {
    let failed = |source| ChatError::File {
        path: path.to_owned(),
        source,
    };
    let wrong = |problem: &str| ChatError::NotATemplate {
        path: path.to_owned(),
        problem: problem.to_owned(),
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(wrong("it is larger than any template"));
    }
    let text = String::from_utf8(bytes).map_err(|_| wrong("it is no text in UTF-8"))?;
    Ok(text
        .strip_prefix('\u{feff}')
        .map(str::to_owned)
        .unwrap_or(text))
}
