//! The record in the metadata of a pruned file of how it was pruned.

use crate::count::count;
use crate::gguf::{GgufError, GgufFile, Value, ValueType};
use crate::model::LayerForm;
use crate::prune::choose::Plan;

/// The beginning of all metadata keys of a record.
pub const PREFIX: &str = "flapjack.prune.";

/// How a file was pruned, beginning with the model that nothing had been removed from yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The version of flapjack.
    pub version: String,
    /// The method, in words.
    pub method: String,
    /// The ratio that was asked for the last time.
    pub asked: f64,
    /// The share of the layers' weights that is gone, in parameters.
    pub ratio: f64,
    /// The parameters of the layers' weights before anything was removed.
    pub parameters: u64,
    /// The [hash](super::StoredProfile::hash) of the profile.
    pub profile: String,
    /// The text that it was calibrated on and how many tokens it has, in words.
    pub calibration: String,
    /// The [fingerprint](GgufFile::fingerprint) of the file that was pruned the last time.
    pub model: String,
    /// Which single weights were set to zero, and by what, in words; `None` where none were.
    pub sparse: Option<String>,
    pub layers: Vec<LayerRecord>,
}

/// What became of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRecord {
    pub heads_before: usize,
    pub channels_before: usize,
    /// For every query head of the file the head that it was; `None` for one of zeros.
    pub heads: Vec<Option<usize>>,
    /// Channels that stayed, without those of zeros.
    pub channels: usize,
}

impl LayerRecord {
    /// The numbers of the heads that stayed.
    pub fn kept_heads(&self) -> Vec<usize> {
        self.heads.iter().flatten().copied().collect()
    }
}

impl Record {
    /// The records of the layers by this plan and in this form. If the pruned file was pruned before, `earlier` tells how, and the
    /// numbers are those of the first model.
    pub fn layers(
        plan: &Plan,
        widths_before: &[(usize, usize)],
        forms: &[LayerForm],
        earlier: Option<&Record>,
    ) -> Vec<LayerRecord> {
        let layers = plan.layers.iter().zip(widths_before).zip(forms);
        layers
            .enumerate()
            .map(|(l, ((kept, &(heads, channels)), form))| {
                let was = earlier.and_then(|r| r.layers.get(l));
                let was = was.filter(|was| was.heads.len() == heads);
                LayerRecord {
                    heads_before: was.map_or(heads, |w| w.heads_before),
                    channels_before: was.map_or(channels, |w| w.channels_before),
                    heads: form
                        .heads
                        .iter()
                        .map(|head| {
                            let head = kept.heads[(*head)?];
                            was.map_or(Some(head), |w| w.heads[head])
                        })
                        .collect(),
                    channels: kept.channels.len(),
                }
            })
            .collect()
    }

    /// The record as metadata.
    pub fn entries(&self) -> Vec<(String, Value)> {
        let numbers = |of: fn(&LayerRecord) -> usize| {
            let items = self.layers.iter().map(|l| Value::U32(of(l) as u32));
            Value::Array(ValueType::U32, items.collect())
        };
        let text = |text: &str| Value::String(text.to_owned());
        let heads = self.layers.iter().map(|l| write_heads(&l.heads)).collect();
        let entries = [
            ("version", text(&self.version)),
            ("method", text(&self.method)),
            ("ratio_asked", Value::F64(self.asked)),
            ("ratio", Value::F64(self.ratio)),
            ("parameters_before", Value::U64(self.parameters)),
            ("profile", text(&self.profile)),
            ("calibration", text(&self.calibration)),
            ("model", text(&self.model)),
            ("heads_before", numbers(|l| l.heads_before)),
            ("heads", Value::StringArray(heads)),
            ("channels_before", numbers(|l| l.channels_before)),
            ("channels", numbers(|l| l.channels)),
        ];
        let sparse = self.sparse.iter().map(|words| ("sparse", text(words)));
        let entries = entries.into_iter().chain(sparse);
        entries
            .map(|(key, value)| (format!("{PREFIX}{key}"), value))
            .collect()
    }

    /// The record of a file; `None` if it has none.
    ///
    /// # Errors
    /// If a part of it is missing or is not what it should be.
    pub fn from_gguf(file: &GgufFile) -> Result<Option<Self>, GgufError> {
        let key = |name: &str| format!("{PREFIX}{name}");
        let Some(version) = file.get::<&str>(&key("version"))? else {
            return Ok(None);
        };
        let text = |name: &str| file.require::<&str>(&key(name)).map(str::to_owned);
        let number = |name: &str| file.require::<f64>(&key(name));
        let heads_key = key("heads");
        let heads: Vec<Vec<Option<usize>>> = file
            .require::<&[String]>(&heads_key)?
            .iter()
            .map(|line| read_heads(line))
            .collect::<Option<_>>()
            .ok_or_else(|| file.metadata_error(&heads_key, "has an entry that lists no heads"))?;
        let counts = |name: &str| -> Result<Vec<usize>, GgufError> {
            let counts = file.require::<Vec<usize>>(&key(name))?;
            if counts.len() != heads.len() {
                return Err(file.metadata_error(
                    &key(name),
                    format!(
                        "has {} for {}",
                        count(counts.len(), "number"),
                        count(heads.len(), "layer")
                    ),
                ));
            }
            Ok(counts)
        };
        let heads_before = counts("heads_before")?;
        let channels_before = counts("channels_before")?;
        let channels = counts("channels")?;
        let layers = heads
            .iter()
            .enumerate()
            .map(|(l, heads)| LayerRecord {
                heads_before: heads_before[l],
                channels_before: channels_before[l],
                heads: heads.clone(),
                channels: channels[l],
            })
            .collect();
        Ok(Some(Self {
            version: version.to_owned(),
            method: text("method")?,
            asked: number("ratio_asked")?,
            ratio: number("ratio")?,
            parameters: file.require::<usize>(&key("parameters_before"))? as u64,
            profile: text("profile")?,
            calibration: text("calibration")?,
            model: text("model")?,
            // Earlier versions removed no single weights.
            sparse: file.get::<&str>(&key("sparse"))?.map(str::to_owned),
            layers,
        }))
    }
}

/// The word that stands for a head of zeros.
const ZEROS: &str = "zeros";
/// The length from which on a list is no list of heads.
const MOST_HEADS: usize = 1 << 16;

/// A list of heads as numbers and runs of numbers: "0-2 5 zeros 7".
fn write_heads(heads: &[Option<usize>]) -> String {
    let runs = heads.chunk_by(|a, b| a.is_some() && *b == a.map(|a| a + 1));
    let words: Vec<String> = runs
        .map(|run| match (run[0], run[run.len() - 1]) {
            (Some(first), Some(last)) if first < last => format!("{first}-{last}"),
            (Some(one), _) => one.to_string(),
            (None, _) => ZEROS.to_owned(),
        })
        .collect();
    words.join(" ")
}

fn read_heads(line: &str) -> Option<Vec<Option<usize>>> {
    let mut heads = Vec::new();
    for word in line.split_ascii_whitespace() {
        if word == ZEROS {
            heads.push(None);
            continue;
        }
        let (first, last) = word.split_once('-').unwrap_or((word, word));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last < first || heads.len() + (last - first) >= MOST_HEADS {
            return None;
        }
        heads.extend((first..=last).map(Some));
    }
    Some(heads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_heads_are_read_as_they_were_written() {
        for (heads, line) in [
            (vec![], ""),
            (vec![Some(3)], "3"),
            (vec![None, None], "zeros zeros"),
            (
                vec![Some(0), Some(1), Some(2), None, Some(3), Some(5)],
                "0-2 zeros 3 5",
            ),
        ] {
            assert_eq!(write_heads(&heads), line);
            assert_eq!(read_heads(line), Some(heads));
        }
        for line in ["x", "3-", "5-4", "0-99999999999", "-1"] {
            assert_eq!(read_heads(line), None, "{line}");
        }
    }
}
