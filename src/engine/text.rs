//! Where text comes from: the mixture, the built-in text, files and folders, JSON lines, readers, the model itself. It is read, and made tokens of,
//! in pieces and as far as it is needed.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::prune::calibrate;
use crate::tokenize::{PIECE, Pieces, TokenizeError, Tokenizer};

/// Bytes that no token of a usual vocabulary has on average in running text.
const BYTES_PER_TOKEN: usize = 16;
/// Bytes that are not tokens yet of a text that can be cut.
const MOST_HELD: usize = 4 * PIECE;
/// The field of JSON lines that holds the text, unless another one is named.
const DEFAULT_FIELD: &str = "text";

/// Where text comes from.
#[derive(Debug, Clone, Default)]
pub enum TextSource {
    /// What the model writes itself, also in its chat format, and built-in texts, in turns.
    #[default]
    Mixture,
    BuiltIn,
    /// A text file, a file of JSON lines (`.jsonl`, `.ndjson`), or a folder of such files and of folders.
    Path(PathBuf),
    /// See [`TextSource::reader`].
    Reader(TextReader),
    /// So many tokens that the model writes itself.
    Own(usize),
    /// Tokens of the model's vocabulary.
    Tokens(Arc<[u32]>),
}

/// A text that is read from what a function opens.
#[derive(Clone)]
pub struct TextReader {
    name: String,
    open: Arc<Open>,
}

type Open = dyn Fn() -> io::Result<Box<dyn BufRead>> + Send + Sync;

impl fmt::Debug for TextReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TextReader").field(&self.name).finish()
    }
}

/// The name of the source, for messages, reports and the record of a pruned file.
impl fmt::Display for TextSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TextSource::Mixture => f.write_str("the mixture"),
            TextSource::BuiltIn => f.write_str("the built-in text"),
            TextSource::Path(path) => path.display().fmt(f),
            TextSource::Reader(reader) => f.write_str(&reader.name),
            TextSource::Own(_) => f.write_str("the model's own text"),
            TextSource::Tokens(_) => f.write_str("given tokens"),
        }
    }
}

/// Why a text cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("cannot read {name}")]
    Read { name: String, source: io::Error },
    #[error("cannot read the folder {}", folder.display())]
    Folder { folder: PathBuf, source: io::Error },
    #[error("{} has no text files in it", folder.display())]
    NoTextFiles { folder: PathBuf },
    #[error("{name} is not UTF-8 text: the byte at offset {offset} is out of place")]
    NotUtf8 { name: String, offset: usize },
    #[error("{name}, line {line} is not JSON")]
    NotJson {
        name: String,
        line: usize,
        source: serde_json::Error,
    },
    #[error(
        "{name}, line {line} has no field of text {field:?}{}",
        others_have(others)
    )]
    NoField {
        name: String,
        line: usize,
        field: String,
        /// The fields of text that the line has.
        others: Vec<String>,
    },
    #[error("the model has no tokenizer, and so no text that it could be calibrated on")]
    NoTokenizer,
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
}

fn others_have(others: &[String]) -> String {
    match others {
        [] => ", nor any other".to_owned(),
        _ => format!("; it has {others:?}"),
    }
}

impl TextSource {
    /// A text that is read from what `open` returns; `name` is what messages and reports call it.
    pub fn reader(
        name: impl Into<String>,
        open: impl Fn() -> io::Result<Box<dyn BufRead>> + Send + Sync + 'static,
    ) -> Self {
        TextSource::Reader(TextReader {
            name: name.into(),
            open: Arc::new(open),
        })
    }

    /// The first `limit` tokens, or all if there are fewer. `field` is that of JSON lines; where there is one, every file is
    /// taken for JSON lines. Of what is made there are none before that.
    pub(super) fn first_tokens(
        &self,
        tokenizer: Option<&Tokenizer>,
        field: Option<&str>,
        limit: usize,
    ) -> Result<Vec<u32>, TextError> {
        if let TextSource::Tokens(tokens) = self {
            return Ok(tokens[..limit.min(tokens.len())].to_vec());
        }
        let tokenizer = tokenizer.ok_or(TextError::NoTokenizer)?;
        let mut text = Text::new(tokenizer, field, limit);
        match self {
            TextSource::BuiltIn => text.append(calibrate::TEXT)?,
            TextSource::Path(path) if path.is_dir() => text.add_folder(path)?,
            TextSource::Path(path) => text.add_file(path)?,
            TextSource::Reader(TextReader { name, open }) => {
                let reader = open().map_err(|source| cannot_read(name, source))?;
                text.add(name, reader, false)?;
            }
            TextSource::Mixture | TextSource::Own(_) | TextSource::Tokens(_) => {}
        }
        Ok(text.finish()?)
    }
}

/// The first `limit` tokens of a text, without tokenising all of a long one.
pub(super) fn first_tokens(
    tokenizer: &Tokenizer,
    text: &str,
    limit: usize,
) -> Result<Vec<u32>, TokenizeError> {
    let mut tokens = Text::new(tokenizer, None, limit);
    tokens.append(text)?;
    tokens.finish()
}

fn cannot_read(name: &str, source: io::Error) -> TextError {
    TextError::Read {
        name: name.to_owned(),
        source,
    }
}

/// The tokens of a text, which are made as it is read, until there are enough.
struct Text<'a> {
    pieces: Pieces<'a>,
    tokens: Vec<u32>,
    /// How many tokens are enough.
    limit: usize,
    field: Option<&'a str>,
    /// Whether there is any text yet.
    begun: bool,
}

impl<'a> Text<'a> {
    fn new(tokenizer: &'a Tokenizer, field: Option<&'a str>, limit: usize) -> Self {
        Self {
            pieces: tokenizer.in_pieces(PIECE),
            tokens: Vec::new(),
            limit,
            field,
            begun: false,
        }
    }

    /// Whether there is enough. Where a text cannot be cut, so that no tokens come before its end, its length has to tell.
    fn is_full(&self) -> bool {
        let uncut = self.pieces.held().saturating_sub(MOST_HELD);
        self.tokens.len() >= self.limit || uncut / BYTES_PER_TOKEN >= self.limit
    }

    fn finish(mut self) -> Result<Vec<u32>, TokenizeError> {
        if self.tokens.len() < self.limit {
            self.pieces.finish(&mut self.tokens)?;
        }
        self.tokens.truncate(self.limit);
        self.tokens.shrink_to_fit();
        Ok(self.tokens)
    }

    fn add_file(&mut self, path: &Path) -> Result<(), TextError> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|source| cannot_read(&name, source))?;
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        let lines = matches!(extension, "jsonl" | "ndjson");
        self.add(&name, BufReader::with_capacity(PIECE, file), lines)
    }

    /// Adds all text files of a folder and of the folders in it, in the order of their paths. Hidden ones, and those that are
    /// not text, are passed over.
    fn add_folder(&mut self, folder: &Path) -> Result<(), TextError> {
        let mut files = Vec::new();
        list_files(folder, &mut files)?;
        files.sort();
        let mut texts = 0;
        for file in files {
            if self.is_full() {
                break;
            }
            if !looks_like_text(&file)? {
                tracing::warn!("{} is passed over: it is not text", file.display());
                continue;
            }
            self.add_file(&file)?;
            texts += 1;
        }
        match texts {
            0 => Err(TextError::NoTextFiles {
                folder: folder.to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn add(
        &mut self,
        name: &str,
        mut reader: impl BufRead,
        json_lines: bool,
    ) -> Result<(), TextError> {
        if json_lines || self.field.is_some() {
            return self.add_json_lines(name, reader);
        }
        // What a read ends with may be the beginning of a character.
        let mut bytes = Vec::with_capacity(PIECE);
        let (mut offset, mut is_first) = (0, true);
        while !self.is_full() {
            let room = (PIECE - bytes.len()) as u64;
            let read = reader.by_ref().take(room).read_to_end(&mut bytes);
            let is_last = read.map_err(|source| cannot_read(name, source))? < room as usize;
            let whole = match str::from_utf8(&bytes) {
                Ok(text) => text.len(),
                Err(error) if error.error_len().is_none() && !is_last => error.valid_up_to(),
                Err(error) => {
                    return Err(TextError::NotUtf8 {
                        name: name.to_owned(),
                        offset: offset + error.valid_up_to(),
                    });
                }
            };
            let text = str::from_utf8(&bytes[..whole]).unwrap_or_default();
            match is_first {
                true => self.append(text)?,
                false => self.push(text)?,
            }
            if is_last {
                break;
            }
            bytes.drain(..whole);
            offset += whole;
            is_first = false;
        }
        Ok(())
    }

    fn add_json_lines(&mut self, name: &str, reader: impl BufRead) -> Result<(), TextError> {
        let field = self.field.unwrap_or(DEFAULT_FIELD);
        for (line, content) in (1..).zip(reader.lines()) {
            if self.is_full() {
                break;
            }
            let content =
                content.map_err(|source| cannot_read(&format!("{name}, line {line}"), source))?;
            if content.trim().is_empty() {
                continue;
            }
            let value: serde_json::Value =
                serde_json::from_str(&content).map_err(|source| TextError::NotJson {
                    name: name.to_owned(),
                    line,
                    source,
                })?;
            let text = value.get(field).and_then(|v| v.as_str());
            let text = text.ok_or_else(|| TextError::NoField {
                name: name.to_owned(),
                line,
                field: field.to_owned(),
                others: fields_of_text(&value),
            })?;
            self.append(text)?;
        }
        Ok(())
    }

    /// Adds a text behind an empty line.
    fn append(&mut self, text: &str) -> Result<(), TokenizeError> {
        if self.begun && !text.is_empty() {
            self.push("\n\n")?;
        }
        self.push(text)
    }

    /// Goes on with the text, as far as it is needed.
    fn push(&mut self, mut text: &str) -> Result<(), TokenizeError> {
        self.begun |= !text.is_empty();
        while !text.is_empty() && !self.is_full() {
            let mut end = PIECE.min(text.len());
            while !text.is_char_boundary(end) {
                end += 1;
            }
            let (piece, rest) = text.split_at(end);
            self.pieces.push(piece, &mut self.tokens)?;
            text = rest;
        }
        Ok(())
    }
}

fn fields_of_text(value: &serde_json::Value) -> Vec<String> {
    let fields = value.as_object().into_iter().flatten();
    fields
        .filter(|(_, value)| value.is_string())
        .map(|(name, _)| name.clone())
        .collect()
}

fn list_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), TextError> {
    let cannot = |source| TextError::Folder {
        folder: folder.to_owned(),
        source,
    };
    for entry in fs::read_dir(folder).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // A link to a folder is not followed: it may lead back.
        let kind = entry.file_type().map_err(cannot)?;
        if kind.is_dir() {
            list_files(&entry.path(), files)?;
        } else if entry.path().is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Whether the beginning of a file is UTF-8 without zero bytes.
fn looks_like_text(path: &Path) -> Result<bool, TextError> {
    const BEGINNING: u64 = 8192;
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(BEGINNING).read_to_end(&mut bytes))
        .map_err(|source| cannot_read(&path.display().to_string(), source))?;
    Ok(!bytes.contains(&0)
        && match str::from_utf8(&bytes) {
            Ok(_) => true,
            Err(error) => error.error_len().is_none() && bytes.len() as u64 == BEGINNING,
        })
}
