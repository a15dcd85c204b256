//! How a model is named: by a path, by a repository of the hub, or by what Ollama or LM Studio call it.
//!
//! | name | what it is |
//! | --- | --- |
//! | `org/repo`, `org/repo:Q4_K_M`, `org/repo/file.gguf` | a repository of the hub: its file of the usual type, of this type, or this file; `@REVISION` may stand behind the repository |
//! | `hf:…`, `hf.co/…`, `https://huggingface.co/…` | the same, and nothing else |
//! | `ollama:NAME[:TAG]` | a model in Ollama's store |
//! | `lmstudio:PUBLISHER/REPO[/FILE]` | a model in LM Studio's folder |
//! | anything else, and whatever there is a file or folder of | a path |

use std::path::{Component, Path, PathBuf};

use super::errors::NameError;

/// A model as it was named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelName {
    Path(PathBuf),
    Hub(Repository),
    /// A name of Ollama's, without `ollama:`.
    Ollama(String),
    /// A name within LM Studio's folder, without `lmstudio:`.
    LmStudio(String),
}

/// A repository of the hub, and what is wanted of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// Its name, `org/repo`.
    pub id: String,
    /// A branch, a tag, a commit, or a pull request as `refs/pr/N`; `None` for the main branch.
    pub revision: Option<String>,
    pub wanted: Wanted,
}

/// Which of several model files is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The one of the usual type, or of the nearest to it.
    Usual,
    /// One of this type, such as `Q4_K_M`.
    Type(String),
    /// This file, by its path in the repository.
    File(String),
}

/// What begins the name of a repository where a path cannot be meant.
const PREFIXES: [&str; 5] = [
    "hf:",
    "https://huggingface.co/",
    "https://hf.co/",
    "huggingface.co/",
    "hf.co/",
];

/// What stands before the number of a pull request, and how addresses have it.
const PULL_REQUEST: &str = "refs/pr/";
const PULL_REQUEST_ESCAPED: &str = "refs%2Fpr%2F";

impl ModelName {
    /// What a model's name stands for. A file or folder of this name comes before anything else.
    ///
    /// # Errors
    /// If it begins like the name of a repository, and is none.
    pub fn read(name: &Path) -> Result<Self, NameError> {
        if name.symlink_metadata().is_ok() {
            return Ok(Self::Path(name.to_owned()));
        }
        let Some(text) = name.to_str() else {
            return Ok(Self::Path(name.to_owned()));
        };
        if let Some(name) = text.strip_prefix("ollama:") {
            return Ok(Self::Ollama(name.to_owned()));
        }
        if let Some(name) = text.strip_prefix("lmstudio:") {
            return Ok(Self::LmStudio(name.to_owned()));
        }
        if let Some(rest) = PREFIXES.iter().find_map(|prefix| text.strip_prefix(prefix)) {
            return Repository::read(rest).map(Self::Hub);
        }
        match Repository::read(text) {
            Ok(repository) if !repository.looks_like_a_path(text) => Ok(Self::Hub(repository)),
            _ => Ok(Self::Path(name.to_owned())),
        }
    }
}

impl Repository {
    /// A repository by its name, `org/repo`, with `@REVISION`, and `:TYPE` or `/FILE` behind it; also in the form of addresses,
    /// `org/repo/blob/REVISION/FILE`.
    ///
    /// # Errors
    /// If it is no such name.
    pub fn read(text: &str) -> Result<Self, NameError> {
        let malformed = |problem| NameError::Malformed {
            name: text.to_owned(),
            problem,
        };
        let text = text.split(['?', '#']).next().unwrap_or_default();
        let text = text.strip_suffix('/').unwrap_or(text);
        // The one kind of revision that has slashes: without them, as in addresses, it is a part like any other.
        let at = |revision| format!("@{revision}");
        let text = text.replace(&at(PULL_REQUEST), &at(PULL_REQUEST_ESCAPED));
        let mut parts = text.splitn(3, '/');
        let (Some(org), Some(repo)) = (parts.next(), parts.next()) else {
            return Err(malformed("it has the form ORG/REPO"));
        };
        let (mut repo, mut kind) = (repo, None);
        if let Some((name, tag)) = repo.split_once(':') {
            (repo, kind) = (name, Some(tag));
        }
        let (repo, mut revision) = match repo.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (repo, None),
        };
        // Also org/repo:TYPE@REVISION.
        if let Some((tag, behind)) = kind.and_then(|kind| kind.split_once('@')) {
            (kind, revision) = (Some(tag), Some(behind));
        }
        if !is_part(org) || !is_part(repo) {
            return Err(malformed(
                "the two parts of ORG/REPO have letters, digits, '-', '_' and '.', and begin with none of the last",
            ));
        }
        let mut file = parts.next();
        for address in ["blob/", "resolve/", "raw/", "tree/"] {
            if let Some(rest) = file.and_then(|file| file.strip_prefix(address)) {
                let (named, behind) = match rest.split_once('/') {
                    Some((named, behind)) => (named, Some(behind)),
                    None => (rest, None),
                };
                (revision, file) = (Some(named), behind);
                break;
            }
        }
        let revision = revision.map(|text| text.replace(PULL_REQUEST_ESCAPED, PULL_REQUEST));
        if revision.as_deref().is_some_and(|text| !is_revision(text)) {
            return Err(malformed(
                "behind '@' stands a branch, a tag, a commit or refs/pr/N",
            ));
        }
        let wanted = match (kind, file) {
            (Some(_), Some(_)) => return Err(malformed("it names a type and a file as well")),
            (None, None) => Wanted::Usual,
            (Some(kind), None) if kind.eq_ignore_ascii_case("latest") => Wanted::Usual,
            (Some(kind), None) if is_part(kind) => Wanted::Type(kind.to_owned()),
            (Some(_), None) => return Err(malformed("behind ':' stands a type, like Q4_K_M")),
            (None, Some(file)) if is_within(file) => Wanted::File(file.to_owned()),
            (None, Some(_)) => return Err(malformed("behind ORG/REPO/ stands a file of it")),
        };
        Ok(Self {
            id: format!("{org}/{repo}"),
            revision,
            wanted,
        })
    }

    /// Whether a text in this form is more likely a path that does not lead anywhere: `models/file.gguf`, or anything in a folder
    /// that there is.
    fn looks_like_a_path(&self, text: &str) -> bool {
        let is_model = |name: &str| {
            let extension = Path::new(name).extension();
            extension.is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
        };
        let (org, repo) = self.id.split_once('/').unwrap_or_default();
        let odd_file = match &self.wanted {
            Wanted::File(file) => !is_model(file),
            Wanted::Usual | Wanted::Type(_) => false,
        };
        is_model(repo) || odd_file || text.ends_with('/') || Path::new(org).is_dir()
    }
}

/// As it can be typed again.
impl std::fmt::Display for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.id)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        match &self.wanted {
            Wanted::Usual => Ok(()),
            Wanted::Type(kind) => write!(f, ":{kind}"),
            Wanted::File(file) => write!(f, "/{file}"),
        }
    }
}

/// Whether a text can be the name of an organisation, a repository, a revision or a tag, and of a file at the same time.
pub(super) fn is_part(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=128).contains(&text.len()) && !text.starts_with(['.', '-']) && text.chars().all(fits)
}

/// Whether a text can be the name of a revision.
fn is_revision(text: &str) -> bool {
    let number = text.strip_prefix(PULL_REQUEST);
    is_part(text) || number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether a name leads to a file within a folder, and nowhere else.
pub(super) fn is_within(name: &str) -> bool {
    let normal = |part: Component| matches!(part, Component::Normal(_));
    !name.is_empty()
        && !name.contains(['\\', ':'])
        && !name.chars().any(char::is_control)
        && name
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..")
        && Path::new(name).components().all(normal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> ModelName {
        ModelName::read(Path::new(text)).expect("a name")
    }

    fn hub(id: &str, revision: Option<&str>, wanted: Wanted) -> ModelName {
        ModelName::Hub(Repository {
            id: id.to_owned(),
            revision: revision.map(str::to_owned),
            wanted,
        })
    }

    #[test]
    fn repositories_are_named_with_a_type_a_file_and_a_revision() {
        let kind = |kind: &str| Wanted::Type(kind.to_owned());
        let file = |file: &str| Wanted::File(file.to_owned());
        let id = "org/Model-1.5_GGUF";
        for (text, expected) in [
            (id.to_owned(), hub(id, None, Wanted::Usual)),
            (format!("{id}:latest"), hub(id, None, Wanted::Usual)),
            (format!("{id}:Q4_K_M"), hub(id, None, kind("Q4_K_M"))),
            (format!("{id}@v1:Q8_0"), hub(id, Some("v1"), kind("Q8_0"))),
            (format!("{id}:Q8_0@v1"), hub(id, Some("v1"), kind("Q8_0"))),
            (format!("{id}/a.gguf"), hub(id, None, file("a.gguf"))),
            (format!("{id}/q4/a.gguf"), hub(id, None, file("q4/a.gguf"))),
            (format!("hf:{id}"), hub(id, None, Wanted::Usual)),
            (format!("hf.co/{id}:Q4_0"), hub(id, None, kind("Q4_0"))),
            (
                format!("https://huggingface.co/{id}/"),
                hub(id, None, Wanted::Usual),
            ),
            (
                format!("https://huggingface.co/{id}/resolve/main/a.gguf?download=true"),
                hub(id, Some("main"), file("a.gguf")),
            ),
            (
                format!("https://huggingface.co/{id}/tree/v2"),
                hub(id, Some("v2"), Wanted::Usual),
            ),
            (
                format!("{id}@refs/pr/12:Q8_0"),
                hub(id, Some("refs/pr/12"), kind("Q8_0")),
            ),
            (
                format!("{id}@refs/pr/12/a.gguf"),
                hub(id, Some("refs/pr/12"), file("a.gguf")),
            ),
            (
                format!("{id}/refs/pr/a.gguf"),
                hub(id, None, file("refs/pr/a.gguf")),
            ),
            (
                format!("https://huggingface.co/{id}/blob/refs%2Fpr%2F12/a.gguf"),
                hub(id, Some("refs/pr/12"), file("a.gguf")),
            ),
        ] {
            assert_eq!(read(&text), expected, "{text}");
        }
        assert_eq!(read("ollama:a:1b"), ModelName::Ollama("a:1b".to_owned()));
        let studio = ModelName::LmStudio("a/b".to_owned());
        assert_eq!(read("lmstudio:a/b"), studio);
    }

    #[test]
    fn what_looks_like_a_path_is_one() {
        for text in [
            "model.gguf",
            "models/model.gguf",
            "models/MODEL.GGUF",
            "./org/repo",
            "../org/repo",
            "/org/repo",
            "~/org/repo",
            "org/",
            "org/repo/",
            "org",
            "org//repo",
            "org\\repo",
            "C:/models/a.gguf",
            "org/repo/../a.gguf",
            "org/repo/notes.txt",
            "org/re po",
            // There is such a folder.
            "src/nothing",
            "src/nothing/a.gguf",
            "",
        ] {
            assert_eq!(read(text), ModelName::Path(text.into()), "{text}");
        }
    }

    #[test]
    fn what_begins_like_a_repository_must_be_one() {
        for text in [
            "hf:org",
            "hf:",
            "hf:a/b:c/d",
            "hf:a/b/../c.gguf",
            "hf:a/.b",
            "hf:a/b@",
            "hf:a/b@refs/pr/x",
            "hf:a/b@refs/heads/x/y/../z",
            "hf:a/b:",
        ] {
            let error = ModelName::read(Path::new(text)).expect_err(text);
            assert!(error.to_string().contains("ORG/REPO") || error.to_string().contains("stands"));
        }
    }
}
