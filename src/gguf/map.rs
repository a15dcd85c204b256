//! The map of a model file. It is private and copy-on-write, so that pruning can rewrite weights in place while the file stays
//! as it is.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use memmap2::{MmapMut, MmapOptions};

/// A private copy-on-write map of a whole file, or memory without a file that is used in the same way.
///
/// Pages are shared with the file until they are written to. No other program may truncate the file while it is mapped:
/// reading past the new end would kill the process, and a program that maps files cannot prevent that.
#[derive(Debug)]
pub struct Map {
    bytes: MmapMut,
}

/// How much of a map is in physical memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Residency {
    /// Bytes in memory, shared with the file or private.
    pub resident: u64,
    /// Bytes in memory that have been written to and so belong to this process alone; part of `resident`.
    pub private: u64,
}

impl Map {
    /// Maps the file at `path` for reading and for private writing.
    ///
    /// # Errors
    /// Errors of the operating system; also if the file is empty or is not a regular file.
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
        // No swap space is reserved for pages that may be written to, because a model may be larger than the memory.
        //
        // SAFETY: the map is private, so nothing that we write reaches the file and our own pages change under nobody.
        // Another process that modifies the file while it is mapped can change pages that we have not yet read; all
        // parsing happens on checked ranges and every byte pattern is a valid value of the types that we view.
        let bytes = unsafe { MmapOptions::new().no_reserve_swap().map_copy(&file)? };
        Ok(Self { bytes })
    }

    /// Memory of `len` bytes that belongs to no file. It is zeros at first, and zeros again where it was released.
    ///
    /// # Errors
    /// If the operating system does not provide that much memory.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let bytes = MmapMut::map_anon(len)?;
        Ok(Self { bytes })
    }

    /// All bytes of the map.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All bytes of the map, for writing. Pages that are written to become private to this process.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Several ranges of bytes for writing at the same time, in the order in which they are given. They must not overlap.
    ///
    /// # Panics
    /// If ranges overlap or reach past the end of the map.
    pub fn disjoint_mut(&mut self, ranges: &[Range<usize>]) -> Vec<&mut [u8]> {
        let mut order: Vec<usize> = (0..ranges.len()).collect();
        order.sort_by_key(|i| ranges[*i].start);
        let mut pieces: Vec<&mut [u8]> = ranges.iter().map(|_| &mut [][..]).collect();
        let (mut rest, mut at) = (&mut self.bytes[..], 0);
        for i in order {
            // An empty range overlaps nothing, wherever it is.
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

    /// Gives the pages that lie wholly inside `range` back to the operating system. What was written to them is lost: they
    /// then read as the file's own bytes, or as zeros if there is no file.
    ///
    /// # Errors
    /// Errors of the operating system.
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

    /// Lets go of everything that was written: the map reads as its file again, or as zeros if there is none, and none of its pages
    /// belongs to this process.
    ///
    /// # Errors
    /// Errors of the operating system; always where it has no such thing. The map is then as it was.
    pub fn reset(&mut self) -> io::Result<()> {
        #[cfg(unix)]
        // SAFETY: as in `release`; a last page that the file fills in part is the map's too.
        unsafe {
            let all = self.bytes.len();
            self.bytes
                .unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, 0, all)
        }
        #[cfg(not(unix))]
        Err(io::ErrorKind::Unsupported.into())
    }

    /// How much of the map is in memory, in bytes, from `/proc/self/smaps`; `None` if the system has no such file or it cannot
    /// be understood.
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
                    // Not Private_Dirty or Private_Clean: these also count pages of the file that only this process has mapped.
                    "Anonymous:" => total.private += bytes()?,
                    _ => {}
                }
            }
        }
        Some(total)
    }
}

/// The size of a page of memory in bytes.
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
