//! How this machine likes weights to be read: found out for each type of weights at the first starts with it, and kept in the cache
//! folder. One measurement alone does not decide, since it may have met a moment in which memory was busy.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::CacheFolder;
use super::machine::processor_name;
use crate::eval::{READING_LEAST, fastest_reading, reading_type};
use crate::files::Draft;
use crate::kernels::{Reading, Runtime};
use crate::model::Model;

/// The file in the cache folder.
const FILE: &str = "reading.json";
/// Starts in a row that must have found the same way the fastest.
const AGREEING: u32 = 3;
/// Starts at which it is measured at the most; if they never agree, the usual way stays.
const TRIES: u32 = 9;

/// What was measured, as the file has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// The processor that this was measured on, by its name. On another one everything is measured anew.
    processor: String,
    /// By instruction set, type and threads, as in `avx2 Q4_0 4`.
    readings: BTreeMap<String, Way>,
}

/// What starts have found for a type.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Way {
    /// What the last one found.
    streams: u32,
    fetches: bool,
    /// How many in a row have found the same.
    agreed: u32,
    /// How many have measured.
    tried: u32,
}

impl Way {
    fn is_settled(&self) -> bool {
        self.agreed >= AGREEING || self.tried >= TRIES
    }

    /// How weights are to be read, as far as is known.
    fn reading(&self) -> Reading {
        match self.agreed >= AGREEING {
            true => Reading {
                streams: self.streams,
                fetches: self.fetches,
            },
            false => Reading::usual(),
        }
    }

    /// What is known after another measurement.
    fn and(before: Option<Self>, found: Reading) -> Self {
        let Reading { streams, fetches } = found;
        let (agreed, tried) = match before {
            Some(way) if (way.streams, way.fetches) == (streams, fetches) => {
                (way.agreed, way.tried)
            }
            Some(way) => (0, way.tried),
            None => (0, 0),
        };
        Self {
            streams,
            fetches,
            agreed: agreed + 1,
            tried: tried + 1,
        }
    }
}

/// How a type's weights are read on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MeasuredReading {
    /// Instruction set, type and number of threads, as in `avx2 Q4_0 4`.
    pub of: String,
    /// Groups of rows that are read side by side.
    pub streams: u32,
    /// Whether weights are asked for ahead of their use.
    pub fetches: bool,
}

impl Measured {
    /// What the file of a folder has of this processor: nothing, if there is none, or it is of another one or cannot be read.
    pub(super) fn read(folder: &Path) -> Self {
        let processor = processor_name();
        let text = fs::read_to_string(folder.join(FILE)).unwrap_or_default();
        match serde_json::from_str::<Self>(&text) {
            Ok(measured) if measured.processor == processor => measured,
            _ => Self {
                processor,
                readings: BTreeMap::new(),
            },
        }
    }

    fn write(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        let mut draft = Draft::new(&folder.join(FILE))?;
        draft.file().write_all(&serde_json::to_vec_pretty(self)?)?;
        draft.finish()?;
        Ok(())
    }

    pub(super) fn list(&self) -> Vec<MeasuredReading> {
        let settled = self.readings.iter().filter(|(_, way)| way.is_settled());
        let reading = |(of, way): (&String, &Way)| MeasuredReading {
            of: of.clone(),
            streams: way.reading().streams,
            fetches: way.reading().fetches,
        };
        settled.map(reading).collect()
    }
}

/// The way in which this model's weights are to be read, as far as is known. Until that is settled for their type, every start measures for
/// a tenth of a second and keeps what it finds. `None` for the usual way, where there is nothing to measure, or nowhere to keep it.
pub(super) fn reading(model: &Model, runtime: &Runtime, cache: &CacheFolder) -> Option<Reading> {
    let folder: PathBuf = cache.path()?.to_owned();
    let block_type = reading_type(model, READING_LEAST)?;
    let of = format!(
        "{} {} {}",
        runtime.kernels.isa().name(),
        block_type.name(),
        runtime.pool.threads()
    );
    let mut measured = Measured::read(&folder);
    let before = measured.readings.get(&of).copied();
    if let Some(way) = before.filter(Way::is_settled) {
        return Some(way.reading());
    }
    let way = Way::and(before, fastest_reading(model, runtime, READING_LEAST)?);
    measured.readings.insert(of, way);
    if let Err(error) = measured.write(&folder) {
        tracing::debug!("{}: {error}", folder.join(FILE).display());
    }
    Some(way.reading())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_is_kept_for_this_processor_alone() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("new");
        let mut measured = Measured::read(&folder);
        assert!(measured.list().is_empty());
        let way = Way {
            streams: 4,
            fetches: true,
            agreed: AGREEING,
            tried: 5,
        };
        measured.readings.insert("avx2 Q4_0 4".to_owned(), way);
        measured.write(&folder).unwrap();
        assert_eq!(Measured::read(&folder), measured);
        assert_eq!(Measured::read(&folder).list()[0].streams, 4);
        measured.processor += " of another kind";
        measured.write(&folder).unwrap();
        assert!(Measured::read(&folder).list().is_empty());
        fs::write(folder.join(FILE), "{").unwrap();
        assert!(Measured::read(&folder).list().is_empty());
    }

    #[test]
    fn three_starts_in_a_row_must_agree() {
        let [two, six] = [2, 6].map(|streams| Reading {
            streams,
            fetches: streams == 6,
        });
        let after = |found: &[Reading]| {
            let way = found
                .iter()
                .fold(None, |way, found| Some(Way::and(way, *found)));
            way.unwrap()
        };
        assert!(!after(&[six, six]).is_settled());
        assert_eq!(after(&[six, six]).reading(), Reading::usual());
        assert_eq!(after(&[six, six, six]).reading(), six);
        assert!(!after(&[six, six, two, six]).is_settled());
        assert_eq!(after(&[six, two, two, two]).reading(), two);
        let never = after(&[six, two, six, two, six, two, six, two, six]);
        assert!(never.is_settled());
        assert_eq!(never.reading(), Reading::usual());
    }
}
