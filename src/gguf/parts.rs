//! A model that is split among several files, as llama.cpp's `llama-gguf-split` does it: which part a file is, and all parts as one.
//!
//! The first part has the metadata, and each has a tensor table of its own. `split.count` is the number of parts, `split.no` that of
//! the part, from 0, and `split.tensors.count` the number of tensors in all of them. They are mapped one behind the other.

use std::fmt;
use std::path::{Path, PathBuf};

use super::parse::Table;
use super::{GgufError, GgufFile, Map};
use crate::count::count;

/// The number of files that a model is split among. A file that was merged again has a count of 0.
const COUNT: &str = "split.count";
/// The place of a file among them, from 0.
const NUMBER: &str = "split.no";
/// The number of tensors in all of them.
const TENSORS: &str = "split.tensors.count";

/// More parts than any model is split among.
const MOST_PARTS: usize = 65_535;

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

impl Part {
    /// Which part of a model a file is; `None` for a whole one.
    pub fn of(file: &GgufFile) -> Option<Self> {
        let number = |key| file.get::<usize>(key).ok().flatten();
        let count = number(COUNT).filter(|count| (2..=MOST_PARTS).contains(count))?;
        let path = file.path().to_owned();
        let named = NamedPart::of(&path);
        let number = number(NUMBER)
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

    /// The paths of all parts in their order; `None` if some are not there.
    pub(super) fn all(&self) -> Option<Vec<PathBuf>> {
        let place = self.number?.checked_sub(1)?;
        let whole = self.others.len() + 1 == self.count && place < self.count;
        if !whole || self.others.iter().any(|other| !other.is_there) {
            return None;
        }
        let mut paths: Vec<PathBuf> = self.others.iter().map(|o| o.path.clone()).collect();
        paths.insert(place, self.path.clone());
        Some(paths)
    }
}

/// Opens all parts of a model, given in their order, as one file.
///
/// # Errors
/// Those of opening each; if one is not that part of the same model.
pub(super) fn open(paths: &[PathBuf]) -> Result<GgufFile, GgufError> {
    let (map, ranges) = Map::open_all(paths).map_err(|(i, source)| GgufError::Io {
        path: paths[i].clone(),
        source,
    })?;
    let mut parts = paths
        .iter()
        .zip(&ranges)
        .enumerate()
        .map(|(i, (path, range))| {
            let mut table = Table::read(path, &map.bytes()[range.clone()])?;
            check_numbers(paths, i, &table)?;
            for tensor in &mut table.tensors {
                tensor.range = tensor.range.start + range.start..tensor.range.end + range.start;
            }
            Ok::<_, GgufError>(table)
        });
    let mut whole = parts.next().expect("there are parts")?;
    let in_first = whole.tensors.len();
    for (i, part) in parts.enumerate() {
        join(paths, i + 1, &mut whole, part?)?;
    }
    let found = whole.tensors.len() + whole.unsupported.len();
    let expected = whole.metadata.get(TENSORS).and_then(|n| n.as_i128());
    if let Some(expected) = expected.filter(|n| *n != found as i128) {
        return Err(GgufError::Metadata {
            path: paths[0].clone(),
            key: TENSORS.into(),
            problem: format!(
                "the {} have {}, and not {expected}; they are not all of one model, fetch them again",
                count(paths.len(), "part"),
                count(found, "tensor"),
            ),
        });
    }
    for key in [COUNT, NUMBER, TENSORS] {
        whole.metadata.remove(key);
        whole.keys.retain(|k| k != key);
    }
    let mut file = GgufFile::of(&paths[0], map, whole);
    file.later_parts = in_first..file.tensors.len();
    file.file_len = ranges.iter().map(|range| range.len()).sum();
    Ok(file)
}

/// Adds the tensors of part i, from 0, to those of the parts before it.
fn join(paths: &[PathBuf], i: usize, whole: &mut Table, part: Table) -> Result<(), GgufError> {
    for tensor in part.tensors {
        let twin = whole.unsupported.iter().any(|t| t.name == tensor.name);
        let place = whole.tensors.len();
        if twin || whole.by_name.insert(tensor.name.clone(), place).is_some() {
            return Err(twice(paths, i, &tensor.name));
        }
        whole.tensors.push(tensor);
    }
    for tensor in part.unsupported {
        let twin = whole.unsupported.iter().any(|t| t.name == tensor.name);
        if twin || whole.by_name.contains_key(&tensor.name) {
            return Err(twice(paths, i, &tensor.name));
        }
        whole.unsupported.push(tensor);
    }
    // What a part states beside the first one's metadata is the same, or nothing.
    for (key, value) in part.metadata {
        let differs = whole.metadata.get(&key).is_some_and(|own| *own != value);
        if differs && key != NUMBER {
            let problem = format!("its metadata key {key} is {value}, and there it is another");
            return Err(foreign(paths, i, problem));
        }
    }
    Ok(())
}

/// Refuses a file at place i that says that it is another part, or one of another number of them.
fn check_numbers(paths: &[PathBuf], i: usize, table: &Table) -> Result<(), GgufError> {
    let number = |key| table.metadata.get(key).and_then(|value| value.as_i128());
    let problem = match (number(COUNT), number(NUMBER)) {
        (None, _) => "it does not say that it is a part of any".to_owned(),
        (Some(parts), _) if parts != paths.len() as i128 => {
            format!("it is one of {parts} parts")
        }
        (_, Some(no)) if no != i as i128 => format!("it says that it is part {}", no + 1),
        _ => return Ok(()),
    };
    Err(foreign(paths, i, problem))
}

fn foreign(paths: &[PathBuf], i: usize, problem: String) -> GgufError {
    GgufError::ForeignPart {
        path: paths[i].clone(),
        problem: format!(
            "part {} of {} of the model that {} begins: {problem}; fetch that part again",
            i + 1,
            paths.len(),
            paths[0].display(),
        ),
    }
}

fn twice(paths: &[PathBuf], i: usize, tensor: &str) -> GgufError {
    let name = super::Shown(tensor);
    foreign(
        paths,
        i,
        format!("an earlier part has the tensor {name} too"),
    )
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
            ([], []) => {
                let name = "NAME-00001-of-0000N.gguf";
                return write!(
                    f,
                    ", whose names do not follow from its own; give all parts the names that they came with, like {name}"
                );
            }
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
        write!(f, ". Fetch what is missing into the same folder")
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
