//! The map of a model file: private and copy-on-write, so that pruning can rewrite weights in place without touching the file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use memmap2::{MmapMut, MmapOptions};

/// A private copy-on-write map of a whole file, or memory in the form of one.
///
/// Pages are shared with the file until they are written to. The file must not be truncated by another program while it
/// is mapped (reading past its new end would kill the process; no program that maps files can prevent that).
#[derive(Debug)]
pub struct Map {
    bytes: MmapMut,
}

/// How much of a map is in memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Residency {
    /// In memory at all, shared with the file or private.
    pub resident: u64,
    /// Written to, and so private to this process.
    pub private: u64,
}

impl Map {
    /// Maps `path` for reading and private writing.
    ///
    /// # Errors
    /// Those of the operating system; also when the file is empty or not a regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file; name a .gguf model",
            ));
        }
        if meta.len() == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file is empty; name a .gguf model",
            ));
        }
        // Nothing is set aside for pages that may be written to: a model may be larger than memory.
        //
        // SAFETY: the map is private, so nothing that we write reaches the file and our own pages change under nobody.
        // Another process that modifies the file while it is mapped can change pages that we have not yet read; all
        // parsing happens on checked ranges and every byte pattern is a valid value of the types that we view.
        let bytes = unsafe { MmapOptions::new().no_reserve_swap().map_copy(&file)? };
        Ok(Self { bytes })
    }

    /// Memory of this process that belongs to no file, all zeros; a released part reads as zeros again.
    ///
    /// # Errors
    /// If the system has not so much.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let bytes = MmapMut::map_anon(len)?;
        Ok(Self { bytes })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes for writing; pages that are written become private to this process.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Ranges that do not overlap, for writing, in the order in which they are given.
    ///
    /// # Panics
    /// If ranges overlap or reach past the end.
    pub fn disjoint_mut(&mut self, ranges: &[Range<usize>]) -> Vec<&mut [u8]> {
        let mut order: Vec<usize> = (0..ranges.len()).collect();
        order.sort_by_key(|i| ranges[*i].start);
        let mut pieces: Vec<&mut [u8]> = ranges.iter().map(|_| &mut [][..]).collect();
        let (mut rest, mut at) = (&mut self.bytes[..], 0);
        for i in order {
            // Empty ranges may lie anywhere.
            if ranges[i].is_empty() {
                continue;
            }
            let (_, tail) = rest.split_at_mut(ranges[i].start - at);
            let (piece, tail) = tail.split_at_mut(ranges[i].len());
            pieces[i] = piece;
            (rest, at) = (tail, ranges[i].end);
        }
        pieces
    }

    /// Gives the whole pages inside `range` back to the system. What they held is lost: reading them again shows the
    /// file's own bytes, or zeros where there is no file.
    pub fn release(&mut self, range: Range<usize>) -> io::Result<()> {
        let page = page_size();
        let start = range.start.next_multiple_of(page);
        let end = range.end.min(self.bytes.len()) / page * page;
        if start >= end {
            return Ok(());
        }
        #[cfg(unix)]
        // SAFETY: we hold the map exclusively, so nobody holds a view on these bytes while they change, and afterwards
        // they read as the file's own bytes, which are as valid as any.
        unsafe {
            self.bytes.unchecked_advise_range(
                memmap2::UncheckedAdvice::DontNeed,
                start,
                end - start,
            )?;
        }
        Ok(())
    }

    /// How much of the map is in memory, from `/proc/self/smaps`; `None` where the system has no such file.
    pub fn residency(&self) -> Option<Residency> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let ours = self.bytes.as_ptr() as usize..self.bytes.as_ptr() as usize + self.bytes.len();
        let mut total = Residency {
            resident: 0,
            private: 0,
        };
        let mut inside = false;
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            let head = words.next().unwrap_or_default();
            if let Some((from, to)) = head.split_once('-') {
                let from = usize::from_str_radix(from, 16).ok()?;
                let to = usize::from_str_radix(to, 16).ok()?;
                inside = from < ours.end && to > ours.start;
            } else if inside {
                let mut bytes = || {
                    words
                        .next()
                        .and_then(|v| v.parse::<u64>().ok())
                        .map(|k| k * 1024)
                };
                match head {
                    "Rss:" => total.resident += bytes()?,
                    // Anonymous, not Private_Dirty: pages of the file that only we have mapped count as "private" there.
                    "Anonymous:" => total.private += bytes()?,
                    _ => {}
                }
            }
        }
        Some(total)
    }
}

fn page_size() -> usize {
    #[cfg(unix)]
    {
        // SAFETY: sysconf has no preconditions.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(size).unwrap_or(4096)
    }
    #[cfg(not(unix))]
    {
        4096
    }
}
