//! `--calib` and what belongs to it: where calibration text comes from, and profiles that are kept.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::{ArgMatches, Args, Command};
use flapjack::generate::Texts;
use flapjack::gguf::GgufFile;
use flapjack::hub;
use flapjack::prune::{self, Calibration, Origin, Profile, StoredProfile, calibrate, store};
use flapjack::tokenize::Tokenizer;

use super::options::Loaded;
use super::progress;

/// Tokens that are used of a text of the user's unless --calib-tokens says otherwise.
const DEFAULT_TEXT_TOKENS: usize = 32_768;
/// Tokens that a model writes for its own calibration unless it is asked for another number.
const DEFAULT_OWN_TOKENS: usize = 8192;
/// Profiles in the cache folder; each is some MiB.
const MOST_KEPT: usize = 64;
/// More than this takes days.
const MOST_OWN_TOKENS: usize = 1 << 24;
/// A change of how own text is made must change this.
const OWN_TEXT_VERSION: u32 = 1;
/// No token of a usual vocabulary is longer on average than this in running text.
const BYTES_PER_TOKEN: usize = 16;
/// The field of JSON lines that holds the text.
const DEFAULT_FIELD: &str = "text";

#[derive(Debug, Clone, Default, Args)]
#[group(skip)]
pub struct CalibrationOptions {
    /// Calibrate on another text than the built-in one: a text file, a folder of text files, a file of JSON lines (.jsonl),
    /// - for standard input, or self:N for N tokens that the model writes itself (self alone: 8192)
    #[arg(long, value_name = "SOURCE", value_parser = parse_source)]
    pub calib: Option<Source>,
    /// The field of JSON lines that holds the text [default: text]
    #[arg(long, value_name = "NAME", requires = "calib")]
    pub calib_field: Option<String>,
    /// Calibrate on the first N tokens only [default: all of the built-in text and of self, 32768 of another]
    #[arg(long, value_name = "N")]
    pub calib_tokens: Option<usize>,
}

/// [`CalibrationOptions`] where they make sense only with `--prune`.
#[derive(Debug, Clone)]
pub struct WithPrune(pub CalibrationOptions);

impl clap::FromArgMatches for WithPrune {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        CalibrationOptions::from_arg_matches(matches).map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

impl Args for WithPrune {
    fn augment_args(command: Command) -> Command {
        let options = CalibrationOptions::augment_args(Command::new(""));
        let options = options.get_arguments();
        command.args(options.map(|option| option.clone().requires("prune")))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Where calibration text comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    BuiltIn,
    StandardInput,
    /// So many tokens that the model writes itself.
    Own(usize),
    Path(PathBuf),
}

fn parse_source(text: &str) -> Result<Source, String> {
    if let Some(tokens) = text.strip_prefix("self:") {
        return match tokens.parse() {
            Ok(n) if n <= MOST_OWN_TOKENS => Ok(Source::Own(n)),
            _ => Err(format!(
                "self: takes a number of tokens up to {MOST_OWN_TOKENS} (a file of this name is ./{text})"
            )),
        };
    }
    Ok(match text {
        "" => return Err("must name a text; leave --calib out to use the built-in one".into()),
        "-" => Source::StandardInput,
        "self" => Source::Own(DEFAULT_OWN_TOKENS),
        path => Source::Path(path.into()),
    })
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::BuiltIn => f.write_str("the built-in text"),
            Source::StandardInput => f.write_str("standard input"),
            Source::Own(_) => f.write_str("the model's own text"),
            Source::Path(path) => path.display().fmt(f),
        }
    }
}

/// A profile and what it took to get it.
#[derive(Debug, Clone)]
pub struct Calibrated {
    pub profile: Profile,
    pub origin: Origin,
    pub time: Duration,
    /// It was not calibrated now: the profile was there.
    pub kept: bool,
}

impl Calibrated {
    pub fn stored(&self) -> StoredProfile {
        StoredProfile {
            origin: self.origin.clone(),
            profile: self.profile.clone(),
        }
    }
}

/// A profile from a file that the user names.
pub fn from_file(loaded: &Loaded, path: &Path) -> Result<Calibrated> {
    let start = Instant::now();
    let stored = StoredProfile::load(path)?;
    let (fingerprint, name) = identity(loaded)?;
    stored.check_model(path, &fingerprint, &name)?;
    Ok(Calibrated {
        profile: stored.profile,
        origin: stored.origin,
        time: start.elapsed(),
        kept: true,
    })
}

/// The fingerprint and the name of the model's file. It is mapped anew, because packing has rearranged the other map.
fn identity(loaded: &Loaded) -> Result<(String, String)> {
    let path = loaded.model.path();
    let name = path.file_name().unwrap_or(path.as_os_str());
    Ok((
        GgufFile::open(path)?.fingerprint(),
        name.to_string_lossy().into_owned(),
    ))
}

impl CalibrationOptions {
    pub fn reads_standard_input(&self) -> bool {
        self.calib == Some(Source::StandardInput)
    }

    /// Calibrates, or takes the profile of an earlier run from the cache folder if `cached`.
    pub fn calibrate(&self, loaded: &Loaded, cached: bool) -> Result<Calibrated> {
        let source = self.calib.clone().unwrap_or(Source::BuiltIn);
        let start = Instant::now();
        let bos = loaded
            .tokenizer
            .bos()
            .filter(|_| loaded.tokenizer.adds_bos());
        // Own text is known by how it is made, so that it need not be made to find its profile.
        let (mut tokens, text) = match source {
            Source::Own(n) => {
                let n = self.calib_tokens.map_or(n, |limit| n.min(limit));
                let recipe = format!("own text {OWN_TEXT_VERSION}: {n} tokens");
                (vec![0; n], store::hash_recipe(&recipe))
            }
            _ => {
                let tokens = self.tokens_of(&source, &loaded.tokenizer)?;
                let hash = store::hash_tokens(&tokens, bos);
                (tokens, hash)
            }
        };
        if tokens.len() < calibrate::LEAST_TOKENS {
            let (tokens, least) = (tokens.len(), calibrate::LEAST_TOKENS);
            let error = prune::PruneError::TooShort { tokens, least };
            return Err(error).with_context(|| format!("calibrating on {source}"));
        }

        let (model, model_name) = identity(loaded)?;
        let origin = Origin {
            model,
            model_name,
            text,
            source: source.to_string(),
            tokens: tokens.len(),
            flapjack: env!("CARGO_PKG_VERSION").to_owned(),
        };
        if cached && let Some(profile) = find(&origin) {
            return Ok(Calibrated {
                profile,
                origin,
                time: start.elapsed(),
                kept: true,
            });
        }
        if let Source::Own(_) = source {
            tokens = own_text(loaded, tokens.len(), bos)?;
        }
        let bar = progress::bar("calibrating", tokens.len() as u64, "tokens");
        let calibration = Calibration {
            tokens: &tokens,
            bos,
        };
        let profile = prune::calibrate(
            &loaded.model,
            &loaded.runtime,
            calibration,
            &mut |done, _| bar.set_position(done as u64),
        )
        .with_context(|| format!("calibrating on {source}"))?;
        bar.finish_and_clear();
        let calibrated = Calibrated {
            profile,
            origin,
            time: start.elapsed(),
            kept: false,
        };
        if cached {
            keep(&calibrated);
        }
        Ok(calibrated)
    }

    /// The tokens of a text that is there to be read.
    fn tokens_of(&self, source: &Source, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let limit = self.calib_tokens.unwrap_or(match source {
            Source::BuiltIn => usize::MAX,
            _ => DEFAULT_TEXT_TOKENS,
        });
        let text = source.read(
            limit.saturating_mul(BYTES_PER_TOKEN),
            self.calib_field.as_deref(),
        )?;
        let tokens = first_tokens(tokenizer, &text, limit)?;
        if self.calib_tokens.is_none() && tokens.len() == limit {
            tracing::info!(
                "calibrating on the first {limit} tokens of {source}; --calib-tokens takes more"
            );
        }
        Ok(tokens)
    }
}

/// So many tokens that the model writes, in texts that fill a sequence of calibration each.
fn own_text(loaded: &Loaded, tokens: usize, bos: Option<u32>) -> Result<Vec<u32>> {
    let tokenizer = &loaded.tokenizer;
    let sequence = calibrate::SEQUENCE.min(loaded.model.config.context_length);
    // Where calibration puts the token that begins texts in front, it is not part of the text.
    let skip = usize::from(bos.is_some());
    // A control token says nothing by itself.
    let starts: Vec<u32> = (0..tokenizer.vocab_size() as u32)
        .filter(|token| !tokenizer.token_bytes(*token).is_empty())
        .collect();
    let texts = Texts {
        count: tokens.div_ceil((sequence - skip).max(1)),
        tokens: sequence,
        bos,
        starts: &starts,
        vocabulary: tokenizer.vocab_size(),
        seed: 0,
    };
    let bar = progress::bar("writing", (texts.count * texts.tokens) as u64, "tokens");
    let written = texts
        .write(&loaded.model, &loaded.runtime, &mut |done, _| {
            bar.set_position(done as u64);
        })
        .context("writing the calibration text")?;
    bar.finish_and_clear();
    let mut own: Vec<u32> = written.iter().flat_map(|t| &t[skip..]).copied().collect();
    own.truncate(tokens);
    tracing::debug!(
        "the model wrote: {:?}",
        tokenizer.decode(&own[..own.len().min(sequence)])
    );
    Ok(own)
}

/// Where a profile of this origin is kept.
fn kept_path(origin: &Origin) -> Option<PathBuf> {
    let folder = hub::profiles_dir().ok()?;
    let (model, text) = (origin.model.get(..32)?, origin.text.get(..32)?);
    Some(folder.join(format!("{model}-{text}-v{}.profile", store::VERSION)))
}

/// The profile of an earlier run. One that cannot be used is made anew.
fn find(origin: &Origin) -> Option<Profile> {
    let path = kept_path(origin)?;
    if !path.exists() {
        return None;
    }
    match StoredProfile::load(&path) {
        Ok(stored)
            if (&stored.origin.model, &stored.origin.text) == (&origin.model, &origin.text)
                && stored.origin.flapjack == origin.flapjack =>
        {
            Some(stored.profile)
        }
        Ok(_) => None,
        Err(error) => {
            tracing::warn!("{error}; calibrating again");
            None
        }
    }
}

/// Keeps a profile for the next run. A cache folder that cannot be written is no error: the profile is in hand.
fn keep(calibrated: &Calibrated) {
    let Some(path) = kept_path(&calibrated.origin) else {
        return;
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    let result = fs::create_dir_all(folder)
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok(calibrated.stored().save(&path)?));
    match result {
        Ok(()) => forget_oldest(folder),
        Err(error) => tracing::info!("the profile is not kept for the next run: {error}"),
    }
}

/// Leaves the [`MOST_KEPT`] youngest profiles of the cache folder.
fn forget_oldest(folder: &Path) {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut profiles: Vec<_> = files
        .map(|file| file.path())
        .filter(|path| path.extension().is_some_and(|e| e == "profile"))
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .collect();
    profiles.sort();
    let old = profiles.len().saturating_sub(MOST_KEPT);
    for (_, path) in &profiles[..old] {
        if let Err(error) = fs::remove_file(path) {
            tracing::debug!("cannot remove {}: {error}", path.display());
        }
    }
}

/// The first `limit` tokens of a text, without tokenising all of a long one.
fn first_tokens(tokenizer: &Tokenizer, text: &str, limit: usize) -> Result<Vec<u32>> {
    let mut end = limit.saturating_mul(BYTES_PER_TOKEN).min(text.len());
    while !text.is_char_boundary(end) {
        end += 1;
    }
    let mut tokens = tokenizer.encode(&text[..end])?;
    tokens.truncate(limit);
    Ok(tokens)
}

impl Source {
    /// The text, or at least its first `limit` bytes.
    fn read(&self, limit: usize, field: Option<&str>) -> Result<String> {
        let mut text = Text {
            text: String::new(),
            limit,
            field,
        };
        match self {
            Source::BuiltIn => text.append(calibrate::TEXT),
            // There is none before the model has written it.
            Source::Own(_) => {}
            Source::StandardInput => text.add("standard input", io::stdin().lock(), false)?,
            Source::Path(path) if path.is_dir() => text.add_folder(path)?,
            Source::Path(path) => text.add_file(path)?,
        }
        Ok(text.text)
    }
}

/// Text in the making; it stops growing at its limit.
struct Text<'a> {
    text: String,
    limit: usize,
    field: Option<&'a str>,
}

impl Text<'_> {
    fn is_full(&self) -> bool {
        self.text.len() >= self.limit
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        let lines = matches!(extension, "jsonl" | "ndjson");
        self.add(
            &path.display().to_string(),
            BufReader::with_capacity(1 << 20, file),
            lines,
        )
    }

    /// All text files of a folder and of the folders in it, in the order of their paths. Hidden ones, and those that are
    /// not text, are passed over.
    fn add_folder(&mut self, folder: &Path) -> Result<()> {
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
        if texts == 0 {
            bail!("{} has no text files in it", folder.display());
        }
        Ok(())
    }

    fn add(&mut self, name: &str, mut reader: impl BufRead, json_lines: bool) -> Result<()> {
        if json_lines || self.field.is_some() {
            return self.add_json_lines(name, reader);
        }
        let room = self.limit.saturating_sub(self.text.len());
        let mut bytes = Vec::new();
        reader
            .by_ref()
            .take(room as u64)
            .read_to_end(&mut bytes)
            .with_context(|| format!("cannot read {name}"))?;
        let text = match str::from_utf8(&bytes) {
            Ok(text) => text,
            // The limit may have cut a character in two.
            Err(error) if error.error_len().is_none() && bytes.len() == room => {
                str::from_utf8(&bytes[..error.valid_up_to()])?
            }
            Err(error) => bail!(
                "{name} is not UTF-8 text: the byte at offset {} is out of place",
                error.valid_up_to()
            ),
        };
        self.append(text);
        Ok(())
    }

    fn add_json_lines(&mut self, name: &str, reader: impl BufRead) -> Result<()> {
        let field = self.field.unwrap_or(DEFAULT_FIELD);
        for (i, line) in reader.lines().enumerate() {
            if self.is_full() {
                break;
            }
            let at = || format!("{name}, line {}", i + 1);
            let line = line.with_context(|| format!("cannot read {}", at()))?;
            if line.trim().is_empty() {
                continue;
            }
            let value: serde_json::Value =
                serde_json::from_str(&line).with_context(|| format!("{} is not JSON", at()))?;
            let text = value.get(field).and_then(|v| v.as_str()).ok_or_else(|| {
                let fields: Vec<&str> = value
                    .as_object()
                    .into_iter()
                    .flat_map(|o| o.iter())
                    .filter(|(_, v)| v.is_string())
                    .map(|(key, _)| key.as_str())
                    .collect();
                match fields[..] {
                    [] => anyhow!("{} has no field of text {field:?}, nor any other", at()),
                    _ => anyhow!(
                        "{} has no field of text {field:?}; it has {fields:?}, choose one with --calib-field",
                        at()
                    ),
                }
            })?;
            self.append(text);
        }
        Ok(())
    }

    /// Texts are apart by an empty line.
    fn append(&mut self, text: &str) {
        if !self.text.is_empty() && !text.is_empty() {
            self.text.push_str("\n\n");
        }
        self.text.push_str(text);
    }
}

fn list_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let cannot = || format!("cannot read the folder {}", folder.display());
    for entry in fs::read_dir(folder).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        // A link to a folder is not followed: it may lead back.
        let kind = entry.file_type().with_context(cannot)?;
        if kind.is_dir() {
            list_files(&entry.path(), files)?;
        } else if entry.path().is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Whether the beginning of a file is UTF-8 without zero bytes.
fn looks_like_text(path: &Path) -> Result<bool> {
    const BEGINNING: u64 = 8192;
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(BEGINNING).read_to_end(&mut bytes))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(!bytes.contains(&0)
        && match str::from_utf8(&bytes) {
            Ok(_) => true,
            Err(error) => error.error_len().is_none() && bytes.len() as u64 == BEGINNING,
        })
}
