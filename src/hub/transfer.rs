//! One file from the hub: what has arrived stays under a name of its own until all of it is there and checked.
//!
//! A download that broke off goes on where it did, in this process or in another, by whichever program: the file is named by its
//! hash, which is computed over all of it at the end.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::HeaderMap;

use super::client::{Asked, Client, FileHead, Piece};
use super::errors::{NameError, cannot, is_passing};
use super::{HubError, Step, Steps, tell};
use crate::files::hexadecimal;

/// Failures one behind the other, without as much as [`PROGRESS`] in between, after which a download is given up.
const MOST_FAILURES: u32 = 5;
/// Bytes after which a connection that breaks is no failure of the one before.
const PROGRESS: u64 = 1 << 20;
/// How often whoever waits is told so.
const POLL: Duration = Duration::from_millis(100);
/// Bytes of what is there already that are hashed at a time.
const CHUNK: usize = 1 << 20;

/// A file that is to be fetched.
pub(super) struct Wanted<'a> {
    pub repository: &'a str,
    pub revision: &'a str,
    pub file: &'a str,
    pub head: &'a FileHead,
}

/// How far several files are together.
pub(super) struct Progress {
    /// Bytes of the files before this one.
    pub before: u64,
    /// Bytes of all files; 0 where nobody knows it.
    pub total: u64,
}

/// Fetches a file to `part`, where the beginning of it may be. It is whole and checked when this returns.
///
/// # Errors
/// If it cannot be fetched, or has another length or hash than the hub says: nothing is left of it then. What has arrived stays if
/// the download broke off or was called off.
pub(super) fn fetch(
    client: &Client,
    wanted: &Wanted,
    part: &Path,
    progress: &Progress,
    steps: &mut Steps,
) -> Result<(), HubError> {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(false);
    let file = file.open(part).map_err(cannot("write", part))?;
    let mut transfer = Transfer {
        client,
        wanted,
        part,
        progress,
        file,
        hash: Hash::of(wanted.head),
        done: 0,
        steps,
    };
    let result = transfer.run();
    let worthless = matches!(
        &result,
        Err(HubError::Name(error))
            if matches!(**error, NameError::Length { .. } | NameError::Hash { .. })
    );
    if worthless || (result.is_err() && transfer.done == 0) {
        let _ = fs::remove_file(part);
    }
    result
}

/// The hash that tells whether a file is right.
enum Hash {
    Sha256(Sha256),
    /// Git's, which begins with the file's length.
    Git(Sha1),
    /// The hub does not tell one.
    Nothing,
}

impl Hash {
    fn of(head: &FileHead) -> Self {
        let is_hex = head.etag.bytes().all(|b| b.is_ascii_hexdigit());
        match (head.etag.len(), head.size, is_hex) {
            (64, _, true) => Self::Sha256(Sha256::new()),
            (40, Some(size), true) => Self::Git(Sha1::new_with_prefix(format!("blob {size}\0"))),
            _ => Self::Nothing,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
            Self::Nothing => {}
        }
    }

    fn finish(self) -> Option<(&'static str, String)> {
        match self {
            Self::Sha256(hash) => Some(("SHA-256", hexadecimal(&hash.finalize()))),
            Self::Git(hash) => Some(("git hash", hexadecimal(&hash.finalize()))),
            Self::Nothing => None,
        }
    }
}

struct Transfer<'a, 's> {
    client: &'a Client,
    wanted: &'a Wanted<'a>,
    part: &'a Path,
    progress: &'a Progress,
    file: File,
    hash: Hash,
    /// Bytes that are written and hashed.
    done: u64,
    steps: &'a mut Steps<'s>,
}

/// How a connection ended.
enum Ended {
    /// All that the server has was sent.
    Whole,
    BrokeOff {
        problem: String,
        headers: Option<HeaderMap>,
    },
}

impl Transfer<'_, '_> {
    fn run(&mut self) -> Result<(), HubError> {
        self.hash_what_is_there()?;
        let from_before = self.done > 0;
        self.arrive()?;
        match self.check() {
            // What was there may be of a disk that was full, or of another program.
            Err(NameError::Hash { .. }) if from_before => {
                self.restart()?;
                self.arrive()?;
                self.check()?;
            }
            result => result?,
        }
        self.file.sync_all().map_err(cannot("write", self.part))?;
        Ok(())
    }

    fn size(&self) -> Option<u64> {
        self.wanted.head.size
    }

    fn hash_what_is_there(&mut self) -> Result<(), HubError> {
        let there = self.file.metadata().map_err(cannot("read", self.part))?;
        if self.size().is_none_or(|size| there.len() > size) {
            return self.restart();
        }
        let mut buffer = vec![0; CHUNK];
        loop {
            let count = match self.file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(cannot("read", self.part)(error).into()),
            };
            self.hash.update(&buffer[..count]);
            self.done += count as u64;
            self.told()?;
        }
    }

    fn restart(&mut self) -> Result<(), HubError> {
        self.file.set_len(0).map_err(cannot("write", self.part))?;
        let begin = SeekFrom::Start(0);
        self.file.seek(begin).map_err(cannot("write", self.part))?;
        self.hash = Hash::of(self.wanted.head);
        self.done = 0;
        Ok(())
    }

    fn told(&mut self) -> Result<(), HubError> {
        let step = self.step();
        tell(self.steps, step)
    }

    fn step(&self) -> Step {
        Step::Downloading {
            done: self.progress.before + self.done,
            total: self.progress.total,
        }
    }

    /// Fetches what is missing, over as many connections as it takes.
    fn arrive(&mut self) -> Result<(), HubError> {
        let Wanted {
            repository,
            revision,
            file,
            ..
        } = *self.wanted;
        let address = self.client.access.file(repository, revision, file);
        // By which the server that has the file knows what it sent.
        let mut tag = None;
        let mut failures = 0;
        while self.size() != Some(self.done) || self.done == 0 {
            let before = self.done;
            let mut headers = vec![("accept-encoding", "identity".to_owned())];
            if self.done > 0 {
                headers.push(("range", format!("bytes={}-", self.done)));
                headers.extend(tag.clone().map(|tag| ("if-range", tag)));
            }
            self.told()?;
            let pieces = self.client.fetch(&address, headers);
            let (problem, headers) = match self.receive(&pieces, &address, &mut tag)? {
                Ended::Whole if self.size().is_none_or(|size| size == self.done) => return Ok(()),
                Ended::Whole => ("it ended too early".to_owned(), None),
                Ended::BrokeOff { problem, headers } => (problem, headers),
            };
            let arrived = self.done.saturating_sub(before);
            failures = match arrived >= PROGRESS {
                true => 1,
                false => failures + 1,
            };
            tracing::debug!("{address} broke off at {}: {problem}", self.done);
            if failures >= MOST_FAILURES {
                return Err(match self.done {
                    0 => self.client.unreachable(&problem),
                    done => NameError::BrokenOff {
                        file: file.to_owned(),
                        done,
                        total: self.size(),
                        problem,
                    },
                }
                .into());
            }
            let step = self.step();
            self.client
                .pause(failures - 1, headers.as_ref(), step, self.steps)?;
        }
        Ok(())
    }

    /// Takes what one connection brings.
    fn receive(
        &mut self,
        pieces: &Receiver<Piece>,
        address: &str,
        tag: &mut Option<String>,
    ) -> Result<Ended, HubError> {
        loop {
            let piece = match pieces.recv_timeout(POLL) {
                Ok(piece) => piece,
                Err(RecvTimeoutError::Timeout) => {
                    self.told()?;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Ok(Ended::BrokeOff {
                        problem: "it ended without a word".to_owned(),
                        headers: None,
                    });
                }
            };
            match piece {
                Piece::Head { status, headers } => {
                    if let Some(ended) = self.begin(status, headers, address, tag)? {
                        return Ok(ended);
                    }
                }
                Piece::Bytes(bytes) => self.take(&bytes)?,
                Piece::End(Ok(())) => return Ok(Ended::Whole),
                Piece::End(Err(problem)) => {
                    return Ok(Ended::BrokeOff {
                        problem,
                        headers: None,
                    });
                }
            }
        }
    }

    /// Looks at what a server says before it sends: whether it goes on where it was asked to, and how much there will be.
    fn begin(
        &mut self,
        status: u16,
        headers: HeaderMap,
        address: &str,
        tag: &mut Option<String>,
    ) -> Result<Option<Ended>, HubError> {
        let text = |name: &str| headers.get(name)?.to_str().ok().map(str::to_owned);
        let broke_off = |problem: &str, headers| {
            let problem = problem.to_owned();
            Ok(Some(Ended::BrokeOff { problem, headers }))
        };
        let whole = match status {
            206 => {
                let range = text("content-range").unwrap_or_default();
                let (begin, whole) = content_range(&range);
                if begin != Some(self.done) {
                    self.restart()?;
                    return broke_off("it sends another part than was asked for", None);
                }
                whole
            }
            200 => {
                if self.done > 0 {
                    tracing::debug!("{address} begins anew");
                    self.restart()?;
                }
                text("content-length").and_then(|length| length.parse().ok())
            }
            416 => {
                self.restart()?;
                return broke_off("it has no such part", None);
            }
            status if is_passing(status) => {
                return broke_off(&format!("it answers {status}"), Some(headers));
            }
            status => {
                let asked = Asked {
                    address,
                    repository: self.wanted.repository,
                    revision: self.wanted.revision,
                    file: Some(self.wanted.file),
                };
                return Err(self.client.refusal(status, &headers, "", &asked).into());
            }
        };
        if let (Some(expected), Some(found)) = (self.size(), whole)
            && expected != found
        {
            return Err(self.wrong_length(found).into());
        }
        // A weak one does not say that the bytes are the same.
        *tag = text("etag").filter(|tag| tag.starts_with('"'));
        Ok(None)
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        let end = self.done + bytes.len() as u64;
        if self.size().is_some_and(|size| end > size) {
            return Err(self.wrong_length(end).into());
        }
        self.file
            .write_all(bytes)
            .map_err(cannot("write", self.part))?;
        self.hash.update(bytes);
        self.done = end;
        self.told()
    }

    fn wrong_length(&self, found: u64) -> NameError {
        NameError::Length {
            file: self.wanted.file.to_owned(),
            expected: self.size().unwrap_or_default(),
            found,
        }
    }

    /// Compares the hash, after all has arrived.
    fn check(&mut self) -> Result<(), NameError> {
        let hash = std::mem::replace(&mut self.hash, Hash::Nothing);
        match hash.finish() {
            Some((kind, found)) if !found.eq_ignore_ascii_case(&self.wanted.head.etag) => {
                Err(NameError::Hash {
                    file: self.wanted.file.to_owned(),
                    kind,
                    expected: self.wanted.head.etag.clone(),
                    found,
                })
            }
            _ => Ok(()),
        }
    }
}

/// `bytes 10-19/100`: where the part begins, and how long the whole is.
fn content_range(text: &str) -> (Option<u64>, Option<u64>) {
    let rest = text.trim().strip_prefix("bytes ").unwrap_or_default();
    let (part, whole) = rest.split_once('/').unwrap_or_default();
    let begin = part
        .split_once('-')
        .and_then(|(b, _)| b.trim().parse().ok());
    (begin, whole.trim().parse().ok())
}
