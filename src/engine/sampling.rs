//! How a model wants to be sampled: what its file recommends (`general.sampling.*`, with llama.cpp's names), and what a
//! `generation_config.json` beside it does, as Hugging Face's repositories have them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::report::Notice;
use crate::generate::{SamplerOptions, SamplerStep};
use crate::gguf::{FromValue, GgufFile, Value};

/// The name of the file beside a model.
const CONFIG: &str = "generation_config.json";
/// Larger files are not what they are named.
const MAX_CONFIG: u64 = 1 << 20;

/// What a model's makers recommend for sampling.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SamplingDefaults {
    /// What the metadata of the model's file say.
    pub metadata: SamplerOptions,
    /// What a `generation_config.json` beside it says.
    pub config: SamplerOptions,
    /// The path of that file; `None` where there is none of use.
    pub config_path: Option<PathBuf>,
}

impl SamplingDefaults {
    /// All that is recommended. The metadata come first: they belong to this model for certain.
    pub fn options(&self) -> SamplerOptions {
        self.metadata.or(&self.config)
    }

    /// Reads what is recommended for the model of a file. What is of no use is passed over, with a notice.
    pub(super) fn read(file: &GgufFile, notices: &mut Vec<Notice>) -> Self {
        let metadata = Reader {
            source: Source::Metadata(file),
            path: file.path(),
            notices,
        }
        .metadata();
        let path = file.path().with_file_name(CONFIG);
        let mut ignored = |problem: String| {
            notices.push(Notice::SamplingIgnored {
                path: path.clone(),
                key: None,
                problem,
            });
        };
        let json = match read_config(&path) {
            Ok(Some(text)) => match serde_json::from_str::<Json>(&text) {
                Ok(json @ Json::Object(_)) => Some(json),
                Ok(_) => {
                    ignored("it is not a JSON object".to_owned());
                    None
                }
                Err(error) => {
                    ignored(format!("it is not JSON: {error}"));
                    None
                }
            },
            Ok(None) => None,
            Err(error) => {
                ignored(error.to_string());
                None
            }
        };
        let Some(json) = json else {
            return Self {
                metadata,
                ..Self::default()
            };
        };
        let config = Reader {
            source: Source::Config(&json),
            path: &path,
            notices,
        }
        .config();
        Self {
            metadata,
            config,
            config_path: Some(path),
        }
    }
}

/// The text of the file beside a model; `None` if there is none.
fn read_config(path: &Path) -> io::Result<Option<String>> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_CONFIG => {
            return Err(io::Error::other("it is too large to be one"));
        }
        Ok(metadata) if !metadata.is_file() => return Ok(None),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    }
    fs::read_to_string(path).map(Some)
}

/// Where values are read from.
enum Source<'a> {
    Metadata(&'a GgufFile),
    Config(&'a Json),
}

/// Reads values one by one; one that is of no use is passed over, with a notice.
struct Reader<'a> {
    source: Source<'a>,
    path: &'a Path,
    notices: &'a mut Vec<Notice>,
}

impl Reader<'_> {
    fn metadata(mut self) -> SamplerOptions {
        SamplerOptions {
            temperature: self.number("general.sampling.temp", AT_LEAST_0),
            top_k: self.count("general.sampling.top_k", 0),
            top_p: self.number("general.sampling.top_p", SHARE),
            min_p: self.number("general.sampling.min_p", SHARE),
            repetition_penalty: self.number("general.sampling.penalty_repeat", POSITIVE),
            repetition_window: self.count("general.sampling.penalty_last_n", usize::MAX),
            xtc_probability: self.number("general.sampling.xtc_probability", SHARE),
            xtc_threshold: self.number("general.sampling.xtc_threshold", SHARE),
            mirostat: self.mirostat("general.sampling.mirostat"),
            mirostat_tau: self.number("general.sampling.mirostat_tau", AT_LEAST_0),
            mirostat_eta: self.number("general.sampling.mirostat_eta", AT_LEAST_0),
            steps: self.steps("general.sampling.sequence"),
            ..SamplerOptions::default()
        }
    }

    fn config(mut self) -> SamplerOptions {
        let greedy = self.flag("do_sample") == Some(false);
        let temperature = self.number("temperature", AT_LEAST_0);
        SamplerOptions {
            temperature: match greedy {
                true => Some(0.0),
                false => temperature,
            },
            top_k: self.count("top_k", 0),
            top_p: self.number("top_p", SHARE),
            min_p: self.number("min_p", SHARE),
            repetition_penalty: self.number("repetition_penalty", POSITIVE),
            typical_p: self.number("typical_p", SHARE),
            no_repeat_ngram: self.count("no_repeat_ngram_size", 0),
            ..SamplerOptions::default()
        }
    }

    fn number(&mut self, key: &str, range: Range) -> Option<f32> {
        let value = match self.source {
            Source::Metadata(file) => {
                let value = file.metadata().get(key)?;
                // A converter may have written a whole number as one.
                let number = f32::from_value(value).or(value.as_i128().map(|n| n as f32));
                number.ok_or_else(|| value.to_string())
            }
            Source::Config(json) => {
                let value = json_value(json, key)?;
                let number = value.as_f64().map(|n| n as f32);
                number.ok_or_else(|| shown(value))
            }
        };
        self.fitting(key, value, range.fits, range.words)
    }

    /// A number of things; numbers below zero stand for `negative`.
    fn count(&mut self, key: &str, negative: usize) -> Option<usize> {
        let value = match self.source {
            Source::Metadata(file) => {
                let value = file.metadata().get(key)?;
                value.as_i128().ok_or_else(|| value.to_string())
            }
            Source::Config(json) => {
                let value = json_value(json, key)?;
                let number = value.as_i64().map(i128::from);
                number.ok_or_else(|| shown(value))
            }
        };
        let count = self.fitting(key, value, |_| true, "a whole number")?;
        Some(match count < 0 {
            true => negative,
            false => usize::try_from(count).unwrap_or(usize::MAX),
        })
    }

    fn flag(&mut self, key: &str) -> Option<bool> {
        let Source::Config(json) = self.source else {
            return None;
        };
        let value = json_value(json, key)?;
        let value = value.as_bool().ok_or_else(|| shown(value));
        self.fitting(key, value, |_| true, "true or false")
    }

    /// Whether Mirostat 2.0 is recommended. Of the first version there is nothing here.
    fn mirostat(&mut self, key: &str) -> Option<bool> {
        let version = self.number(key, AT_LEAST_0)?;
        let known = |version| version == 0.0 || version == 2.0;
        let version = self.fitting(key, Ok(version), known, "0 or 2")?;
        Some(version == 2.0)
    }

    /// Steps by their names. Those that nothing is known of are left out, with a notice.
    fn steps(&mut self, key: &str) -> Option<Vec<SamplerStep>> {
        let Source::Metadata(file) = self.source else {
            return None;
        };
        let text = match file.metadata().get(key)? {
            Value::String(text) => text,
            other => {
                self.ignored(key, format!("expected names of steps, found {other}"));
                return None;
            }
        };
        let mut steps = Vec::new();
        for name in text.split(';').map(str::trim).filter(|n| !n.is_empty()) {
            match name.parse() {
                Ok(step) => steps.push(step),
                Err(error) => self.ignored(key, format!("{error}")),
            }
        }
        (!steps.is_empty()).then_some(steps)
    }

    /// A value that fits; `Err` has the words of one of another type.
    fn fitting<T: Copy + std::fmt::Display>(
        &mut self,
        key: &str,
        value: Result<T, String>,
        fits: fn(T) -> bool,
        expected: &str,
    ) -> Option<T> {
        let found = match value {
            Ok(value) if fits(value) => return Some(value),
            Ok(value) => value.to_string(),
            Err(other) => other,
        };
        self.ignored(key, format!("expected {expected}, found {found}"));
        None
    }

    fn ignored(&mut self, key: &str, problem: String) {
        self.notices.push(Notice::SamplingIgnored {
            path: self.path.to_owned(),
            key: Some(key.to_owned()),
            problem,
        });
    }
}

/// A value that is there and not null.
fn json_value<'a>(json: &'a Json, key: &str) -> Option<&'a Json> {
    json.get(key).filter(|value| !value.is_null())
}

/// A value for a message: of a long one the beginning.
fn shown(value: &Json) -> String {
    const SHOWN: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Numbers that mean something.
#[derive(Clone, Copy)]
struct Range {
    fits: fn(f32) -> bool,
    words: &'static str,
}

const AT_LEAST_0: Range = Range {
    fits: |v| v.is_finite() && v >= 0.0,
    words: "a number of at least 0",
};
const SHARE: Range = Range {
    fits: |v| (0.0..=1.0).contains(&v),
    words: "a number from 0 to 1",
};
const POSITIVE: Range = Range {
    fits: |v| v.is_finite() && v > 0.0,
    words: "a number above 0",
};
